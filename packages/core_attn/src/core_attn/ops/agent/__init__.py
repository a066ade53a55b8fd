"""Agent attention: a few agent tokens read the keys for the queries, and the queries read the agents.

"Agent Attention: On the Integration of Softmax and Linear Attention" (S183). Shapes: B batch, H heads, L queries, M
keys, N agents, D channels of a head.
"""

from __future__ import annotations

import torch
from torch import Tensor

from core_attn.dispatch import Backend, Operator
from core_attn.ops.agent import reference
from core_attn.ops.agent.reference import agent_map
from core_attn.ops.arguments import check_qkv, default_scale, prepare_qkv

__all__ = ["OPERATOR", "agent_attention", "agent_map"]

OPERATOR = Operator("agent_attention", [Backend("torch", reference.run_linear), Backend("reference", reference.run)])


def agent_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    agents: Tensor,
    query_bias: Tensor | None = None,
    key_bias: Tensor | None = None,
    key_padding_mask: Tensor | None = None,
    scale: float | None = None,
    backend: str = "auto",
) -> Tensor:
    """softmax(s q Aᵀ + B2) softmax(s A kᵀ + B1) v: softmax attention twice, linear in L and M for N agents A.

    Scores and sums are float32 for 16-bit inputs, float64 for float64.

    Args:
        q: (B, H, L, D).
        k: (B, H, M, D).
        v: (B, H, M, Dv).
        agents: (B, H, N, D), N at least 1.
        query_bias: B2, broadcastable to (B, H, L, N).
        key_bias: B1, broadcastable to (B, H, N, M).
        key_padding_mask: (B, M) bool, True = real; the agents read no padding.
        scale: s, 1/√D by default.
        backend: "auto", "torch" (linear) or "reference" (O(L M)).

    Returns:
        (B, H, L, Dv), dtype of v. A sample without any key gives zeros.

    Raises:
        ValueError: shapes or dtypes that do not fit.
        BackendError: the backend cannot run.
        UnknownNameError: no such backend.
    """
    check_qkv(q, k, v, key_padding_mask)
    fits = (*q.shape[:2], agents.shape[2] if agents.dim() == 4 else 0, q.shape[3])
    if agents.shape != fits or k.shape[1] != q.shape[1] or not agents.shape[2]:
        raise ValueError(
            "agent_attention takes agents (B, H, N, D) with N > 0, and as many heads in k as in q, got agents "
            f"{tuple(agents.shape)}, q {tuple(q.shape)} and k {tuple(k.shape)}"
        )
    scale = default_scale(q, scale)
    q, k, v = prepare_qkv(q, k, v, key_padding_mask)
    dtype = torch.promote_types(v.dtype, torch.float32)
    with torch.autocast(q.device.type, enabled=False):
        out: Tensor = OPERATOR(
            q.to(dtype),
            k.to(dtype),
            v.to(dtype),
            agents=agents.to(dtype),
            query_bias=None if query_bias is None else query_bias.to(dtype),
            key_bias=None if key_bias is None else key_bias.to(dtype),
            key_padding_mask=key_padding_mask,
            scale=scale,
            backend=backend,
        )
    return out.to(v.dtype)
