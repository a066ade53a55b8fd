"""Transposed attention as a token mixer: channels read channels.

"TransDAE: Dual Attention Mechanism in a Hierarchical Transformer for Efficient Medical Image Segmentation" (S29) and
its parent DAE-Former; the cross-covariance attention of "XCiT: Cross-Covariance Image Transformers" (2021), 3.2.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from core_attn import ops
from core_attn.contract import Growth, Pattern
from core_attn.einsums import Cascade
from core_attn.mechanisms.heads import MultiHeadMixer
from core_attn.registry import register


@register(
    name="channel",
    title="TransDAE: Dual Attention Mechanism in a Hierarchical Transformer for Efficient Medical Image Segmentation",
    source="S29",
    year=2024,
    patterns=frozenset({Pattern.NONCAUSAL_SELF}),
    time=Growth.LINEAR,
    memory=Growth.LINEAR,
    padding=True,
    operator="channel_attention",
    cascade=Cascade(
        einsums=(
            "p[b,h,d] = sqrt(Q[b,h,l,d]**2)",
            "r[b,h,e] = sqrt(K[b,h,l,e]**2)",
            "G[b,h,d,e] = Q[b,h,l,d] * K[b,h,l,e]",
            "S[b,h,d,e] = temperature[h] * G[b,h,d,e] / (p[b,h,d] * r[b,h,e])",
            "O[b,h,l,d] = softmax[e] S[b,h,d,e] * V[b,h,l,e]",
        ),
        # Once for products and norms, once more for the values, as no weight is known before the last token.
        passes=2,
        flops="8*B*L*C**2 + 4*B*H*L*D**2",
        bytes="E*(2*B*L*C + 4*C**2)",
    ),
)
class ChannelAttention(MultiHeadMixer):
    """The channels of a head read each other: v softmax(τ q̂ᵀ k̂)ᵀ with q̂, k̂ of norm 1 over the tokens, linear in tokens.

    The D × D map of a head says how alike two channels are over all tokens; a token's output is a mixture of its own
    channels. τ is learned, one number a head, 1 at the start. Tokens know of each other through the map only, so a
    model needs another mechanism beside it, in TransDAE "efficient".

    Args:
        dim, heads: see `MultiHeadMixer`.
        causal: must be False.
        bias: whether the projections of queries, keys and values have a bias; not in DAE-Former. The output's has one.
        backend: see `core_attn.ops.channel_attention`.

    Raises:
        ValueError: an option out of its range.
    """

    def __init__(
        self, dim: int, *, heads: int = 8, causal: bool = False, bias: bool = False, backend: str = "auto"
    ) -> None:
        super().__init__(dim, heads=heads, causal=causal, bias=bias)
        if causal:
            raise ValueError("channel has no causal form; build it with causal=False")
        if not bias:
            self.out_proj = nn.Linear(dim, dim)
        self.temperature = nn.Parameter(torch.ones(heads))
        self.backend = backend

    def attend(self, q: Tensor, k: Tensor, v: Tensor, *, key_padding_mask: Tensor | None, aux: Any) -> Tensor:
        return ops.channel_attention(  # type: ignore[no-any-return]
            q, k, v, temperature=self.temperature, key_padding_mask=key_padding_mask, backend=self.backend
        )

    def extra_repr(self) -> str:
        return f"heads={self.heads}"
