"""Gated linear attention token by token, with as little work a token as there is: for decoding, and for few tokens."""

from __future__ import annotations

import torch
from torch import Tensor

from core_attn.ops.gated_linear.reference import state_dtype


def run(
    q: Tensor, k: Tensor, v: Tensor, *, log_gate: Tensor, scale: float, initial_state: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Arguments as `core_attn.ops.gated_linear_attention` hands them on -> outputs and final state."""
    dtype = state_dtype(q.dtype)
    with torch.autocast(q.device.type, enabled=False):
        # Rows (B·H, L, ·), so that a step is two products of batches of matrices.
        queries, keys, values, decay = (x.to(dtype).flatten(0, 1) for x in (q, k, v, log_gate))
        decay, keys = decay.exp().unsqueeze(-1), keys.unsqueeze(-1)
        if initial_state is None:
            state = values.new_zeros(values.shape[0], q.shape[3], v.shape[3])
        else:
            state = initial_state.to(dtype).flatten(0, 1)
        outs = []
        for t in range(q.shape[2]):
            state = torch.baddbmm(state * decay[:, t], keys[:, t], values[:, t : t + 1])
            outs.append(torch.bmm(queries[:, t : t + 1], state))
        # Stacked from the inputs where there is no token, so that they stay in the graph.
        out = torch.cat(outs, dim=1) * scale if outs else values + 0.0 * (queries.sum() + keys.sum() + decay.sum())
        return out.unflatten(0, q.shape[:2]).to(q.dtype), state.unflatten(0, q.shape[:2])
