"""The definition of RAT: the recurrence one token after another, then one masked softmax. O(L²/C); exact in float64.

Shapes: B batch, H heads, L tokens, D channels of a head, C tokens of a chunk, N complete chunks.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from core_attn.positions.rotary import rotary


class RatState(NamedTuple):
    """What decoding remembers: the recurrence in the chunk that is not complete, and an end of every complete one.

    Attributes:
        key, value: (B, H, D) k̃ and ṽ of the last token, before any rotation.
        keys, values: (B, H, N, D) k̃, rotated, and ṽ of the ends of the N complete chunks.
        seen: number of tokens so far.
    """

    key: Tensor
    value: Tensor
    keys: Tensor
    values: Tensor
    seen: int

    def select(self, rows: Tensor) -> RatState:
        """A new state with the samples `rows` (int64) of this one, in that order: to branch, or to reorder beams."""
        key, value, keys, values = (x.index_select(0, rows) for x in self[:4])
        return RatState(key, value, keys, values, self.seen)


def state_dtype(x: Tensor) -> torch.dtype:
    """What is summed in and remembered."""
    return torch.float64 if x.dtype is torch.float64 else torch.float32


def rotated(x: Tensor, chunks: Tensor, base: float | None) -> Tensor:
    """(B, H, T, D) turned by the numbers (T,) of their chunks."""
    if base is None:
        return x
    return rotary(x, chunks, base=base, channels=x.shape[-1] - x.shape[-1] % 2)


def chunks_with_tokens(real: Tensor, chunk_size: int) -> Tensor:
    """(B, L) which tokens are real -> (B, L // C) which complete chunks have any."""
    whole = real.shape[1] // chunk_size
    return real[:, : whole * chunk_size].unflatten(1, (whole, chunk_size)).any(-1)


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
    with torch.autocast(q.device.type, enabled=False):
        key, value, ends_k, ends_v = (x.to(dtype) for x in state[:4])
        gate = log_gate.to(dtype).exp()
        own_k, own_v = [], []
        for t in range(length):
            g = gate[:, :, t]
            kept = 0.0 if (state.seen + t) % chunk_size == 0 else g
            key = kept * key + (1 - g) * k[:, :, t].to(dtype)
            value = kept * value + (1 - g) * v[:, :, t].to(dtype)
            own_k.append(key)
            own_v.append(value)
        if not length:
            # Made from the inputs, so that they stay in the graph.
            nothing = q.to(dtype) + k.to(dtype) + v.to(dtype) + gate
            return nothing.to(q.dtype), state
        chunks = (state.seen + torch.arange(length, device=q.device)) // chunk_size
        rows_q, rows_k = (rotated(x, chunks, rotary_base) for x in (q.to(dtype), torch.stack(own_k, dim=2)))
        rows_v = torch.stack(own_v, dim=2)
        first = chunk_size - 1 - state.seen % chunk_size
        ends_k = torch.cat([ends_k, rows_k[:, :, first::chunk_size]], dim=2)
        ends_v = torch.cat([ends_v, rows_v[:, :, first::chunk_size]], dim=2)
        scores = scale * (rows_q @ ends_k.mT)
        later = torch.arange(ends_k.shape[2], device=q.device) >= chunks[:, None]
        if real is not None:
            later = later | ~chunks_with_tokens(real, chunk_size)[:, None, None]
        scores = scores.masked_fill(later, -torch.inf)
        own = scale * (rows_q * rows_k).sum(-1, keepdim=True)
        weights = torch.cat([scores, own], dim=-1).softmax(-1)
        out = weights[..., :-1] @ ends_v + weights[..., -1:] * rows_v
        return out.to(q.dtype), RatState(key, value, ends_k, ends_v, state.seen + length)
