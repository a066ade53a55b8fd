"""Softmax attention whose scale follows the number of tokens.

"Training-free Diffusion Model Adaptation for Variable-Sized Text-to-Image Synthesis" (S176).

Shapes: B batch, L queries, M keys, C channels, H heads, D = C / H.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from core_attn.contract import Growth, Pattern
from core_attn.einsums import Cascade
from core_attn.mechanisms.softmax.cached import CachingMixer
from core_attn.ops.softmax import reference, softmax_attention
from core_attn.registry import register


@register(
    name="entropy_scaling",
    title="Training-free Diffusion Model Adaptation for Variable-Sized Text-to-Image Synthesis",
    source="S176",
    year=2023,
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
            "a[b,l] = sqrt(log(keys[b,l]) / log(train_length))",
            "S[b,h,l,m] = a[b,l] * scale * Q[b,h,l,d] * K[b,h,m,d]",
            "top[b,h,l] = max[m] S[b,h,l,m]",
            "W[b,h,l,m] = exp(S[b,h,l,m] - top[b,h,l])",
            "sum[b,h,l] = W[b,h,l,m]",
            "Y[b,h,l,d] = W[b,h,l,m] * V[b,h,m,d]",
            "O[b,h,l,d] = Y[b,h,l,d] / sum[b,h,l]",
        ),
        passes=1,
        flops="4*B*(L + M)*C**2 + 4*B*H*P*D",
        bytes="E*(B*(2*L + X)*C + 4*C**2)",
    ),
)
class EntropyScalingAttention(CachingMixer):
    """softmax(λ Q Kᵀ) V with λ = √(log_T N / D): N tokens at hand, T tokens in training (section 3.3).

    The entropy of a row grows about as log N; the factor keeps it nearer to what the model was trained with: sharper
    maps for more tokens, flatter ones for fewer. At N = T it is plain softmax attention, with the same parameters. It
    alleviates the change of entropy and does not cancel it. N counts the keys that a query may read, so padding does
    not matter, and a causal row takes its own number.

    Args:
        dim: channels C.
        heads: number of heads H; must divide dim.
        causal: token i reads tokens <= i.
        bias: whether the four projections have a bias.
        train_length: T >= 2, the number of tokens that a row read in training.
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
        train_length: int = 512,
        backend: str = "auto",
    ) -> None:
        super().__init__(dim, heads=heads, causal=causal, bias=bias)
        if train_length < 2:
            raise ValueError(f"train_length must be at least 2, got {train_length}")
        self.train_length = train_length
        self.backend = backend

    def scaled(self, q: Tensor, k: Tensor, key_padding_mask: Tensor | None) -> Tensor:
        """Queries times √(log_T N), so that the usual 1/√D makes it λ."""
        queries, keys = q.shape[2], k.shape[2]
        position = torch.arange(queries, device=q.device) + (keys - queries)
        count: Tensor  # (1 or B, L or 1) keys that a query may read
        if key_padding_mask is None:
            count = (position + 1)[None] if self.causal else torch.full((1, 1), keys, device=q.device)
        elif self.causal and keys:
            count = key_padding_mask.cumsum(dim=1)[:, position.clamp(min=0)]
        else:
            count = key_padding_mask.sum(dim=1, keepdim=True)
        dtype = torch.float64 if q.dtype is torch.float64 else torch.float32
        factor = (count.clamp(min=1).to(dtype).log() / math.log(self.train_length)).sqrt()
        return (q * factor[:, None, :, None]).to(q.dtype)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, *, key_padding_mask: Tensor | None, aux: Any) -> Tensor:
        q = self.scaled(q, k, key_padding_mask)
        return softmax_attention(q, k, v, causal=self.causal, key_padding_mask=key_padding_mask, backend=self.backend)

    def attention_scores(self, q: Tensor, k: Tensor, *, key_padding_mask: Tensor | None) -> Tensor:
        return reference.scores(
            self.scaled(q, k, key_padding_mask),
            k,
            causal=self.causal,
            mask=None,
            bias=None,
            key_padding_mask=key_padding_mask,
            window=None,
            scale=self.head_dim**-0.5,
        )

    def attention_map(self, q: Tensor, k: Tensor, *, key_padding_mask: Tensor | None, aux: Any) -> Tensor:
        return reference.weights(self.attention_scores(q, k, key_padding_mask=key_padding_mask))

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, train_length={self.train_length}"
