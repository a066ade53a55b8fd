"""The definition of clipped softmax attention: every weight is written down. O(L·M) time and memory."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from core_attn.dispatch import Request
from core_attn.ops.softmax import reference as softmax


def weights(
    q: Tensor,
    k: Tensor,
    *,
    gamma: float,
    zeta: float,
    causal: bool,
    key_padding_mask: Tensor | None,
    scale: float,
) -> Tensor:
    """clip((ζ - γ) · softmax(q kᵀ · scale) + γ, 0, 1): (B, H, L, M), at least float32."""
    p = softmax.weights(
        softmax.scores(
            q, k, causal=causal, mask=None, bias=None, key_padding_mask=key_padding_mask, window=None, scale=scale
        )
    )
    return ((zeta - gamma) * p + gamma).clamp(0.0, 1.0)


def run(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
    """clip((ζ - γ) · softmax(q kᵀ · scale) + γ, 0, 1) v as it stands in the paper; options as `weights` takes them."""
    with torch.autocast(q.device.type, enabled=False):
        p = weights(q, k, **options)
        v = v.repeat_interleave(q.shape[1] // v.shape[1], dim=1) if v.shape[1] else v
        return (p @ v.to(p.dtype)).to(q.dtype)


def pass_over(request: Request) -> str | None:
    return "the definition, which writes every weight down; for checking and reading maps"
