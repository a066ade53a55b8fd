"""Softmax attention with a learned embedding of every distance in its scores, in every form this library has of it.

"Music Transformer" (S114), section 3.4. Shapes: B batch, H query heads, Hkv key heads, L queries, M keys, D channels of
a head, Dv channels of a value, R distances.
"""

from __future__ import annotations

from torch import Tensor

from core_attn.dispatch import Backend, Operator
from core_attn.ops.arguments import check_qkv, default_scale, prepare_qkv
from core_attn.ops.relative import blocked, reference

OPERATOR = Operator(
    "relative_attention",
    [
        Backend("torch", blocked.run),
        Backend("reference", reference.run, pass_over=reference.pass_over),
    ],
)


def relative_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    relative: Tensor,
    causal: bool = False,
    key_padding_mask: Tensor | None = None,
    scale: float | None = None,
    backend: str = "auto",
) -> Tensor:
    """softmax((q kᵀ + S) · scale) v with S[i, j] = q[i] · relative[distance of i and j], eq. 3.

    Query i stands at position i + M - L, so that the last query is aligned with the last key (lower right). Distances
    beyond the last embedding use the last one. A query that may read no key gives zeros, with zero gradients.

    Args:
        q: (B, H, L, D), floating point.
        k: (B, Hkv, M, D); Hkv divides H, and query heads g·H/Hkv … read key head g.
        v: (B, Hkv, M, Dv).
        relative: (H, R, D) with `causal`, for the distances 0 … R - 1 of a key before the query; else (H, 2R - 1, D)
            for the distances -(R - 1) … R - 1, negative where the key comes after the query. H may be 1: one table for
            all heads. Floating point, differentiable.
        causal: a query reads the keys up to its own position.
        key_padding_mask: (B, M) bool, True = real token. Keys and values under False never matter, NaN there included.
        scale: factor of the scores; 1/√D by default.
        backend: "auto", "torch" (blocked, memory linear in L and M) or "reference".

    Returns:
        (B, H, L, Dv), dtype of q (under autocast, of autocast).

    Raises:
        ValueError: shapes or dtypes that do not fit.
        BackendError: the backend asked for cannot run for these inputs, and why.
        UnknownNameError: no such backend.
    """
    check_qkv(q, k, v, key_padding_mask)
    if relative.dim() != 3 or relative.shape[0] not in (1, q.shape[1]) or relative.shape[2] != q.shape[3]:
        raise ValueError(
            f"relative must have shape (H or 1, distances, D) with H = {q.shape[1]} and D = {q.shape[3]}, "
            f"got {tuple(relative.shape)}"
        )
    if not relative.is_floating_point():
        raise ValueError(f"relative must be floating point, got {relative.dtype}")
    if relative.shape[1] == 0 or (not causal and relative.shape[1] % 2 == 0):
        raise ValueError(
            "relative must hold R >= 1 distances when causal and else 2R - 1, from -(R - 1) to R - 1, "
            f"got {relative.shape[1]} with causal={causal}"
        )
    q, k, v = prepare_qkv(q, k, v, key_padding_mask)
    out: Tensor = OPERATOR(
        q,
        k,
        v,
        relative=relative,
        causal=causal,
        key_padding_mask=key_padding_mask,
        scale=default_scale(q, scale),
        backend=backend,
    )
    return out
