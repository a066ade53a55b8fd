"""Records of the user's own: a long table of observations, and tables of labels and notes beside it."""

from __future__ import annotations

import io
import re
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from attn_shared.csvtext import MISSING, read_text, scan, sniff_delimiter
from attn_shared.errors import UserError
from attn_timeseries.records.cards import HEADERS, RecordsDataConfig
from attn_timeseries.records.corpus import Corpus, Stay, assemble, no_notes, unique_names
from core_attn.naming import nearest

MOST_CATEGORIES = 30
_LIMIT = re.compile(r"^\s*[<>≤≥]=?\s*")
_DECIMAL_COMMA = re.compile(r"^([+-]?\d+),(\d+)$")
_SPLITS = {"train": "train", "training": "train", "val": "val", "valid": "val", "validation": "val", "test": "test"}
_EMPTY = frozenset(MISSING)


class Cells:
    """A CSV file as text cells, with the line each row stands on."""

    def __init__(self, path: Path, names: Sequence[str | None] = ()) -> None:
        self.source = path.name
        if not path.is_file():
            raise UserError(f"there is no file {path}")
        text = read_text(path, [])
        delimiter = "," if "\n" in text and not re.search(r"[,;\t|]", text.split("\n", 1)[0]) else ""
        delimiter = delimiter or sniff_delimiter(text, path.name)
        self.delimiter = delimiter
        self.columns, self.lines = scan(text, delimiter, path.name)
        self.frame = pd.read_csv(
            io.StringIO(text), sep=delimiter, dtype=str, keep_default_na=False, na_filter=False, skip_blank_lines=True
        )
        if len(self.frame) != len(self.lines):
            raise UserError(f"{path.name}: its rows cannot be told apart; look for quotes that do not close")
        self.frame.columns = pd.Index([name.strip() for name in self.columns])
        if len(self.frame) == 0:
            raise UserError(f"{path.name} has a header and no rows")

    def where(self, row: Any) -> str:
        return f"{self.source}:{self.lines[row]}"

    def find(self, kind: str, named: str | None, *, needed: bool = True) -> str | None:
        """The column of a kind: the one named, or the first that is called like one."""
        columns = list(self.frame.columns)
        if named is not None:
            if named in columns:
                return named
            if not needed:
                return None
            close = nearest(named, columns)
            hint = f"; did you mean {close[0]!r}?" if close else f"; it has {', '.join(map(repr, columns[:10]))}"
            raise UserError(f"{self.source} has no column {named!r}{hint}")
        lower = {name.lower(): name for name in reversed(columns)}
        for name in HEADERS[kind]:
            if name in lower:
                return lower[name]
        if not needed:
            return None
        raise UserError(
            f"{self.source} has no column called {' or '.join(HEADERS[kind][:3])}; name it with data_args.{kind}_column"
        )

    def need(self, kind: str, named: str | None) -> str:
        """`find` where there must be one."""
        column = self.find(kind, named)
        assert column is not None
        return column

    def text(self, column: str) -> np.ndarray:
        return np.array([cell.strip() for cell in self.frame[column]], dtype=object)

    def ids(self, column: str, kind: str) -> np.ndarray:
        names = self.text(column)
        for row in np.flatnonzero(names == "")[:1]:
            raise UserError(f"{self.where(row)}: no {kind}")
        return names

    def as_numbers(self, text: np.ndarray) -> np.ndarray:
        """Text as finite numbers, NaN where it is none. Where commas do not part columns they may be decimal signs."""
        cells = pd.Series(text, dtype="str")
        if self.delimiter != ",":
            cells = cells.str.replace(_DECIMAL_COMMA, r"\1.\2", regex=True)
        numbers = pd.to_numeric(cells, errors="coerce").to_numpy(np.float64, copy=True)
        numbers[~np.isfinite(numbers)] = np.nan
        return numbers

    def numbers(self, column: str, what: str) -> np.ndarray:
        """Cells as numbers, NaN where empty."""
        text = self.text(column)
        numbers = self.as_numbers(text)
        for row in np.flatnonzero(np.isnan(numbers)):
            if text[row] not in _EMPTY:
                raise UserError(f"{self.where(row)}: {what} {text[row]!r} is no number")
        return numbers


