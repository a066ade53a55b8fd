"""Generalised neighbourhood attention: windows that move in strides.

"Generalized Neighborhood Attention: Multi-dimensional Sparse Attention at the Speed of Light" (S163), section 3.
"""

from __future__ import annotations

from collections.abc import Sequence

from core_attn.contract import Growth, Pattern
from core_attn.mechanisms.local.fna import CASCADE
from core_attn.mechanisms.local.neighborhood import NeighborhoodMixer
from core_attn.registry import register


@register(
    name="gna",
    title="Generalized Neighborhood Attention: Multi-dimensional Sparse Attention at the Speed of Light",
    source="S163",
    year=2025,
    patterns=frozenset({Pattern.NONCAUSAL_SELF, Pattern.CAUSAL_SELF}),
    grid_ranks=frozenset({1, 2, 3}),
    time=Growth.LINEAR,
    memory=Growth.LINEAR,
    maps=True,
    double_backward=False,
    operator="neighborhood_attention",
    cascade=CASCADE,
)
class GeneralizedNeighborhoodAttention(NeighborhoodMixer):
    """Groups of `stride` neighbouring tokens read the window of the one in their middle (section 3).

    Stride 1 is neighbourhood attention; stride = kernel_size is attention in blocks; what lies between trades the
    sliding of the window for tiles without waste. On causal axes the window belongs to the last token of a group, and
    each token reads it up to itself.

    Args:
        dim, heads, causal, bias, kernel_size, dilation, stride, causal_axes, backend: see `NeighborhoodMixer`.

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
        kernel_size: int | Sequence[int] = 8,
        stride: int | Sequence[int] = 4,
        dilation: int | Sequence[int] = 1,
        causal_axes: Sequence[bool] | None = None,
        backend: str = "auto",
    ) -> None:
        super().__init__(
            dim,
            heads=heads,
            causal=causal,
            bias=bias,
            kernel_size=kernel_size,
            dilation=dilation,
            stride=stride,
            causal_axes=causal_axes,
            backend=backend,
        )
