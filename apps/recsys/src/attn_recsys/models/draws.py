"""Pairs that do not occur, drawn quickly: for training inside a model."""

from __future__ import annotations

import torch
from torch import Tensor

_ROUNDS = 32


def pair_keys(left: Tensor, right: Tensor, count: int) -> Tensor:
    """Sorted keys of pairs (left, right), right in [0, count), for `is_pair` and `draw_others`."""
    return torch.unique(left * count + right)


def is_pair(keys: Tensor, left: Tensor, right: Tensor, count: int) -> Tensor:
    """Whether each (left, right) is among the pairs."""
    if not len(keys):
        return torch.zeros_like(left, dtype=torch.bool)
    asked = left * count + right
    return keys[torch.searchsorted(keys, asked).clamp_(max=len(keys) - 1)] == asked


def draw_others(keys: Tensor, left: Tensor, count: int) -> Tensor:
    """For each left number a right one, uniform among those it is no pair with, by torch's random numbers.

    Where nothing else is left, or nothing was found in 32 draws, any.
    """
    found = torch.randint(count, left.shape, device=left.device)
    for _ in range(_ROUNDS):
        again = is_pair(keys, left, found, count).nonzero().squeeze(1)
        if not len(again):
            break
        found[again] = torch.randint(count, again.shape, device=left.device)
    return found
