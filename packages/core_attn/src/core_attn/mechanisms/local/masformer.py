"""MASFormer: full attention in a few layers of a model, a window in all others.

"Efficient Long-Range Transformers: You Need to Attend More, but Not Necessarily at Every Layer" (S54), section 3.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Literal

from core_attn.contract import Growth, Pattern
from core_attn.mechanisms.softmax.exact import SoftmaxAttention
from core_attn.registry import register


def full_layers(depth: int, full: int, *, where: Literal["first", "last", "spread"] = "spread") -> tuple[bool, ...]:
    """Which layers of a model get full attention: the option `full` of each layer's mechanism.

    Args:
        depth: number of layers.
        full: number of layers with full attention, 0 to depth.
        where: the first layers, the last ones, or at equal distances.

    Returns:
        `depth` flags, `full` of them true, from the layer next to the input on.

    Raises:
        ValueError: an argument out of its range.

    Example:
        >>> full_layers(6, 2)
        (False, True, False, False, True, False)
    """
    if not 0 <= full <= depth:
        raise ValueError(f"full must lie between 0 and depth, got full={full} and depth={depth}")
    chosen: Collection[int]
    if where == "first":
        chosen = range(full)
    elif where == "last":
        chosen = range(depth - full, depth)
    elif where == "spread":
        # The middles of equal parts.
        chosen = [(2 * i + 1) * depth // (2 * full) for i in range(full)]
    else:
        raise ValueError(f"where is 'first', 'last' or 'spread', got {where!r}")
    return tuple(i in chosen for i in range(depth))


@register(
    name="masformer",
    title="Efficient Long-Range Transformers: You Need to Attend More, but Not Necessarily at Every Layer",
    source="S54",
    year=2023,
    patterns=frozenset(Pattern),
    time=Growth.LINEAR,
    memory=Growth.LINEAR,
    decodes=True,
    padding=True,
    maps=True,
    double_backward=False,
    operator="softmax_attention",
    cascade=SoftmaxAttention.info.cascade,
)
class MASFormerAttention(SoftmaxAttention):
    """One layer of a model with mixed attention spans: all tokens where `full`, a window elsewhere (figure 1c).

    Long range comes from the few layers with full attention; `full_layers` spreads them over a model. The facts of this
    mechanism are those of the other layers, O(L·w); a full one is softmax attention, O(L²).

    Args:
        dim, heads, causal, bias: see `MultiHeadMixer`.
        window: w reads the tokens nearer than w positions, in layers that are not full.
        full: whether this layer reads all tokens.
        backend: see `core_attn.ops.softmax_attention`. Gradients of gradients need "reference".

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
        window: int = 128,
        full: bool = False,
        backend: str = "auto",
    ) -> None:
        super().__init__(dim, heads=heads, causal=causal, bias=bias, window=None if full else window, backend=backend)
        self.full = full
