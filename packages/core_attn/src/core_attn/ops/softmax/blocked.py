"""Softmax attention in blocks of queries and keys: plain PyTorch, any device, never an L × M matrix.

The running maximum and sum of "Online normalizer calculation for softmax" (2018), with the backward of
"FlashAttention" (S66), algorithm 4: the weights are computed again from the saved log-sum-exp. Blocks that a window or
causality forbids are never visited, so a window of w keys costs O(L·w). Statistics and accumulators are float32, or
float64 for float64.

Shapes: B batch, N = Hkv key heads, G = H / Hkv query heads that share one, L queries, M keys. Inside, the G·rows
queries of a block that read the same keys are one matrix.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

_INF = float("inf")
_OPTIONS = (
    "Tensor q, Tensor k, Tensor v, Tensor? bias, Tensor[] masks, Tensor? seed, "
    "int? left, int? right, float scale, float dropout"
)


class Blocks:
    """One call, cut into blocks: which there are, and the masked scores of each.

    Attention with more in its scores than a bias overrides `scores` and `spread`; one that reads other keys overrides
    `row_blocks`, `position`, `key_blocks` and `restrict`.
    """

    def __init__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        bias: Tensor | None,
        masks: Sequence[Tensor],
        seed: Tensor | None,
        left: int | None,
        right: int | None,
        scale: float,
        dropout: float,
    ) -> None:
        self.batch, heads, self.queries, _ = q.shape
        self.groups, self.keys = k.shape[1], k.shape[2]
        self.shared = heads // self.groups if self.groups else 1
        self.dtype = torch.float64 if q.dtype is torch.float64 else torch.float32
        self.q = self.grouped(q)
        self.k = k.to(self.dtype).flatten(0, 1)
        self.v = v.to(self.dtype).flatten(0, 1)
        self.bias = None if bias is None else self.grouped(bias)
        self.masks = [self.grouped(m) for m in masks]
        self.left, self.right = left, right
        self.scale = scale
        self.dropout = dropout
        # One stream of random numbers for the whole call: forward and backward visit the blocks in the same order.
        self.random = None if seed is None else torch.Generator(q.device).manual_seed(int(seed))
        self.rows, columns = _block_sizes(left, right, on_cpu=q.device.type == "cpu")
        # Heads of few channels make narrow blocks, or the scores of one would outweigh all that grows with the length.
        self.columns = min(columns, max(64, 16 * q.shape[-1]))
        self.dbias: Tensor | None = None
        self._triangles: dict[tuple[int, int, int, bool], Tensor] = {}

    def grouped(self, x: Tensor) -> Tensor:
        """(B, H, …) -> (B, N, G, …), where H may be 1 for something broadcast."""
        if x.shape[1] == self.groups * self.shared:
            return x.unflatten(1, (self.groups, self.shared))
        return x.unsqueeze(2)

    def row_blocks(self) -> Iterator[tuple[int, int]]:
        for r0 in range(0, self.queries, self.rows):
            yield r0, min(r0 + self.rows, self.queries)

    def position(self, row: int) -> int:
        """The key beside which a query stands."""
        return row + self.keys - self.queries

    def key_blocks(self, r0: int, r1: int) -> Iterator[tuple[int, int]]:
        """The blocks of keys that rows r0 … r1 - 1 may read."""
        yield from self.window_blocks(r0, r1, 0, self.keys)

    def window_blocks(self, r0: int, r1: int, start: int, stop: int) -> Iterator[tuple[int, int]]:
        """The blocks of the keys start … stop - 1 that lie in the window of rows r0 … r1 - 1."""
        if self.left is not None:
            start = max(start, self.position(r0) - self.left)
        if self.right is not None:
            stop = min(stop, self.position(r1 - 1) + 1 + self.right)
        yield from self.columns_between(start, stop)

    def columns_between(self, start: int, stop: int) -> Iterator[tuple[int, int]]:
        for c0 in range(start, stop, self.columns):
            yield c0, min(c0 + self.columns, stop)

    def take_rows(self, x: Tensor, r0: int, r1: int) -> Tensor:
        """(B, N, G, L, D) -> (B·N, G·rows, D) in the working dtype."""
        return x[:, :, :, r0:r1].to(self.dtype).flatten(2, 3).flatten(0, 1)

    def put_rows(self, x: Tensor, block: Tensor, r0: int, r1: int) -> None:
        x[:, :, :, r0:r1] = block.view(self.batch, self.groups, self.shared, r1 - r0, x.shape[-1])

    def scores(self, q: Tensor, r0: int, r1: int, c0: int, c1: int) -> Tensor:
        """(B·N, G·rows, columns) scores of scaled queries, -inf where reading is not allowed."""
        s = torch.bmm(q, self.k[:, c0:c1].transpose(1, 2))
        whole = self.unflat(s, r1 - r0)
        if self.bias is not None:
            whole += _cut(self.bias, r0, r1, c0, c1)
        for mask in self.masks:
            lower(whole, ceiling(_cut(mask, r0, r1, c0, c1)))
        self.restrict(whole, r0, r1, c0, c1)
        return s

    def restrict(self, scores: Tensor, r0: int, r1: int, c0: int, c1: int) -> None:
        """Forbid in place what lies outside the window: only columns at its two edges, the rest needs no mask."""
        first, last = self.position(r0), self.position(r1 - 1)
        if self.right is not None and c1 - 1 > first + self.right:
            edge = max(c0, first + self.right + 1)
            lower(
                scores[..., edge - c0 :], self.triangle(r1 - r0, c1 - edge, first + self.right + 1 - edge, upper=True)
            )
        if self.left is not None and c0 < last - self.left:
            edge = min(c1, last - self.left)
            lower(scores[..., : edge - c0], self.triangle(r1 - r0, edge - c0, first - self.left - 1 - c0, upper=False))

    def spread(self, ds: Tensor, rows: Tensor, drows: Tensor, r0: int, r1: int, c0: int, c1: int) -> None:
        """Hand on the gradient `ds` of a block's scores to whatever `scores` added to q kᵀ."""
        if self.dbias is not None:
            target = _cut(self.grouped(self.dbias), r0, r1, c0, c1)
            target += self.unflat(ds, r1 - r0).sum_to_size(target.shape)

    def triangle(self, rows: int, columns: int, diagonal: int, *, upper: bool) -> Tensor:
        """The ceiling that forbids what lies above (or below) a diagonal."""
        found = self._triangles.get((rows, columns, diagonal, upper))
        if found is None:
            ones = torch.ones(rows, columns, dtype=torch.bool, device=self.q.device)
            found = ceiling(~(ones.triu(diagonal) if upper else ones.tril(diagonal)))
            self._triangles[rows, columns, diagonal, upper] = found
        return found

    def unflat(self, s: Tensor, rows: int) -> Tensor:
        """(B·N, G·rows, columns) -> (B, N, G, rows, columns), a view."""
        return s.view(self.batch, self.groups, self.shared, rows, s.shape[-1])

    def kept(self, s: Tensor) -> Tensor | None:
        """What dropout multiplies the weights of the block with, 0 or 1 / (1 - dropout); None without dropout."""
        if self.random is None:
            return None
        draw = torch.rand(s.shape, generator=self.random, dtype=self.dtype, device=s.device)
        return (draw >= self.dropout).to(self.dtype).div_(1.0 - self.dropout)


