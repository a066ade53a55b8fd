"""Scores of a classification, from the predictions of every window.

- accuracy: share of windows whose class is right.
- balanced_accuracy: mean over classes of the share of their windows that is right (recall).
- macro_f1: mean over classes of F1; a class without windows and without predictions counts not at all.
- kappa: Cohen's kappa, agreement beyond what the two distributions of classes give by chance.
- auroc: area under the receiver operating characteristic; with more than two classes the mean over the classes that
  occur, each against the rest. Ties count half.
- subject_accuracy, subject_sd: mean and sample standard deviation of the subjects' accuracies.

Predictions are kept whole, in rows of `columns(K)`, and put in order before anything is summed up, so neither batch
size nor processes change a figure.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

FORMAT = {
    "accuracy": ".3f",
    "macro_f1": ".3f",
    "auroc": ".3f",
    "kappa": ".3f",
    "subject_accuracy": ".3f",
    "subject_sd": ".3f",
    "balanced_accuracy": ".3f",
    "windows": ",.0f",
}


@dataclass(frozen=True)
class Predictions:
    """N windows with what was said of them.

    Attributes:
        index: (N,) numbers of the windows in their set, ascending.
        truth: (N,) class numbers.
        subject: (N,) numbers of subjects.
        probability: (N, K).
    """

    index: np.ndarray
    truth: np.ndarray
    subject: np.ndarray
    probability: np.ndarray

    @property
    def said(self) -> np.ndarray:
        """(N,) the likeliest class; the first of equals."""
        return np.asarray(self.probability.argmax(axis=1))

    def confusion(self) -> np.ndarray:
        """(K, K) windows: true class by row, predicted class by column."""
        classes = self.probability.shape[1]
        return np.bincount(self.truth * classes + self.said, minlength=classes**2).reshape(classes, classes)

    def by_subject(self) -> tuple[np.ndarray, np.ndarray]:
        """Numbers of the subjects, ascending, and the accuracy of each."""
        numbers, place = np.unique(self.subject, return_inverse=True)
        right = np.bincount(place.reshape(-1), weights=self.said == self.truth, minlength=len(numbers))
        return numbers, right / np.bincount(place.reshape(-1), minlength=len(numbers))


def pack(index: Tensor, truth: Tensor, subject: Tensor, probability: Tensor) -> dict[str, Tensor]:
    """The predictions of a batch as an entry of the metric state: rows (index, truth, subject, probabilities), float64.

    Each batch has an entry of its own, named by its first window, so that adding states up over processes joins them.
    """
    ids = torch.stack([index, truth, subject], dim=1).to(torch.float64).cpu()
    rows = torch.cat([ids, probability.detach().to(torch.float64).cpu()], dim=1)
    return {f"window {int(index[0])}": rows}


def unpack(sums: Mapping[str, Tensor]) -> Predictions | None:
    """All predictions of a metric state in the order of the windows; None where there are none."""
    if not sums:
        return None
    rows = torch.cat(list(sums.values())).numpy()
    rows = rows[rows[:, 0].argsort(kind="stable")]
    index, truth, subject = rows[:, :3].astype(np.int64).T
    return Predictions(index, truth, subject, rows[:, 3:])


def figures(found: Predictions) -> dict[str, float]:
    """All scores."""
    confusion = found.confusion().astype(np.float64)
    total, right = confusion.sum(), confusion.diagonal()
    true, said = confusion.sum(axis=1), confusion.sum(axis=0)
    by_chance = float((true * said).sum() / total**2)
    accuracy = float(right.sum() / total)
    subjects = found.by_subject()[1]
    return {
        "accuracy": accuracy,
        "macro_f1": _mean(2 * right, true + said),
        "auroc": auroc(found.truth, found.probability),
        "kappa": (accuracy - by_chance) / (1 - by_chance) if by_chance < 1 else float("nan"),
        "subject_accuracy": float(subjects.mean()),
        "subject_sd": float(subjects.std(ddof=1)) if len(subjects) > 1 else float("nan"),
        "balanced_accuracy": _mean(right, true),
        "windows": float(total),
    }


def auroc(truth: np.ndarray, probability: np.ndarray) -> float:
    """Area under the receiver operating characteristic, see the module; NaN where only one class occurs.

    Args:
        truth: (N,) class numbers.
        probability: (N, K).
    """
    from scipy.stats import rankdata

    classes = range(probability.shape[1]) if probability.shape[1] > 2 else (1,)
    areas = []
    for one in classes:
        positive = truth == one
        many, rest = int(positive.sum()), int((~positive).sum())
        if many and rest:
            ranks = rankdata(probability[:, one])[positive].sum()
            areas.append((ranks - many * (many + 1) / 2) / (many * rest))
    return float(np.mean(areas)) if areas else float("nan")


def _mean(part: np.ndarray, whole: np.ndarray) -> float:
    """Mean of part/whole over the classes where `whole` is not 0."""
    counts = whole > 0
    return float((part[counts] / whole[counts]).mean()) if counts.any() else float("nan")
