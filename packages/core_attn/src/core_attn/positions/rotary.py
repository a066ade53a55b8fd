"""Rotary position embedding, "RoFormer: Enhanced Transformer with Rotary Position Embedding" (2021), eq. 34."""

from __future__ import annotations

import torch
from torch import Tensor


def rotary(
    x: Tensor, positions: Tensor, *, base: float = 10000.0, channels: int | None = None, interleaved: bool = False
) -> Tensor:
    """Turn pairs of channels of queries or keys by angles proportional to their position.

    Pair i of d channels turns by position · base^(-2i/d); the product of a query and a key then depends on the distance
    of their positions only.

    Args:
        x: (B, H, L, D), floating point.
        positions: (L,), (B, L) or (B, H, L), integer or floating point.
        base: the slowest pair turns with about this period / 2π.
        channels: how many of the first channels turn, even; all by default.
        interleaved: pairs are (2i, 2i + 1) as in the paper; otherwise (i, i + d/2), as in GPT-NeoX and LLaMA.

    Returns:
        (B, H, L, D), dtype of x. Angles are computed in float32 at least.

    Raises:
        ValueError: an odd number of channels, or positions that do not fit.
    """
    width = x.shape[-1] if channels is None else channels
    if width % 2 or not 0 <= width <= x.shape[-1]:
        raise ValueError(f"rotary turns an even number of at most {x.shape[-1]} channels, got {width}")
    if positions.shape[-1] != x.shape[-2] or positions.dim() not in (1, 2, 3):
        raise ValueError(
            f"positions must be (L,), (B, L) or (B, H, L) with L = {x.shape[-2]}, got {tuple(positions.shape)}"
        )
    dtype = torch.float64 if x.dtype is torch.float64 else torch.float32
    rates = base ** (-torch.arange(0, width, 2, dtype=dtype, device=x.device) / max(width, 1))
    angles = positions.to(dtype)[..., None] * rates
    if angles.dim() == 3:
        angles = angles[:, None]
    cos, sin = angles.cos(), angles.sin()
    turned, rest = x[..., :width].to(dtype), x[..., width:]
    if interleaved:
        a, b = turned[..., 0::2], turned[..., 1::2]
        turned = torch.stack([a * cos - b * sin, a * sin + b * cos], dim=-1).flatten(-2)
    else:
        a, b = turned.chunk(2, dim=-1)
        turned = torch.cat([a * cos - b * sin, a * sin + b * cos], dim=-1)
    return torch.cat([turned.to(x.dtype), rest], dim=-1) if rest.shape[-1] else turned.to(x.dtype)
