"""Tables of sensors: read, cut where time jumps, split by whole days or by fractions, and made into windows.

Legend: T rows, N sensors.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from attn_shared.datasets import locate
from attn_shared.errors import UserError
from attn_timeseries.data.benchmarks import Borders
from attn_timeseries.data.sources import source_path
from attn_timeseries.data.table import Series, read_table
from attn_timeseries.data.windows import SPLITS, Scaler, Windows
from attn_timeseries.traffic import cards
from attn_timeseries.traffic.cards import TrafficDataConfig, graph_beside
from attn_timeseries.traffic.graph import TURNED, read_graph, to_weights

_DAY = pd.Timedelta(days=1)


@dataclass(frozen=True, kw_only=True)
class SensorTable:
    """Sensors over time, cut into segments without a jump.

    Attributes:
        source: file name for messages.
        columns: the sensors, in order.
        frequency: pandas alias of the step.
        segments: (T, N) each on a regular grid, NaN where nothing was observed.
        time_column: name in the file, for forecasts written like it.
        notes: what is worth knowing about the data.
    """

    source: str
    columns: list[str]
    frequency: str
    segments: list[Series]
    time_column: str = "time"
    notes: list[str] = field(default_factory=list)


# -- reading ----------------------------------------------------------------------------------------------------------


def settle(data: str, config: TrafficDataConfig) -> TrafficDataConfig:
    """`config` with what the data set itself decides in the place of None and "auto"."""
    pemsd7 = data == "pemsd7"
    days = config.days
    if pemsd7 and days is None and config.split == "auto":
        days = list(cards.PEMSD7_DAYS)
    if config.split not in ("auto", "ratio"):
        raise UserError(f"traffic is split by days or fractions, not by {config.split!r}; leave --data_args.split out")
    return dataclasses.replace(
        config,
        days=days,
        cut=("day" if pemsd7 else "gap") if config.cut == "auto" else config.cut,
        graph_sigma=cards.PEMSD7_SIGMA if pemsd7 and config.graph_sigma is None else config.graph_sigma,
        graph_threshold=(
            cards.PEMSD7_THRESHOLD if pemsd7 and config.graph_threshold is None else config.graph_threshold
        ),
    )


def read_sensors(data: str, config: TrafficDataConfig, *, silent: bool = False) -> SensorTable:
    """A data set by name, or a table of one's own; `config` is settled. `silent`: a sensor may have no value at all."""
    if data == "pemsd7":
        values = pd.read_csv(locate(cards.DATASETS[data]) / "V_25.csv", header=None).to_numpy(np.float64)
        days = pd.bdate_range("2012-05-01", "2012-06-29")
        steps = pd.timedelta_range(0, periods=288, freq="5min")
        times = pd.DatetimeIndex((days.to_numpy()[:, None] + steps.to_numpy()).ravel())
        return _cut(data, times, values, [str(i) for i in range(25)], "5min", config, "time", [])
    if data == "metr_la_week":
        path = locate(cards.DATASETS[data]) / "los_speed.csv.gz"
        try:
            frame = pd.read_csv(path)
        except (OSError, EOFError, ValueError):
            raise UserError(f"{path} is damaged: it cannot be read as a CSV that gzip compressed") from None
        if frame.shape != (2016, 207):
            raise UserError(
                f"{path} holds {frame.shape[0]} x {frame.shape[1]} numbers where the original has 2016 x 207"
            )
        times = pd.date_range("2012-03-01", periods=len(frame), freq="5min")
        return _cut(data, times, frame.to_numpy(np.float64), list(frame.columns), "5min", config, "time", [])
    # Gaps are told apart here, row by row: the table need only be on one grid.
    whole = dataclasses.replace(config, missing="interpolate", max_gap=10**9)
    table = read_table(source_path(data), whole, silent=silent)
    if table.id_column is not None:
        raise UserError(
            f"{table.source}: column {table.id_column!r} names several series; a table of sensors has one row a time "
            "and one column a sensor"
        )
    if not isinstance(pd.tseries.frequencies.to_offset(table.frequency), (pd.offsets.Tick, pd.offsets.Day)):
        raise UserError(
            f"{table.source}: steps of {table.frequency!r} are not all of one length, as traffic needs them"
        )
    one = table.series[0]
    notes = [*table.form, *(note for note in table.notes if not _told_otherwise(note))]
    return _cut(table.source, one.times, one.values, table.columns, table.frequency, config, table.time_column, notes)


