"""Attention inside windows a few windows at a time, so that their scores stay in the cache.

The gradient needs the weights: they are kept where they are few, or windows small beside the heads' channels, and made
again where they would outweigh everything else, as in large volumes.

Shapes: W windows of the whole batch, H heads, Q queries and K keys of a window, D channels of a head.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from core_attn.ops.partition import reference
from core_attn.ops.partition.windows import Windows

# Scores that are alive at once: on a CPU those that fit its second cache.
_SCORES = {"cpu": 2**18}
_SCORES_ELSEWHERE = 2**26
# Keys of a window for each channel, or weights in all, up to which the weights are kept for the gradient.
_KEPT = 4
_KEPT_IN_ALL = 2**24
_OPTIONS = (
    "Tensor q, Tensor k, Tensor v, Tensor? bias, Tensor? query_groups, Tensor? key_groups, bool padded, float scale"
)


def run(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    windows: Windows,
    rpb: Tensor | None,
    key_padding_mask: Tensor | None,
    scale: float,
) -> Tensor:
    """softmax(q kᵀ · scale + bias) v, arguments as `core_attn.ops.window_cross_attention` hands them on."""
    if not q.numel() or not v.numel():
        # Nothing to compute; the definition keeps every input in the graph, with zero gradients.
        return reference.run(q, k, v, windows=windows, rpb=rpb, key_padding_mask=key_padding_mask, scale=scale)
    windows = windows.tight()
    groups = windows.groups(q.device)
    if key_padding_mask is not None:
        real = windows.cut(key_padding_mask[:, None, :, None], keys=True)[:, 0, :, 0]  # (W, K)
        if groups is None:
            groups = (
                torch.zeros_like(real[:, :1], dtype=torch.int64).expand(-1, math.prod(windows.tile)),
                real.long() - 1,
            )
        else:
            own, other = (g.repeat(q.shape[0], 1) for g in groups)
            groups = own, other.masked_fill(~real, -1)
    training = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in (q, k, v, rpb))
    keys = math.prod(windows.window)
    in_all = q.shape[0] * q.shape[1] * math.prod(windows.counts) * math.prod(windows.tile) * keys
    out: Tensor = _op(
        training and (keys <= _KEPT * q.shape[3] or in_all <= _KEPT_IN_ALL),
        windows.cut(q, keys=False),
        windows.cut(k, keys=True),
        windows.cut(v, keys=True),
        None if rpb is None else windows.bias(rpb),
        *(groups or (None, None)),
        key_padding_mask is not None,
        scale,
    )[0]
    return windows.join(out, q.shape[0])


def _chunks(q: Tensor, k: Tensor) -> Iterator[tuple[slice, slice]]:
    """Windows and heads that are computed at once: several windows, or some heads of one."""
    count, heads = q.shape[:2]
    room = max(1, _SCORES.get(q.device.type, _SCORES_ELSEWHERE) // max(1, q.shape[2] * k.shape[2]))
    windows, own = max(1, room // heads), min(heads, room)
    for start in range(0, count, windows):
        for head in range(0, heads, own):
            yield slice(start, min(start + windows, count)), slice(head, min(head + own, heads))


class _Call:
    """Weights of any chunk of windows of one call."""

    def __init__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        bias: Tensor | None,
        query_groups: Tensor | None,
        key_groups: Tensor | None,
        padded: bool,
        scale: float,
    ) -> None:
        self.dtype = torch.promote_types(q.dtype, torch.float32)
        self.q, self.k, self.v = q, k, v
        self.bias = None if bias is None else bias.to(self.dtype)
        self.groups = None if query_groups is None or key_groups is None else (query_groups, key_groups)
        self.padded = padded
        self.scale = scale
        self.mixed: list[bool] = []
        if self.groups is not None:
            first = self.groups[0][:, :1]
            self.mixed = ((self.groups[0] != first).any(1) | (self.groups[1] != first).any(1)).tolist()

    def take(self, x: Tensor, at: tuple[slice, slice]) -> Tensor:
        """(W, H, n, D) -> (windows · heads of the chunk, n, D)."""
        return x[at].to(self.dtype).flatten(0, 1)

    def weights(self, at: tuple[slice, slice], out: Tensor | None = None) -> Tensor:
        """(windows · heads, Q, K) of a chunk."""
        q, k = self.take(self.q, at), self.take(self.k, at)
        count = at[0].stop - at[0].start
        if self.bias is None:
            s = torch.bmm(q, k.mT).mul_(self.scale)
        else:
            s = q.new_empty(*q.shape[:2], k.shape[1])
            s.unflatten(0, (count, -1)).copy_(self.bias[at[1]])
            s.baddbmm_(q, k.mT, alpha=self.scale)
        whole = s.unflatten(0, (count, -1))
        allowed = None
        if self.groups is not None:
            period = self.groups[0].shape[0]
            places = [i % period for i in range(at[0].start, at[0].stop)]
            if any(self.mixed[i] for i in places):
                own, other = (g[places] for g in self.groups)
                allowed = own[:, :, None] == other[:, None, :]
                free, forbidden = s.new_tensor([float("inf"), torch.finfo(self.dtype).min]).unbind()
                ceiling = torch.where(allowed, free, forbidden)
                torch.minimum(whole, ceiling.unsqueeze(1), out=whole)
        p = torch.softmax(s, -1) if out is None else torch.softmax(s, -1, out=out)
        if allowed is not None and self.padded:
            # Rows without keys. Without padding only rows beyond the grid are such, which nobody reads.
            p.unflatten(0, (count, -1)).mul_(allowed.any(-1)[:, None, :, None])
        return p


def _product(a: Tensor, b: Tensor, into: Tensor, at: tuple[slice, slice], scale: float = 1.0) -> None:
    """scale · a b written to a chunk of `into`."""
    target = into[at]
    if target.is_contiguous() and target.dtype is a.dtype:
        torch.bmm(a, b, out=target.view(a.shape[0], *target.shape[2:]))
    else:
        target.copy_(torch.bmm(a, b).view(target.shape))
    if scale != 1.0:
        target.mul_(scale)


def _forward(keep: bool, q: Tensor, k: Tensor, v: Tensor, *options: Any) -> tuple[Tensor, Tensor]:
    call = _Call(q, k, v, *options)
    out = q.new_empty(*q.shape[:3], v.shape[3])
    kept = q.new_empty(*q.shape[:3], k.shape[2], dtype=call.dtype) if keep else q.new_empty(0, dtype=call.dtype)
    for at in _chunks(q, k):
        p = call.weights(at, kept[at].flatten(0, 1) if keep and kept[at].is_contiguous() else None)
        if keep and not kept[at].is_contiguous():
            kept[at] = p.view(kept[at].shape)
        _product(p, call.take(v, at), out, at)
    return out, kept


def _backward(
    dout: Tensor, kept: Tensor, bias_grad: bool, q: Tensor, k: Tensor, v: Tensor, *options: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    call = _Call(q, k, v, *options)
    dq, dk, dv = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))
    dbias = q.new_zeros(0) if call.bias is None or not bias_grad else torch.zeros_like(call.bias)
    for at in _chunks(q, k):
        p = call.take(kept, at) if kept.numel() else call.weights(at)
        d = call.take(dout, at)
        ds = torch.bmm(d, call.take(v, at).mT)
        _product(p.mT, d, dv, at)
        ds = torch.ops.aten._softmax_backward_data(ds, p, -1, p.dtype)
        if dbias.numel():
            dbias[at[1]] += ds.unflatten(0, (at[0].stop - at[0].start, -1)).sum(0)
        _product(ds, call.take(k, at), dq, at, call.scale)
        _product(ds.mT, call.take(q, at), dk, at, call.scale)
    bias = options[0]
    return dq, dk, dv, dbias if bias is None else dbias.to(bias.dtype)


_op = torch.library.custom_op(
    "core_attn::window_cross_tiled",
    _forward,
    mutates_args=(),
    schema=f"(bool keep, {_OPTIONS}) -> (Tensor, Tensor)",
)
_backward_op = torch.library.custom_op(
    "core_attn::window_cross_tiled_backward",
    _backward,
    mutates_args=(),
    schema=f"(Tensor dout, Tensor kept, bool bias_grad, {_OPTIONS}) -> (Tensor, Tensor, Tensor, Tensor)",
)


@_op.register_fake
def _(keep: bool, q: Tensor, k: Tensor, v: Tensor, *options: Any) -> tuple[Tensor, Tensor]:
    dtype = torch.promote_types(q.dtype, torch.float32)
    shape = (*q.shape[:3], k.shape[2]) if keep else (0,)
    return q.new_empty(*q.shape[:3], v.shape[3]), q.new_empty(shape, dtype=dtype)


@_backward_op.register_fake
def _(
    dout: Tensor, kept: Tensor, bias_grad: bool, q: Tensor, k: Tensor, v: Tensor, *options: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dbias = options[0].new_empty(options[0].shape) if bias_grad else q.new_empty(0)
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape), dbias


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.bias_grad = inputs[4] is not None and ctx.needs_input_grad[4]
    ctx.numbers = inputs[7:]
    ctx.save_for_backward(*inputs[1:7], output[1])
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _differentiate(ctx: Any, dout: Tensor | None, _: Tensor | None) -> tuple[Any, ...]:
    if dout is None:
        return (None,) * 9
    *inputs, kept = ctx.saved_tensors
    dq, dk, dv, dbias = _backward_op(dout, kept, ctx.bias_grad, *inputs, *ctx.numbers)
    return None, dq, dk, dv, dbias if ctx.bias_grad else None, None, None, None, None


def _no_second_derivative(ctx: Any, *grads: Tensor) -> None:
    raise RuntimeError(
        "window attention on grids has no second derivative; use backend='reference' for gradients of gradients"
    )


_op.register_autograd(_differentiate, setup_context=_save)
_backward_op.register_autograd(_no_second_derivative)
