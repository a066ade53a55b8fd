"""Covariates: which columns of a table they are, what they are in each series, and their code in numbers.

Six roles. What is *past* is known up to now, what is *known* also for the steps to forecast, what is *static* is one
value a series; each as numbers or as categories. Statistics and vocabularies come from training rows only; index 0 of a
vocabulary stands for what is missing there and for empty cells.

Legend: T rows of a series, F rows ahead of its last target.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from attn_shared.errors import UserError
from attn_timeseries.data.cards import ForecastDataConfig, name_list
from attn_timeseries.data.csvtext import MISSING, Cells

if TYPE_CHECKING:
    from attn_timeseries.data.benchmarks import Borders
    from attn_timeseries.data.table import Series

OPTIONS = {
    "past": "past_covariates",
    "past_cat": "past_categories",
    "known": "known_covariates",
    "known_cat": "known_categories",
    "static": "static_covariates",
    "static_cat": "static_categories",
}
NUMBERS = ("past", "known", "static")
CATEGORIES = ("past_cat", "known_cat", "static_cat")
_MOST_LEVELS = 10_000
_FEW_LEVELS = 50


def roles_of(config: ForecastDataConfig) -> dict[str, list[str]]:
    """Role -> columns, for the roles that have any.

    Raises:
        UserError: a column has two roles, or is a target too.
    """
    roles = {role: name_list(getattr(config, option)) for role, option in OPTIONS.items()}
    seen: dict[str, str] = dict.fromkeys(config.columns or (), "columns")
    if config.time_column:
        seen[config.time_column] = "time_column"
    for role, names in roles.items():
        for name in names:
            if name in seen:
                raise UserError(
                    f"column {name!r} stands in data_args.{OPTIONS[role]} and in data_args.{seen[name]}; a column has "
                    "one role"
                    if seen[name] != OPTIONS[role]
                    else f"column {name!r} stands twice in data_args.{OPTIONS[role]}"
                )
            seen[name] = OPTIONS[role]
    return {role: names for role, names in roles.items() if names}


@dataclass(frozen=True, kw_only=True)
class SeriesCovariates:
    """The covariates of one series on its grid; a role that has no columns is left out.

    Attributes:
        values: role -> float64, NaN where nothing is given: past (T, P), known (T + F, K), static (S,).
        codes: role -> int64, -1 where nothing is given: past_cat (T, ·), known_cat (T + F, ·), static_cat (·,).
        levels: role -> the text of each code, one list a column; shared by all series of a table.
        ahead: (F,) times after the last target for which known covariates are given.
    """

    values: dict[str, np.ndarray]
    codes: dict[str, np.ndarray]
    levels: Mapping[str, list[list[str]]]
    ahead: pd.DatetimeIndex

    def with_ahead(self, times: pd.DatetimeIndex, other: SeriesCovariates, rows: np.ndarray) -> SeriesCovariates:
        """These covariates with rows of the known ones of `other`, given at `times`, in place of their own ahead."""
        values, codes, levels = dict(self.values), dict(self.codes), dict(self.levels)
        if "known" in values:
            behind = len(values["known"]) - len(self.ahead)
            values["known"] = np.concatenate([values["known"][:behind], other.values["known"][rows]])
        if "known_cat" in codes:
            behind = len(codes["known_cat"]) - len(self.ahead)
            table = other.codes["known_cat"][rows]
            levels["known_cat"] = []
            for c, (ours, theirs) in enumerate(zip(self.levels["known_cat"], other.levels["known_cat"])):
                table[:, c] = np.where(table[:, c] < 0, -1, table[:, c] + len(ours))
                levels["known_cat"].append([*ours, *theirs])
            codes["known_cat"] = np.concatenate([codes["known_cat"][:behind], table])
        return SeriesCovariates(values=values, codes=codes, levels=levels, ahead=times)


# -- reading ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class CovariateColumns:
    """The covariates of all rows of a file, as they stand there.

    Attributes:
        roles: role -> columns.
        values: numeric role -> (rows, ·) float64.
        codes: categorical role -> (rows, ·) int64, -1 for an empty cell.
        levels: categorical role -> text of each code, a list a column.
    """

    roles: dict[str, list[str]]
    values: dict[str, np.ndarray] = field(default_factory=dict)
    codes: dict[str, np.ndarray] = field(default_factory=dict)
    levels: dict[str, list[list[str]]] = field(default_factory=dict)

    def __bool__(self) -> bool:
        return bool(self.roles)

    @property
    def reaches_ahead(self) -> bool:
        """Whether rows without targets can say something: values known for the future."""
        return "known" in self.roles or "known_cat" in self.roles

    def beside(self, values: np.ndarray) -> np.ndarray:
        """`values` (rows, C) and all covariates, side by side: what makes two rows of one time equal."""
        return np.concatenate([values, *self.values.values(), *self.codes.values()], axis=1)

    def of_series(
        self,
        cells: Cells,
        name: str,
        rows: np.ndarray,
        grid: pd.DatetimeIndex,
        place: np.ndarray,
        begin: int,
        end: int,
        config: ForecastDataConfig,
        notes: list[str],
    ) -> SeriesCovariates:
        """The part of one series.

        Args:
            rows: its rows in the file, in order of time.
            grid: times of all its steps, those ahead included.
            place: step of each row.
            begin, end: steps from the first to the last (exclusive) target.
        """
        values: dict[str, np.ndarray] = {}
        codes: dict[str, np.ndarray] = {}
        for role, table in {**self.values, **self.codes}.items():
            numeric = role in self.values
            if role.startswith("static"):
                one = self._static(cells, name, role, table[rows], rows, notes)
            else:
                one = np.full((len(grid), table.shape[1]), np.nan if numeric else -1, dtype=table.dtype)
                one[place] = table[rows]
                if numeric:
                    self._check_gaps(cells, name, role, one[begin:end], grid[begin:], config, notes)
                one = one[begin:] if role.startswith("known") else one[begin:end]
            (values if numeric else codes)[role] = one
        return SeriesCovariates(values=values, codes=codes, levels=self.levels, ahead=grid[end:])

    def _static(
        self, cells: Cells, name: str, role: str, table: np.ndarray, rows: np.ndarray, notes: list[str]
    ) -> np.ndarray:
        """The one value of each static column; refuses one that changes."""
        given = ~np.isnan(table) if role == "static" else table >= 0
        first = table[given.argmax(axis=0), np.arange(table.shape[1])]
        differs = given & (table != first)
        of = f" of series {name!r}" if name else ""
        if differs.any():
            row, c = (int(i) for i in np.argwhere(differs)[0])
            column = self.roles[role][c]
            raise UserError(
                f"{cells.where(int(rows[row]))}: column {column!r} changes within the rows{of}, so it is not static; "
                f"name it in data_args.{OPTIONS[role.replace('static', 'known')]} or "
                f"{OPTIONS[role.replace('static', 'past')]}"
            )
        notes += [
            f"static column {self.roles[role][c]!r} is empty in a series; taken as unknown"
            for c in np.flatnonzero(~given.any(axis=0))
        ]
        return first

    def _check_gaps(
        self,
        cells: Cells,
        name: str,
        role: str,
        table: np.ndarray,
        grid: pd.DatetimeIndex,
        config: ForecastDataConfig,
        notes: list[str],
    ) -> None:
        holes = np.isnan(table)
        if not holes.any():
            return
        begun = np.maximum.accumulate(~holes, axis=0)
        of = f" in series {name!r}" if name else ""
        for c, column in enumerate(self.roles[role]):
            late = int((~begun[:, c]).sum())
            if late:
                notes.append(
                    f"covariate {column!r} begins {late} steps after the targets{of}; its training mean stands before"
                )
        holes &= begun
        if config.missing == "error" and holes.any():
            step, c = (int(i) for i in np.argwhere(holes)[0])
            raise UserError(
                f"{cells.source}: covariate {self.roles[role][c]!r} has no value at {grid[step]}{of} "
                "(missing is 'error'; 'interpolate' fills gaps)"
            )
        length, step, c = longest_run(holes)
        if length > config.max_gap:
            raise UserError(
                f"{cells.source}: covariate {self.roles[role][c]!r} has no value for {length} steps from "
                f"{grid[step]}{of} (max_gap is {config.max_gap}); fill them, leave it out, or raise --data_args.max_gap"
            )
        if length:
            notes.append(f"{int(holes.sum())} values of covariates missing, longest run {length} steps; carried on")


def longest_run(holes: np.ndarray) -> tuple[int, int, int]:
    """Length, first row and column of the longest run of True down a column of (rows, C); length 0 where there is none.

    Of runs of one length the one that ends first counts.
    """
    if not holes.any():
        return 0, 0, 0
    rows = np.arange(len(holes))[:, None]
    # Rows since the last False, this one included.
    length = rows - np.maximum.accumulate(np.where(holes, -1, rows), axis=0)
    row, c = (int(i) for i in np.unravel_index(length.argmax(), length.shape))
    return int(length[row, c]), row - int(length[row, c]) + 1, c


def categories(cells: Cells, column: str, role: str) -> tuple[np.ndarray, list[str]]:
    """Codes (rows,) int64, -1 for an empty cell, and the text of each code. Refuses what can be no category."""
    raw = cells.frame[column]
    if pd.api.types.is_float_dtype(raw) and (raw.dropna() % 1 == 0).all():
        raw = raw.astype("Int64")  # whole numbers of a column with gaps: 3, not 3.0
    text = raw.astype("str").str.strip().where(raw.notna().to_numpy(), None)
    codes, levels = pd.factorize(text.mask(text.isin(MISSING), None))
    if not len(levels):
        raise UserError(
            f"{cells.source}: column {column!r} holds no category at all; leave it out of data_args.{OPTIONS[role]}"
        )
    most = _MOST_LEVELS if role == "static_cat" else min(_MOST_LEVELS, max(_FEW_LEVELS, len(raw) // 2))
    if len(levels) > most:
        numeric = role.removesuffix("_cat")
        raise UserError(
            f"{cells.source}: column {column!r} has {len(levels):,} different values in {len(raw):,} rows, too many "
            f"for categories; if they are numbers, name it in data_args.{OPTIONS[numeric]}"
        )
    return codes.astype(np.int64), [str(level) for level in levels]


# -- numbers for the models -------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class CovariateCoder:
    """What is learnt about covariates from training rows: mean and deviation of numbers, vocabulary of categories.

    Attributes:
        names: role -> columns.
        mean, std: numeric role -> one figure a column.
        vocabulary: categorical role -> a sorted list of levels a column; level i has index i + 1, all else index 0.
    """

    names: dict[str, list[str]]
    mean: dict[str, np.ndarray]
    std: dict[str, np.ndarray]
    vocabulary: dict[str, list[list[str]]]

    @classmethod
    def fit(cls, roles: Mapping[str, list[str]], series: Sequence[Series], limits: Sequence[Borders]) -> CovariateCoder:
        """From the rows of each series before its training border; a series without any counts for nothing."""
        parts = [(one.covariates, cut.train) for one, cut in zip(series, limits) if cut.train > 0]
        mean: dict[str, np.ndarray] = {}
        std: dict[str, np.ndarray] = {}
        vocabulary: dict[str, list[list[str]]] = {}
        for role, names in roles.items():
            tables = []
            for part, train in parts:
                assert part is not None
                table = part.values[role] if role in part.values else part.codes[role]
                tables.append(table[None] if role.startswith("static") else table[:train])
            if role in NUMBERS:
                rows = np.concatenate(tables)
                empty = np.isnan(rows).all(axis=0)
                if empty.any():
                    raise UserError(
                        f"covariate {names[int(empty.argmax())]!r} has no value in the training rows; leave it out of "
                        f"data_args.{OPTIONS[role]}"
                    )
                mean[role], deviation = np.nanmean(rows, axis=0), np.nanstd(rows, axis=0)
                steady = deviation <= 1e-12 * np.maximum(np.abs(mean[role]), 1e-30)
                std[role] = np.where(steady, 1.0, deviation)
            else:
                vocabulary[role] = []
                for c in range(len(names)):
                    found: set[str] = set()
                    for (part, _), table in zip(parts, tables):
                        assert part is not None
                        found |= {part.levels[role][c][code] for code in np.unique(table[:, c]) if code >= 0}
                    vocabulary[role].append(sorted(found))
        return cls(
            names={role: list(names) for role, names in roles.items()}, mean=mean, std=std, vocabulary=vocabulary
        )

    def state(self) -> dict[str, Any]:
        """As JSON holds it."""
        return {
            "names": self.names,
            "mean": {role: row.tolist() for role, row in self.mean.items()},
            "std": {role: row.tolist() for role, row in self.std.items()},
            "vocabulary": self.vocabulary,
        }

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> CovariateCoder:
        return cls(
            names={role: list(names) for role, names in state["names"].items()},
            mean={role: np.asarray(row, dtype=np.float64) for role, row in state["mean"].items()},
            std={role: np.asarray(row, dtype=np.float64) for role, row in state["std"].items()},
            vocabulary={role: [list(one) for one in lists] for role, lists in state["vocabulary"].items()},
        )

    def encode(self, part: SeriesCovariates) -> dict[str, np.ndarray]:
        """role -> scaled float32 without gaps, or int64 indices of the vocabulary; shapes as in `SeriesCovariates`.

        A gap repeats the last value given before it, so that nothing later shows; before the first it is the mean.
        """
        coded: dict[str, np.ndarray] = {}
        for role in self.names:
            if role in NUMBERS:
                scaled = (part.values[role] - self.mean[role]) / self.std[role]
                if role != "static":
                    scaled = _carried(scaled)
                coded[role] = np.nan_to_num(scaled, nan=0.0).astype(np.float32)
            else:
                table = part.codes[role]
                indices = np.zeros(table.shape, dtype=np.int64)
                for c, place in enumerate(self._places[role]):
                    for code in np.unique(table[..., c]):
                        if code >= 0:
                            indices[..., c][table[..., c] == code] = place.get(part.levels[role][c][code], 0)
                coded[role] = indices
        return coded

    @cached_property
    def _places(self) -> dict[str, list[dict[str, int]]]:
        return {
            role: [{text: i + 1 for i, text in enumerate(levels)} for levels in lists]
            for role, lists in self.vocabulary.items()
        }


def _carried(values: np.ndarray) -> np.ndarray:
    """Gaps take the last value before them; a gap at the start stays."""
    known = ~np.isnan(values)
    last = np.maximum.accumulate(np.where(known, np.arange(len(values))[:, None], 0), axis=0)
    return np.take_along_axis(values, last, axis=0)
