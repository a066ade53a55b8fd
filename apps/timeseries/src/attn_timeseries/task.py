"""The forecasting task: data, loss, scores, baselines, pictures."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from attn_shared.app import load
from attn_shared.config import RunConfig
from attn_shared.errors import UserError
from attn_shared.task import DataBundle, Picture, Task
from attn_timeseries import baselines as simple
from attn_timeseries import metrics
from attn_timeseries.config import MODELS
from attn_timeseries.data.benchmarks import borders, split_rule
from attn_timeseries.data.calendar import feature_names, season_of, unit
from attn_timeseries.data.cards import DATASETS, ForecastDataConfig
from attn_timeseries.data.sources import read_source
from attn_timeseries.data.table import SeriesTable
from attn_timeseries.data.times import check_frequency
from attn_timeseries.data.windows import Scaler, Windows, check_lengths, make_windows, train_rows
from attn_timeseries.models.base import ForecastModel, SeriesShape
from attn_timeseries.published import published

_PANELS = 4


class ForecastTask(Task):
    """Forecast `pred_len` steps of all columns from `seq_len` steps, by squared error on scaled values."""

    primary: ClassVar[str] = "mse"
    maximize: ClassVar[bool] = False
    metric_format: ClassVar[Mapping[str, str]] = metrics.FORMAT

    def __init__(self, config: RunConfig, data_state: Mapping[str, Any]) -> None:
        super().__init__(config, data_state)
        args: ForecastDataConfig = config.data_args
        self.shape = self.series_shape(args, data_state)
        try:
            self.network: ForecastModel = load(MODELS[config.model].target)(
                config.model_args, self.shape, mixer=config.mixer, mixer_args=dict(config.mixer_args)
            )
        except ValueError as error:
            raise UserError(f"model {config.model!r}: {error}") from None
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
    def model(self) -> ForecastModel:
        return self.network

    # -- data ---------------------------------------------------------------------------------------------------------

    @classmethod
    def load_data(cls, config: RunConfig, *, state: Mapping[str, Any] | None = None) -> DataBundle:
        args: ForecastDataConfig = config.data_args
        if state is not None:
            args = dataclasses.replace(args, columns=list(state["columns"]))
        table = read_source(config.data, args)
        rule = split_rule(args, config.data)
        if state is None:
            check_lengths(table.series, rule, args, table.source)
            state = fit_state(table, rule, args)
        else:
            check_step(table, state)
        scaler = Scaler.from_state(state["scaler"])
        splits = make_windows(table.series, rule, args, scaler, state["calendar"])
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
            protocol=_protocol(config.data, rule, args, splits),
        )

    # -- training -----------------------------------------------------------------------------------------------------

    def forward_batch(self, batch: Mapping[str, Tensor]) -> Tensor:
        """(B, pred_len, C) forecast, scaled."""
        return self.network(batch["x"], batch["x_mark"], batch["y_mark"])

    def target(self, batch: Mapping[str, Tensor]) -> Tensor:
        """(B, pred_len, C) what came, scaled."""
        return batch["y"][:, -self.shape.pred_len :]

    def training_loss(self, batch: Mapping[str, Tensor]) -> Tensor:
        error = (self.forward_batch(batch) - self.target(batch)).square()
        if "observed" not in batch:
            return error.mean()
        known = batch["observed"]
        return torch.where(known, error, 0.0).sum() / known.sum().clamp_min(1)

    # -- scores -------------------------------------------------------------------------------------------------------

    def _score(self, split: str) -> metrics.ForecastScores:
        if split not in self._scores:
            self._scores[split] = new_scores(self.data_state, self.shape.pred_len)
        return self._scores[split]

    def reset_metrics(self, split: str) -> None:
        self._score(split).reset()

    def update_metrics(self, split: str, batch: Mapping[str, Tensor]) -> None:
        self._score(split).update(
            self.forward_batch(batch), self.target(batch), batch["group"], batch.get("observed"), batch["index"]
        )

    def metric_state(self, split: str) -> dict[str, Tensor]:
        return self._score(split).state()

    def compute_metrics(self, split: str, sums: Mapping[str, Tensor]) -> dict[str, float]:
        return metrics.final(sums)

    def example_batch(self, bundle: DataBundle, size: int) -> dict[str, Tensor]:
        windows = bundle.test or bundle.val or bundle.train
        assert isinstance(windows, Windows)
        return windows.__getitems__([i % len(windows) for i in range(size)])

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
                scores[row.name].update(row.forecast(batch["x"]), target, batch["group"], batch.get("observed"))
        return scores

    @classmethod
    def baselines(cls, config: RunConfig, bundle: DataBundle) -> list[dict[str, Any]]:
        if bundle.test is None:
            return []
        notes = {row.name: row.note for row in cls._simple(config, bundle)}
        scores = cls._simple_scores(config, bundle)
        return [{"model": name, "note": notes[name], **metrics.final(score.state())} for name, score in scores.items()]

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
        columns = len(self.data_state["columns"])
        channels = [(columns - 1 - i * max(1, columns // _PANELS)) % columns for i in range(_PANELS)]
        yield Picture(
            name="forecasts",
            caption="Test windows spread over the whole test part: look-back, what came, and the forecast.",
            figure=forecast_panels([self._panel(bundle, i, c) for i, c in zip(spread, channels)]),
        )
        curves = {self.config.model: metrics.curve(self._score("test").state())}
        for name, score in self._simple_scores(self.config, bundle).items():
            curves[name] = metrics.curve(score.state())
        yield Picture(
            name="horizon",
            caption="Squared error at each step ahead, mean over all test windows and columns.",
            figure=horizon_curves(curves),
        )
        worst = _apart(number[error.argsort(descending=True)].tolist(), self.shape.pred_len)
        yield Picture(
            name="worst",
            caption="The test windows with the largest error (none overlapping), each in its worst column.",
            figure=forecast_panels([self._panel(bundle, i, None) for i in worst]),
        )

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
    def _panel(self, bundle: DataBundle, index: int, channel: int | None) -> dict[str, Any]:
        assert isinstance(bundle.test, Windows)
        self.eval()
        batch = bundle.test.__getitems__([index])
        forecast = self.forward_batch(self._here(batch)).cpu().to(torch.float64)[0]
        truth = self.target(batch).to(torch.float64)[0]
        if channel is None:
            channel = int((forecast - truth).square().mean(dim=0).argmax())
        group = int(batch["group"])
        mean, std = self.scaler.mean[group, channel], self.scaler.std[group, channel]
        name, times = bundle.test.window_times(index)
        others = {
            row.name: row.forecast(batch["x"])[0, :, channel].double().numpy() * std + mean
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
        }

    # -- files --------------------------------------------------------------------------------------------------------

    def read_input(self, path: Path) -> SeriesTable:
        """A file to forecast from, its columns those of the training data."""
        from attn_timeseries.predict import read_input

        return read_input(self, path)

    def predict_files(self, inputs: Sequence[Path], output: Path, options: Mapping[str, Any]) -> list[Path]:
        from attn_timeseries.predict import predict_files

        return predict_files(self, inputs, output, options)


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
        by_group.setdefault(scaler.row(name), []).append(rows)
    seasonal = [metrics.seasonal_error(by_group[g], season) for g in range(len(scaler.mean))]
    return {
        "columns": table.columns,
        "time_column": table.time_column,
        "id_column": table.id_column,
        "frequency": table.frequency,
        "calendar": calendar,
        "season": season,
        "scaler": scaler.state(),
        "seasonal_error": [[None if np.isnan(q) else float(q) for q in row] for row in seasonal],
    }


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
    if len(table.series) == 1:
        facts["borders (rows)"] = f"train 0-{limits.train:,}, validation -{limits.val:,}, test -{limits.test:,}"
    if table.form or table.notes:
        facts["found"] = "; ".join([*table.form, *table.notes])
    return facts


def _protocol(data: str, rule: str, args: ForecastDataConfig, splits: Mapping[str, Windows | None]) -> str:
    if rule == "etth":
        split = "rows 12·720 / 16·720 / 20·720"
    else:
        val = 1 - args.train_fraction - args.test_fraction
        split = f"{args.train_fraction:.0%} / {val:.0%} / {args.test_fraction:.0%} in order of time"
    name = DATASETS[data].name if data in DATASETS else Path(data).name
    return (
        f"{name}, {args.seq_len} steps to {args.pred_len}, {split}, "
        f"{'scaled by training rows only' if args.scale == 'standard' else 'not scaled'}, "
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
