"""Forecasts for users' files: a table in; a table with the times continued, and a plot, out."""

from __future__ import annotations

import dataclasses
import os
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import torch

from attn_shared.errors import UserError
from attn_timeseries.baselines import batches
from attn_timeseries.calibration import widen
from attn_timeseries.data.calendar import calendar_features
from attn_timeseries.data.cards import ForecastDataConfig
from attn_timeseries.data.covariates import CovariateCoder
from attn_timeseries.data.sources import source_path
from attn_timeseries.data.table import Series, SeriesTable, read_table
from attn_timeseries.data.windows import Windows, fill_between

if TYPE_CHECKING:
    from attn_timeseries.task import ForecastTask

_BATCH = 256
_FOLLOWED = 2000  # latest forecasts of a file that adaptive calibration follows
_PANELS = 8


def predict_files(task: ForecastTask, inputs: Sequence[Path], output: Path, options: Mapping[str, Any]) -> list[Path]:
    """Forecast the steps that follow each file's last row.

    The option `future` names a table of the known covariates of those steps; without it they stand in the input, in
    rows with empty targets at the end. Series shorter than the look-back are left out and told.

    Writes `<stem>_forecast.csv` (same column names, original scale, id column kept) and `<stem>_forecast.png` for each
    input. Where the task makes intervals, each column `x` is followed by `x_lower` and `x_upper`, the ends of the
    interval of `task_args.coverage`, and where it learnt quantiles by the others of them, such as `x_q25`. An input
    may also be the name of a data set.

    Raises:
        UserError: names the file; what was written before stays, and is whole.
    """
    future = Path(options["future"]).expanduser() if options.get("future") else None
    if future is not None and len(inputs) != 1:
        raise UserError(f"--future belongs to one input, and there are {len(inputs)}; forecast them one by one")
    if future is not None and not _known_roles(task):
        raise UserError("the model was trained without known covariates, so it takes no --future")
    paths = [source_path(str(path)) for path in inputs]
    stems = [path.stem for path in paths]
    for stem in stems:
        if stems.count(stem) > 1:
            raise UserError(f"two inputs are called {stem!r} and would write the same forecast; rename one")
    try:
        output.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        raise UserError(f"{output} is a file; name a folder with --output") from None
    written: list[Path] = []
    for path in paths:
        table = _usable(task, task.read_input(path, future))
        forecasts = [forecast_series(task, one, table) for one in table.series]
        target = output / f"{path.stem}_forecast.csv"
        write_atomically(target, lambda file, t=table, f=forecasts: _write_csv(file, t, f))  # type: ignore[misc]
        plot = target.with_suffix(".png")
        write_atomically(plot, lambda file, t=table, f=forecasts: _write_plot(file, task, t, f))  # type: ignore[misc]
        written += [target, plot]
    return written


def _known_roles(task: ForecastTask) -> list[str]:
    """Roles known ahead that the model was trained with."""
    names = task.data_state.get("covariates", {}).get("names", {})
    return [role for role in ("known", "known_cat") if role in names]


def read_input(task: ForecastTask, path: Path, future: Path | None = None) -> SeriesTable:
    """The file's table, its columns those of the training data, in their order; with the known values of `future`."""
    from attn_timeseries.task import check_step

    state, args = task.data_state, task.config.data_args
    assert isinstance(args, ForecastDataConfig)
    options = dataclasses.replace(
        args, columns=list(state["columns"]), time_column=None, id_column=None, delimiter=None
    )
    likely = [state["id_column"]] if state["id_column"] and not args.id_columns else []
    try:
        table = read_table(path, options, likely_ids=likely)
    except UserError as error:
        text = str(error)
        if "unknown column" in text:
            text = f"{text.rstrip('?')}? The model was trained on columns {', '.join(map(repr, state['columns']))}"
            raise UserError(text) from None
        if "holds no number at all" in text:
            text = f"{text.partition(';')[0]}, and the model forecasts it from its past"
            raise UserError(text) from None
        raise
    check_step(table, state)
    for note in table.notes:
        print(f"{path.name}: {note}", file=sys.stderr)
    if future is not None:
        options = dataclasses.replace(options, frequency=table.frequency)
        ahead = read_table(future, options, likely_ids=table.id_columns, targets=False)
        if ahead.id_columns != table.id_columns:
            raise UserError(f"{ahead.source} has no column {table.id_columns[0]!r}, which names the series")
        table = _joined(task, table, ahead)
    return table


