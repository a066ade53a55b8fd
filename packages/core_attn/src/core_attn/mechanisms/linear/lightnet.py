"""LightNet's attention, "You Only Scan Once: Efficient Multi-dimension Sequential Modeling with LightNet" (S231)."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from core_attn.contract import Growth, Pattern, TokenMixer
from core_attn.einsums import Cascade
from core_attn.ops.gated_linear import gated_linear_attention, gated_linear_step, pairs_in_chunks
from core_attn.ops.gated_linear.reference import state_dtype
from core_attn.registry import register

# In place of minus infinity, whose differences are no numbers.
NOTHING = -1e30


class LightNetState(NamedTuple):
    """What the tokens so far leave for the next, in constant memory.

    Attributes:
        kv: (B, H, D, D) mean of k vᵀ, each channel of the keys weighted by its own softmax over the tokens so far.
        z: (B, H, D) logarithm of those softmaxes' sums.
    """

    kv: Tensor
    z: Tensor


@register(
    name="lightnet",
    title="You Only Scan Once: Efficient Multi-dimension Sequential Modeling with LightNet",
    source="S231",
    year=2024,
    patterns=frozenset({Pattern.CAUSAL_SELF, Pattern.NONCAUSAL_SELF, Pattern.NONCAUSAL_CROSS}),
    time=Growth.LINEAR,
    memory=Growth.LINEAR,
    decodes=True,
    constant_state=True,
    padding=True,
    double_backward=False,
    operator="gated_linear_attention",
    cascade=Cascade(
        einsums=(
            "z[b,h,m,d] = logcumsumexp[m] K[b,h,m,d]",
            "k[b,h,m,d] = exp(K[b,h,m,d] - z[b,h,m,d])",
            "S[b,h,m,d,e] = exp(z[b,h,m-1,d] - z[b,h,m,d]) * S[b,h,m-1,d,e] + k[b,h,m,d] * V[b,h,m,e]",
            "Y[b,h,l,e] = silu(Q[b,h,l,d]) * S[b,h,l,d,e]",
            "r[b,l] = sqrt(Y[b,l,c]**2 / C)",
            "O[b,l,c] = silu(G[b,l,c]) * Y[b,l,c] / r[b,l]",
        ),
        passes=1,
        flops="4*B*(L + M)*C**2 + 4*B*L*C*W + 2*B*(L + M)*C*D + 6*B*T*C",
        bytes="E*(B*(2*L + X)*C + 4*C**2 + 2*C*W)",
        symbols={
            "W": "rank of the output gate",
            "T": "causal: pairs of tokens of one chunk, of all chunks of a sequence; else 0",
        },
    ),
)
class LightNetAttention(TokenMixer):
    """Linear attention by an additive recurrence: every channel of the keys is a softmax over the tokens.

    Causal, over the tokens so far: with z_t = log Σ_{j<=t} e^(k_j), the state decays by e^(z_{t-1} - z_t) and takes in
    e^(k_t - z_t) v_tᵀ. Else over all tokens, in one scan for any number of dimensions. The queries are silu(q), and the
    output (silu(x W₁ W₂) · RMSNorm(o)) W_O, the norm over all heads' channels.

    Args:
        dim: channels C.
        heads: number of heads H; must divide dim.
        causal: see `TokenMixer`.
        gate_rank: width of the output gate's projection in its middle.
        eps: of the norm.
        backend: of the causal form, see `core_attn.ops.gated_linear_attention`.

    Raises:
        ValueError: an option out of its range.
    """

    def __init__(
        self,
        dim: int,
        *,
        heads: int = 8,
        causal: bool = False,
        gate_rank: int = 128,
        eps: float = 1e-5,
        backend: str = "auto",
    ) -> None:
        super().__init__(dim, causal=causal)
        if heads < 1 or dim % heads:
            raise ValueError(f"heads must divide dim, got dim={dim} and heads={heads}")
        if gate_rank < 1:
            raise ValueError(f"gate_rank must be a positive integer, got {gate_rank}")
        self.heads = heads
        self.head_dim = dim // heads
        self.gate_rank = gate_rank
        self.backend = backend
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(dim, dim, bias=False) for _ in range(3))
        self.gate_proj = nn.Sequential(nn.Linear(dim, gate_rank, bias=False), nn.Linear(gate_rank, dim, bias=False))
        self.norm = nn.RMSNorm(dim, eps=eps)
        self.out_proj = nn.Linear(dim, dim, bias=False)

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
        source = x if context is None else context
        if key_padding_mask is not None:  # tokens of zeros have values of zeros
            source = source.masked_fill(~key_padding_mask.unsqueeze(-1), 0.0)
        x = source if context is None else x
        q, k, v = self._heads(x, source)
        if key_padding_mask is not None:
            k = k.masked_fill(~key_padding_mask[:, None, :, None], NOTHING)
        if self.causal:
            keys, gate, _ = _additive(k, self._start(k))
            out = gated_linear_attention(q, keys.to(q.dtype), v, log_gate=gate, backend=self.backend)
            assert isinstance(out, Tensor)
        else:
            # Summed in the keys' dtype, which is at least float32.
            state = torch.softmax(k, dim=2).mT @ v.to(k.dtype)
            out = (q.to(k.dtype) @ state * self.head_dim**-0.5).to(x.dtype)
        return self._finish(out, x)

    def _heads(self, x: Tensor, source: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """q, k, v (B, H, ·, D); k at least in float32, for exponentials are taken of it."""
        q, k, v = F.silu(self.q_proj(x)), self.k_proj(source), self.v_proj(source)
        q, k, v = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in (q, k, v))
        return q, k.to(torch.promote_types(k.dtype, torch.float32)), v

    def _start(self, k: Tensor) -> Tensor:
        return k.new_full((len(k), self.heads, self.head_dim), NOTHING)

    def _finish(self, out: Tensor, x: Tensor) -> Tensor:
        normed = self.norm(out.transpose(1, 2).flatten(-2))
        return self.out_proj(F.silu(self.gate_proj(x)) * normed)

    def sizes(
        self, *, batch: int, length: int, context: int | None = None, grid: tuple[int, ...] | None = None
    ) -> dict[str, float]:
        sizes = super().sizes(batch=batch, length=length, context=context, grid=grid)
        return {**sizes, "W": self.gate_rank, "T": pairs_in_chunks(length) if self.causal else 0}

    def init_state(
        self, batch: int, *, device: torch.device | None = None, dtype: torch.dtype | None = None
    ) -> LightNetState:
        if not self.causal:
            return super().init_state(batch, device=device, dtype=dtype)
        kv = torch.zeros(batch, self.heads, self.head_dim, self.head_dim, device=device, dtype=state_dtype(dtype))
        return LightNetState(kv, self._start(kv))

    def step(self, x: Tensor, state: LightNetState) -> tuple[Tensor, LightNetState]:
        if not self.causal:
            return super().step(x, state)
        self.check_inputs(x)
        q, k, v = self._heads(x, x)
        keys, gate, z = _additive(k, state.z.to(k.dtype))
        out, kv = gated_linear_step(q, keys.to(q.dtype), v, log_gate=gate, state=state.kv)
        return self._finish(out, x), LightNetState(kv, z)


def _additive(k: Tensor, z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Keys e^(k - z), log-gates z' - z and the last z: running logarithms z, and z' those of one token before.

    In terms of k - z' they are a sigmoid and a log-sigmoid, which lose no digits and cannot pass 1 and 0 by rounding.
    """
    sums = torch.logcumsumexp(torch.cat([z.unsqueeze(2), k], dim=2), dim=2)
    before = sums[:, :, :-1]
    # Nothing was before: nothing can decay.
    gate = F.logsigmoid(before - k).masked_fill(before < NOTHING / 2, 0.0)
    return torch.sigmoid(k - before), gate, sums[:, :, -1].clone()  # no view, which would keep all sums alive
