"""Gated linear attention.

"Gated Linear Attention Transformers with Hardware-Efficient Training" (S196), section 4.4.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from core_attn.contract import Growth, Pattern, TokenMixer
from core_attn.einsums import Cascade
from core_attn.naming import unknown
from core_attn.ops.gated_linear import gated_linear_attention, gated_linear_step, pairs_in_chunks
from core_attn.ops.gated_linear.reference import state_dtype
from core_attn.registry import register

NORMS = {"layer": nn.LayerNorm, "rms": nn.RMSNorm}


def initialize(module: nn.Module) -> None:
    """As the official code does, all projections and convolutions: Xavier's weights, much smaller, and no biases."""
    for part in module.modules():
        if isinstance(part, nn.Linear | nn.Conv2d):
            nn.init.xavier_uniform_(part.weight, gain=2**-2.5)
            if part.bias is not None:
                nn.init.zeros_(part.bias)


@register(
    name="gla",
    title="Gated Linear Attention Transformers with Hardware-Efficient Training",
    source="S196",
    year=2023,
    patterns=frozenset({Pattern.CAUSAL_SELF}),
    time=Growth.LINEAR,
    memory=Growth.LINEAR,
    decodes=True,
    constant_state=True,
    padding=True,
    double_backward=False,
    operator="gated_linear_attention",
    cascade=Cascade(
        einsums=(
            "a[b,h,l,k] = sigmoid(W2[h,k,r] * W1[r,c] * X[b,l,c] + bias[h,k])**(1/16)",
            "S[b,h,l,k,e] = a[b,h,l,k] * S[b,h,l-1,k,e] + K[b,h,l,k] * V[b,h,l,e]",
            "Y[b,h,l,e] = Q[b,h,l,k] * S[b,h,l,k,e]",
            "N[b,h,l,e] = (Y[b,h,l,e] - mean[b,h,l]) / deviation[b,h,l]",
            "O[b,l,e] = swish(R[b,h,l,e]) * N[b,h,l,e]",
        ),
        passes=1,
        flops="2*B*L*(2*C*K + 3*C**2 + W*(C + K)) + 4*B*L*K*D + 2*B*T*(2*K + C)",
        bytes="E*(2*B*L*C + 2*C*K + 3*C**2 + W*(C + K))",
        symbols={
            "K": "channels of the keys of all heads",
            "W": "rank of the gates' projection",
            "T": "pairs of tokens of one chunk, of all chunks of a sequence",
        },
    ),
)
class GatedLinearAttention(TokenMixer):
    """A state of keys times values whose key channels decay by gates that the token itself gives; no denominator.

    S_t = diag(α_t) S_{t-1} + k_t v_tᵀ and o_t = q_tᵀ S_t / √d_k in each head, α = sigmoid(x W₁ W₂ + b)^(1/16), and
    (swish(x W_r + b_r) · norm(o)) W_O, the norm in each head by itself. Keys have half as many channels as values.

    Args:
        dim: channels C, of the values of all heads together too.
        heads: number of heads H; must divide dim.
        causal: must be True.
        expand_k: channels of all keys together, in units of C; every head has at least one.
        gate_rank: width of the gates' projection in its middle.
        gate_normalizer: the root taken of the gates, which keeps them near 1.
        norm: "layer", as in the paper, or "rms", as in the official library.
        eps: of the norm.
        backend: see `core_attn.ops.gated_linear_attention`.

    Raises:
        ValueError: an option out of its range.
        UnknownNameError: no such norm.
    """

    def __init__(
        self,
        dim: int,
        *,
        heads: int = 4,
        causal: bool = True,
        expand_k: float = 0.5,
        gate_rank: int = 16,
        gate_normalizer: float = 16.0,
        norm: str = "layer",
        eps: float = 1e-5,
        backend: str = "auto",
    ) -> None:
        super().__init__(dim, causal=causal)
        if heads < 1 or dim % heads:
            raise ValueError(f"heads must divide dim, got dim={dim} and heads={heads}")
        if not (expand_k > 0 and gate_rank > 0 and gate_normalizer > 0):
            raise ValueError(
                f"expand_k, gate_rank and gate_normalizer must be positive, got {expand_k}, {gate_rank} and "
                f"{gate_normalizer}"
            )
        if norm not in NORMS:
            raise unknown("norm", norm, NORMS)
        self.heads = heads
        self.head_dim = dim // heads
        self.key_dim = heads * max(1, int(dim * expand_k) // heads)
        self.gate_rank = gate_rank
        self.gate_normalizer = gate_normalizer
        self.backend = backend
        self.q_proj = nn.Linear(dim, self.key_dim, bias=False)
        self.k_proj = nn.Linear(dim, self.key_dim, bias=False)
        self.v_proj = nn.Linear(dim, dim, bias=False)
        self.gate_proj = nn.Sequential(nn.Linear(dim, gate_rank, bias=False), nn.Linear(gate_rank, self.key_dim))
        self.r_proj = nn.Linear(dim, dim)
        self.norm = NORMS[norm](self.head_dim, eps=eps)
        self.out_proj = nn.Linear(dim, dim, bias=False)
        initialize(self)

    def forward(
        self,
        x: Tensor,
        *,
        context: Tensor | None = None,
        key_padding_mask: Tensor | None = None,
        grid: tuple[int, ...] | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        self.check_inputs(x, context=context, key_padding_mask=key_padding_mask, grid=grid, generator=generator)
        if key_padding_mask is not None:  # tokens of zeros have keys and values of zeros
            x = x.masked_fill(~key_padding_mask.unsqueeze(-1), 0.0)
        q, k, v, gate = self._heads(x)
        if key_padding_mask is not None:
            gate = gate.masked_fill(~key_padding_mask[:, None, :, None], 0.0)
        out = gated_linear_attention(q, k, v, log_gate=gate, backend=self.backend)
        assert isinstance(out, Tensor)
        return self._finish(out, x)

    def _heads(self, x: Tensor) -> list[Tensor]:
        """q, k, v and log-gates (B, H, L, ·)."""
        gate = F.logsigmoid(self.gate_proj(x)) / self.gate_normalizer
        parts = (self.q_proj(x), self.k_proj(x), self.v_proj(x), gate)
        return [part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in parts]

    def _finish(self, out: Tensor, x: Tensor) -> Tensor:
        normed = self.norm(out.transpose(1, 2)).flatten(-2)
        return self.out_proj(F.silu(self.r_proj(x)) * normed)

    def sizes(
        self, *, batch: int, length: int, context: int | None = None, grid: tuple[int, ...] | None = None
    ) -> dict[str, float]:
        sizes = super().sizes(batch=batch, length=length, context=context, grid=grid)
        return {**sizes, "K": self.key_dim, "W": self.gate_rank, "T": pairs_in_chunks(length)}

    def init_state(self, batch: int, *, device: torch.device | None = None, dtype: torch.dtype | None = None) -> Tensor:
        """(B, H, keys' channels, values' channels) zeros."""
        shape = (batch, self.heads, self.key_dim // self.heads, self.head_dim)
        return torch.zeros(shape, device=device, dtype=state_dtype(dtype))

    def step(self, x: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        self.check_inputs(x)
        q, k, v, gate = self._heads(x)
        out, state = gated_linear_step(q, k, v, log_gate=gate, state=state)
        return self._finish(out, x), state