def _steps_ahead(task: ForecastTask, series: Series, frequency: str) -> pd.DatetimeIndex:
    """(pred_len,) times that follow a series."""
    return pd.date_range(series.times[-1], periods=task.shape.pred_len + 1, freq=frequency)[1:]


def _joined(task: ForecastTask, table: SeriesTable, ahead: SeriesTable) -> SeriesTable:
    """The table with the known covariates of another in place of its own rows ahead."""
    given = {one.ids: one for one in ahead.series}
    series = []
    for one in table.series:
        of = f" of series {one.name!r}" if one.name else ""
        if one.ids not in given:
            raise UserError(f"{ahead.source} has no rows{of}, which {table.source} has")
        other = given[one.ids].covariates
        assert other is not None
        assert one.covariates is not None
        zoned, times = other.ahead, _steps_ahead(task, one, table.frequency)
        if (zoned.tz is None) != (times.tz is None):
            raise UserError(
                f"{ahead.source}: its times and those of {table.source} must both have a UTC offset or none"
            )
        rows = zoned.get_indexer(times)
        reached = int((rows < 0).argmax()) if (rows < 0).any() else len(times)
        covariates = one.covariates.with_ahead(times[:reached], other, rows[:reached])
        series.append(dataclasses.replace(one, covariates=covariates))
    source = f"{table.source} with {ahead.source}"
    return dataclasses.replace(table, series=series, source=source)


def _usable(task: ForecastTask, table: SeriesTable) -> SeriesTable:
    """The table without series that are shorter than the look-back, which are told; refused where none is left."""
    short = [one for one in table.series if len(one.times) < task.shape.seq_len]
    if not short or len(short) == len(table.series):
        return table
    names = ", ".join(repr(one.name) for one in short[:5]) + (", …" if len(short) > 5 else "")
    print(
        f"{table.source}: {len(short)} of {len(table.series)} series are shorter than the {task.shape.seq_len} steps "
        f"that the model looks back, and are left out: {names}",
        file=sys.stderr,
    )
    long_enough = [one for one in table.series if len(one.times) >= task.shape.seq_len]
    return dataclasses.replace(table, series=long_enough)


def covariate_batch(task: ForecastTask, series: Series, table: SeriesTable) -> dict[str, torch.Tensor]:
    """The covariates of the window that ends a series, as the model takes them; empty where it has none.

    Raises:
        UserError: a known covariate is not given for every step to forecast.
    """
    if "covariates" not in task.data_state or series.covariates is None:
        return {}
    of = f" of series {series.name!r}" if series.name else ""
    part, count = series.covariates, task.shape.pred_len
    if _known_roles(task):
        names = [name for role in _known_roles(task) for name in table.roles[role]]
        if len(part.ahead) < count:
            first = _steps_ahead(task, series, table.frequency)[len(part.ahead)]
            raise UserError(
                f"{table.source}: the forecast{of} needs {', '.join(map(repr, names))} for {count} steps ahead and "
                f"they end before {first}; add rows with empty targets at the end, or name a table with --future"
            )
        if "known" in part.values:
            behind = len(part.values["known"]) - len(part.ahead)
            holes = np.isnan(part.values["known"][behind : behind + count])
            if holes.any():
                step, c = (int(i) for i in np.argwhere(holes)[0])
                raise UserError(
                    f"{table.source}: {table.roles['known'][c]!r}{of} has no value at {part.ahead[step]}, a step to "
                    "forecast; fill it in"
                )
    coded = CovariateCoder.from_state(task.data_state["covariates"]).encode(part)
    end, length = len(series.times), task.shape.seq_len
    batch = {}
    for role, values in coded.items():
        if not role.startswith("static"):
            values = values[end - length : end + (count if role.startswith("known") else 0)]
        batch[role] = torch.from_numpy(values)[None]
    return batch


