"""DLinear, from "Are Transformers Effective for Time Series Forecasting?" (Zeng et al., 2023)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from attn_timeseries.config import DLinearConfig
from attn_timeseries.models.base import MixerFreeModel, SeriesShape
from attn_timeseries.models.layers import ChannelLinear, SeriesDecomposition


class DLinear(MixerFreeModel):
    """Section 3.2: the window is split into trend and remainder, each mapped to the horizon by one linear layer.

        y = W_s s + b_s + W_t t + b_t,   t = moving average of x,  s = x - t

    along time, the same for every channel or, with `individual`, one pair of maps a channel.
    """

    config: DLinearConfig

    def __init__(
        self,
        config: DLinearConfig,
        shape: SeriesShape,
        *,
        mixer: str | None = None,
        mixer_args: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(config, shape, mixer=mixer, mixer_args=mixer_args)
        self.decomposition = SeriesDecomposition(config.moving_avg, shape.seq_len)
        maps = shape.channels if config.individual else 1
        self.seasonal = ChannelLinear(maps, shape.seq_len, shape.pred_len)
        self.trend = ChannelLinear(maps, shape.seq_len, shape.pred_len)

    def forward(self, x: Tensor, x_mark: Tensor, y_mark: Tensor) -> Tensor:
        self.check_inputs(x, x_mark, y_mark)
        seasonal, trend = self.decomposition(x)
        return self.seasonal(seasonal) + self.trend(trend)
