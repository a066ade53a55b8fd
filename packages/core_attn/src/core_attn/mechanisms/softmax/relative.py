"""Relative attention: every head learns what each distance means to a query, "Music Transformer" (S114), section 3.4.

Shapes: B batch, L queries, M keys, C channels, H heads, D = C / H, R distances.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from core_attn.contract import Growth, Pattern
from core_attn.einsums import Cascade
from core_attn.mechanisms.softmax.cached import CachingMixer
from core_attn.ops.relative import reference, relative_attention
from core_attn.ops.softmax.reference import weights
from core_attn.registry import register


@register(
    name="relative",
    title="Music Transformer",
    source="S114",
    year=2018,
    patterns=frozenset(Pattern),
    time=Growth.QUADRATIC,
    memory=Growth.LINEAR,
    decodes=True,
    padding=True,
    maps=True,
    double_backward=False,
    operator="relative_attention",
    cascade=Cascade(
        einsums=(
            "T[b,h,l,r] = Q[b,h,l,d] * E[h,r,d]",
            "S[b,h,l,m] = scale * (Q[b,h,l,d] * K[b,h,m,d] + T[b,h,l,l-m])",
            "top[b,h,l] = max[m] S[b,h,l,m]",
            "W[b,h,l,m] = exp(S[b,h,l,m] - top[b,h,l])",
            "sum[b,h,l] = W[b,h,l,m]",
            "Y[b,h,l,d] = W[b,h,l,m] * V[b,h,m,d]",
            "O[b,h,l,d] = Y[b,h,l,d] / sum[b,h,l]",
        ),
        passes=1,
        flops="4*B*(L + M)*C**2 + 4*B*H*P*D + 2*B*H*L*R*D",
        bytes="E*(B*(2*L + X)*C + 4*C**2 + H*R*D)",
        symbols={"R": "distances with an embedding that occur"},
    ),
)
class RelativeAttention(CachingMixer):
    """softmax((Q Kᵀ + S_rel) / √D) V with S_rel[i, j] = q_i · e_{i-j}, a learned embedding of the distance (eq. 3).

    Distances beyond `max_distance` share the embedding of the largest, so that any length works. In cross attention the
    last query stands beside the last token of the context.

    Args:
        dim: channels C.
        heads: number of heads H; must divide dim.
        causal: token i reads tokens <= i; then distances are 0 … max_distance, else they have a sign.
        bias: whether the four projections have a bias.
        max_distance: the largest distance with an embedding of its own, 0 or more.
        shared: all heads use one table of embeddings.
        backend: see `core_attn.ops.relative_attention`. Gradients of gradients need "reference".

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
        max_distance: int = 128,
        shared: bool = False,
        backend: str = "auto",
    ) -> None:
        super().__init__(dim, heads=heads, causal=causal, bias=bias)
        if max_distance < 0:
            raise ValueError(f"max_distance must be at least 0, got {max_distance}")
        self.max_distance = max_distance
        self.backend = backend
        distances = max_distance + 1 if causal else 2 * max_distance + 1
        # (H, R, D): row r is the distance r when causal, else r - max_distance.
        self.relative = nn.Parameter(torch.empty(1 if shared else heads, distances, self.head_dim))
        nn.init.normal_(self.relative, std=self.head_dim**-0.5)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, *, key_padding_mask: Tensor | None, aux: Any) -> Tensor:
        return relative_attention(
            q,
            k,
            v,
            relative=self.relative,
            causal=self.causal,
            key_padding_mask=key_padding_mask,
            backend=self.backend,
        )

    def attention_scores(self, q: Tensor, k: Tensor, *, key_padding_mask: Tensor | None) -> Tensor:
        return reference.scores(
            q,
            k,
            relative=self.relative,
            causal=self.causal,
            key_padding_mask=key_padding_mask,
            scale=self.head_dim**-0.5,
        )

    def attention_map(self, q: Tensor, k: Tensor, *, key_padding_mask: Tensor | None, aux: Any) -> Tensor:
        return weights(self.attention_scores(q, k, key_padding_mask=key_padding_mask))

    def sizes(
        self, *, batch: int, length: int, context: int | None = None, grid: tuple[int, ...] | None = None
    ) -> dict[str, float]:
        sizes = super().sizes(batch=batch, length=length, context=context, grid=grid)
        occur = sizes["M"] if self.causal else length + sizes["M"] - 1
        return sizes | {"R": min(self.relative.shape[1], occur)}

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, max_distance={self.max_distance}"