def forecast_series(task: ForecastTask, series: Series, table: SeriesTable) -> pd.DataFrame:
    """Forecast of one series: index the future times, columns those of the training data, original scale."""
    seq_len = task.shape.seq_len
    of = f" of series {series.name!r}" if series.name else ""
    if len(series.times) < seq_len:
        raise UserError(
            f"{table.source}: the history{of} has {len(series.times)} steps and the model looks back {seq_len}"
        )
    # Gaps before the end are filled by a line between observed values, one at the end by the last observed value.
    history = task.scaler.scale(fill_between(series.values), series.name)[-seq_len:]
    future = _steps_ahead(task, series, table.frequency)
    times = pd.DatetimeIndex(series.times[-seq_len:].append(future))
    marks = torch.from_numpy(calendar_features(times, task.data_state["calendar"]).astype(np.float32))[None]
    dtype = next((p.dtype for p in task.network.parameters()), torch.float32)
    batch = {
        "x": torch.from_numpy(history).to(dtype)[None],
        "x_mark": marks[:, :seq_len].to(dtype),
        "y_mark": marks[:, seq_len - task.shape.label_len :].to(dtype),
    }
    for name, value in covariate_batch(task, series, table).items():
        batch[name] = value.to(dtype) if value.is_floating_point() else value
    task.eval()
    with torch.no_grad():
        output = task._output(task._here(batch)).cpu().to(torch.float64)
    row = task.scaler.row(series.name)
    mean, std = task.scaler.mean[row], task.scaler.std[row]
    frame = pd.DataFrame(task._centre(output)[0].numpy() * std + mean, index=future, columns=table.columns)
    if not task.intervals_ready:
        return frame
    quantiles = task.quantiles(output)[0]
    if task.calibration is not None:
        quantiles = widen(quantiles, _factors(task, series, table, dtype))
    values = quantiles.numpy() * std[:, None] + mean[:, None]
    names = _interval_names(task)
    for c, column in reversed(list(enumerate(table.columns))):
        for suffix, level in reversed(names.items()):
            name = f"{column}_{suffix}"
            if name in (*table.columns, table.time_column, *table.id_columns):
                raise UserError(
                    f"{table.source}: the interval of column {column!r} would have the name of column {name!r}; "
                    "rename one and train again"
                )
            frame.insert(c + 1, name, values[:, c, level])
    return frame


def _interval_names(task: ForecastTask) -> dict[str, int]:
    """Endings of the columns of an interval -> numbers of their quantile levels."""
    options = task.options
    last, middle = len(options.levels) - 1, len(options.levels) // 2
    names = {"lower": options.pair, "upper": last - options.pair}
    if options.loss == "quantile":
        others = [i for i in range(last + 1) if i not in (*names.values(), middle)]
        names |= {f"q{100 * options.levels[i]:.6g}": i for i in others}
    return names


