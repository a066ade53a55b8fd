"""The definition of neighbourhood attention: a dense mask over the grid. O(L²) time and memory, exact in float64."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from core_attn.dispatch import Request
from core_attn.ops.softmax.reference import weights


def reads(length: int, kernel_size: int, stride: int, causal: bool) -> list[tuple[int, int]]:
    """The first and the last key that each query of a line of `length` tokens reads, without dilation.

    The queries of a stride group read the window of their leader: the one in the middle (the right one of two), or on a
    causal line the last; the line's last token where the group is cut off.
    """
    ranges = []
    for i in range(length):
        group = i // stride * stride
        if causal:
            leader = min(group + stride - 1, length - 1)
            ranges.append((max(leader - kernel_size + 1, 0), i))
        else:
            leader = min(group + stride // 2, length - 1)
            first = min(max(leader - kernel_size // 2, 0), length - kernel_size)
            ranges.append((first, first + kernel_size - 1))
    return ranges


def axis_mask(length: int, kernel_size: int, dilation: int, stride: int, causal: bool) -> Tensor:
    """(n, n) bool for one axis of `length` n: query i reads key j. Each residue modulo `dilation` is a line."""
    keep = torch.zeros(length, length, dtype=torch.bool)
    for residue in range(dilation):
        line = range(residue, length, dilation)
        for i, (first, last) in zip(line, reads(len(line), kernel_size, stride, causal)):
            keep[i, residue + first * dilation : residue + last * dilation + 1 : dilation] = True
    return keep


def allowed(
    grid: Sequence[int],
    kernel_size: Sequence[int],
    dilation: Sequence[int],
    stride: Sequence[int],
    causal_axes: Sequence[bool],
) -> Tensor:
    """(L, L) bool on the CPU: the key is in the query's window on every axis."""
    rank, keep = len(grid), torch.ones((), dtype=torch.bool)
    for axis, options in enumerate(zip(grid, kernel_size, dilation, stride, causal_axes)):
        shape = [1] * (2 * rank)
        shape[axis] = shape[rank + axis] = grid[axis]
        keep = keep & axis_mask(*options).view(shape)
    return keep.expand(*grid, *grid).reshape(math.prod(grid), math.prod(grid))


def pairs(
    grid: Sequence[int],
    kernel_size: Sequence[int],
    dilation: Sequence[int],
    stride: Sequence[int],
    causal_axes: Sequence[bool],
) -> int:
    """How many pairs of a query and a key one head reads."""
    total = 1
    for n, size, step, shared, causal in zip(grid, kernel_size, dilation, stride, causal_axes):
        lines = (reads(len(range(r, n, step)), size, shared, causal) for r in range(step))
        total *= sum(last - first + 1 for line in lines for first, last in line)
    return total


def relative_bias(rpb: Tensor, grid: Sequence[int], kernel_size: Sequence[int], dilation: Sequence[int]) -> Tensor:
    """(H, L, L) the entries of `rpb` at each pair's offset; meaningless outside of the window."""
    rank = len(grid)
    places: list[slice | Tensor] = [slice(None)]
    for axis, (n, size, step) in enumerate(zip(grid, kernel_size, dilation)):
        at = torch.arange(n, device=rpb.device)
        offset = torch.div(at[None, :] - at[:, None], step, rounding_mode="floor")
        shape = [1] * (2 * rank)
        shape[axis] = shape[rank + axis] = n
        places.append((offset + size - 1).clamp(0, 2 * size - 2).view(shape))
    return rpb[tuple(places)].flatten(1, rank).flatten(2)


def scores(
    q: Tensor,
    k: Tensor,
    *,
    grid: Sequence[int],
    kernel_size: Sequence[int],
    dilation: Sequence[int],
    stride: Sequence[int],
    causal_axes: Sequence[bool],
    rpb: Tensor | None,
    extra_k: Tensor | None,
    scale: float,
) -> Tensor:
    """(B, H, L, L + N) q kᵀ · scale + rpb, -inf outside of the neighbourhood, then the extra keys; at least float32."""
    q, k = _precise(q), _repeated(_precise(k), q.shape[1])
    keep = allowed(grid, kernel_size, dilation, stride, causal_axes).to(q.device)
    result = q @ k.mT * scale
    if rpb is not None:
        result = result + relative_bias(_precise(rpb), grid, kernel_size, dilation)
    result = result.masked_fill(~keep, float("-inf"))
    if extra_k is None:
        return result
    return torch.cat([result, q @ _repeated(_precise(extra_k), q.shape[1]).mT * scale], dim=-1)


def run(q: Tensor, k: Tensor, v: Tensor, *, extra_v: Tensor | None, **options: Any) -> Tensor:
    """Arguments as `core_attn.ops.neighborhood_attention` hands them on."""
    with torch.autocast(q.device.type, enabled=False):
        p = weights(scores(q, k, **options))
        values = v if extra_v is None else torch.cat([v, extra_v], dim=2)
        return (p @ _repeated(_precise(values), q.shape[1])).to(q.dtype)


def pass_over(request: Request) -> str | None:
    return "the definition, which writes every score down; for checking and reading maps"


def _precise(x: Tensor) -> Tensor:
    return x if x.dtype is torch.float64 else x.float()


def _repeated(x: Tensor, heads: int) -> Tensor:
    return x.repeat_interleave(heads // x.shape[1], dim=1) if x.shape[1] not in (0, heads) else x
