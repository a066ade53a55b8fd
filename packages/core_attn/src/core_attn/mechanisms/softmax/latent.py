"""Multi-head latent attention: keys and values of all heads from one small vector a token.

"Muon: Training and Trade-offs with Latent Attention and MoE" (S38), in the form of DeepSeek-V2 (2024), section 2.1,
whose equations are cited.

Shapes: B batch, L queries, M keys, C channels, H heads, D = C / H, R channels of a token's latent vector, N channels
that carry the position.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from core_attn.contract import Growth, Pattern, TokenMixer
from core_attn.einsums import Cascade
from core_attn.ops.softmax import reference, softmax_attention
from core_attn.positions.rotary import rotary
from core_attn.registry import register
from core_attn.state import FullCache


@register(
    name="mla",
    title="Muon: Training and Trade-offs with Latent Attention and MoE",
    source="S38",
    year=2025,
    patterns=frozenset(Pattern),
    time=Growth.QUADRATIC,
    memory=Growth.LINEAR,
    decodes=True,
    padding=True,
    maps=True,
    double_backward=False,
    operator="softmax_attention",
    cascade=Cascade(
        einsums=(
            "Z[b,m,r] = norm(X[b,m,c] * Wz[r,c])",
            "K[b,h,m,d] = Z[b,m,r] * Wk[h,d,r]",
            "V[b,h,m,d] = Z[b,m,r] * Wv[h,d,r]",
            "Kn[b,m,n] = rotate(X[b,m,c] * Wn[n,c])",
            "S[b,h,l,m] = scale * (Q[b,h,l,d] * K[b,h,m,d] + Qn[b,h,l,n] * Kn[b,m,n])",
            "top[b,h,l] = max[m] S[b,h,l,m]",
            "W[b,h,l,m] = exp(S[b,h,l,m] - top[b,h,l])",
            "sum[b,h,l] = W[b,h,l,m]",
            "Y[b,h,l,d] = W[b,h,l,m] * V[b,h,m,d]",
            "O[b,h,l,d] = Y[b,h,l,d] / sum[b,h,l]",
        ),
        passes=1,
        flops="2*B*L*(U + C**2) + 2*B*M*(C*(R + N) + 2*R*C) + 2*B*H*P*(2*D + N)",
        bytes="E*(B*(2*L + X)*C + U + C**2 + C*(R + N) + 2*R*C)",
        symbols={
            "R": "channels of a token's latent vector",
            "N": "channels that carry the position",
            "U": "weights that make the queries",
        },
    ),
)
class LatentAttention(TokenMixer):
    """Keys and values are projected up from a latent vector c = W h of R channels, all that decoding remembers of h.

    c = W_DKV h (eq. 9), k = W_UK c (eq. 10), v = W_UV c (eq. 11); queries likewise, or from h at once (eq. 12, 13). The
    position is carried by N further channels that are turned (RoPE), a query of each head against one key for all
    (eq. 14 to 17); the scores are scaled by 1/√(D + N) (eq. 18).

    The state of decoding holds R + N numbers a token. Then W_UK is moved to the queries' side and W_UV behind the sum
    ("absorbed", section 2.1.2), so that the latent vectors themselves are what is read; the result is the same.

    Args:
        dim: channels C.
        heads: number of heads H; must divide dim.
        causal: token i reads tokens <= i.
        bias: whether the projections from the C channels down, and that of the output, have a bias.
        latent: R; by default four times the channels of a head as in DeepSeek-V2, at most C / 2.
        query_latent: channels of the queries' latent vector; None makes queries from the C channels at once.
        rope: N, even; D / 2 by default as in DeepSeek-V2. 0 leaves the position out.
        norm: an RMS norm behind every projection down, as in DeepSeek-V2.
        base: base of the rotary angles.
        backend: see `core_attn.ops.softmax_attention`. Gradients of gradients need "reference".

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
        latent: int | None = None,
        query_latent: int | None = None,
        rope: int | None = None,
        norm: bool = True,
        base: float = 10000.0,
        backend: str = "auto",
    ) -> None:
        super().__init__(dim, causal=causal)
        if heads < 1 or dim % heads:
            raise ValueError(f"heads must divide dim, got dim={dim} and heads={heads}")
        self.heads = heads
        self.head_dim = dim // heads
        self.latent = max(1, min(4 * self.head_dim, dim // 2)) if latent is None else latent
        self.rope = max(2, self.head_dim // 4 * 2) if rope is None else rope
        if self.latent < 1 or (query_latent is not None and query_latent < 1):
            raise ValueError(
                f"latent and query_latent must be positive, got latent={latent} and query_latent={query_latent}"
            )
        if self.rope < 0 or self.rope % 2:
            raise ValueError(f"rope must be an even number of channels, 0 or more, got {rope}")
        self.base = base
        self.backend = backend
        self.scale = (self.head_dim + self.rope) ** -0.5
        width = heads * (self.head_dim + self.rope)
        if query_latent is None:
            self.q_proj: nn.Module = nn.Linear(dim, width, bias=False)
        else:
            self.q_proj = nn.Sequential(
                nn.Linear(dim, query_latent, bias=bias),
                _norm(query_latent, norm),
                nn.Linear(query_latent, width, bias=False),
            )
        self.down_proj = nn.Linear(dim, self.latent + self.rope, bias=bias)
        self.norm = _norm(self.latent, norm)
        self.k_proj = nn.Linear(self.latent, dim, bias=False)
        self.v_proj = nn.Linear(self.latent, dim, bias=False)
        self.out_proj = nn.Linear(dim, dim, bias=bias)

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
        if key_padding_mask is not None:
            # Zeroed before the projections: 0 * NaN is NaN, so masking later could not stop a NaN under the mask.
            source = source.masked_fill(~key_padding_mask.unsqueeze(-1), 0.0)
        x = x if context is not None else source
        q = self.queries(x, source.shape[1] - x.shape[1])
        k, v = self.keys_and_values(self.compressed(source, 0))
        out = self.attend(q, k, v, key_padding_mask)
        if self._tap is not None:
            out = self._tap(self, q, k, v, out, key_padding_mask, None)
        return self.out_proj(out.transpose(1, 2).flatten(-2))

    def queries(self, x: Tensor, first: int) -> Tensor:
        """(B, L, C) from position `first` on -> (B, H, L, D + N), the last N turned (eq. 12 to 16)."""
        q = self.q_proj(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        still, turning = q.split([self.head_dim, self.rope], dim=-1)
        return torch.cat([still, self.turned(turning, first)], dim=-1)

    def compressed(self, x: Tensor, first: int) -> Tensor:
        """(B, M, C) from position `first` on -> (B, 1, M, R + N): latent vector and key of the position (eq. 9, 15)."""
        still, turning = self.down_proj(x).unsqueeze(1).split([self.latent, self.rope], dim=-1)
        return torch.cat([self.norm(still), self.turned(turning, first)], dim=-1)

    def turned(self, x: Tensor, first: int) -> Tensor:
        positions = torch.arange(first, first + x.shape[2], device=x.device)
        return rotary(x, positions, base=self.base, interleaved=True)

    def keys_and_values(self, compressed: Tensor) -> tuple[Tensor, Tensor]:
        """(B, 1, M, R + N) -> keys (B, H, M, D + N) and values (B, H, M, D) of every head (eq. 10, 11, 17)."""
        still, turning = compressed.split([self.latent, self.rope], dim=-1)
        k, v = (
            project(still.squeeze(1)).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for project in (self.k_proj, self.v_proj)
        )
        return torch.cat([k, turning.expand(-1, self.heads, -1, -1)], dim=-1), v

    def attend(self, q: Tensor, k: Tensor, v: Tensor, key_padding_mask: Tensor | None) -> Tensor:
        """(B, H, L, D + N), (B, H, M, D + N), (B, H, M, D) -> (B, H, L, D) (eq. 18)."""
        return softmax_attention(
            q,
            k,
            v,
            causal=self.causal,
            key_padding_mask=key_padding_mask,
            scale=self.scale,
            backend=self.backend,
        )

    def attention_scores(self, q: Tensor, k: Tensor, *, key_padding_mask: Tensor | None) -> Tensor:
        return reference.scores(
            q,
            k,
            causal=self.causal,
            mask=None,
            bias=None,
            key_padding_mask=key_padding_mask,
            window=None,
            scale=self.scale,
        )

    def attention_map(self, q: Tensor, k: Tensor, *, key_padding_mask: Tensor | None, aux: Any) -> Tensor:
        return reference.weights(self.attention_scores(q, k, key_padding_mask=key_padding_mask))

    def init_state(
        self, batch: int, *, device: torch.device | None = None, dtype: torch.dtype | None = None
    ) -> FullCache:
        """An empty cache of R + N numbers a token: `keys` holds both, `values` nothing.

        Raises:
            ValueError: this module is not causal.
        """
        if not self.causal:
            raise ValueError("mla decodes token by token only when it is built with causal=True")
        weight = self.down_proj.weight
        return FullCache(
            batch,
            1,
            self.latent + self.rope,
            value_dim=0,
            device=device or weight.device,
            dtype=dtype or weight.dtype,
        )

    def step(self, x: Tensor, state: FullCache) -> tuple[Tensor, FullCache]:
        """The next T tokens (B, T, C) -> their outputs (B, T, C); `state` is updated in place and returned."""
        self.check_inputs(x)
        q = self.queries(x, state.seen)
        new = self.compressed(x, state.seen)
        compressed, _ = state.append(new, new[..., :0])
        # Reading R channels instead of D costs more for each query; making D from R costs once for each key.
        if x.shape[1] * (self.latent - self.head_dim) <= self.latent * self.head_dim:
            out = self.absorbed(q, compressed)
        else:
            out = self.attend(q, *self.keys_and_values(compressed), None)
        return self.out_proj(out.transpose(1, 2).flatten(-2)), state

    def absorbed(self, q: Tensor, compressed: Tensor) -> Tensor:
        """`attend` on the latent vectors themselves, one key head for all, with W_UK and W_UV on the queries' side."""
        up_k, up_v = (p.weight.unflatten(0, (self.heads, -1)) for p in (self.k_proj, self.v_proj))  # (H, D, R)
        still, turning = q.split([self.head_dim, self.rope], dim=-1)
        q = torch.cat([still @ up_k, turning], dim=-1)
        single = q.shape[2] == 1
        if single:
            q = q.transpose(1, 2)  # the heads of one token all read the same keys: as if they were its neighbours
        # Values as wide as the keys are what every kernel takes; their last N channels are not used.
        out = softmax_attention(q, compressed, compressed, causal=not single, scale=self.scale, backend=self.backend)
        out = out.transpose(1, 2) if single else out
        return out[..., : self.latent] @ up_v.mT

    def sizes(
        self, *, batch: int, length: int, context: int | None = None, grid: tuple[int, ...] | None = None
    ) -> dict[str, float]:
        sizes = super().sizes(batch=batch, length=length, context=context, grid=grid)
        made = sum(p.numel() for p in self.q_proj.parameters() if p.dim() == 2)
        return sizes | {"R": self.latent, "N": self.rope, "U": made}

    def extra_repr(self) -> str:
        return f"heads={self.heads}, causal={self.causal}, latent={self.latent}, rope={self.rope}"


def _norm(channels: int, wanted: bool) -> nn.Module:
    return nn.RMSNorm(channels, eps=1e-6) if wanted else nn.Identity()
