"""Patients, split, standardised, their times cut into intervals.

A batch: "genes" (B, sum of the groups) standardised; "x" (B, N, C) patches, filled up with zeros; "mask" (B, N) bool;
"time" (B,); "event" (B,) bool; "interval" (B,); "index" (B,) place in the part.
"""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from attn_medseg.pathology import splits
from attn_medseg.pathology.pieces import PiecesSet
from attn_medseg.pathology.survival.corpus import Corpus, Patient
from attn_medseg.pathology.survival.estimates import kaplan_meier
from attn_medseg.pathology.survival.options import SurvivalDataConfig
from attn_medseg.pathology.survival.readers import load_corpus
from attn_shared.bundle import DataBundle
from attn_shared.errors import UserError

PARTS = ("train", "val", "test")
_HORIZON = 0.9  # quantile of training's times to which the Brier score goes


class PatientSet(PiecesSet):
    """The patients of one part.

    Args:
        patients: in order.
        genes: names of the columns of their genes.
        state: of the bundle.
        most: patches of a patient at most, drawn anew each epoch; 0 = all.
    """

    def __init__(
        self, patients: Sequence[Patient], genes: Sequence[str], state: Mapping[str, Any], *, most: int = 0
    ) -> None:
        super().__init__(len(patients), most=most)
        self.patients = tuple(patients)
        self.state = state
        self.genes = gene_values(self.patients, genes, state)
        self.time = np.array([one.time for one in patients])
        self.event = np.array([one.event for one in patients], dtype=bool)

    def read(self, index: int) -> NDArray[np.float32]:
        """(N, C); one patch of zeros where the data have no slides."""
        return patches_of(self.patients[index], self.state)

    def __getitems__(self, indices: Sequence[int]) -> dict[str, Tensor]:
        x, mask = self.drawn(indices)
        own = list(indices)
        return {
            "genes": torch.from_numpy(self.genes[own]),
            "x": x,
            "mask": mask,
            "time": torch.from_numpy(self.time[own]),
            "event": torch.from_numpy(self.event[own]),
            "interval": torch.from_numpy(interval_of(self.time[own], self.state)),
            "index": torch.tensor(own),
        }

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return self.__getitems__([index])


def gene_values(patients: Sequence[Patient], names: Sequence[str], state: Mapping[str, Any]) -> NDArray[np.float32]:
    """(N, sum of the groups) standardised genes, group after group; missing ones are 0, the mean of training.

    Raises:
        UserError: a column of the training data is not there.
    """
    place = {name: number for number, name in enumerate(names)}
    wanted = [gene for own in state["groups"].values() for gene in own]
    lost = [gene for gene in dict.fromkeys(wanted) if gene not in place]
    if lost:
        raise UserError(f"{len(lost)} columns of the training data are missing, such as {lost[0]}")
    values = np.stack([one.genes for one in patients])[:, [place[gene] for gene in wanted]]
    scaled = (values - np.asarray(state["mean"])) / np.asarray(state["scale"])
    return np.nan_to_num(scaled, nan=0.0).astype(np.float32)


def patches_of(patient: Patient, state: Mapping[str, Any]) -> NDArray[np.float32]:
    """(N, C) patches; one of zeros where the model was trained without slides.

    Raises:
        UserError: a file cannot be read, or has another number of features than in training.
    """
    if not state["patches"]:
        return np.zeros((1, 1), np.float32)
    values = patient.patches()
    if values.shape[1] != state["patches"]:
        raise UserError(f"{patient.name} has {values.shape[1]} features, where training had {state['patches']}")
    return values


def interval_of(time: NDArray[np.float64], state: Mapping[str, Any]) -> NDArray[np.int64]:
    """(N,) number of the interval of each time; what lies beyond the edges is in the first or the last."""
    return np.searchsorted(np.asarray(state["edges"])[1:-1], time, side="right").astype(np.int64)


def load_bundle(
    data: str,
    args: SurvivalDataConfig,
    *,
    needs: Sequence[str] = (),
    seed: int = 0,
    state: Mapping[str, Any] | None = None,
) -> DataBundle:
    """Read, split and standardise.

    Args:
        needs: of "genes" and "slides", what the model reads.
        seed: of the run, which chooses the fold where none is named.
        state: of a trained model; nothing is then fitted anew.

    Raises:
        UserError: data or options that cannot be used; one sentence.
    """
    check_options(args)
    corpus = load_corpus(data, args)
    patients, notes = usable(corpus, args, needs, data)
    parts, told = parts_of(patients, args, seed)
    chosen = {part: [one for one in patients if parts.get(one.name) == part] for part in PARTS}
    found = dict(state) if state else fit(corpus, chosen["train"] or patients, args)
    sets = {
        part: PatientSet(own, corpus.genes, found, most=args.instances if part == "train" else 0) if own else None
        for part, own in chosen.items()
    }
    facts: dict[str, Any] = {
        part: f"{len(own)} patients, {sum(one.event for one in own)} events" for part, own in chosen.items() if own
    }
    facts["groups of genes"] = ", ".join(f"{name} {len(own)}" for name, own in found["groups"].items()) or "none"
    facts["intervals"] = ", ".join(f"{edge:.4g}" for edge in found["edges"])
    if notes:
        facts["notes"] = "; ".join(notes)
    cut = f"genes standardised and time cut into {len(found['edges']) - 1} intervals by training patients"
    return DataBundle(
        train=sets["train"],
        val=sets["val"],
        test=sets["test"],
        state=found,
        facts=facts,
        protocol=f"{told}; {cut}",
    )


