"""The definition of the long convolution: one matrix of kernel values a channel. O(L²); exact in float64."""

from __future__ import annotations

import torch
from torch import Tensor


def sum_dtype(x: Tensor, kernel: Tensor) -> torch.dtype:
    """What products are summed in: float64 where one side has it, else float32."""
    return torch.float64 if torch.float64 in (x.dtype, kernel.dtype) else torch.float32


def run(x: Tensor, kernel: Tensor, reverse: Tensor | None) -> Tensor:
    """Arguments as `core_attn.ops.fft_conv` hands them on -> (B, C, L)."""
    dtype = sum_dtype(x, kernel)
    with torch.autocast(x.device.type, enabled=False):
        matrix = _toeplitz(kernel.to(dtype), x.shape[2])
        if reverse is not None:
            matrix = matrix + _toeplitz(reverse.to(dtype), x.shape[2]).transpose(1, 2)
        return torch.einsum("cts,bcs->bct", matrix, x.to(dtype)).to(x.dtype)


def _toeplitz(kernel: Tensor, length: int) -> Tensor:
    """(C, K) -> (C, L, L) with kernel[t - s] at (t, s), 0 where there is none."""
    position = torch.arange(length, device=kernel.device)
    ahead = position[:, None] - position
    some = (ahead >= 0) & (ahead < kernel.shape[1])
    return kernel[:, ahead.clamp(0, max(kernel.shape[1] - 1, 0))] * some
