"""Scores of predicted probabilities, label by label, and their mean over the labels.

- auroc: area under the receiver operating characteristic, ties counting half; over labels with both outcomes.
- auprc: average precision, the sum of precision over the steps of recall.
- f1: at probability 0.5, as the paper reports.
- best_f1: at the threshold that is best on the very stays scored, an upper bound that needs no calibration.
- brier: mean squared error of the probabilities.
- ece: expected calibration error: ten bins of equally many stays, mean |mean probability - share of positives|.
- auroc_low, auroc_high, auprc_low, auprc_high: 95 % percentile intervals by resampling patients.

Stays whose label is not known are left out of that label. With several labels each figure is the mean over labels;
auroc_micro pools all pairs of stay and label.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

FORMAT = {
    "auroc": ".3f",
    "auprc": ".3f",
    "f1": ".3f",
    "best_f1": ".3f",
    "brier": ".3f",
    "ece": ".3f",
    "auroc_low": ".3f",
    "auroc_high": ".3f",
    "auprc_low": ".3f",
    "auprc_high": ".3f",
    "auroc_micro": ".3f",
    "stays": ",.0f",
}
_BINS = 10


@dataclass(frozen=True)
class Predictions:
    """N stays: number in their set, patient, truth (N, K) with NaN, probability (N, K)."""

    index: np.ndarray
    patient: np.ndarray
    truth: np.ndarray
    probability: np.ndarray

    def label(self, k: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Truth, probability and patient of the stays whose label k is known."""
        known = ~np.isnan(self.truth[:, k])
        return self.truth[known, k] > 0.5, self.probability[known, k], self.patient[known]


def pack(index: Tensor, patient: Tensor, truth: Tensor, probability: Tensor) -> dict[str, Tensor]:
    """A batch as an entry of the metric state, named by its first stay, so that states of processes can be joined."""
    ids = torch.stack([index, patient], dim=1).to(torch.float64).cpu()
    rest = [part.detach().to(torch.float64).cpu() for part in (truth, probability)]
    return {f"stay {int(index[0])}": torch.cat([ids, *rest], dim=1)}


def unpack(sums: Mapping[str, Tensor]) -> Predictions | None:
    """All predictions in the order of the stays; None where there are none."""
    if not sums:
        return None
    rows = torch.cat(list(sums.values())).numpy()
    rows = rows[rows[:, 0].argsort(kind="stable")]
    truth, probability = np.split(rows[:, 2:], 2, axis=1)
    return Predictions(rows[:, 0].astype(np.int64), rows[:, 1].astype(np.int64), truth, probability)


def figures(found: Predictions, *, bootstrap: int = 0, seed: int = 0) -> dict[str, float]:
    """All scores; intervals from `bootstrap` resamplings."""
    rows = []
    for k in range(found.truth.shape[1]):
        truth, probability, patient = found.label(k)
        if len(truth):
            rows.append(_of_label(truth, probability, patient, bootstrap, seed))
    if not rows:
        return {}
    mean = {name: _mean([row[name] for row in rows]) for name in rows[0]}
    if found.truth.shape[1] > 1:
        known = ~np.isnan(found.truth)
        mean["auroc_micro"] = auroc(found.truth[known] > 0.5, found.probability[known])
    return mean | {"stays": float(len(found.index))}


def _of_label(
    truth: np.ndarray, probability: np.ndarray, patient: np.ndarray, bootstrap: int, seed: int
) -> dict[str, float]:
    said = probability >= 0.5
    found = {
        "auroc": auroc(truth, probability),
        "auprc": average_precision(truth, probability),
        "f1": f1(truth, said),
        "best_f1": best_f1(truth, probability),
        "brier": float(((probability - truth) ** 2).mean()),
        "ece": calibration_error(truth, probability),
    }
    if bootstrap:
        drawn = resampled(truth, probability, patient, bootstrap, seed)
        for name, values in zip(("auroc", "auprc"), drawn.T):
            low, high = np.nanpercentile(values, [2.5, 97.5]) if not np.isnan(values).all() else (np.nan, np.nan)
            found |= {f"{name}_low": float(low), f"{name}_high": float(high)}
    return found


def resampled(truth: np.ndarray, probability: np.ndarray, patient: np.ndarray, count: int, seed: int) -> np.ndarray:
    """(count, 2) AUROC and AUPRC of `count` draws of as many patients, with replacement, each with all its stays."""
    rng = np.random.default_rng([seed, 95])
    _, owner = np.unique(patient, return_inverse=True)
    order = np.argsort(owner, kind="stable")
    first = np.searchsorted(owner[order], np.arange(owner.max() + 2))
    result = np.empty((count, 2))
    for i in range(count):
        weight = np.bincount(rng.integers(0, owner.max() + 1, owner.max() + 1), minlength=owner.max() + 1)
        rows = np.repeat(order, np.repeat(weight, np.diff(first)))
        result[i] = auroc(truth[rows], probability[rows]), average_precision(truth[rows], probability[rows])
    return result


def auroc(truth: np.ndarray, probability: np.ndarray) -> float:
    """NaN where only one outcome occurs."""
    from scipy.stats import rankdata

    many, rest = int(truth.sum()), int((~truth).sum())
    if not many or not rest:
        return float("nan")
    return float((rankdata(probability)[truth].sum() - many * (many + 1) / 2) / (many * rest))


def curve(truth: np.ndarray, probability: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Numbers of true and of false alarms as the threshold falls from one distinct probability to the next."""
    order = np.argsort(-probability, kind="stable")
    last = np.r_[np.diff(probability[order]) != 0, True]
    return np.cumsum(truth[order])[last], np.cumsum(~truth[order])[last]


def average_precision(truth: np.ndarray, probability: np.ndarray) -> float:
    """NaN where nothing is positive."""
    if not truth.any():
        return float("nan")
    right, wrong = curve(truth, probability)
    recall = np.r_[0, right] / truth.sum()
    return float((np.diff(recall) * right / (right + wrong)).sum())


def f1(truth: np.ndarray, said: np.ndarray) -> float:
    """0 where nothing is positive and nothing is said to be."""
    total = int(truth.sum() + said.sum())
    return float(2 * (truth & said).sum() / total) if total else 0.0


def best_f1(truth: np.ndarray, probability: np.ndarray) -> float:
    right, wrong = curve(truth, probability)
    return float((2 * right / (truth.sum() + right + wrong)).max())


def calibration_bins(truth: np.ndarray, probability: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Mean probability, share of positives and number of stays of each of ten bins of equally many stays."""
    order = np.argsort(probability, kind="stable")
    parts = [part for part in np.array_split(order, _BINS) if len(part)]
    mean = np.array([probability[part].mean() for part in parts])
    share = np.array([truth[part].mean() for part in parts])
    return mean, share, np.array([len(part) for part in parts])


def calibration_error(truth: np.ndarray, probability: np.ndarray) -> float:
    mean, share, count = calibration_bins(truth, probability)
    return float((np.abs(mean - share) * count).sum() / count.sum())


def _mean(values: list[float]) -> float:
    known = [value for value in values if not np.isnan(value)]
    return float(np.mean(known)) if known else float("nan")
