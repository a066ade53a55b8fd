"""TransNormer: linear attention that is normalised after the sum, and softmax in blocks for the early layers.

"The Devil in Linear Transformer" (S101), section 4.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from core_attn import ops
from core_attn.contract import Growth, Pattern
from core_attn.einsums import Cascade
from core_attn.mechanisms.heads import MultiHeadMixer
from core_attn.naming import unknown
from core_attn.ops.kernel import chunk_length, kernel_map
from core_attn.ops.softmax import reference as softmax_reference
from core_attn.ops.softmax import softmax_attention
from core_attn.registry import register

VARIANTS = ("t1", "t2")


class BlockState(NamedTuple):
    """The tokens so far of the block that the next token belongs to, in constant memory.

    Attributes:
        tokens: (2, B, H, block, D) keys and values; what is not filled yet is zeros.
        filled: how many there are.
    """

    tokens: Tensor
    filled: int


@register(
    name="transnormer",
    title="The Devil in Linear Transformer",
    source="S101",
    year=2022,
    patterns=frozenset({Pattern.NONCAUSAL_SELF, Pattern.CAUSAL_SELF}),
    time=Growth.LINEAR,
    memory=Growth.LINEAR,
    decodes=True,
    constant_state=True,
    padding=True,
    maps=True,
    double_backward=False,
    operator="kernel_attention",
    cascade=Cascade(
        einsums=(
            "P[b,h,l,d] = elu(Q[b,h,l,d]) + 1",
            "R[b,h,m,d] = elu(K[b,h,m,d]) + 1",
            "S[b,h,d,e] = R[b,h,m,d] * V[b,h,m,e]",
            "Y[b,h,l,e] = P[b,h,l,d] * S[b,h,d,e]",
            "r[b,l] = sqrt(Y[b,l,c]**2 / C)",
            "O[b,l,c] = Y[b,l,c] / r[b,l]",
        ),
        passes=1,
        flops="8*B*L*C**2 + 4*B*H*L*(R + T)*D",
        bytes="E*(2*B*L*C + 4*C**2)",
        symbols={
            "R": "rows of the state that a query reads: D, 0 in blocks",
            "T": "keys that a query meets one by one: of its block, or of its chunk where causal, else 0",
        },
    ),
)
class TransNormerAttention(MultiHeadMixer):
    """RMSNorm(φ(Q) (φ(K)ᵀ V)) without a denominator: NormAttention; with `diagonal`, attention within blocks of tokens.

    The denominator of linear attention is what makes its gradients unbounded; a norm of the output takes its place
    (section 4.1). Early layers of a TransNormer are diagonal, which keeps attention on the neighbouring tokens; later
    ones are not (section 4.2). The norm goes over all heads' channels, has no weights and is part of the module.

    Args:
        dim, heads, causal, bias: see `MultiHeadMixer`.
        diagonal: DiagAttention in place of NormAttention: each token reads the tokens of its own block.
        block: tokens of such a block, the last one may be shorter; 64 in the paper.
        variant: "t2", φ = 1 + elu and softmax in blocks; "t1", φ = elu and, in blocks, relu(q kᵀ/√D) with the norm.
        eps: added to the root mean square.
        backend: see `core_attn.ops.kernel_attention`; blocks have a single form.

    Raises:
        ValueError: an option out of its range.
        UnknownNameError: no such variant.
    """

    def __init__(
        self,
        dim: int,
        *,
        heads: int = 8,
        causal: bool = False,
        bias: bool = True,
        diagonal: bool = False,
        block: int = 64,
        variant: str = "t2",
        eps: float = 1e-8,
        backend: str = "auto",
    ) -> None:
        super().__init__(dim, heads=heads, causal=causal, bias=bias)
        if block < 1:
            raise ValueError(f"block must be a positive integer, got {block}")
        if variant not in VARIANTS:
            raise unknown("variant", variant, VARIANTS)
        self.diagonal = diagonal
        self.block = block
        self.variant = variant
        self.eps = eps
        self.backend = backend

    def features(self, x: Tensor) -> Tensor:
        """φ(x), in float32 at least."""
        # In memory as it is in shape: torch.compile expects another layout of elu's gradient than it has otherwise.
        found = F.elu(x.to(torch.promote_types(x.dtype, torch.float32)).contiguous())
        return found + 1 if self.variant == "t2" else found

    def attend(self, q: Tensor, k: Tensor, v: Tensor, *, key_padding_mask: Tensor | None, aux: Any) -> Tensor:
        if self.diagonal:
            return self._in_blocks(q, k, v, key_padding_mask)
        q, k = self.features(q), self.features(k)
        read = ops.kernel_attention(
            q,
            k,
            v.to(q.dtype),
            causal=self.causal,
            normalize=False,
            key_padding_mask=key_padding_mask,
            backend=self.backend,
        )
        assert isinstance(read, Tensor)
        # Sums over many tokens: the norm comes before they are rounded to 16 bits.
        return read

    def _in_blocks(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        length = q.shape[2]
        whole = length - length % self.block
        out = []
        for start, stop, size in ((0, whole, self.block), (whole, length, length - whole)):
            if start < stop:
                count = (stop - start) // size
                cut = [x[:, :, start:stop].unflatten(2, (count, size)).transpose(1, 2).flatten(0, 1) for x in (q, k, v)]
                real = None if mask is None else mask[:, start:stop].unflatten(1, (count, size)).flatten(0, 1)
                out.append(
                    self._block(cut[0], cut[1], cut[2], real).unflatten(0, (-1, count)).transpose(1, 2).flatten(2, 3)
                )
        return torch.cat(out, dim=2) if out else v

    def _block(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        if self.variant == "t2":
            return softmax_attention(q, k, v, causal=self.causal, key_padding_mask=mask)
        scores = F.relu(q @ k.mT * self.head_dim**-0.5)
        scores = scores.tril() if self.causal else scores
        return (scores if mask is None else scores * mask[:, None, None]) @ v

    def attention_map(self, q: Tensor, k: Tensor, *, key_padding_mask: Tensor | None, aux: Any) -> Tensor:
        if not self.diagonal:
            q, k = self.features(q), self.features(k)
            return kernel_map(q, k, causal=self.causal, normalize=False, key_padding_mask=key_padding_mask)
        precise = torch.promote_types(q.dtype, torch.float32)
        scores = q.to(precise) @ k.to(precise).mT * self.head_dim**-0.5
        at = torch.arange(q.shape[2], device=q.device) // self.block
        keep = at[:, None] == at
        keep = keep.tril() if self.causal else keep
        if key_padding_mask is not None:
            keep = keep & key_padding_mask[:, None, None]
        if self.variant == "t1":
            return F.relu(scores) * keep
        return softmax_reference.weights(scores.masked_fill(~keep, -torch.inf))

    def finish(self, out: Tensor, *, x: Tensor, v: Tensor, grid: tuple[int, ...] | None) -> Tensor:
        if not self.diagonal or self.variant == "t1":
            out = out.to(torch.promote_types(out.dtype, torch.float32))
            # A vector of zeros has no direction: the root of the sum of squares would give its gradient as NaN.
            out = out / (torch.linalg.vector_norm(out, dim=-1, keepdim=True) * self.dim**-0.5 + self.eps)
        return out.to(x.dtype)

    def sizes(
        self, *, batch: int, length: int, context: int | None = None, grid: tuple[int, ...] | None = None
    ) -> dict[str, float]:
        sizes = super().sizes(batch=batch, length=length, context=context, grid=grid)
        if self.diagonal:
            return sizes | {"R": 0, "T": min(self.block, length)}
        return sizes | {"R": self.head_dim, "T": chunk_length(length) if self.causal else 0}

    def init_state(
        self, batch: int, *, device: torch.device | None = None, dtype: torch.dtype | None = None
    ) -> Tensor | BlockState:
        """(B, H, D, D) zeros, the sum of features times values; with `diagonal`, an empty block.

        Raises:
            ValueError: this module is not causal.
        """
        if not self.causal:
            raise ValueError("transnormer decodes token by token only when it is built with causal=True")
        weight = self.k_proj.weight
        device, dtype = device or weight.device, dtype or weight.dtype
        if self.diagonal:
            tokens = torch.zeros(2, batch, self.heads, self.block, self.head_dim, device=device, dtype=dtype)
            return BlockState(tokens, 0)
        shape = (batch, self.heads, self.head_dim, self.head_dim)
        return torch.zeros(shape, device=device, dtype=torch.promote_types(dtype, torch.float32))

    def step(self, x: Tensor, state: Tensor | BlockState) -> tuple[Tensor, Tensor | BlockState]:
        self.check_inputs(x)
        q, k, v = (self.split_heads(project(x)) for project in (self.q_proj, self.k_proj, self.v_proj))
        if isinstance(state, BlockState):
            tokens, held = state
            both = torch.cat([tokens[:, :, :, :held].to(k.dtype), torch.stack([k, v])], dim=3)
            # What is held begins with a block; its tokens have had their answers, so that any query stands in for
            # theirs.
            out = self._in_blocks(F.pad(q, (0, 0, held, 0)), both[0], both[1], None)[:, :, held:]
            count = both.shape[3] % self.block
            rest = both[:, :, :, both.shape[3] - count :]
            state = BlockState(F.pad(rest, (0, 0, 0, self.block - count)).to(tokens.dtype), count)
        else:
            q, k = self.features(q), self.features(k)
            out, state = ops.kernel_step(q, k, v.to(q.dtype), state, normalize=False, backend=self.backend)
        return self.out_proj(self.finish(self.merge_heads(out), x=x, v=v, grid=None)), state

    def extra_repr(self) -> str:
        given = f"heads={self.heads}, causal={self.causal}, variant={self.variant!r}"
        return given + (f", block={self.block}" if self.diagonal else "")
