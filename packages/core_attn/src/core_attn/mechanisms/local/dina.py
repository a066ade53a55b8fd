"""Dilated neighbourhood attention with a relative positional bias.

"Dilated Neighborhood Attention Transformer" (S52), section 3, on "Neighborhood Attention Transformer" (2023), eq. 1-3.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from core_attn.contract import Growth, Pattern
from core_attn.einsums import Cascade
from core_attn.mechanisms.local.neighborhood import NeighborhoodMixer
from core_attn.registry import register


@register(
    name="dina",
    title="Dilated Neighborhood Attention Transformer",
    source="S52",
    year=2022,
    patterns=frozenset({Pattern.NONCAUSAL_SELF, Pattern.CAUSAL_SELF}),
    grid_ranks=frozenset({1, 2}),
    time=Growth.LINEAR,
    memory=Growth.LINEAR,
    maps=True,
    double_backward=False,
    operator="neighborhood_attention",
    cascade=Cascade(
        einsums=(
            "S[b,h,l,w] = scale * Q[b,h,l,d] * K[b,h,window(l,w),d] + R[h,offset(l,w)]",
            "top[b,h,l] = max[w] S[b,h,l,w]",
            "W[b,h,l,w] = exp(S[b,h,l,w] - top[b,h,l])",
            "sum[b,h,l] = W[b,h,l,w]",
            "Y[b,h,l,d] = W[b,h,l,w] * V[b,h,window(l,w),d]",
            "O[b,h,l,d] = Y[b,h,l,d] / sum[b,h,l]",
        ),
        passes=1,
        flops="8*B*L*C**2 + 4*B*H*L*K*D",
        bytes="E*(2*B*L*C + 4*C**2 + H*R)",
        symbols={
            "K": "keys of a window, those that causality cuts included",
            "R": "relative positions of a window: (2k - 1)² of a kernel of k by k",
        },
    ),
)
class DilatedNeighborhoodAttention(NeighborhoodMixer):
    """Each token of an image reads k × k tokens around it, `dilation` apart, with a learned bias for every offset.

    DiNAT alternates layers of dilation 1 and of the largest that fits, n // k (section 3.2). The bias R has an entry
    for each offset -(k - 1) … k - 1 on both axes, in units of the dilation, as windows at a border are not centred. A
    window that a small grid makes smaller reads the middle of it. A plain sequence is an image of one row.

    Args:
        dim, heads, causal, bias, backend: see `NeighborhoodMixer`.
        kernel_size: k on both axes, or one number for each; 7 in the paper, even ones are allowed.
        dilation: distance of the window's keys on both axes, or one for each; shrinks where the grid is too small.
        rpb: whether there is the relative positional bias; drawn from a normal of deviation 0.02, cut at ± 2, as in the
            official code.

    Raises:
        ValueError: an option out of its range.
    """

    def __init__(
        self,
        dim: int,
        *,
        heads: int = 8,
        causal: bool = False,
        bias: bool = True,
        kernel_size: int | Sequence[int] = 7,
        dilation: int | Sequence[int] = 2,
        rpb: bool = True,
        backend: str = "auto",
    ) -> None:
        super().__init__(
            dim, heads=heads, causal=causal, bias=bias, kernel_size=kernel_size, dilation=dilation, backend=backend
        )
        if self.axes not in (None, 2):
            raise ValueError(f"dina reads images: give kernel_size and dilation for 2 axes, not for {self.axes}")
        rows, columns = (self.kernel_size,) * 2 if isinstance(self.kernel_size, int) else self.kernel_size
        self.rpb: nn.Parameter | None = None
        if rpb:
            self.rpb = nn.Parameter(torch.empty(heads, 2 * rows - 1, 2 * columns - 1))
            nn.init.trunc_normal_(self.rpb, std=0.02, a=-2.0, b=2.0)

    def window(self, grid: Sequence[int]) -> dict[str, Any]:
        return super().window((1, *grid) if len(grid) == 1 else grid)

    def bias_of(self, window: dict[str, Any]) -> Tensor | None:
        rpb: Tensor | None = self.rpb
        if rpb is None:
            return None
        for axis, size in enumerate(window["kernel_size"], 1):
            rpb = rpb.narrow(axis, (rpb.shape[axis] + 1) // 2 - size, 2 * size - 1)
        return rpb

    def sizes(
        self, *, batch: int, length: int, context: int | None = None, grid: tuple[int, ...] | None = None
    ) -> dict[str, float]:
        sizes = super().sizes(batch=batch, length=length, context=context, grid=grid)
        return sizes | {"R": 0 if self.rpb is None else self.rpb[0].numel()}
