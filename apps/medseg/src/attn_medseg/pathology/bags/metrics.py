"""Scores of classified bags.

Of two classes: auroc and f1 are of the second, the positive one. Of more: auroc is the mean over classes of one against
the rest, f1 the mean over classes. balanced_accuracy is the mean over classes of the share found. A score that does not
exist (AUROC where only one class is there) is NaN. Intervals resample patients; in resamples in which a score does not
exist it is left out.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.stats import rankdata
from torch import Tensor

from attn_shared.intervals import with_intervals

FORMAT: Mapping[str, str] = {
    "accuracy": ".3f",
    "auroc": ".3f",
    "f1": ".3f",
    "balanced_accuracy": ".3f",
    "loss": ".4f",
    "bags": ",.0f",
}
"""Metrics in the order of their weight: the first three stand in every table."""
_TINY = 1e-12


@dataclass(frozen=True)
class Scored:
    """Predictions of bags.

    Attributes:
        index: (N,) place of each bag in its part.
        patient: (N,) number of its patient.
        label: (N,) its class.
        chance: (N, K) probabilities.
    """

    index: NDArray[np.int64]
    patient: NDArray[np.int64]
    label: NDArray[np.int64]
    chance: NDArray[np.float64]

    @property
    def said(self) -> NDArray[np.int64]:
        """(N,) class of the highest probability."""
        return self.chance.argmax(axis=1)

    def take(self, rows: NDArray[np.int64]) -> Scored:
        """These bags, as often as they are named."""
        return Scored(self.index[rows], self.patient[rows], self.label[rows], self.chance[rows])


def pack(index: int, patient: int, label: int, chance: Tensor) -> dict[str, Tensor]:
    """A bag's entry of the metric state; each has one of its own, so that adding up over processes joins them."""
    row = torch.cat([torch.tensor([index, patient, label], dtype=torch.float64), chance.detach().cpu().double()])
    return {f"bag {index}": row}


def unpack(sums: Mapping[str, Tensor]) -> Scored | None:
    """All predictions of a metric state in the order of the bags; None where there are none."""
    if not sums:
        return None
    table = torch.stack(list(sums.values())).numpy()
    table = table[table[:, 0].argsort(kind="stable")]
    index, patient, label = (table[:, i].astype(np.int64) for i in range(3))
    return Scored(index, patient, label, table[:, 3:])


def auroc(label: NDArray[np.bool_], score: NDArray[np.float64]) -> float:
    """The share of pairs of a positive and a negative in which the positive scores higher, ties counting half."""
    positive, negative = int(label.sum()), int((~label).sum())
    if not positive or not negative:
        return math.nan
    return float((rankdata(score)[label].sum() - positive * (positive + 1) / 2) / (positive * negative))


def scores(found: Scored) -> dict[str, float]:
    """Every score of the bags."""
    classes = found.chance.shape[1]
    said, label = found.said, found.label
    hits = [int(((said == k) & (label == k)).sum()) for k in range(classes)]
    there = [int((label == k).sum()) for k in range(classes)]
    named = [int((said == k).sum()) for k in range(classes)]
    # A class that is neither there nor named has no F1.
    f1 = [2 * h / (t + n) if t + n else math.nan for h, t, n in zip(hits, there, named)]
    areas = [auroc(label == k, found.chance[:, k]) for k in range(classes)]
    own = found.chance[np.arange(len(label)), label]
    return {
        "accuracy": float((said == label).mean()),
        "auroc": areas[1] if classes == 2 else _mean(areas),
        "f1": f1[1] if classes == 2 else _mean(f1),
        "balanced_accuracy": _mean([h / t for h, t in zip(hits, there) if t]),
        "loss": float(-np.log(np.maximum(own, _TINY)).mean()),
    }


def figures(found: Scored, *, resamples: int = 0) -> dict[str, float]:
    """Every score, with 95 % intervals where `resamples` > 0."""
    plain = scores(found)
    if not resamples:
        return {**plain, "bags": float(len(found.label))}
    bounds = intervals(lambda rows: scores(found.take(rows)), found.patient, resamples)
    return {**with_intervals(plain, bounds), "bags": float(len(found.label))}


def intervals(
    measure: Callable[[NDArray[np.int64]], Mapping[str, float]], group: NDArray[np.int64], resamples: int
) -> dict[str, tuple[float, float]]:
    """name -> 2.5 % and 97.5 % quantiles of what `measure` says of resampled rows.

    Args:
        measure: numbers of rows -> scores.
        group: (N,) of each row; groups are resampled, with all their rows.
    """
    _, number = np.unique(group, return_inverse=True)
    members = [np.flatnonzero(number == one) for one in range(int(number.max()) + 1)]
    rng = np.random.default_rng(0)
    drawn: dict[str, list[float]] = {}
    for _ in range(resamples):
        rows = np.concatenate([members[one] for one in rng.integers(0, len(members), len(members))])
        for name, value in measure(rows).items():
            drawn.setdefault(name, []).append(value)
    found = {}
    for name, values in drawn.items():
        kept = np.array([one for one in values if not math.isnan(one)])
        if len(kept):
            low, high = np.quantile(kept, (0.025, 0.975))
            found[name] = (float(low), float(high))
    return found


def _mean(values: list[float]) -> float:
    kept = [one for one in values if not math.isnan(one)]
    return float(np.mean(kept)) if kept else math.nan
