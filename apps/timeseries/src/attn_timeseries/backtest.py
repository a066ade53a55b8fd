"""Rolling-origin backtests: forecast from one moment after the other, each from what was known then, and score them.

At each origin every series is cut; what lies behind the cut exists neither for training, statistics, calibration nor
the look-back. Only covariates that are known in advance reach over it, for as many steps as are forecast. The model is
trained anew every `refit` origins, or once, before the first.
"""

from __future__ import annotations

import dataclasses
import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
import yaml

from attn_shared import trainer
from attn_shared.config import RunConfig, config_to_dict
from attn_shared.errors import UserError
from attn_shared.runs import write_atomically
from attn_timeseries import baselines as simple
from attn_timeseries import metrics
from attn_timeseries.cli import APP
from attn_timeseries.data.benchmarks import all_borders, split_rule
from attn_timeseries.data.cards import ForecastDataConfig
from attn_timeseries.data.sources import read_source
from attn_timeseries.data.table import Series, SeriesTable
from attn_timeseries.data.windows import Scaler, Windows, fill_between
from attn_timeseries.predict import covariate_batch, forecast_series
from attn_timeseries.task import ForecastTask, new_scores

HISTORY = "history"
"""The rule of `data.benchmarks` by which the rows before an origin are training, then validation."""
_MIDNIGHT = " 00:00:00"


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How a backtest rolls.

    Attributes:
        folds: origins; None = as many as fit in the test part.
        step: steps from one origin to the next; None = the horizon.
        refit: train anew at every so-manieth origin; 0 = only at the first.
        window: "expanding" = all rows before an origin; "sliding" = the last `train_rows` of them.
        train_rows: rows of a sliding window; None = as many as lie before the first origin.
    """

    folds: int | None = None
    step: int | None = None
    refit: int = 1
    window: str = "expanding"
    train_rows: int | None = None


@dataclass(kw_only=True)
class Backtest:
    """What a backtest found.

    Attributes:
        forecasts: a row a value: origin, series, column, step (from 1), time, truth, a column of forecasts a model, and
            lower and upper where there are intervals.
        origins: a row an origin and model: origin, fit (from 1), model, series, and its figures.
        overall: model -> figures over all origins.
        protocol: one sentence.
        fits: origins at which the model was trained.
    """

    forecasts: pd.DataFrame
    origins: pd.DataFrame
    overall: dict[str, dict[str, float]]
    protocol: str
    fits: list[pd.Timestamp]
    curves: dict[str, np.ndarray] = field(default_factory=dict)


def cut(series: Series, first: int, last: int, ahead: int = 0) -> Series:
    """Rows [first, last) of a series; of covariates known in advance also the `ahead` rows after them."""
    part = series.covariates
    if part is not None:
        end = min(last + ahead, len(series.times) + len(part.ahead))
        times = pd.DatetimeIndex(series.times.append(part.ahead))[last:end]

        def rows(role: str, table: np.ndarray) -> np.ndarray:
            if role.startswith("static"):
                return table
            return table[first : end if role.startswith("known") else last]

        part = dataclasses.replace(
            part,
            values={role: rows(role, table) for role, table in part.values.items()},
            codes={role: rows(role, table) for role, table in part.codes.items()},
            ahead=times,
        )
    return dataclasses.replace(
        series, times=series.times[first:last], values=series.values[first:last].copy(), covariates=part
    )


def backtest(config: RunConfig, settings: Settings, say: Callable[[str], None] = lambda line: None) -> Backtest:
    """Run it.

    Args:
        config: model, data, lengths, training; its validation share of the rows before the test part is kept.
        settings: see `Settings`.
        say: takes a line of progress a fit.

    Raises:
        UserError: too few rows, options that do not fit, or data that cannot be read.
    """
    if APP.kind(config.data, config.kind).name != APP.kinds[0].name:
        raise UserError(f"{config.data} is no table of series to forecast, and only forecasts can be backtested")
    args: ForecastDataConfig = config.data_args
    table = read_source(config.data, args)
    rule = split_rule(args, config.data)
    limits = all_borders(table.series, rule, args)
    # The papers' splits leave the end of some series unused, and so does a backtest of them.
    table = dataclasses.replace(
        table, series=[cut(one, 0, end.test, args.pred_len) for one, end in zip(table.series, limits)]
    )
    leader = max(range(len(limits)), key=lambda i: (table.series[i].times[-1], limits[i].test))
    moments = _moments(table.series[leader], limits[leader].val, args, settings, table.source)
    share = 1 - limits[leader].train / limits[leader].val
    if share <= 0:
        raise UserError(
            "a backtest chooses the best epoch of each fit on a validation part, and train_fraction + test_fraction "
            "leave none; make one of them smaller"
        )
    train_rows = settings.train_rows
    if settings.window == "sliding" and train_rows is None:
        train_rows = int(table.series[leader].times.searchsorted(moments[0]))
    past = dataclasses.replace(args, train_fraction=1 - share, test_fraction=share)

    task: ForecastTask | None = None
    rows: list[simple.Baseline] = []
    overall: dict[str, metrics.ForecastScores] = {}
    scaler: Scaler | None = None
    state: dict[str, Any] = {}
    fits: list[pd.Timestamp] = []
    frames: list[pd.DataFrame] = []
    origins: list[dict[str, Any]] = []
    for number, moment in enumerate(moments):
        if task is None or (settings.refit and number % settings.refit == 0):
            task, rows, state_now = _fit(config, past, table, moment, train_rows)
            fits.append(moment)
            if scaler is None:  # scores of all origins are in the units of the first fit
                state, scaler = state_now, Scaler.from_state(state_now["scaler"])
            say(f"fit {len(fits)} at {_text(moment)}, origin {number + 1} of {len(moments)}")
        assert scaler is not None
        parts = [(one, int(one.times.searchsorted(moment))) for one in table.series]
        parts = [(one, at) for one, at in parts if at >= args.seq_len and at + args.pred_len <= len(one.times)]
        if not parts:
            raise UserError(
                f"{table.source}: at {moment} no series has {args.seq_len} rows before and {args.pred_len} after"
            )
        scores: dict[str, metrics.ForecastScores] = {}
        found = [_forecasts(task, rows, one, at, table) for one, at in parts]
        for (one, at), (columns, bounds) in zip(parts, found):
            truth = one.values[at : at + args.pred_len]
            frames.append(_frame(moment, one, at, table.columns, truth, columns, bounds))
            for name, values in columns.items():
                for board in (scores, overall):
                    if name not in board:
                        board[name] = new_scores(state, args.pred_len)
                    _update(board[name], scaler, one.name, values, truth)
        for name, score in scores.items():
            figures = metrics.final(score.state())
            figures |= _interval_figures(frames[-len(parts) :]) if name == config.model else {}
            origins.append({"origin": str(moment), "fit": len(fits), "model": name, "series": len(parts), **figures})
    whole = {name: metrics.final(score.state()) for name, score in overall.items()}
    whole[config.model] |= _interval_figures(frames)
    return Backtest(
        forecasts=_short_times(pd.concat(frames, ignore_index=True)),
        origins=_short_times(pd.DataFrame(origins)),
        overall=whole,
        protocol=_protocol(config, table, moments, fits, settings, train_rows, share),
        fits=fits,
        curves={name: metrics.curve(score.state()) for name, score in overall.items()},
    )


def _moments(
    series: Series, border: int, args: ForecastDataConfig, settings: Settings, source: str
) -> list[pd.Timestamp]:
    """The times forecast first, oldest first; the last forecast ends with the series."""
    step, last = settings.step or args.pred_len, len(series.times) - args.pred_len
    folds = settings.folds
    if folds is None:
        folds = (last - border) // step + 1
    first = last - (folds - 1) * step
    window = args.seq_len + args.pred_len
    if folds < 1 or first < window:
        fits = max(0, (last - window) // step + 1)
        raise UserError(
            f"{source}: {max(folds, 1)} origins {step} steps apart need {window} rows (seq_len + pred_len) before the "
            f"first, and {fits} would fit in its {len(series.times):,} rows"
        )
    return [series.times[first + i * step] for i in range(folds)]


def _fit(
    config: RunConfig, past: ForecastDataConfig, table: SeriesTable, moment: pd.Timestamp, train_rows: int | None
) -> tuple[ForecastTask, list[simple.Baseline], dict[str, Any]]:
    """The model and the baselines trained on what lies before `moment`, and the statistics of that."""
    series = []
    for one in table.series:
        last = int(one.times.searchsorted(moment))
        first = 0 if train_rows is None else max(0, last - train_rows)
        first = _observed(one, first, last)
        if last > first:
            series.append(cut(one, first, last))
    if not series:
        raise UserError(f"{table.source}: no series begins before {moment}")
    config = dataclasses.replace(config, data_args=past)
    try:
        bundle = ForecastTask.bundle(config, past, dataclasses.replace(table, series=series), HISTORY)
        task = trainer.fit(APP, config, bundle)
    except UserError as error:
        raise UserError(f"before the origin {_text(moment)}: {error}") from None
    assert isinstance(task, ForecastTask)
    assert isinstance(bundle.train, Windows)
    assert bundle.val is None or isinstance(bundle.val, Windows)
    rows = simple.baselines(bundle.train, bundle.val, bundle.state["season"], past.pred_len)
    return task, [row for row in rows if row.name != config.model], bundle.state


def _observed(series: Series, first: int, last: int) -> int:
    """The first row from `first` on at which every column is observed: a gap cannot be filled from before it."""
    known = ~np.isnan(series.values[first:last]).any(axis=1)
    return first + int(known.argmax()) if known.any() else last


def _forecasts(
    task: ForecastTask, rows: Sequence[simple.Baseline], series: Series, at: int, table: SeriesTable
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Model -> (H, C) forecast in original units, made from the rows before `at`; and "lower", "upper" of the model."""
    seen = cut(series, 0, at, task.shape.pred_len)
    frame = forecast_series(task, seen, table)
    found = {task.config.model: frame[table.columns].to_numpy()}
    bounds = {
        side: frame[[f"{column}_{side}" for column in table.columns]].to_numpy()
        for side in ("lower", "upper")
        if task.intervals_ready
    }
    row = task.scaler.row(series.name)
    mean, std = task.scaler.mean[row], task.scaler.std[row]
    history = task.scaler.scale(fill_between(seen.values), series.name)[-task.shape.seq_len :]
    batch = {"x": torch.from_numpy(history.astype(np.float32))[None], **covariate_batch(task, seen, table)}
    for baseline in rows:
        found[baseline.name] = baseline.of(batch)[0].double().numpy() * std + mean
    return found, bounds


