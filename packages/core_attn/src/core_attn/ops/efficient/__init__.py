"""Efficient attention: queries normalised over their channels, keys over the tokens, so that products need no L × M.

"Efficient Attention: Attention with Linear Complexities" (2021), section 3.2; the token mixer of "TransDAE" (S29) and
of DAE-Former. Shapes: B batch, H heads, L queries, M keys, D channels of a head, Dv channels of a value.
"""

from __future__ import annotations

import torch
from torch import Tensor

from core_attn.dispatch import Backend, Operator
from core_attn.ops.arguments import check_qkv, prepare_qkv
from core_attn.ops.efficient import linear, reference
from core_attn.ops.efficient.linear import summarise
from core_attn.ops.efficient.reference import efficient_map

__all__ = ["OPERATOR", "efficient_attention", "efficient_map", "summarise"]

OPERATOR = Operator("efficient_attention", [Backend("torch", linear.run), Backend("reference", reference.run)])


def efficient_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    key_padding_mask: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """ρ_q(q) (ρ_k(k)ᵀ v) with ρ_q = softmax over the D channels of a query and ρ_k = softmax over the M keys, eq. 4.

    The weights of a query sum to 1 over the keys, as softmax attention's do. Sums are float32 for 16-bit inputs,
    float64 for float64.

    Args:
        q: (B, H, L, D), D at least 1.
        k: (B, H, M, D).
        v: (B, H, M, Dv).
        key_padding_mask: (B, M) bool, True = real. Keys and values under False never matter, NaN there included.
        backend: "auto", "torch" (time and memory linear in L and M; no gradients of gradients) or "reference" (O(L M)).

    Returns:
        (B, H, L, Dv), dtype of v (under autocast, of autocast). A sample without any key gives zeros.

    Raises:
        ValueError: shapes or dtypes that do not fit.
        BackendError: the backend cannot run.
        UnknownNameError: no such backend.
    """
    check_qkv(q, k, v, key_padding_mask)
    if k.shape[1] != q.shape[1] or not q.shape[3]:
        raise ValueError(
            "efficient_attention takes as many heads in k as in q, and at least one channel a head, got q "
            f"{tuple(q.shape)} and k {tuple(k.shape)}"
        )
    q, k, v = prepare_qkv(q, k, v, key_padding_mask)
    with torch.autocast(q.device.type, enabled=False):
        out: Tensor = OPERATOR(q, k, v, key_padding_mask=key_padding_mask, backend=backend)
    return out
