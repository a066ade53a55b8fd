"""The options that tables of clicks share. Imports neither torch nor numpy."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(kw_only=True)
class ClicksDataConfig:
    """How a table of impressions is read, encoded and split.

    Attributes:
        label_column: column that says whether it was clicked (0 or 1); None = found by its name (label, click, …). A
            table of clicks alone has none: see `negatives`.
        user_column, item_column: columns of users and items, for per-user scores, sampling and sequences; None = found.
        time_column: column of times, for the split "time" and the order of behaviour; None = found.
        categorical: columns of names; None = every column of text, and of whole numbers with few values.
        multi: columns that hold several names a cell, separated by `separator`; None = none.
        numeric: columns of numbers; None = the other columns of numbers.
        sequence: column that holds the user's earlier items, oldest first, separated by `separator`; None = none.
        separator: between the names of one cell.
        delimiter: "," ";" "tab" or "|" between columns; None = found.
        min_count: names seen fewer times in training rows are read as unknown.
        max_length: items of behaviour kept, the last ones.
        negatives: rows added for each click, its item replaced by one that the user never had (training ones known to
            training only); 0 where the table has labels.
        redraw: draw those of training anew in each epoch; false = the same ones in all.
        split: "random" = rows, "user" = all rows of a user on one side, "time" = the last rows of all, "leave_one_out"
            = each user's last click for test, the one before for validation, "given" = the data set's own.
        test: share of the rows for test.
        val: share of them for validation.
        shuffle: seed of the split and of the sampled rows.
    """

    label_column: str | None = None
    user_column: str | None = None
    item_column: str | None = None
    time_column: str | None = None
    categorical: list[str] | None = None
    multi: list[str] | None = None
    numeric: list[str] | None = None
    sequence: str | None = None
    separator: str = " "
    delimiter: str | None = None
    min_count: int = 1
    max_length: int = 50
    negatives: int = 0
    redraw: bool = True
    split: Literal["random", "user", "time", "leave_one_out", "given"] = "random"
    test: float = 0.2
    val: float = 0.1
    shuffle: int = 0


@dataclass(kw_only=True)
class ClicksTaskConfig:
    """How click models are scored.

    Attributes:
        groups: users are also scored in this many groups of equal size by how much behaviour they had.
        bins: bins of the calibration curve.
    """

    groups: int = 4
    bins: int = 10
