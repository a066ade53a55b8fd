"""Controls without attention: what a linear map and a plain network make of the same features."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from attn_eeg.config import LinearConfig, MLPConfig
from attn_eeg.models.base import EegShape, MixerFreeModel
from attn_shared.layers import Dropout


class MLP(MixerFreeModel):
    """Features of all electrodes in one vector, hidden layers of GELU with dropout, logits.

    Unlike a mean over electrodes' tokens, the vector keeps which electrode a feature belongs to, so this is the fair
    control for what attention adds.

    Raises:
        ValueError: no hidden layer; a dropout outside [0, 1).
    """

    config: MLPConfig

    def __init__(
        self,
        config: MLPConfig,
        shape: EegShape,
        *,
        mixer: str | None = None,
        mixer_args: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(config, shape, mixer=mixer, mixer_args=mixer_args)
        if min(config.hidden, config.depth) < 1:
            raise ValueError(f"hidden and depth must be at least 1, got {config.hidden} and {config.depth}")
        layers: list[nn.Module] = []
        width = shape.channels * shape.width
        for _ in range(config.depth):
            layers += [nn.Linear(width, config.hidden), nn.GELU(), Dropout(config.dropout)]
            width = config.hidden
        self.net = nn.Sequential(*layers, nn.Linear(width, shape.classes))

    def forward(self, x: Tensor) -> Tensor:
        self.check_inputs(x)
        logits: Tensor = self.net(x.flatten(1))
        return logits


class Linear(MixerFreeModel):
    """One linear map from the features of all electrodes to logits; starts at zero, as logistic regression does."""

    config: LinearConfig

    def __init__(
        self,
        config: LinearConfig,
        shape: EegShape,
        *,
        mixer: str | None = None,
        mixer_args: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(config, shape, mixer=mixer, mixer_args=mixer_args)
        self.map = nn.Linear(shape.channels * shape.width, shape.classes)
        nn.init.zeros_(self.map.weight)
        nn.init.zeros_(self.map.bias)

    def forward(self, x: Tensor) -> Tensor:
        self.check_inputs(x)
        logits: Tensor = self.map(x.flatten(1))
        return logits
