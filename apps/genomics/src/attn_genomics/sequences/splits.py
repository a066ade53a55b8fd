"""Training, validation and test parts of labelled sequences, and what of one part stands in another."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from attn_genomics.data.fasta import Sequences, match_name, turned
from attn_shared.errors import UserError

TRAIN, VAL, TEST = range(3)
PARTS = ("train", "val", "test")


def keys(sequences: Sequences, *, strands: bool = True) -> np.ndarray:
    """(N,) a number for each sequence, equal for equal ones; with `strands` also for the other strand's."""
    numbers: dict[bytes, int] = {}
    found = np.empty(len(sequences), np.int64)
    for row in range(len(sequences)):
        codes = sequences[row]
        text = codes.tobytes()
        if strands:
            text = min(text, turned(codes).tobytes())
        found[row] = numbers.setdefault(text, len(numbers))
    return found


def random_parts(key: np.ndarray, val: float, test: float, rng: np.random.Generator) -> np.ndarray:
    """(N,) parts of about the shares asked for, drawn; rows of one key are in one part."""
    distinct, number = np.unique(key, return_inverse=True)
    order = rng.permutation(len(distinct))
    counts = np.bincount(number)[order]
    done = np.cumsum(counts) - counts / 2
    share = done / len(key)
    part = np.full(len(distinct), TRAIN, np.int64)
    part[order[share < test + val]] = VAL
    part[order[share < test]] = TEST
    return part[number]


def chromosome_parts(
    group: np.ndarray,
    weight: dict[str, int],
    *,
    chromosomes_val: Sequence[str],
    chromosomes_test: Sequence[str],
    val: float,
    test: float,
    rng: np.random.Generator,
) -> np.ndarray:
    """(N,) parts, whole chromosomes each.

    Args:
        group: (N,) chromosome of every row.
        weight: chromosome -> how much it counts for the shares, in the order of the data.
        chromosomes_val, chromosomes_test: for these parts; empty = drawn.
        val, test: shares of what is drawn.

    Raises:
        UserError: an unknown chromosome, one that is named twice, or too few to split.
    """
    chosen = choose_chromosomes(weight, chromosomes_val, chromosomes_test, val, test, rng)
    return np.array([chosen[str(name)] for name in group], np.int64)


def choose_chromosomes(
    weight: dict[str, int],
    chromosomes_val: Sequence[str],
    chromosomes_test: Sequence[str],
    val: float,
    test: float,
    rng: np.random.Generator,
) -> dict[str, int]:
    """Chromosome -> part. See `chromosome_parts`."""
    chosen: dict[str, int] = {}
    for part, wanted in ((TEST, chromosomes_test), (VAL, chromosomes_val)):
        for name in wanted:
            known = match_name(name, weight)
            if known is None:
                has = ", ".join(list(weight)[:20])
                raise UserError(f"there is no chromosome {name!r} for the {PARTS[part]} part; there are {has}")
            if known in chosen:
                raise UserError(f"chromosome {name!r} is named twice among those of validation and test")
            chosen[known] = part
    whole = sum(weight.values())
    for part, wanted, share in ((TEST, chromosomes_test, test), (VAL, chromosomes_val, val)):
        free = [name for name in weight if name not in chosen]
        if wanted or share <= 0:
            continue
        if share >= 1:
            chosen |= dict.fromkeys(free, part)
            continue
        # The drawn ones come as near to the share as they can; where all are far larger, it is the smallest.
        wanted_size = share * whole
        fit = [name for name in free if weight[name] <= 3 * wanted_size]
        if not fit and free:
            chosen[min(free, key=lambda name: weight[name])] = part
        got = 0
        for number in rng.permutation(len(fit)):
            size = weight[fit[number]]
            if not got or abs(got + size - wanted_size) < abs(got - wanted_size):
                chosen[fit[number]] = part
                got += size
    left = {name: chosen.get(name, TRAIN) for name in weight}
    if test < 1 and TRAIN not in left.values():
        raise UserError(
            f"{len(weight)} chromosomes leave none for training; name fewer of them for validation and test, or take "
            "another --data_args.split"
        )
    return left


def overlap(sequences: Sequences, part: np.ndarray) -> dict[str, tuple[int, int]]:
    """ "test in train" -> how many sequences of test are in training, and how many as either strand."""
    same, either = keys(sequences, strands=False), keys(sequences)
    found = {}
    for one, other in ((VAL, TRAIN), (TEST, TRAIN), (TEST, VAL)):
        here, there = part == one, part == other
        if here.any() and there.any():
            found[f"{PARTS[one]} in {PARTS[other]}"] = (
                int(np.isin(same[here], same[there]).sum()),
                int(np.isin(either[here], either[there]).sum()),
            )
    return found
