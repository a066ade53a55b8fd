"""The definition of linear attention with scalar decay: one step of the recurrence a token. Exact in float64."""

from __future__ import annotations

import torch
from torch import Tensor


def state_dtype(q: Tensor) -> torch.dtype:
    """What states are kept and sums are made in: float64 for float64, else float32."""
    return torch.float64 if q.dtype is torch.float64 else torch.float32


def spread(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """q, k, v and factors e^g (B, H, L) in the dtype of the states, each head with its own q and k."""
    dtype, shared = state_dtype(q), v.shape[1] // max(1, q.shape[1])
    queries, keys = (x.to(dtype).repeat_interleave(shared, dim=1) if shared > 1 else x.to(dtype) for x in (q, k))
    decay = log_decay.to(dtype).exp()
    return queries, keys, v.to(dtype), decay if decay.dim() == 3 else decay[:, None].expand(v.shape[:3])


def run(
    q: Tensor, k: Tensor, v: Tensor, *, log_decay: Tensor, scale: float, initial_state: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Arguments as `core_attn.ops.scalar_decay_attention` hands them on -> outputs and final state."""
    with torch.autocast(q.device.type, enabled=False):
        queries, keys, values, decay = spread(q, k, v, log_decay)
        if initial_state is None:
            state = values.new_zeros(*v.shape[:2], q.shape[3], v.shape[3])
        else:
            state = initial_state.to(values.dtype)
        outs = []
        for t in range(q.shape[2]):
            state = decay[:, :, t, None, None] * state + keys[:, :, t, :, None] * values[:, :, t, None, :]
            outs.append(scale * (queries[:, :, t, None, :] @ state)[:, :, 0])
        # From the inputs where there is no token, so that they stay in the graph.
        out = torch.stack(outs, dim=2) if outs else values + 0.0 * (queries.sum() + keys.sum() + decay.sum())
        return out.to(q.dtype), state
