"""Neighbourhood attention: every token of a grid reads the window of tokens around it, in 1, 2 or 3 dimensions.

"Neighborhood Attention Transformer" (2023), "Dilated Neighborhood Attention Transformer" (S52), "Faster Neighborhood
Attention" (S165) and "Generalized Neighborhood Attention" (S163). Shapes: B batch, H query heads, Hkv key heads,
L tokens of the grid (row major), D channels of a head, Dv channels of a value, N extra keys, k kernel size of an axis.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor

from core_attn.dispatch import Backend, Operator
from core_attn.ops.arguments import autocast_dtype, check_dtypes
from core_attn.ops.neighborhood import reference, tiled, triton

OPERATOR = Operator(
    "neighborhood_attention",
    [
        Backend("triton", triton.run, triton.why_not, triton.pass_over),
        Backend("torch", tiled.run),
        Backend("reference", reference.run, pass_over=reference.pass_over),
    ],
)


def neighborhood_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    grid: Sequence[int],
    kernel_size: int | Sequence[int],
    dilation: int | Sequence[int] = 1,
    stride: int | Sequence[int] = 1,
    causal: bool | Sequence[bool] = False,
    rpb: Tensor | None = None,
    extra_k: Tensor | None = None,
    extra_v: Tensor | None = None,
    scale: float | None = None,
    backend: str = "auto",
) -> Tensor:
    """softmax(q kᵀ · scale + rpb) v over the neighbourhood of each query, by the boundary rule of NATTEN.

    On each axis a query reads `kernel_size` keys, `dilation` apart, around itself (an even window has one more on the
    left). At a border the window moves inwards instead of shrinking, so that it always holds `kernel_size` keys
    (S52, section 3.1). With dilation d the tokens whose coordinates are equal modulo d are a grid of their own. With
    stride s, s neighbouring queries share the window of the one in their middle (S163, section 3); s = kernel_size is
    blocked attention. On a causal axis a query reads up to itself, and the window ends at the last query of its stride
    group, cut at the border. A key is read where it is in the window on every axis.

    Args:
        q: (B, H, L, D), floating point, with L = prod(grid), row major.
        k: (B, Hkv, L, D); Hkv divides H, and query heads g·H/Hkv … read key head g.
        v: (B, Hkv, L, Dv).
        grid: one to three side lengths.
        kernel_size: keys of a window, for all axes or for each; kernel_size · dilation must fit into the grid.
        dilation: distance of the keys of a window, at least 1, for all axes or for each.
        stride: queries that share a window, 1 … kernel_size, for all axes or for each.
        causal: whether a query reads no keys after itself, for all axes or for each.
        rpb: (H, 2·k_1 - 1, …) relative positional bias added to the scaled scores, one axis of it for each of the
            grid: entry k - 1 + o belongs to the key o steps of `dilation` after the query. Differentiable; -inf
            forbids an offset.
        extra_k, extra_v: (B, Hkv, N, D) and (B, Hkv, N, Dv) keys and values that every query reads beside its
            neighbourhood, in the same softmax and without bias.
        scale: factor of the scores; 1/√D by default.
        backend: "auto" or the name of one of `OPERATOR.backends`.

    Returns:
        (B, H, L, Dv), dtype of q (under autocast, of autocast).

    Raises:
        ValueError: shapes or dtypes that do not fit, or an option out of its range.
        BackendError: the backend asked for cannot run for these inputs, and why.
        UnknownNameError: no such backend.
    """
    grid = tuple(int(n) for n in grid)
    if not 1 <= len(grid) <= 3 or min(grid) < 0:
        raise ValueError(f"grid must be one to three side lengths, got {grid}")
    kernel_size = _per_axis("kernel_size", kernel_size, len(grid))
    dilation = _per_axis("dilation", dilation, len(grid))
    stride = _per_axis("stride", stride, len(grid))
    causal = (causal,) * len(grid) if isinstance(causal, bool) else tuple(bool(c) for c in causal)
    if len(causal) != len(grid):
        raise ValueError(f"causal must be one bool or one for each of the {len(grid)} axes of the grid, got {causal}")
    _check_tensors(q, k, v, math.prod(grid))
    if q.shape[2]:
        _check_windows(grid, kernel_size, dilation, stride)
    _check_additions(q, k, v, rpb, extra_k, extra_v, kernel_size)
    q, k, v = autocast_dtype(q, k, v)
    if extra_k is not None and extra_v is not None:
        extra_k, extra_v = extra_k.to(q.dtype), extra_v.to(q.dtype)
    if extra_k is not None and not extra_k.shape[2]:
        extra_k = extra_v = None
    # Not called `causal`: a request's causality is that of a sequence, this is one bool an axis.
    out: Tensor = OPERATOR(
        q,
        k,
        v,
        grid=grid,
        kernel_size=kernel_size,
        dilation=dilation,
        stride=stride,
        causal_axes=causal,
        rpb=rpb,
        extra_k=extra_k,
        extra_v=extra_v,
        scale=q.shape[-1] ** -0.5 if scale is None and q.shape[-1] else 1.0 if scale is None else float(scale),
        backend=backend,
    )
    return out


def _per_axis(name: str, value: int | Sequence[int], rank: int) -> tuple[int, ...]:
    values = (value,) * rank if isinstance(value, int) else tuple(int(n) for n in value)
    if len(values) != rank or min(values) < 1:
        raise ValueError(
            f"{name} must be a positive integer or one for each of the {rank} axes of the grid, got {value}"
        )
    return values


def _check_tensors(q: Tensor, k: Tensor, v: Tensor, tokens: int) -> None:
    if q.dim() != 4 or k.dim() != 4 or v.dim() != 4:
        raise ValueError(f"q, k and v must have shape (B, H, L, D), got {_shapes(q, k, v)}")
    if k.shape[:3] != v.shape[:3] or q.shape[0] != k.shape[0] or q.shape[3] != k.shape[3]:
        raise ValueError(f"q (B, H, L, D), k (B, Hkv, L, D) and v (B, Hkv, L, Dv) do not fit: got {_shapes(q, k, v)}")
    if q.shape[2] != tokens or k.shape[2] != tokens:
        raise ValueError(f"the grid holds {tokens} tokens, but q and k have {q.shape[2]} and {k.shape[2]}")
    if k.shape[1] != q.shape[1] and (k.shape[1] == 0 or q.shape[1] % k.shape[1]):
        raise ValueError(f"the {k.shape[1]} heads of k and v must divide the {q.shape[1]} heads of q")
    check_dtypes(q=q, k=k, v=v)


def _check_windows(
    grid: tuple[int, ...], kernel_size: tuple[int, ...], dilation: tuple[int, ...], stride: tuple[int, ...]
) -> None:
    for n, size, step, shared in zip(grid, kernel_size, dilation, stride):
        if size * step > n:
            raise ValueError(
                f"kernel_size · dilation must fit into the grid on every axis, but {size} · {step} > {n}; "
                "take a smaller window"
            )
        if shared > size:
            raise ValueError(f"stride must be at most kernel_size on every axis, got {shared} and {size}")


def _check_additions(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rpb: Tensor | None,
    extra_k: Tensor | None,
    extra_v: Tensor | None,
    kernel_size: tuple[int, ...],
) -> None:
    if rpb is not None:
        fits = (q.shape[1], *(2 * n - 1 for n in kernel_size))
        if rpb.shape != fits or not rpb.is_floating_point():
            raise ValueError(
                f"rpb must be floating point of shape (H, 2·k - 1, …) = {fits}, got {rpb.dtype} of {tuple(rpb.shape)}"
            )
    if (extra_k is None) != (extra_v is None):
        raise ValueError("extra_k and extra_v belong together; give both or neither")
    if extra_k is not None and extra_v is not None:
        keys = (*k.shape[:2], extra_k.shape[2] if extra_k.dim() == 4 else 0)
        if extra_k.shape != (*keys, k.shape[3]) or extra_v.shape != (*keys, v.shape[3]):
            raise ValueError(
                f"extra_k (B, Hkv, N, D) and extra_v (B, Hkv, N, Dv) do not fit k and v: "
                f"got {_shapes(extra_k, extra_v)} beside {_shapes(k, v)}"
            )
        check_dtypes(k=k, extra_k=extra_k, extra_v=extra_v)


def _shapes(*tensors: Tensor) -> str:
    return ", ".join(str(tuple(t.shape)) for t in tensors)
