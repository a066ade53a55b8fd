"""Auto-Correlation by its definition: every delay correlated by a rolled product, every chosen delay a rolled copy.

Autoformer: Decomposition Transformers with Auto-Correlation for Long-Term Series Forecasting (S73), section 3.2.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def number_of_delays(length: int, factor: float) -> int:
    """k = floor(c ln L), eq. (6); at least one (the formula gives none for L <= 2) and at most L."""
    return min(max(int(factor * math.log(length)), 1), length)


def fit_length(x: Tensor, length: int) -> Tensor:
    """Cut (B, H, M, D) to the first `length` tokens, or append zeros, as the paper does for cross attention."""
    missing = length - x.shape[-2]
    return torch.nn.functional.pad(x, (0, 0, 0, missing)) if missing > 0 else x[..., :length, :]


def mean_correlation(q: Tensor, k: Tensor) -> Tensor:
    """R(tau) = sum over t of q(t) k(t - tau), circular, averaged over heads and channels: (B, L); eq. (5)."""
    length = q.shape[-2]
    k = fit_length(k, length)
    # In half precision, rounded correlations would tie, and the choice of delays would depend on the order of ties.
    q, k = (x.to(torch.promote_types(x.dtype, torch.float32)) for x in (q, k))
    lags = [(q * torch.roll(k, lag, dims=-2)).sum(-2).mean((-2, -1)) for lag in range(length)]
    return torch.stack(lags, dim=-1)


def choose_delays(correlation: Tensor, *, factor: float, batch_delays: bool) -> Tensor:
    """Delays of the k largest correlations, (B, k); with `batch_delays` of the batch mean's, for all samples."""
    batch, length = correlation.shape
    k = number_of_delays(length, factor)
    if not batch_delays:
        return correlation.topk(k, dim=-1).indices
    return correlation.mean(0).topk(k).indices.expand(batch, k)


def auto_correlation_reference(
    q: Tensor, k: Tensor, v: Tensor, *, factor: float = 1.0, batch_delays: bool = False
) -> Tensor:
    """As `core_attn.ops.auto_correlation`, O(L^2)."""
    correlation = mean_correlation(q, k)
    delays = choose_delays(correlation.detach(), factor=factor, batch_delays=batch_delays)
    weights = torch.softmax(correlation.gather(-1, delays), dim=-1)
    v = fit_length(v, q.shape[-2])
    samples = []
    for values, sample_weights, sample_delays in zip(v, weights, delays.tolist(), strict=True):
        rolled = [w * torch.roll(values, -lag, dims=-2) for w, lag in zip(sample_weights, sample_delays, strict=True)]
        samples.append(torch.stack(rolled).sum(0))
    return torch.stack(samples).to(v.dtype) if samples else v


def auto_correlation_map(q: Tensor, k: Tensor, *, factor: float = 1.0, batch_delays: bool = False) -> Tensor:
    """(B, H, L, M) matrix A with `auto_correlation(q, k, v) = A @ v`: weight of delay tau at [t, (t + tau) mod L]."""
    batch, heads, length, _ = q.shape
    correlation = mean_correlation(q, k)
    delays = choose_delays(correlation.detach(), factor=factor, batch_delays=batch_delays)
    weights = torch.softmax(correlation.gather(-1, delays), dim=-1)
    by_delay = torch.zeros_like(correlation).scatter(-1, delays, weights)
    t = torch.arange(length, device=q.device)
    circulant = by_delay[:, (t - t[:, None]) % length]
    # Appended zeros are no tokens, tokens cut off are read by nobody.
    keys = k.shape[-2]
    circulant = circulant[..., :keys] if keys <= length else torch.nn.functional.pad(circulant, (0, keys - length))
    return circulant.to(q.dtype).unsqueeze(1).expand(batch, heads, length, keys)
