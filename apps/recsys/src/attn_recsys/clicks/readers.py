"""Tables of impressions from files: CSV, TSV, Parquet, and the data sets."""

from __future__ import annotations

import gzip
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from attn_recsys.clicks.options import ClicksDataConfig
from attn_recsys.clicks.splits import follows
from attn_recsys.clicks.table import Lists, Names, Table, names_of
from attn_recsys.items.cards import ROLES, header, plain
from attn_recsys.items.readers import find_column, list_columns, read_names, read_numbers, read_times
from attn_shared.csvtext import Cells, read_cells
from attn_shared.errors import UserError

_MOST_COLUMNS = 10_000
_FEW = 50  # whole numbers with at most so many values are names
_PARTS = {"train": 0, "training": 0, "val": 1, "valid": 1, "validation": 1, "dev": 1, "test": 2}
_NO = ("0", "0.0", "false", "no")
_YES = ("1", "1.0", "true", "yes")


def read_table(path: Path, args: ClicksDataConfig) -> Table:
    """A table of the user's own.

    Raises:
        UserError: what cannot be read, in one sentence with file and line.
    """
    cells, found = _cells(path, args, set())
    lists = [*(args.multi or []), *([args.sequence] if args.sequence else [])]
    # Names are read as they are written, "007" and "1.0" too, so that files read later agree.
    names, _ = _kinds(cells, args, {*found.values(), *lists}, [])
    cells, found = _cells(path, args, set(names))
    frame, used = cells.frame.reset_index(drop=True), set(found.values())
    label = _label(cells, found.get("label"), args)
    notes = [f"{path.name}: {note}" for note in cells.notes]
    for option, listed in (("categorical", args.categorical), ("multi", args.multi), ("numeric", args.numeric)):
        for name in listed or []:
            _check(cells, name, option)
    _, numeric_names = _kinds(cells, replace(args, categorical=names), used | set(lists), notes)
    single = {}
    for role in ("user", "item"):
        if role in found:
            single[found[role]] = _single(frame[found[role]])
    for name in names:
        single[name] = _single(frame[name])
    many = {name: _many(frame[name], args.separator) for name in args.multi or []}
    numeric = {name: read_numbers(cells, name).to_numpy(float) for name in numeric_names}
    for name, values in numeric.items():
        if np.isinf(values).any():
            raise UserError(f"{cells.where(int(np.isinf(values).argmax()))}: an infinite number in column {name!r}")
    item = found.get("item")
    attributes = _attributes(item, single, many) if item else ()
    if attributes:
        notes.append(f"{', '.join(attributes)}: follow from {item}")
    past: Lists | None = None
    if args.sequence:
        _check(cells, args.sequence, "sequence")
        if item is None:
            raise UserError(
                "--data_args.sequence holds earlier items, so the column of items must be known: name it with "
                "--data_args.item_column"
            )
        past = _many(frame[args.sequence], args.separator)
    if not single and not many and not numeric:
        raise UserError(f"{path.name} has no column that a model could read; its columns are {list_columns(cells)}")
    return Table(
        name=path.name,
        rows=len(frame),
        single=single,
        many=many,
        numeric=numeric,
        past=past,
        label=label,
        user=found.get("user"),
        item=item,
        item_columns=attributes,
        time=read_times(cells, found["time"]).to_numpy(float) if "time" in found else None,
        part=_part(cells, found.get("part")),
        notes=notes,
    )


def read_rows(path: Path, state: Mapping[str, Any], args: ClicksDataConfig) -> tuple[Table, pd.DataFrame]:
    """A table to predict, with the columns that the model was trained with, and the file's own cells as text.

    Raises:
        UserError: as `read_table`; a column is missing.
    """
    wanted = [field["name"] for field in state["fields"]] + [one["name"] for one in state["numeric"]]
    wanted += [state["sequence"]] if state["sequence"] else []
    text = {field["name"] for field in state["fields"]} | ({state["sequence"]} if state["sequence"] else set())
    cells = read_cells(path, delimiter=args.delimiter, text_columns=text, only=None, max_columns=_MOST_COLUMNS)
    missing = [name for name in wanted if name not in cells.frame]
    if missing:
        raise UserError(
            f"{path.name} lacks what the model was trained with: {', '.join(missing)}; it has {list_columns(cells)}"
        )
    frame = cells.frame.reset_index(drop=True)
    single = {field["name"]: _single(frame[field["name"]]) for field in state["fields"] if not field["many"]}
    many = {field["name"]: _many(frame[field["name"]], args.separator) for field in state["fields"] if field["many"]}
    if state["behaviour"] and not state["sequence"]:
        raise UserError("the model reads the users' earlier items, which only its own data set holds")
    past = _many(frame[state["sequence"]], args.separator) if state["sequence"] else None
    numeric = {one["name"]: read_numbers(cells, one["name"]).to_numpy(float) for one in state["numeric"]}
    table = Table(
        name=path.name,
        rows=len(frame),
        single=single,
        many=many,
        numeric=numeric,
        past=past,
        user=state["user"],
        item=state["item"],
    )
    return table, frame


