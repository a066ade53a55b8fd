"""From a table to what is trained on and scored.

Splits, drawn rows, vocabularies and scalers: nothing of validation and test reaches training.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor
from torch.utils.data import Dataset

from attn_recsys.clicks.cards import DATASETS
from attn_recsys.clicks.encode import FIRST, Encoded, Encoder
from attn_recsys.clicks.options import ClicksDataConfig
from attn_recsys.clicks.splits import TEST, TRAIN, VAL, Absent, origins, split, with_negatives
from attn_recsys.clicks.table import Lists, Table, gather
from attn_recsys.items.data import draws
from attn_recsys.models.clicks import ClicksShape
from attn_shared import datasets
from attn_shared.errors import UserError
from attn_shared.seeding import derive

_TELLING = 0.995  # AUC of a column alone from which it is suspected of knowing the outcome


def load_table(name: str, args: ClicksDataConfig, state: Mapping[str, Any] | None = None) -> Table:
    """A data set by name, or a file of the user's own.

    Args:
        state: of a checkpoint; the columns of a file are then read as those that the model was trained with.
    """
    from attn_recsys.clicks import readers

    if name not in DATASETS:
        if state is not None:
            args = dataclasses.replace(args, **state["columns"])
        return readers.read_table(Path(name).expanduser(), args)
    if args.multi or args.numeric or args.categorical or args.sequence:
        raise UserError(f"{name} has its own columns; --data_args.categorical and the like are for files of your own")
    if name == "synthetic_clicks":
        from attn_recsys.clicks.synthetic import synthetic_clicks

        return synthetic_clicks()
    if name == "amazon_beauty" and args.split == "random":
        raise UserError(
            "rows of amazon_beauty hold what a reviewer had before, so drawn rows would show training what test asks "
            "for; take --data_args.split leave_one_out (or user)"
        )
    folder = datasets.locate(DATASETS[name]) / DATASETS[name].files[0].path.split("/")[0]
    if name == "amazon_beauty":
        from attn_recsys.clicks.beauty import read_beauty

        return read_beauty(folder)
    return readers.read_frappe(folder)


# -- data sets --------------------------------------------------------------------------------------------------------


class ClicksSet(Dataset[dict[str, Tensor]]):
    """Rows of a split. A batch is what `ClickModel` takes, with `index`, `user` and `activity` beside it for scores.

    Lists are padded to the longest of the batch, one at least: `many.<field>` at the end, `past.<field>` at the start.
    Where an attribute of the item holds several names, its `past.<field>` is (B, L, W), padded at the end of W.

    Args:
        encoded: all rows.
        rows: (N,) those of the split.
        label: (all rows,).
        user: (all rows,) number of the user, a row of its own where there are none.
        activity: (all rows,) how much behaviour the row's user had in training.
        item: name of the field of items.
    """

    def __init__(
        self,
        encoded: Encoded,
        rows: np.ndarray,
        *,
        label: np.ndarray,
        user: np.ndarray,
        activity: np.ndarray,
        item: str | None,
    ) -> None:
        self.names = encoded.names[rows]
        self.numbers = encoded.numbers[rows]
        self.many = {name: _taken(*value, rows) for name, value in encoded.many.items()}
        self.past = None if encoded.past is None else _taken(*encoded.past, rows)
        self.item, self.of_item = item, encoded.of_item
        self.label = label[rows].astype(np.float32)
        self.user, self.activity = user[rows], activity[rows]

    def __len__(self) -> int:
        return len(self.label)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {name: value[0] for name, value in self.__getitems__([index]).items()}

    def __getitems__(self, indices: Sequence[int]) -> dict[str, Tensor]:
        index = np.asarray(indices, np.int64)
        batch = {
            "names": self.names[index],
            "numbers": self.numbers[index],
            "label": self.label[index],
            "index": index,
            "user": self.user[index],
            "activity": self.activity[index],
        }
        batch |= {f"many.{name}": padded(*value, index) for name, value in self.many.items()}
        if self.past is not None:
            past = padded(*self.past, index, front=True)
            batch[f"past.{self.item}"] = past
            batch |= {f"past.{name}": lookup[past] for name, lookup in self.of_item.items()}
        return {name: torch.from_numpy(np.ascontiguousarray(value)) for name, value in batch.items()}


class DrawnSet(ClicksSet):
    """Training rows whose drawn ones are drawn anew in each epoch.

    What is drawn follows from seed, epoch and row, so neither batches nor processes change it. Before the first epoch,
    and in the arrays, all is as the table has it.

    Args:
        rows, label: as in `ClicksSet`.
        table: with drawn rows behind each click.
        absent: of the clicks alone.
        encoder: of the encoded rows.
    """

    def __init__(
        self,
        encoded: Encoded,
        rows: np.ndarray,
        *,
        label: np.ndarray,
        user: np.ndarray,
        activity: np.ndarray,
        table: Table,
        absent: Absent,
        encoder: Encoder,
    ) -> None:
        super().__init__(encoded, rows, label=label, user=user, activity=activity, item=table.item)
        self._absent = absent
        self._drawn = np.flatnonzero(label[rows] == 0)
        # The number of the click that each of them stands behind.
        self._click = (np.cumsum(label > 0) - 1)[rows[self._drawn]]
        # Every item once, with what follows from it.
        assert table.item is not None
        items = table.take(np.maximum(origins(table), 0))
        column = table.single[table.item]
        one = dataclasses.replace(column, code=np.arange(len(column.names)))
        found = encoder.encode(dataclasses.replace(items, single={**items.single, table.item: one}))
        following = (table.item, *table.item_columns)
        self._columns = [i for i, name in enumerate(encoder.single) if name in following]
        self._of_drawn = found.names[:, self._columns]
        self._lists = {
            name: (np.concatenate([start, start[-1] + more[1:]]), np.concatenate([number, names]))
            for name, (start, number) in self.many.items()
            for more, names in [found.many[name]]
            if name in following
        }
        self._names, self._place = self.names, np.arange(len(self))

    def set_epoch(self, seed: int, epoch: int) -> None:
        chance = draws(derive(seed, "clicks"), epoch, self._drawn, 1)[:, 0]
        item = self._absent.drawn(self._click, chance)
        self._names, self._place = self.names.copy(), np.arange(len(self))
        self._names[self._drawn[:, None], self._columns] = self._of_drawn[item]
        self._place[self._drawn] = len(self) + item

    def __getitems__(self, indices: Sequence[int]) -> dict[str, Tensor]:
        batch, index = super().__getitems__(indices), np.asarray(indices, np.int64)
        batch["names"] = torch.from_numpy(self._names[index])
        for name, value in self._lists.items():
            batch[f"many.{name}"] = torch.from_numpy(padded(*value, self._place[index]))
        return batch


def _taken(start: np.ndarray, number: np.ndarray, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    begin, place = gather(start, rows)
    return begin, number[place]


def padded(start: np.ndarray, number: np.ndarray, rows: np.ndarray, *, front: bool = False) -> np.ndarray:
    """(B, W) int64 ragged rows, 0 behind the last number, or before the first."""
    counts = np.diff(start)[rows]
    width = max(1, int(counts.max(initial=0)))
    column = np.arange(width)
    filled = column >= width - counts[:, None] if front else column < counts[:, None]
    found = np.zeros((len(rows), width), np.int64)
    found[filled] = number[gather(start, rows)[1]]
    return found


# -- everything together ----------------------------------------------------------------------------------------------


@dataclass(kw_only=True)
class Prepared:
    """A table, split and encoded.

    Attributes:
        table: drawn rows included.
        part: (N,) of its rows.
        encoder, encoded: fitted on the training rows, or on those of the checkpoint.
        train, val, test: None where there is nothing.
        state: what a checkpoint keeps.
        facts, protocol: for the report.
    """

    table: Table
    part: np.ndarray
    encoder: Encoder
    encoded: Encoded
    train: ClicksSet
    val: ClicksSet | None
    test: ClicksSet | None
    state: dict[str, Any]
    facts: dict[str, Any] = field(default_factory=dict)
    protocol: str = ""


def prepare(table: Table, args: ClicksDataConfig, state: Mapping[str, Any] | None = None) -> Prepared:
    """Split, draw, encode. With a checkpoint's `state`, vocabularies and scalers are its own."""
    part = split(table, args)
    notes = [*table.notes, *repeated(table, part)]
    drawn = args.negatives or table.negatives
    absent = None
    if table.label is None:
        if drawn < 1:
            raise UserError("every row is a click; draw others with --data_args.negatives 2")
        clicks, among = table, part
        table, part, found = with_negatives(clicks, among, dataclasses.replace(args, negatives=drawn))
        absent = Absent(clicks, among, TRAIN) if args.redraw else None
        notes += found
    elif args.negatives:
        raise UserError("the table has labels, so --data_args.negatives must be 0")
    else:
        drawn = 0
    assert table.label is not None
    rows = {number: np.flatnonzero(part == number) for number in (TRAIN, VAL, TEST)}
    label = table.label
    if label[rows[TRAIN]].min() == label[rows[TRAIN]].max():
        raise UserError(f"all training rows have the label {int(label[rows[TRAIN]][0])}; both are needed to learn from")
    if state is None:
        encoder = Encoder.fit(table, rows[TRAIN], min_count=args.min_count, max_length=args.max_length)
        kept = {**encoder.state, **_columns(table, args)}
    else:
        encoder, kept = Encoder(state), dict(state)
    encoded = encoder.encode(table)
    known = table.users()
    user = np.unique(known, return_inverse=True)[1] if known is not None else np.arange(table.rows)
    activity = _activity(table, user, part)

    def made(chosen: np.ndarray) -> ClicksSet:
        return ClicksSet(encoded, chosen, label=label, user=user, activity=activity, item=table.item)

    if absent is None:
        train = made(rows[TRAIN])
    else:
        train = DrawnSet(
            *(encoded, rows[TRAIN]),
            label=label,
            user=user,
            activity=activity,
            table=table,
            absent=absent,
            encoder=encoder,
        )
    val, test = (made(rows[number]) if len(rows[number]) else None for number in (VAL, TEST))
    if len(rows[TEST]):
        shares = encoder.unknown(_rows(encoded, rows[TEST]))
        notes += [
            f"{share:.1%} of the test rows have a name of {name} that training did not have"
            for name, share in shares.items()
            if share >= 0.001
        ]
    notes += telling(table, rows[TRAIN])
    facts: dict[str, Any] = {
        "rows: training, validation, test": " / ".join(f"{len(chosen):,}" for chosen in rows.values()),
        "share of clicks": " / ".join(f"{label[one].mean():.3f}" if len(one) else "-" for one in rows.values()),
        "fields": ", ".join(_described(encoder.shape)),
    }
    if known is not None:
        facts["users"] = len(np.unique(known))
    facts |= {f"note {i + 1}": note for i, note in enumerate(notes)}
    return Prepared(
        table=table,
        part=part,
        encoder=encoder,
        encoded=encoded,
        train=train,
        val=val,
        test=test,
        state=kept,
        facts=facts,
        protocol=protocol(args, drawn, known is not None),
    )


