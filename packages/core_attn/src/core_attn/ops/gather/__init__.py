"""Softmax attention in which each query names the keys it reads, in every form this library has of it.

Shapes: B batch, H query heads, Hkv key heads, L queries, M keys, S keys that a query reads, D channels of a head, Dv
channels of a value.
"""

from __future__ import annotations

import torch
from torch import Tensor

from core_attn.dispatch import Backend, Operator
from core_attn.ops.arguments import check_qkv, default_scale, prepare_qkv
from core_attn.ops.gather import blocked, reference

OPERATOR = Operator(
    "gather_attention",
    [
        Backend("torch", blocked.run),
        Backend("reference", reference.run, pass_over=reference.pass_over),
    ],
)


def gather_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    index: Tensor,
    causal: bool = False,
    key_padding_mask: Tensor | None = None,
    scale: float | None = None,
    backend: str = "auto",
) -> Tensor:
    """Each query reads the keys in its own list: softmax over s of (q · k[index[s]] · scale), times v[index[s]].

    Every entry of a list is one term of the softmax, so that a key named twice counts twice. Entries of -1 are empty;
    with `causal` so are those of keys after the query, which stands at position i + M - L (lower right). A query
    without keys gives zeros, with zero gradients.

    Args:
        q: (B, H, L, D), floating point.
        k: (B, Hkv, M, D); Hkv divides H, and query heads g·H/Hkv … read key head g.
        v: (B, Hkv, M, Dv).
        index: (B, H, L, S) int64, where B and H may be 1; each from -1 (none) to M - 1. Index data: no gradient flows
            into what chose it.
        causal: a query reads the keys up to its own position.
        key_padding_mask: (B, M) bool, True = real token. Keys and values under False never matter, NaN there included.
        scale: factor of the scores; 1/√D by default.
        backend: "auto", "torch" (memory linear in L, M and the lists) or "reference".

    Returns:
        (B, H, L, Dv), dtype of q (under autocast, of autocast).

    Raises:
        ValueError: shapes or dtypes that do not fit, or, on the CPU, an index out of range.
        BackendError: the backend asked for cannot run for these inputs, and why.
        UnknownNameError: no such backend.
    """
    check_qkv(q, k, v, key_padding_mask)
    if index.dtype is not torch.int64:
        raise ValueError(f"index must be int64, got {index.dtype}")
    if index.dim() != 4 or any(
        n not in (1, m) if axis < 2 else n != m for axis, (n, m) in enumerate(zip(index.shape[:3], q.shape[:3]))
    ):
        raise ValueError(
            f"index must have shape (B, H, L, S) with (B, H, L) = {tuple(q.shape[:3])}, got {tuple(index.shape)}"
        )
    # Reading values would stall an accelerator and break a graph.
    if index.device.type == "cpu" and index.numel() and not torch.compiler.is_compiling():
        low, high = index.aminmax()
        if low < -1 or high >= k.shape[2]:
            raise ValueError(f"index must lie from -1 (none) to M - 1 = {k.shape[2] - 1}, got {low} to {high}")
    q, k, v = prepare_qkv(q, k, v, key_padding_mask)
    out: Tensor = OPERATOR(
        q,
        k,
        v,
        index=index,
        causal=causal,
        key_padding_mask=key_padding_mask,
        scale=default_scale(q, scale),
        backend=backend,
    )
    return out
