"""Multi-scale retention, "Retentive Network: A Successor to Transformer for Large Language Models" (Sun et al., 2023),
section 2.

Shapes: B batch, H heads, L tokens, K and V channels of a key and a value.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from core_attn.contract import Growth, Pattern
from core_attn.einsums import Cascade
from core_attn.mechanisms.linear.decayed import SYMBOLS, DecayedMixer
from core_attn.naming import unknown
from core_attn.registry import register

NORMS = ("layer", "rms")


@register(
    name="retention",
    title="Retentive Network: A Successor to Transformer for Large Language Models",
    source="",
    year=2023,
    patterns=frozenset({Pattern.CAUSAL_SELF}),
    time=Growth.LINEAR,
    memory=Growth.LINEAR,
    decodes=True,
    constant_state=True,
    padding=True,
    double_backward=False,
    operator="scalar_decay_attention",
    cascade=Cascade(
        einsums=(
            "Q2[b,h,l,k] = Q[b,h,l,k] turned by l theta[k]",
            "K2[b,h,l,k] = K[b,h,l,k] turned by l theta[k]",
            "S[b,h,l,k,e] = decay[h] * S[b,h,l-1,k,e] + K2[b,h,l,k] * V[b,h,l,e]",
            "Y[b,h,l,e] = Q2[b,h,l,k] * S[b,h,l,k,e]",
            "N[b,h,l,e] = (Y[b,h,l,e] - mean[b,h,l]) / deviation[b,h,l]",
            "O[b,l,c] = N[b,l,c] * swish(G[b,l,c])",
        ),
        passes=1,
        flops="2*B*L*(2*C**2 + 3*C*H*V) + W*B*H*(4*L*K*V + 2*T*(K + V))",
        bytes="E*(2*B*L*C + 2*C**2 + 3*C*H*V)",
        symbols=SYMBOLS,
    ),
)
class Retention(DecayedMixer):
    """Linear attention with rotary queries and keys, one decay a head, a norm a head and a swish gate.

    (swish(X W_G) ⊙ GroupNorm(heads)) W_O with head_h = Σ_(j<=i) γ_h^(i-j) (q_i · k_j) v_j / √K, γ_h = 1 - 2^(-5-h),
    and q and k turned by their positions (eq. 3 to 8). The norm of each head makes the scale of its scores of no
    account, so the paper's three normalisations of scores change nothing and are left out.

    Args:
        dim, causal: see `TokenMixer`; causal must be True.
        heads: number of heads H; must divide dim.
        expand_v: channels of a value in units of those of a key, a positive integer; 2 in the paper's models.
        norm: "layer", the group norm of the paper, or "rms", as in the official code today; without weights.
        eps: of the norm.
        backend: see `core_attn.ops.scalar_decay_attention`.

    Raises:
        ValueError: an option out of its range.
        UnknownNameError: no such norm.
    """

    def __init__(
        self,
        dim: int,
        *,
        heads: int = 8,
        causal: bool = True,
        expand_v: int = 2,
        norm: str = "layer",
        eps: float = 1e-6,
        backend: str = "auto",
    ) -> None:
        decays = [math.log1p(-(2.0 ** (-5 - h))) for h in range(max(1, heads))]
        scale = (dim // heads) ** -0.5 if 0 < heads <= dim else 1.0
        super().__init__(dim, heads=heads, causal=causal, log_decays=decays, scale=scale, backend=backend)
        if expand_v < 1:
            raise ValueError(f"expand_v must be a positive integer, got {expand_v}")
        if norm not in NORMS:
            raise unknown("norm", norm, NORMS)
        self.norm = norm
        self.eps = eps
        self.value_dim = self.head_dim * expand_v
        wide = heads * self.value_dim
        self.q_proj = nn.Linear(dim, dim, bias=False)
        self.k_proj = nn.Linear(dim, dim, bias=False)
        self.v_proj = nn.Linear(dim, wide, bias=False)
        self.gate_proj = nn.Linear(dim, wide, bias=False)
        self.out_proj = nn.Linear(wide, dim, bias=False)
        for project in (self.q_proj, self.k_proj, self.v_proj, self.gate_proj):
            nn.init.xavier_uniform_(project.weight, gain=2**-2.5)
        nn.init.xavier_uniform_(self.out_proj.weight, gain=2**-1)

    def heads_of(self, x: Tensor, positions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k = (_turned(self.split_heads(project(x)), positions) for project in (self.q_proj, self.k_proj))
        return q, k, self.split_heads(self.v_proj(x))

    def finish(self, out: Tensor, x: Tensor) -> Tensor:
        norm = F.layer_norm if self.norm == "layer" else F.rms_norm
        normed = norm(out.transpose(1, 2), (self.value_dim,), eps=self.eps).flatten(-2)
        return self.out_proj(F.silu(self.gate_proj(x)) * normed)


def _turned(x: Tensor, positions: Tensor) -> Tensor:
    """Pairs (2i, 2i + 1) of channels, turned by position · 10000^(-i / (pairs - 1)) as in the official code."""
    pairs = x.shape[-1] // 2
    dtype = torch.promote_types(x.dtype, torch.float32)
    rates = 10000.0 ** -torch.linspace(0, 1, pairs, dtype=dtype, device=x.device)
    angles = (positions.to(dtype).unsqueeze(-1) * rates).unsqueeze(-3)
    cos, sin = angles.cos(), angles.sin()
    a, b = x[..., 0 : 2 * pairs : 2].to(dtype), x[..., 1 : 2 * pairs : 2].to(dtype)
    turned = torch.stack([a * cos - b * sin, a * sin + b * cos], dim=-1).flatten(-2).to(x.dtype)
    return torch.cat([turned, x[..., 2 * pairs :]], dim=-1)