def _update(scores: metrics.ForecastScores, scaler: Scaler, name: str, forecast: np.ndarray, truth: np.ndarray) -> None:
    known = ~np.isnan(truth)
    scores.update(
        torch.from_numpy(scaler.scale(forecast, name))[None],
        torch.from_numpy(scaler.scale(np.where(known, truth, 0.0), name))[None],
        torch.tensor([scaler.row(name)]),
        torch.from_numpy(known)[None],
    )


def _frame(
    moment: pd.Timestamp,
    series: Series,
    at: int,
    columns: Sequence[str],
    truth: np.ndarray,
    forecasts: dict[str, np.ndarray],
    bounds: dict[str, np.ndarray],
) -> pd.DataFrame:
    steps, width = truth.shape
    times = [str(moment) for moment in series.times[at : at + steps]]
    return pd.DataFrame(
        {
            "origin": str(moment),
            "series": series.name,
            "column": np.tile(columns, steps),
            "step": np.repeat(np.arange(1, steps + 1), width),
            "time": np.repeat(times, width),
            "truth": truth.ravel(),
            **{name: values.ravel() for name, values in {**forecasts, **bounds}.items()},
        }
    )


def _interval_figures(frames: Sequence[pd.DataFrame]) -> dict[str, float]:
    """Share of observed values inside their interval, and its mean width in original units."""
    if "lower" not in frames[0]:
        return {}
    table = pd.concat(frames)
    known = table[table["truth"].notna()]
    inside = (known["truth"] >= known["lower"]) & (known["truth"] <= known["upper"])
    return {"coverage": float(inside.mean()), "width_original": float((known["upper"] - known["lower"]).mean())}


