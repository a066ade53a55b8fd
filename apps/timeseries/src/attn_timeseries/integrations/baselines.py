"""The Temporal Fusion Transformer and N-HiTS as pytorch-forecasting has them, as models of our tables.

Same windows, splits, loss and budget as every other model. Each column is a series of its own, told apart by a static
category, as that library handles many series; its calendar features are reals known in advance.

Shapes: B batch, L look-back, H horizon, C columns, F calendar features.
"""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from attn_shared.errors import UserError
from attn_timeseries.config import NHiTSConfig, TFTConfig
from attn_timeseries.models.base import MixerFreeModel, SeriesShape

_TARGET, _COLUMN = "value", "column"


class _Borrowed(MixerFreeModel):
    """What both have in common: the network of the library, and its inputs."""

    def __init__(
        self,
        config: Any,
        shape: SeriesShape,
        *,
        mixer: str | None = None,
        mixer_args: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(config, shape, mixer=mixer, mixer_args=mixer_args)
        marks = [f"calendar_{i}" for i in range(shape.marks)]
        columns = [_COLUMN] if shape.channels > 1 and self.knows_column(shape) else []
        self.categories = len(columns)
        self.network = self.build(
            static_categoricals=columns,
            x_categoricals=columns,
            embedding_sizes={name: (shape.channels, min(16, 1 + shape.channels // 2)) for name in columns},
            time_varying_reals_encoder=[*marks, _TARGET],
            time_varying_reals_decoder=marks,
            x_reals=[*marks, _TARGET],
            output_size=1,
            output_transformer=_as_it_is,
            logging_metrics=nn.ModuleList(),
            dataset_parameters={"target": _TARGET},
        )

    @staticmethod
    def knows_column(shape: SeriesShape) -> bool:
        """Whether the network takes the number of the column."""
        return True

    def build(self, **options: Any) -> nn.Module:
        raise NotImplementedError

    def forward(self, x: Tensor, x_mark: Tensor, y_mark: Tensor) -> Tensor:
        self.check_inputs(x, x_mark, y_mark)
        batch, length, columns = x.shape
        steps = self.shape.pred_len

        def each_column(marks: Tensor) -> Tensor:
            return marks.repeat_interleave(columns, dim=0)

        values = x.transpose(1, 2).reshape(batch * columns, length, 1)
        column = torch.arange(columns, device=x.device).repeat(batch)[:, None, None]
        ahead = each_column(y_mark[:, self.shape.label_len :])
        rows = len(values)
        output = self.network(
            {
                "encoder_cont": torch.cat([each_column(x_mark), values], dim=-1),
                "decoder_cont": torch.cat([ahead, values.new_zeros(rows, steps, 1)], dim=-1),
                "encoder_cat": column.expand(-1, length, self.categories),
                "decoder_cat": column.expand(-1, steps, self.categories),
                "encoder_lengths": torch.full((rows,), length, device=x.device),
                "decoder_lengths": torch.full((rows,), steps, device=x.device),
                "target_scale": None,
            }
        )
        return output["prediction"].reshape(batch, columns, steps).transpose(1, 2)


class TFT(_Borrowed):
    """Temporal Fusion Transformers for Interpretable Multi-horizon Time Series Forecasting (Lim et al., 2021)."""

    config: TFTConfig

    def build(self, **options: Any) -> nn.Module:
        library = _library()
        c = self.config
        if c.hidden_size % c.attention_head_size:
            raise ValueError(
                f"attention_head_size must divide hidden_size, got {c.attention_head_size} and {c.hidden_size}"
            )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            network: nn.Module = library.TemporalFusionTransformer(
                hidden_size=c.hidden_size,
                lstm_layers=c.lstm_layers,
                attention_head_size=c.attention_head_size,
                hidden_continuous_size=c.hidden_continuous_size,
                dropout=c.dropout,
                max_encoder_length=self.shape.seq_len,
                loss=library.MAE(),
                **options,
            )
        return network


class NHiTS(_Borrowed):
    """N-HiTS: Neural Hierarchical Interpolation for Time Series Forecasting (Challu et al., 2023)."""

    config: NHiTSConfig

    @staticmethod
    def knows_column(shape: SeriesShape) -> bool:
        return shape.marks > 0  # the library reads static categories only beside covariates

    def build(self, **options: Any) -> nn.Module:
        library = _library()
        c = self.config
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            network: nn.Module = library.NHiTS(
                context_length=self.shape.seq_len,
                prediction_length=self.shape.pred_len,
                hidden_size=c.hidden_size,
                n_blocks=[c.blocks] * c.stacks,
                n_layers=c.n_layers,
                dropout=c.dropout,
                pooling_mode=c.pooling_mode,
                interpolation_mode=c.interpolation_mode,
                batch_normalization=c.batch_normalization,
                shared_weights=c.shared_weights,
                naive_level=c.naive_level,
                activation=c.activation,
                loss=library.MAE(),
                **options,
            )
        return network


def _as_it_is(output: Mapping[str, Any]) -> Tensor:
    """The output transformer: values are scaled outside of the network."""
    prediction: Tensor = output["prediction"]
    return prediction


def _library() -> Any:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return importlib.import_module("pytorch_forecasting")
    except ImportError:
        raise UserError(
            "the models tft and nhits are those of pytorch-forecasting, which is not installed; "
            "pip install 'attn-timeseries[pytorch-forecasting]' adds it"
        ) from None