def _told_otherwise(note: str) -> bool:
    """Whether a note of the reader is about gaps, which are cut or filled by this module's own rules."""
    return "have no row" in note or "values missing" in note


def _cut(
    source: str,
    times: pd.DatetimeIndex,
    values: np.ndarray,
    columns: list[str],
    frequency: str,
    config: TrafficDataConfig,
    time_column: str,
    notes: list[str],
) -> SensorTable:
    """Segments on the grid of `frequency`, cut where rows are missing for too long and, if asked, at midnight."""
    if config.columns is not None and list(config.columns) != columns:
        for name in config.columns:
            if name not in columns:
                raise UserError(f"{source}: there is no sensor {name!r}; there are {', '.join(columns[:12])}")
        values = values[:, [columns.index(name) for name in config.columns]]
        columns = list(config.columns)
    if config.zero_missing:
        values = np.where(values == 0, np.nan, values)
    there = ~np.isnan(values).all(axis=1)
    if not there.any():
        raise UserError(f"{source}: no sensor has a value")
    times, values = times[there], values[there]
    step = step_of(frequency)
    jumps = np.diff(times) > (config.max_gap + 1) * step
    if config.cut == "day":
        dates = _clock(times).normalize().asi8
        jumps |= np.diff(dates) != 0
    bounds = [0, *(np.flatnonzero(jumps) + 1), len(times)]
    segments = []
    bridged = 0
    for first, last in itertools.pairwise(bounds):
        grid = pd.date_range(times[first], times[last - 1], freq=frequency)
        full = np.full((len(grid), len(columns)), np.nan)
        full[grid.get_indexer(times[first:last])] = values[first:last]
        bridged += len(grid) - (last - first)
        segments.append(Series(name="", times=grid, values=full))
    if config.cut == "gap" and len(segments) > 1:
        notes.append(f"cut into {len(segments)} segments where more than {config.max_gap} steps have no row")
    missing = sum(int(np.isnan(one.values).sum()) for one in segments)
    if bridged:
        notes.append(f"{bridged} steps without a row bridged")
    if missing:
        notes.append(f"{missing:,} values missing; filled over time, never scored")
    return SensorTable(
        source=source, columns=columns, frequency=frequency, segments=segments, time_column=time_column, notes=notes
    )


def step_of(frequency: str) -> pd.Timedelta:
    """Length of a step of a frequency whose steps are all equally long."""
    start = pd.Timestamp("2000-01-01")
    return start + pd.tseries.frequencies.to_offset(frequency) - start


def _clock(times: pd.DatetimeIndex) -> pd.DatetimeIndex:
    return times.tz_localize(None) if times.tz is not None else times


def load_graph(data: str, columns: Sequence[str], config: TrafficDataConfig) -> tuple[np.ndarray | None, list[str]]:
    """Weights (N, N) between the sensors, and notes; None where there is no graph. `config` is settled."""
    if config.graph is not None:
        return read_graph(Path(config.graph), columns, config)
    if data in cards.DATASETS:
        folder = locate(cards.DATASETS[data])
        file = folder / {"pemsd7": "W_25.csv", "metr_la_week": "los_adj.csv"}[data]
        values = pd.read_csv(file, header=None).to_numpy(np.float64)
        # All sensors of the data set, in its order; `columns` may be some of them.
        whole = read_sensors(data, dataclasses.replace(config, columns=None)).columns
        keep = [whole.index(name) for name in columns]
        kind = "distances" if data == "pemsd7" else "weights"
        return to_weights(values[np.ix_(keep, keep)], config, file.name, kind=kind), []
    beside = graph_beside(data)
    return (None, []) if beside is None else read_graph(beside, columns, config)


def graph_state(weights: np.ndarray | None) -> list[list[float]] | None:
    """A graph as plain [from, to, weight] triples, for a checkpoint."""
    if weights is None:
        return None
    return [[int(i), int(j), float(weights[i, j])] for i, j in np.argwhere(weights)]


