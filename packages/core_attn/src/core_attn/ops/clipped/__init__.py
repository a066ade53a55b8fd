"""Attention with weights that can be exactly zero or one: softmax, stretched and clipped, in every form of it here.

"Quantizable Transformers: Removing Outliers by Helping Attention Heads Do Nothing" (S222), section 4.1.

Shapes: B batch, H query heads, Hkv key heads, L queries, M keys, D channels of a head, Dv channels of a value.
"""

from __future__ import annotations

from torch import Tensor

from core_attn.dispatch import Backend, Operator
from core_attn.ops.arguments import check_qkv, default_scale, prepare_qkv
from core_attn.ops.clipped import blocked, reference

OPERATOR = Operator(
    "clipped_softmax_attention",
    [
        Backend("torch", blocked.run),
        Backend("reference", reference.run, pass_over=reference.pass_over),
    ],
)


def clipped_softmax_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    gamma: float,
    zeta: float = 1.0,
    causal: bool = False,
    key_padding_mask: Tensor | None = None,
    scale: float | None = None,
    backend: str = "auto",
) -> Tensor:
    """clip((ζ - γ) · softmax(q kᵀ · scale) + γ, 0, 1) v, eq. 4. The rows are not normalised again: they may sum to 0.

    Query i stands at position i + M - L, so that the last query is aligned with the last key (lower right). A query
    that may read no key gives zeros, with zero gradients.

    Args:
        q: (B, H, L, D), floating point.
        k: (B, Hkv, M, D); Hkv divides H, and query heads g·H/Hkv … read key head g.
        v: (B, Hkv, M, Dv).
        gamma: γ <= 0; weights of the softmax up to -γ / (ζ - γ) become 0.
        zeta: ζ >= 1; weights of the softmax from (1 - γ) / (ζ - γ) on become 1.
        causal: a query reads the keys up to its own position.
        key_padding_mask: (B, M) bool, True = real token. Keys and values under False never matter, NaN there included.
        scale: factor of the scores; 1/√D by default.
        backend: "auto", "torch" (blocked, memory linear in L and M) or "reference".

    Returns:
        (B, H, L, Dv), dtype of q (under autocast, of autocast).

    Raises:
        ValueError: shapes or dtypes that do not fit; γ above 0 or ζ below 1.
        BackendError: the backend asked for cannot run for these inputs, and why.
        UnknownNameError: no such backend.
    """
    check_qkv(q, k, v, key_padding_mask)
    check_stretch(gamma, zeta)
    q, k, v = prepare_qkv(q, k, v, key_padding_mask)
    out: Tensor = OPERATOR(
        q,
        k,
        v,
        gamma=gamma,
        zeta=zeta,
        causal=causal,
        key_padding_mask=key_padding_mask,
        scale=default_scale(q, scale),
        backend=backend,
    )
    return out


def check_stretch(gamma: float, zeta: float) -> None:
    """Refuse limits that would give weight to keys that may not be read, or none to a row's only key.

    Raises:
        ValueError: γ above 0 or ζ below 1.
    """
    if not gamma <= 0.0 or not zeta >= 1.0:
        raise ValueError(f"clipped softmax needs gamma <= 0 and zeta >= 1, got gamma={gamma} and zeta={zeta}")
