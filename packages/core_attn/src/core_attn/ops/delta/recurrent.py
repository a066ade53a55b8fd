"""The delta rule token by token, with as little work a token as there is: for decoding, and for few tokens."""

from __future__ import annotations

import torch
from torch import Tensor

from core_attn.ops.delta.reference import state_dtype


def run(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    beta: Tensor,
    log_decay: Tensor | None,
    scale: float,
    initial_state: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Arguments as `core_attn.ops.delta_rule` hands them on -> outputs and final state."""
    dtype = state_dtype(q)
    with torch.autocast(q.device.type, enabled=False):
        # Rows (B·H, L, ·), so that a step is three products of batches of vectors and matrices.
        queries, keys, values, strength = (x.to(dtype).flatten(0, 1) for x in (q, k, v, beta.unsqueeze(-1)))
        decay = None if log_decay is None else log_decay.to(dtype).flatten(0, 1).exp()[..., None, None]
        if initial_state is None:
            state = values.new_zeros(values.shape[0], q.shape[3], v.shape[3])
        else:
            state = initial_state.to(dtype).flatten(0, 1)
        outs = []
        for t in range(q.shape[2]):
            if decay is not None:
                state = state * decay[:, t]
            key = keys[:, t : t + 1]
            # What the state does not say about the key yet.
            new = strength[:, t : t + 1] * torch.baddbmm(values[:, t : t + 1], key, state, alpha=-1)
            state = torch.baddbmm(state, key.transpose(1, 2), new)
            outs.append(torch.bmm(queries[:, t : t + 1], state))
        # Made from the inputs where there is no token, so that they stay in the graph.
        out = torch.cat(outs, dim=1) * scale if outs else values + 0.0 * (queries.sum() + keys.sum() + strength.sum())
        return out.unflatten(0, q.shape[:2]).to(q.dtype), state.unflatten(0, q.shape[:2])
