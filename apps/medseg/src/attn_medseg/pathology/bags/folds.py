"""What the folds of a cross-validation of bags say together."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from attn_medseg.pathology.bags import metrics
from attn_medseg.pathology.bags.baselines import predictions
from attn_medseg.pathology.bags.data import BagSet
from attn_shared.task import DataBundle

TOLD = "Scores are of the predictions of all folds together, each bag predicted by the model that has not seen it"


@dataclass(frozen=True)
class Fold:
    """What is kept of a fold: names and patients of its test bags, in the order of what was predicted of them."""

    names: tuple[str, ...]
    patients: tuple[str, ...]
    scored: metrics.Scored


def keep(scored: metrics.Scored, part: BagSet) -> Fold:
    """What is needed of a fold later on."""
    own = [part.bags[i] for i in scored.index.tolist()]
    return Fold(tuple(bag.name for bag in own), tuple(bag.patient for bag in own), scored)


def baselines(bundle: DataBundle) -> Mapping[str, tuple[str, metrics.Scored]]:
    """Name -> what it is, and what it says of the fold's test bags."""
    assert isinstance(bundle.train, BagSet)
    assert isinstance(bundle.test, BagSet)
    return predictions(bundle.train, bundle.test)


def figures(folds: Sequence[Fold]) -> dict[str, float]:
    """Scores of one repeat."""
    return metrics.scores(_together(folds))


def intervals(repeats: Sequence[Sequence[Fold]], resamples: int) -> dict[str, tuple[float, float]]:
    """Score -> its 95 % interval: patients resampled, a score being its mean over repeats."""
    whole = [_together(folds) for folds in repeats]
    names = [[name for fold in folds for name in fold.names] for folds in repeats]
    orders = [np.argsort(one) for one in names]  # the same bag in the same row of every repeat
    sorted_ = [one.take(order) for one, order in zip(whole, orders)]
    patients = np.array([patient for fold in repeats[0] for patient in fold.patients])[orders[0]]

    def measure(rows: Any) -> dict[str, float]:
        each = [metrics.scores(one.take(rows)) for one in sorted_]
        return {name: float(np.mean([one[name] for one in each])) for name in each[0]}

    return metrics.intervals(measure, np.unique(patients, return_inverse=True)[1], resamples)


def table(results: Sequence[Any]) -> str:
    """CSV text: a line for each bag of each repeat of each model."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    classes = results[0].rows[0][0].scored.chance.shape[1]
    writer.writerow(
        ["model", "repeat", "fold", "bag", "patient", "label", *(f"probability_{k}" for k in range(classes))]
    )
    for one in results:
        for repeat, folds in enumerate(one.rows):
            for number, fold in enumerate(folds):
                for i, name in enumerate(fold.names):
                    said = [f"{value:.6g}" for value in fold.scored.chance[i]]
                    writer.writerow(
                        [one.name, repeat, number, name, fold.patients[i], int(fold.scored.label[i]), *said]
                    )
    return text.getvalue()


def _together(folds: Sequence[Fold]) -> metrics.Scored:
    parts = [fold.scored for fold in folds]
    label, chance = (np.concatenate([getattr(one, name) for one in parts]) for name in ("label", "chance"))
    index = np.arange(len(label))
    return metrics.Scored(index, index, label, chance)
