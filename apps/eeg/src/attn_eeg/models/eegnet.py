"""EEGNet: A Compact Convolutional Neural Network for EEG-based Brain-Computer Interfaces (Lawhern et al., 2018).

Shapes: B batch, C electrodes, T samples, K classes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attn_eeg.config import EEGNetConfig
from attn_eeg.models.base import EegShape, MixerFreeModel
from attn_shared.layers import Dropout


class EEGNet(MixerFreeModel):
    """Table 2: temporal filters, spatial filters of each of them, a separable convolution, one dense layer.

        (B, 1, C, T)  F1 filters along time, BatchNorm
        (B, F1·D, 1, T)  D spatial filters of each, norm at most 1; BatchNorm, ELU, mean of 4, dropout
        (B, F2, 1, T/4)  separable convolution along time, BatchNorm, ELU, mean of 8, dropout
        (B, K)  dense, norm of a class's weights at most 0.25

    Convolutions along time keep the length ("same").

    Raises:
        ValueError: features in place of raw windows; a window shorter than one value after both poolings; an option
            out of its range.
    """

    config: EEGNetConfig
    EPS, MOMENTUM = 1e-3, 0.01  # of the batch normalisations, as in the authors' code

    def __init__(
        self,
        config: EEGNetConfig,
        shape: EegShape,
        *,
        mixer: str | None = None,
        mixer_args: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(config, shape, mixer=mixer, mixer_args=mixer_args)
        c = config
        if not shape.samples:
            raise ValueError("EEGNet reads raw windows, not band features; set data_args.features to raw")
        for name in ("F1", "D", "kernel_length", "depthwise_kernel_length", "pool1", "pool2"):
            if getattr(c, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(c, name)}")
        if c.F2 < 0 or min(c.max_norm, c.norm_rate) <= 0:
            raise ValueError("F2 must be 0 or more, and max_norm and norm_rate above 0")
        left = shape.samples // c.pool1 // c.pool2
        if not left:
            raise ValueError(
                f"a window of {shape.samples} samples is too short for poolings of {c.pool1} and {c.pool2}; "
                f"it needs {c.pool1 * c.pool2}"
            )
        spatial, separable = c.F1 * c.D, c.F2 or c.F1 * c.D
        self.temporal = nn.Conv2d(1, c.F1, (1, c.kernel_length), bias=False)
        self.temporal_norm = self._norm(c.F1)
        self.spatial = nn.Conv2d(c.F1, spatial, (shape.channels, 1), groups=c.F1, bias=False)
        self.spatial_norm = self._norm(spatial)
        self.depthwise = nn.Conv2d(spatial, spatial, (1, c.depthwise_kernel_length), groups=spatial, bias=False)
        self.pointwise = nn.Conv2d(spatial, separable, 1, bias=False)
        self.separable_norm = self._norm(separable)
        self.dense = nn.Linear(separable * left, shape.classes)
        self.dropout = Dropout(c.dropout)
        for module in self.modules():
            if isinstance(module, (nn.Conv2d, nn.Linear)):
                nn.init.xavier_uniform_(module.weight)
        nn.init.zeros_(self.dense.bias)

    def _norm(self, width: int) -> nn.BatchNorm2d:
        return nn.BatchNorm2d(width, eps=self.EPS, momentum=self.MOMENTUM)

    def forward(self, x: Tensor) -> Tensor:
        self.check_inputs(x)
        c = self.config
        h = self.temporal_norm(self.temporal(_padded(x.unsqueeze(1), c.kernel_length)))
        # Norms are limited where weights are used, which any optimiser and any mean of weights leaves in force.
        h = F.conv2d(h, torch.renorm(self.spatial.weight, 2, 0, c.max_norm), groups=c.F1)
        h = self.dropout(F.avg_pool2d(F.elu(self.spatial_norm(h)), (1, c.pool1)))
        h = self.separable_norm(self.pointwise(self.depthwise(_padded(h, c.depthwise_kernel_length))))
        h = self.dropout(F.avg_pool2d(F.elu(h), (1, c.pool2)))
        return F.linear(h.flatten(1), torch.renorm(self.dense.weight, 2, 0, c.norm_rate), self.dense.bias)


def _padded(x: Tensor, kernel: int) -> Tensor:
    """Zeros on both sides of the last axis, so that a filter of `kernel` samples keeps the length."""
    return F.pad(x, ((kernel - 1) // 2, kernel // 2))
