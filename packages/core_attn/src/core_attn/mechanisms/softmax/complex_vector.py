"""Complex vector attention: pairs of channels as complex numbers, turned by head and position.

"ComplexFormer: Disruptively Advancing Transformer Inference Ability via Head-Specific Complex Vector Attention" (S45).

Shapes: B batch, L queries, M keys, C channels, H heads, D = C / H.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from core_attn.contract import Growth, Pattern
from core_attn.einsums import Cascade
from core_attn.mechanisms.softmax.cached import CachingMixer
from core_attn.ops.softmax import reference, softmax_attention
from core_attn.registry import register
from core_attn.state import FullCache

_EPSILON = 1e-9  # inside the square root of a magnitude, as in the official code


@register(
    name="complex_vector",
    title=(
        "ComplexFormer: Disruptively Advancing Transformer Inference Ability via Head-Specific Complex Vector Attention"
    ),
    source="S45",
    year=2025,
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
            "A[b,h,l,j] = delta[h,j] * argQ[b,h,l,j] + phase[h,j] + rate[j] * position[l]",
            "Z[b,h,m,j] = delta[h,j] * argK[b,h,m,j] + rate[j] * position[m]",
            "S[b,h,l,m] = absQ[b,h,l,j] * absK[b,h,m,j] * cos(A[b,h,l,j] - Z[b,h,m,j])",
            "top[b,h,l] = max[m] S[b,h,l,m]",
            "W[b,h,l,m] = exp(S[b,h,l,m] - top[b,h,l])",
            "sum[b,h,l] = W[b,h,l,m]",
            "Y[b,h,l,d] = W[b,h,l,m] * V[b,h,m,d]",
            "O[b,h,l,d] = Y[b,h,l,d] / sum[b,h,l]",
        ),
        passes=1,
        flops="4*B*(L + M)*C**2 + 4*B*H*P*D",
        bytes="E*(B*(2*L + X)*C + 4*C**2 + H*D)",
    ),
)
class ComplexVectorAttention(CachingMixer):
    """softmax of Σ_j |q_j| |k_j| cos(δ_j (arg q_j - arg k_j) + b_j + g_j (m - n)), times V.

    Channels j and j + D/2 of a head are the real and imaginary part of q_j and k_j, m and n the positions of query and
    key, g_j = base^(-2j/D); δ and b are learned for each head. Rotary attention is the case δ = 1, b = 0. As
    cos(A - Z) = cos A cos Z + sin A sin Z, the score is a product of one vector a query and one a key with D channels,
    so that it costs what softmax attention costs; the definition's L × M × D angles are never written down.

    Args:
        dim: channels C.
        heads: number of heads H; must divide dim, D = C / H even.
        causal: token i reads tokens <= i.
        bias: whether the four projections have a bias; not in the official code.
        base: the slowest pair turns with about this period / 2π.
        scale: factor of the scores; 1 as in the official code, which has no 1/√D.
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
        bias: bool = False,
        base: float = 10000.0,
        scale: float = 1.0,
        backend: str = "auto",
    ) -> None:
        super().__init__(dim, heads=heads, causal=causal, bias=bias)
        if self.head_dim % 2:
            raise ValueError(f"complex_vector needs an even number of channels a head, got {self.head_dim}")
        self.base = base
        self.scale = scale
        self.backend = backend
        pairs = self.head_dim // 2
        self.delta = nn.Parameter(torch.empty(heads, pairs))  # δ
        self.phase = nn.Parameter(torch.zeros(heads, pairs))  # b
        nn.init.normal_(self.delta, std=pairs**-0.5)

    def places(self, first: int, count: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        """The angles g_j · position of `count` positions from `first` on, (count, D/2)."""
        # In float64 as far as the device has it: far from the start float32 would lose the angle's last digits.
        wide = torch.float32 if device.type == "mps" else torch.float64
        rates = self.base ** (-torch.arange(0, self.head_dim, 2, dtype=wide, device=device) / self.head_dim)
        positions = torch.arange(first, first + count, dtype=wide, device=device)
        return (positions[:, None] * rates).remainder(2 * math.pi).to(dtype)

    def turned(self, x: Tensor, first: int, phase: Tensor | None = None) -> Tensor:
        """Queries (with `phase`) or keys from position `first` on -> |x| cos and |x| sin of their whole angle."""
        wide = x if x.dtype is torch.float64 else x.float()
        real, imaginary = wide.chunk(2, dim=-1)
        squared = real.square() + imaginary.square()
        # The angle of zero has no derivative; its magnitude makes it matter little.
        zero = squared < torch.finfo(wide.dtype).tiny
        angle = torch.atan2(imaginary.masked_fill(zero, 0.0), real.masked_fill(zero, 1.0))
        angle = angle * self.delta.to(wide.dtype)[:, None] + self.places(first, x.shape[2], wide.dtype, x.device)
        if phase is not None:
            angle = angle + phase.to(wide.dtype)[:, None]
        magnitude = (squared + _EPSILON).sqrt()
        return torch.cat([magnitude * angle.cos(), magnitude * angle.sin()], dim=-1).to(x.dtype)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, *, key_padding_mask: Tensor | None, aux: Any) -> Tensor:
        return self.read(self.turned(q, k.shape[2] - q.shape[2], self.phase), self.turned(k, 0), v, key_padding_mask)

    def read(self, q: Tensor, k: Tensor, v: Tensor, key_padding_mask: Tensor | None) -> Tensor:
        """Softmax attention of queries and keys that are turned already."""
        return softmax_attention(
            q,
            k,
            v,
            causal=self.causal,
            key_padding_mask=key_padding_mask,
            scale=self.scale,
            backend=self.backend,
        )

    def attention_scores(self, q: Tensor, k: Tensor, *, key_padding_mask: Tensor | None) -> Tensor:
        return reference.scores(
            self.turned(q, k.shape[2] - q.shape[2], self.phase),
            self.turned(k, 0),
            causal=self.causal,
            mask=None,
            bias=None,
            key_padding_mask=key_padding_mask,
            window=None,
            scale=self.scale,
        )

    def attention_map(self, q: Tensor, k: Tensor, *, key_padding_mask: Tensor | None, aux: Any) -> Tensor:
        return reference.weights(self.attention_scores(q, k, key_padding_mask=key_padding_mask))

    def step(self, x: Tensor, state: FullCache) -> tuple[Tensor, FullCache]:
        """The next T tokens (B, T, C) -> their outputs (B, T, C); the cache holds keys that are turned already."""
        self.check_inputs(x)
        first = state.seen
        q = self.turned(self.split_heads(self.q_proj(x)), first, self.phase)
        k, v = state.append(self.turned(self.split_heads(self.k_proj(x)), first), self.split_heads(self.v_proj(x)))
        return self.out_proj(self.merge_heads(self.read(q, k, v, None))), state
