"""Which keys measure a query: the random half of ProbSparse attention, apart from its arithmetic."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def budget(length: int, factor: int) -> int:
    """c ceil(ln L): sampled keys a query, and queries that attend; at least one and at most L."""
    return min(max(factor * math.ceil(math.log(length)), 1), length)


def sample_keys(
    length: int,
    keys: int,
    *,
    factor: int = 5,
    prefix: bool = False,
    generator: torch.Generator | None = None,
    device: torch.device | None = None,
) -> Tensor:
    """Keys that measure each query, drawn with replacement: (L, U) with U = c ceil(ln M); all samples share them.

    Without `prefix` it is the one draw, `torch.randint(M, (L, U))`, that the paper's code makes: equal seeds give
    equal keys.

    Args:
        length, keys: L and M.
        factor: c.
        prefix: query i draws from keys <= i only.
        generator: source of randomness; None is torch's global one.
        device: of the result.
    """
    source = torch.device("cpu") if generator is None else generator.device
    shape = (length, budget(keys, factor))
    if not prefix:
        return torch.randint(keys, shape, generator=generator, device=source).to(device)
    draw = torch.rand(shape, generator=generator, device=source, dtype=torch.float64)
    return (draw * _visible(length, source)).long().to(device)


def fixed_keys(
    length: int, keys: int, *, factor: int = 5, prefix: bool = False, device: torch.device | None = None
) -> Tensor:
    """As `sample_keys`, but the same for every call, machine and device: an integer hash of the place in the table."""
    shape = (length, budget(keys, factor))
    x = torch.arange(1, shape[0] * shape[1] + 1, device=device)
    for _ in range(2):
        x = ((x ^ (x >> 16)) * 0x45D9F3B) & 0xFFFFFFFF
    x = (x ^ (x >> 16)).view(shape)
    return x % (_visible(length, device) if prefix else keys)


def _visible(length: int, device: torch.device | None) -> Tensor:
    return torch.arange(1, length + 1, device=device).unsqueeze(-1)
