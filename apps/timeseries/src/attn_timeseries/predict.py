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
from attn_timeseries.data.calendar import calendar_features
from attn_timeseries.data.cards import ForecastDataConfig
from attn_timeseries.data.sources import source_path
from attn_timeseries.data.table import Series, SeriesTable, read_table
from attn_timeseries.data.windows import fill_between

if TYPE_CHECKING:
    from attn_timeseries.task import ForecastTask

_BATCH = 256
_PANELS = 8


def predict_files(task: ForecastTask, inputs: Sequence[Path], output: Path, options: Mapping[str, Any]) -> list[Path]:
    """Forecast the steps that follow each file's last row.

    Writes `<stem>_forecast.csv` (same column names, original scale, id column kept) and `<stem>_forecast.png` for each
    input. An input may also be the name of a data set.

    Raises:
        UserError: names the file; what was written before stays, and is whole.
    """
    if options:
        raise UserError(f"forecasting takes no option {sorted(options)[0]!r}")
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
        table = task.read_input(path)
        forecasts = [forecast_series(task, one, table) for one in table.series]
        target = output / f"{path.stem}_forecast.csv"
        write_atomically(target, lambda file, t=table, f=forecasts: _write_csv(file, t, f))  # type: ignore[misc]
        plot = target.with_suffix(".png")
        write_atomically(plot, lambda file, t=table, f=forecasts: _write_plot(file, task, t, f))  # type: ignore[misc]
        written += [target, plot]
    return written


def read_input(task: ForecastTask, path: Path) -> SeriesTable:
    """The file's table, its columns those of the training data, in their order."""
    from attn_timeseries.task import check_step

    state, args = task.data_state, task.config.data_args
    assert isinstance(args, ForecastDataConfig)
    options = dataclasses.replace(
        args, columns=list(state["columns"]), time_column=None, id_column=None, delimiter=None
    )
    try:
        table = read_table(path, options)
    except UserError as error:
        text = str(error)
        if "unknown column" in text:
            text = f"{text.rstrip('?')}? The model was trained on columns {', '.join(map(repr, state['columns']))}"
            raise UserError(text) from None
        raise
    check_step(table, state)
    for note in table.notes:
        print(f"{path.name}: {note}", file=sys.stderr)
    return table


def forecast_series(task: ForecastTask, series: Series, table: SeriesTable) -> pd.DataFrame:
    """Forecast of one series: index the future times, columns those of the training data, original scale."""
    seq_len, pred_len = task.shape.seq_len, task.shape.pred_len
    of = f" of series {series.name!r}" if series.name else ""
    if len(series.times) < seq_len:
        raise UserError(
            f"{table.source}: the history{of} has {len(series.times)} steps and the model looks back {seq_len}"
        )
    # Gaps before the end are filled by a line between observed values, one at the end by the last observed value.
    history = task.scaler.scale(fill_between(series.values), series.name)[-seq_len:]
    future = pd.date_range(series.times[-1], periods=pred_len + 1, freq=table.frequency)[1:]
    times = pd.DatetimeIndex(series.times[-seq_len:].append(future))
    marks = torch.from_numpy(calendar_features(times, task.data_state["calendar"]).astype(np.float32))[None]
    dtype = next((p.dtype for p in task.network.parameters()), torch.float32)
    batch = {
        "x": torch.from_numpy(history).to(dtype)[None],
        "x_mark": marks[:, :seq_len].to(dtype),
        "y_mark": marks[:, seq_len - task.shape.label_len :].to(dtype),
    }
    task.eval()
    with torch.no_grad():
        scaled = task.forward_batch(task._here(batch)).cpu().to(torch.float64).numpy()[0]
    row = task.scaler.row(series.name)
    values = scaled * task.scaler.std[row] + task.scaler.mean[row]
    return pd.DataFrame(values, index=future, columns=table.columns)


def _write_csv(file: Path, table: SeriesTable, forecasts: Sequence[pd.DataFrame]) -> None:
    """Times as ISO dates, with the time of day where there is one; ten significant digits."""
    parts = []
    for series, forecast in zip(table.series, forecasts):
        part = forecast.rename_axis(table.time_column).reset_index()
        if table.id_column is not None:
            part.insert(1, table.id_column, series.name)
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