def _rows(encoded: Encoded, rows: np.ndarray) -> Encoded:
    return dataclasses.replace(encoded, names=encoded.names[rows])


def _described(shape: ClicksShape) -> list[str]:
    return [
        *(f"{one.name} ({one.size - FIRST:,} names{', several a row' if one.many else ''})" for one in shape.fields),
        *(f"{name} (number)" for name in shape.numeric),
        *(f"past {name}" for name in shape.behaviour),
    ]


def _columns(table: Table, args: ClicksDataConfig) -> dict[str, Any]:
    """How the columns are read again: by `load_table` with a state, and for prediction."""
    fields = [name for name in table.single if name not in (table.user, table.item)]
    return {
        "columns": {
            "categorical": fields,
            "multi": list(table.many) or None,
            "numeric": list(table.numeric),
            "sequence": args.sequence,
            "user_column": table.user,
            "item_column": table.item,
        },
        "sequence": args.sequence,
    }


def _activity(table: Table, user: np.ndarray, part: np.ndarray) -> np.ndarray:
    """(N,) earlier items of the row where there are such, else the clicks that its user has in training."""
    if table.past is not None:
        return np.asarray(np.diff(table.past.start), np.int64)
    assert table.label is not None
    clicks = np.bincount(user, weights=table.label * (part == TRAIN), minlength=int(user.max()) + 1)
    return np.asarray(clicks[user], np.int64)