def _cells(path: Path, args: ClicksDataConfig, names: set[str]) -> tuple[Cells, dict[str, str]]:
    """The file, and the columns whose roles are known."""
    words = header(path)
    known = {name for role in ("user", "item", "time") for name in ROLES[role]}
    text = names | {word for word in words if plain(word) in known}
    text |= {name for name in (args.user_column, args.item_column, args.time_column, args.sequence) if name}
    text |= {*(args.categorical or []), *(args.multi or [])}
    cells = read_cells(path, delimiter=args.delimiter, text_columns=text, only=None, max_columns=_MOST_COLUMNS)
    found: dict[str, str] = {}
    given = {
        "label": args.label_column,
        "user": args.user_column,
        "item": args.item_column,
        "time": args.time_column,
    }
    for role, name in given.items():
        column = find_column(cells, name, ROLES[role], role)
        if column is not None:
            found[role] = column
    part = find_column(cells, None, ("split",), "split")
    if part is not None and set(cells.frame[part].dropna().astype(str).str.lower()) <= set(_PARTS):
        found["part"] = part
    return cells, found


def _check(cells: Cells, name: str, option: str) -> None:
    if name not in cells.frame:
        raise UserError(
            f"{cells.source} has no column {name!r}, which --data_args.{option} names; its columns are "
            f"{list_columns(cells)}"
        )


def _label(cells: Cells, column: str | None, args: ClicksDataConfig) -> np.ndarray | None:
    if column is None:
        if args.negatives > 0:
            return None
        raise UserError(
            f"{cells.source} has no column that is known to hold the labels; name it with --data_args.label_column, "
            f"one of {list_columns(cells)}, or where every row is a click, draw others with --data_args.negatives 2"
        )
    text = cells.frame[column].reset_index(drop=True).astype("object").map(lambda cell: str(cell).strip().lower())
    bad = ~text.isin((*_NO, *_YES))
    if bad.any():
        row = int(bad.to_numpy().argmax())
        found = str(cells.frame[column].iloc[row])
        raise UserError(f"{cells.where(row)}: {found!r} in column {column!r} is no label; labels are 0 or 1")
    label = text.isin(_YES).to_numpy(float)
    if args.negatives:
        raise UserError(f"{cells.source} has labels ({column}), so --data_args.negatives must be 0")
    if label.min() == label.max():
        raise UserError(
            f"column {column!r} of {cells.source} is {int(label[0])} in every row; where every row is a click, leave "
            "it out and draw others with --data_args.negatives 2"
        )
    return label


def _part(cells: Cells, column: str | None) -> np.ndarray | None:
    if column is None:
        return None
    text = cells.frame[column].reset_index(drop=True)
    if text.isna().any():
        raise UserError(f"{cells.where(int(text.isna().to_numpy().argmax()))}: no part in column {column!r}")
    return text.astype(str).str.lower().map(_PARTS).to_numpy(np.int8)


def _kinds(cells: Cells, args: ClicksDataConfig, used: set[str], notes: list[str]) -> tuple[list[str], list[str]]:
    """Columns of names and columns of numbers, in the order of the file; the others are noted."""
    single, numeric = [], []
    for name in cells.frame.columns:
        if name in used:
            continue
        column = cells.frame[name]
        distinct = column.nunique()
        if args.categorical is not None and name in args.categorical:
            single.append(name)
        elif args.numeric is not None and name in args.numeric:
            numeric.append(name)
        elif distinct < 2:
            notes.append(f"column {name} left out: one value in all rows")
        elif pd.api.types.is_numeric_dtype(column) and not pd.api.types.is_bool_dtype(column):
            whole = bool((column.dropna() % 1 == 0).all())
            few = whole and distinct <= _FEW
            if args.categorical is None and few:
                single.append(name)
            elif args.numeric is None and not few:
                numeric.append(name)
        elif args.categorical is None:
            if distinct > 0.5 * len(column) and distinct > _FEW:
                notes.append(
                    f"column {name} left out: {distinct:,} different names in {len(column):,} rows say nothing about "
                    "others (--data_args.categorical takes it all the same)"
                )
            else:
                single.append(name)
    return single, numeric


def _single(column: pd.Series) -> Names:
    return names_of(list(read_names(column)))


def _many(column: pd.Series, separator: str) -> Lists:
    number: dict[str, int] = {}
    counts, code = [], []
    for cell in read_names(column):
        words = [] if cell is None else [word.strip() for word in str(cell).split(separator) if word.strip()]
        counts.append(len(words))
        code += [number.setdefault(word, len(number)) for word in words]
    start = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
    return Lists(start=start, code=np.array(code, np.int64), names=list(number))


def _attributes(item: str, single: Mapping[str, Names], many: Mapping[str, Lists]) -> tuple[str, ...]:
    columns: dict[str, Names | Lists] = {**single, **many}
    return tuple(name for name, column in columns.items() if name != item and follows(single[item], column))


def check_file(path: Path) -> list[str]:
    """Problems of a table of impressions, a sentence each; what was found is printed."""
    from attn_recsys.clicks.data import prepare

    args = ClicksDataConfig()
    for name, value in prepare(read_table(path, args), args).facts.items():
        print(f"{name}: {value}")
    return []


# -- data sets --------------------------------------------------------------------------------------------------------


def read_frappe(folder: Path) -> Table:
    """Frappe: every row a use. `cnt` is left out; `unknown` is a name like others."""
    with gzip.open(folder / "frappe.csv.gz", "rt", encoding="utf-8") as file:
        frame = pd.read_csv(file, dtype=str, keep_default_na=False)
    single = {name: names_of(list(frame[name])) for name in frame.columns if name != "cnt"}
    return Table(
        name="frappe",
        rows=len(frame),
        single=single,
        user="user",
        item="item",
        item_columns=("cost",),
        negatives=2,
    )
