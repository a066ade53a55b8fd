"""Auto-Correlation without rolled copies: O(L log L) time, and no tensor larger than the values.

Three identities carry it.
- The mean over heads and channels is linear, so it is taken before the one inverse FFT a sample needs.
- Of the correlations only the k chosen ones have a gradient, so backward needs k delays and no FFT.
- A weighted sum of rolled values is a weighted sum of k rows a token, which is what `embedding_bag` computes.

Both differentiable steps are bilinear, and each one's gradients are calls of the other: gradients of any order follow.
Tensors here are (B, L, C) with C = H D: the split into heads plays no part in the paper's default form.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from core_attn.ops.autocorrelation.reference import choose_delays, fit_length

# Up to this length one matrix product q k^T, summed along its circular diagonals, beats 2 C FFTs of that length.
_GRAM_LENGTH = 256
# Elements of q that are transformed at once: bounds the complex spectra without adding measurable overhead.
_FFT_ELEMENTS = 1 << 19


def auto_correlation_fft(q: Tensor, k: Tensor, v: Tensor, *, factor: float = 1.0, batch_delays: bool = False) -> Tensor:
    """As `core_attn.ops.auto_correlation`."""
    heads, length = q.shape[1:3]
    dtype = v.dtype
    k, v = fit_length(k, length), fit_length(v, length)
    q, k, v = (_channels_last(x) for x in (q, k, v))
    with torch.no_grad():
        correlation = circular_correlation(q, k)
        delays = choose_delays(correlation, factor=factor, batch_delays=batch_delays)
    chosen = _CorrelationAt.apply(q, k, delays, correlation.gather(-1, delays))
    weights = torch.softmax(chosen / q.shape[-1], dim=-1)
    out = _DelaySum.apply(v, weights, delays)
    return out.to(dtype).unflatten(-1, (heads, -1)).transpose(1, 2)


def circular_correlation(q: Tensor, k: Tensor) -> Tensor:
    """R(tau) = sum over t and channels of q(t + tau) k(t), circular: (B, L, C), (B, L, C) -> (B, L)."""
    batch, length, channels = q.shape
    if length <= _GRAM_LENGTH:
        gram = k @ q.transpose(1, 2)  # [s, t]; R(tau) sums [s, (s + tau) mod L]
        doubled = torch.cat([gram, gram], dim=-1)
        size = 2 * length * length
        return doubled.as_strided((batch, length, length), (size, 2 * length + 1, 1)).sum(1)
    at_once = max(1, _FFT_ELEMENTS // (length * channels))
    spectra = [
        (torch.fft.rfft(a, dim=1) * torch.fft.rfft(b, dim=1).conj()).sum(-1)
        for a, b in zip(q.split(at_once), k.split(at_once), strict=True)
    ]
    return torch.fft.irfft(torch.cat(spectra), n=length, dim=-1)


def _channels_last(x: Tensor) -> Tensor:
    """(B, H, L, D) -> (B, L, H D), a view where the heads were split from such a tensor; at least float32."""
    x = x.transpose(1, 2).flatten(2)
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def _rows(delays: Tensor, length: int) -> Tensor:
    """(B, k) -> (B L, k): the row of the flattened (B L, C) tensor that token t of a sample reads for each delay."""
    batch, k = delays.shape
    t = torch.arange(length, device=delays.device)
    rows = torch.remainder(t[:, None] + delays[:, None, :], length)
    return (rows + length * torch.arange(batch, device=delays.device)[:, None, None]).view(batch * length, k)


class _DelaySum(torch.autograd.Function):
    """out(t) = sum over j of w_j v(t + tau_j): (B, L, C), (B, k), (B, k) -> (B, L, C)."""

    @staticmethod
    def forward(ctx: Any, v: Tensor, weights: Tensor, delays: Tensor) -> Tensor:
        ctx.save_for_backward(v, weights, delays)
        batch, length, channels = v.shape
        k = delays.shape[-1]
        per_token = weights.unsqueeze(1).expand(batch, length, k).reshape(batch * length, k)
        out = F.embedding_bag(
            _rows(delays, length), v.reshape(batch * length, channels), per_sample_weights=per_token, mode="sum"
        )
        return out.view(batch, length, channels)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        (grad,) = grads
        v, weights, delays = ctx.saved_tensors
        grad_v = grad_weights = None
        if ctx.needs_input_grad[0]:
            grad_v = _DelaySum.apply(grad, weights, torch.remainder(-delays, v.shape[1]))
        if ctx.needs_input_grad[1]:
            grad_weights = _CorrelationAt.apply(v, grad, delays, None)
        return grad_v, grad_weights, None


class _CorrelationAt(torch.autograd.Function):
    """R(tau_j) = sum over t and channels of q(t + tau_j) k(t): (B, L, C), (B, L, C), (B, k) -> (B, k).

    `known` are the values where the caller has them already.
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, delays: Tensor, known: Tensor | None) -> Tensor:
        ctx.save_for_backward(q, k, delays)
        return _correlation_at(q, k, delays) if known is None else known.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        (grad,) = grads
        q, k, delays = ctx.saved_tensors
        grad_q = grad_k = None
        if ctx.needs_input_grad[0]:
            grad_q = _DelaySum.apply(k, grad, torch.remainder(-delays, q.shape[1]))
        if ctx.needs_input_grad[1]:
            grad_k = _DelaySum.apply(q, grad, delays)
        return grad_q, grad_k, None, None


def _correlation_at(q: Tensor, k: Tensor, delays: Tensor) -> Tensor:
    batch, length, channels = q.shape
    count, n = delays.shape[-1], batch * length
    if n == 0:
        return q.new_zeros(batch, count)
    # The products of row pairs without gathering the rows: what embedding_bag computes for its weights' gradient.
    bags = torch.arange(n, device=q.device)
    products = torch.ops.aten._embedding_bag_per_sample_weights_backward(
        k.reshape(n, channels),
        q.reshape(n, channels),
        _rows(delays, length).flatten(),
        bags * count,
        bags.repeat_interleave(count),
        0,
    )
    return products.view(batch, length, count).sum(1)
