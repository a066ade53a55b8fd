"""Training, validation and test parts by patient, drawn, in folds or from a file, and that file."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from attn_medseg.segment.corpus import Case, Corpus
from attn_medseg.segment.options import SegmentDataConfig
from attn_shared.errors import UserError
from attn_shared.seeding import derive

PARTS = ("train", "val", "test")


def check_shares(args: SegmentDataConfig) -> None:
    """Refuse shares and folds that mean nothing.

    Raises:
        UserError: which one, and what it may be.
    """
    for name in ("val", "test"):
        if not 0 <= getattr(args, name) <= 1:
            raise UserError(f"--data_args.{name} is a share from 0 to 1, got {getattr(args, name)}")
    if args.val == 1 or (args.test < 1 and args.val + args.test >= 1):
        raise UserError("--data_args.val and --data_args.test leave nothing for training")
    if args.folds < 2:
        raise UserError(f"--data_args.folds must be 2 or more, got {args.folds}")
    if not 0 <= args.fold < args.folds:
        raise UserError(f"--data_args.fold is 0 to {args.folds - 1}, got {args.fold}")
    if args.max_train < 0:
        raise UserError(f"--data_args.max_train must not be negative, got {args.max_train}")


def split(corpus: Corpus, args: SegmentDataConfig, name: str = "the data") -> tuple[dict[str, list[Case]], str]:
    """Part -> its cases, and how they were made, in words. No patient is in two parts.

    Args:
        corpus: its cases.
        args: the options.
        name: of the data, for messages.

    Raises:
        UserError: a split that the data do not allow, or a file that does not fit; one sentence.
    """
    check_shares(args)
    file = Path(args.splits).expanduser() if args.splits else None
    if args.test == 1:
        parts, how = dict.fromkeys((case.name for case in corpus.cases), "test"), "all of it test"
    elif file is not None and file.exists():
        parts, how = _from_file(file, corpus.cases, args)
    else:
        parts, how, folds = _made(corpus.cases, args, name)
        if file is not None:
            _save(file, corpus.cases, parts, folds)
            how += f", written to {file.name}"
    _refuse_leaks(corpus.cases, parts)
    found: dict[str, list[Case]] = {
        part: [case for case in corpus.cases if parts.get(case.name) == part] for part in PARTS
    }
    if not found["train"] and args.test < 1:
        raise UserError(f"{name} leaves no case for training: it has {_count(corpus.cases)}")
    if args.max_train and found["train"]:
        patients = _patients(found["train"])
        kept = set(_draw(patients, min(args.max_train, len(patients)), derive(args.shuffle, "max_train")))
        if len(kept) < len(patients):
            how += f", {len(kept)} of {len(patients)} training patients drawn"
        found["train"] = [case for case in found["train"] if case.patient in kept]
    return found, how


def folds_of(patients: Sequence[str], folds: int, shuffle: int) -> list[list[str]]:
    """Patients in `folds` groups of nearly equal size, drawn; every patient in one.

    Raises:
        UserError: fewer patients than folds.
    """
    if len(patients) < folds:
        raise UserError(f"{len(patients)} patients are too few for {folds} folds")
    order = np.random.default_rng(derive(shuffle, "folds")).permutation(len(patients))
    return [sorted(patients[one] for one in order[number::folds]) for number in range(folds)]


def _made(
    cases: Sequence[Case], args: SegmentDataConfig, name: str
) -> tuple[dict[str, str], str, list[list[str]] | None]:
    patients = _patients(cases)
    given = any(case.part for case in cases)
    choice = args.split if args.split != "auto" else "given" if given else "random"
    if choice == "given":
        if not given:
            raise UserError(f"{name} has no parts of its own; take --data_args.split random or kfold")
        return *_given(cases, args), None
    if choice == "kfold":
        folds = folds_of(patients, args.folds, args.shuffle)
        parts = _of_fold(folds[args.fold], [one for fold in folds for one in fold], args)
        how = f"by patient, part {args.fold} of {args.folds} for test, {args.val:.0%} of the rest for validation"
        return _by_case(cases, parts), f"{how} (shuffle {args.shuffle})", folds
    # As in folds, validation is a share of what test leaves.
    test = _draw(patients, _number(args.test, len(patients)), derive(args.shuffle, "test"))
    parts = _of_fold(test, patients, args)
    how = f"by patient, {args.test:.0%} drawn for test, {args.val:.0%} of the rest for validation"
    return _by_case(cases, parts), f"{how} (shuffle {args.shuffle})", None


def _given(cases: Sequence[Case], args: SegmentDataConfig) -> tuple[dict[str, str], str]:
    """The data's own parts; what has none is training, and a part that is missing is drawn from training."""
    parts: dict[str, str] = {case.name: case.part or "train" for case in cases}
    how = "the data's own parts"
    for part, share in (("test", args.test), ("val", args.val)):
        train = [case for case in cases if parts[case.name] == "train"]
        if part in parts.values() or share <= 0 or not train:
            continue
        patients = _patients(train)
        drawn = set(_draw(patients, _number(share, len(patients)), derive(args.shuffle, part)))
        parts |= {case.name: part for case in train if case.patient in drawn}
        how += f", {share:.0%} of the training patients drawn for {part} (shuffle {args.shuffle})"
    return parts, how


