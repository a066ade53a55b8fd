"""TransDAE (S29).

"TransDAE: Dual Attention Mechanism in a Hierarchical Transformer for Efficient Medical Image Segmentation" (Azad et
al., 2024). Shapes as in `attn_medseg.models.daeformer`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attn_medseg.config import TransDAEConfig
from attn_medseg.models.base import ImageShape
from attn_medseg.models.convolutions import CONVOLUTIONS, as_image, as_tokens, resized
from attn_medseg.models.daeformer import Block, Expand, Grid, HierarchicalSegmenter, finer, start


class TransDAE(HierarchicalSegmenter):
    """DAE-Former's blocks with skips in which all scales of the encoder meet the decoder under a large kernel.

        block:  x = x + efficient(LN(x));  x = x + FFN(LN(x));  x = x + channel(LN(x));  x = x + FFN(LN(x))
        level:  u = W y + sum over stages t of W_t s_t on the level's grid;  u = u + W2 LKA(GELU(W1 LN(u)));  blocks(u)
        LKA(g): g * W3 dilated(depthwise(g)), together as wide as one kernel of `kernel` cells

    where y comes from the coarser level and s_t are the outputs of the encoder's stages: brought to a finer grid
    linearly, to a coarser one as means.

    There is no official code, and of the paper only its abstract and summaries were at hand. From there come the order
    of a block, efficient attention between tokens and attention between channels, the U of overlapping cells, and a
    module in the skips that lets scales interact through a large kernel taken apart. What they leave open is chosen
    here: three levels, cells, feed-forward layers, finer tokens and first weights as in its parent DAE-Former; that
    every stage reaches every skip, and how they are brought to one grid; large kernel attention with its usual sizes
    and a residual branch around it, as in "Visual Attention Network" (Guo et al., 2022). They also mention a coarser
    grid of keys and values, which is not here: efficient attention is linear without it.

    Args:
        config, shape, mixer, mixer_args: see `HierarchicalSegmenter`.

    Raises:
        ValueError: see `HierarchicalSegmenter`; a kernel no larger than its dilation.
    """

    config: TransDAEConfig

    def __init__(
        self,
        config: TransDAEConfig,
        shape: ImageShape,
        *,
        mixer: str | None = None,
        mixer_args: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(config, shape, mixer=mixer, mixer_args=mixer_args)
        widths, n = config.channels, shape.ndim
        self.expand = Expand(n, widths[-1], factor=2, out=widths[-1] // 2)
        self.levels = nn.ModuleList(
            InteractionLevel(
                Interaction(n, dim, (coarser // 2, *widths), kernel=config.kernel, dilation=config.dilation),
                [self.block(dim) for _ in range(config.blocks)],
                Expand(n, dim, **finer(config, level, dim)),
            )
            for level, (dim, coarser) in reversed(list(enumerate(pairwise(widths))))
        )
        self.head = nn.Linear(widths[0], shape.classes)
        start(self.expand, self.levels, self.head)

    def decode(self, encoded: Sequence[tuple[Tensor, Grid]]) -> tuple[Tensor, Grid]:
        tokens, grid = self.expand(*encoded[-1])
        for level in self.levels:
            tokens, grid = level(tokens, encoded, grid)
        return tokens, grid


class InteractionLevel(nn.Module):
    """A level of the decoder: from below, with all stages of the encoder, through blocks, to a finer grid."""

    def __init__(self, interaction: Interaction, blocks: Sequence[Block], expand: Expand) -> None:
        super().__init__()
        self.interaction = interaction
        self.blocks = nn.ModuleList(blocks)
        self.expand = expand

    def forward(self, x: Tensor, encoded: Sequence[tuple[Tensor, Grid]], grid: Grid) -> tuple[Tensor, Grid]:
        """(B, L, C') and the encoder's stages -> finer tokens and their grid."""
        x = self.interaction(((x, grid), *encoded), grid)
        for block in self.blocks:
            x = block(x, grid)
        found: tuple[Tensor, Grid] = self.expand(x, grid)
        return found


class Interaction(nn.Module):
    """Tokens of several grids become one map, refined by large kernel attention.

    Args:
        ndim: axes of the grids.
        dim: channels C of the result.
        sources: channels of each source; the first one's layer has the bias of all.
        kernel, dilation: see `LargeKernelAttention`.
    """

    def __init__(self, ndim: int, dim: int, sources: Sequence[int], *, kernel: int, dilation: int) -> None:
        super().__init__()
        self.sources = nn.ModuleList(nn.Linear(one, dim, bias=i == 0) for i, one in enumerate(sources))
        self.norm = nn.LayerNorm(dim)
        self.enter = nn.Linear(dim, dim)
        self.large = LargeKernelAttention(ndim, dim, kernel=kernel, dilation=dilation)
        self.leave = nn.Linear(dim, dim)

    def forward(self, sources: Sequence[tuple[Tensor, Grid]], grid: Grid) -> Tensor:
        """(B, L_t, C_t) and the grid of each source -> (B, L, C) on `grid`."""
        parts = [
            projection(tokens) if own == grid else as_tokens(on_grid(as_image(projection(tokens), own), grid))
            for projection, (tokens, own) in zip(self.sources, sources)
        ]
        x = torch.stack(parts).sum(dim=0)
        read = F.gelu(self.enter(self.norm(x)))
        found: Tensor = x + self.leave(as_tokens(self.large(as_image(read, grid))))
        return found


class LargeKernelAttention(nn.Module):
    """x * W dilated(depthwise(x)): each cell and channel is weighed by what lies around it.

    A depthwise convolution of 2·dilation - 1 cells, a dilated one of ceil(kernel / dilation), rounded up to an odd
    number, and a pointwise one, as in "Visual Attention Network". The weights are not normalised. For a kernel of 21
    and a dilation of 3 these are 5 and 7 cells, which reach 11 cells to each side.

    Raises:
        ValueError: a kernel no larger than its dilation, or a dilation below 1.
    """

    def __init__(self, ndim: int, dim: int, *, kernel: int, dilation: int) -> None:
        super().__init__()
        if not 1 <= dilation < kernel:
            raise ValueError(f"kernel must be larger than dilation, and dilation at least 1, got {kernel}, {dilation}")
        taps = -(-kernel // dilation) | 1
        conv = CONVOLUTIONS[ndim]
        self.near = conv(dim, dim, 2 * dilation - 1, padding=dilation - 1, groups=dim)
        self.far = conv(dim, dim, taps, padding=taps // 2 * dilation, dilation=dilation, groups=dim)
        self.mix = conv(dim, dim, 1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, *grid) -> (B, C, *grid)."""
        near = self.near(x)
        # Not under autocast: in bfloat16 on the CPU the gradient of the dilated convolution's weights held NaN now and
        # then, its inputs finite (torch 2.13).
        with torch.autocast(x.device.type, enabled=False):
            far = self.far(near.to(self.far.weight.dtype))
        found: Tensor = x * self.mix(far)
        return found


def on_grid(x: Tensor, grid: Grid) -> Tensor:
    """(B, C, *s) -> (B, C, *grid): linearly to a finer grid, as means to a coarser one."""
    if x.shape[2] >= grid[0]:
        return F.interpolate(x, size=grid, mode="area")
    return resized(x, grid)
