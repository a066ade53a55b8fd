"""Attention inside the windows that a grid is cut into, each query reading the keys of its own window only.

"Swin Transformer: Hierarchical Vision Transformer using Shifted Windows" (2021), section 3.2, and with queries on a
finer grid than keys "More than Encoder: Introducing Transformer Decoder to Upsample" (S86). Shapes: B batch, H heads, L
queries, M keys, D channels of a head, Dv channels of a value.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from core_attn.dispatch import Backend, Operator
from core_attn.ops.arguments import check_qkv, default_scale, prepare_qkv
from core_attn.ops.partition import reference, tiled
from core_attn.ops.partition.windows import Windows

__all__ = ["OPERATOR", "Windows", "window_cross_attention"]

OPERATOR = Operator("window_cross_attention", [Backend("torch", tiled.run), Backend("reference", reference.run)])


def window_cross_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    grid: Sequence[int],
    window: int | Sequence[int],
    factor: int | Sequence[int] = 1,
    shift: int | Sequence[int] = 0,
    rpb: Tensor | None = None,
    key_padding_mask: Tensor | None = None,
    scale: float | None = None,
    backend: str = "auto",
) -> Tensor:
    """softmax(q kᵀ · scale + bias) v over the keys of a query's window; `factor` queries an axis share a key's place.

    The queries stand on `grid` (n_1, …), the keys on the grid ⌈n_i / factor_i⌉, both row major; query i of an axis lies
    in the cell of key i // factor. Windows of `window` keys and window · factor queries cut the axis from `shift` keys
    on, and the one before `shift` is smaller, as is the last where the sizes do not divide; nothing is read across a
    border of the grid. With factor 1, shift 0 and shift window // 2 are Swin's two kinds of layers.

    Args:
        q: (B, H, L, D), L = Π n_i.
        k: (B, H, M, D).
        v: (B, H, M, Dv).
        grid: sizes of the queries' axes, 1 to 3 of them.
        window: keys of a window on every axis, or one number for each; may be larger than the grid.
        factor: queries of a key's cell on every axis, or one number for each.
        shift: keys before the first cut on every axis, or one number for each; 0 <= shift < window.
        rpb: relative positional bias (H, (2 window_1 - 1) · factor_1, …), for the offsets i - factor j from
            -factor (window - 1) to factor window - 1 of a query and a key of one window; differentiable.
        key_padding_mask: (B, M) bool, True = real. Keys and values under False never matter, NaN there included.
        scale: factor of the scores; 1/√D by default.
        backend: "auto", "torch" (scores of a few windows at a time; no gradients of gradients) or "reference" (a map of
            L × M).

    Returns:
        (B, H, L, Dv), dtype of v (under autocast, of autocast). A query without any key gives zeros.

    Raises:
        ValueError: shapes or dtypes that do not fit; an option out of its range.
        BackendError: the backend cannot run.
        UnknownNameError: no such backend.
    """
    check_qkv(q, k, v, key_padding_mask)
    windows = Windows.of(grid, window, factor, shift)
    if k.shape[1] != q.shape[1] or (q.shape[2], k.shape[2]) != (windows.queries, windows.keys):
        raise ValueError(
            f"window_cross_attention on the grid {windows.grid} with factor {windows.factor} takes {windows.queries} "
            f"queries, {windows.keys} keys and as many heads in k as in q, got q {tuple(q.shape)} and k "
            f"{tuple(k.shape)}"
        )
    if rpb is not None and (tuple(rpb.shape) != (q.shape[1], *windows.offsets) or not rpb.is_floating_point()):
        raise ValueError(
            f"rpb must be floating point of shape {(q.shape[1], *windows.offsets)}, got {rpb.dtype} of "
            f"{tuple(rpb.shape)}"
        )
    scale = default_scale(q, scale)
    q, k, v = prepare_qkv(q, k, v, key_padding_mask)
    with torch.autocast(q.device.type, enabled=False):
        out: Tensor = OPERATOR(
            q, k, v, windows=windows, rpb=rpb, key_padding_mask=key_padding_mask, scale=scale, backend=backend
        )
    return out
