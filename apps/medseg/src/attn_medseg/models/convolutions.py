"""Parts that several of the U-Nets share, in two and three axes."""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

NORMS = ("batch", "instance")

CONVOLUTIONS: dict[int, type[nn.Conv2d] | type[nn.Conv3d]] = {2: nn.Conv2d, 3: nn.Conv3d}
TRANSPOSED: dict[int, type[nn.ConvTranspose2d] | type[nn.ConvTranspose3d]] = {
    2: nn.ConvTranspose2d,
    3: nn.ConvTranspose3d,
}
_DROPOUTS: dict[int, type[nn.Module]] = {2: nn.Dropout2d, 3: nn.Dropout3d}
_BATCH: dict[int, type[nn.Module]] = {2: nn.BatchNorm2d, 3: nn.BatchNorm3d}
_INSTANCE: dict[int, type[nn.Module]] = {2: nn.InstanceNorm2d, 3: nn.InstanceNorm3d}
_MODES = {4: "bilinear", 5: "trilinear"}
_KERNEL = 3


def check(channels: tuple[int, ...], norm: str, **dropouts: float) -> None:
    """Refuse what no U-Net can be: fewer than two levels, an unknown norm, a dropout that is no probability.

    Raises:
        ValueError: which option, and what it may be.
    """
    check_levels(channels)
    if norm not in NORMS:
        raise ValueError(f"norm is {norm!r}; it may be {' or '.join(NORMS)}")
    for name, value in dropouts.items():
        if not 0 <= value < 1:
            raise ValueError(f"{name} must be 0 or more and below 1, got {value}")


def check_levels(channels: Sequence[int]) -> None:
    """Refuse fewer than two levels.

    Raises:
        ValueError: saying what was given.
    """
    if len(channels) < 2 or min(channels) < 1:
        raise ValueError(f"channels needs two levels or more of at least 1, got {list(channels)}")


def levels(channels: Sequence[int]) -> list[tuple[int, int]]:
    """The decoder's levels from coarse to fine: channels that come from below, and the level's own."""
    return list(zip(channels[:0:-1], channels[-2::-1]))


def normalisation(norm: str, ndim: int, channels: int, *, eps: float = 1e-5) -> nn.Module:
    """A norm with scales and shifts."""
    if norm == "batch":
        return _BATCH[ndim](channels, eps=eps)
    return _INSTANCE[ndim](channels, eps=eps, affine=True)


def dropout(ndim: int, share: float) -> nn.Module:
    """Dropout of whole channels."""
    return _DROPOUTS[ndim](share) if share else nn.Identity()


def double(
    ndim: int, channels: int, out_channels: int, *, norm: str, share: float = 0.0, eps: float = 1e-5
) -> nn.Sequential:
    """Twice: a convolution of 3, norm, ReLU, dropout of channels."""
    parts: list[nn.Module] = []
    for given in (channels, out_channels):
        parts += [
            CONVOLUTIONS[ndim](given, out_channels, _KERNEL, padding=1),
            normalisation(norm, ndim, out_channels, eps=eps),
            nn.ReLU(),
            dropout(ndim, share),
        ]
    return nn.Sequential(*parts)


class Deconvolution(nn.Module):
    """A transposed convolution of 3 from a grid to one `stride` times as fine, aligned as Keras' padding "same" is.

    A stride above 3 leaves places between the kernels that hold nothing but the bias.
    """

    def __init__(self, ndim: int, channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.stride = stride
        self.convolution = TRANSPOSED[ndim](
            channels, out_channels, _KERNEL, stride=stride, output_padding=max(0, stride - _KERNEL)
        )

    def forward(self, x: Tensor) -> Tensor:
        fine: Tensor = self.convolution(x)
        for axis, size in enumerate(x.shape[2:], 2):
            fine = fine.narrow(axis, 0, size * self.stride)
        return fine


def resized(x: Tensor, size: Sequence[int]) -> Tensor:
    """(B, C, *S') -> (B, C, *size), linearly, centres on centres."""
    return x if tuple(x.shape[2:]) == tuple(size) else F.interpolate(x, size=tuple(size), mode=_MODES[x.dim()])


def as_image(tokens: Tensor, grid: Sequence[int]) -> Tensor:
    """(B, L, C) -> (B, C, *grid), the same memory."""
    return tokens.unflatten(1, tuple(grid)).movedim(-1, 1)


def as_tokens(x: Tensor) -> Tensor:
    """(B, C, *grid) -> (B, L, C)."""
    return x.movedim(1, -1).flatten(1, -2)
