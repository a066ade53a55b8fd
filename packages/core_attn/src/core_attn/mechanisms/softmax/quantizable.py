"""Heads that can do nothing, so that activations stay small enough to quantise: clipped softmax and gated attention.

"Quantizable Transformers: Removing Outliers by Helping Attention Heads Do Nothing" (S222), section 4.

Shapes: B batch, L queries, M keys, C channels, H heads, D = C / H.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from core_attn.contract import Growth, Pattern
from core_attn.einsums import Cascade
from core_attn.mechanisms.softmax.cached import CachingMixer
from core_attn.ops.clipped import check_stretch, clipped_softmax_attention, reference
from core_attn.ops.softmax import reference as softmax
from core_attn.ops.softmax import softmax_attention
from core_attn.registry import register

_TITLE = "Quantizable Transformers: Removing Outliers by Helping Attention Heads Do Nothing"


@register(
    name="clipped_softmax",
    title=_TITLE,
    source="S222",
    year=2023,
    patterns=frozenset(Pattern),
    time=Growth.QUADRATIC,
    memory=Growth.LINEAR,
    decodes=True,
    padding=True,
    maps=True,
    double_backward=False,
    operator="clipped_softmax_attention",
    cascade=Cascade(
        einsums=(
            "S[b,h,l,m] = scale * Q[b,h,l,d] * K[b,h,m,d]",
            "top[b,h,l] = max[m] S[b,h,l,m]",
            "sum[b,h,l] = exp(S[b,h,l,m] - top[b,h,l])",
            "P[b,h,l,m] = exp(S[b,h,l,m] - top[b,h,l]) / sum[b,h,l]",
            "W[b,h,l,m] = clip((zeta - gamma) * P[b,h,l,m] + gamma, 0, 1)",
            "O[b,h,l,d] = W[b,h,l,m] * V[b,h,m,d]",
        ),
        passes=2,
        flops="4*B*(L + M)*C**2 + 4*B*H*P*D",
        bytes="E*(B*(2*L + X)*C + 4*C**2)",
    ),
)
class ClippedSoftmaxAttention(CachingMixer):
    """clip((ζ - γ) softmax(Q Kᵀ / √D) + γ, 0, 1) V: weights may be exactly 0 or 1 at finite scores (eq. 4).

    The rows are not normalised again; a head may give a token exactly nothing, with no gradient that would push its
    scores further apart.

    Args:
        dim: channels C.
        heads: number of heads H; must divide dim.
        causal: token i reads tokens <= i.
        bias: whether the four projections have a bias.
        gamma: γ <= 0. Weights up to -γ / (ζ - γ) become 0, so a head that spreads over more than (ζ - γ) / -γ tokens
            gives nothing, and learns nothing. The paper takes -α / T for T tokens in training with α about 2 to 4
            (-0.025 for its BERT at 128); the default lets even weights pass up to 334 tokens.
        zeta: ζ >= 1; weights near 1 become 1. The paper finds that 1 is enough.
        backend: see `core_attn.ops.clipped_softmax_attention`. Gradients of gradients need "reference".

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
        gamma: float = -0.003,
        zeta: float = 1.0,
        backend: str = "auto",
    ) -> None:
        super().__init__(dim, heads=heads, causal=causal, bias=bias)
        check_stretch(gamma, zeta)
        self.gamma, self.zeta = gamma, zeta
        self.backend = backend

    def attend(self, q: Tensor, k: Tensor, v: Tensor, *, key_padding_mask: Tensor | None, aux: Any) -> Tensor:
        return clipped_softmax_attention(
            q,
            k,
            v,
            gamma=self.gamma,
            zeta=self.zeta,
            causal=self.causal,
            key_padding_mask=key_padding_mask,
            backend=self.backend,
        )

    def attention_map(self, q: Tensor, k: Tensor, *, key_padding_mask: Tensor | None, aux: Any) -> Tensor:
        return reference.weights(
            q,
            k,
            gamma=self.gamma,
            zeta=self.zeta,
            causal=self.causal,
            key_padding_mask=key_padding_mask,
            scale=self.head_dim**-0.5,
        )

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, gamma={self.gamma}, zeta={self.zeta}"


class HeadLinear(nn.Module):
    """A linear layer of its own for each head: (B, H, L, I) -> (B, H, L, O)."""

    def __init__(self, heads: int, inputs: int, outputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(heads, outputs, inputs))
        self.bias = nn.Parameter(torch.empty(heads, outputs))
        bound = inputs**-0.5  # as torch.nn.Linear
        nn.init.uniform_(self.weight, -bound, bound)
        nn.init.uniform_(self.bias, -bound, bound)

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight.mT + self.bias.unsqueeze(-2)


