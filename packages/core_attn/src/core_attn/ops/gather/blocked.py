"""Gather attention in plain PyTorch, any device: queries in batches whose gathered keys fit the cache.

The backward computes the weights again from the saved log-sum-exp ("FlashAttention" (S66), algorithm 4). Statistics and
accumulators are float32, or float64 for float64.

Shapes: B batch, N = Hkv key heads, G query heads that share a list and a key head and so are one matrix, R lists in a
batch, S entries of a list, U = B·(H / G)·L lists in all.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

_INF = float("inf")
_OPTIONS = "Tensor q, Tensor k, Tensor v, Tensor index, Tensor? padding, bool causal, float scale"
# Elements of the gathered keys of a batch: about what a core's cache holds; on accelerators what keeps them busy. Never
# more than there are in the queries, unless a single list's are.
_GATHERED_ON_CPU, _GATHERED = 2**17, 2**26


class _Batch(NamedTuple):
    """Lists that are computed together: which they are, their keys (R·S,) among all heads', the ceiling (R, 1, S)."""

    lists: slice
    taken: Tensor
    ceiling: Tensor


class _Lists:
    """One call, cut into batches of lists."""

    def __init__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        index: Tensor,
        padding: Tensor | None,
        causal: bool,
        scale: float,
    ) -> None:
        self.batch, self.heads, self.queries, self.width = q.shape
        self.key_heads, self.keys = k.shape[1:3]
        self.causal, self.scale = causal, scale
        shared = self.heads // self.key_heads if self.key_heads else 1
        self.group = shared if index.shape[1] == 1 else 1
        self.dtype = torch.float64 if q.dtype is torch.float64 else torch.float32
        self.device = q.device
        self.elements = q.numel()
        self.padding = None if padding is None else padding.flatten()
        self.k, self.v = (x.to(self.dtype).flatten(0, 2) for x in (k, v))
        self.entries = index.flatten(0, 2)
        sizes = (self.batch, self.heads // self.group, self.queries)
        self.row = torch.arange(len(self.entries), device=self.device).view(index.shape[:3]).expand(sizes).flatten()
        head = torch.arange(sizes[0] * sizes[1], device=self.device) // (shared // self.group)
        self.head = head.repeat_interleave(self.queries)  # of each list, among all samples' key heads
        self.place = torch.arange(self.queries, device=self.device).repeat(sizes[0] * sizes[1])

    def by_list(self, x: Tensor) -> Tensor:
        """(B, H, L, D) -> (U, G, D) in the working dtype."""
        x = x.to(self.dtype).unflatten(1, (self.heads // self.group, self.group))
        return x.transpose(2, 3).flatten(0, 2)

    def from_lists(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        x = x.view(self.batch, self.heads // self.group, self.queries, self.group, x.shape[-1])
        return x.transpose(2, 3).reshape(self.batch, self.heads, self.queries, x.shape[-1]).to(dtype).contiguous()

    def batches(self) -> Iterator[_Batch]:
        count = self.entries.shape[1]
        if not count or not self.keys:
            return
        room = min(_GATHERED_ON_CPU if self.device.type == "cpu" else _GATHERED, self.elements)
        size = max(1, room // (count * max(self.width, self.v.shape[1], self.group)))
        for first in range(0, len(self.row), size):
            lists = slice(first, min(first + size, len(self.row)))
            entry = self.entries[self.row[lists]]
            keep = entry >= 0
            if self.causal:
                keep &= entry <= self.place[lists, None] + (self.keys - self.queries)
            taken = entry.clamp(min=0)
            if self.padding is not None:
                keep &= self.padding[taken + (self.head[lists, None] // self.key_heads) * self.keys]
            taken = (taken + self.head[lists, None] * self.keys).flatten()
            yield _Batch(lists, taken, torch.where(keep, _INF, -_INF)[:, None])

    def take(self, x: Tensor, batch: _Batch) -> Tensor:
        """(R, S, D) of a batch."""
        return x.index_select(0, batch.taken).unflatten(0, (-1, self.entries.shape[1]))

    def scores(self, q: Tensor, k: Tensor, batch: _Batch) -> Tensor:
        """(R, G, S) scores of scaled queries, -inf where reading is not allowed."""
        s = torch.bmm(q, k.transpose(1, 2))
        return torch.minimum(s, batch.ceiling, out=s)


def _forward(q: Tensor, k: Tensor, v: Tensor, *options: Any) -> tuple[Tensor, Tensor]:
    with torch.autocast(q.device.type, enabled=False):
        b = _Lists(q, k, v, *options)
        rows = b.by_list(q)
        out = rows.new_zeros(*rows.shape[:2], v.shape[-1])
        # +inf where nothing may be read: exp(score - inf) is then the zero weight that the backward wants.
        lse = rows.new_full((*rows.shape[:2], 1), _INF)
        for batch in b.batches():
            p = b.scores(rows[batch.lists] * b.scale, b.take(b.k, batch), batch)
            top = p.amax(dim=-1, keepdim=True)
            top.masked_fill_(top == -_INF, 0.0)
            p.sub_(top).exp_()
            total = p.sum(dim=-1, keepdim=True)
            empty = total == 0
            out[batch.lists] = torch.bmm(p, b.take(b.v, batch)).div_(total.masked_fill(empty, 1.0))
            lse[batch.lists] = top.add_(total.log()).masked_fill_(empty, _INF)
        return b.from_lists(out, q.dtype), b.from_lists(lse, b.dtype).squeeze(-1)


def _backward(
    dout: Tensor, out: Tensor, lse: Tensor, q: Tensor, k: Tensor, v: Tensor, *options: Any
) -> tuple[Tensor, Tensor, Tensor]:
    with torch.autocast(q.device.type, enabled=False):
        b = _Lists(q, k, v, *options)
        rows, d = b.by_list(q), b.by_list(dout)
        mean = (d * b.by_list(out)).sum(dim=-1, keepdim=True)
        stats = b.by_list(lse.unsqueeze(-1))
        drows, dk, dv = torch.zeros_like(rows), torch.zeros_like(b.k), torch.zeros_like(b.v)
        for batch in b.batches():
            taken, gathered, back = rows[batch.lists] * b.scale, b.take(b.k, batch), d[batch.lists]
            p = b.scores(taken, gathered, batch).sub_(stats[batch.lists]).exp_()
            dv.index_add_(0, batch.taken, torch.bmm(p.transpose(1, 2), back).flatten(0, 1))
            ds = torch.bmm(back, b.take(b.v, batch).transpose(1, 2)).sub_(mean[batch.lists]).mul_(p)
            dk.index_add_(0, batch.taken, torch.bmm(ds.transpose(1, 2), taken).flatten(0, 1))
            drows[batch.lists] = torch.bmm(ds, gathered).mul_(b.scale)
        return b.from_lists(drows, q.dtype), dk.view(k.shape).to(k.dtype), dv.view(v.shape).to(v.dtype)


_op = torch.library.custom_op(
    "core_attn::gather", _forward, mutates_args=(), schema=f"({_OPTIONS}) -> (Tensor, Tensor)"
)
_backward_op = torch.library.custom_op(
    "core_attn::gather_backward",
    _backward,
    mutates_args=(),
    schema=f"(Tensor dout, Tensor out, Tensor lse, {_OPTIONS}) -> (Tensor, Tensor, Tensor)",
)


@_op.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, *options: Any) -> tuple[Tensor, Tensor]:
    statistics = torch.float64 if q.dtype is torch.float64 else torch.float32
    return q.new_empty(*q.shape[:3], v.shape[-1]), q.new_empty(q.shape[:3], dtype=statistics)


@_backward_op.register_fake
def _(
    dout: Tensor, out: Tensor, lse: Tensor, q: Tensor, k: Tensor, v: Tensor, *options: Any
) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, index, padding, *ctx.numbers = inputs
    ctx.save_for_backward(q, k, v, *output, index, padding)
    ctx.mark_non_differentiable(output[1])


def _differentiate(ctx: Any, dout: Tensor, dlse: Tensor | None) -> tuple[Any, ...]:
    q, k, v, out, lse, index, padding = ctx.saved_tensors
    return *_backward_op(dout, out, lse, q, k, v, index, padding, *ctx.numbers), None, None, None, None


def _no_second_derivative(ctx: Any, *grads: Tensor) -> None:
    raise RuntimeError(
        "blocked gather attention has no second derivative; use backend='reference' for gradients of gradients"
    )


_op.register_autograd(_differentiate, setup_context=_save)
_backward_op.register_autograd(_no_second_derivative)


def run(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    index: Tensor,
    causal: bool,
    key_padding_mask: Tensor | None,
    scale: float,
) -> Tensor:
    """Softmax over the listed keys, arguments as `core_attn.ops.gather_attention` hands them on.

    Time O(L·S), forward and backward; memory O(L·D + M·D) and the lists.
    """
    out: Tensor = _op(q, k, v, index, key_padding_mask, causal, scale)[0]
    return out
