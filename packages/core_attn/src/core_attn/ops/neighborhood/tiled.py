"""Neighbourhood attention in tiles: plain PyTorch, any device, memory linear in L, forward and backward.

The grid is cut into tiles of queries. All queries of a tile together read one box of keys, its halo, and two small
matrix products a tile take the place of gathering k keys a query ("Faster Neighborhood Attention", S165, section 3).
A halo begins at the first key that its tile reads, or so far before it that it ends with the line. Away from the
borders halos lie a tile's width apart, and a run of them is one strided view of the keys. Tokens of one residue modulo
the dilation are tiled as a grid of their own.

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
        side: keys of the longest line.
        halo: w, keys of a halo.
        starts: where in a line each tile's halo begins.
        kinds: for each residue and tile, which of `ranges` is its own.
        ranges: the kinds of tiles: first and last key, counted in the halo, that each query reads.
        shifts: of each kind, from the tile's first query to its halo's first key.
    """

    length: int
    dilation: int
    tile: int
    tiles: int
    side: int
    halo: int
    starts: tuple[int, ...]
    kinds: tuple[tuple[int, ...], ...]
    ranges: tuple[tuple[tuple[int, int], ...], ...]
    shifts: tuple[int, ...]

    def runs(self, start: int, stop: int) -> list[tuple[int, int, int]]:
        """(first, last + 1, step) of the tiles start … stop - 1 in runs whose halos lie `step` keys apart.

        A step below the tile's width would let halos share more than pieces of a tile, so those stand alone.
        """
        found: list[tuple[int, int, int]] = []
        for a in range(start, stop):
            if found:
                first, end, step = found[-1]
                apart = self.starts[a] - self.starts[a - 1]
                if apart >= self.tile and (end - first == 1 or apart == step):
                    found[-1] = (first, a + 1, apart)
                    continue
            found.append((a, a + 1, self.tile))
        return found


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
    side = len(lines[0]) if lines else 0
    tiles = -(-side // tile) if lines else 0
    cut = [[line[a * tile : (a + 1) * tile] for a in range(tiles)] for line in lines]
    spans = [[span for line in cut for span in line[a]] for a in range(tiles)]
    firsts = [min(first for first, _ in spans[a]) for a in range(tiles)]
    halo = max((max(last for _, last in spans[a]) - firsts[a] + 1 for a in range(tiles)), default=1)
    starts = [min(first, side - halo) for first in firsts]
    kinds: dict[tuple[tuple[tuple[int, int], ...], int], int] = {}
    of = []
    for line in cut:
        row = []
        for a, part in enumerate(line):
            ranges = [(first - starts[a], last - starts[a]) for first, last in part]
            # Queries past the end of a line are no queries: they may read anything, and nothing asks what.
            ranges += [(0, halo - 1)] * (tile - len(part))
            row.append(kinds.setdefault((tuple(ranges), starts[a] - a * tile), len(kinds)))
        of.append(tuple(row))
    of += [()] * (dilation - len(of))
    every, shifts = zip(*kinds) if kinds else ((), ())
    return Axis(length, dilation, tile, tiles, side, halo, tuple(starts), tuple(of), every, shifts)


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


_Numbers = tuple[int, ...]


def _band(
    axes: tuple[Axis, ...], kinds: tuple[_Numbers, ...], counts: _Numbers, dtype: torch.dtype, device: torch.device
) -> Tensor:
    """(P or 1, 1, 1, 1, t, w) what windows add to scores of a box, 0 or -inf, from its tiles' kinds on each axis."""
    rank = len(axes)
    band = torch.zeros((), dtype=dtype, device=device)
    for i, (axis, row, ceiling) in enumerate(zip(axes, kinds, _ceilings(axes, dtype, device))):
        shape = [1] * (4 * rank)
        shape[2 * rank + i], shape[3 * rank + i] = axis.tile, axis.halo
        if len(set(row)) > 1:
            shape[i], shape[rank + i] = counts[i], counts[rank + i]
            band = band + ceiling[list(row)].view(shape)
        else:
            band = band + ceiling[row[0]].view(shape)
    if band.shape[: 2 * rank].numel() > 1:
        band = band.expand(*counts, *band.shape[2 * rank :])
    return band.reshape(-1, 1, 1, 1, math.prod(a.tile for a in axes), math.prod(a.halo for a in axes))


_band_of = functools.lru_cache(maxsize=16)(_band)


@functools.lru_cache(maxsize=4096)
def _pieces(
    axes: tuple[Axis, ...],
    box: tuple[tuple[int, int], ...],
    shape: _Numbers,
    strides: _Numbers,
    halo_strides: _Numbers,
    apart: bool,
) -> list[tuple[_Numbers, _Numbers, int, _Numbers, int]]:
    """Shape, strides and offset in the halos, strides and offset in the lines, of every piece of a box's halos.

    A piece is a run of tiles on every axis, all of each halo; with `apart`, parts of halos that do not overlap within
    the run. One `as_strided` a piece, from numbers made once: there are many small pieces, and calls cost.
    """
    rank = len(axes)
    residues = strides[2 : 2 + rank]
    lines = [axis.dilation * stride for axis, stride in zip(axes, residues)]
    counts = [stop - start for start, stop in box]
    outer, inner = [halo_strides[0]], [halo_strides[3]]
    for n in reversed(counts[1:]):
        outer.insert(0, outer[0] * n)
    for axis in reversed(axes[1:]):
        inner.insert(0, inner[0] * axis.halo)
    found = []
    along = [axis.runs(*tiles) for axis, tiles in zip(axes, box[rank:])]
    if apart:
        # Where a run has fewer tiles than its halos have parts, the tiles one by one are fewer pieces.
        along = [
            [
                (a, b, step)
                for first, stop, step in runs
                for a, b in (
                    [(first, stop)]
                    if stop - first > -(-axis.halo // axis.tile)
                    else itertools.pairwise(range(first, stop + 1))
                )
            ]
            for axis, runs in zip(axes, along)
        ]
    for runs in itertools.product(*along):
        cuts = []
        for axis, (first, stop, _) in zip(axes, runs):
            width = axis.tile if apart and stop - first > 1 else axis.halo
            cuts.append([(at, min(width, axis.halo - at)) for at in range(0, axis.halo, width)])
        for cut in itertools.product(*cuts):
            inside = sum((run[0] - start) * n for run, (start, _), n in zip(runs, box[rank:], outer[rank:]))
            inside += sum(at * stride for (at, _), stride in zip(cut, inner))
            outside = sum(start * stride for (start, _), stride in zip(box, residues))
            outside += sum((a.starts[run[0]] + at) * n for a, run, (at, _), n in zip(axes, runs, cut, lines))
            steps = [step * line for (_, _, step), line in zip(runs, lines)]
            some = [*counts[:rank], *(stop - first for first, stop, _ in runs), *shape[:2]]
            found.append(
                (
                    (*some, *(size for _, size in cut), shape[-1]),
                    (*outer, *halo_strides[1:3], *inner, 1),
                    inside,
                    (*residues, *steps, *strides[:2], *lines, strides[-1]),
                    outside,
                )
            )
    return found


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
        self.sides = [a.dilation * a.tiles * a.tile for a in self.axes]
        self.q = self.tiled(q)
        self.scale = scale
        self.sources = [self.padded(k), self.padded(v)]
        self.extras = [x for x in (extra_k, extra_v) if x is not None]
        self.rpb = rpb
        self._scratch: dict[str, Tensor] = {}
        self._relative: dict[tuple[int, ...], Tensor] = {}
        self._biases: dict[tuple[tuple[int, ...], ...], tuple[Tensor, Tensor | None]] = {}

    # --- layout ---

    def tiled(self, x: Tensor) -> Tensor:
        """(B, H, L, D) -> (residues…, tiles…, B, N, G, t…, D): a view where tiles divide the grid, else of a copy."""
        rank = self.rank
        x = x.unflatten(2, [a.length for a in self.axes])
        if self.sides != list(x.shape[2:-1]):
            whole = x.new_zeros(*x.shape[:2], *self.sides, x.shape[-1])
            self.inside(whole, [0] * rank).copy_(x)
            x = whole
        return self.split(x)

    def split(self, x: Tensor) -> Tensor:
        """(B, H, sides…, D) -> (residues…, tiles…, B, N, G, t…, D), a view."""
        rank = self.rank
        for i, a in reversed([*enumerate(self.axes)]):
            x = x.unflatten(2 + i, (a.tiles, a.tile, a.dilation))
        x = x.unflatten(1, (self.groups, self.shared))
        tiles, inside, residues = (range(3 + part, 3 + 3 * rank, 3) for part in range(3))
        return x.permute(*residues, *tiles, 0, 1, 2, *inside, 3 + 3 * rank)

    def result(self, width: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """New memory (B, H, sides…, D), and its `split`."""
        heads = self.groups * self.shared
        whole = torch.empty(self.batch, heads, *self.sides, width, dtype=dtype, device=self.device)
        return whole, self.split(whole)

    def untiled(self, whole: Tensor) -> Tensor:
        """(B, H, sides…, D) -> (B, H, L, D)."""
        x = self.inside(whole, [0] * self.rank)
        return x.reshape(*x.shape[:2], math.prod(a.length for a in self.axes), x.shape[-1])

    def box_of(self, split: Tensor, box: tuple[tuple[int, int], ...]) -> Tensor:
        """The tiles of a box, a view."""
        for i, (start, stop) in enumerate(box):
            split = split.narrow(i, start, stop - start)
        return split

    def rows(self, split: Tensor, box: tuple[tuple[int, int], ...], name: str) -> Tensor:
        """(P·B·N, G·t, D) of a box's tiles in the working dtype; `scratch`."""
        part, room = self.box_of(split, box), self.room(split, box, name)
        room.view(part.shape).copy_(part)
        return room

    def room(self, split: Tensor, box: tuple[tuple[int, int], ...], name: str) -> Tensor:
        """The same, to be written to."""
        count = math.prod(stop - start for start, stop in box) * self.batch * self.groups
        return self.scratch(name, count, self.shared * self.tile, split.shape[-1])

    def put(self, split: Tensor, box: tuple[tuple[int, int], ...], rows: Tensor) -> None:
        part = self.box_of(split, box)
        part.copy_(rows.view(part.shape))

    def padded(self, x: Tensor) -> Tensor:
        """(B, N, L, D) -> (B, N, sides…, D): lines of one length; a view where they have it."""
        x = x.unflatten(2, [a.length for a in self.axes])
        if any(a.length != a.dilation * a.side for a in self.axes):
            whole = self.zeros(x.shape[-1], x.dtype)
            self.inside(whole, [0] * self.rank).copy_(x)
            return whole
        return x

    def zeros(self, width: int, dtype: torch.dtype) -> Tensor:
        """(B, N, sides…, D) zeros."""
        sides = [a.dilation * a.side for a in self.axes]
        return torch.zeros(self.batch, self.groups, *sides, width, dtype=dtype, device=self.device)

    def flat(self, whole: Tensor, dtype: torch.dtype) -> Tensor:
        """(B, N, sides…, D) -> (B, N, L, D)."""
        return self.inside(whole, [0] * self.rank).flatten(2, -2).to(dtype)

    def inside(self, whole: Tensor, starts: Sequence[int]) -> Tensor:
        """(…, padded sides…, D) -> (…, grid…, D), a view that begins at `starts`."""
        for i, (axis, start) in enumerate(zip(self.axes, starts)):
            whole = whole.narrow(i - self.rank - 1, start, axis.length)
        return whole

    # --- boxes of tiles ---

    def boxes(self) -> Iterator[tuple[tuple[int, int], ...]]:
        """Pieces of work: ranges of residues and of tiles on every axis."""
        scores = self.batch * self.groups * self.shared * self.tile * (self.halo + self.extra)
        room = max(1, _SCORES.get(self.device.type, _SCORES_ELSEWHERE) // max(scores, 1))
        steps: list[int] = []
        for count in reversed(self.counts):
            steps.insert(0, max(1, min(room, count)))
            # An outer range only grows where the inner ones are whole: the first box is the largest.
            room = room // count if room >= count > 0 else 1
        ranges = [[(n, min(n + step, count)) for n in range(0, count, step)] for step, count in zip(steps, self.counts)]
        yield from itertools.product(*ranges)

    def scratch(self, name: str, *shape: int) -> Tensor:
        """Memory that every box writes to anew: it stays in the cache, and its pages are mapped once."""
        held = self._scratch.get(name)
        if held is None:  # the first box is the largest
            held = self._scratch[name] = torch.empty(math.prod(shape), dtype=self.dtype, device=self.device)
        return held[: math.prod(shape)].view(shape)

    def halo_memory(self, name: str, box: tuple[tuple[int, int], ...]) -> list[Tensor]:
        """For keys and for values (P, B, N, w + E, D) of `scratch`."""
        shape = (math.prod(stop - start for start, stop in box), self.batch, self.groups, self.halo + self.extra)
        return [self.scratch(f"{name} {i}", *shape, x.shape[-1]) for i, x in enumerate(self.sources)]

    def halos(self, box: tuple[tuple[int, int], ...]) -> list[Tensor]:
        """The keys and the values (P·B·N, w + E, D) that the tiles of a box read, extra ones behind; `scratch`."""
        memory = self.halo_memory("halos", box)
        for source, out in zip(self.sources, memory):
            for inside, lines in self.pieces(out, source, box, apart=False):
                inside.copy_(lines)
        for out, extra in zip(memory, self.extras):
            out[..., self.halo :, :] = extra
        return [x.flatten(0, 2) for x in memory]

    def scatter(self, into: Tensor, halos: Tensor, box: tuple[tuple[int, int], ...]) -> None:
        """Add gradients (P, B, N, w + E, D) of a box's halos to those of the keys, the reverse of `halos`."""
        for inside, lines in self.pieces(halos, into, box, apart=True):
            lines.add_(inside)

    def pieces(
        self, halos: Tensor, lines: Tensor, box: tuple[tuple[int, int], ...], *, apart: bool
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """The same keys seen in a box's halos (P, B, N, w + E, D) and in the lines (B, N, sides…, D)."""
        cut = _pieces(self.axes, box, tuple(lines.shape), lines.stride(), halos.stride(), apart)
        for shape, inside, at_inside, outside, at_outside in cut:
            yield (
                halos.as_strided(shape, inside, at_inside + halos.storage_offset()),
                lines.as_strided(shape, outside, at_outside + lines.storage_offset()),
            )

    # --- biases ---

    def weights(self, box: tuple[tuple[int, int], ...], rows: Tensor, keys: Tensor) -> Tensor:
        """(P·B·N, G·t, w + E) softmax of the masked scores, zeros in rows that may read nothing; `scratch`."""
        s = torch.bmm(rows, keys.mT, out=self.scratch("weights", *rows.shape[:2], keys.shape[1]))
        bias, empty = self.bias(box)
        parts = s.view(
            math.prod(n[1] - n[0] for n in box), self.batch, self.groups, self.shared, self.tile, self.halo + self.extra
        )
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
        counts = tuple(last - first for first, last in box)
        # On a CPU a box is small, and the calls of a model are alike: then this is made once for all of them.
        make = _band_of if self.device.type == "cpu" else _band
        bias, empty = make(self.axes, kinds, counts, self.dtype, self.device), None
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
            offset = torch.arange(axis.halo) + shift - torch.arange(axis.tile)[:, None]
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
        whole, out = tiles.result(v.shape[-1], q.dtype)
        for box in tiles.boxes():
            keys, values = tiles.halos(box)
            rows = tiles.rows(tiles.q, box, "queries").mul_(tiles.scale)
            weights = tiles.weights(box, rows, keys)
            tiles.put(out, box, torch.bmm(weights, values, out=tiles.room(out, box, "outputs")))
        return tiles.untiled(whole)


def _backward(dout: Tensor, q: Tensor, k: Tensor, v: Tensor, *options: Any) -> tuple[Tensor, ...]:
    rpb, extra_k, extra_v = options[:3]
    with torch.autocast(q.device.type, enabled=False):
        tiles = _Tiles(q, k, v, *options)
        d = tiles.tiled(dout)
        whole, dq = tiles.result(q.shape[-1], q.dtype)
        dsources = [tiles.zeros(x.shape[-1], tiles.dtype) for x in (k, v)]
        drpb = q.new_empty(0) if rpb is None else torch.zeros(rpb.shape, dtype=tiles.dtype, device=rpb.device)
        drelative: dict[tuple[int, ...], Tensor] = {}
        dextra_k, dextra_v = (None if x is None else torch.zeros_like(x, dtype=tiles.dtype) for x in (extra_k, extra_v))
        for box in tiles.boxes():
            keys, values = tiles.halos(box)
            rows = tiles.rows(tiles.q, box, "queries").mul_(tiles.scale)
            drows = tiles.rows(d, box, "doutputs")
            p = tiles.weights(box, rows, keys)
            dhalos = tiles.halo_memory("dhalos", box)
            dkeys, dvalues = dhalos
            torch.bmm(p.mT, drows, out=dvalues.flatten(0, 2))
            ds = torch.bmm(drows, values.mT, out=tiles.scratch("dweights", *p.shape))
            _softmax_backward(ds, p, -1, tiles.dtype, grad_input=ds)
            torch.bmm(ds.mT, rows, out=dkeys.flatten(0, 2))
            tiles.put(dq, box, torch.bmm(ds, keys, out=rows).mul_(tiles.scale))
            for into, dhalo in zip(dsources, dhalos):
                tiles.scatter(into, dhalo, box)
            for dextra, dhalo in ((dextra_k, dkeys), (dextra_v, dvalues)):
                if dextra is not None:
                    dextra += dhalo[:, :, :, tiles.halo :].sum(0)
            if rpb is not None:
                dscores = ds.view(dkeys.shape[0], k.shape[0], *rpb.shape[:1], tiles.tile, ds.shape[-1])
                dscores = dscores[..., : tiles.halo].sum(dim=1)
                shifts = tiles.shifts(box)
                for each in set(shifts):
                    own = (
                        dscores if len(shifts) == 1 else dscores[[n for n, other in enumerate(shifts) if other == each]]
                    )
                    drelative[each] = drelative.get(each, 0.0) + own.sum(dim=0)
        dk, dv = dsources
        for lie, relative in drelative.items():
            drpb.flatten(1).index_add_(1, tiles.places(lie), relative.flatten(1))
        return (
            tiles.untiled(whole),
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
