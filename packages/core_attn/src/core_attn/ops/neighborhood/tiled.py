"""Neighbourhood attention in tiles: plain PyTorch, any device, memory linear in L, forward and backward.

The grid is cut into tiles of queries. All queries of a tile together read one box of keys, its halo, and two small
matrix products a tile take the place of gathering k keys a query ("Faster Neighborhood Attention", S165, section 3).
Halos start a tile's width apart, so that all of them are one strided view of the padded keys; where a border moves a
window inwards, the mask of the border's tiles says so. Tokens of one residue modulo the dilation are tiled as a grid
of their own.

The backward computes the weights again. Statistics and accumulators are float32, or float64 for float64.

Shapes: B batch, N = Hkv key heads, G = H / Hkv query heads that share one, P tiles, t tokens of a tile, w keys of a
halo, E extra keys.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from core_attn.ops.neighborhood.reference import reads

_INF = float("inf")
# Scores that are alive at once. On a CPU they stay in its cache: larger pieces took three times as long.
_SCORES = {"cpu": 2**18}
_SCORES_ELSEWHERE = 2**26
_softmax_backward = torch.ops.aten._softmax_backward_data.out


@dataclass(frozen=True, eq=False)
class Axis:
    """How one axis of the grid is cut.

    Attributes:
        length: tokens of the axis.
        dilation: number of residues, each a line of its own.
        tile: t, queries of a tile.
        tiles: tiles of a line.
        step: keys from the start of a halo to that of the next.
        lead: keys of the first halo before the first query.
        halo: w, keys of a halo.
        kinds: for each residue and tile, which of `ranges` is its own.
        ranges: the kinds of tiles: first and last key, counted in the halo, that each query reads.
        shifts: of each kind, how much further than the first tile's its halo lies to it.
    """

    length: int
    dilation: int
    tile: int
    tiles: int
    step: int
    lead: int
    halo: int
    kinds: tuple[tuple[int, ...], ...]
    ranges: tuple[tuple[tuple[int, int], ...], ...]
    shifts: tuple[int, ...]

    @property
    def padded(self) -> int:
        """Keys of a line with the zeros around it that halos reach into."""
        return (self.tiles - 1) * self.step + self.halo if self.tiles else 0


@functools.lru_cache(maxsize=256)
def axes_of(
    grid: tuple[int, ...],
    kernel_size: tuple[int, ...],
    dilation: tuple[int, ...],
    stride: tuple[int, ...],
    causal_axes: tuple[bool, ...],
    channels: int,
) -> tuple[Axis, ...]:
    """The cut of the grid; `channels` = D + Dv weighs copying halos against computing scores."""
    options = tuple(zip(grid, kernel_size, dilation, stride, causal_axes))
    tile = _tile(options, channels)
    return tuple(_axis(*axis, t) for axis, t in zip(options, tile))


def _tile(options: tuple[tuple[int, int, int, int, bool], ...], channels: int) -> tuple[int, ...]:
    """The cheapest tile: large ones compute scores outside of windows, small ones copy more halo than they compute."""
    widest = {1: 128, 2: 32, 3: 12}[len(options)]
    candidates = []
    for n, _, dilation, stride, _ in options:
        line = max(-(-n // dilation), 1)
        # Tiles of nearly one size, in whole stride groups.
        sizes = {line} | {math.ceil(math.ceil(line / count) / stride) * stride for count in range(1, line + 1)}
        candidates.append(sorted(t for t in sizes if t <= max(widest, stride)))

    halos = [{t: _axis(*axis, t).halo for t in sizes} for axis, sizes in zip(options, candidates)]

    def cost(tile: tuple[int, ...]) -> float:
        count = math.prod(-(-max(-(-n // d), 1) // t) for t, (n, _, d, _, _) in zip(tile, options))
        halo = math.prod(of[t] for t, of in zip(tile, halos))
        # In units of one copied number: a score costs a few operations and its share of two matrix products, which
        # do not get cheaper below some rows; a halo is copied, and a tile costs a call.
        return count * halo * (max(math.prod(tile), 16) * (0.6 + 0.011 * channels) + 0.55 * channels) + 30 * count

    return min(itertools.product(*candidates), key=cost)


def _axis(length: int, kernel_size: int, dilation: int, stride: int, causal: bool, tile: int) -> Axis:
    lines = [reads(len(range(r, length, dilation)), kernel_size, stride, causal) for r in range(min(dilation, length))]
    tiles = -(-len(lines[0]) // tile) if lines else 0
    cut = [[line[a * tile : (a + 1) * tile] for a in range(tiles)] for line in lines]
    firsts = [min((line[a][0][0] for line in cut if line[a]), default=0) for a in range(tiles)]
    # Two halos are a strided view wherever they start: then each holds just what its tile reads.
    step = firsts[1] - firsts[0] if tiles == 2 else tile
    lead = max((a * step - first for a, first in enumerate(firsts)), default=0)
    halo = (
        max((last - a * step for line in cut for a, part in enumerate(line) for _, last in part), default=0) + lead + 1
    )
    kinds: dict[tuple[tuple[tuple[int, int], ...], int], int] = {}
    of = []
    for line in cut:
        row = []
        for a, part in enumerate(line):
            ranges = [(first - a * step + lead, last - a * step + lead) for first, last in part]
            # Queries past the end of a line are no queries: they may read anything, and nothing asks what.
            ranges += [(0, halo - 1)] * (tile - len(part))
            row.append(kinds.setdefault((tuple(ranges), a * (step - tile)), len(kinds)))
        of.append(tuple(row))
    of += [()] * (dilation - len(of))
    every, shifts = zip(*kinds) if kinds else ((), ())
    return Axis(length, dilation, tile, tiles, step, lead, halo, tuple(of), every, shifts)


@functools.lru_cache(maxsize=256)
def _ceilings(axes: tuple[Axis, ...], dtype: torch.dtype, device: torch.device) -> list[Tensor]:
    """For each axis (kinds, t, w): 0 where a query reads a key, -inf elsewhere."""
    result = []
    for axis in axes:
        ranges = torch.tensor(axis.ranges).view(-1, axis.tile, 2, 1)
        at = torch.arange(axis.halo)
        keep = (at >= ranges[:, :, 0]) & (at <= ranges[:, :, 1])
        result.append(torch.where(keep, 0.0, -_INF).to(device, dtype))
    return result


def _softmax(scores: Tensor) -> Tensor:
    """In place: a row is read before it is written, and half the memory stays in the cache."""
    return torch.softmax(scores, dim=-1, out=scores)


class _Tiles:
    """One call, cut into tiles: the tiles' queries, and boxes of tiles with their halos and biases."""

    def __init__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        rpb: Tensor | None,
        extra_k: Tensor | None,
        extra_v: Tensor | None,
        grid: Sequence[int],
        kernel_size: Sequence[int],
        dilation: Sequence[int],
        stride: Sequence[int],
        causal_axes: Sequence[bool],
        scale: float,
    ) -> None:
        self.kernel_size = tuple(kernel_size)
        options = (tuple(grid), self.kernel_size, tuple(dilation), tuple(stride), tuple(causal_axes))
        self.axes = axes_of(*options, q.shape[-1] + v.shape[-1])
        self.rank = len(self.axes)
        self.batch, self.groups = k.shape[:2]
        self.shared = q.shape[1] // self.groups if self.groups else 1
        self.dtype = torch.float64 if q.dtype is torch.float64 else torch.float32
        self.device = q.device
        self.tile = math.prod(a.tile for a in self.axes)
        self.halo = math.prod(a.halo for a in self.axes)
        self.extra = 0 if extra_k is None else extra_k.shape[2]
        self.counts = (*(a.dilation for a in self.axes), *(a.tiles for a in self.axes))
        self.q = self.tiled(q).mul_(scale)
        # Keys and values go through the same copies, in one call where they have one shape.
        self.sources = [self.padded(k, v)] if k.shape == v.shape else [self.padded(k), self.padded(v)]
        self.extras = [x for x in (extra_k, extra_v) if x is not None]
        self.ceilings = _ceilings(self.axes, self.dtype, self.device)
        self.rpb = rpb
        self._scratch: dict[str, Tensor] = {}
        self._relative: dict[tuple[int, ...], Tensor] = {}
        self._biases: dict[tuple[tuple[int, ...], ...], tuple[Tensor, Tensor | None]] = {}

    # --- layout ---

    def tiled(self, x: Tensor) -> Tensor:
        """(B, H, L, D) -> (P, B, N, G·t, D), new memory in the working dtype."""
        rank, width = self.rank, x.shape[-1]
        x = x.unflatten(2, [a.length for a in self.axes])
        sides = [a.dilation * a.tiles * a.tile for a in self.axes]
        if sides != list(x.shape[2:-1]):
            whole = x.new_zeros(*x.shape[:2], *sides, width, dtype=self.dtype)
            self.inside(whole, [0] * rank).copy_(x)
            x = whole
        split = [n for a in self.axes for n in (a.tiles, a.tile, a.dilation)]
        x = x.reshape(self.batch, self.groups, self.shared, *split, width)
        tiles, inside, residues = (range(3 + part, 3 + 3 * rank, 3) for part in range(3))
        x = x.permute(*residues, *tiles, 0, 1, 2, *inside, 3 + 3 * rank)
        out = torch.empty(x.shape, dtype=self.dtype, device=self.device).copy_(x)
        return out.view(math.prod(self.counts), self.batch, self.groups, self.shared * self.tile, width)

    def untiled(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """(P, B, N, G·t, D) -> (B, H, L, D)."""
        rank, width = self.rank, x.shape[-1]
        x = x.view(*self.counts, self.batch, self.groups, self.shared, *(a.tile for a in self.axes), width)
        order = [n for i in range(rank) for n in (rank + i, 2 * rank + 3 + i, i)]
        x = x.permute(2 * rank, 2 * rank + 1, 2 * rank + 2, *order, 3 * rank + 3)
        sides = [a.dilation * a.tiles * a.tile for a in self.axes]
        x = x.to(dtype).reshape(self.batch, self.groups * self.shared, *sides, width)
        x = self.inside(x, [0] * rank)
        return x.reshape(*x.shape[:2], math.prod(a.length for a in self.axes), width)

    def padded(self, *xs: Tensor) -> Tensor:
        """S tensors (B, N, L, D) -> (S, B, N, padded sides…, D), in the working dtype."""
        whole = self.zeros(len(xs), xs[0].shape[-1])
        for part, x in zip(self.inner(whole), xs):
            part.copy_(x.unflatten(2, [a.length for a in self.axes]))
        return whole

    def zeros(self, count: int, width: int) -> Tensor:
        """(S, B, N, padded sides…, D) zeros, for keys and values or for their gradients."""
        sides = [a.dilation * a.padded for a in self.axes]
        return torch.zeros(count, self.batch, self.groups, *sides, width, dtype=self.dtype, device=self.device)

    def inner(self, whole: Tensor) -> Tensor:
        """The part of `zeros` that holds the grid; a view."""
        return self.inside(whole, [a.dilation * a.lead for a in self.axes])

    def flat(self, inner: Tensor, dtype: torch.dtype) -> Tensor:
        """(B, N, grid…, D) -> (B, N, L, D), new memory."""
        return torch.empty(inner.shape, dtype=dtype, device=self.device).copy_(inner).flatten(2, -2)

    def inside(self, whole: Tensor, starts: Sequence[int]) -> Tensor:
        """(…, padded sides…, D) -> (…, grid…, D), a view that begins at `starts`."""
        for i, (axis, start) in enumerate(zip(self.axes, starts)):
            whole = whole.narrow(i - self.rank - 1, start, axis.length)
        return whole

    # --- boxes of tiles ---

    def boxes(self) -> Iterator[tuple[slice, tuple[tuple[int, int], ...]]]:
        """Pieces of work: which of the P tiles, and their range of residues and of tiles on every axis."""
        scores = self.batch * self.groups * self.shared * self.tile * (self.halo + self.extra)
        room = max(1, _SCORES.get(self.device.type, _SCORES_ELSEWHERE) // max(scores, 1))
        steps: list[int] = []
        for count in reversed(self.counts):
            steps.insert(0, max(1, min(room, count)))
            # An outer range only grows where the inner ones are whole, so that a box is a run of the P tiles.
            room = room // count if room >= count > 0 else 1
        ranges = [[(n, min(n + step, count)) for n in range(0, count, step)] for step, count in zip(steps, self.counts)]
        start = 0
        for box in itertools.product(*ranges):
            stop = start + math.prod(last - first for first, last in box)
            yield slice(start, stop), box
            start = stop

    def scratch(self, name: str, *shape: int) -> Tensor:
        """Memory that every box writes to anew: it stays in the cache, and its pages are mapped once."""
        held = self._scratch.get(name)
        if held is None:  # the first box is the largest
            held = self._scratch[name] = torch.empty(math.prod(shape), dtype=self.dtype, device=self.device)
        return held[: math.prod(shape)].view(shape)

    def halo_memory(self, name: str, box: tuple[tuple[int, int], ...]) -> list[Tensor]:
        """For each source (S, P, B, N, w + E, D) of `scratch`."""
        shape = (math.prod(stop - start for start, stop in box), self.batch, self.groups, self.halo + self.extra)
        return [self.scratch(f"{name} {i}", x.shape[0], *shape, x.shape[-1]) for i, x in enumerate(self.sources)]

    def halos(self, box: tuple[tuple[int, int], ...]) -> list[Tensor]:
        """The keys and the values (P·B·N, w + E, D) that the tiles of a box read, extra ones behind; `scratch`."""
        memory = self.halo_memory("halos", box)
        for source, out in zip(self.sources, memory):
            view = self.part(source, box, [0] * self.rank, [a.halo for a in self.axes])
            out[..., : self.halo, :].view(view.shape).copy_(view)
        found = [x for out in memory for x in out]
        for out, extra in zip(found, self.extras):
            out[..., self.halo :, :] = extra
        return [x.flatten(0, 2) for x in found]

    def scatter(self, into: Tensor, halos: Tensor, box: tuple[tuple[int, int], ...]) -> None:
        """Add gradients (S, P, B, N, w + E, D) of a box's halos to those of `padded`, the reverse of `halos`.

        Halos overlap; pieces of halos that are no wider than a tile do not, so that each is one addition.
        """
        counts = (*(stop - start for start, stop in box), self.batch, self.groups)
        inner, outer = [halos.shape[-1]], [halos.stride(3)]
        for axis in reversed(self.axes[1:]):
            inner.insert(0, inner[0] * axis.halo)
        for n in reversed(counts):
            outer.insert(0, outer[0] * n)
        rank, choices = self.rank, []
        for axis, tiles in zip(self.axes, box[rank:]):
            if axis.step == axis.tile:
                choices.append([(tiles, at, min(axis.tile, axis.halo - at)) for at in range(0, axis.halo, axis.tile)])
            else:
                choices.append([((a, a + 1), 0, axis.halo) for a in range(*tiles)])
        for choice in itertools.product(*choices):
            some = (*box[:rank], *(tiles for tiles, _, _ in choice))
            target = self.part(into, some, [at for _, at, _ in choice], [size for _, _, size in choice])
            offset = sum(at * stride for (_, at, _), stride in zip(choice, inner))
            offset += sum((n - start) * stride for (n, _), (start, _), stride in zip(some, box, outer[1:]))
            target += halos.as_strided(target.shape, (*outer, *inner, 1), offset)

    def part(self, x: Tensor, box: tuple[tuple[int, int], ...], at: Sequence[int], size: Sequence[int]) -> Tensor:
        """(S, residues…, tiles…, B, N, size…, D) of the `padded` x: the keys from `at` on of a box's halos; a view.

        One `as_strided` for what would be four views an axis: there are many small pieces, and calls cost.
        """
        rank, strides = self.rank, x.stride()
        residues = strides[3 : 3 + rank]
        lines = [axis.dilation * stride for axis, stride in zip(self.axes, residues)]
        steps = [*residues, *(axis.step * line for axis, line in zip(self.axes, lines))]
        offset = sum(n * step for (n, _), step in zip(box, steps)) + sum(n * line for n, line in zip(at, lines))
        shape = (x.shape[0], *(stop - start for start, stop in box), *x.shape[1:3], *size, x.shape[-1])
        return x.as_strided(shape, (strides[0], *steps, *strides[1:3], *lines, 1), offset)

    # --- biases ---

    def weights(self, tiles: slice, box: tuple[tuple[int, int], ...], keys: Tensor) -> Tensor:
        """(P·B·N, G·t, w + E) softmax of the masked scores, zeros in rows that may read nothing; `scratch`."""
        rows = self.q[tiles].flatten(0, 2)
        s = torch.bmm(rows, keys.mT, out=self.scratch("weights", *rows.shape[:2], keys.shape[1]))
        bias, empty = self.bias(box)
        count = tiles.stop - tiles.start
        parts = s.view(count, self.batch, self.groups, self.shared, self.tile, self.halo + self.extra)
        parts[..., : self.halo] += bias
        if empty is None or self.extra:
            return _softmax(s)
        parts.masked_fill_(empty, 0.0)
        _softmax(s)
        parts.masked_fill_(empty, 0.0)
        return s

    def bias(self, box: tuple[tuple[int, int], ...]) -> tuple[Tensor, Tensor | None]:
        """What is added to a box's scores, broadcastable to (P, B, N, G, t, w), and where a row is -inf throughout."""
        rank = self.rank
        kinds = tuple(
            tuple(axis.kinds[r][a] for r in range(*residues) for a in range(*tiles))
            for axis, residues, tiles in zip(self.axes, box[:rank], box[rank:])
        )
        found = self._biases.get(kinds)
        if found is not None:
            return found
        counts = [last - first for first, last in box]
        bias = self.ceilings[0]
        for i, (axis, row) in enumerate(zip(self.axes, kinds)):
            shape = [1] * (4 * rank)
            shape[2 * rank + i], shape[3 * rank + i] = axis.tile, axis.halo
            if len(set(row)) > 1:
                shape[i], shape[rank + i] = counts[i], counts[rank + i]
                ceiling = self.ceilings[i][list(row)].view(shape)
            else:
                ceiling = self.ceilings[i][row[0]].view(shape)
            bias = bias + ceiling if i else ceiling
        if bias.shape[: 2 * rank].numel() > 1:
            bias = bias.expand(*counts, *bias.shape[2 * rank :])
        bias, empty = bias.reshape(-1, 1, 1, 1, self.tile, self.halo), None
        if self.rpb is not None:
            relative = [self.relative(shifts).unflatten(0, (self.groups, self.shared)) for shifts in self.shifts(box)]
            bias = bias + (relative[0] if len(relative) == 1 else torch.stack(relative).unsqueeze(1))
            dead = bias.amax(dim=-1, keepdim=True) == -_INF
            empty = dead if bool(dead.any()) else None
        self._biases[kinds] = bias, empty
        return bias, empty

    def shifts(self, box: tuple[tuple[int, int], ...]) -> list[tuple[int, ...]]:
        """How the halos of a box's tiles lie to them, on every axis; one for each tile, or one for all."""
        rank = self.rank
        found = [
            tuple(axis.shifts[axis.kinds[r][a]] for axis, r, a in zip(self.axes, place[:rank], place[rank:]))
            for place in itertools.product(*(range(*n) for n in box))
        ]
        return found[:1] if len(set(found)) == 1 else found

    def places(self, shifts: tuple[int, ...]) -> Tensor:
        """(t·w,) where in a head's flattened relative bias a query of a tile and a key of its halo look.

        Places outside of windows are masked, and anything will do.
        """
        places = torch.zeros((), dtype=torch.int64)
        for i, (axis, size, shift) in enumerate(zip(self.axes, self.kernel_size, shifts)):
            offset = torch.arange(axis.halo) - axis.lead + shift - torch.arange(axis.tile)[:, None]
            shape = [1] * (2 * self.rank)
            shape[i], shape[self.rank + i] = axis.tile, axis.halo
            places = places * (2 * size - 1) + (offset + size - 1).clamp(0, 2 * size - 2).view(shape)
        return places.flatten().to(self.device)

    def relative(self, shifts: tuple[int, ...]) -> Tensor:
        """(H, t, w) the relative bias between a tile and its halo."""
        assert self.rpb is not None
        found = self._relative.get(shifts)
        if found is None:
            found = self.rpb.to(self.dtype).flatten(1)[:, self.places(shifts)]
            found = self._relative[shifts] = found.view(self.rpb.shape[0], self.tile, self.halo)
        return found


def _forward(q: Tensor, k: Tensor, v: Tensor, *options: Any) -> Tensor:
    with torch.autocast(q.device.type, enabled=False):
        tiles = _Tiles(q, k, v, *options)
        out = tiles.q.new_empty(*tiles.q.shape[:-1], v.shape[-1])
        for at, box in tiles.boxes():
            keys, values = tiles.halos(box)
            torch.bmm(tiles.weights(at, box, keys), values, out=out[at].flatten(0, 2))
        return tiles.untiled(out, q.dtype)


def _backward(dout: Tensor, q: Tensor, k: Tensor, v: Tensor, *options: Any) -> tuple[Tensor, ...]:
    rpb, extra_k, extra_v = options[:3]
    with torch.autocast(q.device.type, enabled=False):
        tiles = _Tiles(q, k, v, *options)
        d = tiles.tiled(dout)
        dsources = [torch.zeros_like(x) for x in tiles.sources]
        drpb = q.new_empty(0) if rpb is None else torch.zeros(rpb.shape, dtype=tiles.dtype, device=rpb.device)
        drelative: dict[tuple[int, ...], Tensor] = {}
        dextra_k, dextra_v = (None if x is None else torch.zeros_like(x, dtype=tiles.dtype) for x in (extra_k, extra_v))
        for at, box in tiles.boxes():
            keys, values = tiles.halos(box)
            p = tiles.weights(at, box, keys)
            rows, drows = tiles.q[at].flatten(0, 2), d[at].flatten(0, 2)
            dhalos = tiles.halo_memory("dhalos", box)
            dkeys, dvalues = (x for part in dhalos for x in part)
            torch.bmm(p.mT, drows, out=dvalues.flatten(0, 2))
            ds = torch.bmm(drows, values.mT, out=tiles.scratch("dweights", *p.shape))
            _softmax_backward(ds, p, -1, tiles.dtype, grad_input=ds)
            torch.bmm(ds.mT, rows, out=dkeys.flatten(0, 2))
            torch.bmm(ds, keys, out=rows)  # the queries of these tiles are not read again: their gradient replaces them
            for into, dhalo in zip(dsources, dhalos):
                tiles.scatter(into, dhalo, box)
            for dextra, dhalo in ((dextra_k, dkeys), (dextra_v, dvalues)):
                if dextra is not None:
                    dextra += dhalo[:, :, :, tiles.halo :].sum(0)
            if rpb is not None:
                dscores = ds.view(at.stop - at.start, k.shape[0], *rpb.shape[:1], tiles.tile, ds.shape[-1])
                dscores = dscores[..., : tiles.halo].sum(dim=1)
                shifts = tiles.shifts(box)
                for each in set(shifts):
                    own = (
                        dscores if len(shifts) == 1 else dscores[[n for n, other in enumerate(shifts) if other == each]]
                    )
                    drelative[each] = drelative.get(each, 0.0) + own.sum(dim=0)
        dk, dv = (x for part in dsources for x in tiles.inner(part))
        for lie, relative in drelative.items():
            drpb.flatten(1).index_add_(1, tiles.places(lie), relative.flatten(1))
        return (
            tiles.untiled(tiles.q.mul_(options[-1]), q.dtype),
            tiles.flat(dk, k.dtype),
            tiles.flat(dv, v.dtype),
            drpb if rpb is None else drpb.to(rpb.dtype),
            q.new_empty(0) if dextra_k is None else dextra_k.to(k.dtype),
            q.new_empty(0) if dextra_v is None else dextra_v.to(v.dtype),
        )


_OPTIONS = (
    "Tensor q, Tensor k, Tensor v, Tensor? rpb, Tensor? extra_k, Tensor? extra_v, "
    "int[] grid, int[] kernel_size, int[] dilation, int[] stride, bool[] causal_axes, float scale"
)
_op = torch.library.custom_op(
    "core_attn::neighborhood_tiled", _forward, mutates_args=(), schema=f"({_OPTIONS}) -> Tensor"
)
_backward_op = torch.library.custom_op(
    "core_attn::neighborhood_tiled_backward",
    _backward,
    mutates_args=(),
    schema=f"(Tensor dout, {_OPTIONS}) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)


@_op.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, *options: Any) -> Tensor:
    return q.new_empty(*q.shape[:3], v.shape[-1])


@_backward_op.register_fake
def _(dout: Tensor, q: Tensor, k: Tensor, v: Tensor, *options: Any) -> tuple[Tensor, ...]:
    return tuple(q.new_empty(0) if x is None else x.new_empty(x.shape) for x in (q, k, v, *options[:3]))


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:6])
    ctx.numbers = inputs[6:]


def _differentiate(ctx: Any, dout: Tensor) -> tuple[Any, ...]:
    tensors = ctx.saved_tensors
    gradients = _backward_op(dout, *tensors, *ctx.numbers)
    return (*(None if x is None else g for x, g in zip(tensors, gradients)), *[None] * len(ctx.numbers))


def _no_second_derivative(ctx: Any, *grads: Tensor) -> None:
    raise RuntimeError(
        "tiled neighbourhood attention has no second derivative; use backend='reference' for gradients of gradients"
    )


_op.register_autograd(_differentiate, setup_context=_save)
_backward_op.register_autograd(_no_second_derivative)


def run(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    grid: tuple[int, ...],
    kernel_size: tuple[int, ...],
    dilation: tuple[int, ...],
    stride: tuple[int, ...],
    causal_axes: tuple[bool, ...],
    rpb: Tensor | None,
    extra_k: Tensor | None,
    extra_v: Tensor | None,
    scale: float,
) -> Tensor:
    """Arguments as `core_attn.ops.neighborhood_attention` hands them on."""
    out: Tensor = _op(q, k, v, rpb, extra_k, extra_v, grid, kernel_size, dilation, stride, causal_axes, scale)
    return out
