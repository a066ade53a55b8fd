"""Quadratic attention inside groups of tokens and linear attention over all tokens, added.

"MossFormer" (S72), section 2.3. Shapes: B batch, H heads, L tokens, D channels of queries and keys, Dv of values, P
tokens of a group, G = ceil(L / P) groups.
"""

from __future__ import annotations

import torch
from torch import Tensor

from core_attn.dispatch import Backend, Operator
from core_attn.ops.arguments import check_dtypes, check_qkv, prepare_qkv
from core_attn.ops.joint import grouped, reference

OPERATOR = Operator(
    "joint_attention",
    [
        Backend("torch", grouped.run),
        Backend("reference", reference.run, pass_over=reference.pass_over),
    ],
)


def joint_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    lin_q: Tensor,
    lin_k: Tensor,
    group: int = 256,
    causal: bool = False,
    key_padding_mask: Tensor | None = None,
    count: Tensor | None = None,
    dropout: float = 0.0,
    backend: str = "auto",
) -> Tensor:
    """out_i = Σ_(j in i's group) relu(q_i·k_j / P)² v_j + Σ_j (lin_q_i·lin_k_j) v_j / T.

    Nothing is normalised by a sum of weights. Causal: j ≤ i in the group, and the linear part reads the groups before
    i's, divided by P in place of T.

    Args:
        q, k: (B, H, L, D), floating point: of the quadratic part.
        v: (B, H, L, Dv).
        lin_q, lin_k: (B, H, L, D'): of the linear part.
        group: P; the groups begin at token 0, and the last may be shorter.
        causal: see above.
        key_padding_mask: (B, L) bool, True = real token. Keys and values under False never matter, NaN there included.
        count: (B,) T of each sample, positive; by default its number of real tokens. Not read where causal.
        dropout: probability of dropping a weight of the quadratic part.
        backend: "auto", "torch" (memory O(L·(P + D + Dv)), forward and backward) or "reference".

    Returns:
        (B, H, L, Dv), dtype of q (under autocast, of autocast).

    Raises:
        ValueError: shapes, dtypes or options that do not fit.
        BackendError: the backend asked for cannot run for these inputs, and why.
        UnknownNameError: no such backend.
    """
    check_qkv(q, k, v, key_padding_mask)
    if q.shape[:3] != k.shape[:3]:
        raise ValueError(f"joint attention reads its own sequence: q {tuple(q.shape)} and k {tuple(k.shape)} differ")
    if lin_q.shape != lin_k.shape or lin_q.dim() != 4 or lin_q.shape[:3] != q.shape[:3]:
        raise ValueError(
            f"lin_q and lin_k must have shape {tuple(q.shape[:3])} + (D,), "
            f"got {tuple(lin_q.shape)} and {tuple(lin_k.shape)}"
        )
    check_dtypes(q=q, lin_q=lin_q, lin_k=lin_k)
    if group < 1:
        raise ValueError(f"group must be a positive number of tokens, got {group}")
    if not 0 <= dropout < 1:
        raise ValueError(f"dropout must lie in [0, 1), got {dropout}")
    if count is not None and count.shape != q.shape[:1]:
        raise ValueError(f"count must have shape (B,) = {tuple(q.shape[:1])}, got {tuple(count.shape)}")
    q, k, v = prepare_qkv(q, k, v, key_padding_mask)
    lin_q, lin_k, _ = prepare_qkv(lin_q, lin_k, lin_k, key_padding_mask)
    out: Tensor = OPERATOR(
        q,
        k,
        v,
        lin_q=lin_q,
        lin_k=lin_k,
        share=None if causal else _share(q, key_padding_mask, count),
        keep=_keep(q, group, dropout) if dropout else None,
        group=group,
        causal=causal,
        backend=backend,
    )
    return out


def _share(q: Tensor, mask: Tensor | None, count: Tensor | None) -> Tensor:
    """(B,) 1 / T, at least in float32."""
    dtype = torch.promote_types(q.dtype, torch.float32)
    if count is None:
        if mask is None:
            return torch.full(q.shape[:1], 1.0 / max(1, q.shape[2]), dtype=dtype, device=q.device)
        count = mask.sum(1)
    return count.to(dtype).clamp(min=1).reciprocal()


def _keep(q: Tensor, group: int, dropout: float) -> Tensor:
    """(B, H, L, min(P, L)) factors of the weights of the quadratic part: 0 or 1 / (1 - dropout)."""
    shape = (*q.shape[:3], min(group, q.shape[2]))
    return torch.empty(shape, dtype=q.dtype, device=q.device).bernoulli_(1 - dropout).div_(1 - dropout)
