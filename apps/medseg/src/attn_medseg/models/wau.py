"""Window Attention Upsample: a U-Net whose decoder looks where it makes its grid finer.

"More than Encoder: Introducing Transformer Decoder to Upsample" (S86). Features x of the coarser level and the skip
connection s of the finer one give

    up(x, s) = bilinear(conv(x)) + attention(queries of s, keys and values of x)

where the pixels of s read the coarse ones of their own window (`core_attn`'s `WindowCrossAttention`); bilinear
upsampling is the residual connection. There is no official code, and the paper does not settle the following, which
therefore is ours: the residual path has a 1 × 1 convolution to the channels of s; attention takes its maps as they are,
without a norm before and without feed-forward layers after; heads are `heads` where they divide a level's channels;
windows hold `window` coarse pixels along an axis and are shifted by half a window at every second level of the decoder.
All else is a plain U-Net, the same with "bilinear" and "deconv", which are the paper's controls.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attn_medseg.config import WAUConfig
from attn_medseg.models.base import ImageShape, Segmenter
from attn_medseg.models.convolutions import CONVOLUTIONS, TRANSPOSED, check, double, levels, resized
from core_attn.mechanisms.local.window_cross import WindowCrossAttention

UPSAMPLERS = ("wau", "bilinear", "deconv")


class WindowAttentionUpsample(nn.Module):
    """A coarse map on the grid of a skip connection, by interpolation and by looking.

    Args:
        ndim: 2 or 3.
        channels: of the coarse map.
        skip_channels: of the skip connection and of the result.
        heads: of the attention; must divide `skip_channels`.
        window: coarse pixels of a window along each axis.
        shift: of the windows.
    """

    def __init__(
        self, ndim: int, channels: int, skip_channels: int, *, heads: int, window: int, shift: int = 0
    ) -> None:
        super().__init__()
        self.residual = CONVOLUTIONS[ndim](channels, skip_channels, 1)
        self.attention = WindowCrossAttention(
            skip_channels, channels, heads=heads, axes=ndim, factor=2, window=window, shift=shift
        )

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        """(B, channels, *s), (B, skip_channels, *2s) -> (B, skip_channels, *2s)."""
        read: Tensor = self.attention(skip, x)
        return resized(self.residual(x), tuple(skip.shape[2:])) + read


class _Bilinear(nn.Module):
    def __init__(self, ndim: int, channels: int, skip_channels: int) -> None:
        super().__init__()
        self.convolution = CONVOLUTIONS[ndim](channels, skip_channels, 1)

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        return resized(self.convolution(x), tuple(skip.shape[2:]))


class _Deconvolution(nn.Module):
    def __init__(self, ndim: int, channels: int, skip_channels: int) -> None:
        super().__init__()
        self.convolution = TRANSPOSED[ndim](channels, skip_channels, 2, stride=2)

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        found: Tensor = self.convolution(x)
        return found


class WAUNet(Segmenter):
    """A U-Net of double convolutions that takes its upsampler as an option.

    Args:
        config, shape: see `Segmenter`.
        mixer, mixer_args: not used; windows of one map read another, which no mixer of tokens does.
    """

    config: WAUConfig
    least = 2  # norms need more than one pixel

    def __init__(
        self,
        config: WAUConfig,
        shape: ImageShape,
        *,
        mixer: str | None = None,
        mixer_args: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(config, shape, mixer=mixer, mixer_args=mixer_args)
        check(config.channels, config.norm, dropout=config.dropout)
        if config.upsample not in UPSAMPLERS:
            raise ValueError(f"upsample is {config.upsample!r}; it may be {', '.join(UPSAMPLERS)}")
        if config.heads < 1 or config.window < 1:
            raise ValueError(f"heads and window must be at least 1, got {config.heads} and {config.window}")
        ndim = shape.ndim
        self.multiple = 2 ** (len(config.channels) - 1)
        options: dict[str, Any] = {"norm": config.norm, "share": config.dropout}
        given = (shape.channels, *config.channels[:-1])
        self.encoder = nn.ModuleList(double(ndim, below, own, **options) for below, own in zip(given, config.channels))
        self.pool = F.max_pool2d if ndim == 2 else F.max_pool3d
        steps = levels(config.channels)
        self.ups = nn.ModuleList(_upsampler(config, ndim, below, own, i) for i, (below, own) in enumerate(steps))
        self.decoder = nn.ModuleList(double(ndim, 2 * own, own, **options) for _, own in steps)
        self.head = CONVOLUTIONS[ndim](config.channels[0], shape.classes, 1)

    def logits(self, x: Tensor) -> Tensor:
        found: Tensor = self.head(self.decode(self.encode(x)))
        return found

    def encode(self, x: Tensor) -> list[Tensor]:
        """(B, C, *S) -> the maps of each level, from fine to coarse; odd sizes are halved upwards."""
        found: list[Tensor] = []
        for i, block in enumerate(self.encoder):
            x = block(self.pool(x, 2, ceil_mode=True) if i else x)
            found.append(x)
        return found

    def decode(self, encoded: Sequence[Tensor]) -> Tensor:
        """What `encode` gives -> (B, channels[0], *S)."""
        x = encoded[-1]
        for up, block, skip in zip(self.ups, self.decoder, reversed(encoded[:-1])):
            x = block(torch.cat([skip, up(x, skip)], dim=1))
        return x


def _upsampler(config: WAUConfig, ndim: int, channels: int, skip_channels: int, level: int) -> nn.Module:
    if config.upsample == "bilinear":
        return _Bilinear(ndim, channels, skip_channels)
    if config.upsample == "deconv":
        return _Deconvolution(ndim, channels, skip_channels)
    return WindowAttentionUpsample(
        ndim,
        channels,
        skip_channels,
        heads=math.gcd(config.heads, skip_channels),
        window=config.window,
        shift=config.window // 2 if level % 2 else 0,
    )
