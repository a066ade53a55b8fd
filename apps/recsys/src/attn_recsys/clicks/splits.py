"""Which rows are for training, validation and test, and rows drawn where a table holds clicks alone."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from attn_recsys.clicks.options import ClicksDataConfig
from attn_recsys.clicks.table import Lists, Names, Table
from attn_recsys.items.data import Pairs, draws
from attn_shared.errors import UserError
from attn_shared.seeding import derive

TRAIN, VAL, TEST = 0, 1, 2


def split(table: Table, args: ClicksDataConfig) -> np.ndarray:
    """(N,) int8 part of each row; drawn ones follow from `shuffle` alone.

    Raises:
        UserError: shares that are none, or a split that the table has no columns for.
    """
    if min(args.val, args.test) < 0 or args.val + args.test >= 1:
        raise UserError(
            f"data_args.val {args.val:g} and data_args.test {args.test:g} must be 0 or more and below 1 together"
        )
    part = {
        "random": _random,
        "user": _by_user,
        "time": _by_time,
        "leave_one_out": _leave_one_out,
        "given": _given,
    }[args.split](table, args)
    if not (part == TRAIN).any():
        raise UserError("the split leaves no row for training; lower --data_args.test and --data_args.val")
    return part


def _shares(count: int, args: ClicksDataConfig) -> tuple[int, int]:
    """Where validation and test begin among `count` in order."""
    test = round(count * (1 - args.test))
    return min(test, round(count * (1 - args.test - args.val))), test


def _random(table: Table, args: ClicksDataConfig) -> np.ndarray:
    order = np.random.default_rng([args.shuffle, 0]).permutation(table.rows)
    return _cut(order, table.rows, args)


def _cut(order: np.ndarray, count: int, args: ClicksDataConfig) -> np.ndarray:
    part = np.full(count, TRAIN, np.int8)
    val, test = _shares(count, args)
    part[order[val:test]], part[order[test:]] = VAL, TEST
    return part


def _by_user(table: Table, args: ClicksDataConfig) -> np.ndarray:
    users = _users(table, "user")
    distinct, number = np.unique(users, return_inverse=True)
    order = np.random.default_rng([args.shuffle, 1]).permutation(len(distinct))
    return _cut(order, len(distinct), args)[number]


def _by_time(table: Table, args: ClicksDataConfig) -> np.ndarray:
    if table.time is None:
        raise UserError("the split by time needs times: name their column with --data_args.time_column")
    part = np.full(table.rows, TRAIN, np.int8)
    times = np.sort(table.time)
    val, test = _shares(len(times), args)
    # What happened at one moment stays on one side.
    if args.val:
        part[table.time >= times[min(len(times) - 1, val)]] = VAL
    if args.test:
        part[table.time >= times[min(len(times) - 1, test)]] = TEST
    return part


def _leave_one_out(table: Table, args: ClicksDataConfig) -> np.ndarray:
    """Rows from behind a user's click before last on are for test, those from behind the one before that on for
    validation. So what was shown before a click stays with it. Users with fewer than three clicks only train."""
    users = _users(table, "leave_one_out")
    label = np.ones(table.rows) if table.label is None else table.label
    order = np.lexsort((np.arange(table.rows), np.zeros(table.rows) if table.time is None else table.time, users))
    user, click = users[order], label[order] > 0
    first = np.searchsorted(user, user, side="left")
    earlier = np.concatenate([[0], np.cumsum(click)[:-1]])
    before = earlier - earlier[first]  # clicks of the user before the row
    number = np.unique(user, return_inverse=True)[1]
    clicks = np.bincount(number, weights=click)[number]
    part = np.full(table.rows, TRAIN, np.int8)
    enough = clicks >= 3
    part[order[enough & (before >= clicks - 2)]] = VAL
    part[order[enough & (before >= clicks - 1)]] = TEST
    return part


def _given(table: Table, args: ClicksDataConfig) -> np.ndarray:
    if table.part is None:
        raise UserError("the table has no split of its own (a column `split`); choose another --data_args.split")
    return table.part.copy()


def _users(table: Table, split: str) -> np.ndarray:
    users = table.users()
    if users is None:
        raise UserError(f"the split {split!r} needs users: name their column with --data_args.user_column")
    return users


# -- drawn rows -------------------------------------------------------------------------------------------------------


def with_negatives(table: Table, part: np.ndarray, args: ClicksDataConfig) -> tuple[Table, np.ndarray, list[str]]:
    """The table with `negatives` rows behind each click, their label 0 and their item another; parts; notes.

    For a row of training, the item is uniform over the items of training that the user does not have in training; in
    validation over the items of training and validation that he has in neither; in test over all items that he never
    has. So neither what training sees nor what validation sees tells what the later parts hold. Columns that follow
    from the item come with it. Users who have every item get none.
    """
    if table.label is not None:
        raise UserError("the table has labels, so --data_args.negatives must be 0")
    if table.item is None or table.users() is None:
        raise UserError(
            "drawing rows that were not clicked needs users and items: name their columns with "
            "--data_args.user_column and --data_args.item_column"
        )
    items = table.single[table.item]
    if (items.code < 0).any():
        raise UserError(f"column {table.item!r} lacks the item of {int((items.code < 0).sum()):,} rows")
    rows, drawn = [], []
    short = 0
    for number in (TRAIN, VAL, TEST):
        chosen = np.flatnonzero(part == number)
        if not len(chosen):
            continue
        absent = Absent(table, part, number)
        free = absent.free[chosen]
        short += int((free == 0).sum())
        chosen = chosen[free > 0]
        chance = draws(derive(args.shuffle, "negatives", number), 0, chosen, args.negatives)
        again = np.repeat(chosen, args.negatives)
        rows.append(again)
        drawn.append(absent.drawn(again, chance.ravel()))
    notes = [f"{short:,} clicks of users who have every item got no drawn rows"] if short else []
    return *_joined(table, part, np.concatenate(rows), np.concatenate(drawn)), notes


class Absent:
    """The items that each row's user does not have in a part or those before it, among the items of these parts.

    Args:
        table: clicks alone, with users and items.
        part: (N,) of its rows.
        number: the last part that is known.

    Attributes:
        free: (N,) how many there are for the user of each row.
    """

    def __init__(self, table: Table, part: np.ndarray, number: int) -> None:
        users = table.users()
        assert users is not None
        assert table.item is not None
        owners, self._user = np.unique(users, return_inverse=True)
        items = table.single[table.item]
        had_user, had_item, had_part = self._user, items.code, part
        if table.past is not None:
            past = table.past
            known = {name: i for i, name in enumerate(items.names)}
            code = np.array([known.get(name, -1) for name in past.names], np.int64)[past.code]
            counts = np.diff(past.start)
            here = code >= 0
            had_user = np.concatenate([had_user, np.repeat(self._user, counts)[here]])
            had_item = np.concatenate([had_item, code[here]])
            had_part = np.concatenate([part, np.repeat(part, counts)[here]])
        # Only items that occur so far are drawn; they are numbered anew, closely.
        self._pool = np.unique(items.code[part <= number])
        close = np.full(len(items.names), -1, np.int64)
        close[self._pool] = np.arange(len(self._pool))
        inside = (had_part <= number) & (close[had_item] >= 0)
        self._had = Pairs(had_user[inside], close[had_item[inside]], len(owners), len(self._pool))
        self.free = len(self._pool) - self._had.counts()[self._user]

    def drawn(self, rows: np.ndarray, chance: np.ndarray) -> np.ndarray:
        """(R,) an item for each of `rows`, whose users have one to be drawn, by a number uniform in [0, 1)."""
        free = self.free[rows]
        place = np.minimum((chance * free).astype(np.int64), free - 1)
        return np.asarray(self._pool[self._had.others(self._user[rows], place)])


def origins(table: Table) -> np.ndarray:
    """(I,) the first row of each item, from which its attributes are taken; -1 where there is none."""
    assert table.item is not None
    code = table.single[table.item].code
    found = np.full(len(table.single[table.item].names), -1, np.int64)
    found[code[::-1]] = np.arange(len(code))[::-1]
    return found


def _joined(table: Table, part: np.ndarray, rows: np.ndarray, items: np.ndarray) -> tuple[Table, np.ndarray]:
    origin = origins(table)
    clicks = np.arange(table.rows)
    # Each click, then its drawn rows.
    order = np.argsort(np.concatenate([clicks, rows]), kind="stable")
    source = np.concatenate([clicks, rows])[order]
    label = np.concatenate([np.ones(len(clicks)), np.zeros(len(rows))])[order]
    item = np.concatenate([np.full(len(clicks), -1), items])[order]
    full = replace(table.take(source), label=label)
    attributes = np.where(item >= 0, origin[np.maximum(item, 0)], source)
    single, many = dict(full.single), dict(full.many)
    for name in table.item_columns:
        if name in single:
            single[name] = table.single[name].take(attributes)
        else:
            many[name] = table.many[name].take(attributes)
    assert table.item is not None
    column = table.single[table.item]
    single[table.item] = Names(code=np.where(item >= 0, item, column.code[source]), names=column.names)
    return replace(full, single=single, many=many), part[source]


def follows(item: Names, column: Names | Lists) -> bool:
    """Whether a column follows from the item: all rows of an item have the same, and this says something.

    It says nothing where few items occur twice (fewer than ten), or the column has one value.
    """
    if isinstance(column, Lists):
        words = [b" ".join(map(str.encode, sorted(map(str, row)))) for row in _rows(column)]
        code = np.unique(np.array(words, dtype=object).astype("S"), return_inverse=True)[1]
    else:
        code = column.code + 1
    known = item.code >= 0
    who, what = item.code[known], code[known]
    if len(np.unique(what)) < 2:
        return False
    pairs = np.unique(who * (int(what.max()) + 1) + what)
    repeated = int((np.bincount(who) > 1).sum())
    return repeated >= 10 and len(pairs) == len(np.unique(who))


def _rows(column: Lists) -> list[list[int]]:
    return [column.code[a:b].tolist() for a, b in zip(column.start[:-1], column.start[1:])]