def read_tables(
    path: Path,
    args: RecordsDataConfig,
    *,
    categorical: Collection[str] = (),
    numeric: Collection[str] = (),
    labelled: bool = True,
) -> Corpus:
    """The long table at `path` with its labels and notes; see `load_corpus`."""
    found: list[str] = []
    table = Cells(path)
    id_column = table.need("id", args.id_column)
    time_column = table.need("time", args.time_column)
    variable_column = table.need("variable", args.variable_column)
    value_column = table.need("value", args.value_column)
    names = table.ids(id_column, "id")
    labels = _labels(path, args, id_column) if labelled else None
    notes_path = _notes_path(path, args)
    notes = Cells(notes_path) if notes_path and args.max_notes else None
    note_id = notes.find("id", args.id_column if args.id_column in notes.frame.columns else None) if notes else None
    note_names = notes.ids(note_id, "id") if notes and note_id else np.zeros(0, dtype=object)

    order = list(dict.fromkeys([*names.tolist(), *note_names.tolist()])) if labels is None else labels.names
    place = {name: i for i, name in enumerate(order)}
    beside = _beside(path, "labels", args.labels)
    start = _starts(Cells(beside), args, id_column) if beside else {}
    hours, note_hours = _hours(table, time_column, names, notes, note_names, args, start)

    stay = np.array([place.get(name, -1) for name in names], dtype=np.int64)
    variables, kinds, variable, value, row = _values(table, variable_column, value_column, categorical, numeric, found)
    keep = np.isin(row, np.flatnonzero(stay >= 0))
    if unknown := len(set(names[stay < 0])):
        found.append(f"{unknown} ids have no label and are left out")
    row, variable, value = row[keep], variable[keep], value[keep]
    series = assemble(order, stay[row], hours[row], variable, value, len(variables))
    texts, embedding = _notes(notes, args, note_names, note_hours, place)
    stays = []
    for i, name in enumerate(order):
        when, what = texts.get(i) or no_notes(embedding)
        stays.append(
            Stay(
                name=name,
                patient=name if labels is None else labels.patient[i],
                hours=series[i][0],
                values=series[i][1],
                note_hours=when,
                notes=what,
                label=np.zeros(0, np.float32) if labels is None else labels.values[i],
                split="" if labels is None else labels.split[i],
            )
        )
    if labels is not None and (silent := sum(len(one.hours) == 0 for one in stays)):
        found.append(f"{silent} labelled ids have no observation")
    return Corpus(
        source=path.name,
        variables=variables,
        categorical=kinds,
        labels=[] if labels is None else labels.columns,
        stays=stays,
        embedding=embedding,
        found=found,
    )


class _Labels:
    """The table of labels."""

    def __init__(self, cells: Cells, args: RecordsDataConfig, id_column: str) -> None:
        own = cells.find("id", id_column, needed=False) or cells.need("id", None)
        self.names = list(cells.ids(own, "id"))
        unique_names("id", self.names, cells.where)
        patient = cells.find("patient", args.patient_column, needed=args.patient_column is not None)
        self.patient = list(cells.ids(patient, "patient")) if patient else list(self.names)
        split, start = (_column(cells, name) for name in ("split", "start"))
        taken = {own, patient, split, start}
        self.columns = args.label_columns or [name for name in cells.frame.columns if name not in taken]
        if not self.columns:
            raise UserError(f"{cells.source} has no column of labels beside its ids")
        for name in self.columns:
            cells.find("label", name)
        self.values = np.stack([cells.numbers(name, f"label {name!r}") for name in self.columns], axis=1)
        wrong = ~np.isnan(self.values) & ~np.isin(self.values, (0, 1))
        for row, column in np.argwhere(wrong)[:1]:
            raise UserError(
                f"{cells.where(row)}: label {self.columns[column]!r} is {self.values[row, column]:g}; it must be 0 or 1"
            )
        self.values = self.values.astype(np.float32)
        self.split = [""] * len(self.names)
        if split:
            for row, word in enumerate(cells.text(split)):
                if word.lower() not in _SPLITS:
                    raise UserError(f"{cells.where(row)}: split is {word!r}; it must be train, val or test")
                self.split[row] = _SPLITS[word.lower()]


