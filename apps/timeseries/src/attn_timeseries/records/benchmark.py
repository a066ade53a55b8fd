"""Folders of the MIMIC-III benchmark (Harutyunyan et al., 2019): `listfile.csv` and a CSV file for each stay.

    root/train/listfile.csv            stay,y_true   or   stay,period_length,<label>,<label>,…
    root/train/123_episode1_timeseries.csv   Hours,<variable>,<variable>,…
    root/test/…                        or both kinds of file in root itself
    root/val_listfile.csv              optional: stays of train that are for validation
    root/notes/123_1.json              optional: {time: text or list of sentences}, time in hours or as a date
    root/notes/starttimes.csv          for dates: stay,start

The data itself is licensed (PhysioNet) and is not part of this application.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from attn_shared.errors import UserError
from attn_timeseries.records.cards import RecordsDataConfig
from attn_timeseries.records.corpus import Corpus, Stay, assemble, no_notes
from attn_timeseries.records.tables import Cells

_SCORES = {
    "no response": 1, "no response-ett": 1, "none": 1, "et/trach": 1,
    "incomprehensible sounds": 2, "inappropriate words": 3, "confused": 4, "oriented": 5,
    "abnormal extension": 2, "abnormal flexion": 3, "flex-withdraws": 4, "localizes pain": 5, "obeys commands": 6,
    "to pain": 2, "to speech": 3, "spontaneously": 4,
}  # fmt: skip
"""What the words of the Glasgow coma scale count where the file has no number before them."""
_STAY = re.compile(r"(?P<patient>.+?)_episode(?P<episode>\d+)(?:_timeseries)?(?:\.csv)?$")
_NUMBER = re.compile(r"\s*([-+]?\d+(?:\.\d+)?)\b")


def read_folder(root: Path, args: RecordsDataConfig, *, labelled: bool = True) -> Corpus:
    """A folder of the benchmark; see `load_corpus`."""
    parts = [(folder, split) for split in ("train", "test") if (folder := root / split).is_dir()]
    parts = parts or [(root, "")]
    labels: list[str] = []
    entries: list[tuple[Path, str, np.ndarray]] = []
    validation = _validation(root / "val_listfile.csv")
    for folder, split in parts:
        listing = folder / "listfile.csv"
        if labelled and listing.is_file():
            columns, rows = _listfile(listing)
            if labels and columns != labels:
                raise UserError(f"{listing}: its labels {columns} differ from those of the other part, {labels}")
            labels = columns
            for name, values in rows:
                held = split == "train" and name in validation
                entries.append((folder / name, "val" if held else split, values))
        elif labelled:
            raise UserError(f"{folder} has no listfile.csv, which tells the labels of its stays")
        else:
            entries += [(file, split, np.zeros(0, np.float32)) for file in sorted(folder.glob("*_timeseries.csv"))]
    if not entries:
        raise UserError(f"{root} holds no stay: neither a listfile.csv nor files *_timeseries.csv")
    variables: dict[str, int] = {}
    columns_of: list[list[np.ndarray]] = [[], [], [], []]
    for i, (file, _, _) in enumerate(entries):
        for column, part in zip(columns_of, _series(file, i, variables)):
            column.append(part)
    stay, hours, variable, value = (np.concatenate(column) for column in columns_of)
    names = [file.name.removesuffix(".csv").removesuffix("_timeseries") for file, _, _ in entries]
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise UserError(f"{root}: the stay {twice!r} is listed twice")
    series = assemble(names, stay, hours, variable.astype(np.int64), value, len(variables))
    notes = _Notes(root, args)
    stays = []
    for (_file, split, label), name, (times, values) in zip(entries, names, series):
        match = _STAY.match(name)
        when, texts = notes.of(name, match["patient"], match["episode"]) if match else no_notes()
        stays.append(
            Stay(
                name=name,
                patient=match["patient"] if match else name,
                hours=times,
                values=values,
                note_hours=when,
                notes=texts,
                label=label,
                split=split if len(parts) == 2 else "",
            )
        )
    found = [f"{sum(len(one.notes) > 0 for one in stays):,} of {len(stays):,} stays have notes"] if notes.there else []
    return Corpus(source=root.name, variables=list(variables), labels=labels, stays=stays, found=found)


def _listfile(path: Path) -> tuple[list[str], list[tuple[str, np.ndarray]]]:
    cells = Cells(path)
    columns = list(cells.frame.columns)
    if columns[0] != "stay":
        raise UserError(f"{path}: its first column is {columns[0]!r}; a listfile starts with the column stay")
    labels = [name for name in columns[1:] if name not in ("period_length", "sample_time")]
    if not labels:
        raise UserError(f"{path} has no column of labels")
    stays = cells.ids("stay", "stay")
    values = np.stack([cells.numbers(name, f"label {name!r}") for name in labels], axis=1)
    for row, column in np.argwhere(~np.isnan(values) & ~np.isin(values, (0, 1)))[:1]:
        raise UserError(
            f"{cells.where(row)}: label {labels[column]!r} is {values[row, column]:g}; it must be 0 or 1 "
            "(lengths of stay are no labels)"
        )
    return labels, list(zip(stays, values.astype(np.float32)))


def _validation(path: Path) -> frozenset[str]:
    if not path.is_file():
        return frozenset()
    return frozenset(name for name, _ in _listfile(path)[1])


def _series(path: Path, number: int, variables: dict[str, int]) -> tuple[np.ndarray, ...]:
    """Stay, hours, variable and value of every observation of a file."""
    if not path.is_file():
        raise UserError(f"{path} is listed in listfile.csv and is not there")
    cells = Cells(path)
    columns = list(cells.frame.columns)
    if columns[0] != "Hours":
        raise UserError(f"{path}: its first column is {columns[0]!r}; a stay's file starts with the column Hours")
    hours = cells.numbers("Hours", "Hours")
    for row in np.flatnonzero(np.isnan(hours))[:1]:
        raise UserError(f"{cells.where(row)}: no time in the column Hours")
    parts = []
    for name in columns[1:]:
        text = cells.text(name)
        rows = np.flatnonzero(text != "")
        code = variables.setdefault(name, len(variables))
        values = np.array([_number(cells, name, row, text[row]) for row in rows], dtype=np.float64)
        parts.append((np.full(len(rows), number), hours[rows], np.full(len(rows), code), values))
    if not parts:
        raise UserError(f"{path} has no column of values")
    return tuple(np.concatenate(column) for column in zip(*parts))


def _number(cells: Cells, name: str, row: Any, text: str) -> float:
    """A cell as a number: of "4 Spontaneously" and of "Spontaneously" the score."""
    try:
        return float(text)
    except ValueError:
        pass
    match = _NUMBER.match(text)
    if match:
        return float(match[1])
    if text.lower() in _SCORES:
        return float(_SCORES[text.lower()])
    raise UserError(f"{cells.where(row)}: {name!r} is {text!r}, which is neither a number nor a known score")


class _Notes:
    """Notes of the stays under `root/notes`."""

    def __init__(self, root: Path, args: RecordsDataConfig) -> None:
        self.folder = Path(args.notes).expanduser() if args.notes else root / "notes"
        self.there = self.folder.is_dir() and args.max_notes > 0
        if args.notes and not self.folder.is_dir():
            raise UserError(f"there is no folder {args.notes} with notes")
        self.starts: dict[str, pd.Timestamp] = {}
        starts = self.folder / "starttimes.csv"
        if self.there and starts.is_file():
            cells = Cells(starts)
            for row, (name, moment) in enumerate(zip(cells.ids("stay", "stay"), cells.text("start"))):
                try:
                    self.starts[self._key(name)] = pd.Timestamp(moment)
                except ValueError:
                    raise UserError(f"{cells.where(row)}: start {moment!r} is no date") from None

    @staticmethod
    def _key(name: str) -> str:
        match = _STAY.match(name)
        return f"{match['patient']}_{match['episode']}" if match else name

    def of(self, stay: str, patient: str, episode: str) -> tuple[np.ndarray, np.ndarray]:
        """Times and texts of a stay's notes."""
        if not self.there:
            return no_notes()
        for file in (self.folder / f"{patient}_{episode}{end}" for end in ("", ".json")):
            if file.is_file():
                return self._read(file, f"{patient}_{episode}")
        return no_notes()

    def _read(self, file: Path, key: str) -> tuple[np.ndarray, np.ndarray]:
        try:
            loaded = json.loads(file.read_text(encoding="utf-8"))
        except (ValueError, OSError) as error:
            raise UserError(f"{file} is no JSON: {' '.join(str(error).split())}") from None
        if not isinstance(loaded, dict):
            raise UserError(f"{file} must hold a mapping from time to text")
        pairs = sorted((self._hour(file, key, when), self._text(file, what)) for when, what in loaded.items())
        times, texts = [when for when, _ in pairs], [what for _, what in pairs]
        return np.array(times, dtype=np.float64), np.array(texts, dtype=object)

    def _hour(self, file: Path, key: str, when: str) -> float:
        try:
            return float(when)
        except ValueError:
            pass
        if key not in self.starts:
            raise UserError(f"{file} gives dates, and {self.folder.name}/starttimes.csv has no start of {key}")
        try:
            return (pd.Timestamp(when) - self.starts[key]) / pd.Timedelta(hours=1)
        except (ValueError, TypeError):
            raise UserError(f"{file}: {when!r} is neither a number of hours nor a date") from None

    @staticmethod
    def _text(file: Path, what: object) -> str:
        if isinstance(what, str):
            return what
        if isinstance(what, Iterable) and all(isinstance(one, str) for one in what):
            return " ".join(what)
        raise UserError(f"{file}: a note must be a text or a list of sentences")
