"""Relative attention in blocks of queries and keys: plain PyTorch, any device, O(L·D) memory, forward and backward.

"Music Transformer" (S114), section 3.4.1, computes q · relative for all distances at once and moves every row one place
further than the one before ("skewing"), which leaves an L × L matrix. Here the same is done inside a block: its r
queries and c keys are at r + c - 1 distances, and the skewed matrix is a view of the product, not a copy. Blocks
farther away than the last embedding need only one product a row.

Shapes: B batch, N = Hkv key heads, G = H / Hkv query heads that share one, r and c queries and keys of a block,
W = r + c - 1 distances.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from core_attn.ops.softmax.blocked import Blocks, attend, differentiate


class _RelativeBlocks(Blocks):
    """Blocks of a call whose scores hold q · relative[distance] as well."""

    def __init__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        relative: Tensor,
        key_padding_mask: Tensor | None,
        causal: bool,
        scale: float,
    ) -> None:
        masks = [] if key_padding_mask is None else [key_padding_mask[:, None, None, :]]
        super().__init__(q, k, v, None, masks, None, None, 0 if causal else None, scale, 0.0)
        self.rows, self.columns = _block_sizes(q.shape[-1], on_cpu=q.device.type == "cpu")
        self.table = relative.to(self.dtype)
        self.smallest = 0 if causal else -(relative.shape[1] // 2)
        self.dtable: Tensor | None = None
        self._skewed: dict[tuple[int, int], Tensor] = {}

    def scores(self, q: Tensor, r0: int, r1: int, c0: int, c1: int) -> Tensor:
        s = super().scores(q, r0, r1, c0, c1)
        if s.numel() == 0:
            return s
        whole, embedded = self.unflat(s, r1 - r0), self.embeddings(r0, r1, c0, c1)[1]
        products = torch.bmm(self.by_head(q, r1 - r0), embedded.transpose(1, 2))
        if embedded.shape[1] > 1:
            whole += self.skew(products, r1 - r0, c1 - c0)
        else:
            whole += self.from_head(products, r1 - r0)
        return s

    def spread(self, ds: Tensor, rows: Tensor, drows: Tensor, r0: int, r1: int, c0: int, c1: int) -> None:
        if ds.numel() == 0:
            return
        r, c = r1 - r0, c1 - c0
        index, embedded = self.embeddings(r0, r1, c0, c1)
        if embedded.shape[1] > 1:
            dproducts = self._skewed.get((r, c))
            if dproducts is None:
                # What the skewed view leaves out stays zero, so one buffer serves all blocks of a size.
                heads = self.table.shape[0]
                count = self.batch * self.groups * self.shared * r // heads
                dproducts = self._skewed[r, c] = ds.new_zeros(heads, count, embedded.shape[1])
            self.skew(dproducts, r, c).copy_(self.unflat(ds, r))
        else:
            dproducts = self.by_head(ds.sum(dim=-1, keepdim=True), r)
        self.unflat(drows, r).add_(self.from_head(torch.bmm(dproducts, embedded), r))
        if self.dtable is not None:
            self.dtable.index_add_(1, index, torch.bmm(dproducts.transpose(1, 2), self.by_head(rows, r)))

    def embeddings(self, r0: int, r1: int, c0: int, c1: int) -> tuple[Tensor, Tensor]:
        """Rows of the table for the block's distances, farthest back first, and the embeddings (H or 1, W, D) there.

        One row only where all distances of the block share it.
        """
        last = self.table.shape[1] - 1
        farthest = r1 - 1 + self.keys - self.queries - c0 - self.smallest
        nearest = r0 + self.keys - self.queries - (c1 - 1) - self.smallest
        if nearest >= last or farthest <= 0:
            farthest = nearest = min(max(nearest, 0), last)
        index = torch.arange(farthest, nearest - 1, -1, device=self.table.device).clamp_(0, last)
        return index, self.table.index_select(1, index)

    def by_head(self, x: Tensor, rows: int) -> Tensor:
        """(B·N, G·r, D) -> (H, B·r, D), or (1, B·H·r, D) where one table serves all heads."""
        if self.table.shape[0] == 1:
            return x.reshape(1, -1, x.shape[-1])
        heads = self.groups * self.shared
        return x.reshape(self.batch, heads, rows, -1).transpose(0, 1).reshape(heads, self.batch * rows, -1)

    def from_head(self, x: Tensor, rows: int) -> Tensor:
        """What `by_head` made -> (B, N, G, r, …), a view."""
        if self.table.shape[0] == 1:
            return x.view(self.batch, self.groups, self.shared, rows, x.shape[-1])
        return x.view(self.groups, self.shared, self.batch, rows, x.shape[-1]).permute(2, 0, 1, 3, 4)

    def skew(self, x: Tensor, rows: int, columns: int) -> Tensor:
        """Products with W distances, farthest first -> (B, N, G, r, c), a view: row i begins at r - 1 - i."""
        x = self.from_head(x, rows)
        size = (*x.shape[:3], rows, columns)
        return x.as_strided(size, (*x.stride()[:3], x.stride(3) - 1, 1), x.storage_offset() + rows - 1)


def _block_sizes(channels: int, *, on_cpu: bool) -> tuple[int, int]:
    """Rows and columns of a block: the fastest measured at 64 channels.

    Smaller where the inputs are so narrow that a block's own matrices would outweigh them.
    """
    if not on_cpu:
        return 512, 1024
    return (128, 256) if channels >= 16 else (64, 128)


_OPTIONS = "Tensor q, Tensor k, Tensor v, Tensor relative, Tensor? key_padding_mask, bool causal, float scale"


def _forward(q: Tensor, k: Tensor, v: Tensor, *options: Any) -> tuple[Tensor, Tensor]:
    with torch.autocast(q.device.type, enabled=False):
        return attend(_RelativeBlocks(q, k, v, *options), q, v.shape[-1])


def _backward(
    dout: Tensor, out: Tensor, lse: Tensor, table_grad: bool, q: Tensor, k: Tensor, v: Tensor, *options: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    with torch.autocast(q.device.type, enabled=False):
        b = _RelativeBlocks(q, k, v, *options)
        if table_grad:
            b.dtable = torch.zeros_like(b.table, memory_format=torch.contiguous_format)
        dq, dk, dv = differentiate(b, dout, out, lse, q, k, v)
        return dq, dk, dv, q.new_zeros(0) if b.dtable is None else b.dtable.to(options[0].dtype)


_op = torch.library.custom_op(
    "core_attn::relative_blocked", _forward, mutates_args=(), schema=f"({_OPTIONS}) -> (Tensor, Tensor)"
)
_backward_op = torch.library.custom_op(
    "core_attn::relative_blocked_backward",
    _backward,
    mutates_args=(),
    schema=f"(Tensor dout, Tensor out, Tensor lse, bool table_grad, {_OPTIONS}) -> (Tensor, Tensor, Tensor, Tensor)",
)


@_op.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, *options: Any) -> tuple[Tensor, Tensor]:
    statistics = torch.float64 if q.dtype is torch.float64 else torch.float32
    return q.new_empty(*q.shape[:3], v.shape[-1]), q.new_empty(q.shape[:3], dtype=statistics)


@_backward_op.register_fake
def _(
    dout: Tensor, out: Tensor, lse: Tensor, table_grad: bool, q: Tensor, k: Tensor, v: Tensor, *options: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dtable = options[0].new_empty(options[0].shape) if table_grad else q.new_empty(0)
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape), dtable


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, relative, mask, *ctx.options = inputs
    ctx.save_for_backward(q, k, v, *output, relative, mask)
    ctx.mark_non_differentiable(output[1])


def _differentiate(ctx: Any, dout: Tensor, dlse: Tensor | None) -> tuple[Any, ...]:
    q, k, v, out, lse, relative, mask = ctx.saved_tensors
    table_grad = ctx.needs_input_grad[3]
    dq, dk, dv, dtable = _backward_op(dout, out, lse, table_grad, q, k, v, relative, mask, *ctx.options)
    return dq, dk, dv, dtable if table_grad else None, None, None, None


def _no_second_derivative(ctx: Any, *grads: Tensor) -> None:
    raise RuntimeError(
        "blocked relative attention has no second derivative; use backend='reference' for gradients of gradients"
    )


_op.register_autograd(_differentiate, setup_context=_save)
_backward_op.register_autograd(_no_second_derivative)


def run(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    relative: Tensor,
    causal: bool,
    key_padding_mask: Tensor | None,
    scale: float,
) -> Tensor:
    """softmax((q kᵀ + q · relative[i - j]) · scale) v; arguments as `core_attn.ops.relative_attention` gives them.

    Memory O(L·D + M·D) and the gradient's the same, that of `relative` included; time O(L·M).
    """
    out: Tensor = _op(q, k, v, relative, key_padding_mask, causal, scale)[0]
    return out
