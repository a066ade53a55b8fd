"""Window attention in blocks: plain PyTorch, any device, O(L·w) time and O(L) memory, forward and backward.

The engine is that of blocked softmax attention; what differs is which keys a block of queries reads. Keys that all
queries read (sinks and global tokens) come first, the others follow by residue class of the dilation, so that every
window is one range of keys. Queries are in the order of their classes too, those of global tokens first.

Shapes: B batch, N = Hkv key heads, G = H / Hkv query heads that share one, L queries, M keys.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from core_attn.ops.softmax.blocked import Blocks, attend, ceiling, differentiate, lower


@dataclass(frozen=True)
class _Part:
    """Queries of one residue class in the order of their positions, and the keys of that class.

    Attributes:
        start, stop: the queries, by their place in the order.
        first, last: the keys, by their place in the order, all but those that everyone reads.
        beside: place of the key beside which the first query stands; where there is no such key, where it would be.
        position: position of the first query; the next stands `dilation` further.
        everything: these are the queries of global tokens, which read every key.
    """

    start: int
    stop: int
    first: int
    last: int
    beside: int
    position: int
    everything: bool = False


class _Order:
    """Queries and keys by class: where each of them goes, and the parts that this makes.

    Attributes:
        queries, keys: for each place the index of what stands there; None where nothing moves.
        parts: in the order of the queries, none of them empty.
    """

    def __init__(self, queries: int, keys: int, dilation: int, shared: int, readers: int) -> None:
        """`shared` keys are read by everyone; the queries at the first `readers` positions read everything."""
        offset = keys - queries
        some, end = min(max(-offset, 0), queries), min(max(readers - offset, 0), queries)
        end = max(some, end)
        rows: list[range] = [range(some, end)]
        columns: list[range] = [range(shared)]
        self.parts = [_Part(0, end - some, shared, keys, 0, some + offset, everything=True)] if end > some else []
        start, first = end - some, shared
        for residue in range(dilation):
            column = range(shared + (residue - shared) % dilation, keys, dilation)
            for row in (range(0, some), range(end, queries)):
                row = range(row.start + (residue - row.start - offset) % dilation, row.stop, dilation)
                if len(row):
                    position = row.start + offset
                    beside = first + (position - column.start) // dilation
                    self.parts.append(_Part(start, start + len(row), first, first + len(column), beside, position))
                    rows.append(row)
                    start += len(row)
            columns.append(column)
            first += len(column)
        self.starts = [p.start for p in self.parts]
        self.queries, self.keys = _places(rows), _places(columns)


def _places(ranges: list[range]) -> Tensor | None:
    index = torch.cat([torch.arange(r.start, max(r.start, r.stop), r.step) for r in ranges])
    return None if torch.equal(index, torch.arange(index.numel())) else index


def _moved(x: Tensor, index: Tensor | None) -> Tensor:
    """(B, H, L, …) in another order."""
    return x if index is None else x.index_select(2, index.to(x.device))


def _moved_back(x: Tensor, index: Tensor | None) -> Tensor:
    return x if index is None else torch.empty_like(x).index_copy_(2, index.to(x.device), x)


class _WindowBlocks(Blocks):
    """Blocks of a call: q, k, v, mask and sink_q are in the order of the parts."""

    def __init__(
        self,
        parts: list[_Part],
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: Tensor | None,
        sink_q: Tensor | None,
        left: int | None,
        right: int | None,
        causal: bool,
        dilation: int,
        shared: int,
        scale: float,
    ) -> None:
        super().__init__(q, k, v, None, [] if mask is None else [mask], None, left, right, scale, 0.0)
        self.parts, self.starts = parts, [p.start for p in parts]
        self.causal, self.dilation, self.read_by_all = causal, dilation, shared
        self.sink_q: Tensor | None = None
        if sink_q is not None:
            self.sink_q = self.grouped(sink_q)
            self.sink_k = self.k[:, :shared]
            self.dsink_q = torch.zeros_like(sink_q, memory_format=torch.contiguous_format)
            self.dsink_k = torch.zeros_like(self.sink_k)
            # To the engine the sinks have no part in the scores; `scores` and `spread` put it in.
            self.k = torch.cat([torch.zeros_like(self.sink_k), self.k[:, shared:]], dim=1)

    def part(self, row: int) -> _Part:
        return self.parts[bisect_right(self.starts, row) - 1]

    def row_blocks(self) -> Iterator[tuple[int, int]]:
        for part in self.parts:
            for r0 in range(part.start, part.stop, self.rows):
                yield r0, min(r0 + self.rows, part.stop)

    def position(self, row: int) -> int:
        part = self.part(row)
        return part.beside + row - part.start

    def place(self, row: int) -> int:
        """Position of a query among all tokens."""
        part = self.part(row)
        return part.position + (row - part.start) * self.dilation

    def key_blocks(self, r0: int, r1: int) -> Iterator[tuple[int, int]]:
        part = self.part(r0)
        stop = min(self.read_by_all, self.place(r1 - 1) + 1) if self.causal else self.read_by_all
        yield from self.columns_between(0, stop)
        if part.everything:
            yield from self.columns_between(part.first, part.last)
        else:
            yield from self.window_blocks(r0, r1, part.first, part.last)

    def restrict(self, scores: Tensor, r0: int, r1: int, c0: int, c1: int) -> None:
        if c0 >= self.read_by_all:
            if not self.part(r0).everything:
                super().restrict(scores, r0, r1, c0, c1)
        elif self.causal and c1 - 1 > self.place(r0):
            places = self.place(r0) + self.dilation * torch.arange(r1 - r0, device=scores.device)
            lower(scores, ceiling(torch.arange(c0, c1, device=scores.device) <= places[:, None]))

    def scores(self, q: Tensor, r0: int, r1: int, c0: int, c1: int) -> Tensor:
        s = super().scores(q, r0, r1, c0, c1)
        if self.sink_q is not None and c0 < self.read_by_all:
            s.baddbmm_(self.take_rows(self.sink_q, r0, r1) * self.scale, self.sink_k[:, c0:c1].transpose(1, 2))
        return s

    def spread(self, ds: Tensor, rows: Tensor, drows: Tensor, r0: int, r1: int, c0: int, c1: int) -> None:
        if self.sink_q is not None and c0 < self.read_by_all:
            rows = self.take_rows(self.sink_q, r0, r1) * self.scale
            self.dsink_k[:, c0:c1].baddbmm_(ds.transpose(1, 2), rows)
            drows = torch.bmm(ds, self.sink_k[:, c0:c1]).mul_(self.scale)
            target = self.grouped(self.dsink_q)[:, :, :, r0:r1]
            target += self.unflat(drows, r1 - r0)


class _Call:
    """What forward and backward prepare alike: the order, and the tensors in it."""

    def __init__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        key_padding_mask: Tensor | None,
        sink_q: Tensor | None,
        left: int | None,
        right: int | None,
        causal: bool,
        dilation: int,
        shared: int,
        readers: int,
        scale: float,
    ) -> None:
        queries, keys = q.shape[2], k.shape[2]
        dilation = min(dilation, queries + keys + 1)  # farther apart no two tokens are
        shared = min(shared, keys)
        self.order = _Order(queries, keys, dilation, shared, readers)
        self.q, self.k, self.v = self.by_query(q), _moved(k, self.order.keys), _moved(v, self.order.keys)
        mask = None if key_padding_mask is None else key_padding_mask[:, None, None, :]
        if mask is not None and self.order.keys is not None:
            mask = mask.index_select(3, self.order.keys.to(mask.device))
        sink_q = None if sink_q is None else self.by_query(sink_q)
        parts = self.order.parts
        self.blocks = _WindowBlocks(
            parts, self.q, self.k, self.v, mask, sink_q, left, right, causal, dilation, shared, scale
        )

    def by_query(self, x: Tensor) -> Tensor:
        return _moved(x, self.order.queries)


_OPTIONS = (
    "Tensor q, Tensor k, Tensor v, Tensor? key_padding_mask, Tensor? sink_q, "
    "int? left, int? right, bool causal, int dilation, int shared, int readers, float scale"
)


def _forward(q: Tensor, k: Tensor, v: Tensor, *options: Any) -> tuple[Tensor, Tensor]:
    with torch.autocast(q.device.type, enabled=False):
        call = _Call(q, k, v, *options)
        out, lse = attend(call.blocks, call.q, v.shape[-1])
        return _moved_back(out, call.order.queries), _moved_back(lse, call.order.queries)


def _backward(
    dout: Tensor, out: Tensor, lse: Tensor, q: Tensor, k: Tensor, v: Tensor, *options: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    with torch.autocast(q.device.type, enabled=False):
        call = _Call(q, k, v, *options)
        b, order = call.blocks, call.order
        dout, out, lse = call.by_query(dout), call.by_query(out), call.by_query(lse)
        dq, dk, dv = differentiate(b, dout, out, lse, call.q, call.k, call.v)
        if b.sink_q is None:
            dsink_q = q.new_zeros(0)
        else:
            dsink_q = _moved_back(b.dsink_q, order.queries)
            dk[:, :, : b.read_by_all] = b.dsink_k.view(*k.shape[:2], b.read_by_all, k.shape[3])
        return _moved_back(dq, order.queries), _moved_back(dk, order.keys), _moved_back(dv, order.keys), dsink_q


_op = torch.library.custom_op(
    "core_attn::window_blocked", _forward, mutates_args=(), schema=f"({_OPTIONS}) -> (Tensor, Tensor)"
)
_backward_op = torch.library.custom_op(
    "core_attn::window_blocked_backward",
    _backward,
    mutates_args=(),
    schema=f"(Tensor dout, Tensor out, Tensor lse, {_OPTIONS}) -> (Tensor, Tensor, Tensor, Tensor)",
)


@_op.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, *options: Any) -> tuple[Tensor, Tensor]:
    statistics = torch.float64 if q.dtype is torch.float64 else torch.float32
    return q.new_empty(*q.shape[:3], v.shape[-1]), q.new_empty(q.shape[:3], dtype=statistics)


@_backward_op.register_fake
def _(
    dout: Tensor, out: Tensor, lse: Tensor, q: Tensor, k: Tensor, v: Tensor, *options: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dsink_q = q.new_empty(0) if options[1] is None else q.new_empty(q.shape)
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape), dsink_q


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, mask, sink_q, *ctx.numbers = inputs
    ctx.save_for_backward(q, k, v, *output, mask, sink_q)
    ctx.mark_non_differentiable(output[1])


def _differentiate(ctx: Any, dout: Tensor, dlse: Tensor | None) -> tuple[Any, ...]:
    q, k, v, out, lse, mask, sink_q = ctx.saved_tensors
    dq, dk, dv, dsink_q = _backward_op(dout, out, lse, q, k, v, mask, sink_q, *ctx.numbers)
    return dq, dk, dv, None, None if sink_q is None else dsink_q, *[None] * len(ctx.numbers)


def _no_second_derivative(ctx: Any, *grads: Tensor) -> None:
    raise RuntimeError(
        "blocked window attention has no second derivative; use backend='reference' for gradients of gradients"
    )


_op.register_autograd(_differentiate, setup_context=_save)
_backward_op.register_autograd(_no_second_derivative)


def run(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    window: tuple[int | None, int | None] | None,
    causal: bool,
    key_padding_mask: Tensor | None,
    scale: float,
    dilation: int,
    sinks: int,
    global_tokens: int,
    sink_q: Tensor | None,
) -> Tensor:
    """Softmax over window, sinks and global tokens; options as `core_attn.ops.window_attention` hands them on."""
    left, right = window or (None, None)
    # When causal, a global token reads only what lies before it, which are global tokens: everyone reads those.
    readers = 0 if causal else global_tokens
    out: Tensor = _op(
        q,
        k,
        v,
        key_padding_mask,
        sink_q,
        left,
        0 if causal else right,
        causal,
        dilation,
        max(sinks, global_tokens),
        readers,
        scale,
    )[0]
    return out
