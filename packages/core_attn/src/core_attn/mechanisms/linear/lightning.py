"""Lightning Attention-2, "Lightning Attention-2: A Free Lunch for Handling Unlimited Sequence Lengths in Large Language
Models" (S215), in the module that its authors give with it."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from core_attn.contract import Growth, Pattern
from core_attn.einsums import Cascade
from core_attn.mechanisms.linear.decayed import SYMBOLS, DecayedMixer, alibi_slopes, layer_factor
from core_attn.registry import register


@register(
    name="lightning",
    title="Lightning Attention-2: A Free Lunch for Handling Unlimited Sequence Lengths in Large Language Models",
    source="S215",
    year=2024,
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
            "S[b,h,l,k,e] = decay[h] * S[b,h,l-1,k,e] + swish(K[b,h,l,k]) * swish(V[b,h,l,e])",
            "Y[b,h,l,e] = swish(Q[b,h,l,k]) * S[b,h,l,k,e]",
            "G[b,l,c] = sigmoid(W2[c,r] * W1[r,d] * X[b,l,d])",
            "O[b,l,c] = (Y[b,l,c] - mean[b,l]) / deviation[b,l] * G[b,l,c]",
        ),
        passes=1,
        flops="2*B*L*(4*C**2 + 2*C*D) + W*B*H*(4*L*K*V + 2*T*(K + V))",
        bytes="E*(2*B*L*C + 4*C**2 + 2*C*D)",
        symbols=SYMBOLS,
    ),
)
class LightningAttention(DecayedMixer):
    """Linear attention with swish features, one decay a head, a norm in place of the denominator, and a gate.

    o_i = Σ_(j<=i) λ^(i-j) (q_i · k_j) v_j with swish on q, k and v; LayerNorm over all heads, times
    sigmoid(x W₁ W₂), and an output projection. λ = exp(-s_h · (1 - l / (N - 1) + 1e-5)) in layer l of N, with the
    slopes s_h of ALiBi. Noncausal, λ^|i-j| over all tokens.

    Args:
        dim, causal: see `TokenMixer`.
        heads: number of heads H; must divide dim.
        bias: whether the projections have a bias.
        layer, layers: which layer of how many this is: later ones forget less.
        backend: see `core_attn.ops.scalar_decay_attention`.

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
        layer: int = 0,
        layers: int = 12,
        backend: str = "auto",
    ) -> None:
        factor = layer_factor(layer, layers) + 1e-5
        decays = [-slope * factor for slope in alibi_slopes(max(1, heads))]
        super().__init__(dim, heads=heads, causal=causal, log_decays=decays, scale=1.0, backend=backend)
        self.q_proj = nn.Linear(dim, dim, bias=bias)
        self.k_proj = nn.Linear(dim, dim, bias=bias)
        self.v_proj = nn.Linear(dim, dim, bias=bias)
        self.gate_proj = nn.Sequential(
            nn.Linear(dim, self.head_dim, bias=bias), nn.Linear(self.head_dim, dim, bias=bias)
        )
        self.norm = nn.LayerNorm(dim)
        self.out_proj = nn.Linear(dim, dim, bias=bias)

    def heads_of(self, x: Tensor, positions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = (self.split_heads(F.silu(project(x))) for project in (self.q_proj, self.k_proj, self.v_proj))
        return q, k, v

    def finish(self, out: Tensor, x: Tensor) -> Tensor:
        gate = self.gate_proj(x).sigmoid()
        return self.out_proj(self.norm(out.transpose(1, 2).flatten(-2)) * gate)
