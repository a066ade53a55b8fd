"""Attention from fine pixels to the coarse ones of their window: an upsampling that looks.

"More than Encoder: Introducing Transformer Decoder to Upsample" (S86), section 3: queries from the skip connection,
keys and values from the features of the coarser level, inside matching windows. Two maps of different sizes go in, so
it is no `TokenMixer` and not among the registered mechanisms.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from core_attn.ops import window_cross_attention
from core_attn.ops.partition import Windows


class WindowCrossAttention(nn.Module):
    """Each pixel or voxel of a fine map reads the coarse ones of its window, with a learned bias for every offset.

    Args:
        dim: channels of the fine map.
        context_dim: channels of the coarse map.
        out_dim: channels of the result; dim where None.
        heads: number of heads; must divide out_dim.
        axes: 2 for images, 3 for volumes.
        factor: fine pixels in a coarse one on every axis, or one number for each.
        window: coarse pixels of a window on every axis, or one number for each.
        shift: coarse pixels before the first cut on every axis, or one number for each; less than window.
        rpb: whether there is the relative positional bias.
        bias: whether the four projections have a bias.
        backend: see `core_attn.ops.window_cross_attention`.

    Raises:
        ValueError: an option out of its range.
    """

    def __init__(
        self,
        dim: int,
        context_dim: int,
        *,
        out_dim: int | None = None,
        heads: int = 4,
        axes: int = 2,
        factor: int | Sequence[int] = 2,
        window: int | Sequence[int] = 4,
        shift: int | Sequence[int] = 0,
        rpb: bool = True,
        bias: bool = True,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        out_dim = dim if out_dim is None else out_dim
        if min(dim, context_dim, out_dim, heads) < 1 or out_dim % heads:
            raise ValueError(
                "dim, context_dim and out_dim must be positive and heads divide out_dim, got "
                f"{dim}, {context_dim}, {out_dim} and {heads}"
            )
        given = Windows.of((1,) * axes, window, factor, shift)
        self.window, self.factor, self.shift = given.window, given.factor, given.shift
        self.heads = heads
        self.backend = backend
        self.q_proj = nn.Linear(dim, out_dim, bias=bias)
        self.k_proj = nn.Linear(context_dim, out_dim, bias=bias)
        self.v_proj = nn.Linear(context_dim, out_dim, bias=bias)
        self.out_proj = nn.Linear(out_dim, out_dim, bias=bias)
        self.rpb: nn.Parameter | None = None
        if rpb:
            self.rpb = nn.Parameter(torch.empty(heads, *given.offsets))
            nn.init.trunc_normal_(self.rpb, std=0.02, a=-2.0, b=2.0)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        """Read the coarse map for every place of the fine one.

        Args:
            x: (B, dim, n_1, …) the fine map, of any size.
            context: (B, context_dim, m_1, …) the coarse map, m_i = ⌈n_i / factor_i⌉.

        Returns:
            (B, out_dim, n_1, …).

        Raises:
            ValueError: shapes that do not fit.
        """
        axes, channels = len(self.window), (self.q_proj.in_features, self.k_proj.in_features)
        if x.dim() != axes + 2 or context.dim() != axes + 2 or (x.shape[1], context.shape[1]) != channels:
            raise ValueError(
                f"the fine and the coarse map must have {axes} axes and {channels} channels, got {tuple(x.shape)} and "
                f"{tuple(context.shape)}"
            )
        coarse = Windows.of(x.shape[2:], self.window, self.factor, self.shift).key_grid
        if tuple(context.shape[2:]) != coarse or context.shape[0] != x.shape[0]:
            raise ValueError(
                f"the coarse map of {tuple(x.shape)} at factor {self.factor} must be of size {coarse}, got "
                f"{tuple(context.shape)}"
            )
        tokens, keys = x.flatten(2).mT, context.flatten(2).mT
        q, k, v = (
            f(t).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for f, t in ((self.q_proj, tokens), (self.k_proj, keys), (self.v_proj, keys))
        )
        read = window_cross_attention(
            q,
            k,
            v,
            grid=x.shape[2:],
            window=self.window,
            factor=self.factor,
            shift=self.shift,
            rpb=self.rpb,
            backend=self.backend,
        )
        out: Tensor = self.out_proj(read.transpose(1, 2).flatten(-2))
        return out.mT.unflatten(2, x.shape[2:])

    def extra_repr(self) -> str:
        return f"heads={self.heads}, factor={self.factor}, window={self.window}, shift={self.shift}"
