"""Scores of a classification, from the predictions of every series.

- accuracy: share of series whose class is right.
- macro_f1: mean over classes of F1; a class that neither occurs nor is predicted counts not at all.
- auroc: area under the receiver operating characteristic; with more than two classes the mean over the classes that
  occur, each against the rest. Ties count half.
- log_loss: mean of -log of the probability of the true class.
- recall <class>: share of the class's series that is found.

Predictions are kept whole and put in order before anything is summed up, so neither batch size nor processes change a
figure.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

FORMAT = {"accuracy": ".4f", "macro_f1": ".4f", "auroc": ".4f", "log_loss": ".4f", "series": ",.0f"}
_FLOOR = 1e-12  # of a probability, so that a certain error has a finite loss


@dataclass(frozen=True)
class Predictions:
    """N series with what was said of them.

    Attributes:
        index: (N,) numbers of the series in their set, ascending.
        truth: (N,) class numbers.
        probability: (N, K).
    """

    index: np.ndarray
    truth: np.ndarray
    probability: np.ndarray

    @property
    def said(self) -> np.ndarray:
        """(N,) the likeliest class; the first of equals."""
        return np.asarray(self.probability.argmax(axis=1))

    def confusion(self) -> np.ndarray:
        """(K, K) series: true class by row, predicted class by column."""
        classes = self.probability.shape[1]
        return np.bincount(self.truth * classes + self.said, minlength=classes**2).reshape(classes, classes)


def pack(index: Tensor, truth: Tensor, probability: Tensor) -> dict[str, Tensor]:
    """The predictions of a batch as an entry of the metric state: rows (index, truth, probabilities), float64.

    Each batch has an entry of its own, named by its first series, so that adding states up over processes joins them.
    """
    ids = torch.stack([index, truth], dim=1).to(torch.float64).cpu()
    rows = torch.cat([ids, probability.detach().to(torch.float64).cpu()], dim=1)
    return {f"series {int(index[0])}": rows}


def unpack(sums: Mapping[str, Tensor]) -> Predictions | None:
    """All predictions of a metric state in the order of the series; None where there are none."""
    if not sums:
        return None
    rows = torch.cat(list(sums.values())).numpy()
    rows = rows[rows[:, 0].argsort(kind="stable")]
    index, truth = rows[:, :2].astype(np.int64).T
    return Predictions(index, truth, rows[:, 2:])


def figures(found: Predictions, classes: Sequence[str]) -> dict[str, float]:
    """All scores."""
    confusion = found.confusion().astype(np.float64)
    total, right = confusion.sum(), confusion.diagonal()
    true, said = confusion.sum(axis=1), confusion.sum(axis=0)
    own = found.probability[np.arange(len(found.truth)), found.truth]
    return {
        "accuracy": float(right.sum() / total),
        "macro_f1": _mean(2 * right, true + said),
        "auroc": auroc(found.truth, found.probability),
        "log_loss": float(-np.log(np.maximum(own, _FLOOR)).mean()),
        "series": float(total),
        **{f"recall {name}": float(right[i] / true[i]) for i, name in enumerate(classes) if true[i]},
    }


def auroc(truth: np.ndarray, probability: np.ndarray) -> float:
    """Area under the receiver operating characteristic, see the module; NaN where only one class occurs.

    Args:
        truth: (N,) class numbers.
        probability: (N, K).
    """
    from scipy.stats import rankdata

    areas = []
    for one in range(probability.shape[1]) if probability.shape[1] > 2 else (1,):
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
