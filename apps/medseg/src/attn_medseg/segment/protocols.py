"""How published evaluations score masks, each by its own definition, faults included.

- synapse: TransUNet's evaluation, which nearly every paper on Synapse copies. Volume by volume: Dice, and HD95 in
  voxels, as the spacing is never told to it. A structure that is not in the volume but predicted has Dice 1 and HD95 0;
  one that is not predicted has Dice 0 and HD95 0, wherever it is. Means over volumes, then over structures.
- acdc: the challenge's, for each of end-diastole (ED) and end-systole (ES): Dice, Hausdorff distance in the spacing's
  unit (the largest distance, no percentile), and the error of the volume in ml.
- isic: of ISIC 2018 task 1: per image accuracy, sensitivity, specificity, Jaccard, Dice, and Jaccard taken as 0 below
  .65; where nothing is true and nothing predicted Jaccard and Dice are 1.
- nnunet: nnU-Net's summary.json: Dice and IoU, NaN and left out of means where a structure is neither there nor
  predicted, with counts of voxels; `foreground_mean` is the mean of the structures' means.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from attn_medseg.segment.metrics import PERCENTILE, surface_distances
from attn_shared.errors import UserError

THRESHOLD = 0.65
_COUNTS = ("FP", "TP", "FN", "TN", "n_pred", "n_ref")


@dataclass(frozen=True, kw_only=True)
class Pair:
    """A prediction and its mask.

    Attributes:
        name: of the case.
        patient: whom it is of.
        predicted, truth: labels on the same grid.
        spacing: of voxels along each axis.
        unit: of the spacing, "mm" or "px".
        phase: "ED", "ES", or "" where the name tells it.
    """

    name: str
    patient: str
    predicted: NDArray[np.uint8]
    truth: NDArray[np.uint8]
    spacing: tuple[float, ...]
    unit: str = "mm"
    phase: str = ""


@dataclass(frozen=True)
class CaseScores:
    """The scores of a case: structure -> score -> value, and what the protocol wants to know of it."""

    name: str
    patient: str
    scores: Mapping[str, Mapping[str, float]]
    phase: str = ""


@dataclass(frozen=True, kw_only=True)
class Protocol:
    """One published evaluation.

    Attributes:
        says: its definition in a sentence or two; stands in the output.
        case: scores of a pair of which the names of the structures are given.
        figures: means from the scores of all cases.
    """

    name: str
    says: str
    case: Callable[[Pair, Sequence[str]], CaseScores]
    figures: Callable[[Sequence[CaseScores], Sequence[str]], dict[str, float]] = field(repr=False)


# -- Synapse ----------------------------------------------------------------------------------------------------------


def synapse_case(pair: Pair, structures: Sequence[str]) -> CaseScores:
    scores = {}
    for number, name in enumerate(structures, 1):
        predicted, truth = pair.predicted == number, pair.truth == number
        if predicted.any() and truth.any():
            found = surface_distances(predicted, truth, (1.0,) * truth.ndim)
            assert found is not None
            far = float(np.percentile(np.concatenate(found), PERCENTILE))
            scores[name] = {"dice": _dice(predicted, truth), "hd95": far}
        else:
            scores[name] = {"dice": 1.0 if predicted.any() else 0.0, "hd95": 0.0}
    return CaseScores(pair.name, pair.patient, scores)


def synapse_figures(cases: Sequence[CaseScores], structures: Sequence[str]) -> dict[str, float]:
    found = {
        f"{score} {name}": _mean([case.scores[name][score] for case in cases])
        for score in ("dice", "hd95")
        for name in structures
    }
    means = {score: _mean([found[f"{score} {name}"] for name in structures]) for score in ("dice", "hd95")}
    return {**means, "cases": float(len(cases)), **found}


# -- ACDC -------------------------------------------------------------------------------------------------------------


def acdc_case(pair: Pair, structures: Sequence[str]) -> CaseScores:
    scores = {}
    known = pair.unit == "mm"
    for number, name in enumerate(structures, 1):
        predicted, truth = pair.predicted == number, pair.truth == number
        found = surface_distances(predicted, truth, pair.spacing)
        voxel = math.prod(pair.spacing) / 1000 if known else math.nan
        scores[name] = {
            "dice": _dice(predicted, truth),
            "hd": math.nan if found is None else max(float(one.max()) for one in found),
            "volume_ml": float(predicted.sum()) * voxel,
            "error_ml": (float(predicted.sum()) - float(truth.sum())) * voxel,
        }
    return CaseScores(pair.name, pair.patient, scores, pair.phase)


def acdc_figures(cases: Sequence[CaseScores], structures: Sequence[str]) -> dict[str, float]:
    phases = acdc_phases(cases)
    found: dict[str, float] = {}
    for score in ("dice", "hd", "error_ml"):
        for name in structures:
            for phase in ("ED", "ES"):
                own = [case.scores[name][score] for case in cases if phases[case.name] == phase]
                found[f"{score} {name} {phase}"] = _mean([abs(one) for one in own])
    named = {score: [found[f"{score} {n} {p}"] for n in structures for p in ("ED", "ES")] for score in ("dice", "hd")}
    return {
        **{score: _mean(values) for score, values in named.items()},
        "cases ED": float(sum(phase == "ED" for phase in phases.values())),
        "cases ES": float(sum(phase == "ES" for phase in phases.values())),
        "without hd": float(sum(math.isnan(one["hd"]) for case in cases for one in case.scores.values())),
        **{name: value for name, value in found.items() if not math.isnan(value)},
    }


def acdc_phases(cases: Sequence[CaseScores]) -> dict[str, str]:
    """Case -> "ED" or "ES": as it is told, as its name says, else a patient's first frame is ED and its last ES.

    Raises:
        UserError: a case of which it cannot be told.
    """
    found: dict[str, str] = {}
    frames: dict[str, list[str]] = {}
    for case in cases:
        if told := told_phase(case):
            found[case.name] = told
        else:
            frames.setdefault(case.patient, []).append(case.name)
    for patient, names in frames.items():
        if len(names) != 2:
            raise UserError(
                f"{patient} has {len(names)} frames of which the phase is not known; ACDC needs both end-diastole and "
                "end-systole, or names with ED and ES"
            )
        first, last = sorted(names, key=_numbers)
        found[first], found[last] = "ED", "ES"
    return found


def told_phase(case: CaseScores) -> str:
    """What the data or the name of a case says of its phase; empty where neither does."""
    named = re.search(r"(?<![A-Za-z])(ED|ES)(?![A-Za-z])", case.name)
    return case.phase or (named[1] if named else "")


def _numbers(name: str) -> list[int]:
    return [int(one) for one in re.findall(r"\d+", name)]


# -- ISIC -------------------------------------------------------------------------------------------------------------


def isic_case(pair: Pair, structures: Sequence[str]) -> CaseScores:
    if len(structures) != 1:
        raise UserError(f"ISIC scores one structure, the lesion; here are {len(structures)}: {', '.join(structures)}")
    predicted, truth = pair.predicted > 0, pair.truth > 0
    tp, fp, fn, tn = _confusion(predicted, truth)
    jaccard = tp / (tp + fp + fn) if tp + fp + fn else 1.0
    scores = {
        "threshold_jaccard": jaccard if jaccard >= THRESHOLD else 0.0,
        "jaccard": jaccard,
        "dice": 2 * tp / (2 * tp + fp + fn) if tp + fp + fn else 1.0,
        "accuracy": (tp + tn) / (tp + fp + fn + tn),
        "sensitivity": tp / (tp + fn) if tp + fn else 1.0,
        "specificity": tn / (tn + fp) if tn + fp else 1.0,
    }
    return CaseScores(pair.name, pair.patient, {structures[0]: scores})


def isic_figures(cases: Sequence[CaseScores], structures: Sequence[str]) -> dict[str, float]:
    rows = [case.scores[structures[0]] for case in cases]
    return {**{name: _mean([row[name] for row in rows]) for name in rows[0]}, "images": float(len(rows))}


# -- nnU-Net ----------------------------------------------------------------------------------------------------------


def nnunet_case(pair: Pair, structures: Sequence[str]) -> CaseScores:
    scores = {}
    for number, name in enumerate(structures, 1):
        tp, fp, fn, tn = _confusion(pair.predicted == number, pair.truth == number)
        there = tp + fp + fn > 0
        scores[name] = {
            "Dice": 2 * tp / (2 * tp + fp + fn) if there else math.nan,
            "IoU": tp / (tp + fp + fn) if there else math.nan,
            **{"FP": fp, "TP": tp, "FN": fn, "TN": tn, "n_pred": fp + tp, "n_ref": fn + tp},
        }
    return CaseScores(pair.name, pair.patient, scores)


def nnunet_figures(cases: Sequence[CaseScores], structures: Sequence[str]) -> dict[str, float]:
    means = _nnunet_means(cases, structures)
    found = {f"{score} {name}": means[name][score] for name in structures for score in ("Dice", "IoU")}
    whole = {f"foreground_mean {score}": _plain([means[n][score] for n in structures]) for score in ("Dice", "IoU")}
    return {**whole, **found, "cases": float(len(cases))}


def nnunet_summary(cases: Sequence[CaseScores], structures: Sequence[str]) -> dict[str, object]:
    """What nnU-Net writes as summary.json: labels by number, NaN where there is no score."""
    means = _nnunet_means(cases, structures)
    number = {name: str(i) for i, name in enumerate(structures, 1)}
    whole = {score: _plain([means[name][score] for name in structures]) for score in ("Dice", "IoU", *_COUNTS)}
    return {
        "foreground_mean": whole,
        "mean": {number[name]: dict(means[name]) for name in structures},
        "metric_per_case": [
            {"case": case.name, "metrics": {number[name]: dict(case.scores[name]) for name in structures}}
            for case in cases
        ],
    }


def _nnunet_means(cases: Sequence[CaseScores], structures: Sequence[str]) -> dict[str, dict[str, float]]:
    return {
        name: {s: _mean([case.scores[name][s] for case in cases]) for s in ("Dice", "IoU", *_COUNTS)}
        for name in structures
    }


# -- what they share --------------------------------------------------------------------------------------------------


def _dice(predicted: NDArray[np.bool_], truth: NDArray[np.bool_]) -> float:
    size = int(predicted.sum()) + int(truth.sum())
    return 2.0 * int((predicted & truth).sum()) / size if size else math.nan


def _confusion(predicted: NDArray[np.bool_], truth: NDArray[np.bool_]) -> tuple[float, float, float, float]:
    """True positives, false positives, false negatives, true negatives."""
    tp = int((predicted & truth).sum())
    fp, fn = int(predicted.sum()) - tp, int(truth.sum()) - tp
    return float(tp), float(fp), float(fn), float(truth.size - tp - fp - fn)


def _mean(values: Sequence[float]) -> float:
    """Without NaN."""
    kept = [one for one in values if not math.isnan(one)]
    return math.fsum(kept) / len(kept) if kept else math.nan


def _plain(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values) if values else math.nan


PROTOCOLS: dict[str, Protocol] = {
    one.name: one
    for one in (
        Protocol(
            name="synapse",
            says="Synapse as TransUNet scores it: volume by volume, HD95 (pooled) in voxels; a structure that is not "
            "in the volume but predicted has Dice 1 and HD95 0, one that is not predicted Dice 0 and HD95 0.",
            case=synapse_case,
            figures=synapse_figures,
        ),
        Protocol(
            name="acdc",
            says="ACDC's challenge: Dice, Hausdorff distance (the largest, in the unit of the spacing) and absolute "
            "error of the volume in ml, for each structure at end-diastole (ED) and end-systole (ES); a missing "
            "structure has Dice 0 and no distance.",
            case=acdc_case,
            figures=acdc_figures,
        ),
        Protocol(
            name="isic",
            says="ISIC 2018 task 1: means over images; threshold_jaccard takes a Jaccard below 0.65 as 0; both masks "
            "empty is 1.",
            case=isic_case,
            figures=isic_figures,
        ),
        Protocol(
            name="nnunet",
            says="nnU-Net's evaluation: no score where a structure is neither there nor predicted, and 0 where it is "
            "one of both; foreground_mean is the mean of the structures' means.",
            case=nnunet_case,
            figures=nnunet_figures,
        ),
    )
}
