"""Exact softmax attention, softmax(q kᵀ · scale + bias) v, in every form this library has of it.

"Attention Is All You Need" (2017), eq. 1. Shapes: B batch, H query heads, Hkv key heads, L queries, M keys, D channels
of a head, Dv channels of a value.
"""

from __future__ import annotations

import torch
from torch import Tensor

from core_attn.dispatch import Backend, Operator
from core_attn.ops.arguments import check_qkv, prepare_qkv
from core_attn.ops.softmax import blocked, cpu, flash, flex, reference, sdpa, triton

OPERATOR = Operator(
    "softmax_attention",
    [
        Backend("flash_attn", flash.run, flash.why_not, flash.pass_over),
        Backend("triton", triton.run, triton.why_not, triton.pass_over),
        Backend("cpu", cpu.run, cpu.why_not, cpu.pass_over),
        Backend("sdpa", sdpa.run, pass_over=sdpa.pass_over),
        Backend("torch", blocked.run),
        Backend("flex", flex.run, flex.why_not, flex.pass_over),
        Backend("reference", reference.run, pass_over=reference.pass_over),
    ],
)


def softmax_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = False,
    mask: Tensor | None = None,
    bias: Tensor | None = None,
    key_padding_mask: Tensor | None = None,
    window: int | tuple[int | None, int | None] | None = None,
    scale: float | None = None,
    dropout: float = 0.0,
    backend: str = "auto",
) -> Tensor:
    """softmax(q kᵀ · scale + bias) v over the keys that every given restriction allows.

    Query i stands at position i + M - L, so that the last query is aligned with the last key (lower right).
    A query that may read no key at all gives zeros, with zero gradients.

    Args:
        q: (B, H, L, D), floating point.
        k: (B, Hkv, M, D); Hkv divides H, and query heads g·H/Hkv … read key head g.
        v: (B, Hkv, M, Dv).
        causal: a query reads the keys up to its own position.
        mask: bool, broadcastable to (B, H, L, M); True = may be read.
        bias: floating point, broadcastable to (B, H, L, M), added to the scaled scores; differentiable.
        key_padding_mask: (B, M) bool, True = real token. Keys and values under False never matter, NaN there included.
        window: w reads the keys nearer than w positions (itself and w - 1 on each side, with `causal` w - 1 before);
            (left, right) reads that many keys on each side besides itself, None = all. Padding counts as positions.
        scale: factor of the scores; 1/√D by default.
        dropout: probability in [0, 1) with which each weight is dropped, the others growing by 1 / (1 - dropout).
        backend: "auto", "flash_attn", "triton", "cpu" (C++, compiled by the first call that names it), "sdpa", "torch"
            (blocked, memory linear in L and M), "flex" or "reference".

    Returns:
        (B, H, L, Dv), dtype of q (under autocast, of autocast).

    Raises:
        ValueError: shapes or dtypes that do not fit; a window or dropout out of range.
        BackendError: the backend asked for cannot run for these inputs, and why.
        UnknownNameError: no such backend.
    """
    _check(q, k, v, mask, bias, key_padding_mask, dropout)
    q, k, v = prepare_qkv(q, k, v, key_padding_mask)
    out: Tensor = OPERATOR(
        q,
        k,
        v,
        causal=causal,
        mask=None if mask is None else mask[(None,) * (4 - mask.dim())],
        bias=None if bias is None else bias[(None,) * (4 - bias.dim())],
        key_padding_mask=key_padding_mask,
        window=span(window, causal=causal),
        scale=q.shape[-1] ** -0.5 if scale is None and q.shape[-1] else 1.0 if scale is None else scale,
        dropout=dropout,
        backend=backend,
    )
    return out


def span(
    window: int | tuple[int | None, int | None] | None, *, causal: bool = False
) -> tuple[int | None, int | None] | None:
    """A window as (left, right), the numbers of keys read on each side; None on a side = all, None = no window.

    Raises:
        ValueError: a window that holds nothing, or a negative side.
    """
    if window is None:
        return None
    if isinstance(window, int):
        if window < 1:
            raise ValueError(f"window must be at least 1 (a token and its window - 1 neighbours), got {window}")
        window = (window - 1, window - 1)
    if len(window) != 2 or any(side is not None and side < 0 for side in window):
        raise ValueError(f"window must be a positive integer or (left, right), each >= 0 or None, got {window}")
    left, right = window[0], 0 if causal else window[1]
    return None if left is None and (right is None or causal) else (left, right)


def _check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    bias: Tensor | None,
    key_padding_mask: Tensor | None,
    dropout: float,
) -> None:
    check_qkv(q, k, v, key_padding_mask)
    whole = (q.shape[0], q.shape[1], q.shape[2], k.shape[2])
    if mask is not None:
        if mask.dtype is not torch.bool:
            raise ValueError(f"mask must be boolean (True = may be read), got {mask.dtype}; additive ones go to bias")
        _check_broadcast("mask", mask, whole)
    if bias is not None:
        if not bias.is_floating_point():
            raise ValueError(f"bias must be floating point, got {bias.dtype}; boolean ones go to mask")
        _check_broadcast("bias", bias, whole)
    if not 0.0 <= dropout < 1.0:
        raise ValueError(f"dropout must lie in [0, 1), got {dropout}")


def _check_broadcast(name: str, x: Tensor, whole: tuple[int, ...]) -> None:
    if x.dim() > 4 or any(n not in (1, m) for n, m in zip(reversed(x.shape), reversed(whole))):
        raise ValueError(f"{name} of shape {tuple(x.shape)} does not broadcast to (B, H, L, M) = {whole}")
