"""The definition of attention inside windows: a map of L × M in which all pairs of different windows are forbidden."""

from __future__ import annotations

import torch
from torch import Tensor

from core_attn.ops.partition.windows import Windows
from core_attn.ops.softmax.reference import weights


def scores(
    q: Tensor,
    k: Tensor,
    *,
    windows: Windows,
    rpb: Tensor | None,
    key_padding_mask: Tensor | None,
    scale: float,
) -> Tensor:
    """q kᵀ · scale + bias, -inf between windows and at padding: (B, H, L, M), float32 at least."""
    dtype = torch.promote_types(q.dtype, torch.float32)
    result = q.to(dtype) @ k.to(dtype).mT * scale
    rank = len(windows.grid)
    allowed = torch.ones((1,) * 2 * rank, dtype=torch.bool, device=q.device)
    index = torch.zeros_like(allowed, dtype=torch.int64)
    axes = zip(windows.grid, windows.key_grid, windows.window, windows.factor, windows.shift, windows.offsets)
    for axis, (n, m, w, f, s, size) in enumerate(axes):
        query = torch.arange(n, device=q.device)[:, None]
        key = torch.arange(m, device=q.device)[None, :]
        shape = [1] * 2 * rank
        shape[axis], shape[rank + axis] = n, m
        # Windows are counted from one whole window before the shift.
        own, other = (query // f - s + w) // w, (key - s + w) // w
        allowed = allowed & (own == other).view(shape)
        index = index * size + (query - f * key + f * (w - 1)).clamp(0, size - 1).view(shape)
    pairs = (windows.queries, windows.keys)
    if rpb is not None:
        result = result + rpb.to(dtype).flatten(1)[:, index.expand(*windows.grid, *windows.key_grid).reshape(pairs)]
    keep = allowed.expand(*windows.grid, *windows.key_grid).reshape(pairs)[None, None]
    if key_padding_mask is not None:
        keep = keep & key_padding_mask[:, None, None, :]
    return result.masked_fill(~keep, float("-inf"))


def run(q: Tensor, k: Tensor, v: Tensor, **options: object) -> Tensor:
    """softmax(q kᵀ · scale + bias) v, arguments as `core_attn.ops.window_cross_attention` hands them on."""
    p = weights(scores(q, k, **options))  # type: ignore[arg-type]
    return (p @ v.to(p.dtype)).to(v.dtype)
