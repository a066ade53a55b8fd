"""MossFormer's attention: quadratic in groups of tokens, linear over all tokens, with a triple gate.

"MossFormer: Pushing the Performance Limit of Monaural Speech Separation Using Gated Single-Head Transformer with
Convolution-Augmented Joint Self-Attentions" (S72), sections 2.2 and 2.3.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from core_attn import ops
from core_attn.contract import Growth, Pattern, TokenMixer
from core_attn.einsums import Cascade
from core_attn.ops.joint.reference import joint_map
from core_attn.positions.rotary import rotary
from core_attn.registry import register


@register(
    name="joint",
    title="MossFormer: Pushing the Performance Limit of Monaural Speech Separation Using Gated Single-Head Transformer "
    "with Convolution-Augmented Joint Self-Attentions",
    source="S72",
    year=2023,
    patterns=frozenset({Pattern.NONCAUSAL_SELF, Pattern.CAUSAL_SELF}),
    time=Growth.LINEAR,
    memory=Growth.LINEAR,
    padding=True,
    maps=True,
    double_backward=False,
    operator="joint_attention",
    cascade=Cascade(
        einsums=(
            "Z[b,h,l,d] = silu(X[b,l,c] * W[c,h,d])",
            "Q[n,b,h,l,d] = rotate(gamma[n,h,d] * Z[b,h,l,d] + beta[n,h,d])",
            "V[b,h,l,e] = silu(X[b,l,c] * W[c,h,e])",
            "A[b,h,l,m] = relu(Q[0,b,h,l,d] * Q[2,b,h,m,d] / group)**2",
            "S[b,h,d,e] = Q[3,b,h,m,d] * V[b,h,m,e] / M",
            "Y[b,h,l,e] = A[b,h,l,m] * V[b,h,m,e] + Q[1,b,h,l,d] * S[b,h,d,e]",
            "O[b,l,e] = Y[b,l,u(e)] * V[b,l,v(e)] * sigmoid(Y[b,l,v(e)] * V[b,l,u(e)])",
        ),
        passes=1,
        flops="2*B*L*C*(C + 3*N*C) + 2*B*H*P*(D + 2*N*D) + 8*B*H*L*N*D**2",
        bytes="E*(2*B*L*C + (1 + 3*N)*C**2)",
        symbols={"N": "width of the values and of the gates in channels of the tokens"},
    ),
)
class JointAttention(TokenMixer):
    """out = W (u' ⊙ v) ⊙ σ(v' ⊙ u) with v', u' read by one map from v, u: `core_attn.ops.joint_attention`.

    Queries and keys of both parts are four scaled and shifted copies of one projection z, turned by rotary embedding.
    The paper has one head, projections that end in a depthwise convolution, and `expansion` 2; its network is
    `mossformer` of the speech application.

    Args:
        dim: channels C.
        heads: number of heads H; must divide dim. Each has its own z of C / H channels.
        causal: see `TokenMixer`.
        group: P, tokens of a group; 256 in the paper.
        expansion: width of v and of u is expansion · C.
        rotary_channels: how many channels of a query or key turn, at most; even.
        dropout: probability of dropping a weight of the quadratic part.
        backend: see `core_attn.ops.joint_attention`.

    Raises:
        ValueError: an option out of its range.
    """

    def __init__(
        self,
        dim: int,
        *,
        heads: int = 1,
        causal: bool = False,
        group: int = 256,
        expansion: int = 1,
        rotary_channels: int = 32,
        dropout: float = 0.0,
        backend: str = "auto",
    ) -> None:
        super().__init__(dim, causal=causal)
        if heads < 1 or dim % heads:
            raise ValueError(f"heads must divide dim, got dim={dim} and heads={heads}")
        for name, value in (("group", group), ("expansion", expansion)):
            if value < 1:
                raise ValueError(f"{name} must be a positive integer, got {value}")
        if rotary_channels < 0 or rotary_channels % 2:
            raise ValueError(f"rotary_channels must be an even number of channels, got {rotary_channels}")
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout must lie in [0, 1), got {dropout}")
        self.heads, self.head_dim, self.group, self.expansion = heads, dim // heads, group, expansion
        self.rotary_channels = min(rotary_channels, self.head_dim - self.head_dim % 2)
        self.dropout = dropout
        self.backend = backend
        self.qk_proj = nn.Linear(dim, dim)
        self.gamma = nn.Parameter(torch.empty(4, heads, 1, self.head_dim).normal_(std=0.02))
        self.beta = nn.Parameter(torch.zeros(4, heads, 1, self.head_dim))
        self.vu_proj = nn.Linear(dim, 2 * expansion * dim)
        self.out_proj = nn.Linear(expansion * dim, dim)

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
        if key_padding_mask is not None:  # 0 * NaN is NaN, so masking later could not stop a NaN under the mask
            x = x.masked_fill(~key_padding_mask.unsqueeze(-1), 0.0)
        z = F.silu(self.qk_proj(x)).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        copies = z * self.gamma.unsqueeze(1) + self.beta.unsqueeze(1)  # (4, B, H, L, D)
        if self.rotary_channels:
            at = torch.arange(x.shape[1], device=x.device)
            copies = rotary(copies.flatten(0, 1), at, channels=self.rotary_channels, interleaved=True).view_as(copies)
        quad_q, lin_q, quad_k, lin_k = copies.unbind()
        # A head's v and u lie side by side.
        vu = F.silu(self.vu_proj(x)).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        out = ops.joint_attention(
            quad_q,
            quad_k,
            vu,
            lin_q=lin_q,
            lin_k=lin_k,
            group=self.group,
            causal=self.causal,
            key_padding_mask=key_padding_mask,
            dropout=self.dropout if self.training else 0.0,
            backend=self.backend,
        )
        if self._tap is not None:
            q, k = torch.cat([quad_q, lin_q], dim=-1), torch.cat([quad_k, lin_k], dim=-1)
            out = self._tap(self, q, k, vu, out, key_padding_mask, None)
        v, u = vu.chunk(2, dim=-1)
        read_v, read_u = out.chunk(2, dim=-1)
        gated = read_u * v * torch.sigmoid(read_v * u)
        return self.out_proj(gated.transpose(1, 2).flatten(-2))

    def attention_map(self, q: Tensor, k: Tensor, *, key_padding_mask: Tensor | None, aux: None) -> Tensor:
        """(B, H, L, L), of the queries and keys of both parts side by side (B, H, L, 2 D)."""
        share = k.new_full(k.shape[:1], 1.0 / max(1, k.shape[2]), dtype=torch.promote_types(k.dtype, torch.float32))
        if key_padding_mask is not None:
            k = k.masked_fill(~key_padding_mask[:, None, :, None], 0.0)
            share = key_padding_mask.sum(1).clamp(min=1).to(share.dtype).reciprocal()
        (quad_q, lin_q), (quad_k, lin_k) = q.chunk(2, dim=-1), k.chunk(2, dim=-1)
        return joint_map(quad_q, quad_k, lin_q=lin_q, lin_k=lin_k, share=share, group=self.group, causal=self.causal)

    def sizes(
        self, *, batch: int, length: int, context: int | None = None, grid: tuple[int, ...] | None = None
    ) -> dict[str, float]:
        sizes = super().sizes(batch=batch, length=length, context=context, grid=grid)
        whole, rest = divmod(length, self.group)
        # Where causal, half of a group's square is computed only to be masked.
        return sizes | {"N": self.expansion, "P": whole * self.group**2 + rest**2}

    def extra_repr(self) -> str:
        return f"heads={self.heads}, causal={self.causal}, group={self.group}, expansion={self.expansion}"
