"""The options that data sets of interactions share. Imports neither torch nor numpy."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(kw_only=True)
class ItemsDataConfig:
    """How interactions and their knowledge graph are read, cleaned and split.

    Attributes:
        user_column: column of user names; None = found by its name (user, user_id, …).
        item_column: column of item names; None = found.
        time_column: column of times (numbers or dates); None = found where there is one.
        rating_column: column of ratings; None = found where there is one.
        min_rating: interactions rated below this are left out; None = every row counts as liked.
        delimiter: "," ";" "tab" or "|"; None = found.
        graph: file of triples (head, relation, tail) of a knowledge graph; None = the data set's own, or none.
        links: file of two columns, item and entity, where items have other names in the graph; None = same names.
        inverse: each triple also backwards, under a relation of its own.
        min_user: users with fewer interactions are left out (after duplicates are dropped).
        min_item: items with fewer are left out. Both are repeated until nothing changes.
        split: "ratio" = a share of each user's interactions, drawn; "leave_one_out" = each user's last one is for test,
            the one before for validation (by time, else by order in the file); "time" = the last interactions of all;
            "given" = the data set's own files.
        test: share of the interactions for test ("ratio", "time").
        val: share of them for validation.
        shuffle: seed of the drawn split.
    """

    user_column: str | None = None
    item_column: str | None = None
    time_column: str | None = None
    rating_column: str | None = None
    min_rating: float | None = None
    delimiter: str | None = None
    graph: str | None = None
    links: str | None = None
    inverse: bool = True
    min_user: int = 1
    min_item: int = 1
    split: Literal["ratio", "leave_one_out", "time", "given"] = "ratio"
    test: float = 0.2
    val: float = 0.1
    shuffle: int = 0


@dataclass(kw_only=True)
class ItemsTaskConfig:
    """How rankings are trained and scored.

    Attributes:
        k: lengths of the lists that are scored.
        negatives: items drawn for each interaction in training, none of which the user had in training.
        sampled: score against this many drawn items a user instead of all of them; figures are then named so. 0 = all.
        groups: users are also scored in this many groups of equal size by how active they were in training.
    """

    k: tuple[int, ...] = (10, 20)
    negatives: int = 1
    sampled: int = 0
    groups: int = 4


@dataclass(kw_only=True)
class ItemsPredictOptions:
    """How recommendations are made.

    Attributes:
        k: items a user.
        hide: items that are not recommended: "all" that the user had in the data, "train" = what the model was trained
            with only (so that items held out for test can come back), "none".
        paths: ways through the graph shown for each item, by models that know them; 0 = none.
        history: table of what further users had (columns user and item); their vectors are fitted to it where the model
            allows.
    """

    k: int = 10
    hide: Literal["all", "train", "none"] = "all"
    paths: int = 1
    history: str | None = None
