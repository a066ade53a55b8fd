"""The definition of efficient attention: its map of L × M is written down."""

from __future__ import annotations

import torch
from torch import Tensor


def efficient_map(q: Tensor, k: Tensor, *, key_padding_mask: Tensor | None = None) -> Tensor:
    """ρ_q(q) ρ_k(k)ᵀ, (B, H, L, M); zeros for padding."""
    weights = torch.softmax(_precise(q), dim=-1) @ over_tokens(_precise(k), key_padding_mask).mT
    return weights.to(q.dtype)


def over_tokens(k: Tensor, key_padding_mask: Tensor | None) -> Tensor:
    """softmax of keys (B, H, M, D) over the M tokens; zeros for padding, and where a sample is all padding."""
    if key_padding_mask is None:
        return torch.softmax(k, dim=-2)
    padding = ~key_padding_mask[:, None, :, None]
    return torch.softmax(k.masked_fill(padding, torch.finfo(k.dtype).min), dim=-2).masked_fill(padding, 0.0)


def run(q: Tensor, k: Tensor, v: Tensor, *, key_padding_mask: Tensor | None) -> Tensor:
    """(ρ_q(q) ρ_k(k)ᵀ) v from the left."""
    weights = torch.softmax(_precise(q), dim=-1) @ over_tokens(_precise(k), key_padding_mask).mT
    return (weights @ _precise(v)).to(v.dtype)


def _precise(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))
