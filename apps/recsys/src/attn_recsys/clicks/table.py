"""A table of impressions as every reader gives it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np


@dataclass(frozen=True, kw_only=True)
class Names:
    """A column with one name a row.

    Attributes:
        code: (N,) int64 numbers of `names`, -1 = missing.
        names: the distinct names.
    """

    code: np.ndarray
    names: list[str]

    def take(self, rows: np.ndarray) -> Names:
        return replace(self, code=self.code[rows])


@dataclass(frozen=True, kw_only=True)
class Lists:
    """A column with any number of names a row.

    Attributes:
        start: (N + 1,) int64, where the names of a row begin in `code`.
        code: all rows' numbers of `names`, -1 = missing.
        names: the distinct names.
    """

    start: np.ndarray
    code: np.ndarray
    names: list[str]

    def take(self, rows: np.ndarray) -> Lists:
        start, place = gather(self.start, rows)
        return replace(self, start=start, code=self.code[place])


@dataclass(frozen=True, kw_only=True)
class Table:
    """Impressions.

    Attributes:
        name: for messages and reports.
        rows: how many.
        single: columns with one name a row.
        many: columns with several.
        numeric: columns of numbers, float64, NaN = missing.
        past: the user's earlier items, oldest first, numbered in any way; their attributes (`item_columns`) follow.
        label: (N,) float64 of 0 and 1; None = every row is a click.
        user, item: names of columns of `single`, where there are such.
        item_columns: columns of `single` and `many` that follow from the item, so that a drawn item brings its own.
        user_code: (N,) int64 number of the row's user, for scores by user, where there are users but no column of
            them that models may read; None = the codes of the column `user`.
        time: (N,) float64, or None.
        part: (N,) int8, 0 training, 1 validation, 2 test, where the data has a split of its own.
        negatives: rows to draw for each click where the user names no number; 0 where there are labels.
        notes: what was found and done.
    """

    name: str
    rows: int
    single: dict[str, Names]
    many: dict[str, Lists] = field(default_factory=dict)
    numeric: dict[str, np.ndarray] = field(default_factory=dict)
    past: Lists | None = None
    label: np.ndarray | None = None
    user: str | None = None
    item: str | None = None
    item_columns: tuple[str, ...] = ()
    user_code: np.ndarray | None = None
    time: np.ndarray | None = None
    part: np.ndarray | None = None
    negatives: int = 0
    notes: list[str] = field(default_factory=list)

    def users(self) -> np.ndarray | None:
        """(N,) int64 number of each row's user; missing ones are users of their own; None without users."""
        code = self.user_code if self.user_code is not None else self.single[self.user].code if self.user else None
        if code is None:
            return None
        return np.where(code >= 0, code, code.max(initial=0) + 1 + np.arange(len(code)))

    def take(self, rows: np.ndarray) -> Table:
        """The table of these rows, in this order."""
        return replace(
            self,
            rows=len(rows),
            single={name: column.take(rows) for name, column in self.single.items()},
            many={name: column.take(rows) for name, column in self.many.items()},
            numeric={name: column[rows] for name, column in self.numeric.items()},
            past=None if self.past is None else self.past.take(rows),
            label=_taken(self.label, rows),
            user_code=_taken(self.user_code, rows),
            time=_taken(self.time, rows),
            part=_taken(self.part, rows),
        )


def _taken(values: np.ndarray | None, rows: np.ndarray) -> np.ndarray | None:
    return None if values is None else values[rows]


def gather(start: np.ndarray, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Of ragged rows: the new starts, and the place of each number of the chosen rows, one after the other."""
    counts = np.diff(start)[rows]
    begin = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
    place = np.arange(begin[-1]) + np.repeat(start[:-1][rows] - begin[:-1], counts)
    return begin, place


def names_of(cells: Sequence[str | None]) -> Names:
    """Names of cells, numbered in order of appearance; None and "" are missing."""
    number: dict[str, int] = {}
    code = np.array([number.setdefault(cell, len(number)) if cell else -1 for cell in cells], np.int64)
    return Names(code=code, names=list(number))


def lists_of(cells: Sequence[Sequence[str]]) -> Lists:
    """Lists of names, numbered in order of appearance."""
    number: dict[str, int] = {}
    code = np.array([number.setdefault(name, len(number)) for cell in cells for name in cell], np.int64)
    start = np.concatenate([[0], np.cumsum([len(cell) for cell in cells])]).astype(np.int64)
    return Lists(start=start, code=code, names=list(number))
