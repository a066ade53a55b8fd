"""Channel attention on tokens as projections leave them, channels last, so that nothing is transposed in memory."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def run(q: Tensor, k: Tensor, v: Tensor, *, temperature: Tensor | None) -> Tensor:
    """v softmax(τ q̂ᵀ k̂)ᵀ, arguments as `core_attn.ops.channel_attention` hands them on."""
    dtype = torch.promote_types(v.dtype, torch.float32)
    scores = F.normalize(q.to(dtype), dim=2).mT @ F.normalize(k.to(dtype), dim=2)
    if temperature is not None:
        scores = scores * temperature.to(dtype)[:, None, None]
    return (v.to(dtype) @ F.softmax(scores, dim=-1).mT).to(v.dtype)
