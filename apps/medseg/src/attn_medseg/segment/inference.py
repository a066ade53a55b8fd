"""Probabilities of images of any size: windows, flips, slices, and memory that windows bound.

Windows and their weights are MONAI's (`dense_patch_slices`, `compute_importance_map`), summed here so that what large
volumes need lies in a file rather than in memory.
"""

from __future__ import annotations

import itertools
import math
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

IN_MEMORY = 1 << 30
"""Bytes of probabilities that are kept in memory; more are kept in a temporary file."""


@torch.no_grad()
def probabilities(
    network: nn.Module,
    values: Tensor,
    *,
    classes: int,
    window: Sequence[int],
    overlap: float = 0.25,
    flips: Sequence[int] = (),
    slices: int = -1,
    batch: int = 4,
    in_memory: int = IN_MEMORY,
) -> Tensor:
    """(K, *S) probabilities of the classes on the CPU, float32.

    Args:
        network: (B, C, *S) -> (B, K, *S) logits, in eval mode.
        values: (C, *S) of any size.
        classes: K.
        window: voxels of a window along each axis that the network reads; smaller images are filled up to it with 0 on
            both sides, as patches in training are.
        overlap: share of a window that neighbours share, 0 to below 1; they are blended by a Gaussian.
        flips: the mean over all flips of these axes of the network's.
        slices: axis of S along which the network takes slices one by one; -1 = it reads all axes.
        batch: windows at once.
        in_memory: bytes; larger results are kept in a temporary file.

    Raises:
        ValueError: a window of another number of axes, or an overlap out of range.
    """
    if not 0 <= overlap < 1:
        raise ValueError(f"the overlap must be 0 or more and below 1, got {overlap:g}")
    images = values.movedim(1 + slices, 0) if slices >= 0 else values[None]  # (N, C, *S')
    size = images.shape[2:]
    if len(window) != len(size) or min(window) < 1:
        raise ValueError(f"a window of {tuple(window)} voxels does not fit an image of {len(size)} axes")
    weight = next((p for p in network.parameters()), torch.zeros(()))
    made = _zeros((classes, *values.shape[1:]), in_memory)
    view = made.movedim(1 + slices, 0) if slices >= 0 else made[None]  # (N, K, *S')
    start = [max(0, one - whole) // 2 for one, whole in zip(window, size)]
    fill = [side for one, whole, at in zip(window, size, start) for side in (at, max(0, one - whole) - at)]
    windows = _windows(size, window, start, overlap)
    blend = _blend(window) if len(windows) > 1 else None
    total = torch.zeros(tuple(size)) if blend is not None else None
    if blend is not None and total is not None:
        for one in windows:
            total[one.here] += blend[one.part]
    for group in _groups(itertools.product(range(len(images)), windows), batch):
        chosen = torch.stack([_filled(images[number], fill)[(slice(None), *one.read)] for number, one in group])
        found = _mean(network, chosen.to(weight.device, weight.dtype), flips).to("cpu", torch.float32)
        for (number, one), made_here in zip(group, found):
            inner = made_here[(slice(None), *one.part)]
            if blend is None or total is None:
                view[number] = inner
            else:
                # Divided at once, so that no second pass over a file is needed.
                view[number][(slice(None), *one.here)] += inner * (blend[one.part] / total[one.here])
    return made


def _filled(image: Tensor, fill: Sequence[int]) -> Tensor:
    """(C, *S) with 0 around it; `fill` is how much before and behind each axis."""
    if not any(fill):
        return image
    sides = [fill[2 * axis + side] for axis in reversed(range(len(fill) // 2)) for side in (0, 1)]
    return F.pad(image, sides)


@dataclass(frozen=True)
class _Window:
    """What of the filled image a window reads, the voxels of the image that it holds, and where they are in it."""

    read: tuple[slice, ...]
    here: tuple[slice, ...]
    part: tuple[slice, ...]


def _windows(size: Sequence[int], window: Sequence[int], start: Sequence[int], overlap: float) -> list[_Window]:
    from monai.data.utils import dense_patch_slices

    filled = [max(one, whole) for one, whole in zip(window, size)]
    steps = [one if one == whole else max(1, int(one * (1 - overlap))) for one, whole in zip(window, filled)]
    found = []
    for read in dense_patch_slices(filled, tuple(window), steps):
        low = [max(0, at.start - first) for at, first in zip(read, start)]
        high = [min(whole, at.stop - first) for at, first, whole in zip(read, start, size)]
        here = tuple(slice(a, b) for a, b in zip(low, high))
        part = tuple(slice(a + f - at.start, b + f - at.start) for a, b, f, at in zip(low, high, start, read))
        found.append(_Window(read, here, part))
    return found


def _groups(items: Iterable[tuple[int, _Window]], count: int) -> Iterator[list[tuple[int, _Window]]]:
    left = iter(items)
    while group := list(itertools.islice(left, count)):
        yield group


def _mean(network: nn.Module, x: Tensor, flips: Sequence[int]) -> Tensor:
    """Probabilities, the mean over flips."""
    found: Tensor | None = None
    turned = list(_subsets(flips))
    for axes in turned:
        dims = [2 + axis for axis in axes]
        one = network(x.flip(dims) if dims else x).float().softmax(dim=1)
        one = one.flip(dims) if dims else one
        found = one if found is None else found + one
    assert found is not None
    return found / len(turned)


def _subsets(axes: Sequence[int]) -> Iterator[tuple[int, ...]]:
    for count in range(len(axes) + 1):
        yield from itertools.combinations(axes, count)


def _blend(roi: Sequence[int]) -> Tensor:
    from monai.data.utils import compute_importance_map

    return torch.as_tensor(compute_importance_map(tuple(roi), mode="gaussian"))


def _zeros(shape: Sequence[int], in_memory: int) -> Tensor:
    """In memory, or in a file that is gone when the tensor is."""
    if 4 * math.prod(shape) <= in_memory:
        return torch.zeros(tuple(shape))
    with tempfile.TemporaryFile() as file:
        return torch.from_numpy(np.memmap(file, dtype=np.float32, mode="w+", shape=tuple(shape)))
