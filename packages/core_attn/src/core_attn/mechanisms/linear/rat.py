"""RAT: a gated recurrence inside chunks, softmax attention across chunks.

RAT: Bridging RNN Efficiency and Attention Accuracy in Language Modeling (S15), sections 2.2 and 2.3.

Shapes: B batch, H heads, L tokens, C channels, D = C / H, G groups of heads that share queries and keys.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from core_attn import ops
from core_attn.contract import Growth, Pattern, TokenMixer
from core_attn.einsums import Cascade
from core_attn.ops.rat import RatState, rat_start
from core_attn.registry import register


@register(
    name="rat",
    title="RAT: Bridging RNN Efficiency and Attention Accuracy in Language Modeling",
    source="S15",
    year=2025,
    patterns=frozenset({Pattern.CAUSAL_SELF}),
    time=Growth.QUADRATIC,
    memory=Growth.LINEAR,
    decodes=True,
    padding=True,
    double_backward=False,
    operator="rat_attention",
    cascade=Cascade(
        einsums=(
            "Kt[b,h,l,d] = g[b,h,l,d] * Kt[b,h,l-1,d] + (1 - g[b,h,l,d]) * K[b,h,l,d]",
            "Vt[b,h,l,d] = g[b,h,l,d] * Vt[b,h,l-1,d] + (1 - g[b,h,l,d]) * V[b,h,l,d]",
            "S[b,h,l,n] = scale * Q[b,h,l,d] * Kt[b,h,end(n),d]",
            "own[b,h,l] = scale * Q[b,h,l,d] * Kt[b,h,l,d]",
            "W[b,h,l,n] = exp(S[b,h,l,n] - max[n] (S[b,h,l,n], own[b,h,l]))",
            "Y[b,h,l,d] = (W[b,h,l,n] * Vt[b,h,end(n),d] + W[b,h,l,own] * Vt[b,h,l,d]) / sum[n] W[b,h,l,n]",
            "O[b,l,c] = sigmoid Z[b,l,c] * Y[b,l,c]",
        ),
        passes=2,
        flops="8*B*L*C**2 + 4*B*L*C*G*D + 4*B*H*P*D",
        bytes="E*(2*B*L*C + 4*C**2 + 2*G*D*C)",
    ),
)
class Rat(TokenMixer):
    """o_t = σ(z_t) ⊙ softmax over the ends of earlier chunks and token t itself, all summaries k̃, ṽ of their chunk.

    One projection gives z, v and the gates in every channel, q and k in G groups: head h takes those of group h mod G.
    Queries and summaries are rotated by the number of their chunk, so that inside a chunk only the recurrence knows an
    order. The official layer's norm before the projection and its residual belong to the block around this mixer.

    Where the official code wants whole chunks, the last one may be short here. Padded tokens neither decay nor write,
    and nobody reads a chunk of padding, but they keep their place.

    Decoding remembers k̃ and ṽ of the chunk that is not complete and one pair for each complete chunk: state and time
    of a token grow with the context, `chunk_size` times slower than with full attention.

    Args:
        dim: channels C.
        heads: number of heads H; must divide dim.
        causal: must be True: the recurrence has a direction.
        chunk_size: tokens of a chunk; 16 in the paper's main results. 1 is attention between tokens, as many as there
            are tokens a recurrence alone.
        ngroups: G, must divide heads; by default 2 as in the paper, or 1 where the number of heads is odd.
        base: of the rotation; of heads with an odd number of channels the last does not turn.
        bias: whether the projections have a bias; the paper's have none.
        backend: see `core_attn.ops.rat_attention`. Gradients of gradients need "reference".

    Raises:
        ValueError: an option out of its range.
    """

    def __init__(
        self,
        dim: int,
        *,
        heads: int = 8,
        causal: bool = True,
        chunk_size: int = 16,
        ngroups: int | None = None,
        base: float = 10000.0,
        bias: bool = False,
        backend: str = "auto",
    ) -> None:
        super().__init__(dim, causal=causal)
        if heads < 1 or dim % heads:
            raise ValueError(f"heads must divide dim, got dim={dim} and heads={heads}")
        if ngroups is None:
            ngroups = 1 if heads % 2 else 2
        if ngroups < 1 or heads % ngroups:
            raise ValueError(f"ngroups must divide heads, got ngroups={ngroups} and heads={heads}")
        if chunk_size < 1:
            raise ValueError(f"chunk_size must be at least 1, got {chunk_size}")
        if base <= 0:
            raise ValueError(f"base must be positive, got {base}")
        self.heads, self.kv_heads = heads, ngroups
        self.head_dim = dim // heads
        self.chunk_size = chunk_size
        self.base = base
        self.backend = backend
        self.in_proj = nn.Linear(dim, 3 * dim + 2 * ngroups * self.head_dim, bias=bias)
        self.gate_bias = nn.Parameter(torch.zeros(dim))
        self.out_proj = nn.Linear(dim, dim, bias=bias)
        # Gates that remember over 1 … C - 1 tokens at the start. The official code leaves those of chunk_size 1 as
        # memory was; they begin at 1/2 here.
        if chunk_size > 1:
            nn.init.uniform_(self.gate_bias, 1, chunk_size - 1)
            with torch.no_grad():
                self.gate_bias.log_()

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
        q, k, v, log_gate, z = self._inputs(x)
        out = ops.rat_attention(
            q,
            k,
            v,
            log_gate=log_gate,
            chunk_size=self.chunk_size,
            rotary_base=self.base,
            key_padding_mask=key_padding_mask,
            backend=self.backend,
        )
        return self._outputs(out, z)

    def sizes(
        self, *, batch: int, length: int, context: int | None = None, grid: tuple[int, ...] | None = None
    ) -> dict[str, float]:
        sizes = super().sizes(batch=batch, length=length, context=context, grid=grid)
        return {**sizes, "P": sum(t // self.chunk_size for t in range(length))}

    def init_state(
        self, batch: int, *, device: torch.device | None = None, dtype: torch.dtype | None = None
    ) -> RatState:
        weight = self.out_proj.weight
        like = torch.empty(
            batch, self.heads, 0, self.head_dim, device=device or weight.device, dtype=dtype or weight.dtype
        )
        return rat_start(like)

    def step(self, x: Tensor, state: RatState) -> tuple[Tensor, RatState]:
        self.check_inputs(x)
        q, k, v, log_gate, z = self._inputs(x)
        out, state = ops.rat_step(
            q, k, v, log_gate=log_gate, state=state, chunk_size=self.chunk_size, rotary_base=self.base
        )
        return self._outputs(out, z), state

    def _inputs(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """(B, L, C) -> q, k, v and log-gates (B, H, L, D), and z (B, L, C)."""
        shared = self.kv_heads * self.head_dim
        z, v, g, q, k = self.in_proj(x).split([self.dim, self.dim, self.dim, shared, shared], dim=-1)
        exact = torch.float64 if g.dtype is torch.float64 else torch.float32
        log_gate = F.logsigmoid(g.to(exact) + self.gate_bias.to(exact))
        v, log_gate = (y.unflatten(-1, (self.heads, self.head_dim)).transpose(1, 2) for y in (v, log_gate))
        repeats = self.heads // self.kv_heads
        q, k = (
            y.unflatten(-1, (self.kv_heads, self.head_dim)).transpose(1, 2).repeat(1, repeats, 1, 1) for y in (q, k)
        )
        return q, k, v, log_gate, z

    def _outputs(self, out: Tensor, z: Tensor) -> Tensor:
        """(B, H, L, D) -> (B, L, C)."""
        return self.out_proj(torch.sigmoid(z) * out.transpose(1, 2).flatten(2))

    def extra_repr(self) -> str:
        return f"heads={self.heads}, chunk_size={self.chunk_size}, ngroups={self.kv_heads}"