def _column(cells: Cells, name: str) -> str | None:
    return next((column for column in cells.frame.columns if column.lower() == name), None)


def _starts(cells: Cells, args: RecordsDataConfig, id_column: str) -> dict[str, pd.Timestamp]:
    """When each stay started, where the table of labels tells."""
    start = _column(cells, "start")
    if start is None:
        return {}
    own = cells.find("id", id_column, needed=False) or cells.need("id", None)
    moments = _moments(cells, start)
    return {name: moments[i] for i, name in enumerate(cells.ids(own, "id")) if not pd.isna(moments[i])}


def _labels(path: Path, args: RecordsDataConfig, id_column: str) -> _Labels:
    where = _beside(path, "labels", args.labels)
    if where is None:
        raise UserError(
            f"{path.name}: there are no labels; put them into {path.stem}_labels.csv beside it (id, and a column of "
            "0 and 1 a label) or name the file with data_args.labels"
        )
    return _Labels(Cells(where), args, id_column)


def _beside(path: Path, kind: str, named: str | None) -> Path | None:
    if named:
        return Path(named).expanduser()
    where = path.with_name(f"{path.stem}_{kind}{path.suffix}")
    return where if where.is_file() else None


def _notes_path(path: Path, args: RecordsDataConfig) -> Path | None:
    return _beside(path, "notes", args.notes)


def _moments(cells: Cells, column: str) -> pd.Series:
    """Cells as dates without zone, NaT where empty."""
    text = pd.Series(cells.text(column))
    moments = pd.to_datetime(text.where(~text.isin(_EMPTY)), errors="coerce", utc=True, format="ISO8601")
    for row in np.flatnonzero(moments.isna() & ~text.isin(_EMPTY))[:1]:
        raise UserError(
            f"{cells.where(row)}: time {text[row]!r} is neither a number of hours nor a date like 2024-05-01 13:30"
        )
    return moments.dt.tz_localize(None)


def _hours(
    table: Cells,
    column: str,
    names: np.ndarray,
    notes: Cells | None,
    note_names: np.ndarray,
    args: RecordsDataConfig,
    start: dict[str, pd.Timestamp],
) -> tuple[np.ndarray, np.ndarray]:
    """Hours since the stay's start of each observation and each note.

    Dates count from the labels' column `start`, where there is none from the stay's first observation or note.
    """
    parts = [(table, column, names)]
    if notes is not None:
        named = args.time_column if args.time_column in notes.frame.columns else None
        parts.append((notes, notes.need("time", named), note_names))
    as_numbers = []
    for cells, name, _ in parts:
        text = cells.text(name)
        for row in np.flatnonzero(np.isin(text, list(_EMPTY)))[:1]:
            raise UserError(f"{cells.where(row)}: no time")
        as_numbers.append(cells.as_numbers(text))
    if all(np.isfinite(numbers).mean() >= 0.5 for numbers in as_numbers):
        for (cells, name, _), numbers in zip(parts, as_numbers):
            for row in np.flatnonzero(~np.isfinite(numbers))[:1]:
                raise UserError(f"{cells.where(row)}: time {cells.text(name)[row]!r} is no number of hours")
        hours = as_numbers
    else:
        if any(np.isfinite(numbers).mean() >= 0.5 for numbers in as_numbers):
            raise UserError(
                f"{parts[0][0].source} and {parts[1][0].source}: one gives times in hours and the other as dates"
            )
        moments = [_moments(cells, name) for cells, name, _ in parts]
        first = pd.concat([pd.Series(m.to_numpy(), index=ids) for m, (_, _, ids) in zip(moments, parts)])
        first = first.groupby(level=0).min()
        for name, moment in start.items():
            first[name] = moment
        hours = []
        for m, (_, _, ids) in zip(moments, parts):
            since = m.to_numpy() - first.reindex(ids).to_numpy()
            hours.append(np.asarray(since / np.timedelta64(1, "s"), dtype=np.float64) / 3600)
    return hours[0], hours[1] if len(hours) > 1 else np.zeros(0)