def _text(moment: pd.Timestamp) -> str:
    return str(moment).removesuffix(_MIDNIGHT)


def _short_times(frame: pd.DataFrame) -> pd.DataFrame:
    """Dates alone where every time of a frame is a midnight."""
    names = [name for name in ("origin", "time") if name in frame]
    if all(frame[name].str.endswith(_MIDNIGHT).all() for name in names):
        for name in names:
            frame[name] = frame[name].str.removesuffix(_MIDNIGHT)
    return frame


def _protocol(
    config: RunConfig,
    table: SeriesTable,
    moments: Sequence[pd.Timestamp],
    fits: Sequence[pd.Timestamp],
    settings: Settings,
    train_rows: int | None,
    share: float,
) -> str:
    args = config.data_args
    trained = f"trained {len(fits)} times" if len(fits) > 1 else "trained once, before the first origin"
    rows = "all rows before the origin" if train_rows is None else f"the last {train_rows:,} rows before the origin"
    return (
        f"{table.source}, rolling origin: {args.seq_len} steps to {args.pred_len} from {len(moments)} origins "
        f"{settings.step or args.pred_len} steps apart, {_text(moments[0])} to {_text(moments[-1])}; {trained}, on "
        f"{rows}, the last {share:.1%} of them for validation; scaled errors in the units of the first fit"
    )


# -- results ----------------------------------------------------------------------------------------------------------


