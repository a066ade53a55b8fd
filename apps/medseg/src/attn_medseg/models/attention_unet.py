"""Attention U-Net: gates on the skip connections, from the sum of two maps.

"Attention U-Net: Learning Where to Look for the Pancreas" (Oktay et al., 2018), section 2.2, as MONAI's `AttentionUnet`
has it: x̂ = x · σ(norm(ψ relu(norm(W_g g) + norm(W_x x)))), with the signal g already on the grid of x, where the paper
computes gates on the coarser grid and interpolates them. Gates are `core_attn`'s, all else is MONAI's.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

from attn_medseg.config import AttentionUNetConfig
from attn_medseg.models.base import ImageShape, Segmenter
from attn_medseg.models.convolutions import check
from core_attn.mechanisms.channel.attention_gate import AttentionGate


class _Gate(nn.Module):
    """`AttentionGate` under the names of MONAI's block."""

    def __init__(self, channels: int, ndim: int) -> None:
        super().__init__()
        self.gate = AttentionGate(channels, channels, axes=ndim, form="sum")

    def forward(self, g: Tensor, x: Tensor) -> Tensor:
        found: Tensor = self.gate(x, g)
        return found


class AttentionUNet(Segmenter):
    """MONAI's attention U-Net. Sizes that the levels cannot halve are padded.

    Args:
        config, shape: see `Segmenter`.
        mixer, mixer_args: not used; no tokens are mixed.
    """

    config: AttentionUNetConfig
    least = 2  # norms need more than one voxel

    def __init__(
        self,
        config: AttentionUNetConfig,
        shape: ImageShape,
        *,
        mixer: str | None = None,
        mixer_args: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(config, shape, mixer=mixer, mixer_args=mixer_args)
        check(config.channels, "batch", dropout=config.dropout)
        if min(config.channels[:-1]) < 2:
            raise ValueError(f"channels must be at least 2 where there are gates, got {list(config.channels)}")
        from monai.networks.nets.attentionunet import AttentionLayer, AttentionUnet

        levels = len(config.channels)
        self.multiple = 2 ** (levels - 1)
        self.network = AttentionUnet(
            spatial_dims=shape.ndim,
            in_channels=shape.channels,
            out_channels=shape.classes,
            channels=tuple(config.channels),
            strides=(2,) * (levels - 1),
            dropout=config.dropout,
        )
        layers = [part for part in self.network.modules() if isinstance(part, AttentionLayer)]
        for layer, channels in zip(layers, config.channels):
            layer.attention = cast(Any, _Gate(channels, shape.ndim))

    def logits(self, x: Tensor) -> Tensor:
        found: Tensor = self.network(x)
        return found

    def maps(self, x: Tensor) -> dict[str, Tensor]:
        """How much of the skip connection each gate lets through, from coarse to fine."""
        taken: list[Tensor] = []
        hooks = [
            part.psi_norm.register_forward_hook(lambda _, __, out: taken.append(torch.sigmoid(out)))
            for part in self.modules()
            if isinstance(part, AttentionGate)
        ]
        try:
            self.network(x)
        finally:
            for hook in hooks:
                hook.remove()
        return {f"gate of level {len(taken) - i}": one[:, 0] for i, one in enumerate(taken)}
