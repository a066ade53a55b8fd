"""FlashAttention: exact softmax attention by tiles, without ever writing the map down.

FlashAttention: Fast and Memory-Efficient Exact Attention with IO-Awareness (S66), section 3.1 and algorithms 1, 2, 4.
"""

from __future__ import annotations

from core_attn.contract import Growth, Pattern
from core_attn.einsums import Cascade
from core_attn.mechanisms.softmax.exact import SoftmaxAttention
from core_attn.registry import register


@register(
    name="flash",
    title="FlashAttention: Fast and Memory-Efficient Exact Attention with IO-Awareness",
    source="S66",
    year=2022,
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
            "QK[b,h,l,m] = Q[b,h,l,d] * K[b,h,m,d]",
            "RM[b,h,l,m] = max(RM[b,h,l,m-1], QK[b,h,l,m])",
            "SN[b,h,l,m] = exp(QK[b,h,l,m] - RM[b,h,l,m])",
            "RD[b,h,l,m] = RD[b,h,l,m-1] * exp(RM[b,h,l,m-1] - RM[b,h,l,m]) + SN[b,h,l,m]",
            "RV[b,h,l,m,d] = RV[b,h,l,m-1,d] * exp(RM[b,h,l,m-1] - RM[b,h,l,m]) + SN[b,h,l,m] * V[b,h,m,d]",
            "Z[b,h,l,d] = RV[b,h,l,M,d] / RD[b,h,l,M]",
        ),
        passes=1,
        flops="4*B*L*C**2 + 4*B*M*C*G*D + 4*B*H*P*D",
        bytes="E*(2*B*L*C + B*M*C + 2*C**2 + 2*C*G*D)",
    ),
)
class FlashAttention(SoftmaxAttention):
    """Softmax attention by tiles: each rescales the sums so far by exp(m - m'), m the running maximum (algorithm 1).

    The backward computes the weights again from the saved log-sum-exp (algorithm 4), so that memory is linear. It
    equals `softmax`, which takes whichever backend is fastest; here the tiles in plain PyTorch are the default.

    Args:
        dim, heads, causal, bias, kv_heads, dropout, window, scale: see `SoftmaxAttention`.
        backend: "torch" runs anywhere; "flash_attn" is the authors' kernel, "triton" this library's; see
            `core_attn.ops.softmax_attention`.

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
        kv_heads: int | None = None,
        dropout: float = 0.0,
        window: int | tuple[int | None, int | None] | None = None,
        scale: float | None = None,
        backend: str = "torch",
    ) -> None:
        super().__init__(
            dim,
            heads=heads,
            causal=causal,
            bias=bias,
            kv_heads=kv_heads,
            dropout=dropout,
            window=window,
            scale=scale,
            backend=backend,
        )
