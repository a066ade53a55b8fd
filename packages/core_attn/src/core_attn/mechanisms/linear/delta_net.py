"""DeltaNet: a memory of keys and values in which a token replaces what was stored under its key.

Parallelizing Linear Transformers with the Delta Rule over Sequence Length (Yang et al., NeurIPS 2024), section 3.4.

Shapes: B batch, H heads, L tokens, C channels, D = C / H.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from core_attn import ops
from core_attn.contract import Growth, Pattern, TokenMixer
from core_attn.einsums import Cascade
from core_attn.mechanisms.conv.short import ShortConvolution
from core_attn.ops.delta.chunked import chunk_length
from core_attn.registry import register


class DeltaState(NamedTuple):
    """What decoding remembers, whatever the context.

    Attributes:
        memory: (B, H, D, D) keys times values.
        past: (B, K - 1, 3 C) the last projections, which the next short convolutions read; None without those.
    """

    memory: Tensor
    past: Tensor | None

    def select(self, rows: Tensor) -> DeltaState:
        """A new state with the samples `rows` (int64) of this one, in that order."""
        past = None if self.past is None else self.past.index_select(0, rows)
        return DeltaState(self.memory.index_select(0, rows), past)


@register(
    name="delta_net",
    title="Parallelizing Linear Transformers with the Delta Rule over Sequence Length",
    source="",
    year=2024,
    patterns=frozenset({Pattern.CAUSAL_SELF}),
    time=Growth.LINEAR,
    memory=Growth.LINEAR,
    decodes=True,
    constant_state=True,
    padding=True,
    double_backward=False,
    operator="delta_rule",
    cascade=Cascade(
        einsums=(
            "old[b,h,l,e] = K[b,h,l,d] * S[b,h,l-1,d,e]",
            "S[b,h,l,d,e] = S[b,h,l-1,d,e] + beta[b,h,l] * K[b,h,l,d] * (V[b,h,l,e] - old[b,h,l,e])",
            "Y[b,h,l,e] = Q[b,h,l,d] * S[b,h,l,d,e]",
            "O[b,h,l,e] = Y[b,h,l,e] * gamma[e] / rms[e] Y[b,h,l,e]",
        ),
        passes=1,
        flops="8*B*L*C**2 + 2*B*L*C*H + 6*B*H*L*D**2 + 10*B*H*L*T*D",
        bytes="E*(2*B*L*C + 4*C**2)",
        symbols={"T": "tokens of a chunk"},
    ),
)
class DeltaNet(TokenMixer):
    """S_t = (I - β_t k_t k_tᵀ) S_{t-1} + β_t k_t v_tᵀ, o_t = S_tᵀ q_t / √D, with RMS norm in every head.

    q and k are the projections behind a short convolution and SiLU, normalised to norm 1; v has no normalisation; the
    strength β of writing is a sigmoid, one a head and token. Padded tokens neither write nor take part in the short
    convolutions.

    Args:
        dim: channels C.
        heads: number of heads H; must divide dim.
        causal: must be True: the rule is a recurrence.
        conv_size: taps K of the short convolutions of q, k and v; 0 leaves them out.
        allow_neg_eigval: β in (0, 2), so that writing may turn what is stored around.
        eps: of the norms.
        backend: see `core_attn.ops.delta_rule`. Gradients of gradients need "reference".

    Raises:
        ValueError: an option out of its range.
    """

    def __init__(
        self,
        dim: int,
        *,
        heads: int = 8,
        causal: bool = True,
        conv_size: int = 4,
        allow_neg_eigval: bool = False,
        eps: float = 1e-6,
        backend: str = "auto",
    ) -> None:
        super().__init__(dim, causal=causal)
        if heads < 1 or dim % heads:
            raise ValueError(f"heads must divide dim, got dim={dim} and heads={heads}")
        if conv_size < 0:
            raise ValueError(f"conv_size must be at least 0 (no short convolution), got {conv_size}")
        self.heads = heads
        self.head_dim = dim // heads
        self.strongest = 2.0 if allow_neg_eigval else 1.0
        self.eps = eps
        self.backend = backend
        self.qkv_proj = nn.Linear(dim, 3 * dim, bias=False)
        self.beta_proj = nn.Linear(dim, heads, bias=False)
        self.conv = ShortConvolution(3 * dim, conv_size) if conv_size else None
        self.norm = nn.RMSNorm(self.head_dim, eps=eps)
        self.out_proj = nn.Linear(dim, dim, bias=False)
        with torch.no_grad():
            for weight in (*self.qkv_proj.weight.split(dim), self.beta_proj.weight, self.out_proj.weight):
                nn.init.xavier_uniform_(weight, gain=2.0**-2.5)

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
        q, k, v, beta, _ = self._inputs(x, None)
        if key_padding_mask is not None:
            beta = beta.masked_fill(~key_padding_mask.unsqueeze(1), 0.0)
        out = ops.delta_rule(q, k, v, beta=beta, backend=self.backend)
        return self._outputs(out)

    def sizes(
        self, *, batch: int, length: int, context: int | None = None, grid: tuple[int, ...] | None = None
    ) -> dict[str, float]:
        sizes = super().sizes(batch=batch, length=length, context=context, grid=grid)
        return {**sizes, "T": chunk_length(length)}

    def init_state(
        self, batch: int, *, device: torch.device | None = None, dtype: torch.dtype | None = None
    ) -> DeltaState:
        weight = self.out_proj.weight
        device, dtype = device or weight.device, dtype or weight.dtype
        exact = torch.float64 if dtype is torch.float64 else torch.float32
        memory = torch.zeros(batch, self.heads, self.head_dim, self.head_dim, device=device, dtype=exact)
        past = None if self.conv is None else self.conv.init_past(batch, device=device, dtype=dtype)
        return DeltaState(memory, past)

    def step(self, x: Tensor, state: DeltaState) -> tuple[Tensor, DeltaState]:
        self.check_inputs(x)
        q, k, v, beta, past = self._inputs(x, state.past)
        out, memory = ops.delta_rule_step(q, k, v, beta=beta, state=state.memory)
        return self._outputs(out), DeltaState(memory, past)

    def _inputs(self, x: Tensor, past: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]:
        """(B, L, C) -> q, k, v (B, H, L, D), β (B, H, L), and what the next tokens' convolutions read."""
        mixed = self.qkv_proj(x)
        if self.conv is not None:
            mixed, past = self.conv(mixed, past)
        q, k, v = (y.unflatten(-1, (self.heads, -1)).transpose(1, 2) for y in F.silu(mixed).chunk(3, dim=-1))
        beta = self.strongest * torch.sigmoid(self.beta_proj(x)).transpose(1, 2)
        return self._unit(q), self._unit(k), v, beta, past

    def _unit(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.square().sum(-1, keepdim=True) + self.eps)

    def _outputs(self, out: Tensor) -> Tensor:
        """(B, H, L, D) -> (B, L, C)."""
        return self.out_proj(self.norm(out).transpose(1, 2).flatten(2))

    def extra_repr(self) -> str:
        return f"heads={self.heads}"
