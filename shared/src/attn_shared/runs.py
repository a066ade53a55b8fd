"""The folder of a run: `runs/<app>/<model>-<data>-<mixer>/<time>/`. Imports no torch.

Columns of metrics.csv, in this order: `step`, `epoch`, `lr`, `train_loss`, then `val_<metric>` for every metric of the
task. A row is either a training row (each `log_every` steps: the loss of that step) or a validation row (end of an
epoch: `train_loss` is the mean over the epoch's steps, `val_*` are filled). Cells that do not apply are empty.
"""

from __future__ import annotations

import csv
import io
import json
import math
import os
import re
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from attn_shared.config import RunConfig, config_to_dict
from attn_shared.errors import UserError

CONFIG, METRICS, RESULTS, REPORT = "config.yaml", "metrics.csv", "metrics.json", "report.html"
_LEADING = ("step", "epoch", "lr", "train_loss")


def write_atomically(path: Path, content: bytes | str) -> None:
    """Write `content` to `path` so that a reader, or a crash, sees the old file or the new one and nothing between."""
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    data = content.encode() if isinstance(content, str) else content
    with open(part, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(part, path)


def slug(text: str) -> str:
    """`text` as part of a folder's name."""
    return re.sub(r"[^A-Za-z0-9_.]+", "_", text).strip("._") or "run"


def run_name(config: RunConfig) -> str:
    """`<model>-<data>-<mixer>`; a data file is named by its stem, the paper's own mixer is "own"."""
    data = config.data
    if os.sep in data or Path(data).suffix:
        data = Path(data).stem
    return "-".join(slug(part) for part in (config.model, data, config.mixer or "own"))


class Run:
    """One run folder.

    Args:
        path: an existing run folder; use `create` for a new one and `open` for one that a user names.
    """

    def __init__(self, path: Path) -> None:
        self.path = Path(path)
        self._columns: list[str] | None = None

    @classmethod
    def create(cls, config: RunConfig) -> Run:
        """Make the folder, unique even for runs started in one instant, and save `config` in it.

        Raises:
            UserError: the folder cannot be written.
        """
        parent = Path(config.runs) / slug(config.app) / run_name(config)
        stamp = time.strftime("%Y%m%d-%H%M%S")
        try:
            parent.mkdir(parents=True, exist_ok=True)
            for count in range(1, 1000):
                path = parent / (stamp if count == 1 else f"{stamp}-{count}")
                try:
                    path.mkdir()
                    break
                except FileExistsError:
                    continue
            run = cls(path)
            run.checkpoints.mkdir()
            run.plots.mkdir()
            run.write_config(config)
        except OSError as error:
            raise UserError(
                f"cannot make a run folder under {parent}: {error.strerror or error}; choose another place with --runs"
            ) from None
        return run

    @classmethod
    def open(cls, path: Path | str) -> Run:
        """The run at `path`.

        Raises:
            UserError: there is no run folder there.
        """
        path = Path(path)
        if not path.exists():
            raise UserError(f"there is no run at {path}; give the folder that `train` printed (runs/<app>/…/<time>)")
        if not is_run(path):
            inside = sorted(p.parent for p in path.glob(f"*/{CONFIG}")) if path.is_dir() else []
            hint = f"; did you mean {inside[-1]}?" if inside else "; a run folder holds config.yaml and checkpoints/"
            raise UserError(f"{path} is not a run folder{hint}")
        return cls(path)

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def plots(self) -> Path:
        return self.path / "plots"

    @property
    def report(self) -> Path:
        return self.path / REPORT

    # -- configuration ------------------------------------------------------------------------------------------------

    def write_config(self, config: RunConfig) -> None:
        text = yaml.safe_dump(config_to_dict(config), sort_keys=False, allow_unicode=True)
        write_atomically(self.path / CONFIG, text)

    def config(self) -> dict[str, Any]:
        """config.yaml as a plain dictionary.

        Raises:
            UserError: the file is missing or does not parse.
        """
        file = self.path / CONFIG
        try:
            loaded = yaml.safe_load(file.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            raise UserError(f"cannot read {file}: {' '.join(str(error).split())}") from None
        if not isinstance(loaded, dict):
            raise UserError(f"{file} does not hold a configuration")
        return loaded

    # -- metrics.csv --------------------------------------------------------------------------------------------------

    def append(self, row: Mapping[str, Any]) -> None:
        """Add a row to metrics.csv; a column not seen before widens the table."""
        file = self.path / METRICS
        if self._columns is None:
            self._columns = _header(file)
        fresh = [name for name in row if name not in self._columns]
        if fresh:
            rows = self.read_metrics()
            self._columns = [*_LEADING, *(name for name in [*self._columns, *fresh] if name not in _LEADING)]
            self._write_rows(rows)
        # One write of one line: a process killed at any moment leaves whole rows, or one torn last row that
        # `read_metrics` and `trim` drop.
        with open(file, "a", encoding="utf-8", newline="") as out:
            out.write(_lines([[_cell(row.get(name)) for name in self._columns]]))

    def read_metrics(self) -> list[dict[str, float | None]]:
        """Rows of metrics.csv; empty cells are None. Empty when nothing was written yet."""
        return [
            {name: float(cell) if cell != "" else None for name, cell in row.items()}
            for row in _read(self.path / METRICS)[1]
        ]

    def trim(self, step: int) -> None:
        """Drop rows after `step`: what a run that is resumed there will write again."""
        columns, rows = _read(self.path / METRICS)
        kept = [row for row in rows if float(row["step"]) <= step]
        self._columns = columns
        self._write_cells(columns, [[row[name] for name in columns] for row in kept])

    def _write_rows(self, rows: Sequence[Mapping[str, Any]]) -> None:
        assert self._columns is not None
        self._write_cells(self._columns, [[_cell(row.get(name)) for name in self._columns] for row in rows])

    def _write_cells(self, columns: Sequence[str], cells: Sequence[Sequence[str]]) -> None:
        write_atomically(self.path / METRICS, _lines([columns, *cells]) if columns else "")

    # -- metrics.json -------------------------------------------------------------------------------------------------

    def write_results(self, results: Mapping[str, Any]) -> None:
        write_atomically(self.path / RESULTS, json.dumps(results, indent=2, ensure_ascii=False) + "\n")

    def results(self) -> dict[str, Any]:
        """metrics.json.

        Raises:
            UserError: the run has not finished, or the file is damaged.
        """
        file = self.path / RESULTS
        try:
            return json.loads(file.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise UserError(
                f"{self.path} has no {RESULTS}: training has not finished; go on with `train --resume {self.path}`"
            ) from None
        except (OSError, ValueError) as error:
            raise UserError(f"cannot read {file}: {error}") from None


def is_run(path: Path) -> bool:
    """Whether `path` is a run folder."""
    return (path / CONFIG).is_file() and (path / "checkpoints").is_dir()


def _cell(value: Any) -> str:
    """Shortest text that reads back as the same number."""
    if value is None:
        return ""
    if isinstance(value, float):
        return (
            str(int(value))
            if value.is_integer() and abs(value) < 2**53 and not math.copysign(1, value) < 0
            else repr(value)
        )
    return str(value)


def _lines(rows: Sequence[Sequence[str]]) -> str:
    out = io.StringIO()
    csv.writer(out, lineterminator="\n").writerows(rows)
    return out.getvalue()


def _header(file: Path) -> list[str]:
    return _read(file)[0]


def _read(file: Path) -> tuple[list[str], list[dict[str, str]]]:
    """Columns and whole rows; a last row torn by a kill is left out."""
    try:
        text = file.read_text(encoding="utf-8")
    except FileNotFoundError:
        return [], []
    text = text[: text.rfind("\n") + 1]
    table = list(csv.reader(io.StringIO(text)))
    if not table:
        return [], []
    return table[0], [dict(zip(table[0], row)) for row in table[1:] if len(row) == len(table[0])]