def graph_matrix(state: Sequence[Sequence[float]] | None, count: int) -> np.ndarray | None:
    """The matrix that `graph_state` made triples of."""
    if state is None:
        return None
    weights = np.zeros((count, count))
    for i, j, weight in state:
        weights[int(i), int(j)] = weight
    return weights


def check_file(path: str | Path, args: TrafficDataConfig | None = None) -> list[str]:
    """What is wrong with a table and the graph beside it or worth knowing, in sentences."""
    try:
        config = settle("", args or TrafficDataConfig())
        table = read_sensors(str(path), config)
        notes = load_graph(str(path), table.columns, config)[1]
        return [*table.notes, *(note for note in notes if not note.startswith(TURNED))]
    except UserError as error:
        return [str(error)]


# -- splits -----------------------------------------------------------------------------------------------------------


def split_borders(table: SensorTable, config: TrafficDataConfig) -> list[Borders]:
    """Borders of each segment: whole days in order of time, or fractions of all rows. `config` is settled."""
    lengths = np.array([len(one.times) for one in table.segments])
    if config.days is None:
        total = int(lengths.sum())
        train, test = int(total * config.train_fraction), int(total * config.test_fraction)
        offsets = np.cumsum(lengths) - lengths
        edges = np.array([train, total - test, total])
        return [Borders(*np.clip(edges - offset, 0, n).tolist()) for offset, n in zip(offsets, lengths)]
    dates = np.unique(np.concatenate([_clock(one.times).normalize().asi8 for one in table.segments]))
    wanted = sum(config.days)
    if wanted > len(dates):
        raise UserError(
            f"{table.source} has {len(dates)} days and --data_args.days asks for {' + '.join(map(str, config.days))} = "
            f"{wanted}"
        )
    ends = np.append(dates, np.iinfo(np.int64).max)[np.cumsum(config.days)]
    return [
        Borders(*np.searchsorted(_clock(one.times).normalize().asi8, ends, side="left").tolist())
        for one in table.segments
    ]


def make_windows(
    table: SensorTable, limits: Sequence[Borders], config: TrafficDataConfig, scaler: Scaler, calendar: str
) -> dict[str, Windows | None]:
    """The windows of every split, none over a cut; None where no segment is long enough for one."""
    segments = begun(table.segments, scaler)
    result: dict[str, Windows | None] = {}
    for split in SPLITS:
        parts = []
        for one, border in zip(segments, limits):
            starts = border.starts(split, config.seq_len, config.pred_len)
            if len(starts):
                parts.append((one, starts, starts[0], border.targets(split)[1]))
        result[split] = Windows(parts, scaler, config, calendar) if parts else None
    return result


def begun(segments: Sequence[Series], scaler: Scaler) -> list[Series]:
    """Segments whose first row is whole: a sensor silent there shows its last value before, or its training mean.

    The first row of a segment is in look-backs only, never a target, so what is put there is never scored.
    """
    last = scaler.mean[scaler.row("")].copy()
    result = []
    for one in segments:
        known = ~np.isnan(one.values)
        if known[0].all():
            result.append(one)
        else:
            values = one.values.copy()
            values[0] = np.where(known[0], values[0], last)
            result.append(dataclasses.replace(one, values=values))
        row = np.where(known, np.arange(len(known))[:, None], -1).max(axis=0)
        seen = row >= 0
        last[seen] = one.values[row[seen], np.flatnonzero(seen)]
    return result


def train_parts(table: SensorTable, limits: Sequence[Borders]) -> list[tuple[str, np.ndarray]]:
    """The training rows of each segment: all that statistics may see."""
    return [("", one.values[: border.train]) for one, border in zip(table.segments, limits)]


def whole_days(table: SensorTable, limits: Sequence[Borders], season: int) -> np.ndarray:
    """All training rows below each other on one grid of time, NaN where there are none; for errors a season apart."""
    times = table.segments[0].times[:0].append([one.times[: b.train] for one, b in zip(table.segments, limits)])
    rows = np.concatenate([values for _, values in train_parts(table, limits)])
    if len(times) <= season:
        return rows
    grid = pd.date_range(times[0], times[-1], freq=table.frequency)
    full = np.full((len(grid), rows.shape[1]), np.nan)
    place = grid.get_indexer(times)
    full[place[place >= 0]] = rows[place >= 0]
    return full


