"""Layers that models of several applications share."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Dropout(nn.Module):
    """`nn.Dropout` in under two thirds of its time on CPU, with a mask of one byte a number kept for the backward pass.

    Four 16-bit draws are cut from each 64-bit random number, so the probability is a multiple of 2^-16 (and the scale
    its exact inverse). Draws come from torch's global generator. On other devices it is `nn.Dropout`.

    Args:
        p: probability of zero, in [0, 1).

    Raises:
        ValueError: p outside [0, 1).
    """

    def __init__(self, p: float) -> None:
        super().__init__()
        if not 0 <= p < 1:
            raise ValueError(f"dropout must lie in [0, 1), got {p}")
        self.p = p

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.p == 0:
            return x
        if x.device.type != "cpu":
            return F.dropout(x, self.p)
        zeros = round(self.p * 2**16)
        bits = torch.empty((x.numel() + 3) // 4, dtype=torch.int64).random_(-(2**63), None)
        keep = (bits.view(torch.int16)[: x.numel()] >= zeros - 2**15).view(x.shape)
        result: Tensor = _Keep.apply(x, keep, 2**16 / (2**16 - zeros))
        return result


class _Keep(torch.autograd.Function):
    """x where keep, times scale; only the mask is saved."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, keep: Tensor, scale: float) -> Tensor:
        ctx.save_for_backward(keep)
        ctx.scale = scale
        return torch.where(keep, x, 0.0).mul_(scale)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return torch.where(ctx.saved_tensors[0], grad, 0.0).mul_(ctx.scale), None, None