def _cut(x: Tensor, r0: int, r1: int, c0: int, c1: int) -> Tensor:
    """The block of something broadcastable to (B, N, G, L, M)."""
    x = x[..., r0:r1, :] if x.shape[-2] != 1 else x
    return x[..., c0:c1] if x.shape[-1] != 1 else x


def ceiling(keep: Tensor) -> Tensor:
    """+inf where reading is allowed, -inf elsewhere."""
    return torch.where(keep, _INF, -_INF)


def lower(scores: Tensor, ceiling: Tensor) -> None:
    """Forbid in place. The minimum is vectorised on the CPU, twenty times as fast as `masked_fill_` there."""
    torch.minimum(scores, ceiling, out=scores)


def _block_sizes(left: int | None, right: int | None, *, on_cpu: bool) -> tuple[int, int]:
    """Rows and columns of a block.

    A window is read in one piece where it is not too wide; few rows then waste little beside it.
    """
    rows, columns = (128, 512) if on_cpu else (512, 2048)
    if left is not None and right is not None:
        rows = min(rows, max(32, (left + right + 1) // 4))
    return rows, columns


def _forward(q: Tensor, k: Tensor, v: Tensor, *options: Any) -> tuple[Tensor, Tensor]:
    with torch.autocast(q.device.type, enabled=False):
        return attend(Blocks(q, k, v, *options), q, v.shape[-1])


def attend(b: Blocks, q: Tensor, value: int) -> tuple[Tensor, Tensor]:
    """Output (B, H, L, value) in the dtype of q and the log-sum-exp of each row, +inf where nothing may be read."""
    out = q.new_zeros(*q.shape[:3], value)
    # +inf where nothing may be read: exp(score - inf) is then the zero weight that the backward wants.
    lse = torch.full(q.shape[:3], _INF, dtype=b.dtype, device=q.device)
    for r0, r1 in b.row_blocks():
        rows = b.take_rows(b.q, r0, r1) * b.scale
        so_far: tuple[Tensor, Tensor, Tensor] | None = None  # maximum, sum of weights, weighted sum of values
        for c0, c1 in b.key_blocks(r0, r1):
            p = b.scores(rows, r0, r1, c0, c1)
            top = p.amax(dim=-1, keepdim=True)
            if so_far is not None:
                top = torch.maximum(top, so_far[0])
            base = top.masked_fill(top == -_INF, 0.0)
            p.sub_(base).exp_()
            total = p.sum(dim=-1, keepdim=True)
            kept = b.kept(p)
            if kept is not None:
                p *= kept
            if so_far is None:
                summed = torch.bmm(p, b.v[:, c0:c1])
            else:
                shrink = torch.exp(so_far[0] - base)
                total += so_far[1] * shrink
                summed = torch.baddbmm(so_far[2] * shrink, p, b.v[:, c0:c1])
            so_far = top, total, summed
        if so_far is None:
            continue
        top, total, summed = so_far
        empty = total == 0
        b.put_rows(b.grouped(out), summed / total.masked_fill(empty, 1.0), r0, r1)
        stats = (top + total.log()).masked_fill_(empty, _INF)
        b.put_rows(b.grouped(lse).unsqueeze(-1), stats, r0, r1)
    return out, lse


def _backward(
    dout: Tensor, out: Tensor, lse: Tensor, bias_grad: bool, q: Tensor, k: Tensor, v: Tensor, *options: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    with torch.autocast(q.device.type, enabled=False):
        b = Blocks(q, k, v, *options)
        bias = options[0]
        if bias_grad:
            b.dbias = torch.zeros_like(bias, dtype=b.dtype)
        dq, dk, dv = differentiate(b, dout, out, lse, q, k, v)
        return dq, dk, dv, q.new_zeros(0) if b.dbias is None else b.dbias.to(bias.dtype)


def differentiate(
    b: Blocks, dout: Tensor, out: Tensor, lse: Tensor, q: Tensor, k: Tensor, v: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v; `b.spread` sees the gradient of every block of scores."""
    dq = torch.zeros_like(q, memory_format=torch.contiguous_format)
    dk, dv = torch.zeros_like(b.k), torch.zeros_like(b.v)
    for r0, r1 in b.row_blocks():
        rows = b.take_rows(b.q, r0, r1) * b.scale
        d = b.take_rows(b.grouped(dout), r0, r1)
        stats = b.take_rows(b.grouped(lse).unsqueeze(-1), r0, r1)
        mean = (d * b.take_rows(b.grouped(out), r0, r1)).sum(dim=-1, keepdim=True)
        drows = torch.zeros_like(rows)
        for c0, c1 in b.key_blocks(r0, r1):
            p = b.scores(rows, r0, r1, c0, c1).sub_(stats).exp_()
            kept = b.kept(p)
            dp = torch.bmm(d, b.v[:, c0:c1].transpose(1, 2))
            if kept is not None:
                dp *= kept
            ds = dp.sub_(mean).mul_(p)
            if kept is not None:
                p *= kept
            dv[:, c0:c1].baddbmm_(p.transpose(1, 2), d)
            dk[:, c0:c1].baddbmm_(ds.transpose(1, 2), rows)
            drows.baddbmm_(ds, b.k[:, c0:c1])
            b.spread(ds, rows, drows, r0, r1, c0, c1)
        b.put_rows(b.grouped(dq), drows.mul_(b.scale), r0, r1)
    return dq, dk.view(k.shape).to(k.dtype), dv.view(v.shape).to(v.dtype)


_op = torch.library.custom_op(
    "core_attn::softmax_blocked", _forward, mutates_args=(), schema=f"({_OPTIONS}) -> (Tensor, Tensor)"
)
_backward_op = torch.library.custom_op(
    "core_attn::softmax_blocked_backward",
    _backward,
    mutates_args=(),
    schema=f"(Tensor dout, Tensor out, Tensor lse, bool bias_grad, {_OPTIONS}) -> (Tensor, Tensor, Tensor, Tensor)",
)


@_op.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, *options: Any) -> tuple[Tensor, Tensor]:
    statistics = torch.float64 if q.dtype is torch.float64 else torch.float32
    return q.new_empty(*q.shape[:3], v.shape[-1]), q.new_empty(q.shape[:3], dtype=statistics)


@_backward_op.register_fake
def _(
    dout: Tensor, out: Tensor, lse: Tensor, bias_grad: bool, q: Tensor, k: Tensor, v: Tensor, *options: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dbias = torch.empty_like(options[0]) if bias_grad else q.new_empty(0)
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape), dbias


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, bias, masks, seed, *ctx.numbers = inputs
    ctx.bias_grad = bias is not None and ctx.needs_input_grad[3]
    ctx.save_for_backward(q, k, v, *output, bias, seed, *masks)
    ctx.mark_non_differentiable(output[1])


def _differentiate(ctx: Any, dout: Tensor, dlse: Tensor | None) -> tuple[Any, ...]:
    q, k, v, out, lse, bias, seed, *masks = ctx.saved_tensors
    dq, dk, dv, dbias = _backward_op(dout, out, lse, ctx.bias_grad, q, k, v, bias, masks, seed, *ctx.numbers)
    return dq, dk, dv, dbias if ctx.bias_grad else None, [None] * len(masks), None, None, None, None, None


def _no_second_derivative(ctx: Any, *grads: Tensor) -> None:
    raise RuntimeError(
        "blocked softmax attention has no second derivative; use backend='reference' for gradients of gradients"
    )


_op.register_autograd(_differentiate, setup_context=_save)
_backward_op.register_autograd(_no_second_derivative)


def run(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool,
    mask: Tensor | None,
    bias: Tensor | None,
    key_padding_mask: Tensor | None,
    window: tuple[int | None, int | None] | None,
    scale: float,
    dropout: float,
) -> Tensor:
    """softmax(q kᵀ · scale + bias) v, arguments as `core_attn.ops.softmax_attention` hands them on.

    Memory O(L·D + M·D) and the gradient's the same; time O(L·M), with a window of w keys O(L·w).
    """
    left, right = window or (None, None)
    masks = [] if mask is None else [mask]
    if key_padding_mask is not None:
        masks.append(key_padding_mask[:, None, None, :])
    seed = torch.randint(2**62, ()) if dropout else None
    out: Tensor = _op(q, k, v, bias, masks, seed, left, 0 if causal else right, scale, dropout)[0]
    return out
