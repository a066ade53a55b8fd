"""Clipped softmax attention in blocks of queries and keys: plain PyTorch, any device, never an L × M matrix.

Clipping needs the finished weight of the softmax, so there are two passes over the keys: the first finds every row's
log-sum-exp, the second the clipped weights. With w = clip(u), u = (ζ - γ) p + γ and g = (ζ - γ) where 0 <= u <= 1, else
0, the gradient of the scores is p (g dw - Σ p g dw). The sum is a product of the output's gradient with Σ p g v, which
the second pass keeps, so that the backward needs one pass only.

Shapes as in `core_attn.ops.softmax.blocked`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from core_attn.ops.softmax.blocked import Blocks

_INF = float("inf")
_OPTIONS = (
    "Tensor q, Tensor k, Tensor v, Tensor? key_padding_mask, bool causal, float gamma, float zeta, float scale, "
    "bool slope"
)


class _Clipped(Blocks):
    """Blocks of a call with the stretched and clipped weights of each."""

    def __init__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        key_padding_mask: Tensor | None,
        causal: bool,
        gamma: float,
        zeta: float,
        scale: float,
    ) -> None:
        masks = [] if key_padding_mask is None else [key_padding_mask[:, None, None, :]]
        super().__init__(q, k, v, None, masks, None, None, 0 if causal else None, scale, 0.0)
        self.rows, self.columns = _block_sizes(q.shape[-1], on_cpu=q.device.type == "cpu")
        # In terms of the softmax's weight p: clip(u) = stretch · clip(p - least, 0, 1 / stretch).
        self.stretch = zeta - gamma
        self.least, self.most = -gamma / self.stretch, (1.0 - gamma) / self.stretch

    def softmax(self, rows: Tensor, r0: int, r1: int) -> tuple[Tensor, Tensor | None] | None:
        """Log-sum-exp (B·N, G·rows, 1) of a block of rows, and its weights where one block of keys is all of them."""
        so_far: tuple[Tensor, Tensor] | None = None
        blocks = [*self.key_blocks(r0, r1)]
        p: Tensor | None = None
        for c0, c1 in blocks:
            p = self.scores(rows, r0, r1, c0, c1)
            top = p.amax(dim=-1, keepdim=True)
            if so_far is not None:
                top = torch.maximum(top, so_far[0])
            base = top.masked_fill(top == -_INF, 0.0)
            total = p.sub_(base).exp_().sum(dim=-1, keepdim=True)
            if so_far is not None:
                total += so_far[1] * torch.exp(so_far[0] - base)
            so_far = top, total
        if so_far is None or p is None:
            return None
        top, total = so_far
        empty = total == 0
        # exp(score - inf) is the zero weight of rows that read nothing.
        lse = (top + total.log()).masked_fill_(empty, _INF)
        return lse, p.div_(total.masked_fill(empty, 1.0)) if len(blocks) == 1 else None

    def clipped(self, p: Tensor) -> Tensor:
        """The clipped weights, divided by `stretch`."""
        return (p - self.least).clamp_(0.0, 1.0 / self.stretch)

    def sloped(self, p: Tensor) -> Tensor:
        """p where a change of it changes the clipped weight, else 0."""
        inside = F.threshold(p, self.least, 0.0)
        return inside.mul_(p <= self.most) if self.most < 1.0 else inside


def _block_sizes(channels: int, *, on_cpu: bool) -> tuple[int, int]:
    """Rows and columns of a block, smaller where inputs are so narrow that a block's matrices would outweigh them."""
    if not on_cpu:
        return 512, 1024
    return (128, 256) if channels >= 16 else (64, 128)


def _forward(q: Tensor, k: Tensor, v: Tensor, *options: Any) -> tuple[Tensor, Tensor, Tensor]:
    *options_, slope = options
    with torch.autocast(q.device.type, enabled=False):
        b = _Clipped(q, k, v, *options_)
        out = q.new_zeros(*q.shape[:3], v.shape[-1])
        lse = torch.full(q.shape[:3], _INF, dtype=b.dtype, device=q.device)
        sums = torch.zeros_like(out, dtype=b.dtype) if slope else lse.new_zeros(0)  # Σ p g v
        for r0, r1 in b.row_blocks():
            rows = b.take_rows(b.q, r0, r1) * b.scale
            found = b.softmax(rows, r0, r1)
            if found is None:
                continue
            stats, whole = found
            total, weighted = None, None
            for c0, c1 in b.key_blocks(r0, r1):
                p = b.scores(rows, r0, r1, c0, c1).sub_(stats).exp_() if whole is None else whole
                read = b.v[:, c0:c1]
                total = _added(total, b.clipped(p), read)
                if slope:
                    weighted = _added(weighted, b.sloped(p), read)
            assert total is not None
            b.put_rows(b.grouped(out), total.mul_(b.stretch), r0, r1)
            b.put_rows(b.grouped(lse).unsqueeze(-1), stats, r0, r1)
            if weighted is not None:
                b.put_rows(b.grouped(sums), weighted.mul_(b.stretch), r0, r1)
        return out, lse, sums


