"""Gaussian adaptive attention, "Gaussian Adaptive Attention is All You Need: Robust Contextual Representations Across
Multiple Modalities" (S206), section 3.

Shapes: B batch, L tokens, C channels in H heads, N Gaussians.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from core_attn.contract import Growth, Pattern, TokenMixer
from core_attn.einsums import Cascade
from core_attn.naming import unknown
from core_attn.registry import register

AXES = ("tokens", "channels")


@register(
    name="gaussian_adaptive",
    title="Gaussian Adaptive Attention is All You Need: Robust Contextual Representations Across Multiple Modalities",
    source="S206",
    year=2024,
    patterns=frozenset({Pattern.NONCAUSAL_SELF}),
    time=Growth.LINEAR,
    memory=Growth.LINEAR,
    padding=True,
    cascade=Cascade(
        einsums=(
            "mean[b,c] = X[b,l,c] / L",
            "var[b,c] = (X[b,l,c] - mean[b,c])**2 / (L - 1)",
            "y[b,l,c,n] = (X[b,l,c] - mean[b,c] - offset[h,n]) / sqrt(var[b,c])",
            "w[b,l,c] = product[n] exp(-y[b,l,c,n]**2 / (2 width[h,n]**2)) / sqrt(2 pi width[h,n]**2)",
            "sum[b,c] = w[b,l,c]",
            "O[b,l,c] = X[b,l,c] * w[b,l,c] / sum[b,c]",
        ),
        passes=3,
        flops="0",
        bytes="2*E*B*L*C",
    ),
)
class GaussianAdaptive(TokenMixer):
    """Weigh every feature by a learned product of Gaussians around its own mean; no queries, keys or projections.

    For each feature, mean μ and variance σ² are taken along the axis; the weight of a value x is the product over n of
    N((x - μ - δ_n) / σ; 0, c_n²), normalised along the axis, and the output is weight · x (section 3.2). Offsets δ and
    widths c are learned, one set a head; heads share out the channels.

    Along tokens (the default) the weights of a feature sum to 1 over the sequence. Padded tokens are not counted and
    give zeros; the official code counts the values it treats as padding in mean and variance, and passes them through.

    Args:
        dim: channels C.
        heads: number of heads H; must divide dim.
        gaussians: number N of Gaussians a head, positive.
        axis: "tokens", or "channels": mean, variance and weights along the channels of a head, each token by itself.
        eps: added to the variance, and least sum of weights.

    Raises:
        ValueError: an option out of its range.
        UnknownNameError: no such axis.
    """

    def __init__(
        self, dim: int, *, heads: int = 8, gaussians: int = 4, axis: str = "tokens", eps: float = 1e-8
    ) -> None:
        super().__init__(dim)
        if heads < 1 or dim % heads:
            raise ValueError(f"heads must divide dim, got dim={dim} and heads={heads}")
        if gaussians < 1:
            raise ValueError(f"gaussians must be a positive integer, got {gaussians}")
        if axis not in AXES:
            raise unknown("axis", axis, AXES)
        self.heads = heads
        self.axis = axis
        self.eps = eps
        self.offset = nn.Parameter(torch.zeros(heads, gaussians))
        self.width = nn.Parameter(torch.randn(heads, gaussians).exp())

    def forward(
        self,
        x: Tensor,
        *,
        context: Tensor | None = None,
        key_padding_mask: Tensor | None = None,
        grid: tuple[int, ...] | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        self.check_inputs(x, context=context, key_padding_mask=key_padding_mask, grid=grid, generator=generator)
        real = None
        if key_padding_mask is not None:
            real = key_padding_mask[:, :, None, None]
            x = x.masked_fill(~real[..., 0], 0.0)
        # Products of many Gaussians leave the range of 16-bit floats.
        values = x.unflatten(-1, (self.heads, -1)).to(torch.promote_types(x.dtype, torch.float32))
        dim = 1 if self.axis == "tokens" else -1
        counted = real if dim == 1 else None
        mean = _sum(values, counted, dim) / _count(values, counted, dim).clamp(min=1)
        spread = _sum((values - mean).square(), counted, dim) / (_count(values, counted, dim) - 1).clamp(min=1)
        scale = (spread + self.eps).sqrt()
        weight = torch.ones_like(values)
        for offset, width in zip(self.offset.unbind(-1), self.width.unbind(-1)):
            y = (values - mean - offset[:, None]) / scale
            weight = weight * torch.exp(-y.square() / (2 * width[:, None].square()))
            weight = weight / (2 * math.pi * width[:, None].square()).sqrt()
        weight = weight / _sum(weight, counted, dim).clamp(min=self.eps)
        return (values * weight).flatten(-2).to(x.dtype)


def _sum(x: Tensor, real: Tensor | None, dim: int) -> Tensor:
    return (x if real is None else x * real).sum(dim, keepdim=True)


def _count(x: Tensor, real: Tensor | None, dim: int) -> Tensor:
    if real is None:
        return torch.tensor(float(x.shape[dim]), dtype=x.dtype, device=x.device)
    return real.sum(dim, keepdim=True).to(x.dtype)
