"""Kernelised attention by its definition: the whole matrix of products of features.

"Transformers are RNNs: Fast Autoregressive Transformers with Linear Attention" (2020), eq. 4-9.
"""

from __future__ import annotations

import torch
from torch import Tensor


def products(q: Tensor, k: Tensor, *, causal: bool, key_padding_mask: Tensor | None) -> Tensor:
    """(B, H, L, M) products of the features, zero where a query may not read."""
    found = q @ k.mT
    if causal:
        found = found.tril(k.shape[2] - q.shape[2])
    if key_padding_mask is not None:
        found = found.masked_fill(~key_padding_mask[:, None, None], 0.0)
    return found


def kernel_map(
    q_features: Tensor,
    k_features: Tensor,
    *,
    causal: bool = False,
    normalize: bool = True,
    key_padding_mask: Tensor | None = None,
    eps: float = 1e-12,
) -> Tensor:
    """(B, H, L, M) matrix A with `kernel_attention(q_features, k_features, v) = A @ v`."""
    weights = products(q_features, k_features, causal=causal, key_padding_mask=key_padding_mask)
    return weights / (weights.sum(-1, keepdim=True) + eps) if normalize else weights


def run(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool,
    normalize: bool,
    eps: float,
    key_padding_mask: Tensor | None,
    initial_state: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Arguments as `core_attn.ops.kernel_attention` hands them on -> outputs and state."""
    if normalize:
        v = torch.cat([v, v.new_ones(*v.shape[:3], 1)], dim=-1)
    if key_padding_mask is not None:
        k = k.masked_fill(~key_padding_mask[:, None, :, None], 0.0)
    state = k.mT @ v
    read = products(q, k, causal=causal, key_padding_mask=key_padding_mask) @ v
    if initial_state is not None:
        state, read = state + initial_state, read + q @ initial_state
    if normalize:
        read = read[..., :-1] / (read[..., -1:] + eps)
    return read, state
