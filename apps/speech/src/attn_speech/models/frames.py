"""Layers on sequences of frames (B, T, C), channels last, that know how long each sequence is.

A mask (B, T) says which frames are real, True = real; None = all are. What lies under False never reaches a real frame.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def frame_mask(frames: Tensor | None, total: int) -> Tensor | None:
    """(B,) numbers of frames -> (B, total) mask; None where all sequences are `total` long."""
    if frames is None or bool((frames >= total).all()):
        return None
    return torch.arange(total, device=frames.device) < frames[:, None]


def only(x: Tensor, mask: Tensor | None) -> Tensor:
    """x (B, T, C) with zeros in place of what is not real, as long as it is finite."""
    return x if mask is None else x * mask.unsqueeze(-1).to(x.dtype)


class _Depthwise(torch.autograd.Function):
    """Depthwise convolution of channels-last frames on the CPU.

    Torch's own, given (B, C, T), takes seventy times as long forward and eight times backward. The frames are given to
    it as images of one row forward, and of one column for the gradient of the weights: for each of the two the library
    below has a vectorised form in just that shape.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, left: int) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.left = left
        return _as_row(x, weight, left)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x, weight = ctx.saved_tensors
        reach = weight.shape[1] - 1
        dx = _as_row(grad.contiguous(), weight.flip(1), reach - ctx.left) if ctx.needs_input_grad[0] else None
        if not ctx.needs_input_grad[1]:
            return dx, None, None
        padded = F.pad(x, (0, 0, ctx.left, reach - ctx.left))
        column = [y.unsqueeze(2).permute(0, 3, 1, 2) for y in (grad, padded)]
        dweight = torch.ops.aten.convolution_backward(
            column[0],
            column[1],
            weight[:, None, :, None],
            None,
            [1, 1],
            [0, 0],
            [1, 1],
            False,
            [0, 0],
            weight.shape[0],
            [False, True, False],
        )[1]
        return dx, dweight[:, 0, :, 0], None


def _as_row(x: Tensor, weight: Tensor, left: int) -> Tensor:
    """Convolution with `left` zeros before the first frame: (B, T, C) -> (B, T, C)."""
    reach = weight.shape[1] - 1
    pad = max(left, reach - left)
    image = x.unsqueeze(1).permute(0, 3, 1, 2)
    y = F.conv2d(image, weight[:, None, None], padding=(0, pad), groups=weight.shape[0])
    return y.permute(0, 2, 3, 1).squeeze(1)[:, pad - left : pad - left + x.shape[1]]


def depthwise(x: Tensor, weight: Tensor, *, dilation: int = 1, causal: bool = False) -> Tensor:
    """Every channel convolved with its own filter, as many frames out as in.

    Args:
        x: (B, T, C).
        weight: (C, K), K odd; tap j meets frame t + (j - (K - 1) / 2) · dilation, or t + (j - K + 1) · dilation where
            causal.
    """
    if dilation > 1:
        # Frames that are a step apart lie side by side, as sequences of their own: dilated filters are far slower.
        batch, length, channels = x.shape
        apart = F.pad(x, (0, 0, 0, -length % dilation)).unflatten(1, (-1, dilation)).transpose(1, 2)
        y = depthwise(apart.reshape(batch * dilation, -1, channels), weight, causal=causal)
        return y.view(batch, dilation, -1, channels).transpose(1, 2).reshape(batch, -1, channels)[:, :length]
    weight = weight.to(x.dtype)
    reach = weight.shape[1] - 1
    left = reach if causal else reach // 2
    if x.device.type == "cpu" and x.dtype is not torch.float64:
        # In 16 bits the library has no fast form, and for some widths none that comes to an end.
        with torch.autocast("cpu", enabled=False):
            found: Tensor = _Depthwise.apply(x.float().contiguous(), weight.float(), left)
        return found.to(x.dtype)
    padded = F.pad(x.mT, (left, reach - left))
    return F.conv1d(padded, weight[:, None], groups=weight.shape[0]).mT.contiguous()


class _Unit(torch.autograd.Function):
    """x / max(‖x‖ / √C, eps) over the last dimension; backward keeps the result, not what led there."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, eps: float) -> Tensor:
        size = torch.linalg.vector_norm(x, dim=-1, keepdim=True) * x.shape[-1] ** -0.5
        factor = size.clamp(min=eps).reciprocal_()
        y = x * factor
        ctx.save_for_backward(y, factor, size > eps)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        y, factor, free = ctx.saved_tensors
        # Σ y² = C where the norm is not clamped.
        along = (y * grad).mean(-1, keepdim=True).mul_(free)
        return torch.addcmul(grad, y, along, value=-1).mul_(factor), None


def unit(x: Tensor, eps: float = 1e-5) -> Tensor:
    """ScaleNorm without its factor: x (…, C) -> x / max(‖x‖ / √C, eps)."""
    found: Tensor = _Unit.apply(x, eps)
    return found


def shift(x: Tensor) -> Tensor:
    """The first half of the channels, the larger where they are odd, one frame later; zeros come in."""
    half = (x.shape[-1] + 1) // 2
    return torch.cat([F.pad(x[:, :-1, :half], (0, 0, 1, 0)), x[..., half:]], dim=-1)


class FramesNorm(nn.Module):
    """(x - mean) / √(variance + eps) · weight + bias, mean and variance over frames.

    Args:
        channels: C.
        eps: added to the variance.
        together: one mean for all channels, as `nn.GroupNorm(1, C)` of (B, C, T); else one for each, as instance norm.
        causal: over the frames so far.
    """

    def __init__(self, channels: int, *, eps: float, together: bool, causal: bool) -> None:
        super().__init__()
        self.eps, self.together, self.causal = eps, together, causal
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """(B, T, C) -> (B, T, C)."""
        wide = x if x.dtype is torch.float64 else x.float()
        return torch.addcmul(self.bias, self.normalise(wide, mask), self.weight).to(x.dtype)

    def normalise(self, x: Tensor, mask: Tensor | None) -> Tensor:
        if self.causal:
            return self._so_far(x)
        if self.together and mask is None:
            return F.layer_norm(x, x.shape[1:], eps=self.eps)
        over = (1, 2) if self.together else (1,)
        if mask is None:
            variance, mean = torch.var_mean(x, over, correction=0, keepdim=True)
            return (x - mean) * torch.rsqrt(variance + self.eps)
        count = mask.sum(1).clamp(min=1)[:, None, None] * (x.shape[2] if self.together else 1)
        mean = only(x, mask).sum(over, keepdim=True) / count
        centred = x - mean
        variance = only(centred, mask).square().sum(over, keepdim=True) / count
        return centred * torch.rsqrt(variance + self.eps)

    def _so_far(self, x: Tensor) -> Tensor:
        # In float64, where a difference of sums over many frames is safe.
        wide = x.double()
        sums, squares = wide, wide.square()
        if self.together:
            sums, squares = sums.mean(2, keepdim=True), squares.mean(2, keepdim=True)
        count = torch.arange(1, x.shape[1] + 1, device=x.device, dtype=torch.float64)[:, None]
        mean = sums.cumsum(1) / count
        variance = (squares.cumsum(1) / count - mean.square()).clamp(min=0)
        return ((wide - mean) * torch.rsqrt(variance + self.eps)).to(x.dtype)
