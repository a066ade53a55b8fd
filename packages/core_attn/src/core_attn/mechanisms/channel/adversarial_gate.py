"""Gates that are segmentations: maps of classes, which a discriminator can judge, say where features are let through.

"Learning to Segment from Scribbles using Multi-scale Adversarial Attention Gates" (S195), as in its official
code. Maps come out beside the gated features, so the gate is no `FeatureGate` and not among the registered mechanisms.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

_CONVOLUTIONS = {2: nn.Conv2d, 3: nn.Conv3d}


class AdversarialGate(nn.Module):
    """x · Σ_{k > 0} m_k with m = softmax(conv(y)): the gate is what is left beside the background, class 0.

    Whether anything judges m is the caller's: a discriminator that is shown m makes it a segmentation at the scale of
    x; without one the gate learns from what comes after it alone. The convolution is 1 × 1.

    Args:
        channels: of the map y that the gate reads.
        classes: K, the background among them.
        axes: 2 for images, 3 for volumes.

    Raises:
        ValueError: an option out of its range.
    """

    def __init__(self, channels: int, classes: int, *, axes: int = 2) -> None:
        super().__init__()
        if channels < 1 or classes < 2 or axes not in _CONVOLUTIONS:
            raise ValueError(
                f"channels must be positive, classes 2 or more and axes 2 or 3, got {channels}, {classes} and {axes}"
            )
        self.channels, self.classes, self.axes = channels, classes, axes
        self.maps = _CONVOLUTIONS[axes](channels, classes, 1)
        nn.init.kaiming_normal_(self.maps.weight, nonlinearity="relu")
        assert self.maps.bias is not None
        nn.init.zeros_(self.maps.bias)

    def forward(self, x: Tensor, read: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Gate a map.

        Args:
            x: (B, C, *spatial), what is gated.
            read: (B, channels, *spatial), what the gate reads; x itself where None.

        Returns:
            The gated map (B, C, *spatial) and the maps of classes (B, K, *spatial), which sum to 1 over classes.

        Raises:
            ValueError: shapes that do not fit.
        """
        read = x if read is None else read
        if read.dim() != self.axes + 2 or read.shape[1] != self.channels:
            raise ValueError(
                f"the gate reads a map of {self.channels} channels and {self.axes} axes, got {tuple(read.shape)}"
            )
        if x.dim() != read.dim() or x.shape[:1] != read.shape[:1] or x.shape[2:] != read.shape[2:]:
            raise ValueError(
                f"what is gated must have the batch and the grid of what is read, got {tuple(x.shape)} and "
                f"{tuple(read.shape)}"
            )
        maps = torch.softmax(self.maps(read), dim=1)
        return x * maps[:, 1:].sum(dim=1, keepdim=True), maps

    def extra_repr(self) -> str:
        return f"classes={self.classes}"