def protocol(args: ClicksDataConfig, drawn: int, users: bool) -> str:
    """One sentence: how was split and what was scored."""
    how = {
        "random": f"rows drawn, {1 - args.val - args.test:.0%} / {args.val:.0%} / {args.test:.0%}",
        "user": f"users drawn, {1 - args.val - args.test:.0%} / {args.val:.0%} / {args.test:.0%}, all rows of one on "
        "one side",
        "time": f"by time, the last {args.test:.0%} of the rows for test, {args.val:.0%} before for validation",
        "leave_one_out": "each user's last click for test, the one before for validation",
        "given": "the data's own split",
    }[args.split]
    rows = (
        f"SAMPLED: each click beside {drawn} drawn items that its user does not have (so far: training knows training "
        f"only){', those of training anew in each epoch' if args.redraw else ''}, so probabilities are those of this "
        "mixture"
        if drawn
        else "every impression scored"
    )
    means = "; gauc = mean AUC of users with both labels, weighted by their rows" if users else ""
    return f"{how[0].upper()}{how[1:]} (shuffle {args.shuffle}); {rows}{means}"


# -- what is suspicious -----------------------------------------------------------------------------------------------


def repeated(table: Table, part: np.ndarray) -> list[str]:
    """Rows that occur again: in the table, and of training in test."""
    frame = {f"s {name}": column.code for name, column in table.single.items()}
    frame |= {f"n {name}": values for name, values in table.numeric.items()}
    frame |= {f"l {name}": _hashes(column) for name, column in table.many.items()}
    if table.past is not None:
        frame["past"] = _hashes(table.past)
    if not frame:
        return []
    keys = pd.util.hash_pandas_object(pd.DataFrame(frame), index=False).to_numpy()
    distinct, number = np.unique(keys, return_inverse=True)
    notes = []
    again = table.rows - len(distinct)
    if again:
        text = f"{again:,} rows repeat another one in all fields"
        if table.label is not None:
            both = np.bincount(number, weights=table.label)
            counts = np.bincount(number)
            mixed = int(((both > 0) & (both < counts)).sum())
            text += f"; {mixed:,} sets of equal rows have both labels" if mixed else ""
        notes.append(text)
        test = part == TEST
        leaked = int(np.isin(number[test], number[part == TRAIN]).sum())
        if leaked:
            notes.append(f"LEAK: {leaked:,} of {int(test.sum()):,} test rows equal a training row in all fields")
    users = table.users()
    if users is not None and table.item is not None and (part == TEST).any():
        clicked = np.ones(table.rows, bool) if table.label is None else table.label > 0
        pair = np.unique(np.stack([users, table.single[table.item].code]), axis=1, return_inverse=True)[1].ravel()
        test = clicked & (part == TEST)
        share = float(np.isin(pair[test], pair[clicked & (part == TRAIN)]).mean()) if test.any() else 0.0
        if share >= 0.01:
            notes.append(f"{share:.0%} of the test clicks are of a user and an item that training has together, too")
    return notes


def _hashes(column: Lists) -> np.ndarray:
    rows = [hash(tuple(column.code[a:b].tolist())) for a, b in zip(column.start[:-1], column.start[1:])]
    return np.array(rows, np.int64)


def telling(table: Table, rows: np.ndarray) -> list[str]:
    """Columns that alone tell the label of training rows nearly without fault: were they known before the click?"""
    from attn_recsys.clicks.metrics import auc

    assert table.label is not None
    label = table.label[rows]
    notes = []
    columns = {name: np.nan_to_num(values[rows]) for name, values in table.numeric.items()}
    for name, column in table.single.items():
        code = column.code[rows] + 1
        counts = np.bincount(code)
        if len(counts) <= 0.01 * len(rows):
            columns[name] = (np.bincount(code, weights=label) / np.maximum(1, counts))[code]
    for name, values in columns.items():
        found = auc(values, label)
        if max(found, 1 - found) >= _TELLING:
            notes.append(
                f"LEAK? column {name} alone tells the label (AUC {max(found, 1 - found):.3f}): leave it out if it is "
                "known only after the click"
            )
    return notes
