"""Which windows train, validate and test: what the two sides may share is the whole question of an EEG result.

Everything here follows from names, labels, times and `shuffle`; signals are not looked at.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from attn_eeg.data.options import SPLITS, EegDataConfig
from attn_eeg.data.windows import Meta
from attn_shared.errors import UserError

_GROUPS = {"subject": "subjects", "session": "sessions", "trial": "trials"}


@dataclass(frozen=True)
class Stretch:
    """Seconds [start, stop) of a recording that belong to a part: "train", "val" or "test"."""

    part: str
    start: float
    stop: float


def check(args: EegDataConfig) -> None:
    """Refuse options that name no split."""
    if args.split not in SPLITS:
        raise UserError(f"data_args.split is {args.split!r}; there are: {', '.join(SPLITS)}")
    if args.folds < 0 or args.folds == 1 or (args.folds == 0 and args.split not in _GROUPS):
        kinds = " or ".join(_GROUPS)
        raise UserError(f"data_args.folds is {args.folds}; give at least 2, or with a split by {kinds} 0 for one each")
    if not 0 <= args.val < 1:
        raise UserError(f"data_args.val is {args.val:g}; it must be at least 0 and below 1")
    if args.gap < 0:
        raise UserError(f"data_args.gap is {args.gap:g}; it must not be negative")
    if args.split == "random" and args.train_stride not in (0, args.stride):
        raise UserError(
            "a random split divides one set of windows, so data_args.train_stride cannot differ from data_args.stride"
        )


def group_of(meta: Meta, kind: str) -> np.ndarray:
    """(N,) number of the group of each window, groups sorted by name: subjects, or their sessions, or their trials."""
    names = {"subject": ("subject",), "session": ("subject", "session"), "trial": ("subject", "session", "trial")}
    columns = [np.unique(getattr(meta, name), return_inverse=True)[1] for name in names[kind]]
    return np.asarray(np.unique(np.stack(columns, axis=1), axis=0, return_inverse=True)[1].reshape(-1))


def fold_count(meta: Meta, args: EegDataConfig) -> int:
    """How many folds there are: `folds`, or one a group."""
    if args.folds:
        return args.folds
    return int(group_of(meta, args.split).max(initial=-1)) + 1


def split(meta: Meta, args: EegDataConfig, fold: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Numbers of the training, validation and test windows of a fold.

    Groups go to folds in an order that `shuffle` draws, the largest first, each to the fold that keeps the classes most
    even. With `folds=0` the groups take turns in the order of their names. Validation groups are taken from the
    training groups in the same manner.

    Raises:
        UserError: too few groups, no such fold.
    """
    check(args)
    count = fold_count(meta, args)
    if not 0 <= fold < max(count, 1):
        raise UserError(f"data_args.fold is {fold}; there are {count} folds, counted from 0")
    if args.split == "blocked":
        return _by_time(meta, args, fold)
    if args.split == "random":
        return _at_random(len(meta), args, fold)
    return _by_group(meta, args, fold)


def leaks(args: EegDataConfig, *, constant: bool = False, one_label: str = "") -> str:
    """Why figures of this split say nothing about new recordings; empty where it lets nothing through.

    Args:
        constant: every recording has one label throughout, so that recognising the recording is knowing its label.
        one_label: "subject" or "session" where each of them has one label in all its recordings.
    """
    if args.split == "random":
        overlap = max(0.0, 1 - args.stride / args.window)
        share = f", which overlap by {overlap:.0%}," if overlap > 0 else ""
        return (
            f"random split of windows{share} puts pieces of the same recordings into training and test: a model that "
            "recognises the recording scores high and has learnt nothing of the class"
        )
    if args.split == "blocked" and constant:
        return (
            "every recording has one label and lies on both sides of this split: a model that recognises the recording "
            "scores high and has learnt nothing of the class"
        )
    if args.split in {"subject": ("trial", "session"), "session": ("trial",)}.get(one_label, ()):
        return (
            f"every {one_label} has one label and is on both sides of this split: a model that recognises the "
            f"{one_label} scores high and has learnt nothing of the class"
        )
    return ""


def blocks(duration: float, args: EegDataConfig, fold: int) -> list[Stretch]:
    """The stretches of a recording in a split by time, `gap` seconds between parts; empty ones are left out.

    The recording is cut into `folds` equal stretches; the fold's is the test part. The longer of the two sides gives
    `val` of what remains to validation, next to the test part.
    """
    first, last = duration * fold / args.folds, duration * (fold + 1) / args.folds
    before, after = max(0.0, first - args.gap), max(0.0, duration - last - args.gap)
    held = args.val * (before + after)
    found = [Stretch("test", first, last)]
    if before >= after:
        found.append(Stretch("train", 0.0, before - held - (args.gap if held else 0.0)))
        found += [Stretch("val", before - held, before), Stretch("train", duration - after, duration)]
    else:
        middle = duration - after + held
        found += [Stretch("train", 0.0, before), Stretch("val", duration - after, middle)]
        found.append(Stretch("train", middle + (args.gap if held else 0.0), duration))
    return sorted((s for s in found if s.stop > s.start), key=lambda s: s.start)


