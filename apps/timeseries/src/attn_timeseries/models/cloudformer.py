"""CloudFormer: An Attention-based Performance Prediction for Public Clouds with Unknown Workload (S11).

The paper predicts one number, how much a virtual machine is slowed down, from its metrics over time; neither code nor
data are public. What is the paper's here: two branches of Transformer encoders over the same window, one whose tokens
are the steps (how the load evolves), one whose tokens are the metrics (how they interact), joined before the output
layers. Ours: everything that makes it a forecaster, namely the window's normalisation, the output for each metric from
its own token beside the mean of the steps, and all sizes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from attn_shared.layers import Dropout
from attn_timeseries.config import CloudFormerConfig
from attn_timeseries.models.base import ForecastModel, SeriesShape
from attn_timeseries.models.embedding import sinusoidal_positions
from attn_timeseries.models.layers import ACTIVATIONS, EncoderLayer, WindowNorm, self_mixer


class CloudFormer(ForecastModel):
    """Steps attend to steps, metrics to metrics; each metric's forecast reads its token and the mean of the steps.

        T = encoder(x W_t + positions)      L tokens, the look-back's steps
        S = encoder(x^T W_s)                C tokens, the metrics
        y_c = W_2 act(W_1 [S_c ; mean T])   pred_len steps of metric c

    Args:
        config, shape, mixer, mixer_args: see `ForecastModel`. The mixer is the attention of both branches; in the one
            over metrics, a mechanism that reads the order of tokens reads the order of columns.

    Raises:
        ValueError: a mixer that cannot compute noncausal self-attention; no encoder layer.
    """

    config: CloudFormerConfig

    def __init__(
        self,
        config: CloudFormerConfig,
        shape: SeriesShape,
        *,
        mixer: str | None = None,
        mixer_args: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(config, shape)
        c, name, options = config, mixer or "softmax", dict(mixer_args or {})
        if c.e_layers < 1:
            raise ValueError(f"e_layers must be at least 1, got {c.e_layers}")

        def branch() -> nn.ModuleList:
            return nn.ModuleList(
                EncoderLayer(
                    self_mixer(name, c.d_model, c.n_heads, dropout=c.dropout, options=options),
                    c.d_ff,
                    dropout=c.dropout,
                    activation=c.activation,
                )
                for _ in range(c.e_layers)
            )

        self.norm_window = WindowNorm(shape.channels) if c.use_norm else None
        self.time_embedding = nn.Linear(shape.channels, c.d_model)
        self.register_buffer("positions", sinusoidal_positions(shape.seq_len, c.d_model), persistent=False)
        self.time_branch = branch()
        self.metric_embedding = nn.Linear(shape.seq_len, c.d_model)
        self.metric_branch = branch()
        self.dropout = Dropout(c.dropout)
        self.join = nn.Linear(2 * c.d_model, c.d_ff)
        self.activation = ACTIVATIONS[c.activation]
        self.projection = nn.Linear(c.d_ff, shape.pred_len)

    def forward(self, x: Tensor, x_mark: Tensor, y_mark: Tensor) -> Tensor:
        self.check_inputs(x, x_mark, y_mark)
        if self.norm_window is not None:
            x, statistics = self.norm_window(x)
        steps = self.dropout(self.time_embedding(x) + self.positions)
        for layer in self.time_branch:
            steps = layer(steps)
        metrics = self.dropout(self.metric_embedding(x.transpose(1, 2)))
        for layer in self.metric_branch:
            metrics = layer(metrics)
        both = torch.cat([metrics, steps.mean(dim=1, keepdim=True).expand_as(metrics)], dim=-1)
        y = self.projection(self.dropout(self.activation(self.join(both)))).transpose(1, 2)
        return self.norm_window.undo(y, statistics) if self.norm_window is not None else y
