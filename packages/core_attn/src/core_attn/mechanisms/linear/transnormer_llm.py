"""TransNormerLLM, "TransNormerLLM: A Faster and Better Large Language Model with Improved TransNormer" (S197),
section 3.

Shapes: B batch, H heads, L tokens, D channels of a head.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from core_attn.contract import Growth, Pattern
from core_attn.einsums import Cascade
from core_attn.mechanisms.linear.decayed import SYMBOLS, DecayedMixer, alibi_slopes, layer_factor
from core_attn.naming import unknown
from core_attn.registry import register

DECAYS = ("paper", "alibi")


@register(
    name="transnormer_llm",
    title="TransNormerLLM: A Faster and Better Large Language Model with Improved TransNormer",
    source="S197",
    year=2023,
    patterns=frozenset({Pattern.CAUSAL_SELF, Pattern.NONCAUSAL_SELF}),
    time=Growth.LINEAR,
    memory=Growth.LINEAR,
    decodes=True,
    constant_state=True,
    padding=True,
    double_backward=False,
    operator="scalar_decay_attention",
    cascade=Cascade(
        einsums=(
            "Q2[b,h,l,k] = swish(Q[b,h,l,k]) turned by l theta[h,k]",
            "K2[b,h,l,k] = swish(K[b,h,l,k]) turned by l theta[h,k]",
            "S[b,h,l,k,e] = decay[h] * S[b,h,l-1,k,e] + K2[b,h,l,k] * V[b,h,l,e]",
            "Y[b,h,l,e] = Q2[b,h,l,k] * S[b,h,l,k,e]",
            "N[b,l,c] = Y[b,l,c] / sqrt(mean[c] Y[b,l,c]**2)",
            "O[b,l,c] = N[b,l,c] * U[b,l,c]",
        ),
        passes=1,
        flops="10*B*L*C**2 + W*B*H*(4*L*K*V + 2*T*(K + V))",
        bytes="E*(2*B*L*C + 5*C**2)",
        symbols=SYMBOLS,
    ),
)
class TransNormerLLM(DecayedMixer):
    """Gated linear attention with one decay a head and layer, SRMSNorm in place of the denominator, and a gate u.

    O = SRMSNorm(Q (Kᵀ V)) ⊙ U with swish on Q and K. The weight of token j for token i is
    q_i · k_j λ^(i-j) e^(iθ(i-j)), its real part, with θ learned (LRPE) in the first layer and 0 in all others (section
    3.1); λ = exp(-8h / H · (1 - l / N)), h = 1 … H. The factor of the layer goes from 1 in the first to 0 in the last.
    Noncausal, λ^|i-j| over all tokens.

    Args:
        dim, causal: see `TokenMixer`.
        heads: number of heads H; must divide dim.
        layer, layers: which layer of how many this is: later ones forget less, the first has LRPE.
        lrpe: whether queries and keys are turned by position; None for the first layer only.
        decay: "paper", or "alibi": exp(-2^(-8h / H) · (1 - l / N + 1e-5)), as in the published models.
        eps: added to the mean square in the norm.
        backend: see `core_attn.ops.scalar_decay_attention`.

    Raises:
        ValueError: an option out of its range.
        UnknownNameError: no such decay.
    """

    def __init__(
        self,
        dim: int,
        *,
        heads: int = 8,
        causal: bool = False,
        layer: int = 0,
        layers: int = 12,
        lrpe: bool | None = None,
        decay: str = "paper",
        eps: float = 1e-6,
        backend: str = "auto",
    ) -> None:
        if decay not in DECAYS:
            raise unknown("decay", decay, DECAYS)
        count = max(1, heads)
        slopes, factor = [8 * (h + 1) / count for h in range(count)], layer_factor(layer, layers)
        if decay == "alibi":
            slopes, factor = alibi_slopes(count), factor + 1e-5
        super().__init__(
            dim, heads=heads, causal=causal, log_decays=[-s * factor for s in slopes], scale=1.0, backend=backend
        )
        self.eps = eps
        self.q_proj = nn.Linear(dim, dim, bias=False)
        self.k_proj = nn.Linear(dim, dim, bias=False)
        self.v_proj = nn.Linear(dim, dim, bias=False)
        self.u_proj = nn.Linear(dim, dim, bias=False)
        self.out_proj = nn.Linear(dim, dim, bias=False)
        self.theta: nn.Parameter | None = None
        if layer == 0 if lrpe is None else lrpe:
            # From 1 down to 10000^-2 over the channels of all heads together.
            self.theta = nn.Parameter((10000 ** (-2 / dim * torch.arange(dim))).view(heads, self.head_dim))
            # cos and sin of every channel stand beside each other.
            self.key_dim = 2 * self.head_dim

    def heads_of(self, x: Tensor, positions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k = (self.split_heads(F.silu(project(x))) for project in (self.q_proj, self.k_proj))
        if self.theta is not None:
            dtype = torch.promote_types(x.dtype, torch.float32)
            places = positions.to(dtype)[..., None, :, None]
            angles = places * self.theta.to(dtype)[:, None]
            turn = torch.cat([angles.cos(), angles.sin()], dim=-1)
            q, k = ((torch.cat([z, z], dim=-1) * turn).to(x.dtype) for z in (q, k))
        return q, k, self.split_heads(self.v_proj(x))

    def finish(self, out: Tensor, x: Tensor) -> Tensor:
        merged = out.transpose(1, 2).flatten(-2)
        wide = merged.to(torch.promote_types(x.dtype, torch.float32))
        normed = (wide * (wide.square().mean(-1, keepdim=True) + self.eps).rsqrt()).to(x.dtype)
        return self.out_proj(normed * self.u_proj(x))
