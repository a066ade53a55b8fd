"""The definition of channel attention: queries and keys of norm 1, their products, softmax, sum of channels."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def run(q: Tensor, k: Tensor, v: Tensor, *, temperature: Tensor | None) -> Tensor:
    """v softmax(τ q̂ᵀ k̂)ᵀ, channel by channel as it stands in the paper."""
    dtype = torch.promote_types(v.dtype, torch.float32)
    q, k, values = (x.to(dtype).mT for x in (q, k, v))  # channels first: (B, H, D, L)
    scores = F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).mT
    if temperature is not None:
        scores = scores * temperature.to(dtype)[:, None, None]
    return (torch.softmax(scores, dim=-1) @ values).mT.to(v.dtype)
