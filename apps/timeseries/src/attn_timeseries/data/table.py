"""Users' own tables: any CSV or Parquet file with a column of times, checked, sorted and set on a regular grid.

A mistake is refused in one sentence with file and line; whatever else was found stands in the table's notes.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pandas as pd

from attn_shared.errors import UserError
from attn_timeseries.data.cards import ForecastDataConfig, name_list
from attn_timeseries.data.covariates import (
    CATEGORIES,
    NUMBERS,
    OPTIONS,
    CovariateColumns,
    SeriesCovariates,
    categories,
    longest_run,
    roles_of,
)
from attn_timeseries.data.csvtext import MISSING, Cells, read_cells
from attn_timeseries.data.times import TIME_NAMES, check_frequency, infer_frequency, is_clock, on_grid, parse_times
from core_attn.naming import UnknownNameError, unknown

MAX_COLUMNS = 1000
_THOUSANDS = re.compile(
    r"[+-]?\d{1,3}(?:(?:\.\d{3})+(?:,\d+)?|(?:,\d{3})+(?:\.\d+)?|(?:['\u2019\u00a0\u202f ]\d{3})+(?:[.,]\d+)?)"
)
ID_NAMES = ("id", "unique_id", "series", "series_id", "item_id", "station", "sensor", "name")


@dataclass(frozen=True, kw_only=True)
class Series:
    """One series on its grid: `times` (T,) regular, `values` (T, C) float64, NaN where nothing was observed.

    `ids` are the cells of the table's `id_columns`, `name` is what they make together; `covariates` are None where the
    table has none.
    """

    name: str
    times: pd.DatetimeIndex
    values: np.ndarray
    ids: tuple[str, ...] = ()
    covariates: SeriesCovariates | None = None


@dataclass(frozen=True, kw_only=True)
class SeriesTable:
    """A file as series.

    Attributes:
        source: file name for messages.
        time_column, id_column: names in the file; no id column where the file holds one series; names of several are
            joined by a stroke.
        id_columns: the columns that name a series, one or more.
        roles: role -> columns of its covariates.
        columns: value columns, the order of `Series.values`.
        frequency: pandas alias of the step.
        form: how the file is written: encoding, separator, decimal comma, which column names the series.
        notes: what is worth knowing about the data: gaps, duplicates, order, constant columns.
    """

    source: str
    time_column: str
    id_column: str | None
    columns: list[str]
    frequency: str
    series: list[Series]
    id_columns: list[str] = field(default_factory=list)
    roles: dict[str, list[str]] = field(default_factory=dict)
    form: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def read_table(
    path: Path,
    config: ForecastDataConfig,
    *,
    likely_ids: Sequence[str] = (),
    targets: bool = True,
    silent: bool = False,
) -> SeriesTable:
    """Read and check a file.

    Args:
        likely_ids: columns that name the series if they are all there and the options name none.
        targets: False reads a table of known covariates only: its series have no columns of values.
        silent: columns without any number are taken, all NaN.

    Raises:
        UserError: one sentence with file and line.
    """
    path = Path(path)
    roles = roles_of(config)
    if not targets:
        roles = {role: names for role, names in roles.items() if role.startswith("known")}
    ids = _id_options(config)
    texts = {name for role in CATEGORIES for name in roles.get(role, ())}
    named = {name for name in (config.time_column, *ids, *likely_ids) if name}
    numbers = [name for role in NUMBERS for name in roles.get(role, ())]
    cells = read_cells(
        path,
        delimiter=config.delimiter,
        # Times that look like numbers (20200131) and names like 007 must stay text.
        text_columns=named | texts | set(ID_NAMES) | set(TIME_NAMES) | {n.capitalize() for n in TIME_NAMES},
        only=None if config.columns is None else [*config.columns, *numbers],
        max_columns=MAX_COLUMNS,
    )
    if not ids and all(name in cells.frame for name in likely_ids):
        ids = list(likely_ids)
    form, notes = list(cells.notes), []  # type: list[str], list[str]
    time_column = _find_time(cells, config)
    times = _times(cells, time_column, form)
    if targets:
        columns, ids = _roles(cells, times, time_column, ids, roles, config, form)
    else:
        columns, ids = [], _known_only(cells, time_column, ids, roles)
    values = _values(cells, columns, silent=silent)
    covariates = _covariates(cells, roles)
    codes, names = _ids(cells, ids)
    bounds = np.cumsum(np.bincount(codes, minlength=len(names)))[:-1]
    compared = covariates.beside(values) if covariates else values
    parts = [
        (name, _sorted_rows(cells, times, compared, rows, "/".join(name), notes))
        for name, rows in zip(names, np.split(np.argsort(codes, kind="stable"), bounds))
    ]
    frequency = _frequency(cells, times, parts, config, notes)
    series = []
    for name, rows in parts:
        one = _regular(
            cells,
            name,
            times,
            values,
            rows,
            frequency,
            columns,
            covariates,
            config,
            notes,
            alone=len(parts) == 1,
            silent=silent,
        )
        if one is not None:
            series.append(one)
    if not series:
        raise UserError(f"{cells.source}: no series has a value in any of {', '.join(map(repr, columns))}")
    return SeriesTable(
        source=cells.source,
        time_column=time_column,
        id_column="/".join(ids) or None,
        columns=columns,
        frequency=frequency,
        series=series,
        id_columns=ids,
        roles=roles,
        form=form,
        notes=_summed(notes),
    )


def check_file(path: str | Path, args: ForecastDataConfig | None = None) -> list[str]:
    """What is wrong with a file or worth knowing, in sentences; empty when it is a regular table without gaps."""
    try:
        return read_table(Path(path), args or ForecastDataConfig()).notes
    except UserError as error:
        return [str(error)]


def _lookup(kind: str, name: str, choices: list[str], source: str) -> None:
    if name not in choices:
        try:
            raise unknown(kind, name, choices)
        except UnknownNameError as error:
            raise UserError(f"{source}: {error}") from None


def _looks_like_number(column: pd.Series) -> bool:
    return pd.api.types.is_numeric_dtype(column) or bool(
        column.dropna().astype(str).str.strip().str.fullmatch(r"[+-]?\d+(\.\d*)?([eE][+-]?\d+)?").all()
    )


def _find_time(cells: Cells, config: ForecastDataConfig) -> str:
    frame = cells.frame
    names = list(frame.columns)
    if config.time_column is not None:
        _lookup("time column", config.time_column, names, cells.source)
        return config.time_column
    step = max(1, len(frame) // 200)
    candidates = []
    for name in names:
        usual = name.lower() in TIME_NAMES
        column = frame[name].iloc[::step]
        if pd.api.types.is_bool_dtype(column) or (_looks_like_number(column) and not usual):
            continue
        times, _ = parse_times(column)
        if column.notna().any() and times.notna().sum() > 0.5 * column.notna().sum():
            candidates.append(name)
    named = [name for name in candidates if name.lower() in TIME_NAMES]
    if len(candidates) == 1 or len(named) == 1:
        return (named or candidates)[0]
    if candidates:
        raise UserError(
            f"{cells.source}: several columns hold times ({', '.join(map(repr, candidates))}); "
            f"choose with --data_args.time_column"
        )
    shown = ", ".join(repr(n) for n in names[:12]) + (", …" if len(names) > 12 else "")
    for name in names:
        if name.lower() in TIME_NAMES and frame[name].notna().any():
            row = int(frame[name].notna().to_numpy().argmax())
            raise UserError(
                f"{cells.where(row)}: {str(frame[name].iloc[row])!r} in column {name!r} is not a time; "
                "write times like 2024-01-31 or 2024-01-31 13:00"
            )
    raise UserError(
        f"{cells.source}: no column holds times; the columns are {shown}; write times like 2024-01-31 13:00, or name "
        "the column with --data_args.time_column"
    )


def _times(cells: Cells, name: str, notes: list[str]) -> pd.DatetimeIndex:
    raw = cells.frame[name]
    times, found = parse_times(raw)
    notes += found
    bad = times.isna().to_numpy()
    if bad.any():
        row = int(bad.argmax())
        if pd.isna(raw.iloc[row]):
            raise UserError(f"{cells.where(row)}: the time is missing (column {name!r})")
        why = f" ({found[0]})" if found and "offset" in found[0] else ""
        raise UserError(f"{cells.where(row)}: {str(raw.iloc[row])!r} in column {name!r} is not a time{why}")
    return pd.DatetimeIndex(times)


def _id_options(config: ForecastDataConfig) -> list[str]:
    """The columns that the options say name a series."""
    several = name_list(config.id_columns)
    if several and config.id_column is not None:
        raise UserError("give data_args.id_column for one column or data_args.id_columns for several, not both")
    if len(set(several)) != len(several):
        raise UserError(f"data_args.id_columns names a column twice: {', '.join(several)}")
    return several or ([config.id_column] if config.id_column is not None else [])


def _roles(
    cells: Cells,
    times: pd.DatetimeIndex,
    time_column: str,
    ids: list[str],
    roles: dict[str, list[str]],
    config: ForecastDataConfig,
    notes: list[str],
) -> tuple[list[str], list[str]]:
    """Value columns and id columns."""
    frame = cells.frame
    others = [name for name in frame.columns if name != time_column]
    for name in ids:
        _lookup("id column", name, others, cells.source)
    _check_roles(cells, time_column, others, ids, roles)
    chosen = {name for names in roles.values() for name in names}
    if config.columns is not None:
        for name in config.columns:
            _lookup("column", name, others, cells.source)
            if name in ids:
                raise UserError(f"column {name!r} names the series, so it is none of data_args.columns")
    taken = chosen | set(config.columns or ())
    if not ids:
        # A category of each series may be what names it.
        free = [name for name in others if name not in taken or name in roles.get("static_cat", ())]
        found = _guess_id(cells, times, free, notes)
        ids = [found] if found is not None else []
    if config.columns is not None:
        return list(config.columns), ids
    others = [name for name in others if name not in chosen and name not in ids]
    for name in others:
        text = _text_share(cells, name)
        if text > 0.5:
            example = _grouped(cells, name)
            if example is not None:
                raise UserError(
                    f"{cells.source}: numbers of column {name!r} have marks between thousands ({example!r}); "
                    "write them without"
                )
            if is_clock(frame[name]):
                raise UserError(
                    f"{cells.source}: date and time stand in two columns ({time_column!r}, {name!r}); join them in one"
                )
            raise UserError(
                f"{cells.source}: column {name!r} holds text; leave it out with --data_args.columns, name it with "
                f"--data_args.id_column if it names the series, or with --data_args.known_categories or another role "
                f"if it is a covariate"
            )
    if not others:
        raise UserError(
            f"{cells.source}: no column of numbers beside the times ({time_column!r})"
            + (" and the covariates" if chosen else "")
        )
    return others, ids


def _check_roles(
    cells: Cells, time_column: str, others: list[str], ids: list[str], roles: dict[str, list[str]]
) -> None:
    for role, names in roles.items():
        for name in names:
            if name == time_column:
                raise UserError(
                    f"{cells.source}: column {name!r} holds the times, so it is none of data_args.{OPTIONS[role]}"
                )
            if name in ids and role != "static_cat":
                raise UserError(
                    f"{cells.source}: column {name!r} names the series, so as a covariate it is one of "
                    "data_args.static_categories"
                )
            _lookup("covariate", name, others, cells.source)


def _known_only(cells: Cells, time_column: str, ids: list[str], roles: dict[str, list[str]]) -> list[str]:
    """The id columns of a table that holds only known covariates."""
    others = [name for name in cells.frame.columns if name != time_column]
    for name in ids:
        _lookup("id column", name, others, cells.source)
    _check_roles(cells, time_column, others, ids, roles)
    return ids


def _covariates(cells: Cells, roles: dict[str, list[str]]) -> CovariateColumns:
    values = {role: _values(cells, roles[role], f"data_args.{OPTIONS[role]}") for role in NUMBERS if role in roles}
    codes: dict[str, np.ndarray] = {}
    levels: dict[str, list[list[str]]] = {}
    for role in CATEGORIES:
        if role in roles:
            found = [categories(cells, name, role) for name in roles[role]]
            codes[role] = np.stack([code for code, _ in found], axis=1)
            levels[role] = [texts for _, texts in found]
    return CovariateColumns(roles=roles, values=values, codes=codes, levels=levels)


def _text_share(cells: Cells, name: str) -> float:
    """Share of the known cells that are no number."""
    column = cells.frame[name]
    if pd.api.types.is_numeric_dtype(column) or pd.api.types.is_bool_dtype(column):
        return 0.0
    known = column.dropna()
    return float(cells.numbers(known).isna().mean()) if len(known) else 0.0


def _grouped(cells: Cells, name: str, row: int | None = None) -> str | None:
    """A number with marks between thousands: that of a row, or of a column whose text is mostly such numbers."""
    known = (cells.frame[name] if row is None else cells.frame[name].iloc[[row]]).dropna().astype("str").str.strip()
    found = known[[_THOUSANDS.fullmatch(text) is not None for text in known]]
    return str(found.iloc[0]) if len(found) > 0.5 * len(known) else None


def _guess_id(cells: Cells, times: pd.DatetimeIndex, others: list[str], notes: list[str]) -> str | None:
    """The one column that tells rows of equal time apart: text, or numbers under a usual name."""
    found = []
    for name in others:
        column = cells.frame[name]
        text = _text_share(cells, name) > 0.5 and not is_clock(column) and _grouped(cells, name) is None
        usual = name.lower() in ID_NAMES and times.has_duplicates
        if (text or usual) and column.notna().all() and column.nunique() <= max(1, len(column) // 2):
            pairs = pd.DataFrame({"t": times.asi8, "i": column.astype(str).to_numpy()})
            if not pairs.duplicated().any():
                found.append(name)
    if len(found) == 1:
        notes.append(f"series named by column {found[0]!r}")
        return found[0]
    return None


def _values(cells: Cells, columns: list[str], option: str = "", *, silent: bool = False) -> np.ndarray:
    """(rows, C) float64; text, infinite and over-large numbers are refused with their line."""
    values = np.empty((len(cells.frame), len(columns)))
    for c, name in enumerate(columns):
        column = cells.frame[name]
        if not (pd.api.types.is_numeric_dtype(column) or pd.api.types.is_bool_dtype(column)):
            stripped = column.astype("str").str.strip().where(column.notna().to_numpy(), None)
            stripped = stripped.mask(stripped.isin(MISSING), None)
            numbers = cells.numbers(stripped)
            bad = (numbers.isna() & stripped.notna()).to_numpy()
            if bad.any():
                row = int(bad.argmax())
                raise UserError(
                    f"{cells.where(row)}: {str(column.iloc[row])!r} in column {name!r} is not a number"
                    + (f" ({bad.sum()} such cells)" if bad.sum() > 1 else "")
                    + ("; write numbers without marks between thousands" if _grouped(cells, name, row) else "")
                )
            column = numbers
        values[:, c] = column.to_numpy(dtype=np.float64, na_value=np.nan)
        if np.isnan(values[:, c]).all() and not silent:
            raise UserError(
                f"{cells.source}: column {name!r} holds no number at all; leave it out "
                + (f"of {option}" if option else "with --data_args.columns")
            )
    large = np.isinf(values) | (np.abs(values) > 1e30)
    if large.any():
        row, c = (int(i) for i in np.argwhere(large)[0])
        kind = "infinite" if np.isinf(values[row, c]) else "too large (over 1e30)"
        raise UserError(f"{cells.where(row)}: the value in column {columns[c]!r} is {kind}")
    return values


def _ids(cells: Cells, columns: list[str]) -> tuple[np.ndarray, list[tuple[str, ...]]]:
    """Number of the series each row belongs to, and the series' ids in order of appearance."""
    if not columns:
        return np.zeros(len(cells.frame), dtype=np.int64), [()]
    codes = np.zeros(len(cells.frame), dtype=np.int64)
    found: list[tuple[str, ...]] = [()]
    for name in columns:
        column = cells.frame[name]
        missing = column.isna().to_numpy()
        if missing.any():
            raise UserError(f"{cells.where(int(missing.argmax()))}: the name of the series is missing ({name!r})")
        level, texts = pd.factorize(column.astype(str).str.strip())
        codes, pairs = pd.factorize(codes * len(texts) + level)
        names = [str(text) for text in texts]
        found = [(*found[pair // len(names)], names[pair % len(names)]) for pair in pairs.tolist()]
    joined: dict[str, tuple[str, ...]] = {}
    for key in found:
        other = joined.setdefault("/".join(key), key)
        if other is not key:
            raise UserError(
                f"{cells.source}: the ids {', '.join(other)} and {', '.join(key)} would both be called "
                f"{'/'.join(key)!r}; take the strokes out of them"
            )
    return codes, found


def _sorted_rows(
    cells: Cells, times: pd.DatetimeIndex, values: np.ndarray, rows: np.ndarray, name: str, notes: list[str]
) -> np.ndarray:
    """Rows of one series in order of time, exact repetitions dropped, contradictions refused."""
    stamps = times.asi8[rows]
    if (np.diff(stamps) < 0).any():
        notes.append("rows out of order of time; sorted")
        rows = rows[np.argsort(stamps, kind="stable")]
        stamps = times.asi8[rows]
    same = np.flatnonzero(np.diff(stamps) == 0)
    if not len(same):
        return rows
    a, b = values[rows[same]], values[rows[same + 1]]
    differ = ~((a == b) | (np.isnan(a) & np.isnan(b))).all(axis=1)
    if differ.any():
        first = int(same[differ.argmax()])
        of = (
            f" of series {name!r}"
            if name
            else "; if the file holds several series, name --data_args.id_column, or --data_args.id_columns; if the "
            "clock was put back, write times with their offset, such as 2024-10-27 02:00+01:00"
        )
        raise UserError(
            f"{cells.where(int(rows[first + 1]))}: the time {times[rows[first]]} stands there again with other values "
            f"(first at {cells.where(int(rows[first]))}){of}"
        )
    notes.append(f"{len(same)} rows repeated exactly; kept once")
    return np.delete(rows, same + 1)


def _frequency(
    cells: Cells,
    times: pd.DatetimeIndex,
    parts: list[tuple[tuple[str, ...], np.ndarray]],
    config: ForecastDataConfig,
    notes: list[str],
) -> str:
    if config.frequency is not None:
        return check_frequency(config.frequency)
    ids, rows = max(parts, key=lambda part: len(part[1]))
    if len(rows) < 3:
        of = f" in its longest series {'/'.join(ids)!r}" if ids else ""
        count = "one row" if len(rows) == 1 else f"{len(rows)} rows"
        raise UserError(f"{cells.source} has only {count}{of}; at least three are needed to tell the step")
    return infer_frequency(times[rows], lambda i: cells.where(int(rows[i])))


def _regular(
    cells: Cells,
    ids: tuple[str, ...],
    times: pd.DatetimeIndex,
    values: np.ndarray,
    rows: np.ndarray,
    frequency: str,
    columns: list[str],
    covariates: CovariateColumns,
    config: ForecastDataConfig,
    notes: list[str],
    *,
    alone: bool,
    silent: bool,
) -> Series | None:
    """One series on its grid, with gaps counted, bounded and left as NaN; None where it has no value, and others do."""
    name = "/".join(ids)
    index = times[rows]
    grid = on_grid(index, frequency, lambda i: cells.where(int(rows[i])))
    place = grid.get_indexer(index)
    full = np.full((len(grid), len(columns)), np.nan)
    full[place] = values[rows]
    row_of = np.full(len(grid), -1)
    row_of[place] = rows

    first, end = _extent(cells, name, full, columns, covariates.reaches_ahead, alone, silent)
    if first == len(full) and columns:
        notes.append("a series without any value left out")
        return None
    if first:
        notes.append(f"first {first} steps left out: not every column has begun")
    if end < len(full):
        notes.append(f"{len(full) - end} steps ahead hold known covariates only; `predict` uses them")
    absent = int((row_of[first:end] < 0).sum())
    own = covariates.of_series(cells, name, rows, grid, place, first, end, config, notes) if covariates else None
    full, grid, row_of = full[first:end], grid[first:end], row_of[first:end]
    holes = np.isnan(full)
    if holes.any():
        if config.missing == "error":
            row, c = (int(i) for i in np.argwhere(holes)[0])
            raise UserError(
                f"{_beside(cells, row_of, row)}: column {columns[c]!r} has no value at {grid[row]} "
                "(missing is 'error'; 'interpolate' fills gaps)"
            )
        length, row, c = longest_run(holes)
        if length > config.max_gap:
            raise UserError(
                f"{_beside(cells, row_of, row)}: column {columns[c]!r} has no value for {length} steps from "
                f"{grid[row]} (max_gap is {config.max_gap}); fill them, cut the file, or raise --data_args.max_gap"
            )
        if absent:
            notes.append(f"{absent} steps have no row")
        notes.append(f"{int(holes.sum())} values missing, longest run {length} steps; filled over time, never scored")
    for c in range(full.shape[1]):
        known = full[:, c][~holes[:, c]]
        if len(known) > 1 and (known == known[0]).all():
            notes.append(f"column {columns[c]!r} is constant" + (f" in series {name!r}" if name else ""))
    return Series(name=name, times=grid, values=full, ids=ids, covariates=own)


def _extent(
    cells: Cells, name: str, full: np.ndarray, columns: list[str], ahead: bool, alone: bool, silent: bool
) -> tuple[int, int]:
    """First step at which every column has begun, and the end of the targets; the whole length twice where none has.

    Steps without any target at the end lie ahead where covariates are known for them, else they are a gap.
    """
    if not columns:
        return 0, 0
    started = ~np.isnan(full)
    if not started.any() and not alone:
        return len(full), len(full)
    if silent:
        started[:, ~started.any(axis=0)] = True
    if not started.any(axis=0).all():
        empty = columns[int((~started.any(axis=0)).argmax())]
        raise UserError(f"{cells.source}: column {empty!r} holds no number in series {name!r}")
    end = int(np.flatnonzero(started.any(axis=1))[-1]) + 1 if ahead else len(full)
    return int(started.argmax(axis=0).max()), end


def _beside(cells: Cells, row_of: np.ndarray, row: int) -> str:
    """File and line of a step; of the last row before it where it has none of its own."""
    while row > 0 and row_of[row] < 0:
        row -= 1
    return cells.where(int(row_of[row])) if row_of[row] >= 0 else cells.source


def _summed(notes: list[str]) -> list[str]:
    """Each note once, with how often it came up: a file of a thousand series is told in a few lines."""
    counts: dict[str, int] = {}
    for note in notes:
        counts[note] = counts.get(note, 0) + 1
    told = [note if n == 1 else f"{note} ({n} times)" for note, n in counts.items()]
    return told if len(told) <= 20 else [*told[:20], f"… and {len(told) - 20} further notes"]
