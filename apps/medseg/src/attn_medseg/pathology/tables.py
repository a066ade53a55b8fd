"""What kind of table a file of the user's own is, by its header alone. Imports neither torch nor numpy."""

from __future__ import annotations

import csv
from pathlib import Path

BAGS, SURVIVAL = "bags", "survival"
NAMES = ("bag", "bag_id", "slide_id", "slide")
"""Columns that name the bag of a line, the first that is there."""
PATIENTS = ("case_id", "patient", "patient_id")
TIMES = ("survival_months", "time", "survival_time")
STATES = ("censorship", "event")
LABEL = "label"


def header(path: Path) -> list[str]:
    """The first line's cells of a CSV or TSV; empty where there are none."""
    try:
        with path.open(encoding="utf-8-sig", errors="replace", newline="") as file:
            line = file.readline(1 << 22)
    except OSError:
        return []
    delimiter = max(",;\t|", key=line.count)
    return [cell.strip() for cell in next(csv.reader([line.rstrip("\r\n")], delimiter=delimiter), [])]


def first(names: tuple[str, ...], columns: list[str]) -> str | None:
    """The first of the names that is a column."""
    return next((name for name in names if name in columns), None)


def kind_of_table(path: Path) -> str | None:
    """ "bags", "survival" or None of a table that is neither."""
    columns = header(path)
    if first(TIMES, columns) and first(STATES, columns):
        return SURVIVAL
    return BAGS if first(NAMES, columns) else None


def tables_in(folder: Path) -> list[Path]:
    """The tables right in a folder that name bags or patients with times, the best first: labels.csv, then by name."""
    found = [path for path in sorted(folder.glob("*.[ct]sv")) if kind_of_table(path)]
    return sorted(found, key=lambda path: path.stem.lower() not in ("labels", "label", "slides"))


def kind_of(path: Path) -> str | None:
    """ "bags", "survival", or None where a file or folder is neither."""
    suffix = path.suffix.lower()
    if path.is_dir():
        inside = tables_in(path)
        return kind_of_table(inside[0]) if inside else None
    if suffix in (".csv", ".tsv"):
        return kind_of_table(path) or BAGS
    return BAGS if suffix in (".mat", ".npy", ".npz", ".h5", ".hdf5", ".pt") else None
