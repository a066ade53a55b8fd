"""Bidirectional gated linear attention for images, "ViG: Linear-complexity Visual Sequence Learning with Gated Linear
Attention" (S220), section 3.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from core_attn.contract import Growth, Pattern, TokenMixer
from core_attn.einsums import Cascade
from core_attn.mechanisms.linear.gla import initialize
from core_attn.ops.gated_linear import gated_linear_attention, pairs_in_chunks
from core_attn.registry import register


@register(
    name="vig",
    title="ViG: Linear-complexity Visual Sequence Learning with Gated Linear Attention",
    source="S220",
    year=2024,
    patterns=frozenset({Pattern.NONCAUSAL_SELF}),
    grid_ranks=frozenset({2}),
    time=Growth.LINEAR,
    memory=Growth.LINEAR,
    padding=True,
    double_backward=False,
    operator="gated_linear_attention",
    cascade=Cascade(
        einsums=(
            "Z[b,l,c] = conv3x3 X[b,l,c]",
            "a[s,b,h,l,k] = sigmoid(W2[s,h,k,r] * W1[r,c] * Z[b,l,c] + bias[s,h,k])**(1/16)",
            "S[s,b,h,l,k,e] = a[s,b,h,l,k] * S[s,b,h,l-s,k,e] + K[b,h,l,k] * V[b,h,l,e]",
            "Y[b,h,l,e] = Q[b,h,l,k] * S[s,b,h,l,k,e] / 2",
            "G[b,h,l,e] = sigmoid(Wg[h,e,c] * Z[b,l,c])",
            "O[b,h,l,e] = G[b,h,l,e] * rms(Y[b,h,l,e]) + (1 - G[b,h,l,e]) * rms(Z[b,h,l,e])",
        ),
        passes=1,
        flops="2*B*L*(2*C*K + 3*C**2 + W*(C + 2*K) + 9*C) + 8*B*L*K*D + 4*B*T*(2*K + C)",
        bytes="E*(2*B*L*C + 2*C*K + 3*C**2 + W*(C + 2*K))",
        symbols={
            "K": "channels of the keys of all heads",
            "W": "rank of the gates' projection",
            "T": "pairs of tokens of one chunk, of all chunks of a sequence",
        },
    ),
)
class ViGAttention(TokenMixer):
    """Gated linear attention over the tokens forth and back, each way with gates of its own, and a local way.

    Queries, keys and values serve both directions; their mean is the output of attention (section 3.2). Before all
    stands a 3 × 3 depthwise convolution, and a learned gate chooses, channel by channel, between what attention gives
    and what the convolution gives, both normalised in each head (section 3.3). A plain sequence is an image of one row.

    Args:
        dim: channels C, of the values of all heads together too.
        heads: number of heads H; must divide dim.
        causal: must be False.
        expand_k: channels of all keys together, in units of C; every head has at least one.
        gate_rank: width of the gates' projection in its middle.
        gate_normalizer: the root taken of the gates, which keeps them near 1.
        eps: of the norms.
        backend: see `core_attn.ops.gated_linear_attention`.

    Raises:
        ValueError: an option out of its range.
    """

    def __init__(
        self,
        dim: int,
        *,
        heads: int = 4,
        causal: bool = False,
        expand_k: float = 0.5,
        gate_rank: int = 16,
        gate_normalizer: float = 16.0,
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
        self.heads = heads
        self.head_dim = dim // heads
        self.key_dim = heads * max(1, int(dim * expand_k) // heads)
        self.gate_rank = gate_rank
        self.gate_normalizer = gate_normalizer
        self.backend = backend
        self.conv = nn.Conv2d(dim, dim, 3, padding=1, groups=dim, bias=False)
        self.qkv_proj = nn.Linear(dim, 2 * self.key_dim + dim, bias=False)
        self.gate_proj = nn.Sequential(nn.Linear(dim, gate_rank, bias=False), nn.Linear(gate_rank, 2 * self.key_dim))
        self.choice_proj = nn.Linear(dim, dim)
        self.global_norm = nn.RMSNorm(self.head_dim, eps=eps)
        self.local_norm = nn.RMSNorm(self.head_dim, eps=eps)
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
        padding = None if key_padding_mask is None else ~key_padding_mask.unsqueeze(-1)
        if padding is not None:
            x = x.masked_fill(padding, 0.0)
        local = self.conv(x.mT.unflatten(-1, grid or (1, x.shape[1]))).flatten(2).mT
        if padding is not None:  # the convolution reaches into it
            local = local.masked_fill(padding, 0.0)
        q, k, v = (
            part.unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for part in self.qkv_proj(local).split([self.key_dim, self.key_dim, self.dim], dim=-1)
        )
        gates = F.logsigmoid(self.gate_proj(local)) / self.gate_normalizer
        if padding is not None:
            gates = gates.masked_fill(padding, 0.0)
        forth, back = gates.unflatten(-1, (2, self.heads, -1)).permute(2, 0, 3, 1, 4)
        # Both directions are one batch, the second reversed.
        found = gated_linear_attention(
            *(torch.cat([part, part.flip(2)]) for part in (q, k, v)),
            log_gate=torch.cat([forth, back.flip(2)]),
            backend=self.backend,
        )
        assert isinstance(found, Tensor)
        one, other = found.chunk(2)
        wide = self.global_norm((one + other.flip(2)).transpose(1, 2) / 2)
        near = self.local_norm(local.unflatten(-1, (self.heads, -1)))
        choice = torch.sigmoid(self.choice_proj(local)).unflatten(-1, (self.heads, -1))
        return self.out_proj((choice * wide + (1 - choice) * near).flatten(-2))

    def sizes(
        self, *, batch: int, length: int, context: int | None = None, grid: tuple[int, ...] | None = None
    ) -> dict[str, float]:
        sizes = super().sizes(batch=batch, length=length, context=context, grid=grid)
        return {**sizes, "K": self.key_dim, "W": self.gate_rank, "T": pairs_in_chunks(length)}
