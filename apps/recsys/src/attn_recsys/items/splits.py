"""Which interactions are for training, validation and test. Drawn splits follow from `shuffle` alone."""

from __future__ import annotations

import numpy as np

from attn_recsys.items.corpus import Interactions
from attn_recsys.items.options import ItemsDataConfig
from attn_shared.errors import UserError

TRAIN, VAL, TEST = 0, 1, 2


def split(data: Interactions, args: ItemsDataConfig) -> tuple[np.ndarray, list[str]]:
    """(N,) int8 part of each interaction, and what must be said about it."""
    if min(args.val, args.test) < 0 or args.val + args.test >= 1:
        raise UserError(
            f"data_args.val {args.val:g} and data_args.test {args.test:g} must be 0 or more and below 1 together"
        )
    if args.split == "given":
        return _given(data, args)
    if args.split == "time":
        return _by_time(data, args)
    notes: list[str] = []
    if args.split == "leave_one_out":
        if data.time is None:
            notes.append("there are no times, so a user's last interaction is the last one in the file")
        part = _tails(data.user, np.arange(len(data.user)), len(data.users), _last_two)
        short = int((np.bincount(data.user, minlength=len(data.users)) < 3).sum())
        if short:
            notes.append(f"{short:,} users have fewer than three interactions, so they lack a validation or test one")
        return part, notes
    key = np.random.default_rng([args.shuffle, 0]).permutation(len(data.user))
    return _tails(data.user, key, len(data.users), lambda n: shares(n, args.val, args.test)), notes


def shares(counts: np.ndarray, val: float, test: float) -> tuple[np.ndarray, np.ndarray]:
    """(U,) numbers of validation and test interactions of users with `counts` in all.

    Shares are rounded down, but one where it would be none, test first, as long as two are left for training; so
    RecBole counts them, too.
    """
    tests, vals = np.floor(counts * test + 1e-9).astype(np.int64), np.floor(counts * val + 1e-9).astype(np.int64)
    for part, share in ((tests, test), (vals, val)):
        if share > 0:
            part += (part == 0) & (counts - tests - vals > 1)
    return vals, tests


def _last_two(counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return (counts > 2).astype(np.int64), (counts > 1).astype(np.int64)


def _tails(user: np.ndarray, key: np.ndarray, users: int, numbers: object) -> np.ndarray:
    """The last ones of each user, by `key`, are for test, those before them for validation."""
    assert callable(numbers)
    counts = np.bincount(user, minlength=users)
    vals, tests = numbers(counts)
    order = np.lexsort((key, user))
    start = np.cumsum(counts) - counts
    place = np.arange(len(user)) - start[user[order]]
    left = (counts[user[order]] - place).astype(np.int64)  # 1 = the user's last
    part = np.full(len(user), TRAIN, np.int8)
    part[order[left <= (vals + tests)[user[order]]]] = VAL
    part[order[left <= tests[user[order]]]] = TEST
    return part


def _by_time(data: Interactions, args: ItemsDataConfig) -> tuple[np.ndarray, list[str]]:
    if data.time is None:
        raise UserError("the split by time needs times: name their column with --data_args.time_column")
    part = np.full(len(data.user), TRAIN, np.int8)
    times = np.sort(data.time)
    count = len(times)
    # What happened at one moment stays on one side.
    first_val = times[min(count - 1, round(count * (1 - args.test - args.val)))]
    first_test = times[min(count - 1, round(count * (1 - args.test)))]
    if args.val:
        part[data.time >= first_val] = VAL
    if args.test:
        part[data.time >= first_test] = TEST
    if not (part == TRAIN).any():
        raise UserError("all interactions have one time, so they cannot be split by time")
    return part, []


def _given(data: Interactions, args: ItemsDataConfig) -> tuple[np.ndarray, list[str]]:
    if data.part is None:
        raise UserError("the data has no split of its own (train.txt and test.txt); choose another --data_args.split")
    part = data.part.copy()
    if (part == VAL).any() or args.val == 0:
        return part, []
    rows = np.flatnonzero(part == TRAIN)
    key = np.random.default_rng([args.shuffle, 0]).permutation(len(rows))
    part[rows] = _tails(data.user[rows], key, len(data.users), lambda n: shares(n, args.val, 0.0))
    return part, [f"the data has no validation file, so {args.val:.0%} of each user's training interactions serve"]
