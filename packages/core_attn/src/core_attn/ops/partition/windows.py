"""How a grid of queries and a coarser one of keys are cut into windows."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F


@dataclass(frozen=True)
class Windows:
    """The windows of one call, axis by axis.

    Attributes:
        grid: sizes of the queries' axes.
        window: keys of a window.
        factor: queries that share the place of a key.
        shift: keys before the first cut.
    """

    grid: tuple[int, ...]
    window: tuple[int, ...]
    factor: tuple[int, ...]
    shift: tuple[int, ...]

    @classmethod
    def of(
        cls,
        grid: Sequence[int],
        window: int | Sequence[int],
        factor: int | Sequence[int] = 1,
        shift: int | Sequence[int] = 0,
    ) -> Windows:
        """Every option as one number for each axis.

        Raises:
            ValueError: an option out of its range, or not of one number of axes.
        """
        grid = tuple(grid)
        if not 1 <= len(grid) <= 3 or any(n < 0 for n in grid):
            raise ValueError(f"grid must have 1 to 3 axes of sizes that are not negative, got {grid}")
        spread = [(x,) * len(grid) if isinstance(x, int) else tuple(x) for x in (window, factor, shift)]
        if any(len(x) != len(grid) for x in spread):
            raise ValueError(
                f"window, factor and shift must be one number or one for each axis of the grid {grid}, got {window}, "
                f"{factor} and {shift}"
            )
        if min(spread[0] + spread[1]) < 1 or any(not 0 <= s < w for s, w in zip(spread[2], spread[0])):
            raise ValueError(
                f"window and factor must be positive and 0 <= shift < window, got {window}, {factor} and {shift}"
            )
        return cls(grid, *spread)

    @property
    def key_grid(self) -> tuple[int, ...]:
        return tuple(-(-n // f) for n, f in zip(self.grid, self.factor))

    @property
    def queries(self) -> int:
        return math.prod(self.grid)

    @property
    def keys(self) -> int:
        return math.prod(self.key_grid)

    @property
    def offsets(self) -> tuple[int, ...]:
        """Sizes of the table of relative positional biases."""
        return tuple((2 * w - 1) * f for w, f in zip(self.window, self.factor))

    @property
    def tile(self) -> tuple[int, ...]:
        """Queries of a window, axis by axis."""
        return tuple(w * f for w, f in zip(self.window, self.factor))

    @property
    def pairs(self) -> int:
        """Pairs of a query and a key that a head reads."""
        total = 1
        for n, m, w, f, s in zip(self.grid, self.key_grid, self.window, self.factor, self.shift):
            cuts = [0, *range(s or w, m, w), m]
            total *= sum((min(b * f, n) - a * f) * (b - a) for a, b in itertools.pairwise(cuts))
        return total

    def tight(self) -> Windows:
        """The same windows where they are larger than the grid, or shifted beyond it: smaller ones, fewer shifts."""
        window, shift = [], []
        for m, w, s in zip(self.key_grid, self.window, self.shift):
            if s == 0 or s >= m:
                window.append(max(1, min(w, m)))
                shift.append(0)
            else:
                window.append(min(w, max(s, m - s)))
                shift.append(s % window[-1])
        return Windows(self.grid, tuple(window), self.factor, tuple(shift))

    @property
    def counts(self) -> tuple[int, ...]:
        """Windows on each axis once its ends are joined to a ring of whole windows."""
        return tuple(-(-m // w) for m, w in zip(self.key_grid, self.window))

    def cut(self, x: Tensor, *, keys: bool) -> Tensor:
        """(B, H, tokens, D) -> (B · windows, H, tokens of a window, D), zeros where there is no token.

        The axes are rings of whole windows, as in the paper: what lies before the shift comes last, in one window with
        what lies at the other end; `groups` tells them apart.
        """
        batch, heads, _, channels = x.shape
        sizes = self.window if keys else self.tile
        rank, given = len(self.grid), self.key_grid if keys else self.grid
        x = x.transpose(1, 2)
        pads = [c * s - n for c, s, n in zip(self.counts, sizes, given)]
        if any(pads) or any(self.shift):
            x = x.unflatten(1, given)  # (B, *grid, H, D)
            if any(pads):
                x = F.pad(x, (0, 0, 0, 0, *itertools.chain.from_iterable((0, p) for p in reversed(pads))))
            x = self._rolled(x, keys=keys, back=False).flatten(1, rank)
        x = x.unflatten(1, tuple(itertools.chain.from_iterable(zip(self.counts, sizes))))
        # (B, c1, s1, c2, s2, …, H, D) -> (B, c1, c2, …, H, s1, s2, …, D)
        order = [0, *range(1, 2 * rank, 2), 2 * rank + 1, *range(2, 2 * rank + 1, 2), 2 * rank + 2]
        return x.permute(order).reshape(batch * math.prod(self.counts), heads, math.prod(sizes), channels)

    def join(self, x: Tensor, batch: int) -> Tensor:
        """The inverse of `cut` for queries: (B · windows, H, tokens of a window, D) -> (B, H, L, D)."""
        heads, channels = x.shape[1], x.shape[3]
        rank, sizes = len(self.grid), self.tile
        x = x.reshape(batch, *self.counts, heads, *sizes, channels)
        order = [0]
        for axis in range(rank):
            order += [1 + axis, 2 + rank + axis]
        x = x.permute(*order, 1 + rank, 2 + 2 * rank)
        x = x.reshape(batch, *[c * s for c, s in zip(self.counts, sizes)], heads, channels)
        x = self._rolled(x, keys=False, back=True)
        for axis, n in enumerate(self.grid, 1):
            x = x if x.shape[axis] == n else x.narrow(axis, 0, n)
        return x.flatten(1, rank).transpose(1, 2)

    def groups(self, device: torch.device) -> tuple[Tensor, Tensor] | None:
        """(windows, queries) and (windows, keys): which of its ring's ends a token is at; -1 for keys that are none.

        A query reads the keys of its own number. None where every window is whole.
        """
        if not any(self.shift) and all(c * w == m for c, w, m in zip(self.counts, self.window, self.key_grid)):
            return None
        found = []
        for keys in (False, True):
            sizes = self.window if keys else self.tile
            total = torch.zeros((1,) * 2 * len(self.grid), dtype=torch.int64, device=device)
            none = torch.zeros_like(total, dtype=torch.bool)
            for axis, (count, size, n) in enumerate(zip(self.counts, sizes, self.key_grid if keys else self.grid)):
                place = torch.arange(count * size, device=device)
                cut = self.shift[axis] * (1 if keys else self.factor[axis])
                place = place.roll(-cut).view(count, size)
                shape = [1] * 2 * len(self.grid)
                shape[axis], shape[len(self.grid) + axis] = count, size
                total = 2 * total + (place < cut).long().view(shape)
                none = none | (place >= n).view(shape)
            if keys:
                total = total.masked_fill(none, -1)
            found.append(total.expand(*self.counts, *sizes).reshape(math.prod(self.counts), math.prod(sizes)))
        return found[0], found[1]

    def bias(self, rpb: Tensor) -> Tensor:
        """The biases (H, queries of a window, keys of a window) of a table for windows at least as large."""
        rank = len(self.grid)
        for axis, (w, f) in enumerate(zip(self.window, self.factor), 1):
            # Offsets i - f j of all i and one j are neighbours in the table: they are windows into it, last key first.
            size = (2 * w - 1) * f
            rpb = rpb.narrow(axis, (rpb.shape[axis] - size) // 2, size).unfold(axis, w * f, f).flip(axis)
        order = [0, *range(1 + rank, 1 + 2 * rank), *range(1, 1 + rank)]
        return rpb.permute(order).reshape(rpb.shape[0], math.prod(self.tile), math.prod(self.window))

    def _rolled(self, x: Tensor, *, keys: bool, back: bool) -> Tensor:
        steps = [s if keys else s * f for s, f in zip(self.shift, self.factor)]
        if not any(steps):
            return x
        axes = [axis for axis, s in enumerate(steps, 1) if s]
        return x.roll([s if back else -s for s in steps if s], axes)