def _of_fold(test: Iterable[str], patients: Sequence[str], args: SegmentDataConfig) -> dict[str, str]:
    """Patient -> part, where the test patients are known."""
    held = set(test)
    rest = sorted(set(patients) - held)
    val = set(_draw(rest, _number(args.val, len(rest)), derive(args.shuffle, "val")))
    return {one: "test" if one in held else "val" if one in val else "train" for one in patients}


def _number(share: float, count: int) -> int:
    """Of `count` patients, at least one where a share is asked for and two are left."""
    return min(max(1, round(share * count)), count - 1) if share > 0 and count > 1 else 0


def _draw(patients: Sequence[str], count: int, seed: int) -> list[str]:
    order = np.random.default_rng(seed).permutation(len(patients))
    return sorted(patients[one] for one in order[:count])


def _patients(cases: Sequence[Case]) -> list[str]:
    return sorted({case.patient for case in cases})


def _count(cases: Sequence[Case]) -> str:
    patients = len(_patients(cases))
    return f"{patients} patient{'s' if patients != 1 else ''}"


def _by_case(cases: Sequence[Case], parts: Mapping[str, str]) -> dict[str, str]:
    return {case.name: parts[case.patient] for case in cases}


def _refuse_leaks(cases: Sequence[Case], parts: Mapping[str, str]) -> None:
    seen: dict[str, tuple[str, str]] = {}
    for case in cases:
        if (part := parts.get(case.name)) is None:
            continue
        other, name = seen.setdefault(case.patient, (part, case.name))
        if other != part:
            raise UserError(
                f"patient {case.patient} would be in two parts: {name} in {other}, {case.name} in {part}; split by "
                "patient, or name the patient in names with --data_args.patient"
            )


# -- files ------------------------------------------------------------------------------------------------------------


def _from_file(file: Path, cases: Sequence[Case], args: SegmentDataConfig) -> tuple[dict[str, str], str]:
    """The parts that a file names: {"train": […], "val": […], "test": […]}, {"folds": [[…], …]}, or nnU-Net's list of
    {"train": […], "val": […]}, whose "val" is what a fold is tested on."""
    try:
        told = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{file.name} is no file of splits: {error}") from None
    how = f"as {file.name} says"
    if isinstance(told, dict) and isinstance(told.get("folds"), list):
        folds = told["folds"]
        named = {"test": _fold(folds, args, file), "train": None}
        how += f", part {args.fold} of {len(folds)} for test"
        _match([one for fold in folds if isinstance(fold, list) for one in fold], cases, file)
    elif isinstance(told, list):
        fold = _fold(told, args, file)
        if not isinstance(fold, dict) or not {"train", "val"} <= set(fold):
            raise UserError(f'{file.name} is a list whose folds are no {{"train": […], "val": […]}}')
        named = {"train": fold["train"], "test": fold["val"]}
        how += f", part {args.fold} of {len(told)} for test"
    elif isinstance(told, dict) and told and set(told) <= set(PARTS):
        named = told
    else:
        raise UserError(f'{file.name} is no file of splits: it has neither "folds" nor "train", "val" and "test"')
    parts: dict[str, str] = {}
    for part, names in named.items():
        for case in _match(names, cases, file) if names is not None else ():
            if parts.setdefault(case, part) != part:
                raise UserError(f"{file.name} has {case} in two parts: {parts[case]} and {part}")
    if named.get("train", ()) is None:
        whole = {case for fold in told["folds"] for case in _match(fold, cases, file)}
        parts = {case: parts.get(case, "train") for case in sorted(whole)}
    if "val" not in named and args.val > 0:
        train = [case for case in cases if parts.get(case.name) == "train"]
        patients = _patients(train)
        drawn = set(_draw(patients, _number(args.val, len(patients)), derive(args.shuffle, "val")))
        parts |= {case.name: "val" for case in train if case.patient in drawn}
        how += f", {args.val:.0%} of the rest for validation (shuffle {args.shuffle})"
    if out := sum(case.name not in parts for case in cases):
        how += f", {out} cases in no part"
    return parts, how


def _fold(folds: Sequence[Any], args: SegmentDataConfig, file: Path) -> Any:
    if args.fold >= len(folds):
        raise UserError(f"--data_args.fold {args.fold}: {file.name} has {len(folds)} folds, counted from 0")
    return folds[args.fold]


def _match(names: Any, cases: Sequence[Case], file: Path) -> list[str]:
    """Names of the cases that are named, themselves or by their patients."""
    if not isinstance(names, list) or not all(isinstance(one, str) for one in names):
        raise UserError(f"{file.name}: a part is a list of names")
    known = {case.name for case in cases}
    by_patient: dict[str, list[str]] = {}
    for case in cases:
        by_patient.setdefault(case.patient, []).append(case.name)
    found = []
    for name in names:
        if name in known:
            found.append(name)
        elif name in by_patient:
            found += by_patient[name]
        else:
            raise UserError(f"{file.name} names {name}, which is neither a case nor a patient of the data")
    return found


def _save(file: Path, cases: Sequence[Case], parts: Mapping[str, str], folds: list[list[str]] | None) -> None:
    """Write patients by part or by fold, whole or not at all."""
    told: dict[str, Any] = (
        {"folds": folds}
        if folds is not None
        else {part: sorted({case.patient for case in cases if parts[case.name] == part}) for part in PARTS}
    )
    partial = file.with_name(f".{file.name}.partial")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        partial.write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")
        os.replace(partial, file)
    except OSError as error:
        raise UserError(f"the splits cannot be written to {file}: {error.strerror}") from None
