"""What the folds of a cross-validation of survival say together."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from attn_medseg.pathology.survival import metrics
from attn_medseg.pathology.survival.baselines import predictions
from attn_medseg.pathology.survival.data import PatientSet
from attn_shared.task import DataBundle

TOLD = "Scores are means over folds: risks of different models are not ranked among each other"


@dataclass(frozen=True)
class Fold:
    """What is kept of a fold: names of its test patients, what was predicted of them, and the state of training."""

    names: tuple[str, ...]
    state: Mapping[str, Any]
    scored: metrics.Scored


def keep(scored: metrics.Scored, part: PatientSet) -> Fold:
    """What is needed of a fold later on."""
    return Fold(tuple(part.patients[i].name for i in scored.index.tolist()), part.state, scored)


def baselines(bundle: DataBundle) -> Mapping[str, tuple[str, metrics.Scored]]:
    """Name -> what it is, and what it says of the fold's test patients."""
    assert isinstance(bundle.train, PatientSet)
    assert isinstance(bundle.test, PatientSet)
    return predictions(bundle.train, bundle.test)


def figures(folds: Sequence[Fold]) -> dict[str, float]:
    """Scores of one repeat: means over the folds."""
    each = [metrics.figures(fold.scored, fold.state) for fold in folds]
    names = [name for name in ("c_index", "ibs", "loss") if any(name in one for one in each)]
    found = {name: [one[name] for one in each if not math.isnan(one.get(name, math.nan))] for name in names}
    return {name: float(np.mean(values)) if values else math.nan for name, values in found.items()}


def intervals(repeats: Sequence[Sequence[Fold]], resamples: int) -> dict[str, tuple[float, float]]:
    """Score -> its 95 % interval: patients resampled in every fold. Repeats hold the same patients, so the bounds are
    means over repeats and not narrower with more of them."""
    each = [
        metrics.intervals([fold.scored for fold in folds], state_of=[f.state for f in folds], resamples=resamples)
        for folds in repeats
    ]
    names = set.intersection(*(set(one) for one in each))
    return {name: tuple(float(np.mean([one[name][i] for one in each])) for i in (0, 1)) for name in names}  # type: ignore[misc]


def table(results: Sequence[Any]) -> str:
    """CSV text: a line for each patient of each repeat of each model."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["model", "repeat", "fold", "case_id", "time", "event", "risk"])
    for one in results:
        for repeat, folds in enumerate(one.rows):
            for number, fold in enumerate(folds):
                found = fold.scored
                for i, name in enumerate(fold.names):
                    row = [f"{found.time[i]:.6g}", int(found.event[i]), f"{found.risk[i]:.6g}"]
                    writer.writerow([one.name, repeat, number, name, *row])
    return text.getvalue()
