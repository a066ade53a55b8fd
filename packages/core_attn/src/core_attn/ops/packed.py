"""Sequences of different lengths packed one after the other along the tokens, without padding: for recurrent operators.

`offsets` (N + 1,) say where the N sequences start and end.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor


def longest_sequence(name: str, offsets: Tensor, length: int) -> int:
    """Length of the longest of the sequences packed into `length` tokens; `offsets` are read by the host.

    Raises:
        ValueError: they do not rise from 0 to `length`; they are called `name` in the message.
    """
    if offsets.dim() != 1 or offsets.dtype not in (torch.int32, torch.int64) or len(offsets) < 2:
        raise ValueError(
            f"{name} must be int32 or int64 of shape (N + 1,), N >= 1, got {offsets.dtype} {tuple(offsets.shape)}"
        )
    ends = offsets.tolist()
    lengths = [b - a for a, b in pairwise(ends)]
    if ends[0] != 0 or ends[-1] != length or min(lengths) < 0:
        raise ValueError(f"{name} must rise from 0 to the {length} packed rows and never fall, got {_shown(ends)}")
    return max(lengths)


def _shown(ends: list[int]) -> str:
    return str(ends) if len(ends) <= 8 else f"[{', '.join(map(str, ends[:4]))}, ..., {ends[-1]}]"


def packing(q: Tensor, cu_seqlens: Tensor | None) -> dict[str, Any]:
    """What every form of a recurrent operator takes of packed sequences: `offsets` and `longest`, None without.

    Raises:
        ValueError: more than one batch entry; offsets that do not fit the tokens of q (B, H, L, D).
    """
    if cu_seqlens is None:
        return {"offsets": None, "longest": None}
    if q.shape[0] != 1:
        raise ValueError(f"packed sequences lie in one batch entry, got {q.shape[0]} with cu_seqlens")
    longest = longest_sequence("cu_seqlens", cu_seqlens, q.shape[2])
    return {"offsets": cu_seqlens.to(q.device), "longest": longest}


def by_sequence(form: Callable[..., tuple[Tensor, Tensor]], gate: str) -> Callable[..., tuple[Tensor, Tensor]]:
    """A form of a recurrent operator that knows no packed sequences, run on one of them after the other.

    `gate` is the name of its argument with gates: of axes (B, H, L, ...), or without tokens and then of every sequence.
    """

    def run(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        initial_state: Tensor | None,
        offsets: Tensor | None = None,
        longest: int | None = None,
        **options: Any,
    ) -> tuple[Tensor, Tensor]:
        if offsets is None:
            return form(q, k, v, initial_state=initial_state, **options)
        gates = options.pop(gate)
        lengths = [b - a for a, b in pairwise(offsets.tolist())]
        # Split, not slices: the gradient of a slice is as large as the whole.
        parts = [x.split(lengths, dim=2) for x in (q, k, v)]
        of_gates = gates.split(lengths, dim=2) if gates.dim() > 2 else [gates] * len(lengths)
        initial = [None] * len(lengths) if initial_state is None else initial_state.split(1)
        found = [
            form(*one, initial_state=state, **{gate: g}, **options)
            for *one, g, state in zip(*parts, of_gates, initial, strict=True)
        ]
        outs, states = zip(*found, strict=True)
        return torch.cat(outs, dim=2), torch.cat(states)

    return run
