"""The definition of the delta rule: one step of the recurrence a token. Exact in float64."""

from __future__ import annotations

import torch
from torch import Tensor


def state_dtype(q: Tensor) -> torch.dtype:
    """What states are kept and sums are made in: float64 for float64, else float32."""
    return torch.float64 if q.dtype is torch.float64 else torch.float32


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
        queries, keys, values, strength = q.to(dtype) * scale, k.to(dtype), v.to(dtype), beta.to(dtype)
        if initial_state is None:
            state = values.new_zeros(*q.shape[:2], q.shape[3], v.shape[3])
        else:
            state = initial_state.to(dtype)
        eye = torch.eye(k.shape[3], dtype=dtype, device=k.device)
        outs = []
        for t in range(q.shape[2]):
            key, value, much = keys[:, :, t, :, None], values[:, :, t, None, :], strength[:, :, t, None, None]
            turn = eye - much * (key * key.transpose(-1, -2))
            if log_decay is not None:
                turn = log_decay[:, :, t, None, None].to(dtype).exp() * turn
            state = turn @ state + much * (key * value)
            outs.append((queries[:, :, t, None, :] @ state)[:, :, 0])
        # Made from the inputs where there is no token, so that they stay in the graph.
        out = torch.stack(outs, dim=2) if outs else values + 0.0 * (queries.sum() + keys.sum() + strength.sum())
        return out.to(q.dtype), state
