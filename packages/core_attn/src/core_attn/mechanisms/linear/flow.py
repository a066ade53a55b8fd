"""Flow-Attention as a token mixer.

Flowformer: Linearizing Transformers with Conservation Flows (S217), section 3.2.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from core_attn import ops
from core_attn.contract import Growth, Pattern
from core_attn.einsums import Cascade
from core_attn.mechanisms.heads import MultiHeadMixer
from core_attn.ops.flow import FlowState, flow_attention_step
from core_attn.ops.flow.chunked import chunk_length
from core_attn.ops.flow.reference import flow_map
from core_attn.registry import register


@register(
    name="flow",
    title="Flowformer: Linearizing Transformers with Conservation Flows",
    source="S217",
    year=2022,
    patterns=frozenset({Pattern.NONCAUSAL_SELF, Pattern.NONCAUSAL_CROSS, Pattern.CAUSAL_SELF}),
    time=Growth.LINEAR,
    memory=Growth.LINEAR,
    decodes=True,
    constant_state=True,
    padding=True,
    maps=True,
    cascade=Cascade(
        einsums=(
            "P[b,h,l,d] = sigmoid(Q[b,h,l,d])",
            "R[b,h,m,d] = sigmoid(K[b,h,m,d])",
            "keys[b,h,d] = R[b,h,m,d]",
            "queries[b,h,d] = P[b,h,l,d]",
            "incoming[b,h,l] = P[b,h,l,d] * keys[b,h,d]",
            "outgoing[b,h,m] = R[b,h,m,d] * queries[b,h,d]",
            "out_keys[b,h,d] = R[b,h,m,d] / outgoing[b,h,m]",
            "in_queries[b,h,d] = P[b,h,l,d] / incoming[b,h,l]",
            "sink[b,h,l] = P[b,h,l,d] * out_keys[b,h,d]",
            "source[b,h,m] = R[b,h,m,d] * in_queries[b,h,d]",
            "C[b,h,m] = M * softmax[m] source[b,h,m]",
            "Z[b,h,d,e] = R[b,h,m,d] * C[b,h,m] * V[b,h,m,e]",
            "Y[b,h,l,e] = P[b,h,l,d] * Z[b,h,d,e]",
            "O[b,h,l,e] = sigmoid(L / M * sink[b,h,l]) * Y[b,h,l,e] / incoming[b,h,l]",
        ),
        # The source of a key needs the sum over all keys first.
        passes=2,
        flops="4*B*(L + M)*C**2 + 2*B*H*(L + M)*D**2 + F*B*H*(L + M)*D + 4*B*H*L*T*D",
        bytes="E*(B*(2*L + X)*C + 4*C**2)",
        symbols={
            "F": "4 where the flows are products of matrices (noncausal), 0 where they are running sums (causal)",
            "T": "keys of its chunk that a query meets in the causal form, 0 in the noncausal",
        },
    ),
)
class FlowAttention(MultiHeadMixer):
    """Attention as a flow network: keys compete for the outflow, queries share out the inflow, in linear time.

    Padded tokens are neither sources nor, in self attention, sinks.

    Args:
        dim, heads, causal, bias: see `MultiHeadMixer`.
        clamp: limit the conserved source to [-1, 1]. The paper's core, language and vision code does (the default
            here); its time-series code does not.
        eps: added to both factors of every flow.
        backend: see `core_attn.ops.flow_attention`.
    """

    def __init__(
        self,
        dim: int,
        *,
        heads: int = 8,
        causal: bool = False,
        bias: bool = True,
        clamp: bool = True,
        eps: float = 1e-6,
        backend: str = "auto",
    ) -> None:
        super().__init__(dim, heads=heads, causal=causal, bias=bias)
        self.clamp = clamp
        self.eps = eps
        self.backend = backend

    def side_input(
        self,
        q: Tensor,
        k: Tensor,
        *,
        x: Tensor,
        query_padding_mask: Tensor | None,
        grid: tuple[int, ...] | None,
        generator: torch.Generator | None,
    ) -> Tensor | None:
        """Padded queries must be known, for every query takes part in what the keys compete for."""
        return query_padding_mask

    def attend(self, q: Tensor, k: Tensor, v: Tensor, *, key_padding_mask: Tensor | None, aux: Any) -> Tensor:
        return ops.flow_attention(
            q,
            k,
            v,
            causal=self.causal,
            clamp=self.clamp,
            eps=self.eps,
            key_padding_mask=key_padding_mask,
            query_padding_mask=aux,
            backend=self.backend,
        )

    def attention_map(self, q: Tensor, k: Tensor, *, key_padding_mask: Tensor | None, aux: Any) -> Tensor:
        return flow_map(
            q,
            k,
            causal=self.causal,
            clamp=self.clamp,
            eps=self.eps,
            key_padding_mask=key_padding_mask,
            query_padding_mask=aux,
        )

    def sizes(
        self, *, batch: int, length: int, context: int | None = None, grid: tuple[int, ...] | None = None
    ) -> dict[str, float]:
        sizes = super().sizes(batch=batch, length=length, context=context, grid=grid)
        chunk = chunk_length(length, self.head_dim) if self.causal else 0
        return {**sizes, "F": 0 if self.causal else 4, "T": chunk}

    def init_state(
        self, batch: int, *, device: torch.device | None = None, dtype: torch.dtype | None = None
    ) -> FlowState:
        if not self.causal:
            return super().init_state(batch, device=device, dtype=dtype)
        return FlowState.empty(batch, self.heads, self.head_dim, self.head_dim, device=device, dtype=dtype)

    def step(self, x: Tensor, state: FlowState) -> tuple[Tensor, FlowState]:
        if not self.causal:
            return super().step(x, state)
        self.check_inputs(x)
        q, k, v = (self.split_heads(project(x)) for project in (self.q_proj, self.k_proj, self.v_proj))
        out, state = flow_attention_step(q, k, v, state, clamp=self.clamp, eps=self.eps)
        return self.out_proj(self.merge_heads(out)), state
