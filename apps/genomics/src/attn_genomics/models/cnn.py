"""The small convolutional network that every other model must beat; of no paper.

Motifs (one convolution and its maxima over a few bases), then dilated convolutions with residual connections, each with
batch normalisation and GELU. Shapes: B sequences, L bases, P places, C channels.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attn_genomics.config import CNNConfig
from attn_genomics.models.base import Backbone, Shape
from attn_genomics.models.blocks import LETTERS, letters, strongest
from attn_shared.errors import UserError
from attn_shared.layers import Dropout


class CNN(Backbone):
    """Convolutions, see the file's docstring."""

    def __init__(
        self,
        config: CNNConfig,
        shape: Shape,
        *,
        mixer: str | None = None,
        mixer_args: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(config, shape, mixer=mixer, mixer_args=mixer_args)
        if mixer is not None:
            raise UserError("cnn has no attention that --mixer could replace")
        if config.pool < 1 or config.kernel < 1 or config.taps < 1:
            raise ValueError("kernel, taps and pool must be at least 1")
        self.width, self.strides = config.channels, config.pool
        self.motifs = nn.Conv1d(LETTERS, config.channels, config.kernel)
        self.layers = nn.ModuleList(
            nn.Conv1d(config.channels, config.channels, config.taps, dilation=2**layer)
            for layer in range(config.layers)
        )
        self.norms = nn.ModuleList(_Norm(config.channels) for _ in range(config.layers + 1))
        self.dropout = Dropout(config.dropout)

    def forward(self, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
        x = letters(tokens, self.motifs.weight.dtype)
        if mask is not None:  # whatever stands there, it is no base
            x = x.masked_fill(~mask.unsqueeze(-1), 0.0)
        x = F.gelu(self.norms[0](_same(self.motifs, x.mT), mask))
        x, mask = strongest(x, mask, self.strides)
        x = self.dropout(x)
        for layer, norm in zip(self.layers, list(self.norms)[1:], strict=True):
            if mask is not None:
                x = x.masked_fill(~mask.unsqueeze(1), 0.0)
            x = x + self.dropout(F.gelu(norm(_same(layer, x), mask)))
        return x.mT


def _same(layer: nn.Module, x: Tensor) -> Tensor:
    """A convolution with zeros around, so that length stays."""
    assert isinstance(layer, nn.Conv1d)
    around = layer.dilation[0] * (layer.kernel_size[0] - 1)
    return layer(F.pad(x, (around // 2, around - around // 2)))


class _Norm(nn.BatchNorm1d):
    """Batch normalisation over what is real: (B, C, P), mask (B, P)."""

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        if mask is None or not self.training:
            return super().forward(x)
        rows = x.mT[mask]
        if len(rows) < 2:
            return super().forward(x)
        return torch.zeros_like(x.mT).masked_scatter(mask.unsqueeze(-1), super().forward(rows)).mT
