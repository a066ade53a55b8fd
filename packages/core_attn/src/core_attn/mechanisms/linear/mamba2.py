"""Mamba-2, "Transformers are SSMs: Generalized Models and Efficient Algorithms Through Structured State Space Duality"
(Dao and Gu, 2024), section 7.

Shapes: B batch, L tokens, H heads of P channels, G groups of N channels of the state.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from core_attn.contract import Growth, Pattern, TokenMixer
from core_attn.einsums import Cascade
from core_attn.ops.scalar_decay import pairs_in_chunks, scalar_decay_attention
from core_attn.registry import register


class Mamba2State(NamedTuple):
    """State of decoding: `conv` (B, channels, d_conv - 1) what the convolution still reads, `memory` (B, H, N, P)."""

    conv: Tensor
    memory: Tensor


@register(
    name="mamba2",
    title="Transformers are SSMs: Generalized Models and Efficient Algorithms Through Structured State Space Duality",
    source="",
    year=2024,
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
            "U[b,l,c] = swish(kernel[c,j] * Z[b,l-j,c] + bias[c])",
            "dt[b,l,h] = softplus(Y[b,l,h] + dt_bias[h])",
            "S[b,h,l,n,p] = exp(-A[h] * dt[b,l,h]) * S[b,h,l-1,n,p] + B[b,g,l,n] * dt[b,l,h] * X[b,h,l,p]",
            "R[b,h,l,p] = C[b,g,l,n] * S[b,h,l,n,p] + D[h] * X[b,h,l,p]",
            "O[b,l,c] = weight[c] * (R[b,l,c] * swish(Z[b,l,c])) / sqrt(mean[c] (R[b,l,c] * swish(Z[b,l,c]))**2)",
        ),
        passes=1,
        flops="2*B*L*(C*I + H*V*C + J*(H*V + 2*G*K)) + B*H*(4*L*K*V + 2*T*(K + V))",
        bytes="E*(2*B*L*C + C*I + H*V*C)",
        symbols={
            "I": "outputs of the input projection",
            "J": "taps of the convolution",
            "K": "channels of the state",
            "V": "channels of a head",
            "T": "pairs of tokens of one chunk, of all chunks of a sequence",
        },
    ),
)
class Mamba2(TokenMixer):
    """A selective state space layer whose states decay by one factor a head and token, of the token's own step dt.

    From one projection z, x, B, C and dt; a short causal convolution with swish over x, B and C; then
    S_t = e^(-A dt_t) S_{t-1} + B_t (dt_t x_t)ᵀ and y_t = C_tᵀ S_t + D x_t in each head, with dt = softplus(dt + bias);
    RMSNorm(y · swish(z)) and an output projection. B and C are shared by the heads of a group.

    Padded tokens have no step: they neither decay the state nor write to it, and the convolution does not see them.

    Args:
        dim: channels C.
        heads: number of heads H; must divide expand · dim.
        causal: must be True.
        expand: channels of all heads together, in units of C.
        d_state: channels N of the state.
        groups: number of groups G; must divide heads.
        d_conv: taps of the convolution.
        bias: whether the two projections have a bias.
        conv_bias: whether the convolution has a bias.
        a_range: A is drawn uniformly between these, positive.
        dt_min, dt_max, dt_floor: dt is drawn log-uniformly between the first two, at least the third.
        eps: of the norm.
        backend: see `core_attn.ops.scalar_decay_attention`.

    Raises:
        ValueError: an option out of its range.
    """

    def __init__(
        self,
        dim: int,
        *,
        heads: int = 8,
        causal: bool = True,
        expand: int = 2,
        d_state: int = 64,
        groups: int = 1,
        d_conv: int = 4,
        bias: bool = False,
        conv_bias: bool = True,
        a_range: tuple[float, float] = (1.0, 16.0),
        dt_min: float = 0.001,
        dt_max: float = 0.1,
        dt_floor: float = 1e-4,
        eps: float = 1e-5,
        backend: str = "auto",
    ) -> None:
        super().__init__(dim, causal=causal)
        if heads < 1 or expand < 1 or (expand * dim) % heads:
            raise ValueError(f"heads must divide expand · dim, got heads={heads}, expand={expand} and dim={dim}")
        if groups < 1 or heads % groups:
            raise ValueError(f"groups must divide heads, got groups={groups} and heads={heads}")
        if d_state < 1 or d_conv < 1:
            raise ValueError(f"d_state and d_conv must be positive integers, got {d_state} and {d_conv}")
        if not 0 < a_range[0] <= a_range[1] or not 0 < dt_min <= dt_max:
            raise ValueError(
                f"a_range and (dt_min, dt_max) must be positive and in order, got {a_range} and {(dt_min, dt_max)}"
            )
        self.heads = heads
        self.head_dim = expand * dim // heads
        self.inner = expand * dim
        self.d_state, self.groups, self.d_conv = d_state, groups, d_conv
        self.eps = eps
        self.backend = backend
        channels = self.inner + 2 * groups * d_state
        self.in_proj = nn.Linear(dim, self.inner + channels + heads, bias=bias)
        self.conv1d = nn.Conv1d(channels, channels, d_conv, groups=channels, bias=conv_bias)
        dt = torch.empty(heads).uniform_(math.log(dt_min), math.log(dt_max)).exp().clamp(min=dt_floor)
        # softplus of this is dt.
        self.dt_bias = nn.Parameter(dt + torch.log(-torch.expm1(-dt)))
        self.A_log = nn.Parameter(torch.empty(heads).uniform_(*a_range).log())
        self.D = nn.Parameter(torch.ones(heads))
        self.norm_weight = nn.Parameter(torch.ones(self.inner))
        self.out_proj = nn.Linear(self.inner, dim, bias=bias)

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
        return self._run(x, None, key_padding_mask)[0]

    def _run(
        self, x: Tensor, state: Mamba2State | None, key_padding_mask: Tensor | None = None
    ) -> tuple[Tensor, Mamba2State]:
        real = None if key_padding_mask is None else key_padding_mask.unsqueeze(-1)
        if real is not None:
            x = x.masked_fill(~real, 0.0)
        z, mixed, dt = self.in_proj(x).split([self.inner, self.conv1d.in_channels, self.heads], dim=-1)
        if real is not None:
            mixed = mixed.masked_fill(~real, 0.0)
        mixed = mixed.transpose(1, 2)
        if state is None:
            seen = F.pad(mixed, (self.d_conv - 1, 0))
        else:
            seen = torch.cat([state.conv.to(mixed.dtype), mixed], dim=-1)
        mixed = F.silu(self.conv1d(seen)).transpose(1, 2)
        if real is not None:
            mixed = mixed.masked_fill(~real, 0.0)
        values, keys, queries = (
            part.unflatten(-1, (count, -1)).transpose(1, 2)
            for part, count in zip(
                mixed.split([self.inner, self.groups * self.d_state, self.groups * self.d_state], dim=-1),
                (self.heads, self.groups, self.groups),
            )
        )
        # Steps and decays in 32 bits at least: the decay of a token is near 1.
        wide = torch.promote_types(x.dtype, torch.float32)
        dt = F.softplus(dt.to(wide) + self.dt_bias.to(wide))
        if real is not None:
            dt = dt.masked_fill(~real, 0.0)
        dt = dt.transpose(1, 2)
        out, memory = scalar_decay_attention(
            queries,
            keys,
            (values * dt.unsqueeze(-1)).to(x.dtype),
            log_decay=-self.A_log.to(wide).exp()[:, None] * dt,
            scale=1.0,
            initial_state=None if state is None else state.memory,
            return_state=True,
            backend=self.backend,
        )
        out = out + self.D[:, None, None] * values
        gated = out.transpose(1, 2).flatten(-2).to(wide) * F.silu(z.to(wide))
        normed = F.rms_norm(gated.unflatten(-1, (self.groups, -1)), (self.inner // self.groups,), eps=self.eps)
        out = self.out_proj(normed.flatten(-2).to(x.dtype) * self.norm_weight)
        # A copy, which does not keep the rest alive.
        return out, Mamba2State(seen[:, :, seen.shape[2] - self.d_conv + 1 :].clone(), memory)

    def sizes(
        self, *, batch: int, length: int, context: int | None = None, grid: tuple[int, ...] | None = None
    ) -> dict[str, float]:
        sizes = super().sizes(batch=batch, length=length, context=context, grid=grid)
        return {
            **sizes,
            "G": self.groups,
            "I": self.in_proj.out_features,
            "J": self.d_conv,
            "K": self.d_state,
            "V": self.head_dim,
            "T": pairs_in_chunks(length),
        }

    def init_state(
        self, batch: int, *, device: torch.device | None = None, dtype: torch.dtype | None = None
    ) -> Mamba2State:
        """Nothing seen: zeros."""
        conv = torch.zeros(batch, self.conv1d.in_channels, self.d_conv - 1, device=device, dtype=dtype)
        kept = torch.float64 if dtype is torch.float64 else torch.float32
        return Mamba2State(conv, torch.zeros(batch, self.heads, self.d_state, self.head_dim, device=device, dtype=kept))

    def step(self, x: Tensor, state: Mamba2State) -> tuple[Tensor, Mamba2State]:
        self.check_inputs(x)
        return self._run(x, state)
