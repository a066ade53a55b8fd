"""iTransformer: Inverted Transformers Are Effective for Time Series Forecasting (Liu et al., 2024)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from attn_shared.layers import Dropout
from attn_timeseries.config import ITransformerConfig
from attn_timeseries.models.base import ForecastModel, SeriesShape
from attn_timeseries.models.layers import EncoderLayer, WindowNorm, self_mixer


class ITransformer(ForecastModel):
    """Section 3.1: the whole look-back of one variate is one token; attention runs between variates.

        h_n = Linear(x_{:, n}),   H = layers(H),   y_{:, n} = Linear(h_n)

    The calendar features are further tokens, read by the variates and dropped before the last map. The layers are the
    Transformer's own (post-norm), followed by one more LayerNorm.

    Args:
        config, shape, mixer, mixer_args: see `ForecastModel`. The mixer is the attention of every layer; its sequence
            is the C + F variates, so a mechanism that reads the order of tokens reads the order of columns.

    Raises:
        ValueError: a mixer that cannot compute noncausal self-attention.
    """

    config: ITransformerConfig

    def __init__(
        self,
        config: ITransformerConfig,
        shape: SeriesShape,
        *,
        mixer: str | None = None,
        mixer_args: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(config, shape)
        c = config
        self.norm_window = WindowNorm(shape.channels) if c.use_norm else None
        self.embedding = nn.Linear(shape.seq_len, c.d_model)
        self.dropout = Dropout(c.dropout)
        self.encoder = nn.ModuleList(
            EncoderLayer(
                self_mixer(mixer or "softmax", c.d_model, c.n_heads, dropout=c.dropout, options=mixer_args or {}),
                c.d_ff,
                dropout=c.dropout,
                activation=c.activation,
            )
            for _ in range(c.e_layers)
        )
        self.norm = nn.LayerNorm(c.d_model)
        self.projection = nn.Linear(c.d_model, shape.pred_len)

    def forward(self, x: Tensor, x_mark: Tensor, y_mark: Tensor) -> Tensor:
        self.check_inputs(x, x_mark, y_mark)
        if self.norm_window is not None:
            x, statistics = self.norm_window(x)
        tokens = self.dropout(self.embedding(torch.cat([x, x_mark], dim=2).transpose(1, 2)))
        for layer in self.encoder:
            tokens = layer(tokens)
        y = self.projection(self.norm(tokens[:, : self.shape.channels])).transpose(1, 2)
        return self.norm_window.undo(y, statistics) if self.norm_window is not None else y
