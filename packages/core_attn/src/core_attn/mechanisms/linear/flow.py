"""Flow-Attention as a token mixer.

Flowformer: Linearizing Transformers with Conservation Flows (S217), section 3.2.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from core_attn import ops
from core_attn.contract import Growth, Pattern
from core_attn.mechanisms.heads import MultiHeadMixer
from core_attn.ops.flow import FlowState, flow_attention_step
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