def _added(total: Tensor | None, p: Tensor, v: Tensor) -> Tensor:
    return torch.bmm(p, v) if total is None else total.baddbmm_(p, v)


def _backward(
    dout: Tensor, lse: Tensor, sums: Tensor, q: Tensor, k: Tensor, v: Tensor, *options: Any
) -> tuple[Tensor, Tensor, Tensor]:
    with torch.autocast(q.device.type, enabled=False):
        b = _Clipped(q, k, v, *options)
        dq = torch.zeros_like(q, memory_format=torch.contiguous_format)
        dk, dv = torch.zeros_like(b.k), torch.zeros_like(b.v)
        for r0, r1 in b.row_blocks():
            rows = b.take_rows(b.q, r0, r1) * b.scale
            d = b.take_rows(b.grouped(dout), r0, r1)
            stats = b.take_rows(b.grouped(lse).unsqueeze(-1), r0, r1)
            mean = (d * b.take_rows(b.grouped(sums), r0, r1)).sum(dim=-1, keepdim=True)
            d = d * b.stretch
            drows = torch.zeros_like(rows)
            for c0, c1 in b.key_blocks(r0, r1):
                p = b.scores(rows, r0, r1, c0, c1).sub_(stats).exp_()
                ds = torch.bmm(d, b.v[:, c0:c1].transpose(1, 2)).mul_(b.sloped(p)).addcmul_(p, mean, value=-1)
                dv[:, c0:c1].baddbmm_(b.clipped(p).transpose(1, 2), d)
                dk[:, c0:c1].baddbmm_(ds.transpose(1, 2), rows)
                drows.baddbmm_(ds, b.k[:, c0:c1])
            b.put_rows(b.grouped(dq), drows.mul_(b.scale), r0, r1)
        return dq, dk.view(k.shape).to(k.dtype), dv.view(v.shape).to(v.dtype)


_op = torch.library.custom_op(
    "core_attn::clipped_blocked", _forward, mutates_args=(), schema=f"({_OPTIONS}) -> (Tensor, Tensor, Tensor)"
)
_backward_op = torch.library.custom_op(
    "core_attn::clipped_blocked_backward",
    _backward,
    mutates_args=(),
    schema=(
        f"(Tensor dout, Tensor lse, Tensor sums, {_OPTIONS.removesuffix(', bool slope')}) -> (Tensor, Tensor, Tensor)"
    ),
)


@_op.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, *options: Any) -> tuple[Tensor, Tensor, Tensor]:
    statistics = torch.float64 if q.dtype is torch.float64 else torch.float32
    out = q.new_empty(*q.shape[:3], v.shape[-1])
    sums = torch.empty_like(out, dtype=statistics) if options[-1] else q.new_empty(0, dtype=statistics)
    return out, q.new_empty(q.shape[:3], dtype=statistics), sums


@_backward_op.register_fake
def _(
    dout: Tensor, lse: Tensor, sums: Tensor, q: Tensor, k: Tensor, v: Tensor, *options: Any
) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    q, k, v, mask, *ctx.options, _ = inputs
    ctx.save_for_backward(q, k, v, *output[1:], mask)
    ctx.mark_non_differentiable(*output[1:])


def _differentiate(ctx: Any, dout: Tensor, *unused: Tensor | None) -> tuple[Any, ...]:
    q, k, v, lse, sums, mask = ctx.saved_tensors
    return *_backward_op(dout, lse, sums, q, k, v, mask, *ctx.options), *[None] * 6


def _no_second_derivative(ctx: Any, *grads: Tensor) -> None:
    raise RuntimeError(
        "blocked clipped softmax attention has no second derivative; use backend='reference' for gradients of gradients"
    )


_op.register_autograd(_differentiate, setup_context=_save)
_backward_op.register_autograd(_no_second_derivative)


def run(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    gamma: float,
    zeta: float,
    causal: bool,
    key_padding_mask: Tensor | None,
    scale: float,
) -> Tensor:
    """The clipped weights times v, arguments as `core_attn.ops.clipped_softmax_attention` hands them on.

    Memory O(L·D + M·D) and the gradient's the same; time O(L·M).
    """
    slope = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)
    out: Tensor = _op(q, k, v, key_padding_mask, causal, gamma, zeta, scale, slope)[0]
    return out
