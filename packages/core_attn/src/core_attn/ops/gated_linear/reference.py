"""The definition of gated linear attention: one step of the recurrence a token. Exact in float64."""

from __future__ import annotations

import torch
from torch import Tensor


def state_dtype(dtype: torch.dtype | None) -> torch.dtype:
    """What states are kept and sums are made in for inputs of `dtype`: float64 for float64, else float32."""
    return torch.float64 if dtype is torch.float64 else torch.float32


def run(
    q: Tensor, k: Tensor, v: Tensor, *, log_gate: Tensor, scale: float, initial_state: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Arguments as `core_attn.ops.gated_linear_attention` hands them on -> outputs and final state."""
    dtype = state_dtype(q.dtype)
    with torch.autocast(q.device.type, enabled=False):
        queries, keys, values, decay = q.to(dtype) * scale, k.to(dtype), v.to(dtype), log_gate.to(dtype).exp()
        if initial_state is None:
            state = values.new_zeros(*q.shape[:2], q.shape[3], v.shape[3])
        else:
            state = initial_state.to(dtype)
        outs = []
        for t in range(q.shape[2]):
            state = decay[:, :, t, :, None] * state + keys[:, :, t, :, None] * values[:, :, t, None, :]
            outs.append((queries[:, :, t, None, :] @ state)[:, :, 0])
        # Stacked from the inputs where there is no token, so that they stay in the graph.
        out = torch.stack(outs, dim=2) if outs else values + 0.0 * (queries.sum() + keys.sum() + decay.sum())
        return out.to(q.dtype), state
