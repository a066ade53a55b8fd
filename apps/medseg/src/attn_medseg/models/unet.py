"""MONAI's residual U-Net: the control beside every other model.

"U-Net: Convolutional Networks for Biomedical Image Segmentation" (Ronneberger et al., 2015), with the residual units of
Kerfoot et al. (2018), as `monai.networks.nets.UNet` has it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from attn_medseg.config import UNetConfig
from attn_medseg.models.base import ImageShape, Segmenter
from attn_medseg.models.convolutions import check_levels

_GROUPS = 8


class UNet(Segmenter):
    """A convolutional encoder and decoder with skips. Sizes that the levels cannot halve are padded."""

    # Two voxels along an axis at the coarsest level: norms need more than one.
    least = 2

    def __init__(
        self,
        config: UNetConfig,
        shape: ImageShape,
        *,
        mixer: str | None = None,
        mixer_args: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(config, shape, mixer=mixer, mixer_args=mixer_args)
        check_levels(config.channels)
        if config.residual_units < 0:
            raise ValueError(f"residual_units must be 0 or more, got {config.residual_units}")
        if not 0 <= config.dropout < 1:
            raise ValueError(f"dropout must be 0 or more and below 1, got {config.dropout}")
        from monai.networks.nets import UNet as Network

        levels = len(config.channels)
        self.multiple = 2 ** (levels - 1)
        self.network = Network(
            spatial_dims=shape.ndim,
            in_channels=shape.channels,
            out_channels=shape.classes,
            channels=tuple(config.channels),
            strides=(2,) * (levels - 1),
            num_res_units=config.residual_units,
            norm=_norm(config, shape.classes),
            dropout=config.dropout,
        )

    def logits(self, x: Tensor) -> Tensor:
        found: Tensor = self.network(x)
        return found


def _norm(config: UNetConfig, classes: int) -> tuple[str, dict[str, Any]]:
    if config.norm == "group":
        # The last unit with a norm has as many channels as there are classes.
        return "group", {"num_groups": math.gcd(_GROUPS, classes, *config.channels), "affine": True}
    if config.norm == "instance":
        return "instance", {"affine": True}
    if config.norm == "batch":
        return "batch", {}
    raise ValueError(f'norm is {config.norm!r}; it may be "instance", "batch" or "group"')
