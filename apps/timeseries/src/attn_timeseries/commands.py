"""The commands `timeseries export` and `timeseries backtest`. Imports no torch, so that `--help` answers at once."""

from __future__ import annotations

import shlex
import time
from collections.abc import Sequence
from pathlib import Path

from attn_shared import options
from attn_shared.errors import UserError
from attn_shared.runs import run_name

_EXPORT = """usage: timeseries export RUN --output FILE.onnx [options]

Writes the trained network as ONNX: scaled values in, the scaled forecast out, for any batch size and, where the model
allows it, any look-back. The file's metadata hold the columns, the scaler, the calendar features and the lengths. The
result is compared with PyTorch at several batch sizes and look-backs before it is written, and both are timed.

  --output FILE        where to write it
  --length KIND        look-back of the file: auto (any, where the model allows it), any, or fixed (default: auto)
  --longest N          longest look-back, in steps (default: four times the trained one)
  --tolerance X        largest difference from PyTorch, as a share of the largest value (default: 1e-5)
  --calls N            calls timed of each, one window a call (default: 200; 0 = none)"""

_KINDS = ("auto", "any", "fixed")


def export(argv: Sequence[str]) -> int:
    """`timeseries export`; the exit status."""
    if not argv or any(word in ("-h", "--help") for word in argv):
        print(_EXPORT)
        return 0 if argv else 2
    parsed = options.split(argv)
    options.check_options(parsed, ["output", "length", "longest", "tolerance", "calls"])
    if len(parsed.words) != 1:
        raise UserError("export takes one run: timeseries export RUN --output FILE.onnx")
    output = parsed.last("output")
    if output is None:
        raise UserError("name the file to write: --output FILE.onnx")
    if not output.endswith(".onnx"):
        raise UserError(f"--output takes the name of a file that ends in .onnx, got {output}")
    length = parsed.last("length") or "auto"
    if length not in _KINDS:
        raise UserError(f"--length takes {', '.join(_KINDS)}, got {length}")
    longest = _whole(parsed.last("longest"), "longest", least=1)
    calls = _whole(parsed.last("calls"), "calls", least=0)
    tolerance = _positive(parsed.last("tolerance") or "1e-5", "tolerance")
    from attn_timeseries.export import export_run

    report = export_run(
        Path(parsed.words[0]),
        Path(output),
        length=length,
        longest=longest,
        tolerance=tolerance,
        calls=200 if calls is None else calls,
    )
    print(report)
    return 0


_BACKTEST = """usage: timeseries backtest [--model NAME] [--data NAME_OR_PATH] [options of `train`] [options]

Forecasts from one moment after the other, each from what was known then, and scores the forecasts beside the simple
ones. The model is trained anew as time goes on, with nothing of what lies ahead. Writes forecasts.csv, origins.csv,
backtest.json and report.html.

  --folds N            origins; the last forecast ends with the data (default: as many as fit in the test part)
  --step N             steps from one origin to the next (default: the horizon)
  --horizon N          steps to forecast, as --data_args.pred_len
  --refit N            train anew at every N-th origin; 0 = once, before the first (default: 1)
  --window KIND        rows a fit sees: expanding = all before its origin (default), sliding = the last of them
  --train_rows N       rows of a sliding window (default: as many as lie before the first origin)
  --output DIR         where the results go (default: beside the runs)

`timeseries train --help` lists the options of model, data and training."""

_OWN = ("folds", "step", "refit", "window", "train_rows", "horizon", "output")


def backtest(argv: Sequence[str]) -> int:
    """`timeseries backtest`; the exit status."""
    if any(word in ("-h", "--help") for word in argv):
        print(_BACKTEST)
        return 0
    from attn_timeseries.cli import APP

    parsed = options.split(argv)
    if parsed.words:
        raise UserError(f"backtest takes options only, got {parsed.words[0]!r}; did you mean --data {parsed.words[0]}?")
    options.check_options(options.Parsed(options=[(n, v) for n, v in parsed.options if n in _OWN]), _OWN)
    # An option of ours that is misspelt is told with the nearest of all.
    given = {name: parsed.last(name) for name in _OWN}
    config = options.resolve(APP, parsed, extra=_OWN)
    horizon = _whole(given["horizon"], "horizon", least=1)
    if horizon is not None:
        config.data_args.pred_len = horizon
    window = given["window"] or "expanding"
    if window not in ("expanding", "sliding"):
        raise UserError(f"--window takes expanding or sliding, got {window}")
    if given["train_rows"] is not None and window != "sliding":
        raise UserError("--train_rows is for --window sliding")
    refit = _whole(given["refit"], "refit", least=0)
    folds, step = _whole(given["folds"], "folds", least=1), _whole(given["step"], "step", least=1)
    train_rows = _whole(given["train_rows"], "train_rows", least=1)
    from attn_timeseries import backtest as rolling

    settings = rolling.Settings(
        folds=folds, step=step, refit=1 if refit is None else refit, window=window, train_rows=train_rows
    )
    output = Path(given["output"]) if given["output"] else _new_folder(Path(config.runs) / APP.name, run_name(config))
    print(rolling.run(config, settings, output, shlex.join([APP.name, "backtest", *argv])))
    return 0


def _new_folder(parent: Path, name: str) -> Path:
    stamp = time.strftime("%Y%m%d-%H%M%S")
    folder = parent / f"backtest-{name}" / stamp
    for count in range(2, 1000):
        if not folder.exists():
            break
        folder = folder.with_name(f"{stamp}-{count}")
    return folder


def _whole(text: str | None, name: str, *, least: int) -> int | None:
    if text is None:
        return None
    try:
        value = int(text)
    except ValueError:
        value = least - 1
    if value < least:
        raise UserError(f"--{name} takes a whole number from {least} on, got {text}")
    return value


def _positive(text: str, name: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise UserError(f"--{name} takes a positive number, got {text}")
    return value
