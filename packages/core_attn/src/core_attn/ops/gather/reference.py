"""The definition of gather attention: the softmax over all keys, each as often as its query names it.

O(L·M) time and memory, exact in float64.
"""

from __future__ import annotations

import torch
from torch import Tensor

from core_attn.dispatch import Request
from core_attn.ops.softmax import reference


def counts(index: Tensor, keys: int) -> Tensor:
    """(B, H, L, S) lists -> (B, H, L, M): how often each query names each key."""
    named = torch.zeros(*index.shape[:3], keys + 1, dtype=torch.int64, device=index.device)
    # Empty entries are counted in a place of their own, which is cut off.
    named.scatter_add_(-1, index.masked_fill(index < 0, keys), torch.ones_like(index))
    return named[..., :keys]


def run(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    index: Tensor,
    causal: bool,
    key_padding_mask: Tensor | None,
    scale: float,
) -> Tensor:
    """A key named n times is a score raised by ln n; one that nobody names is masked."""
    named = counts(index, k.shape[2])
    return reference.run(
        q,
        k,
        v,
        causal=causal,
        mask=named > 0,
        bias=named.clamp(min=1).to(torch.float64 if q.dtype is torch.float64 else torch.float32).log(),
        key_padding_mask=key_padding_mask,
        window=None,
        scale=scale,
        dropout=0.0,
    )


def pass_over(request: Request) -> str | None:
    return "the definition, which writes every score down; for checking and reading maps"
