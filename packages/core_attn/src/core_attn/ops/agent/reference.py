"""Agent attention by its definition: both maps in full, and their product.

"Agent Attention: On the Integration of Softmax and Linear Attention" (S183), section 3.2, eq. 3-5.
"""

from __future__ import annotations

import torch
from torch import Tensor


def broadcast_map(q: Tensor, agents: Tensor, *, bias: Tensor | None, scale: float) -> Tensor:
    """(B, H, L, N) how each query reads the agents."""
    scores = q @ agents.mT * scale
    return torch.softmax(scores if bias is None else scores + bias, dim=-1)


def aggregate_map(
    agents: Tensor, k: Tensor, *, bias: Tensor | None, key_padding_mask: Tensor | None, scale: float
) -> Tensor:
    """(B, H, N, M) how each agent reads the keys; zeros where there is none."""
    scores = agents @ k.mT * scale
    scores = scores if bias is None else scores + bias
    if key_padding_mask is None:
        return torch.softmax(scores, dim=-1)
    padding = ~key_padding_mask[:, None, None]
    # The least finite number and not -inf: a sample without any key would otherwise have NaN gradients.
    return torch.softmax(scores.masked_fill(padding, torch.finfo(scores.dtype).min), dim=-1).masked_fill(padding, 0.0)


def agent_map(
    q: Tensor,
    k: Tensor,
    agents: Tensor,
    *,
    query_bias: Tensor | None = None,
    key_bias: Tensor | None = None,
    key_padding_mask: Tensor | None = None,
    scale: float,
) -> Tensor:
    """(B, H, L, M) matrix A with `agent_attention(q, k, v, agents=agents) = A @ v`."""
    read = broadcast_map(q, agents, bias=query_bias, scale=scale)
    return read @ aggregate_map(agents, k, bias=key_bias, key_padding_mask=key_padding_mask, scale=scale)


def run(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    agents: Tensor,
    query_bias: Tensor | None,
    key_bias: Tensor | None,
    key_padding_mask: Tensor | None,
    scale: float,
) -> Tensor:
    """Arguments as `core_attn.ops.agent_attention` hands them on; O(L M)."""
    weights = agent_map(
        q, k, agents, query_bias=query_bias, key_bias=key_bias, key_padding_mask=key_padding_mask, scale=scale
    )
    return weights @ v


def run_linear(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    agents: Tensor,
    query_bias: Tensor | None,
    key_bias: Tensor | None,
    key_padding_mask: Tensor | None,
    scale: float,
) -> Tensor:
    """As `run`, but the agents' values come first: O(N (L + M))."""
    values = aggregate_map(agents, k, bias=key_bias, key_padding_mask=key_padding_mask, scale=scale) @ v
    return broadcast_map(q, agents, bias=query_bias, scale=scale) @ values