def write(result: Backtest, config: RunConfig, settings: Settings, folder: Path, command: str) -> Path:
    """Write forecasts.csv, origins.csv, backtest.json, config.yaml and report.html into `folder`, which is new."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, frame in (("forecasts", result.forecasts), ("origins", result.origins)):
        text = frame.to_csv(index=False, float_format="%.10g", lineterminator="\n")
        write_atomically(folder / f"{name}.csv", text)
    write_atomically(
        folder / "config.yaml", yaml.safe_dump(config_to_dict(config), sort_keys=False, allow_unicode=True)
    )
    record = {
        "app": APP.name,
        "model": config.model,
        "data": config.data,
        "mixer": config.mixer,
        "seed": config.seed,
        "settings": dataclasses.asdict(settings),
        "protocol": result.protocol,
        "fits": [_text(moment) for moment in result.fits],
        "overall": result.overall,
        "origins": _records(result.origins),
        "versions": trainer.versions(APP),
    }
    write_atomically(folder / "backtest.json", json.dumps(_finite(record), indent=2, ensure_ascii=False) + "\n")
    write_atomically(folder / "report.html", _report(result, config, folder, command))
    return folder


def _records(frame: pd.DataFrame) -> list[dict[str, Any]]:
    return [{str(name): value for name, value in row.items()} for row in frame.to_dict("records")]


def _finite(value: Any) -> Any:
    """JSON knows no NaN: null."""
    if isinstance(value, dict):
        return {name: _finite(item) for name, item in value.items()}
    if isinstance(value, list):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not np.isfinite(value) else value


def _report(result: Backtest, config: RunConfig, folder: Path, command: str) -> str:
    from attn_shared import page, plotting
    from attn_timeseries.plots import backtest_errors, backtest_forecasts, horizon_curves

    names = sorted(result.overall, key=lambda name: result.overall[name]["mse"])
    figures = [name for name in result.overall[config.model] if name != "windows"]
    head = ["model", *figures, "forecasts"]
    rows = []
    for name in names:
        own = result.overall[name]
        cells = [page.number(own.get(figure), metrics.FORMAT.get(figure, ".4g")) for figure in figures]
        rows.append(
            page.Row(cells=[name, *cells, f"{own['windows']:,.0f}"], kind="mark" if name == config.model else "")
        )
    pictures = {
        "origins": (
            backtest_errors(result.origins, config.model),
            "Squared error at each origin; a mark where the model was trained.",
        ),
        "forecasts": (
            backtest_forecasts(result.forecasts, config.model),
            "Forecasts from all origins over what came, of the first series and column.",
        ),
        "horizon": (
            horizon_curves({name: result.curves[name] for name in [config.model, *names] if name in result.curves}),
            "Squared error at each step ahead, mean over all origins.",
        ),
    }
    (folder / "plots").mkdir(exist_ok=True)
    shown = []
    for name, (figure, caption) in pictures.items():
        (folder / "plots" / f"{name}.png").write_bytes(plotting.png(figure))
        shown.append(page.picture(figure, caption, name))
    own_rows = result.origins[result.origins["model"] == config.model]
    by_origin = page.table(
        ["origin", "fit", *figures],
        [
            page.Row(cells=[row["origin"], row["fit"], *(page.number(row.get(name), ".4g") for name in figures)])
            for row in _records(own_rows)
        ],
    )
    body = [
        page.header("timeseries backtest", f"{config.model} on {Path(config.data).name}", result.protocol),
        page.section("Over all origins", page.table(head, rows)),
        page.section("Pictures", *shown),
        page.section("Each origin", page.fold(f"{config.model} at {len(own_rows)} origins", by_origin)),
        page.section("The same again", page.code(command)),
        page.fold("Configuration", page.code(yaml.safe_dump(config_to_dict(config), sort_keys=False))),
    ]
    return page.page(f"Backtest of {config.model}", "\n".join(part for part in body if part), wide=True)


def summary(result: Backtest, model: str) -> str:
    """The table over all origins as text, best first."""
    names = sorted(result.overall, key=lambda name: result.overall[name]["mse"])
    figures = ["mse", "mae", "mae_original", "mase"]
    if "coverage" in result.overall[model]:
        figures += ["coverage", "width_original"]
    width = max(len(name) for name in names)
    lines = [f"{'':2}{'model':{width}}" + "".join(f"{name:>15}" for name in figures)]
    for name in names:
        own = result.overall[name]
        cells = (f"{own[f]:15.4f}" if f in own else f"{'':15}" for f in figures)
        lines.append(f"{'* ' if name == model else '  '}{name:{width}}" + "".join(cells))
    return "\n".join(lines)


def run(config: RunConfig, settings: Settings, output: Path, command: str) -> Path:
    """Backtest, write the results into `output`, print the table; the folder."""
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise UserError(f"{output} is there already; name a new folder with --output")
    start = time.monotonic()
    progress = config.trainer.progress
    result = backtest(config, settings, lambda line: print(line, file=sys.stderr, flush=True) if progress else None)
    try:
        write(result, config, settings, output, command)
    except OSError as error:
        raise UserError(f"cannot write to {output}: {error.strerror or error}") from None
    print(f"{result.protocol}.\n\n{summary(result, config.model)}\n\n{time.monotonic() - start:.0f} s")
    return output
