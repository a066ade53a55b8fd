"""Hedgehog: linear attention whose feature maps learn to mimic softmax attention.

"The Hedgehog & the Porcupine: Expressive Linear Attentions with Softmax Mimicry" (S193), section 4. How a trained
softmax layer becomes one is in `core_attn.distillation`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from core_attn import ops
from core_attn.contract import Growth, Pattern
from core_attn.einsums import Cascade
from core_attn.mechanisms.heads import MultiHeadMixer
from core_attn.naming import unknown
from core_attn.ops.kernel import chunk_length, kernel_map
from core_attn.registry import register

ACTIVATIONS = ("softmax", "exp", "exp_max")
# Least value of a feature, as in the official code: a query then reads something whatever the map has learned.
LEAST = 1e-12
# e^60 is so far from the largest float32 that sums over a million tokens of features times values stay finite.
_LARGEST = 60.0


@register(
    name="hedgehog",
    title="The Hedgehog & the Porcupine: Expressive Linear Attentions with Softmax Mimicry",
    source="S193",
    year=2024,
    patterns=frozenset(Pattern),
    time=Growth.LINEAR,
    memory=Growth.LINEAR,
    decodes=True,
    constant_state=True,
    padding=True,
    maps=True,
    double_backward=False,
    operator="kernel_attention",
    cascade=Cascade(
        einsums=(
            "A[b,h,l,f] = WQ[h,d,f] * Q[b,h,l,d]",
            "P[b,h,l,f] = concat(softmax[f] A[b,h,l,f], softmax[f] -A[b,h,l,f])",
            "E[b,h,m,f] = WK[h,d,f] * K[b,h,m,d]",
            "R[b,h,m,f] = concat(softmax[f] E[b,h,m,f], softmax[f] -E[b,h,m,f])",
            "S[b,h,f,e] = R[b,h,m,f] * V[b,h,m,e]",
            "z[b,h,f] = R[b,h,m,f]",
            "Y[b,h,l,e] = P[b,h,l,f] * S[b,h,f,e]",
            "sum[b,h,l] = P[b,h,l,f] * z[b,h,f]",
            "O[b,h,l,e] = Y[b,h,l,e] / sum[b,h,l]",
        ),
        passes=1,
        flops="4*B*(L + M)*C**2 + 2*B*H*(L + M)*D**2 + 4*B*H*(L + M)*D*(D + 1) + 2*B*H*L*T*(3*D + 1)",
        bytes="E*(B*(2*L + X)*C + 4*C**2 + 2*H*D**2)",
        symbols={"T": "keys of its chunk that a query meets in the causal form, 0 in the noncausal"},
    ),
)
class HedgehogAttention(MultiHeadMixer):
    """Linear attention with the features [softmax(W x), softmax(-W x)], with W of queries and of keys in every head.

    W starts as the identity (section 4.1). Trained to give the weights of a softmax layer, the features keep what makes
    softmax attention work: spiky weights, and weights monotone in the product of query and key (section 3).

    Args:
        dim, heads, causal, bias: see `MultiHeadMixer`.
        activation: "softmax" over the features of a token, which is bounded; "exp", exponentials as they are, with
            exponents of keys above 60 cut; "exp_max", the official code's form of it, which divides the exponentials
            of every token by their largest. That cancels for queries taken as one half, but gives keys other weights.
        eps: added to the denominator.
        backend: see `core_attn.ops.kernel_attention`.

    Raises:
        UnknownNameError: no such activation.
        ValueError: heads do not divide dim.
    """

    def __init__(
        self,
        dim: int,
        *,
        heads: int = 8,
        causal: bool = False,
        bias: bool = True,
        activation: str = "softmax",
        eps: float = 1e-12,
        backend: str = "auto",
    ) -> None:
        super().__init__(dim, heads=heads, causal=causal, bias=bias)
        if activation not in ACTIVATIONS:
            raise unknown("activation", activation, ACTIVATIONS)
        self.activation = activation
        self.eps = eps
        self.backend = backend
        self.q_map = nn.Parameter(torch.eye(self.head_dim).repeat(heads, 1, 1))
        self.k_map = nn.Parameter(torch.eye(self.head_dim).repeat(heads, 1, 1))

    def features(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """(B, H, L, D), (B, H, M, D) -> their features (B, H, L, 2D), (B, H, M, 2D), in float32 at least."""
        q, k = q @ self.q_map.to(q.dtype), k @ self.k_map.to(k.dtype)
        precise = torch.promote_types(q.dtype, torch.float32)
        q, k = q.to(precise), k.to(precise)
        if self.activation == "exp":
            # One factor for all features of a query cancels in the division; for a key it would be another weight.
            top = q.abs().amax(-1, keepdim=True).detach()
            found = [
                torch.cat([(x - s).exp(), (-x - s).exp()], -1) for x, s in ((q, top), (k.clamp(-_LARGEST, _LARGEST), 0))
            ]
        elif self.activation == "exp_max":
            found = [torch.cat([_top_is_one(x), _top_is_one(-x)], -1) for x in (q, k)]
        else:
            found = [torch.cat([x.softmax(-1), (-x).softmax(-1)], -1) for x in (q, k)]
        return found[0].clamp(min=LEAST), found[1].clamp(min=LEAST)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, *, key_padding_mask: Tensor | None, aux: Any) -> Tensor:
        q_features, k_features = self.features(q, k)
        out = ops.kernel_attention(
            q_features,
            k_features,
            v.to(q_features.dtype),
            causal=self.causal,
            key_padding_mask=key_padding_mask,
            eps=self.eps,
            backend=self.backend,
        )
        return out.to(v.dtype)  # type: ignore[no-any-return, union-attr]

    def attention_map(self, q: Tensor, k: Tensor, *, key_padding_mask: Tensor | None, aux: Any) -> Tensor:
        q_features, k_features = self.features(q, k)
        return kernel_map(q_features, k_features, causal=self.causal, key_padding_mask=key_padding_mask, eps=self.eps)

    def sizes(
        self, *, batch: int, length: int, context: int | None = None, grid: tuple[int, ...] | None = None
    ) -> dict[str, float]:
        sizes = super().sizes(batch=batch, length=length, context=context, grid=grid)
        return sizes | {"T": chunk_length(length) if self.causal else 0}

    def init_state(self, batch: int, *, device: torch.device | None = None, dtype: torch.dtype | None = None) -> Tensor:
        """(B, H, 2D, D + 1) zeros: the sum of features times values, and in its last column that of the features.

        Raises:
            ValueError: this module is not causal.
        """
        if not self.causal:
            raise ValueError("hedgehog decodes token by token only when it is built with causal=True")
        dtype = torch.promote_types(dtype or self.q_map.dtype, torch.float32)
        shape = (batch, self.heads, 2 * self.head_dim, self.head_dim + 1)
        return torch.zeros(shape, device=device or self.q_map.device, dtype=dtype)

    def step(self, x: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        self.check_inputs(x)
        q, k, v = (self.split_heads(project(x)) for project in (self.q_proj, self.k_proj, self.v_proj))
        q_features, k_features = self.features(q, k)
        out, state = ops.kernel_step(
            q_features, k_features, v.to(q_features.dtype), state, eps=self.eps, backend=self.backend
        )
        return self.out_proj(self.merge_heads(out.to(x.dtype))), state

    def extra_repr(self) -> str:
        return f"heads={self.heads}, causal={self.causal}, activation={self.activation!r}"


def _top_is_one(x: Tensor) -> Tensor:
    return (x - x.amax(-1, keepdim=True)).exp()
