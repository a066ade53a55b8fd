"""Forecasts that need no training: the rows every table must beat."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from attn_timeseries.config import NaiveConfig, SeasonalNaiveConfig
from attn_timeseries.models.base import MixerFreeModel, SeriesShape


class Naive(MixerFreeModel):
    """Every future step equals the last one seen: y_h = x_L."""

    config: NaiveConfig
    any_length: ClassVar[bool] = True

    def forward(self, x: Tensor, x_mark: Tensor, y_mark: Tensor) -> Tensor:
        self.check_inputs(x, x_mark, y_mark)
        return x[:, -1:].repeat(1, self.shape.pred_len, 1)


class SeasonalNaive(MixerFreeModel):
    """Every future step equals the step one season before: y_h = x_{L - m + (h mod m)}, h from 0, m the season.

    The last full season of the look-back is repeated. Where the look-back is shorter than a season there is none, and
    the last value is repeated instead.

    Args:
        config: `season` overrides the shape's when it is not 0.
        shape: the forecasting problem; `season` comes from the data's frequency.

    Raises:
        ValueError: a negative season.
    """

    config: SeasonalNaiveConfig
    any_length: ClassVar[bool] = True

    def __init__(
        self,
        config: SeasonalNaiveConfig,
        shape: SeriesShape,
        *,
        mixer: str | None = None,
        mixer_args: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(config, shape, mixer=mixer, mixer_args=mixer_args)
        if config.season < 0:
            raise ValueError(f"season must be 0 (from the data's frequency) or more steps, got {config.season}")
        season = config.season or shape.season
        self.season = season if season <= shape.seq_len else 1

    @property
    def shortest(self) -> int:
        return max(super().shortest, self.season)

    def forward(self, x: Tensor, x_mark: Tensor, y_mark: Tensor) -> Tensor:
        self.check_inputs(x, x_mark, y_mark)
        steps = torch.arange(self.shape.pred_len, device=x.device) % self.season
        return x[:, x.shape[1] - self.season + steps]