def fit_scaler(parts: Sequence[tuple[str, np.ndarray]], config: TrafficDataConfig) -> Scaler:
    """Mean and deviation over training rows: of all sensors together, or of each."""
    scaler = Scaler.fit(parts, dataclasses.replace(config, scaler="global"))
    if config.scale == "none" or not config.shared_scale:
        return scaler
    rows = np.concatenate([values for _, values in parts])
    std = float(np.nanstd(rows))
    return dataclasses.replace(
        scaler,
        mean=np.full_like(scaler.mean, np.nanmean(rows)),
        std=np.full_like(scaler.std, std if std > 0 else 1.0),
    )


def check_lengths(table: SensorTable, limits: Sequence[Borders], config: TrafficDataConfig) -> None:
    """Refuse options under which a part has no window, with the arithmetic in the message."""
    for name in ("seq_len", "pred_len"):
        if getattr(config, name) < 1:
            raise UserError(f"data_args.{name} is {getattr(config, name)}; it must be at least 1")
    if not 0 <= config.label_len <= config.seq_len:
        raise UserError(
            f"data_args.label_len is {config.label_len}; it must lie between 0 and seq_len, {config.seq_len}"
        )
    for split, part in (("train", "training"), ("test", "test")):
        if not any(len(border.starts(split, config.seq_len, config.pred_len)) for border in limits):
            rows = max(border.targets(split)[1] - border.targets(split)[0] for border in limits)
            raise UserError(
                f"{table.source}: no window of seq_len {config.seq_len} + pred_len {config.pred_len} steps fits in the "
                f"{part} part: its longest stretch without a jump has {max(rows, 0)} rows; shorten the windows, raise "
                "--data_args.max_gap, or split otherwise"
            )


# -- time of day ------------------------------------------------------------------------------------------------------


def time_of_day(windows: Windows, season: int) -> np.ndarray:
    """Mean of each sensor at each step of the day over the rows of the windows, (season, N), scaled as they are.

    Where a step of the day was never observed, the sensor's mean stands.
    """
    rows = windows.values.double().numpy()
    known = np.ones_like(rows, dtype=bool) if windows.observed is None else windows.observed.numpy()
    slots = np.concatenate([day_slots(times, season) for times in windows.times])
    total, count = np.zeros((season, rows.shape[1])), np.zeros((season, rows.shape[1]))
    np.add.at(total, slots, np.where(known, rows, 0.0))
    np.add.at(count, slots, known)
    overall = total.sum(axis=0) / np.maximum(count.sum(axis=0), 1)
    return np.where(count > 0, total / np.maximum(count, 1), overall)


def day_slots(times: pd.DatetimeIndex, season: int) -> np.ndarray:
    """Number of the step of the day, 0 to season - 1, of each time."""
    clock = _clock(times)
    return np.asarray((clock - clock.normalize()) // (_DAY / season), dtype=np.int64)


def facts(
    table: SensorTable,
    limits: Sequence[Borders],
    config: TrafficDataConfig,
    splits: Mapping[str, Windows | None],
    weights: np.ndarray | None,
    notes: Sequence[str],
) -> dict[str, Any]:
    """What the report tells about the data."""
    dates = sum(len(one.times) for one in table.segments)
    result: dict[str, Any] = {
        "file": table.source,
        "sensors": len(table.columns),
        "rows": f"{dates:,}",
        "step": table.frequency,
        "segments": f"{len(table.segments):,}" + (", cut at midnight" if config.cut == "day" else ""),
        "from": str(table.segments[0].times[0]),
        "to": str(table.segments[-1].times[-1]),
        "windows": ", ".join(f"{name} {len(w) if w else 0:,}" for name, w in splits.items()),
    }
    if config.days is not None:
        result["days"] = "{} training, {} validation, {} test".format(*config.days)
    else:
        ends = [sum(getattr(border, name) for border in limits) for name in ("train", "val", "test")]
        result["borders (rows)"] = "train 0-{:,}, validation -{:,}, test -{:,}".format(*ends)
    if weights is not None:
        alone = int(((weights + weights.T).sum(axis=0) == 0).sum())
        result["graph"] = f"{int((weights > 0).sum()):,} edges" + (f", {alone} sensors without one" if alone else "")
    else:
        result["graph"] = "none"
    if table.notes or notes:
        result["found"] = "; ".join([*table.notes, *notes])
    return result
