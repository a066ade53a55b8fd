"""The traffic task: forecasts of all sensors of a road network, whose graph the model may use."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from attn_shared.config import RunConfig
from attn_shared.errors import UserError
from attn_shared.task import DataBundle, Picture
from attn_timeseries import baselines as simple
from attn_timeseries import metrics as forecast_metrics
from attn_timeseries.calibration import check_windows
from attn_timeseries.config import ForecastTaskConfig
from attn_timeseries.data.calendar import season_of
from attn_timeseries.data.cards import ForecastDataConfig
from attn_timeseries.data.table import SeriesTable
from attn_timeseries.data.times import check_frequency
from attn_timeseries.data.windows import Scaler, Windows
from attn_timeseries.models.base import SeriesShape
from attn_timeseries.task import ForecastTask, promise
from attn_timeseries.traffic import data, metrics
from attn_timeseries.traffic.cards import DATASETS, TrafficDataConfig, TrafficTaskConfig

TIME_OF_DAY = "time_of_day"
_MAPS = 256  # test windows whose attention is averaged


class TrafficTask(ForecastTask):
    """Forecast the speed at every sensor, scored in its own units at 15, 30, 45 and 60 minutes."""

    primary: ClassVar[str] = "mae_original"
    metric_format: ClassVar[Mapping[str, str]] = metrics.FORMAT
    options_type: ClassVar[type[ForecastTaskConfig]] = TrafficTaskConfig

    # -- data ---------------------------------------------------------------------------------------------------------

    @classmethod
    def series_shape(cls, args: ForecastDataConfig, data_state: Mapping[str, Any]) -> SeriesShape:
        graph = data.graph_matrix(data_state["graph"], len(data_state["columns"]))
        shape = super().series_shape(args, data_state)
        return dataclasses.replace(shape, graph=None if graph is None else torch.from_numpy(graph))

    @classmethod
    def load_data(cls, config: RunConfig, *, state: Mapping[str, Any] | None = None) -> DataBundle:
        args, options = data.settle(config.data, config.data_args), cls.options_of(config)
        if state is not None:
            args = dataclasses.replace(args, columns=list(state["columns"]))
        table = data.read_sensors(config.data, args)
        limits = data.split_borders(table, args)
        notes: list[str] = []
        if state is None:
            data.check_lengths(table, limits, args)
            weights, notes = data.load_graph(config.data, table.columns, args)
            state = fit_state(table, limits, args, weights)
            if options.calibrate != "none":
                ends = [one.times[border.val - 1] for one, border in zip(table.segments, limits) if border.val]
                state["calibrated_to"] = {"": str(max(ends))}
        else:
            check_step(table.source, table.frequency, state)
        splits = data.make_windows(table, limits, args, Scaler.from_state(state["scaler"]), state["calendar"])
        if options.calibrate != "none":
            check_windows(options.levels, len(splits["val"] or ()))
        if splits["test"] is None and splits["train"] is None:
            raise UserError(
                f"{table.source}: no window of seq_len {args.seq_len} + pred_len {args.pred_len} steps fits between "
                "two jumps in time"
            )
        graph = data.graph_matrix(state["graph"], len(table.columns))
        return DataBundle(
            train=splits["train"],
            val=splits["val"],
            test=splits["test"],
            state=dict(state),
            facts=data.facts(table, limits, args, splits, graph, notes),
            protocol=_protocol(config.data, args, splits) + promise(options),
        )

    # -- scores -------------------------------------------------------------------------------------------------------

    def _score(self, split: str) -> forecast_metrics.ForecastScores:
        if split not in self._scores:
            self._scores[split] = new_scores(self.data_state, self.shape.pred_len)
        return self._scores[split]

    def compute_metrics(self, split: str, sums: Mapping[str, Tensor]) -> dict[str, float]:
        return metrics.final(sums, self.data_state["frequency"])

    # -- beside the model ---------------------------------------------------------------------------------------------

    @classmethod
    def _simple(cls, config: RunConfig, bundle: DataBundle) -> list[simple.Baseline]:
        # A look-back holds no day, so there is no season to repeat: the time of day stands in its place.
        assert bundle.train is None or isinstance(bundle.train, Windows)
        assert bundle.val is None or isinstance(bundle.val, Windows)
        return simple.baselines(bundle.train, bundle.val, 1, config.data_args.pred_len)

    @classmethod
    def _simple_scores(cls, config: RunConfig, bundle: DataBundle) -> dict[str, forecast_metrics.ForecastScores]:
        pred_len, season = config.data_args.pred_len, bundle.state["season"]
        rows = cls._simple(config, bundle)
        scores: dict[str, forecast_metrics.ForecastScores] = {
            row.name: new_scores(bundle.state, pred_len) for row in rows
        }
        means = None
        if isinstance(bundle.train, Windows) and season > 1:
            means = torch.from_numpy(data.time_of_day(bundle.train, season))
            scores[TIME_OF_DAY] = new_scores(bundle.state, pred_len)
        windows = bundle.test
        assert isinstance(windows, Windows)
        slots = window_slots(windows, season)
        for batch in simple.batches(windows):
            target, known = batch["y"][:, -pred_len:], batch.get("observed")
            for row in rows:
                scores[row.name].update(row.forecast(batch["x"]), target, batch["group"], known)
            if means is not None:
                scores[TIME_OF_DAY].update(means[slots[batch["index"]]], target, batch["group"], known)
        return scores

    @classmethod
    def baselines(cls, config: RunConfig, bundle: DataBundle) -> list[dict[str, Any]]:
        if bundle.test is None:
            return []
        notes = {row.name: row.note for row in cls._simple(config, bundle)}
        notes[TIME_OF_DAY] = "mean of the training rows at that time of day"
        scores, intervals = cls._simple_scores(config, bundle), cls.simple_intervals(config, bundle)
        frequency = bundle.state["frequency"]
        return [
            {"model": name, "note": notes[name], **metrics.final(score.state() | intervals.get(name, {}), frequency)}
            for name, score in scores.items()
        ]

    def published(self) -> list[dict[str, Any]]:
        return []  # the papers' figures are for all 228 sensors of PeMSD7(M), and for four months of METR-LA

    # -- pictures -----------------------------------------------------------------------------------------------------

    def pictures(self, bundle: DataBundle) -> Iterable[Picture]:
        from attn_timeseries.traffic.plots import ahead_curves, attention_and_graph

        for picture in super().pictures(bundle):
            if picture.name != "horizon":
                yield picture
        if not isinstance(bundle.test, Windows):
            return
        curves = {self.config.model: metrics.curve(self._score("test").state())}
        for name, score in self._simple_scores(self.config, bundle).items():
            curves[name] = metrics.curve(score.state())
        labels = [metrics.ahead(self.data_state["frequency"], step + 1) for step in range(self.shape.pred_len)]
        yield Picture(
            name="ahead",
            caption="Mean absolute error at each step ahead, in the units of the data, over all test windows and "
            "sensors.",
            figure=ahead_curves(curves, labels),
        )
        attention = self.sensor_attention(bundle.test)
        if attention is not None and self.shape.graph is not None:
            yield Picture(
                name="sensors",
                caption="Which sensor (column) each sensor (row) reads, mean over test windows, steps and heads, "
                "beside the graph; and the attention by the weight of the edge.",
                figure=attention_and_graph(attention, self.shape.graph.numpy()),
            )

    @torch.no_grad()
    def sensor_attention(self, windows: Windows) -> np.ndarray | None:
        """(N, N) attention between sensors, mean over windows, steps, layers and heads.

        None where the model has none between sensors, or its mechanism no maps.
        """
        from core_attn import capture

        count, total, seen = len(self.data_state["columns"]), np.zeros(()), 0
        self.eval()
        chosen = np.unique(np.linspace(0, len(windows) - 1, min(_MAPS, len(windows))).astype(int)).tolist()
        for first in range(0, len(chosen), 16):
            batch = self._here(windows.__getitems__(chosen[first : first + 16]))
            try:
                with capture(self.network) as maps:
                    self.forward_batch(batch)
            except ValueError:
                return None
            found = [maps[name].double().mean(dim=(0, 1)).cpu().numpy() for name in maps if "spatial" in name]
            found = [one for one in found if one.shape == (count, count)]
            if not found:
                return None
            total = total + np.mean(found, axis=0) * len(batch["x"])
            seen += len(batch["x"])
        return np.asarray(total / seen)

    # -- files --------------------------------------------------------------------------------------------------------

    def read_input(self, path: Path, future: Path | None = None) -> SeriesTable:
        """The last stretch of a table without a jump in time: what the forecast goes on from."""
        state = self.data_state
        args = data.settle("", self.config.data_args)
        args = dataclasses.replace(
            args, columns=list(state["columns"]), time_column=None, delimiter=None, frequency=None, cut="gap"
        )
        table = data.read_sensors(str(path), args, silent=True)
        check_step(table.source, table.frequency, state)
        for note in table.notes:
            print(f"{path.name}: {note}", file=sys.stderr)
        last = data.begun(table.segments, self.scaler)[-1]
        if len(last.times) < self.shape.seq_len:
            raise UserError(
                f"{table.source}: the model looks back {self.shape.seq_len} steps, and only {len(last.times)} follow "
                f"the last jump in time, at {last.times[0]}"
            )
        return SeriesTable(
            source=table.source,
            time_column=table.time_column,
            id_column=None,
            columns=table.columns,
            frequency=table.frequency,
            series=[last],
        )

    def predict_files(self, inputs: Sequence[Path], output: Path, options: Mapping[str, Any]) -> list[Path]:
        for path in inputs:
            if str(path) in DATASETS:
                raise UserError(f"{path} is a data set of the past; name a table of sensors to forecast from")
        return super().predict_files(inputs, output, options)


def new_scores(state: Mapping[str, Any], pred_len: int) -> metrics.TrafficScores:
    """Scores for data of this state."""
    scaler = Scaler.from_state(state["scaler"])
    seasonal = np.array(state["seasonal_error"], dtype=np.float64)  # None becomes NaN
    return metrics.TrafficScores(
        pred_len, torch.from_numpy(scaler.mean), torch.from_numpy(scaler.std), torch.from_numpy(seasonal)
    )


def fit_state(
    table: data.SensorTable, limits: Sequence[Any], args: TrafficDataConfig, weights: np.ndarray | None
) -> dict[str, Any]:
    """All that is learnt from data outside the weights; it sees training rows only. The graph is given."""
    parts = data.train_parts(table, limits)
    scaler = data.fit_scaler(parts, args)
    season = args.season if args.season is not None else season_of(table.frequency)
    if season < 1:
        raise UserError(f"data_args.season is {season}; it must be at least 1")
    seasonal = forecast_metrics.seasonal_error([data.whole_days(table, limits, season)], season)
    return {
        "columns": table.columns,
        "time_column": table.time_column,
        "id_column": None,
        "frequency": table.frequency,
        "calendar": check_frequency(args.calendar) if args.calendar else table.frequency,
        "season": season,
        "scaler": scaler.state(),
        "seasonal_error": [[None if np.isnan(q) else float(q) for q in seasonal]],
        "graph": data.graph_state(weights),
    }


def check_step(source: str, frequency: str, state: Mapping[str, Any]) -> None:
    """Refuse data of another step than the training data."""
    if frequency != state["frequency"]:
        raise UserError(
            f"{source} has steps of {frequency!r} and the model was trained on steps of {state['frequency']!r}; "
            "resample the file"
        )


def window_slots(windows: Windows, season: int) -> Tensor:
    """(windows, pred_len) step of the day of each target."""
    slots = np.concatenate([data.day_slots(times, season) for times in windows.times])
    first = windows.starts.numpy() + windows.seq_len
    return torch.from_numpy(slots[first[:, None] + np.arange(windows.pred_len)])


def _protocol(name: str, args: TrafficDataConfig, splits: Mapping[str, Windows | None]) -> str:
    if args.days is not None:
        split = "{} / {} / {} whole days in order of time".format(*args.days)
    else:
        val = 1 - args.train_fraction - args.test_fraction
        split = f"{args.train_fraction:.0%} / {val:.0%} / {args.test_fraction:.0%} in order of time"
    return (
        f"{Path(name).name}, {args.seq_len} steps to {args.pred_len}, {split}, "
        f"no window over {'midnight' if args.cut == 'day' else 'a jump in time'}, "
        f"{'scaled by training rows only' if args.scale == 'standard' else 'not scaled'}, figures in the units of the "
        f"data, all {len(splits['test'] or ()):,} test windows"
    )
