"""Efficient attention from the right, ρ_q (ρ_kᵀ v), linear in the tokens.

What the keys make of the values, S = ρ_kᵀ v, is an operator of its own with its gradient written out: the softmax over
the tokens subtracts from ρ_k's gradient v dSᵀ its mean under ρ_k, which is Σ_e S dS, one number for each channel of the
keys, so that the whole gradient is a matrix product and one sweep over the tokens.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def summarise(k: Tensor, v: Tensor, key_padding_mask: Tensor | None = None) -> Tensor:
    """softmax_M(k)ᵀ v: keys (N, M, D), values (N, M, E), real tokens (N, M) -> (N, D, E), float32 at least.

    Values under False must be finite. A sample that is all padding gives zeros.
    """
    dtype = torch.promote_types(v.dtype, torch.float32)
    out: Tensor = _op(k.to(dtype), v.to(dtype), key_padding_mask)[0]
    return out


def run(q: Tensor, k: Tensor, v: Tensor, *, key_padding_mask: Tensor | None) -> Tensor:
    """ρ_q(q) (ρ_k(k)ᵀ v), arguments as `core_attn.ops.efficient_attention` hands them on."""
    batch, heads = q.shape[:2]
    mask = None if key_padding_mask is None else key_padding_mask.repeat_interleave(heads, dim=0)
    summary = summarise(k.flatten(0, 1), v.flatten(0, 1), mask)
    weights = torch.softmax(q.flatten(0, 1).to(summary.dtype), dim=-1)
    return torch.bmm(weights, summary).unflatten(0, (batch, heads)).to(v.dtype)


def _forward(k: Tensor, v: Tensor, key_padding_mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """The summary and ρ_k, which the gradient needs."""
    if key_padding_mask is None:
        weights = torch.softmax(k, dim=1)
    else:
        padding = ~key_padding_mask.unsqueeze(-1)
        weights = torch.softmax(k.masked_fill(padding, torch.finfo(k.dtype).min), dim=1).masked_fill_(padding, 0.0)
    return torch.bmm(weights.mT, v), weights


def _backward(dout: Tensor, out: Tensor, weights: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    mean = (out * dout).sum(-1)
    dk = torch.baddbmm(mean.unsqueeze(1), v, dout.mT, beta=-1).mul_(weights)
    return dk, torch.bmm(weights, dout)


_op = torch.library.custom_op(
    "core_attn::efficient_summary",
    _forward,
    mutates_args=(),
    schema="(Tensor k, Tensor v, Tensor? key_padding_mask) -> (Tensor, Tensor)",
)
_backward_op = torch.library.custom_op(
    "core_attn::efficient_summary_backward",
    _backward,
    mutates_args=(),
    schema="(Tensor dout, Tensor out, Tensor weights, Tensor v) -> (Tensor, Tensor)",
)


@_op.register_fake
def _(k: Tensor, v: Tensor, key_padding_mask: Tensor | None) -> tuple[Tensor, Tensor]:
    return v.new_empty(k.shape[0], k.shape[2], v.shape[2]), torch.empty_like(k)


@_backward_op.register_fake
def _(dout: Tensor, out: Tensor, weights: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    return weights.new_empty(weights.shape), v.new_empty(v.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*output, inputs[1])
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)  # of ρ_k nothing is asked, and zeros of its size would be made


def _differentiate(ctx: Any, dout: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, Tensor | None, None]:
    if dout is None:
        return None, None, None
    out, weights, v = ctx.saved_tensors
    return (*_backward_op(dout, out, weights, v), None)


def _no_second_derivative(ctx: Any, *grads: Tensor) -> None:
    raise RuntimeError(
        "efficient attention has no second derivative; use backend='reference' for gradients of gradients"
    )


_op.register_autograd(_differentiate, setup_context=_save)
_backward_op.register_autograd(_no_second_derivative)