@register(
    name="gated",
    title=_TITLE,
    source="S222",
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
            "S[b,h,l,m] = scale * Q[b,h,l,d] * K[b,h,m,d]",
            "top[b,h,l] = max[m] S[b,h,l,m]",
            "W[b,h,l,m] = exp(S[b,h,l,m] - top[b,h,l])",
            "sum[b,h,l] = W[b,h,l,m]",
            "Y[b,h,l,d] = W[b,h,l,m] * V[b,h,m,d]",
            "gate[b,h,l] = sigmoid(U[h,d] * X[b,h,l,d] + u[h])",
            "O[b,h,l,d] = gate[b,h,l] * Y[b,h,l,d] / sum[b,h,l]",
        ),
        passes=1,
        flops="4*B*(L + M)*C**2 + 4*B*H*P*D + 2*B*L*N",
        bytes="E*(B*(2*L + X)*C + 4*C**2 + N)",
        symbols={"N": "weights of the gates"},
    ),
)
class GatedAttention(CachingMixer):
    """sigmoid(G(x)) ⊙ softmax(Q Kᵀ / √D) V: every head decides for every token how much it writes (eq. 5).

    G sees the module's input, not the projections, and gives one number a head and token (section 4.2).

    Args:
        dim: channels C.
        heads: number of heads H; must divide dim.
        causal: token i reads tokens <= i.
        bias: whether the four projections have a bias.
        gate: what G is: "linear", for each head a linear layer of its D channels of x; "mlp", for each head two layers
            with a ReLU between them; "all_heads", one linear layer from all C channels to H gates.
        hidden: channels between the two layers of "mlp"; D / 4 by default, at least 1.
        gate_init: what the gates' last bias alone would open them to, in (0, 1); None leaves it random, near 0.5.
        backend: see `core_attn.ops.softmax_attention`. Gradients of gradients need "reference".

    Raises:
        ValueError: an option out of its range.
    """

    # A softmax of the scores is not the map here: the gate comes after it.
    attention_scores = CachingMixer.attention_scores

    def __init__(
        self,
        dim: int,
        *,
        heads: int = 8,
        causal: bool = False,
        bias: bool = True,
        gate: str = "linear",
        hidden: int | None = None,
        gate_init: float | None = 0.25,
        backend: str = "auto",
    ) -> None:
        super().__init__(dim, heads=heads, causal=causal, bias=bias)
        if gate not in ("linear", "mlp", "all_heads"):
            raise ValueError(f"gate is 'linear', 'mlp' or 'all_heads', got {gate!r}")
        if hidden is not None and (gate != "mlp" or hidden < 1):
            raise ValueError(f"hidden is a positive number of channels for gate='mlp' only, got {hidden} with {gate!r}")
        if gate_init is not None and not 0.0 < gate_init < 1.0:
            raise ValueError(f"gate_init must lie between 0 and 1, got {gate_init}")
        self.kind = gate
        self.backend = backend
        last: HeadLinear | nn.Linear
        if gate == "mlp":
            width = hidden or max(1, self.head_dim // 4)
            last = HeadLinear(heads, width, 1)
            self.gate: nn.Module = nn.Sequential(HeadLinear(heads, self.head_dim, width), nn.ReLU(), last)
        else:
            last = HeadLinear(heads, self.head_dim, 1) if gate == "linear" else nn.Linear(dim, heads)
            self.gate = last
        if gate_init is not None:
            nn.init.constant_(last.bias, math.log(gate_init / (1.0 - gate_init)))

    def side_input(
        self,
        q: Tensor,
        k: Tensor,
        *,
        x: Tensor,
        query_padding_mask: Tensor | None,
        grid: tuple[int, ...] | None,
        generator: torch.Generator | None,
    ) -> Tensor:
        """The gates, (B, H, L, 1), each in (0, 1)."""
        if self.kind == "all_heads":
            return F.sigmoid(self.gate(x)).transpose(1, 2).unsqueeze(-1)
        return F.sigmoid(self.gate(self.split_heads(x)))

    def attend(self, q: Tensor, k: Tensor, v: Tensor, *, key_padding_mask: Tensor | None, aux: Any) -> Tensor:
        out = softmax_attention(q, k, v, causal=self.causal, key_padding_mask=key_padding_mask, backend=self.backend)
        return out * aux

    def attention_map(self, q: Tensor, k: Tensor, *, key_padding_mask: Tensor | None, aux: Any) -> Tensor:
        scores = softmax.scores(
            q,
            k,
            causal=self.causal,
            mask=None,
            bias=None,
            key_padding_mask=key_padding_mask,
            window=None,
            scale=self.head_dim**-0.5,
        )
        return softmax.weights(scores) * aux

    def sizes(
        self, *, batch: int, length: int, context: int | None = None, grid: tuple[int, ...] | None = None
    ) -> dict[str, float]:
        sizes = super().sizes(batch=batch, length=length, context=context, grid=grid)
        return sizes | {"N": sum(p.numel() for n, p in self.gate.named_parameters() if n.endswith("weight"))}

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, gate={self.kind}"
