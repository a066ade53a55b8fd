"""`timeseries demo`: one real series from training to a forecast of its future, in about a minute."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from attn_shared import options
from attn_timeseries.cli import APP

_HELP = """usage: timeseries demo [--runs DIR] [--seed N]

Trains PatchTST (attention over patches) on 44 years of weekly carbon dioxide over Mauna Loa, scores it beside
repeat-last, seasonal naive and the best linear map, writes a report, and forecasts the year after the last measurement.

  --runs DIR   folder for the run (default: runs)
  --seed N     seed (default: 0)"""

_COLUMNS = (
    ("mse", "MSE", ".4f"),
    ("mae", "MAE", ".4f"),
    ("mae_original", "error, ppm", ".2f"),
    ("mase", "MASE", ".2f"),
)


def main(argv: Sequence[str]) -> int:
    """Run the demonstration; the exit status."""
    parsed = options.split(argv, flags=["help"])
    if parsed.last("help") or "-h" in argv:
        print(_HELP)
        return 0
    options.check_options(parsed, ["runs", "seed"])
    start = time.monotonic()
    config = options.resolve(APP, parsed)
    config.trainer.progress = sys.stderr.isatty()
    card = APP.dataset(config.data)
    args = config.data_args
    print(f"{card.title}: {card.size}, {card.facts['span']}, from statsmodels.")
    print(f"Task: from {args.seq_len} weeks, forecast the next {args.pred_len}. Training {config.model} …", flush=True)

    from attn_shared import trainer
    from attn_shared.runs import Run

    folder = trainer.train(APP, config)
    results = Run.open(folder).results()
    rows = [{"model": f"{config.model} (attention)", **results["splits"]["test"]}, *results["baselines"]]
    windows = f"{results['splits']['test']['windows']:,.0f}"
    print(f"\n{windows} test windows from the last fifth of the series, never trained on:")
    print(_table(rows))

    from attn_timeseries.data.sources import source_path

    written = trainer.predict(APP, folder, [source_path(config.data)], folder / "forecast")
    print(f"\nThe next {args.pred_len} weeks: {_shown(written[0])}")
    print(f"         with a plot: {_shown(written[1])}")
    print(f"              report: {_shown(folder / 'report.html')}")
    print(f"\nDone in {time.monotonic() - start:.0f} s. Your own file: timeseries train --data FILE.csv; then")
    print("timeseries predict RUN FILE.csv --output DIR. All commands: timeseries --help")
    return 0


def _table(rows: Sequence[dict[str, Any]]) -> str:
    """The rows as text, best first."""
    rows = sorted(rows, key=lambda row: row["mse"])
    width = max(len(row["model"]) for row in rows)
    head = "  " + "model".ljust(width) + "".join(title.rjust(12) for _, title, _ in _COLUMNS)
    body = [
        "  " + row["model"].ljust(width) + "".join(f"{row[k]:{f}}".rjust(12) for k, _, f in _COLUMNS) for row in rows
    ]
    return "\n".join([head, *body])


def _shown(path: Path) -> str:
    """Relative to where the user is, if it lies below."""
    try:
        return str(path.resolve().relative_to(Path.cwd()))
    except ValueError:
        return str(path)
