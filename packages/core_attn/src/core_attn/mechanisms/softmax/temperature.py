"""Softmax attention with a temperature: TempScale.

"Length-Induced Embedding Collapse in Transformer-based Models" (S132).

Shapes: B batch, L queries, M keys, C channels, H heads, D = C / H.
"""

from __future__ import annotations

from core_attn.contract import Growth, Pattern
from core_attn.einsums import Cascade
from core_attn.mechanisms.softmax.exact import SoftmaxAttention
from core_attn.registry import register


@register(
    name="temperature",
    title="Length-Induced Embedding Collapse in Transformer-based Models",
    source="S132",
    year=2024,
    patterns=frozenset(Pattern),
    time=Growth.QUADRATIC,
    memory=Growth.LINEAR,
    decodes=True,
    padding=True,
    maps=True,
    double_backward=False,
    operator="softmax_attention",
    cascade=Cascade(
        einsums=(
            "S[b,h,l,m] = scale / tau * Q[b,h,l,d] * K[b,g,m,d]",
            "top[b,h,l] = max[m] S[b,h,l,m]",
            "W[b,h,l,m] = exp(S[b,h,l,m] - top[b,h,l])",
            "sum[b,h,l] = W[b,h,l,m]",
            "Y[b,h,l,d] = W[b,h,l,m] * V[b,g,m,d]",
            "O[b,h,l,d] = Y[b,h,l,d] / sum[b,h,l]",
        ),
        passes=1,
        flops="4*B*L*C**2 + 4*B*M*C*G*D + 4*B*H*P*D",
        bytes="E*(B*(2*L + X)*C + 2*C**2 + 2*C*G*D)",
    ),
)
class TemperatureAttention(SoftmaxAttention):
    """softmax(Q Kᵀ / (τ √D)) V: a temperature τ < 1 sharpens the map, so that tokens are averaged less (section 4).

    The longer the text, the more self attention averages its tokens away; a lower temperature counters it without any
    training. It may be set on a trained `softmax` mixer's weights: the parameters are the same.

    Args:
        dim: channels C.
        heads: number of heads H; must divide dim.
        causal: token i reads tokens <= i.
        bias: whether the four projections have a bias.
        temperature: τ > 0, chosen for each model, a little below 1; 1 is plain softmax attention.
        kv_heads, dropout, window: as in `SoftmaxAttention`.
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
        temperature: float = 0.9,
        kv_heads: int | None = None,
        dropout: float = 0.0,
        window: int | tuple[int | None, int | None] | None = None,
        backend: str = "auto",
    ) -> None:
        super().__init__(
            dim,
            heads=heads,
            causal=causal,
            bias=bias,
            kv_heads=kv_heads,
            dropout=dropout,
            window=window,
            backend=backend,
        )
        if not temperature > 0.0:
            raise ValueError(f"temperature must be above 0, got {temperature}")
        self.temperature = temperature
        self.scale = self.head_dim**-0.5 / temperature

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, temperature={self.temperature}"