def deal(groups: np.ndarray, labels: np.ndarray, shares: Sequence[float], rng: np.random.Generator) -> np.ndarray:
    """Which bin each group goes to, so that every bin holds about its share of each class.

    Args:
        groups: (N,) numbers of groups, 0 to G-1.
        labels: (N,) class numbers.
        shares: of the bins, summing up to 1.

    Returns:
        (G,) numbers of bins.
    """
    kinds, label = np.unique(labels, return_inverse=True)
    counts = np.zeros((int(groups.max(initial=-1)) + 1, len(kinds)))
    np.add.at(counts, (groups, label.reshape(-1)), 1.0)
    counts /= np.maximum(counts.sum(axis=0), 1.0)
    share = np.asarray(shares, dtype=np.float64)
    filled, number = np.zeros((len(share), len(kinds))), np.zeros(len(share))
    bins = np.zeros(len(counts), dtype=np.int64)
    order = rng.permutation(len(counts))
    order = order[np.argsort(-counts[order].sum(axis=1).round(9), kind="stable")]
    for group in order:
        # Sum over bins and classes of count²/share is least where every bin has its share of every class.
        growth = ((2 * filled + counts[group]) * counts[group]).sum(axis=1) / share
        best = np.lexsort((np.arange(len(share)), (number / share).round(9), growth.round(9)))[0]
        bins[group] = best
        filled[best] += counts[group]
        number[best] += 1
    return bins


def _by_group(meta: Meta, args: EegDataConfig, fold: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    kind = _GROUPS[args.split]
    group = group_of(meta, args.split)
    total = int(group.max(initial=-1)) + 1
    count = args.folds or total
    if total < max(count, 2):
        raise UserError(
            f"{total} {kind if total != 1 else args.split} cannot be parted into {max(count, 2)} folds; "
            + ("choose another data_args.split" if total < 2 else f"set data_args.folds to at most {total}, or to 0")
        )
    if args.folds:
        fold_of = deal(group, meta.label, [1 / count] * count, np.random.default_rng(args.shuffle))
    else:
        fold_of = np.arange(total)
    testing = fold_of[group] == fold
    rest = np.flatnonzero(~testing)
    held = np.zeros(len(rest), dtype=bool)
    if args.val:
        names, inner = np.unique(group[rest], return_inverse=True)
        if len(names) < 2:
            raise UserError(
                f"one of the {kind} is left for training and none for validation; set data_args.val to 0, which takes "
                "the last epoch"
            )
        inner = inner.reshape(-1)
        rng = np.random.default_rng([args.shuffle, fold, 1])
        bins = deal(inner, meta.label[rest], [1 - args.val, args.val], rng)
        if len(set(bins)) < 2:  # few large groups: a share below half a group still needs one, and leaves one
            smallest = int(np.bincount(inner).argmin())
            bins[smallest] = 1 - bins[smallest]
        held = bins[inner] == 1
    return rest[~held], rest[held], np.flatnonzero(testing)


def _by_time(meta: Meta, args: EegDataConfig, fold: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    parts: dict[str, list[int]] = {"train": [], "val": [], "test": []}
    within = 1e-6
    for i, (duration, start, stop) in enumerate(zip(meta.duration, meta.start, meta.stop)):
        for stretch in blocks(float(duration), args, fold):
            if stretch.start - within <= start and stop <= stretch.stop + within:
                parts[stretch.part].append(i)
    train, val, test = (np.asarray(parts[name], dtype=np.int64) for name in ("train", "val", "test"))
    return train, val, test


def _at_random(count: int, args: EegDataConfig, fold: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    from sklearn.model_selection import KFold  # the papers' own folds, window for window

    if count < args.folds:
        raise UserError(f"{count} windows cannot be parted into {args.folds} folds; lower data_args.folds")
    folds = KFold(args.folds, shuffle=True, random_state=args.shuffle).split(np.zeros((count, 1)))
    train, test = list(folds)[fold]
    held = math.floor(args.val * len(train) + 0.5)
    drawn = np.random.default_rng([args.shuffle, fold, 1]).permutation(len(train))
    return np.sort(train[drawn[held:]]), np.sort(train[drawn[:held]]), test
