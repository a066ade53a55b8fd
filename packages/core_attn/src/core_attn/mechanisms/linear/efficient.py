"""Efficient attention as a token mixer.

"Efficient Attention: Attention with Linear Complexities" (2021), section 3.2: the attention over positions of
"TransDAE" (S29) and of DAE-Former.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from core_attn import ops
from core_attn.contract import Growth, Pattern
from core_attn.einsums import Cascade
from core_attn.mechanisms.heads import MultiHeadMixer
from core_attn.ops.efficient import efficient_map, summarise
from core_attn.registry import register


@register(
    name="efficient",
    title="Efficient Attention: Attention with Linear Complexities",
    source="",
    year=2021,
    patterns=frozenset({Pattern.NONCAUSAL_SELF, Pattern.NONCAUSAL_CROSS}),
    time=Growth.LINEAR,
    memory=Growth.LINEAR,
    padding=True,
    maps=True,
    double_backward=False,
    operator="efficient_attention",
    cascade=Cascade(
        einsums=(
            "P[b,h,l,d] = softmax[d] Q[b,h,l,d]",
            "R[b,h,m,d] = softmax[m] K[b,h,m,d]",
            "T[b,h,d,c] = R[b,h,m,d] * X[b,m,c]",
            "S[b,h,d,e] = T[b,h,d,c] * Wv[h,e,c]",
            "Y[b,h,d,c] = S[b,h,d,e] * Wo[c,h,e]",
            "O[b,l,c] = P[b,h,l,d] * Y[b,h,d,c]",
        ),
        # The softmax over the keys: largest, sum, weighted sum.
        passes=3,
        flops="4*B*(L + M)*C**2 + 4*B*C**2*D",
        bytes="E*(B*(2*L + X)*C + 4*C**2)",
    ),
)
class EfficientAttention(MultiHeadMixer):
    """Queries normalised over their channels, keys over the tokens: softmax_D(q) (softmax_M(k)ᵀ v), linear in tokens.

    Each of a head's D channels is an attention map over all tokens, shared by all queries; a query says how it mixes
    the D summaries. The 1 × 1 convolutions of the official code are the four projections here: their weights without
    the two axes of size 1. DAE-Former uses one head whatever number it is given.

    As nothing stands between the projections of values and outputs and the products, they are multiplied onto the D × D
    summaries instead of the tokens: ρ_q ((ρ_kᵀ x) W_v W_o). That is the same by associativity, for two thirds of the
    work, and with any number of heads no tensor of tokens is taken apart. With `backend` other than "auto" the heads
    are computed one by one as the definition says, by that backend of the operator.

    Args:
        dim, heads, bias: see `MultiHeadMixer`.
        causal: must be False.
        backend: "auto", or see `core_attn.ops.efficient_attention`. Gradients of gradients need "reference".

    Raises:
        ValueError: an option out of its range.
    """

    def __init__(
        self, dim: int, *, heads: int = 8, causal: bool = False, bias: bool = True, backend: str = "auto"
    ) -> None:
        super().__init__(dim, heads=heads, causal=causal, bias=bias)
        if causal:
            raise ValueError("efficient has no causal form; build it with causal=False")
        self.backend = backend

    def forward(
        self,
        x: Tensor,
        *,
        context: Tensor | None = None,
        key_padding_mask: Tensor | None = None,
        grid: tuple[int, ...] | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        if self.backend != "auto":
            return super().forward(
                x, context=context, key_padding_mask=key_padding_mask, grid=grid, generator=generator
            )
        self.check_inputs(x, context=context, key_padding_mask=key_padding_mask, grid=grid, generator=generator)
        source = x if context is None else context
        if key_padding_mask is not None:
            source = source.masked_fill(~key_padding_mask.unsqueeze(-1), 0.0)
        x = x if context is not None else source
        q, k = self.q_proj(x), self.k_proj(source)
        if self._tap is not None:
            heads = [self.split_heads(t) for t in (q, k, self.v_proj(source))]
            read = self.attend(*heads, key_padding_mask=key_padding_mask, aux=None)
            edited = self._tap(self, *heads, read, key_padding_mask, None)
            if edited is not read:
                return self.out_proj(self.merge_heads(edited))  # type: ignore[no-any-return]
        with torch.autocast(x.device.type, enabled=False):
            found = summarise(k, source, key_padding_mask)
            dtype = found.dtype
            # (B, H, D, C), each head's by its own part of the weights of values and outputs.
            own = found.unflatten(1, (self.heads, -1)) @ self.v_proj.weight.to(dtype).unflatten(0, (self.heads, -1)).mT
            if self.v_proj.bias is not None:
                # Weights of a key channel sum to 1, so the bias comes out as it is; to 0 where there is no key.
                own = own + self.v_proj.bias.to(dtype).view(self.heads, 1, -1) * _alive(source, key_padding_mask)
            own = own @ self.out_proj.weight.to(dtype).mT.unflatten(0, (self.heads, -1))
            weights = torch.softmax(q.to(dtype).unflatten(-1, (self.heads, -1)), dim=-1).flatten(-2)
            own = own.flatten(1, 2)
            bias = self.out_proj.bias
            out = torch.bmm(weights, own) if bias is None else torch.baddbmm(bias.to(dtype), weights, own)
        return out.to(q.dtype)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, *, key_padding_mask: Tensor | None, aux: Any) -> Tensor:
        return ops.efficient_attention(q, k, v, key_padding_mask=key_padding_mask, backend=self.backend)  # type: ignore[no-any-return]

    def attention_map(self, q: Tensor, k: Tensor, *, key_padding_mask: Tensor | None, aux: Any) -> Tensor:
        return efficient_map(q, k, key_padding_mask=key_padding_mask)

    def extra_repr(self) -> str:
        return f"heads={self.heads}"


def _alive(source: Tensor, key_padding_mask: Tensor | None) -> Tensor | bool:
    """Which samples have a key at all, (B, 1, 1, 1), or whether all have."""
    if key_padding_mask is None:
        return source.shape[1] > 0
    return key_padding_mask.any(dim=1)[:, None, None, None]
