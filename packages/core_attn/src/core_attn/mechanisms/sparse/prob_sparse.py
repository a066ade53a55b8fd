"""ProbSparse self-attention as a token mixer.

Informer: Beyond Efficient Transformer for Long Sequence Time-Series Forecasting (S83), section 3.1.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from core_attn import ops
from core_attn.contract import Growth, Pattern
from core_attn.einsums import Cascade
from core_attn.mechanisms.heads import MultiHeadMixer
from core_attn.naming import unknown
from core_attn.ops.prob_sparse import SELECTIONS, fixed_keys, sample_keys
from core_attn.ops.prob_sparse.reference import doubling_blocks, prob_sparse_map
from core_attn.ops.prob_sparse.sampling import budget
from core_attn.registry import register


@register(
    name="prob_sparse",
    title="Informer: Beyond Efficient Transformer for Long Sequence Time-Series Forecasting",
    source="S83",
    year=2021,
    patterns=frozenset({Pattern.NONCAUSAL_SELF, Pattern.NONCAUSAL_CROSS, Pattern.CAUSAL_SELF}),
    time=Growth.LOGLINEAR,
    memory=Growth.LOGLINEAR,
    maps=True,
    selects=True,
    stochastic=True,
    cascade=Cascade(
        einsums=(
            "S[b,h,l,u] = Q[b,h,l,d] * K[b,h,index[l,u],d]",
            "measure[b,h,l] = max[u] S[b,h,l,u] - S[b,h,l,u] / M",
            "chosen[b,h,a] = top[l] measure[b,h,l]",
            "T[b,h,a,m] = scale * Q[b,h,chosen[b,h,a],d] * K[b,h,m,d]",
            "A[b,h,a,m] = softmax[m] T[b,h,a,m]",
            "mean[b,h,d] = V[b,h,m,d] / M",
            "O[b,h,l,d] = mean[b,h,d]",
            "O[b,h,chosen[b,h,a],d] = A[b,h,a,m] * V[b,h,m,d]",
        ),
        # Sampled keys to choose, then largest score, sum of weights and values of the chosen queries.
        passes=4,
        flops="4*B*(L + M)*C**2 + 2*B*H*L*U*D + 4*B*H*P*D",
        bytes="E*(B*(2*L + X)*C + 4*C**2)",
        symbols={"U": "sampled keys that measure a query"},
    ),
)
class ProbSparseAttention(MultiHeadMixer):
    """The queries whose attention is far from uniform attend; the others read the mean of the values.

    How far a query is from uniform is measured on randomly sampled keys. They come from `generator` where forward is
    given one; else in train mode from torch's global generator, and in eval mode they are fixed, so that evaluation
    is deterministic (the paper's code draws there too).

    Args:
        dim, heads, causal, bias: see `MultiHeadMixer`.
        factor: c of the c ceil(ln L) sampled keys and attending queries.
        selection: which queries attend when causal. "causal" decides from the past; "paper" ranks all queries of the
            sequence, as the paper's decoder does, and so lets the future choose which of the past attend.
        backend: see `core_attn.ops.prob_sparse_attention`.
    """

    def __init__(
        self,
        dim: int,
        *,
        heads: int = 8,
        causal: bool = False,
        bias: bool = True,
        factor: int = 5,
        selection: str = "causal",
        backend: str = "auto",
    ) -> None:
        super().__init__(dim, heads=heads, causal=causal, bias=bias)
        if factor < 1:
            raise ValueError(f"factor must be a positive integer, got {factor}")
        if selection not in SELECTIONS:
            raise unknown("selection", selection, SELECTIONS)
        self.factor = factor
        self.selection = selection
        self.backend = backend

    def draw(self, q: Tensor, k: Tensor, generator: torch.Generator | None) -> Tensor:
        """The sampled keys (L, U)."""
        length, keys = q.shape[2], k.shape[2]
        prefix = self.causal and self.selection == "causal"
        if generator is None and not self.training:
            return fixed_keys(length, keys, factor=self.factor, prefix=prefix, device=q.device)
        return sample_keys(length, keys, factor=self.factor, prefix=prefix, generator=generator, device=q.device)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, *, key_padding_mask: Tensor | None, aux: Any) -> Tensor:
        return ops.prob_sparse_attention(
            q,
            k,
            v,
            causal=self.causal,
            factor=self.factor,
            selection=self.selection,
            index=aux,
            backend=self.backend,
        )

    def sizes(
        self, *, batch: int, length: int, context: int | None = None, grid: tuple[int, ...] | None = None
    ) -> dict[str, float]:
        sizes = super().sizes(batch=batch, length=length, context=context, grid=grid)
        keys, count = int(sizes["M"]), budget(length, self.factor)
        pairs = count * keys
        if self.causal and self.selection == "causal":
            pairs = sum(min(count, end - start) * end for start, end in doubling_blocks(length, count))
        return {**sizes, "U": budget(keys, self.factor), "P": pairs}

    def attention_map(self, q: Tensor, k: Tensor, *, key_padding_mask: Tensor | None, aux: Any) -> Tensor:
        return prob_sparse_map(q, k, index=aux, causal=self.causal, factor=self.factor, selection=self.selection)
