"""The definition of softmax attention: every score is written down. O(L·M) time and memory, exact in float64."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from core_attn.dispatch import Request


def allowed(
    q: Tensor,
    k: Tensor,
    *,
    causal: bool,
    mask: Tensor | None,
    key_padding_mask: Tensor | None,
    window: tuple[int | None, int | None] | None,
) -> Tensor | None:
    """Which keys may be read: bool, 4-D, broadcastable to (B, H, L, M); None where all may."""
    keep = mask
    if key_padding_mask is not None:
        padding = key_padding_mask[:, None, None, :]
        keep = padding if keep is None else keep & padding
    if causal or window is not None:
        left, right = window or (None, None)
        query = torch.arange(q.shape[2], device=q.device)[:, None] + (k.shape[2] - q.shape[2])
        distance = torch.arange(k.shape[2], device=q.device) - query
        if causal:
            band = distance <= 0
        elif right is not None:
            band = distance <= right
        else:
            band = torch.ones_like(distance, dtype=torch.bool)
        if left is not None:
            band = band & (distance >= -left)
        keep = band[None, None] if keep is None else keep & band
    return keep


def scores(
    q: Tensor,
    k: Tensor,
    *,
    causal: bool,
    mask: Tensor | None,
    bias: Tensor | None,
    key_padding_mask: Tensor | None,
    window: tuple[int | None, int | None] | None,
    scale: float,
) -> Tensor:
    """q kᵀ · scale + bias, -inf where reading is not allowed: (B, H, L, M), at least float32."""
    q, k = _precise(q), _precise(k)
    k = k.repeat_interleave(q.shape[1] // k.shape[1], dim=1) if k.shape[1] else k
    result = q @ k.transpose(-1, -2) * scale
    if bias is not None:
        result = result + bias
    keep = allowed(q, k, causal=causal, mask=mask, key_padding_mask=key_padding_mask, window=window)
    return result if keep is None else result.masked_fill(~keep, float("-inf"))


def weights(scores: Tensor) -> Tensor:
    """softmax over the keys; a row that is -inf throughout gives zeros, with zero gradients."""
    empty = (scores == float("-inf")).all(dim=-1, keepdim=True)
    return torch.softmax(scores.masked_fill(empty, 0.0), dim=-1).masked_fill(empty, 0.0)


def run(q: Tensor, k: Tensor, v: Tensor, *, dropout: float, **options: Any) -> Tensor:
    """softmax(q kᵀ · scale + bias) v as it stands in the paper, eq. 1; options as `scores` takes them."""
    with torch.autocast(q.device.type, enabled=False):
        p = weights(scores(q, k, **options))
        if dropout:
            p = F.dropout(p, dropout)
        v = v.repeat_interleave(q.shape[1] // v.shape[1], dim=1) if v.shape[1] else v
        return (p @ _precise(v)).to(q.dtype)


def pass_over(request: Request) -> str | None:
    return "the definition, which writes every score down; for checking and reading maps"


def _precise(x: Tensor) -> Tensor:
    return x if x.dtype is torch.float64 else x.float()
