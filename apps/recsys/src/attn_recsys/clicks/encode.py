"""From names and numbers to what models read. Everything is fitted on training rows alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from attn_recsys.clicks.splits import origins
from attn_recsys.clicks.table import Lists, Table
from attn_recsys.models.clicks import ClicksShape, Vocabulary
from attn_shared.errors import UserError

PADDING, UNKNOWN = 0, 1
FIRST = 2
"""The number of the first known name."""


@dataclass(frozen=True, kw_only=True)
class Encoded:
    """Rows as numbers.

    Attributes:
        names: (N, F) int64, the fields with one name a row.
        many: field -> (start (N + 1,), number) of the names of each row; unknown and missing ones are left out.
        past: the same of the user's earlier items, unknown ones kept; None where there are none.
        of_item: attribute of the item -> by the number of an item, its number (I,) or numbers (I, W), padded with 0.
        numbers: (N, M) float32, standardised; missing = 0, the mean of training.
    """

    names: np.ndarray
    many: dict[str, tuple[np.ndarray, np.ndarray]]
    past: tuple[np.ndarray, np.ndarray] | None
    of_item: dict[str, np.ndarray]
    numbers: np.ndarray


class Encoder:
    """Vocabularies and scalers of a table's training rows.

    Args:
        state: what `fit` made and a checkpoint keeps: plain lists, strings and numbers.
    """

    def __init__(self, state: Mapping[str, Any]) -> None:
        self.state = dict(state)
        self._number = {
            field["name"]: {name: FIRST + i for i, name in enumerate(field["names"])} for field in state["fields"]
        }

    @property
    def shape(self) -> ClicksShape:
        """What models are built for."""
        return ClicksShape(
            fields=tuple(
                Vocabulary(name=field["name"], size=FIRST + len(field["names"]), many=field["many"])
                for field in self.state["fields"]
            ),
            numeric=tuple(one["name"] for one in self.state["numeric"]),
            item=self.state["item"],
            user=self.state["user"],
            behaviour=tuple(self.state["behaviour"]),
        )

    @property
    def single(self) -> list[str]:
        """Fields with one name a row, in order."""
        return [field["name"] for field in self.state["fields"] if not field["many"]]

    @property
    def lists(self) -> list[str]:
        """Fields with several names a row, in order."""
        return [field["name"] for field in self.state["fields"] if field["many"]]

    @classmethod
    def fit(cls, table: Table, rows: np.ndarray, *, min_count: int = 1, max_length: int = 50) -> Encoder:
        """Vocabularies, means and deviations of `rows`.

        The vocabulary of the item also counts its names in the past of those rows, which lies before them. What the
        attributes of an item are is taken from the whole table, for the items of the vocabulary.

        Raises:
            UserError: options out of their range, or a column without a number in training.
        """
        if min_count < 1:
            raise UserError(f"--data_args.min_count must be 1 or more, got {min_count}")
        if max_length < 1:
            raise UserError(f"--data_args.max_length must be 1 or more, got {max_length}")
        train = table.take(rows)
        fields = []
        for name, column in train.single.items():
            counts = np.bincount(column.code[column.code >= 0], minlength=len(column.names))
            found = dict(zip(column.names, counts.tolist()))
            if name == train.item and train.past is not None:
                past = train.past
                more = np.bincount(past.code[past.code >= 0], minlength=len(past.names)).tolist()
                for word, count in zip(past.names, more):
                    found[word] = found.get(word, 0) + count
            fields.append({"name": name, "many": False, "names": _kept(found, min_count)})
        for name, several in train.many.items():
            counts = np.bincount(several.code[several.code >= 0], minlength=len(several.names))
            kept = _kept(dict(zip(several.names, counts.tolist())), min_count)
            fields.append({"name": name, "many": True, "names": kept})
        numeric = []
        for name, values in train.numeric.items():
            known = values[np.isfinite(values)]
            if not len(known):
                raise UserError(f"column {name!r} has no number in the training rows; leave it out")
            deviation = float(known.std())
            numeric.append({"name": name, "mean": float(known.mean()), "std": deviation if deviation > 0 else 1.0})
        return cls(
            {
                "fields": fields,
                "numeric": numeric,
                "item": table.item,
                "user": table.user if table.user in table.single else None,
                "behaviour": [table.item, *table.item_columns] if table.past is not None else [],
                "attributes": _attributes(table, fields) if table.past is not None else {},
                "max_length": max_length,
            }
        )

    def encode(self, table: Table) -> Encoded:
        """The rows of a table that has these columns.

        Raises:
            UserError: a column is missing.
        """
        have = {*table.single, *table.many, *table.numeric}
        wanted = [*self.single, *self.lists, *(one["name"] for one in self.state["numeric"])]
        missing = [name for name in wanted if name not in have]
        if self.state["behaviour"] and table.past is None:
            missing.append("the users' earlier items")
        if missing:
            raise UserError(f"{table.name} lacks what the model was trained with: {', '.join(missing)}")
        columns = []
        for name in self.single:
            column = table.single[name]
            number = np.array([*(self._number[name].get(word, UNKNOWN) for word in column.names), PADDING], np.int64)
            columns.append(number[column.code])  # -1, missing, is the last one
        numbers = [(table.numeric[one["name"]] - one["mean"]) / one["std"] for one in self.state["numeric"]]
        dense = np.stack(numbers, axis=1) if numbers else np.empty((table.rows, 0))
        return Encoded(
            names=np.stack(columns, axis=1) if columns else np.empty((table.rows, 0), np.int64),
            many={name: self._list(table.many[name], name, drop=True) for name in self.lists},
            past=_last(*self._list(table.past, self.state["item"], drop=False), self.state["max_length"])
            if self.state["behaviour"] and table.past is not None
            else None,
            of_item={name: self._of_item(name) for name in self.state["behaviour"][1:]},
            numbers=np.where(np.isfinite(dense), dense, 0.0).astype(np.float32),
        )

    def _of_item(self, name: str) -> np.ndarray:
        """Numbers of an attribute by the number of an item."""
        known, rows = self._number[name], self.state["attributes"][name]
        if name in self.single:
            return np.array([PADDING, UNKNOWN, *(known.get(words[0], UNKNOWN) if words else PADDING for words in rows)])
        numbers = [[], [], *([known[word] for word in words if word in known] for words in rows)]
        made = np.zeros((len(numbers), max(1, *map(len, numbers))), np.int64)
        for i, row in enumerate(numbers):
            made[i, : len(row)] = row
        return made

    def attribute_width(self, name: str) -> int | None:
        """W of `past.<name>` (B, L, W); None where it is (B, L)."""
        if name in self.single:
            return None
        return int(self._of_item(name).shape[1])

    def unknown(self, encoded: Encoded) -> dict[str, float]:
        """Share of rows whose name training did not have, by field."""
        return {name: float((encoded.names[:, i] == UNKNOWN).mean()) for i, name in enumerate(self.single)}

    def _list(self, column: Lists, field: str, *, drop: bool) -> tuple[np.ndarray, np.ndarray]:
        number = np.array([*(self._number[field].get(word, UNKNOWN) for word in column.names), UNKNOWN], np.int64)
        found = number[column.code]
        if not drop:
            return column.start, found
        keep = found >= FIRST
        begin = np.concatenate([[0], np.cumsum(keep)]).astype(np.int64)
        return begin[column.start], found[keep]


def _attributes(table: Table, fields: Sequence[Mapping[str, Any]]) -> dict[str, list[list[str]]]:
    """Attribute -> the names that each item of the vocabulary has in it."""
    assert table.item is not None
    items = next(field["names"] for field in fields if field["name"] == table.item)
    place = {name: row for name, row in zip(table.single[table.item].names, origins(table).tolist()) if row >= 0}
    found: dict[str, list[list[str]]] = {}
    for name in table.item_columns:
        rows = [place.get(item, -1) for item in items]
        if name in table.single:
            one = table.single[name]
            found[name] = [[one.names[one.code[row]]] if row >= 0 and one.code[row] >= 0 else [] for row in rows]
        else:
            many = table.many[name]
            spans = [many.code[many.start[row] : many.start[row + 1]].tolist() if row >= 0 else [] for row in rows]
            found[name] = [[many.names[code] for code in span if code >= 0] for span in spans]
    return found


def _kept(counts: Mapping[str, int], least: int) -> list[str]:
    """Names seen often enough, the frequent ones first, equal ones by letter."""
    return sorted((name for name, count in counts.items() if count >= least), key=lambda name: (-counts[name], name))


def _last(start: np.ndarray, number: np.ndarray, most: int) -> tuple[np.ndarray, np.ndarray]:
    """The last `most` of each row."""
    counts = np.diff(start)
    if counts.max(initial=0) <= most:
        return start, number
    kept = np.minimum(counts, most)
    begin = np.concatenate([[0], np.cumsum(kept)]).astype(np.int64)
    return begin, number[np.arange(begin[-1]) + np.repeat(start[1:] - kept - begin[:-1], kept)]
