"""Our forecasting models in pytorch-forecasting (its v1 interface): on a `TimeSeriesDataSet`, in a Lightning `Trainer`.

    from attn_timeseries.integrations.pytorch_forecasting import Forecaster

    training = TimeSeriesDataSet(frame, …, min_encoder_length=96, max_encoder_length=96,
                                 min_prediction_length=24, max_prediction_length=24)
    model = Forecaster.from_dataset(training, model="patchtst", mixer="gla", learning_rate=1e-3)
    lightning.Trainer(max_epochs=10).fit(model, training.to_dataloader(train=True, batch_size=32), …)
    model.predict(…)

The targets come scaled by the data set's normaliser and leave in its units, through `output_transformer`. Several
targets, with a `MultiNormalizer`, are the channels of one model. What the data set knows beside them reaches the model
as it reaches it everywhere in this application: as covariates.

Shapes: B batch, L look-back, H horizon, C targets, Q quantiles.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from attn_shared.app import load
from attn_shared.errors import UserError
from attn_timeseries.config import MODELS
from attn_timeseries.models.base import ForecastModel, SeriesShape
from attn_timeseries.models.covariates import CovariateModel, CovariateShape
from attn_timeseries.models.quantiles import QuantileModel

try:
    from pytorch_forecasting import TimeSeriesDataSet
    from pytorch_forecasting.metrics import MAE, MultiLoss, QuantileLoss
    from pytorch_forecasting.models import BaseModel
except ImportError:
    raise UserError(
        "this integration needs pytorch-forecasting, which is not installed; "
        "pip install 'attn-timeseries[pytorch-forecasting]' adds it"
    ) from None


class Forecaster(BaseModel):
    """One of our forecasting models as a model of pytorch-forecasting. Made by `from_dataset`.

    Args:
        model: name in `attn_timeseries.config.MODELS`, of a model that forecasts.
        model_args: its options, by name.
        mixer: attention mechanism in place of the model's own.
        mixer_args: its options.
        seq_len, label_len, pred_len: look-back, its part that starts a decoder, horizon.
        season: steps of a season; 1 = none known.
        targets: names of the targets.
        calendar: reals known in advance that the model takes as calendar features.
        roles: role of a covariate (`attn_timeseries.data.windows.COVARIATES`) -> names.
        sizes: categorical name -> number of its classes.
        x_reals, x_categoricals: order of the columns of the data set's tensors.
        loss: a metric of pytorch-forecasting; with a `QuantileLoss` whose quantiles hold 0.5, the model gets a head of
            quantiles around its forecast.
        options: of `BaseModel`, such as learning_rate, optimizer, weight_decay, logging_metrics.
    """

    def __init__(
        self,
        model: str = "patchtst",
        model_args: Mapping[str, Any] | None = None,
        mixer: str | None = None,
        mixer_args: Mapping[str, Any] | None = None,
        seq_len: int = 96,
        label_len: int = 48,
        pred_len: int = 24,
        season: int = 1,
        targets: Sequence[str] = ("value",),
        calendar: Sequence[str] = (),
        roles: Mapping[str, Sequence[str]] | None = None,
        sizes: Mapping[str, int] | None = None,
        x_reals: Sequence[str] = ("value",),
        x_categoricals: Sequence[str] = (),
        loss: Any = None,
        **options: Any,
    ) -> None:
        self.save_hyperparameters(ignore=["loss"])
        super().__init__(loss=loss if loss is not None else MAE(), **options)
        card = MODELS.get(model)
        if card is None or (card.kinds and "forecast" not in card.kinds):
            known = [name for name, other in MODELS.items() if not other.kinds or "forecast" in other.kinds]
            raise ValueError(f"unknown forecasting model {model!r}; there are {', '.join(known)}")
        shape = SeriesShape(
            seq_len=seq_len,
            label_len=label_len,
            pred_len=pred_len,
            channels=len(targets),
            marks=len(calendar),
            season=season,
        )
        base: ForecastModel = load(card.target)(
            card.config(**dict(model_args or {})), shape, mixer=mixer, mixer_args=dict(mixer_args or {})
        )
        network: nn.Module = base
        self.roles = {role: list(names) for role, names in (roles or {}).items() if names}
        if self.roles and card.trainable:
            # Index 0 is that of unknown categories here, so the classes of the data set begin at 1.
            extent: dict[str, Any] = {
                role: tuple((sizes or {})[name] + 1 for name in names) if role.endswith("_cat") else len(names)
                for role, names in self.roles.items()
            }
            network = CovariateModel(base, CovariateShape(**extent))
        self.takes_covariates = isinstance(network, CovariateModel)
        levels_of = _quantiles(self.loss)
        if levels_of is not None:
            network = QuantileModel(network, shape, levels_of)
        self.network = network
        self.lengths = shape
        self.places = {
            "targets": [list(x_reals).index(name) for name in targets],
            "calendar": [list(x_reals).index(name) for name in calendar],
            **{
                role: [list(x_categoricals if role.endswith("_cat") else x_reals).index(name) for name in names]
                for role, names in self.roles.items()
            },
        }

    @classmethod
    def from_dataset(  # type: ignore[override]
        cls, dataset: TimeSeriesDataSet, *, calendar: Sequence[str] = (), label_len: int | None = None, **options: Any
    ) -> Forecaster:
        """The model for a data set.

        Args:
            dataset: of one look-back and one horizon, its targets among `time_varying_unknown_reals`.
            calendar: which of its known reals are calendar features, in about [-0.5, 0.5]; the other known reals are
                covariates.
            label_len: None = half the look-back.
            options: the other arguments of the class; `loss` may be one metric for several targets.

        Raises:
            ValueError: a data set that our models cannot take, in one sentence.
        """
        length, steps = dataset.max_encoder_length, dataset.max_prediction_length
        if dataset.min_encoder_length != length or dataset.min_prediction_length != steps:
            raise ValueError(
                "our models take one look-back and one horizon: make the data set with min_encoder_length equal to "
                "max_encoder_length and min_prediction_length equal to max_prediction_length"
            )
        if dataset._variable_groups:
            raise ValueError("our models take no variable_groups; name the categorical columns one by one")
        targets = list(dataset.target_names)
        unknown = list(dataset._time_varying_unknown_reals)
        absent = [name for name in targets if name not in unknown]
        if absent:
            raise ValueError(
                f"the target {absent[0]!r} must be among time_varying_unknown_reals, so that the look-back shows it"
            )
        known = list(dataset._time_varying_known_reals)
        for name in calendar:
            if name not in known:
                raise ValueError(
                    f"{name!r} is none of the reals known in advance: {', '.join(known) or 'there are none'}"
                )
        roles = {
            "past": [name for name in unknown if name not in targets],
            "past_cat": list(dataset._time_varying_unknown_categoricals),
            "known": [name for name in known if name not in calendar],
            "known_cat": list(dataset._time_varying_known_categoricals),
            "static": list(dataset._static_reals),
            "static_cat": list(dataset._static_categoricals),
        }
        named = {name for role, names in roles.items() if role.endswith("_cat") for name in names}
        sizes = {name: len(coder.classes_) for name, coder in dataset._categorical_encoders.items() if name in named}
        options.update(cls.deduce_default_output_parameters(dataset, options, MAE()))
        options.pop("output_size", None)
        return super().from_dataset(
            dataset,
            seq_len=length,
            pred_len=steps,
            label_len=length // 2 if label_len is None else label_len,
            targets=targets,
            calendar=list(calendar),
            roles={role: names for role, names in roles.items() if names},
            sizes=sizes,
            x_reals=list(dataset.reals),
            x_categoricals=list(dataset.flat_categoricals),
            **options,
        )

    def forward(self, x: Mapping[str, Any]) -> Any:
        """A batch of the data set -> prediction in its units, (B, H, 1 or Q), a list of them for several targets."""
        output = self.network(*self.inputs(x), **(self.covariates(x) if self.takes_covariates else {}))
        several = output.dim() == 4
        parts = [output[..., c, :] if several else output[..., c : c + 1] for c in range(self.lengths.channels)]
        scaled = parts if len(parts) > 1 else parts[0]
        return self.to_network_output(prediction=self.transform_output(scaled, target_scale=x["target_scale"]))

    def inputs(self, x: Mapping[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
        """Look-back and calendar features as our models take them."""
        past, ahead = x["encoder_cont"], x["decoder_cont"]
        if past.shape[1] != self.lengths.seq_len or ahead.shape[1] != self.lengths.pred_len:
            raise ValueError(
                f"the model was built for {self.lengths.seq_len} steps to {self.lengths.pred_len}, got "
                f"{past.shape[1]} to {ahead.shape[1]}"
            )
        marks = torch.cat([past, ahead], dim=1)[..., self.places["calendar"]]
        start = self.lengths.seq_len
        return past[..., self.places["targets"]], marks[:, :start], marks[:, start - self.lengths.label_len :]

    def covariates(self, x: Mapping[str, Any]) -> dict[str, Tensor]:
        """What else the data set knows, by role."""
        found = {}
        for role in self.roles:
            kind, shift = ("cat", 1) if role.endswith("_cat") else ("cont", 0)
            past, ahead = x[f"encoder_{kind}"], x[f"decoder_{kind}"]
            if role.startswith("static"):
                table = past[:, 0]
            else:
                table = torch.cat([past, ahead], dim=1) if role.startswith("known") else past
            found[role] = table[..., self.places[role]] + shift
        return found


def _quantiles(loss: Any) -> list[float] | None:
    """The levels of a quantile loss; of several, which must be the same.

    Raises:
        ValueError: levels without 0.5, which is the forecast itself.
    """
    losses = list(loss.metrics) if isinstance(loss, MultiLoss) else [loss]
    found = {tuple(one.quantiles) if isinstance(one, QuantileLoss) else None for one in losses}
    if len(found) > 1:
        raise ValueError("the losses of all targets must have the same quantiles")
    (levels,) = found
    if levels is None:
        return None
    if 0.5 not in levels or list(levels) != sorted(levels):
        raise ValueError(f"the quantiles must increase and hold 0.5, the forecast itself, got {list(levels)}")
    return list(levels)
