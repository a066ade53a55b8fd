"""The linear Titans memory token by token, with as little work a token as there is: for decoding, for few tokens."""

from __future__ import annotations

import torch
from torch import Tensor

from core_attn.ops.delta.reference import state_dtype
from core_attn.ops.titans.reference import TitansState, begin, end


def run(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    rate: Tensor,
    log_momentum: Tensor | None,
    log_decay: Tensor | None,
    chunk: int,
    key_padding_mask: Tensor | None,
    scale: float,
    initial_state: TitansState | None,
    return_state: bool,
) -> tuple[Tensor, TitansState]:
    """Arguments as `core_attn.ops.titans_memory` hands them on -> outputs and final state."""
    dtype = state_dtype(q)
    with torch.autocast(q.device.type, enabled=False):
        # Rows (B·H, L, ·), so that a step is three products of batches of vectors and matrices.
        queries, keys, values = (x.to(dtype).flatten(0, 1) for x in (q, k, v))
        step = rate.to(dtype).flatten(0, 1).unsqueeze(-1) * 2.0
        momentum, decay = (
            None if x is None else x.to(dtype).flatten(0, 1).exp()[..., None, None] for x in (log_momentum, log_decay)
        )
        # Padding has gates of 1 and a step of 0 already; this keeps the momentum from moving the memory there.
        real = None
        if key_padding_mask is not None:
            real = key_padding_mask.to(dtype).repeat_interleave(q.shape[1], 0)[..., None, None]
        start = begin(q, v, initial_state)
        seen = start.seen
        memory, surprise = start.memory.flatten(0, 1), start.surprise.flatten(0, 1)
        anchor = None if start.anchor is None else start.anchor.flatten(0, 1)
        outs = []
        for t in range(q.shape[2]):
            if anchor is None:
                anchor = memory
            key = keys[:, t : t + 1]
            new = step[:, t : t + 1] * torch.baddbmm(values[:, t : t + 1], key, anchor, alpha=-1)
            if momentum is None:
                surprise = torch.bmm(key.transpose(1, 2), new)
            else:
                surprise = torch.baddbmm(surprise * momentum[:, t], key.transpose(1, 2), new)
            kept = memory if decay is None else memory * decay[:, t]
            memory = kept + (surprise if real is None else surprise * real[:, t])
            outs.append(torch.bmm(queries[:, t : t + 1], memory))
            seen += 1
            if seen == chunk:
                anchor, seen = None, 0
        # Made from the inputs where there is no token, so that they stay in the graph.
        out = torch.cat(outs, dim=1) * scale if outs else values + 0.0 * (queries.sum() + keys.sum() + step.sum())
        cut = q.shape[:2]
        anchor = None if anchor is None else anchor.unflatten(0, cut)
        state = end(memory.unflatten(0, cut), surprise.unflatten(0, cut), anchor, seen, chunk)
        return out.unflatten(0, cut).to(q.dtype), state