def _factors(task: ForecastTask, series: Series, table: SeriesTable, dtype: torch.dtype) -> torch.Tensor:
    """(H, C, P) by which the intervals of a series grow.

    With adaptive calibration they follow the forecasts of the rows that came after the data the model was calibrated
    on, as far as their targets are in the file.
    """
    assert task.calibration is not None
    if task.options.calibrate != "adaptive":
        return task.calibration.conformal()
    tracker = task.calibration.tracker()
    args, count = task.config.data_args, len(series.times)
    first = max(_first_new(task, series) - task.shape.seq_len, count - task.shape.seq_len - _FOLLOWED, 0)
    starts = range(first, count - task.shape.seq_len)
    if not len(starts):
        return tracker.next()
    # The last forecasts have steps still to come: rows without values, which are never learnt from.
    ahead = _steps_ahead(task, series, table.frequency)
    longer = dataclasses.replace(
        series,
        times=pd.DatetimeIndex(series.times.append(ahead)),
        values=np.concatenate([series.values, np.full((len(ahead), series.values.shape[1]), np.nan)]),
    )
    coder = CovariateCoder.from_state(task.data_state["covariates"]) if "covariates" in task.data_state else None
    windows = Windows(
        [(longer, starts, first, len(longer.times))], task.scaler, args, task.data_state["calendar"], coder
    )
    with torch.no_grad():
        for batch in batches(windows, _BATCH):
            cast = {name: value.to(dtype) if value.is_floating_point() else value for name, value in batch.items()}
            outcome = task._outcome(cast, task._output(task._here(cast)))
            tracker.follow(outcome.scores(), outcome.known)
    return tracker.next()


def _first_new(task: ForecastTask, series: Series) -> int:
    """First row of a series that neither training nor calibration saw: all rows of a series that is new."""
    if "calibrated_to" not in task.data_state:
        return len(series.times)
    known = task.data_state["calibrated_to"].get(series.name)
    if known is None:
        return 0
    last, times = pd.Timestamp(known), series.times
    if (last.tz is None) != (times.tz is None):
        last, times = last.tz_localize(None), times.tz_localize(None)
    return int(times.searchsorted(last, side="right"))


def _write_csv(file: Path, table: SeriesTable, forecasts: Sequence[pd.DataFrame]) -> None:
    """Times as ISO dates, with the time of day where there is one; ten significant digits."""
    parts = []
    for series, forecast in zip(table.series, forecasts):
        part = forecast.rename_axis(table.time_column).reset_index()
        for i, name in enumerate(table.id_columns):
            part.insert(1 + i, name, series.ids[i])
        parts.append(part)
    whole = pd.concat(parts, ignore_index=True)
    times = whole[table.time_column]
    if (times == times.dt.normalize()).all() and times.dt.tz is None:
        whole[table.time_column] = times.dt.strftime("%Y-%m-%d")
    whole.to_csv(file, index=False, float_format="%.10g", lineterminator="\n")


def _write_plot(file: Path, task: ForecastTask, table: SeriesTable, forecasts: Sequence[pd.DataFrame]) -> None:
    from attn_timeseries.plots import forecast_panels

    panels: list[dict[str, Any]] = []
    tail = min(task.shape.seq_len, max(2 * task.shape.pred_len, 48))
    for series, forecast in zip(table.series, forecasts):
        for c, column in enumerate(table.columns):
            if len(panels) == _PANELS:
                break
            times = pd.DatetimeIndex(series.times[-tail:].append(pd.DatetimeIndex(forecast.index)))
            panels.append(
                {
                    "title": f"{series.name}, {column}" if series.name else column,
                    "times": times.tz_localize(None),
                    "history": series.values[-tail:, c],
                    "forecast": forecast[column].to_numpy(),
                    "bands": [(forecast[f"{column}_lower"].to_numpy(), forecast[f"{column}_upper"].to_numpy())]
                    if task.intervals_ready
                    else [],
                }
            )
    forecast_panels(panels).savefig(file, dpi=130, format="png")


def write_atomically(target: Path, write: Callable[[Path], None]) -> None:
    """Have `write` write a file beside `target`, and rename it: `target` is never half-written."""
    try:
        handle, name = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.")
    except OSError as error:
        raise UserError(f"cannot write to {target.parent}: {error.strerror}") from None
    os.close(handle)
    try:
        write(Path(name))
        os.chmod(name, 0o644)
        os.replace(name, target)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
