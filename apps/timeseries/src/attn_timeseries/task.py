"""The forecasting task: data, loss, scores, baselines, pictures."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from attn_shared.app import load
from attn_shared.config import RunConfig
from attn_shared.errors import UserError
from attn_shared.task import DataBundle, Picture, Task
from attn_timeseries import baselines as simple
from attn_timeseries import metrics
from attn_timeseries.calibration import Calibration, Outcome, Streams, check_windows, unit_quantiles, widen
from attn_timeseries.config import MODELS, ForecastTaskConfig
from attn_timeseries.data.benchmarks import all_borders, borders, split_rule
from attn_timeseries.data.calendar import feature_names, season_of, unit
from attn_timeseries.data.cards import DATASETS, ForecastDataConfig
from attn_timeseries.data.covariates import OPTIONS, CovariateCoder
from attn_timeseries.data.sources import read_source
from attn_timeseries.data.table import SeriesTable
from attn_timeseries.data.times import check_frequency
from attn_timeseries.data.windows import (
    COVARIATES,
    Scaler,
    Windows,
    check_lengths,
    make_windows,
    train_rows,
    without_windows,
)
from attn_timeseries.models.base import ForecastModel, SeriesShape
from attn_timeseries.models.covariates import CovariateModel, CovariateShape
from attn_timeseries.models.quantiles import QuantileModel, pinball
from attn_timeseries.published import published

_PANELS = 4
_INTERVALS: WeakKeyDictionary[Windows, dict[str, dict[str, dict[str, Tensor]]]] = WeakKeyDictionary()


class ForecastTask(Task):
    """Forecast `pred_len` steps of all columns from `seq_len` steps, and intervals around them if asked for."""

    primary: ClassVar[str] = "mse"
    maximize: ClassVar[bool] = False
    metric_format: ClassVar[Mapping[str, str]] = metrics.FORMAT
    options_type: ClassVar[type[ForecastTaskConfig]] = ForecastTaskConfig

    @classmethod
    def options_of(cls, config: RunConfig) -> ForecastTaskConfig:
        """The task's options; its default ones where a configuration has none."""
        options = config.task_args if config.task_args is not None else cls.options_type()
        assert isinstance(options, ForecastTaskConfig)
        return options

    def __init__(self, config: RunConfig, data_state: Mapping[str, Any]) -> None:
        super().__init__(config, data_state)
        args: ForecastDataConfig = config.data_args
        self.shape = self.series_shape(args, data_state)
        try:
            base: ForecastModel = load(MODELS[config.model].target)(
                config.model_args, self.shape, mixer=config.mixer, mixer_args=dict(config.mixer_args)
            )
        except ValueError as error:
            raise UserError(f"model {config.model!r}: {error}") from None
        trainable = MODELS[config.model].trainable
        self.network: ForecastModel | CovariateModel | QuantileModel = base
        self._takes_covariates = "covariates" in data_state and trainable
        if self._takes_covariates:
            self.network = CovariateModel(base, CovariateShape.from_state(data_state["covariates"]))
        self.options = self.options_of(config)
        if self.options.loss == "quantile":
            if not trainable:
                raise UserError(
                    f"{config.model} learns nothing, so it has no quantiles; give it intervals with "
                    "--task_args.calibrate conformal and another loss"
                )
            self.network = QuantileModel(self.network, self.shape, self.options.levels)
            self.primary = "pinball"  # type: ignore[misc]
        self.calibration: Calibration | None = None
        if self.options.calibrate != "none":
            if self.options.calibrate == "adaptive" and config.trainer.devices > 1:
                raise UserError(
                    "adaptive calibration follows the forecasts in order of time, which several processes cannot "
                    "share; use --trainer.devices 1 or --task_args.calibrate conformal"
                )
            self.calibration = Calibration(self.options.levels, self.shape.pred_len, self.shape.channels)
        self._intervals: dict[str, metrics.IntervalScores] = {}
        self._streams: dict[str, Streams] = {}
        self._seen: dict[str, int] = {}
        self.scaler = Scaler.from_state(data_state["scaler"])
        self._scores: dict[str, metrics.ForecastScores] = {}

    @classmethod
    def series_shape(cls, args: ForecastDataConfig, data_state: Mapping[str, Any]) -> SeriesShape:
        """The problem that a model is built for."""
        return SeriesShape(
            seq_len=args.seq_len,
            label_len=args.label_len,
            pred_len=args.pred_len,
            channels=len(data_state["columns"]),
            marks=len(feature_names(data_state["calendar"])),
            season=data_state["season"],
        )

    @property
    def model(self) -> ForecastModel | CovariateModel | QuantileModel:
        return self.network

    # -- data ---------------------------------------------------------------------------------------------------------

    @classmethod
    def load_data(cls, config: RunConfig, *, state: Mapping[str, Any] | None = None) -> DataBundle:
        args: ForecastDataConfig = config.data_args
        if state is not None:
            args = dataclasses.replace(args, columns=list(state["columns"]))
        return cls.bundle(config, args, read_source(config.data, args), split_rule(args, config.data), state)

    @classmethod
    def bundle(
        cls,
        config: RunConfig,
        args: ForecastDataConfig,
        table: SeriesTable,
        rule: str,
        state: Mapping[str, Any] | None = None,
    ) -> DataBundle:
        """The splits of a table that has been read, by one of the rules of `data.benchmarks`."""
        if state is None:
            check_lengths(table.series, rule, args, table.source)
            state = fit_state(table, rule, args)
            if cls.options_of(config).calibrate != "none":
                ends = [cut.val for cut in all_borders(table.series, rule, args)]
                state["calibrated_to"] = {
                    one.name: str(one.times[end - 1]) for one, end in zip(table.series, ends) if end
                }
        else:
            check_step(table, state)
        scaler = Scaler.from_state(state["scaler"])
        coder = CovariateCoder.from_state(state["covariates"]) if "covariates" in state else None
        splits = make_windows(table.series, rule, args, scaler, state["calendar"], coder)
        if cls.options_of(config).calibrate != "none":
            check_windows(cls.options_of(config).levels, len(splits["val"] or ()))
        if splits["test"] is None and splits["train"] is None:
            raise UserError(
                f"{table.source}: no window of seq_len {args.seq_len} + pred_len {args.pred_len} steps fits in it"
            )
        return DataBundle(
            train=splits["train"],
            val=splits["val"],
            test=splits["test"],
            state=dict(state),
            facts=_facts(table, rule, args, splits, state),
            protocol=_protocol(config.data, rule, args, splits, state) + promise(cls.options_of(config)),
        )

    # -- training -----------------------------------------------------------------------------------------------------

    def _output(self, batch: Mapping[str, Tensor]) -> Tensor:
        """What the network says: (B, pred_len, C) forecast, or (B, pred_len, C, Q) quantiles; scaled."""
        covariates = {}
        if self._takes_covariates:
            covariates = {name: batch[name] for name in COVARIATES if name in batch}
        output: Tensor = self.network(batch["x"], batch["x_mark"], batch["y_mark"], **covariates)
        return output

    def forward_batch(self, batch: Mapping[str, Tensor]) -> Tensor:
        """(B, pred_len, C) forecast, scaled; the median where there are quantiles."""
        return self._centre(self._output(batch))

    def _centre(self, output: Tensor) -> Tensor:
        return output[..., self.network.middle] if isinstance(self.network, QuantileModel) else output

    def quantiles(self, output: Tensor) -> Tensor:
        """(B, pred_len, C, Q) of an output of the network, not calibrated; of a forecast alone, unit distances."""
        return (
            output if isinstance(self.network, QuantileModel) else unit_quantiles(output, len(self.options.levels) // 2)
        )

    def target(self, batch: Mapping[str, Tensor]) -> Tensor:
        """(B, pred_len, C) what came, scaled."""
        return batch["y"][:, -self.shape.pred_len :]

    def training_loss(self, batch: Mapping[str, Tensor]) -> Tensor:
        output, target = self._output(batch), self.target(batch)
        if isinstance(self.network, QuantileModel):
            error = pinball(output, target, output.new_tensor(self.options.levels)).mean(dim=-1)
        elif self.options.loss == "mae":
            error = (output - target).abs()
        elif self.options.loss == "huber":
            error = F.huber_loss(output, target, reduction="none")
        else:
            error = (output - target).square()
        if "observed" not in batch:
            return error.mean()
        known = batch["observed"]
        return torch.where(known, error, 0.0).sum() / known.sum().clamp_min(1)

    # -- calibration --------------------------------------------------------------------------------------------------

    def on_train_start(self) -> None:
        if self.calibration is not None:  # a calibration of other weights
            self.calibration.forget()

    def after_training(self, batches: Callable[[str], Iterable[Any]]) -> bool:
        """Calibrate the intervals on the validation split."""
        if self.calibration is None:
            return False

        def outcomes() -> Iterator[Outcome]:
            for batch in batches("val"):
                yield self._outcome(batch, self._output(batch))

        self.calibration.fit(outcomes, online=self.options.calibrate == "adaptive")
        return True

    def _outcome(self, batch: Mapping[str, Tensor], output: Tensor) -> Outcome:
        return Outcome.of(self.quantiles(output), self.target(batch), batch.get("observed"), batch["series"])

    @property
    def intervals_ready(self) -> bool:
        """Whether forecasts have intervals now: learnt quantiles, or calibrated ones."""
        return self.calibration.ready if self.calibration is not None else self.options.intervals

    # -- scores -------------------------------------------------------------------------------------------------------

    def _score(self, split: str) -> metrics.ForecastScores:
        if split not in self._scores:
            self._scores[split] = new_scores(self.data_state, self.shape.pred_len)
        return self._scores[split]

    def reset_metrics(self, split: str) -> None:
        self._score(split).reset()
        std = torch.from_numpy(self.scaler.std)
        self._intervals[split] = metrics.IntervalScores(
            self.shape.pred_len, std, self.options.levels, self.options.pair
        )
        self._streams.pop(split, None)
        self._seen[split] = 0

    def update_metrics(self, split: str, batch: Mapping[str, Tensor]) -> None:
        output = self._output(batch)
        self._score(split).update(
            self._centre(output), self.target(batch), batch["group"], batch.get("observed"), batch["index"]
        )
        if self.options.intervals:
            self._update_intervals(split, batch, self._outcome(batch, output))

    def _update_intervals(self, split: str, batch: Mapping[str, Tensor], outcome: Outcome) -> None:
        def score(variant: str, quantiles: Tensor) -> None:
            self._intervals[split].update(variant, quantiles, outcome.target, batch["group"], outcome.known)

        learnt = self.options.loss == "quantile"
        if self.calibration is None or not self.calibration.ready:
            if learnt:
                score("", outcome.quantiles)
            return
        if learnt:
            score("raw", outcome.quantiles)
        conformal = widen(outcome.quantiles, self.calibration.conformal())
        if self._follows(split):
            if batch["index"].tolist() != list(range(self._seen[split], self._seen[split] + len(batch["index"]))):
                raise UserError("adaptive calibration follows all windows in order, so it needs --trainer.devices 1")
            self._seen[split] += len(batch["index"])
            score("conformal", conformal)
            score("", widen(outcome.quantiles, self._stream(split).follow(outcome)))
        else:
            score("", conformal)

    def _follows(self, split: str) -> bool:
        """Whether intervals adapt along a split: along what comes after the validation split."""
        return self.options.calibrate == "adaptive" and split == "test"

    def _stream(self, split: str) -> Streams:
        if split not in self._streams:
            assert self.calibration is not None
            self._streams[split] = Streams(self.calibration)
        return self._streams[split]

    def metric_state(self, split: str) -> dict[str, Tensor]:
        return {**self._score(split).state(), **self._intervals[split].state()}

    def compute_metrics(self, split: str, sums: Mapping[str, Tensor]) -> dict[str, float]:
        return metrics.final(sums)

    # -- beside the model ---------------------------------------------------------------------------------------------

    @classmethod
    def _simple(cls, config: RunConfig, bundle: DataBundle) -> list[simple.Baseline]:
        assert bundle.train is None or isinstance(bundle.train, Windows)
        assert bundle.val is None or isinstance(bundle.val, Windows)
        return simple.baselines(bundle.train, bundle.val, bundle.state["season"], config.data_args.pred_len)

    @classmethod
    def _simple_scores(cls, config: RunConfig, bundle: DataBundle) -> dict[str, metrics.ForecastScores]:
        pred_len = config.data_args.pred_len
        rows = cls._simple(config, bundle)
        scores = {row.name: new_scores(bundle.state, pred_len) for row in rows}
        assert isinstance(bundle.test, Windows)
        for batch in simple.batches(bundle.test):
            for row in rows:
                target = batch["y"][:, -pred_len:]
                scores[row.name].update(row.of(batch), target, batch["group"], batch.get("observed"))
        return scores

    @classmethod
    def baselines(cls, config: RunConfig, bundle: DataBundle) -> list[dict[str, Any]]:
        if bundle.test is None:
            return []
        notes = {row.name: row.note for row in cls._simple(config, bundle)}
        scores, intervals = cls._simple_scores(config, bundle), cls.simple_intervals(config, bundle)
        return [
            {"model": name, "note": notes[name], **metrics.final(score.state() | intervals.get(name, {}))}
            for name, score in scores.items()
        ]

    @classmethod
    def simple_intervals(cls, config: RunConfig, bundle: DataBundle) -> dict[str, dict[str, Tensor]]:
        """Name of a baseline -> the sums of its intervals on the test split; empty where none are asked for."""
        options = cls.options_of(config)
        train, val, test = bundle.train, bundle.val, bundle.test
        if not options.intervals or not isinstance(train, Windows) or not isinstance(test, Windows):
            return {}
        assert val is None or isinstance(val, Windows)
        known = _INTERVALS.setdefault(test, {})
        if repr(options) not in known:
            std = torch.from_numpy(Scaler.from_state(bundle.state["scaler"]).std)
            rows = simple.interval_scores(cls._simple(config, bundle), train, val, test, std, options)
            known[repr(options)] = {name: scores.state() for name, scores in rows.items()}
        return known[repr(options)]

    def published(self) -> list[dict[str, Any]]:
        if split_rule(self.config.data_args, self.config.data) != split_rule(ForecastDataConfig(), self.config.data):
            return []
        return published(self.config.data, self.config.data_args.pred_len)

    # -- pictures -----------------------------------------------------------------------------------------------------

    def pictures(self, bundle: DataBundle) -> Iterable[Picture]:
        from attn_timeseries.plots import forecast_panels, horizon_curves

        if not isinstance(bundle.test, Windows):
            return
        number, error = self._test_errors(bundle.test)
        spread = [int(len(bundle.test) * (2 * i + 1) / (2 * _PANELS)) for i in range(_PANELS)]
        worst = _apart(number[error.argsort(descending=True)].tolist(), self.shape.pred_len)
        factors = self._factors(bundle.test, {*spread, *worst})
        columns = len(self.data_state["columns"])
        channels = [(columns - 1 - i * max(1, columns // _PANELS)) % columns for i in range(_PANELS)]
        yield Picture(
            name="forecasts",
            caption="Test windows spread over the whole test part: look-back, what came, and the forecast"
            + (f", shaded the intervals of {self._promised()}." if self.intervals_ready else "."),
            figure=forecast_panels([self._panel(bundle, i, c, factors.get(i)) for i, c in zip(spread, channels)]),
        )
        curves = {self.config.model: metrics.curve(self._score("test").state())}
        for name, score in self._simple_scores(self.config, bundle).items():
            curves[name] = metrics.curve(score.state())
        yield Picture(
            name="horizon",
            caption="Squared error at each step ahead, mean over all test windows and columns.",
            figure=horizon_curves(curves),
        )
        yield from self._interval_pictures(bundle)
        yield Picture(
            name="worst",
            caption="The test windows with the largest error (none overlapping), each in its worst column.",
            figure=forecast_panels([self._panel(bundle, i, None, factors.get(i)) for i in worst]),
        )

    def _promised(self) -> str:
        """The coverage of each interval, the widest first: "90 %, 50 %"."""
        return ", ".join(f"{1 - 2 * level:.0%}" for level in self.options.levels if level < 0.5).replace("%", " %")

    def _interval_pictures(self, bundle: DataBundle) -> Iterable[Picture]:
        from attn_timeseries.plots import interval_curves, reliability_curve

        if not self.intervals_ready:
            return
        sums, options = self._intervals["test"].state(), self.options
        names = {"": self.config.model, "conformal": "without adaptation", "raw": "not calibrated"}
        kinds = {names[variant]: (sums, variant) for variant in metrics.variants(sums)}
        simple_ones = self.simple_intervals(self.config, bundle)
        simplest = "seasonal_naive" if "seasonal_naive" in simple_ones else "naive"
        if simplest in simple_ones:
            kinds[f"{simplest}, calibrated alike"] = (simple_ones[simplest], "")
        curves = {
            name: (metrics.interval_curve(s, "covered", v), metrics.interval_curve(s, "width", v))
            for name, (s, v) in kinds.items()
        }
        yield Picture(
            name="coverage",
            caption=f"Intervals of {options.coverage:.0%} at each step ahead: share of the truth inside, and mean "
            "width, over all test windows and columns.",
            figure=interval_curves(curves, options.coverage),
        )
        yield Picture(
            name="reliability",
            caption="Share of the truth of the test windows that lies at or below each quantile.",
            figure=reliability_curve(
                options.levels, {name: metrics.reliability(s, v) for name, (s, v) in kinds.items() if s is sums}
            ),
        )

    @torch.no_grad()
    def _factors(self, windows: Windows, wanted: set[int]) -> dict[int, Tensor]:
        """Number of a wanted test window -> the factors (H, C, P) of its intervals; empty without calibration."""
        if self.calibration is None or not self.calibration.ready:
            return {}
        if self.options.calibrate == "conformal":
            return dict.fromkeys(wanted, self.calibration.conformal())
        self.eval()
        found, streams = {}, Streams(self.calibration)
        for batch in simple.batches(windows, 128):
            here = self._here(batch)
            factors = streams.follow(self._outcome(here, self._output(here)))
            found.update({i: factors[n] for n, i in enumerate(batch["index"].tolist()) if i in wanted})
        return found

    @torch.no_grad()
    def _test_errors(self, windows: Windows) -> tuple[Tensor, Tensor]:
        """Number and error of each test window, from the last evaluation if it was whole, else from a new one."""
        number, error = self._score("test").window_errors()
        if len(number) != len(windows):
            self.eval()
            self.reset_metrics("test")
            for batch in simple.batches(windows, 128):
                self.update_metrics("test", self._here(batch))
            number, error = self._score("test").window_errors()
        return number, error

    def _here(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        device = next(iter(self.network.parameters()), torch.empty(0)).device
        return {name: value.to(device) for name, value in batch.items()}

    @torch.no_grad()
    def _panel(
        self, bundle: DataBundle, index: int, channel: int | None, factors: Tensor | None = None
    ) -> dict[str, Any]:
        assert isinstance(bundle.test, Windows)
        self.eval()
        batch = bundle.test.__getitems__([index])
        output = self._output(self._here(batch)).cpu().to(torch.float64)
        forecast = self._centre(output)[0]
        truth = self.target(batch).to(torch.float64)[0]
        if channel is None:
            channel = int((forecast - truth).square().mean(dim=0).argmax())
        group = int(batch["group"])
        mean, std = self.scaler.mean[group, channel], self.scaler.std[group, channel]
        name, times = bundle.test.window_times(index)
        others = {
            row.name: row.of(batch)[0, :, channel].double().numpy() * std + mean
            for row in self._simple(self.config, bundle)
            if row.name.startswith("dlinear") and self.config.model != "dlinear"
        }
        column = self.data_state["columns"][channel]
        moment = str(times[self.shape.seq_len]).removesuffix(" 00:00:00")
        return {
            "title": f"{name}{', ' if name else ''}{column}, from {moment}",
            "times": times.tz_localize(None),
            "history": batch["x"][0, :, channel].double().numpy() * std + mean,
            "truth": np.where(
                batch["observed"][0, :, channel].numpy() if "observed" in batch else True,
                truth[:, channel].numpy() * std + mean,
                np.nan,
            ),
            "forecast": forecast[:, channel].numpy() * std + mean,
            "others": others,
            "bands": [
                (low * std + mean, high * std + mean)
                for low, high in self.bands(self.quantiles(output)[0, :, channel], factors, channel)
            ],
        }

    def bands(self, quantiles: Tensor, factors: Tensor | None, channel: int) -> list[tuple[np.ndarray, np.ndarray]]:
        """Ends of each interval of a column, the widest first, scaled: from its quantiles (H, Q) and all factors."""
        if not self.intervals_ready:
            return []
        if factors is not None:
            quantiles = widen(quantiles, factors[:, channel])
        values = quantiles.double().numpy()
        return [(values[:, i], values[:, -1 - i]) for i in range(values.shape[1] // 2)]

    # -- files --------------------------------------------------------------------------------------------------------

    def read_input(self, path: Path, future: Path | None = None) -> SeriesTable:
        """A file to forecast from, its columns those of the training data; `future`: see `predict_files`."""
        from attn_timeseries.predict import read_input

        return read_input(self, path, future)

    def predict_files(self, inputs: Sequence[Path], output: Path, options: Mapping[str, Any]) -> list[Path]:
        from attn_timeseries.predict import predict_files

        return predict_files(self, inputs, output, options)


def promise(options: ForecastTaskConfig) -> str:
    """How intervals are made, to stand in the protocol; empty where there are none."""
    if not options.intervals:
        return ""
    how = {
        "none": "not calibrated",
        "conformal": "calibrated on the validation windows",
        "adaptive": "calibrated on the validation windows, and along the test windows by targets already past when "
        "each forecast is made",
    }
    return f"; intervals of {options.coverage:.0%}, {how[options.calibrate]}"


def new_scores(state: Mapping[str, Any], pred_len: int) -> metrics.ForecastScores:
    """Scores for data of this state."""
    scaler = Scaler.from_state(state["scaler"])
    seasonal = np.array(state["seasonal_error"], dtype=np.float64)  # None becomes NaN
    return metrics.ForecastScores(
        pred_len, torch.from_numpy(scaler.mean), torch.from_numpy(scaler.std), torch.from_numpy(seasonal)
    )


def fit_state(table: SeriesTable, rule: str, args: ForecastDataConfig) -> dict[str, Any]:
    """All that is learnt from data outside the weights; it sees training rows only."""
    parts = train_rows(table.series, rule, args)
    scaler = Scaler.fit(parts, args)
    calendar = check_frequency(args.calendar) if args.calendar else table.frequency
    season = args.season if args.season is not None else season_of(table.frequency)
    if season < 1:
        raise UserError(f"data_args.season is {season}; it must be at least 1")
    by_group: dict[int, list[np.ndarray]] = {}
    for name, rows in parts:
        if len(rows):
            by_group.setdefault(scaler.row(name), []).append(rows)
    seasonal = [metrics.seasonal_error(by_group[g], season) for g in range(len(scaler.mean))]
    state = {
        "columns": table.columns,
        "time_column": table.time_column,
        "id_column": table.id_column,
        "frequency": table.frequency,
        "calendar": calendar,
        "season": season,
        "scaler": scaler.state(),
        "seasonal_error": [[None if np.isnan(q) else float(q) for q in row] for row in seasonal],
    }
    if table.roles:
        limits = all_borders(table.series, rule, args)
        state["covariates"] = CovariateCoder.fit(table.roles, table.series, limits).state()
    return state


def check_step(table: SeriesTable, state: Mapping[str, Any]) -> None:
    """Refuse data of another step than the training data."""
    ours, theirs = state["frequency"], table.frequency
    if ours != theirs and (unit(ours), season_of(ours), ours[0]) != (unit(theirs), season_of(theirs), theirs[0]):
        raise UserError(
            f"{table.source} has steps of {theirs!r} and the model was trained on steps of {ours!r}; resample the file"
        )


def _facts(
    table: SeriesTable,
    rule: str,
    args: ForecastDataConfig,
    splits: Mapping[str, Windows | None],
    state: Mapping[str, Any],
) -> dict[str, Any]:
    first = min(one.times[0] for one in table.series)
    last = max(one.times[-1] for one in table.series)
    limits = borders(len(table.series[0].times), rule, args)
    facts: dict[str, Any] = {
        "file": table.source,
        "series": len(table.series),
        "columns": ", ".join(table.columns[:10]) + (f", … ({len(table.columns)})" if len(table.columns) > 10 else ""),
        "rows": f"{sum(len(one.times) for one in table.series):,}",
        "step": table.frequency,
        "season": f"{state['season']} steps",
        "from": str(first),
        "to": str(last),
        "windows": ", ".join(f"{name} {len(w) if w else 0:,}" for name, w in splits.items()),
    }
    short = without_windows(table.series, rule, args) if len(table.series) > 1 else {}
    if short:
        facts["too short for a window"] = ", ".join(f"{name} {count:,} series" for name, count in short.items())
    for role, names in table.roles.items():
        facts[OPTIONS[role].replace("_", " ")] = ", ".join(names)
    if len(table.series) == 1:
        facts["borders (rows)"] = f"train 0-{limits.train:,}, validation -{limits.val:,}, test -{limits.test:,}"
    if table.form or table.notes:
        facts["found"] = "; ".join([*table.form, *table.notes])
    return facts


def _protocol(
    data: str, rule: str, args: ForecastDataConfig, splits: Mapping[str, Windows | None], state: Mapping[str, Any]
) -> str:
    if rule == "etth":
        split = "rows 12·720 / 16·720 / 20·720"
    else:
        val = 1 - args.train_fraction - args.test_fraction
        split = f"{args.train_fraction:.0%} / {val:.0%} / {args.test_fraction:.0%} in order of time"
        if rule == "time":
            split += ", at the same times in all series"
    given = sorted({name.partition("_")[0] for name in state.get("covariates", {}).get("names", ())})
    name = DATASETS[data].name if data in DATASETS else Path(data).name
    return (
        f"{name}, {args.seq_len} steps to {args.pred_len}, {split}, "
        f"{'scaled by training rows only' if args.scale == 'standard' else 'not scaled'}, "
        f"{'with ' + ' and '.join(given) + ' covariates, ' if given else ''}"
        f"all {len(splits['test'] or ()):,} test windows"
    )


def _apart(indices: Sequence[int], distance: int) -> list[int]:
    """The first few indices that lie at least `distance` from each other."""
    chosen: list[int] = []
    for index in indices:
        if all(abs(index - other) >= distance for other in chosen):
            chosen.append(index)
        if len(chosen) == _PANELS:
            break
    return chosen
