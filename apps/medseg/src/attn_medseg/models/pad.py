"""Images of any size for networks that halve the grid: pad at the edges, cut away again."""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor


def pad(x: Tensor, multiple: int | Sequence[int], least: int = 1) -> tuple[Tensor, tuple[slice, ...]]:
    """`x` with its edge values repeated outwards, on both sides alike, and what `crop` takes to undo it.

    Args:
        x: (B, C, *S).
        multiple: of which every size must be one, an axis each or one number.
        least: the smallest number of multiples.
    """
    sizes = x.shape[2:]
    multiples = [multiple] * len(sizes) if isinstance(multiple, int) else list(multiple)
    if len(multiples) != len(sizes) or min(multiples) < 1:
        raise ValueError(f"{len(sizes)} axes need as many multiples of at least 1, got {multiples}")
    if min(sizes) < 1:
        raise ValueError(f"an image needs a voxel along every axis, got {tuple(sizes)}")
    wanted = [max(least, -(-size // one)) * one for size, one in zip(sizes, multiples)]
    before = [(goal - size) // 2 for size, goal in zip(sizes, wanted)]
    inside = tuple(slice(start, start + size) for start, size in zip(before, sizes))
    if list(sizes) == wanted:
        return x, inside
    sides: list[int] = []
    for start, size, goal in zip(reversed(before), reversed(sizes), reversed(wanted)):
        sides += [start, goal - size - start]
    return F.pad(x, sides, mode="replicate"), inside


def crop(x: Tensor, inside: Sequence[slice]) -> Tensor:
    """(B, K, *padded) -> (B, K, *S)."""
    return x[(slice(None), slice(None), *inside)]
