"""Attention inside shifted windows of images and volumes, with a relative positional bias.

"Swin Transformer: Hierarchical Vision Transformer using Shifted Windows" (2021), section 3.2, and in three dimensions
"Swin UNETR: Swin Transformers for Semantic Segmentation of Brain Tumors in MRI Images" (2022), section 3.1; the
attention of "Attention Swin U-Net" (S81).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from core_attn.contract import Growth, Pattern
from core_attn.einsums import Cascade
from core_attn.mechanisms.heads import MultiHeadMixer
from core_attn.ops import window_cross_attention
from core_attn.ops.partition import Windows, reference
from core_attn.ops.softmax.reference import weights
from core_attn.registry import register

_CASCADE = Cascade(
    einsums=(
        "S[b,h,l,w] = scale * Q[b,h,l,d] * K[b,h,window(l,w),d] + R[h,offset(l,w)]",
        "W[b,h,l,w] = softmax[w] S[b,h,l,w]",
        "O[b,h,l,d] = W[b,h,l,w] * V[b,h,window(l,w),d]",
    ),
    passes=3,
    flops="8*B*L*C**2 + 4*B*H*P*D",
    bytes="E*(2*B*L*C + 4*C**2 + H*R)",
    symbols={"R": "relative positions of a window: the product of 2w - 1 over the axes"},
)


class _ShiftedWindows(MultiHeadMixer):
    """What both ranks share; `axes` is the number of axes of the windows, `usual` their sides by default."""

    axes: ClassVar[int]
    usual: ClassVar[int]

    def __init__(
        self,
        dim: int,
        *,
        heads: int = 8,
        causal: bool = False,
        bias: bool = True,
        window: int | Sequence[int] | None = None,
        shift: int | Sequence[int] = 0,
        rpb: bool = True,
        backend: str = "auto",
    ) -> None:
        super().__init__(dim, heads=heads, causal=causal, bias=bias)
        if causal:
            raise ValueError(f"{self.info.name} has no causal form; build it with causal=False")
        given = Windows.of((1,) * self.axes, self.usual if window is None else window, 1, shift)
        self.window, self.shift = given.window, given.shift
        self.backend = backend
        self.rpb: nn.Parameter | None = None
        if rpb:
            self.rpb = nn.Parameter(torch.empty(heads, *given.offsets))
            nn.init.trunc_normal_(self.rpb, std=0.02, a=-2.0, b=2.0)

    def windows(self, grid: Sequence[int]) -> Windows:
        """The windows on this grid: on an axis that one window covers there is no shift, as in the paper's code."""
        grid = (1,) * (self.axes - len(grid)) + tuple(grid)
        fits = [n > w for n, w in zip(grid, self.window)]
        window = [w if f else max(1, n) for n, w, f in zip(grid, self.window, fits)]
        return Windows.of(grid, window, 1, [s if f else 0 for s, f in zip(self.shift, fits)])

    def bias_of(self, windows: Windows) -> Tensor | None:
        """The relative positional bias of those windows: the middle of the table where they are smaller."""
        rpb: Tensor | None = self.rpb
        if rpb is None:
            return None
        for axis, (size, own) in enumerate(zip(windows.window, self.window), 1):
            rpb = rpb.narrow(axis, own - size, 2 * size - 1)
        return rpb

    def side_input(
        self,
        q: Tensor,
        k: Tensor,
        *,
        x: Tensor,
        query_padding_mask: Tensor | None,
        grid: tuple[int, ...] | None,
        generator: torch.Generator | None,
    ) -> Windows:
        return self.windows((q.shape[2],) if grid is None else grid)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, *, key_padding_mask: Tensor | None, aux: Any) -> Tensor:
        return window_cross_attention(  # type: ignore[no-any-return]
            q,
            k,
            v,
            grid=aux.grid,
            window=aux.window,
            shift=aux.shift,
            rpb=self.bias_of(aux),
            key_padding_mask=key_padding_mask,
            backend=self.backend,
        )

    def attention_map(self, q: Tensor, k: Tensor, *, key_padding_mask: Tensor | None, aux: Any) -> Tensor:
        return weights(
            reference.scores(
                q,
                k,
                windows=aux,
                rpb=self.bias_of(aux),
                key_padding_mask=key_padding_mask,
                scale=self.head_dim**-0.5,
            )
        )

    def sizes(
        self, *, batch: int, length: int, context: int | None = None, grid: tuple[int, ...] | None = None
    ) -> dict[str, float]:
        sizes = super().sizes(batch=batch, length=length, context=context, grid=grid)
        windows = self.windows((length,) if grid is None else grid)
        return sizes | {"P": windows.pairs, "R": 0 if self.rpb is None else self.rpb[0].numel()}

    def extra_repr(self) -> str:
        return f"heads={self.heads}, window={self.window}, shift={self.shift}"


@register(
    name="swin",
    title="Swin Transformer: Hierarchical Vision Transformer using Shifted Windows",
    source="",
    year=2021,
    patterns=frozenset({Pattern.NONCAUSAL_SELF}),
    grid_ranks=frozenset({1, 2}),
    time=Growth.LINEAR,
    memory=Growth.LINEAR,
    padding=True,
    maps=True,
    double_backward=False,
    operator="window_cross_attention",
    cascade=_CASCADE,
)
class SwinAttention(_ShiftedWindows):
    """Each token of an image reads the w × w tokens of its window, with a learned bias for every offset.

    The windows cut the image from `shift` on, so that layers with shift 0 and with shift w // 2 in turn carry
    information over the borders. Nothing is read across the image's edge, and images of any size are taken: where the
    sizes do not divide, the last windows are smaller. On an axis that one window covers, the window is the axis and
    there is no shift. The official code and MONAI fill up such images with zeros instead, which are read as tokens; for
    their results, pad the image to whole windows before. A plain sequence is an image of one row.

    Args:
        dim, heads, bias: see `MultiHeadMixer`.
        causal: must be False.
        window: w on both axes, or one number for each; 7 where None, as in the paper.
        shift: tokens before the first cut on both axes, or one number for each; less than w.
        rpb: whether there is the relative positional bias.
        backend: see `core_attn.ops.window_cross_attention`. Gradients of gradients need "reference".

    Raises:
        ValueError: an option out of its range.
    """

    axes = 2
    usual = 7


@register(
    name="swin_3d",
    title="Swin UNETR: Swin Transformers for Semantic Segmentation of Brain Tumors in MRI Images",
    source="",
    year=2022,
    patterns=frozenset({Pattern.NONCAUSAL_SELF}),
    grid_ranks=frozenset({1, 2, 3}),
    time=Growth.LINEAR,
    memory=Growth.LINEAR,
    padding=True,
    maps=True,
    double_backward=False,
    operator="window_cross_attention",
    cascade=_CASCADE,
)
class SwinVolumeAttention(_ShiftedWindows):
    """`SwinAttention` with windows of w × w × w voxels of a volume; an image is a volume of one slice.

    Args:
        dim, heads, bias: see `MultiHeadMixer`.
        causal: must be False.
        window: w on all axes, or one number for each; 4 where None, 7 in Swin UNETR, whose 343 keys a window take over
            four times the work of 64.
        shift: voxels before the first cut on all axes, or one number for each; less than w.
        rpb: whether there is the relative positional bias.
        backend: see `core_attn.ops.window_cross_attention`. Gradients of gradients need "reference".

    Raises:
        ValueError: an option out of its range.
    """

    axes = 3
    usual = 4
