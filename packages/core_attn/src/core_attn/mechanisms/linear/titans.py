"""Titans: a memory that keeps learning, by gradient descent with momentum and forgetting, while it is read.

"Titans: Learning to Memorize at Test Time" (S127), sections 3.1 to 3.3 (the memory), 4.2 to 4.4 (with attention).

Shapes: B batch, H heads, L tokens, N persistent tokens, C channels, D = C / H.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from core_attn.contract import Growth, Pattern, TokenMixer
from core_attn.einsums import Cascade
from core_attn.mechanisms.conv.short import ShortConvolution
from core_attn.naming import unknown
from core_attn.ops.titans import TitansState, titans_memory
from core_attn.ops.titans.chunked import piece_length
from core_attn.ops.window import reference, window_attention
from core_attn.registry import register
from core_attn.state import SinkCache

VARIANTS = ("lmm", "mag", "mal")


class TitansLayerState(NamedTuple):
    """What decoding remembers, whatever the context.

    Attributes:
        memory: the memory and its momentum.
        past: (B, K - 1, 3 C) the last projections, which the next short convolutions read; None without those.
        cache: keys and values of the attention's window and of the persistent tokens; None without attention.
    """

    memory: TitansState
    past: Tensor | None
    cache: SinkCache | None

    def select(self, rows: Tensor) -> TitansLayerState:
        """A new state with the samples `rows` (int64) of this one, in that order."""
        past = None if self.past is None else self.past.index_select(0, rows)
        cache = None if self.cache is None else self.cache.select(rows)
        return TitansLayerState(self.memory.select(rows), past, cache)


@register(
    name="titans",
    title="Titans: Learning to Memorize at Test Time",
    source="S127",
    year=2024,
    patterns=frozenset({Pattern.CAUSAL_SELF}),
    time=Growth.LINEAR,
    memory=Growth.LINEAR,
    decodes=True,
    constant_state=True,
    padding=True,
    double_backward=False,
    operator="titans_memory",
    cascade=Cascade(
        einsums=(
            "old[b,h,l,e] = K[b,h,l,d] * M[b,h,l-1,d,e]",
            "grad[b,h,l,d,e] = 2 * K[b,h,l,d] * (old[b,h,l,e] - V[b,h,l,e])",
            "S[b,h,l,d,e] = eta[b,h,l] * S[b,h,l-1,d,e] - theta[b,h,l] * grad[b,h,l,d,e]",
            "M[b,h,l,d,e] = (1 - alpha[b,h,l]) * M[b,h,l-1,d,e] + S[b,h,l,d,e]",
            "Y[b,h,l,e] = Q[b,h,l,d] * M[b,h,l,d,e]",
            "O[b,h,l,e] = silu(G[b,h,l,e]) * gamma[e] * Y[b,h,l,e] / rms[e] Y[b,h,l,e]",
        ),
        passes=1,
        flops="10*B*L*C**2 + 6*B*L*C*H + 12*B*H*L*D**2 + 12*B*H*L*T*D + 2*B*H*L*T**2 + 8*B*L*A*C + 4*B*P*A",
        bytes="E*(2*B*L*C + 5*C**2 + 4*A*C)",
        symbols={
            "T": "tokens of a piece that is computed at once",
            "A": "channels of the attention beside the memory, 0 where there is none",
        },
    ),
)
class Titans(TokenMixer):
    """S_t = η_t S_{t-1} - θ_t ∇|M_{t-1}ᵀ k_t - v_t|², M_t = (1 - α_t) M_{t-1} + S_t, and M_tᵀ q_t is read.

    The memory is a matrix a head, zero at the start. q, k and v are projections behind a short depthwise convolution
    and SiLU, q and k normalised to norm 1; α, η and θ are sigmoids of the token, one a head; what is read is normalised
    in every head (RMS), gated by SiLU of a projection of the token, and projected. Padding neither decays nor writes,
    nor does the momentum move the memory there.

    The paper leaves θ free; with keys of norm 1, η = 0.9 and θ = 0.2 the memory then overflows within a few thousand
    random tokens. So by default θ_t = (1 - η_t) σ(·): the momentum is a mean of gradients. That is no proof, but in
    trials of 16,384 tokens with nothing forgotten the outputs stayed below 300 for keys drawn at random, and below
    20,000 in the worst, keys that turn slowly with η = 0.999. `bounded=False` leaves the steps free.

    Variants: "lmm" is the memory as a layer by itself. "mag" (section 4.2) has sliding-window attention beside it: its
    output y goes on as norm(y) ⊙ σ(norm(m)), m the memory's output, with the norms' own weights. "mal" (section 4.3)
    has the attention behind the memory. Both begin with learned persistent tokens, which the memory learns first and
    the attention always reads. The third of the paper, memory as a context, mixes segments, not tokens; it is not here.

    Args:
        dim: channels C.
        heads: number of heads H; must divide dim.
        causal: must be True: the memory is a recurrence.
        variant: "lmm", "mag" or "mal".
        chunk: tokens of a chunk whose gradients are all taken at the memory it begins with, as in section 3.2; with 1
            every token sees what the one before has written. Bounded steps are divided by it.
        conv_size: taps K of the short convolutions of q, k and v; 0 leaves them out.
        window: of the attention, in tokens, the token itself included.
        persistent: persistent tokens N; by default 4 with attention and none without.
        bounded: θ = (1 - η) σ(·) in place of θ = σ(·).
        eps: of the norms.
        backend: see `core_attn.ops.titans_memory`. Gradients of gradients need "reference".

    Raises:
        ValueError: an option out of its range.
        UnknownNameError: no such variant.
    """

    def __init__(
        self,
        dim: int,
        *,
        heads: int = 8,
        causal: bool = True,
        variant: str = "lmm",
        chunk: int = 1,
        conv_size: int = 4,
        window: int = 256,
        persistent: int | None = None,
        bounded: bool = True,
        eps: float = 1e-6,
        backend: str = "auto",
    ) -> None:
        super().__init__(dim, causal=causal)
        if heads < 1 or dim % heads:
            raise ValueError(f"heads must divide dim, got dim={dim} and heads={heads}")
        if variant not in VARIANTS:
            raise unknown("variant", variant, VARIANTS)
        if chunk < 1 or window < 1:
            raise ValueError(f"chunk and window must be at least 1 token, got {chunk} and {window}")
        if conv_size < 0:
            raise ValueError(f"conv_size must be at least 0 (no short convolution), got {conv_size}")
        if persistent is None:
            persistent = 0 if variant == "lmm" else 4
        if persistent < 0:
            raise ValueError(f"persistent must be at least 0 tokens, got {persistent}")
        self.heads, self.head_dim = heads, dim // heads
        self.variant, self.chunk, self.window = variant, chunk, window
        self.bounded, self.eps, self.backend = bounded, eps, backend
        self.qkv_proj = nn.Linear(dim, 3 * dim, bias=False)
        self.conv = ShortConvolution(3 * dim, conv_size) if conv_size else None
        # α, η and θ. At the start about 1/50 is forgotten a token, and the momentum goes back over about 8 tokens.
        self.gate_proj = nn.Linear(dim, 3 * heads)
        self.out_gate_proj = nn.Linear(dim, dim, bias=False)
        self.norm = nn.RMSNorm(self.head_dim, eps=eps)
        self.out_proj = nn.Linear(dim, dim, bias=False)
        with torch.no_grad():
            for start, bias in zip(
                self.gate_proj.bias.split(heads), (-4.0, 2.0, 0.0 if bounded else -4.0), strict=True
            ):
                start.fill_(bias)
        self.persistent = nn.Parameter(torch.randn(persistent, dim) * 0.02) if persistent else None
        if variant != "lmm":
            self.attn_qkv_proj = nn.Linear(dim, 3 * dim, bias=False)
            self.attn_out_proj = nn.Linear(dim, dim, bias=False)
        if variant == "mag":
            self.attn_norm, self.memory_norm = nn.RMSNorm(dim, eps=eps), nn.RMSNorm(dim, eps=eps)

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
        if key_padding_mask is not None:
            x = x.masked_fill(~key_padding_mask.unsqueeze(-1), 0.0)
        first = 0
        if self.persistent is not None:
            first = self.persistent.shape[0]
            x = torch.cat([self._persistent(x.shape[0]).to(x.dtype), x], dim=1)
            if key_padding_mask is not None:
                key_padding_mask = F.pad(key_padding_mask, (first, 0), value=True)
        memory, _, _ = self._memory(x, None, None, key_padding_mask)
        out = memory
        if self.variant != "lmm":
            q, k, v = self._attention_heads(memory if self.variant == "mal" else x)
            out = window_attention(
                q,
                k,
                v,
                window=(self.window - 1, 0),
                causal=True,
                sinks=first,
                key_padding_mask=key_padding_mask,
                backend="reference" if self.backend == "reference" else "auto",
            )
            out = self._with_attention(out, memory)
        return out[:, first:]

    def sizes(
        self, *, batch: int, length: int, context: int | None = None, grid: tuple[int, ...] | None = None
    ) -> dict[str, float]:
        sizes = super().sizes(batch=batch, length=length, context=context, grid=grid)
        first = 0 if self.persistent is None else self.persistent.shape[0]
        pairs = reference.pairs(length, length, left=self.window - 1, right=0, sinks=first)
        attention = 0 if self.variant == "lmm" else self.dim
        return {**sizes, "P": pairs, "T": piece_length(length + first, self.chunk), "A": attention}

    def init_state(
        self, batch: int, *, device: torch.device | None = None, dtype: torch.dtype | None = None
    ) -> TitansLayerState:
        """The state behind the persistent tokens."""
        weight = self.out_proj.weight
        device, dtype = device or weight.device, dtype or weight.dtype
        exact = torch.float64 if dtype is torch.float64 else torch.float32
        zeros = torch.zeros(batch, self.heads, self.head_dim, self.head_dim, device=device, dtype=exact)
        past = None if self.conv is None else self.conv.init_past(batch, device=device, dtype=dtype)
        cache = None
        first = 0 if self.persistent is None else self.persistent.shape[0]
        if self.variant != "lmm":
            sizes = (batch, self.heads, self.head_dim)
            cache = SinkCache(*sizes, sinks=first, left=self.window - 1, device=device, dtype=dtype)
        memory = TitansState(zeros, zeros, zeros if self.chunk > 1 else None)
        state = TitansLayerState(memory, past, cache)
        if self.persistent is not None:
            _, state = self.step(self._persistent(batch).to(device=device, dtype=dtype), state)
        return state

    def step(self, x: Tensor, state: TitansLayerState) -> tuple[Tensor, TitansLayerState]:
        self.check_inputs(x)
        memory, held, past = self._memory(x, state.memory, state.past, None)
        assert held is not None
        if state.cache is None:
            return memory, TitansLayerState(held, past, None)
        q, k, v = self._attention_heads(memory if self.variant == "mal" else x)
        k, v = state.cache.append(k, v)
        sinks = 0 if self.persistent is None else self.persistent.shape[0]
        out = window_attention(q, k, v, window=(self.window - 1, 0), causal=True, sinks=sinks)
        return self._with_attention(out, memory), TitansLayerState(held, past, state.cache)

    def _memory(
        self, x: Tensor, state: TitansState | None, past: Tensor | None, key_padding_mask: Tensor | None
    ) -> tuple[Tensor, TitansState | None, Tensor | None]:
        """(B, L, C) -> the memory's output (B, L, C), and what it and the convolutions remember."""
        mixed = self.qkv_proj(x)
        if self.conv is not None:
            mixed, past = self.conv(mixed, past)
        q, k, v = self._heads(F.silu(mixed))
        alpha, eta, theta = self.gate_proj(x).transpose(1, 2).chunk(3, dim=1)
        rate = torch.sigmoid(theta)
        if self.bounded:
            rate = rate * torch.sigmoid(-eta) / self.chunk
        found = titans_memory(
            self._unit(q),
            self._unit(k),
            v,
            rate=rate,
            log_momentum=F.logsigmoid(eta),
            log_decay=F.logsigmoid(-alpha),
            chunk=self.chunk,
            key_padding_mask=key_padding_mask,
            scale=1.0,
            initial_state=state,
            return_state=state is not None,
            backend=self.backend,
        )
        out, held = found if isinstance(found, tuple) else (found, None)
        out = self.norm(out).transpose(1, 2).flatten(2) * F.silu(self.out_gate_proj(x))
        return self.out_proj(out), held, past

    def _attention_heads(self, x: Tensor) -> list[Tensor]:
        return self._heads(self.attn_qkv_proj(x))

    def _with_attention(self, out: Tensor, memory: Tensor) -> Tensor:
        """The attention's heads (B, H, L, D) and the memory's output (B, L, C) -> (B, L, C)."""
        out = self.attn_out_proj(out.transpose(1, 2).flatten(2))
        return out if self.variant == "mal" else self.attn_norm(out) * torch.sigmoid(self.memory_norm(memory))

    def _heads(self, x: Tensor) -> list[Tensor]:
        """(B, L, 3 C) -> three of (B, H, L, D)."""
        return [y.unflatten(-1, (self.heads, -1)).transpose(1, 2) for y in x.chunk(3, dim=-1)]

    def _unit(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.square().sum(-1, keepdim=True) + self.eps)

    def _persistent(self, batch: int) -> Tensor:
        assert self.persistent is not None
        return self.persistent.expand(batch, -1, -1)

    def extra_repr(self) -> str:
        return f"heads={self.heads}, variant={self.variant!r}, chunk={self.chunk}"