def usable(
    corpus: Corpus, args: SurvivalDataConfig, needs: Sequence[str], data: str
) -> tuple[list[Patient], list[str]]:
    """Patients with everything, and notes on the others.

    Raises:
        UserError: nobody has what the model needs.
    """
    slides = args.slides and any(one.has_slides for one in corpus.patients)
    if "slides" in needs and not slides:
        raise UserError(
            f"{data} has no feature files of slides, which this model reads; --data_args.features names their folder, "
            "and --model snn reads genes alone"
        )
    if "genes" in needs and not corpus.genes:
        raise UserError(f"{data} has no columns of genes, which this model reads; --model abmil reads slides alone")
    there = [one for one in corpus.patients if one.has_slides or not slides]
    notes = list(corpus.notes)
    if len(there) < len(corpus.patients):
        notes.append(f"{len(corpus.patients) - len(there)} patients without a feature file left out")
    return there, notes


def parts_of(patients: Sequence[Patient], args: SurvivalDataConfig, seed: int) -> tuple[dict[str, str], str]:
    """Name of a patient -> part, and how that came about, in words.

    Raises:
        UserError: a split that the data do not allow.
    """
    classes = {one.name: int(one.event) for one in patients}
    if args.splits and args.test < 1:
        found, how = _from_file(Path(args.splits).expanduser(), classes)
        return splits.held_out(found, classes, 0.0 if "val" in found.values() else args.val, args.shuffle, how)
    if any(one.part for one in patients) and not args.folds and args.test < 1:
        named = {one.name: str(one.part) for one in patients}
        if "val" in named.values():
            return named, "parts as the data have them"
        return splits.held_out(named, classes, args.val, args.shuffle, "test part as the data have it")
    fold, shuffle = splits.turn(args.folds, args.fold, args.shuffle, seed)
    return splits.parts(classes, folds=args.folds, fold=fold, val=args.val, test=args.test, shuffle=shuffle)


def _from_file(file: Path, classes: Mapping[str, int]) -> tuple[dict[str, str], str]:
    """Parts by a CSV with columns of names."""
    try:
        with file.open(encoding="utf-8-sig", newline="") as lines:
            table = list(csv.DictReader(lines))
    except OSError as error:
        raise UserError(f"{file} cannot be read: {error.strerror}") from None
    if not table or "train" not in table[0] or not {"val", "test"} & set(table[0]):
        raise UserError(f"{file.name} needs columns train and val or test, which name patients")
    # MCAT's files have no test part: what they call val is what they report.
    columns = (
        {"train": "train", "val": "val", "test": "test"} if "test" in table[0] else {"train": "train", "val": "test"}
    )
    found: dict[str, str] = {}
    for column, part in columns.items():
        for row in table:
            name = (row.get(column) or "").strip()
            if name in classes and found.setdefault(name, part) != part:
                raise UserError(f"{file.name} has {name} in two parts: {found[name]} and {part}")
    return found, f"as {file.name} says"


def fit(corpus: Corpus, patients: Sequence[Patient], args: SurvivalDataConfig) -> dict[str, Any]:
    """The state: groups and scales of genes, features of patches, edges of intervals, censoring in training.

    Raises:
        UserError: too few events for so many intervals.
    """
    time = np.array([one.time for one in patients])
    event = np.array([one.event for one in patients], dtype=bool)
    if event.sum() < args.intervals:
        raise UserError(f"{int(event.sum())} events in training are too few for {args.intervals} intervals of time")
    edges = np.quantile(time[event], np.linspace(0, 1, args.intervals + 1))
    edges[0], edges[-1] = 0.0, time.max()
    if (np.diff(edges) <= 0).any():
        raise UserError(f"the times of events are too alike for {args.intervals} intervals; --data_args.intervals less")
    place = {name: number for number, name in enumerate(corpus.genes)}
    columns = [place[gene] for own in corpus.groups.values() for gene in own]
    values = np.stack([one.genes for one in patients])[:, columns]
    known = ~np.isnan(values)
    count = np.maximum(known.sum(axis=0), 1)
    mean = np.where(known, values, 0.0).sum(axis=0) / count
    scale = np.sqrt(np.where(known, (values - mean) ** 2, 0.0).sum(axis=0) / count)
    scale[scale < 1e-8] = 1.0  # a gene that never changes says nothing
    slides = args.slides and any(one.has_slides for one in patients)
    censoring = kaplan_meier(time, ~event)
    return {
        "groups": {name: list(own) for name, own in corpus.groups.items()},
        "mean": mean.tolist(),
        "scale": scale.tolist(),
        "patches": int(patients[0].patches().shape[1]) if slides else 0,
        "edges": edges.tolist(),
        "horizon": float(np.quantile(time, _HORIZON)),
        "censoring": [censoring.times.tolist(), censoring.values.tolist()],
    }


def check_options(args: SurvivalDataConfig) -> None:
    """Refuse options that mean nothing.

    Raises:
        UserError: which one, and what it may be.
    """
    splits.check(args.folds, args.fold, args.val, args.test)
    if args.instances < 0:
        raise UserError(f"--data_args.instances must be 0 (all) or more, got {args.instances}")
    if args.intervals < 2:
        raise UserError(f"--data_args.intervals must be 2 or more, got {args.intervals}")
