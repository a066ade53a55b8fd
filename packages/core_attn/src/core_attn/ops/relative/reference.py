"""The definition of relative attention: the embedding of every pair is written down, O(L·M·D)."""

from __future__ import annotations

import torch
from torch import Tensor

from core_attn.dispatch import Request
from core_attn.ops.softmax import reference as softmax


def scores(
    q: Tensor,
    k: Tensor,
    *,
    relative: Tensor,
    causal: bool,
    key_padding_mask: Tensor | None,
    scale: float,
) -> Tensor:
    """(q kᵀ + q · relative[i - j]) · scale, -inf where reading is not allowed: (B, H, L, M), at least float32."""
    queries, keys = q.shape[2], k.shape[2]
    position = torch.arange(queries, device=q.device)[:, None] + (keys - queries)
    distance = position - torch.arange(keys, device=q.device)
    smallest = 0 if causal else -(relative.shape[1] // 2)
    row = (distance - smallest).clamp(0, relative.shape[1] - 1)
    wide = q if q.dtype is torch.float64 else q.float()
    added = torch.einsum("bhld,hlmd->bhlm", wide, relative.to(wide.dtype)[:, row].expand(q.shape[1], -1, -1, -1))
    return softmax.scores(
        q,
        k,
        causal=causal,
        mask=None,
        bias=added * scale,
        key_padding_mask=key_padding_mask,
        window=None,
        scale=scale,
    )


def run(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    relative: Tensor,
    causal: bool,
    key_padding_mask: Tensor | None,
    scale: float,
) -> Tensor:
    """softmax((q kᵀ + q · relative[i - j]) · scale) v; arguments as `core_attn.ops.relative_attention` gives them."""
    with torch.autocast(q.device.type, enabled=False):
        p = softmax.weights(
            scores(q, k, relative=relative, causal=causal, key_padding_mask=key_padding_mask, scale=scale)
        )
        v = v.repeat_interleave(q.shape[1] // v.shape[1], dim=1) if v.shape[1] else v
        return (p @ v.to(p.dtype)).to(q.dtype)


def pass_over(request: Request) -> str | None:
    return "the definition, which gathers an embedding for every pair; for checking and reading maps"
