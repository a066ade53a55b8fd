"""RAT token by token, with as little work a token as there is: for decoding, and for few tokens."""

from __future__ import annotations

import torch
from torch import Tensor

from core_attn.ops.rat import reference
from core_attn.ops.rat.reference import RatState, chunks_with_tokens, rotated, state_dtype


def run(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    log_gate: Tensor,
    chunk_size: int,
    scale: float,
    rotary_base: float | None,
    real: Tensor | None,
    state: RatState,
) -> tuple[Tensor, RatState]:
    """Arguments as `core_attn.ops.rat_attention` hands them on -> outputs and final state."""
    dtype, length = state_dtype(q), q.shape[2]
    options = {"log_gate": log_gate, "chunk_size": chunk_size, "scale": scale, "rotary_base": rotary_base}
    if not length:
        return reference.run(q, k, v, real=real, state=state, **options)  # type: ignore[arg-type]
    with torch.autocast(q.device.type, enabled=False):
        last_k, last_v, ends_k, ends_v = (x.to(dtype) for x in state[:4])
        log_gate = log_gate.to(dtype)
        gate, new_k, new_v = log_gate.exp(), *(-torch.expm1(log_gate) * x.to(dtype) for x in (k, v))
        chunks = (state.seen + torch.arange(length, device=q.device)) // chunk_size
        turned = rotated(q.to(dtype), chunks, rotary_base) * scale
        empty = None if real is None else ~chunks_with_tokens(real, chunk_size)[:, None]
        outs = []
        for t in range(length):
            key, value = new_k[:, :, t], new_v[:, :, t]
            if (state.seen + t) % chunk_size:
                key, value = key + gate[:, :, t] * last_k, value + gate[:, :, t] * last_v
            own = rotated(key.unsqueeze(2), chunks[t : t + 1], rotary_base)
            query = turned[:, :, t : t + 1]
            scores = query @ ends_k.mT
            if empty is not None:
                scores = scores.masked_fill(empty[..., None, : ends_k.shape[2]], -torch.inf)
            weights = torch.cat([scores, query @ own.mT], dim=-1).softmax(-1)
            outs.append(weights[..., :-1] @ ends_v + weights[..., -1:] * value.unsqueeze(2))
            if (state.seen + t + 1) % chunk_size == 0:
                ends_k = torch.cat([ends_k, own], dim=2)
                ends_v = torch.cat([ends_v, value.unsqueeze(2)], dim=2)
            last_k, last_v = key, value
        seen = state.seen + length
        return torch.cat(outs, dim=2).to(q.dtype), RatState(last_k, last_v, ends_k, ends_v, seen)
