"""Parts and folds by patient, every class in each alike. Everything follows from names, classes and a seed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

import numpy as np

from attn_shared.errors import UserError
from attn_shared.seeding import derive

Part = Literal["", "train", "val", "test"]
"""What a table says of a line's part; nothing where it says nothing."""


def part_of(text: object, path: Path) -> Part:
    """A cell of a column `part`, empty or missing where it says nothing.

    Raises:
        UserError: another word.
    """
    word = "" if text != text else str(text).strip().lower()
    if word not in ("", "train", "val", "test"):
        raise UserError(f"{path.name}: part is {text!r}; it may be train, val or test")
    return word  # type: ignore[return-value]


def check(folds: int, fold: int | None, val: float, test: float) -> None:
    """Refuse shares and folds that mean nothing.

    Raises:
        UserError: which one, and what it may be.
    """
    for name, share in (("val", val), ("test", test)):
        if not 0 <= share <= 1:
            raise UserError(f"--data_args.{name} is a share from 0 to 1, got {share:g}")
    if val == 1 or (test < 1 and not folds and val + test >= 1):
        raise UserError("--data_args.val and --data_args.test leave nothing for training")
    if folds < 0 or folds == 1:
        raise UserError(f"--data_args.folds must be 0 (none) or 2 or more, got {folds}")
    if fold is not None and not folds:
        raise UserError("--data_args.fold needs --data_args.folds")
    if fold is not None and not 0 <= fold < folds:
        raise UserError(f"--data_args.fold is 0 to {folds - 1}, got {fold}")


def deal(classes: Mapping[str, int], folds: int, seed: int) -> dict[str, int]:
    """Patient -> fold. Each class is dealt out in an order that the seed draws, one class going on where the last
    stopped, so that folds and the classes in them differ by one patient at most.

    Args:
        classes: patient -> class.

    Raises:
        UserError: fewer patients than folds.
    """
    if len(classes) < folds:
        raise UserError(f"{len(classes)} patients cannot be dealt out to {folds} folds; choose fewer --data_args.folds")
    order = _ordered(classes, seed)
    return {patient: place % folds for place, patient in enumerate(order)}


def draw(classes: Mapping[str, int], share: float, seed: int) -> set[str]:
    """About a share of the patients, of each class the same share; at least one of each class that has two or more."""
    if not share:
        return set()
    found: set[str] = set()
    order = _ordered(classes, seed)
    for kind in sorted(set(classes.values())):
        own = [patient for patient in order if classes[patient] == kind]
        count = round(share * len(own))
        found |= set(own[: min(max(count, 1), len(own) - 1) if share < 1 else len(own)])
    return found


def parts(
    classes: Mapping[str, int], *, folds: int, fold: int, val: float, test: float, shuffle: int
) -> tuple[dict[str, str], str]:
    """Patient -> "train", "val" or "test", and how that came about, in words."""
    if test == 1:
        return dict.fromkeys(classes, "test"), "all of it test"
    if folds:
        dealt = deal(classes, folds, derive(shuffle, "folds"))
        chosen = {patient for patient, number in dealt.items() if number == fold}
        how = f"by patient, stratified, fold {fold} of {folds} for test (dealt with seed {shuffle})"
    else:
        chosen = draw(classes, test, derive(shuffle, "test"))
        how = f"by patient, stratified, {test:.0%} drawn for test (seed {shuffle})"
    found = {patient: "test" if patient in chosen else "train" for patient in classes}
    return held_out(found, classes, val, shuffle, how)


def held_out(
    found: Mapping[str, str], classes: Mapping[str, int], val: float, shuffle: int, how: str
) -> tuple[dict[str, str], str]:
    """The same parts with a share of the training patients for validation."""
    rest = {patient: classes[patient] for patient, part in found.items() if part == "train"}
    held = draw(rest, val, derive(shuffle, "val"))
    if not held:
        return dict(found), f"{how}, no validation"
    return {p: "val" if p in held else part for p, part in found.items()}, f"{how}, {val:.0%} of the rest validates"


def turn(folds: int, fold: int | None, shuffle: int, seed: int) -> tuple[int, int]:
    """The fold and the seed that deals: where no fold is named, the run's seed goes through the folds in rounds."""
    if not folds:
        return 0, shuffle
    return (seed % folds, shuffle + seed // folds) if fold is None else (fold, shuffle)


def _ordered(classes: Mapping[str, int], seed: int) -> list[str]:
    """Patients class by class, in an order of each class that the seed draws."""
    rng = np.random.default_rng(seed)
    order: list[str] = []
    for kind in sorted(set(classes.values())):
        own = sorted(patient for patient in classes if classes[patient] == kind)
        order += [own[i] for i in rng.permutation(len(own))]
    return order


def common(groups: Sequence[str], classes: Sequence[int]) -> dict[str, int]:
    """Patient -> the highest class among what belongs to the patient."""
    found: dict[str, int] = {}
    for group, kind in zip(groups, classes):
        found[group] = max(kind, found.get(group, kind))
    return found