def _values(
    table: Cells,
    variable_column: str,
    value_column: str,
    categorical: Collection[str],
    numeric: Collection[str],
    found: list[str],
) -> tuple[list[str], list[str], np.ndarray, np.ndarray, np.ndarray]:
    """Names of the variables, which are categories, and of each observation its variable, value and row.

    A variable with any value that is no number is one of categories: each category becomes a variable of its own, 1
    where it was found and 0 where another was.
    """
    names, text = table.ids(variable_column, "variable"), table.text(value_column)
    empty = np.isin(text, list(_EMPTY))
    if empty.any():
        found.append(f"{int(empty.sum()):,} rows have no value and are left out")
    limited = np.array([bool(_LIMIT.match(cell)) for cell in text]) & ~empty
    plain = np.array([_LIMIT.sub("", cell) for cell in text], dtype=object) if limited.any() else text
    numbers = table.as_numbers(plain)
    if limited.any():
        found.append(f"{int(limited.sum()):,} values such as {text[limited][0]!r} are taken at their limit")
    textual = ~empty & np.isnan(numbers)
    for row in np.flatnonzero(textual & np.isin(names, list(numeric)))[:1]:
        raise UserError(
            f"{table.where(row)}: {names[row]!r} is {text[row]!r}, and the model was trained on numbers for it"
        )
    kinds = sorted({*names[textual].tolist(), *(name for name in categorical if name in set(names))})
    variables: list[str] = []
    parts: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
    for name in sorted(set(names[~empty].tolist())):
        rows = np.flatnonzero((names == name) & ~empty)
        if name not in kinds:
            parts.append((np.full(len(rows), len(variables)), numbers[rows], rows))
            variables.append(name)
            continue
        categories = sorted(set(text[rows].tolist()))
        if len(categories) > MOST_CATEGORIES:
            row = np.flatnonzero(textual & (names == name))[0]
            raise UserError(
                f"{table.where(row)}: {name!r} is {text[row]!r}, which is no number, and has "
                f"{len(categories)} different values, more than the {MOST_CATEGORIES} that categories may have"
            )
        for category in categories:
            parts.append((np.full(len(rows), len(variables)), (text[rows] == category).astype(np.float64), rows))
            variables.append(f"{name}={category}")
    if not parts:
        raise UserError(f"{table.source} holds no value")
    variable, value, row = (np.concatenate(column) for column in zip(*parts))
    by_row = np.argsort(row, kind="stable")
    return variables, kinds, variable[by_row], value[by_row], row[by_row]


def _notes(
    cells: Cells | None, args: RecordsDataConfig, names: np.ndarray, hours: np.ndarray, place: dict[str, int]
) -> tuple[dict[int, tuple[np.ndarray, np.ndarray]], int]:
    """Number of a stay -> times and notes, and the width of embeddings, 0 for text."""
    if cells is None:
        return {}, 0
    column = cells.find("text", args.text_column, needed=args.text_column is not None)
    content: np.ndarray
    if column is not None:
        content, width = cells.text(column), 0
    else:
        taken = {c.lower() for kind in ("id", "time", "patient") for c in HEADERS[kind]}
        columns = [
            c for c in cells.frame.columns if c.lower() not in taken and c not in (args.id_column, args.time_column)
        ]
        if not columns:
            raise UserError(f"{cells.source} has neither a column of text nor columns of an embedding")
        content = np.stack([cells.numbers(name, "the embedding's") for name in columns], axis=1).astype(np.float32)
        for row in np.flatnonzero(np.isnan(content).any(axis=1))[:1]:
            raise UserError(f"{cells.where(row)}: the embedding has an empty cell")
        width = len(columns)
    members: dict[int, list[int]] = {}
    for row, name in enumerate(names):
        if name in place:
            members.setdefault(place[name], []).append(row)
    result = {}
    for stay, rows in members.items():
        by_time = np.array(rows)[np.argsort(hours[rows], kind="stable")]
        result[stay] = (hours[by_time], content[by_time])
    return result, width
