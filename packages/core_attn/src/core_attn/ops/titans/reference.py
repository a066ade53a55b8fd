"""The definition of the linear Titans memory: one step of the recurrence a token. Exact in float64."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from core_attn.ops.delta.reference import state_dtype


class TitansState(NamedTuple):
    """What the memory has come to behind some tokens, and where in a chunk of gradients they ended.

    Attributes:
        memory: (B, H, D, Dv), M.
        surprise: (B, H, D, Dv), the momentum S.
        anchor: (B, H, D, Dv), the memory at the start of the chunk in hand, between two chunks the memory itself; None
            for chunks of one token.
        seen: tokens of that chunk so far; 0 between two chunks.
    """

    memory: Tensor
    surprise: Tensor
    anchor: Tensor | None = None
    seen: int = 0

    def select(self, rows: Tensor) -> TitansState:
        """A new state with the samples `rows` (int64) of this one, in that order."""
        memory, surprise = self.memory.index_select(0, rows), self.surprise.index_select(0, rows)
        anchor = None if self.anchor is None else self.anchor.index_select(0, rows)
        return TitansState(memory, surprise, anchor, self.seen)


def begin(q: Tensor, v: Tensor, state: TitansState | None) -> TitansState:
    """`state` in the dtype of states, zeros where it is None; without an anchor between two chunks."""
    dtype = state_dtype(q)
    if state is None:
        zeros = v.new_zeros(*q.shape[:2], q.shape[3], v.shape[3], dtype=dtype)
        return TitansState(zeros, zeros)
    anchor = state.anchor.to(dtype) if state.seen and state.anchor is not None else None
    return TitansState(state.memory.to(dtype), state.surprise.to(dtype), anchor, state.seen)


def end(memory: Tensor, surprise: Tensor, anchor: Tensor | None, seen: int, chunk: int) -> TitansState:
    """The final state; it has an anchor at every place of a chunk, so that its size is always the same."""
    if anchor is None and chunk > 1:
        anchor = memory.clone()
    return TitansState(memory, surprise, anchor, seen)


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
        queries, keys, values, theta = (x.to(dtype) for x in (q, k, v, rate))
        memory, surprise, anchor, seen = begin(q, v, initial_state)
        outs = []
        for t in range(q.shape[2]):
            if anchor is None:
                anchor = memory
            key, value = keys[:, :, t, :, None], values[:, :, t, None, :]
            # Of |kᵀ W - v|² with respect to W, the memory that the chunk started with.
            gradient = 2.0 * key * (key.transpose(-1, -2) @ anchor - value)
            after = -theta[:, :, t, None, None] * gradient
            if log_momentum is not None:
                after = after + log_momentum[:, :, t, None, None].to(dtype).exp() * surprise
            kept = memory if log_decay is None else log_decay[:, :, t, None, None].to(dtype).exp() * memory
            if key_padding_mask is None:
                memory, surprise = kept + after, after
            else:
                real = key_padding_mask[:, t, None, None, None]
                memory, surprise = torch.where(real, kept + after, memory), torch.where(real, after, surprise)
            outs.append((queries[:, :, t, None, :] @ memory)[:, :, 0])
            seen += 1
            if seen == chunk:
                anchor, seen = None, 0
        # Made from the inputs where there is no token, so that they stay in the graph.
        out = torch.stack(outs, dim=2) if outs else values + 0.0 * (queries.sum() + keys.sum() + theta.sum())
        return (out * scale).to(q.dtype), end(memory, surprise, anchor, seen, chunk)
