"""Scores of classified sequences.

- mcc: Matthews' correlation of the likeliest class with the true one, by Gorodkin's formula where there are more than
  two classes; 0 where one of both is constant.
- auroc, auprc: area under the ROC curve and average precision; ties count as scikit-learn counts them. With two
  classes of the second one, with more the mean over the classes that occur, each against the rest.
- accuracy: share of sequences whose likeliest class is right.
- f1: of the second class, with more than two the mean over classes; 0 where nothing is right.
- ece: mean distance between the probability of the likeliest class and how often it is right, over 15 bins of equal
  width, weighted by sequences.
- brier: mean squared error of the probability of the second class; with more than two the sum over classes.
- logloss: mean -log of the probability given to what is true, in nats.

Rows are kept and put in order before anything is computed, so neither batch size nor processes change a figure.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from attn_shared.errors import UserError
from attn_shared.intervals import interval, interval_names

FORMATS: Mapping[str, str] = {
    "mcc": ".4f",
    "auroc": ".4f",
    "auprc": ".4f",
    "accuracy": ".4f",
    "f1": ".4f",
    "ece": ".4f",
    "brier": ".4f",
    "logloss": ".4f",
}
BINS = 15
_MANY_ROWS = 20_000
_BLOCK = 2_000_000  # numbers of a block of resamples


@dataclass(frozen=True)
class Rows:
    """Scored sequences, in order.

    Attributes:
        score: (N, K) float64 log probabilities.
        label: (N,) int64.
    """

    score: np.ndarray
    label: np.ndarray

    @property
    def probability(self) -> np.ndarray:
        """(N, K)."""
        return np.asarray(np.exp(self.score))

    @property
    def classes(self) -> int:
        return int(self.score.shape[1])

    @property
    def said(self) -> np.ndarray:
        """(N,) the likeliest class; the first of equals."""
        return np.asarray(self.score.argmax(axis=1))


def pack(batch: Mapping[str, Tensor], score: Tensor) -> dict[str, Tensor]:
    """A batch's entry of the metric state, from (B, K) log probabilities."""
    table = torch.cat([batch["index"][:, None].cpu(), batch["label"][:, None].cpu()], dim=1).double()
    score = score.detach().to("cpu", torch.float64)
    if bool(torch.isnan(score).any()):
        raise UserError("the predictions are no longer numbers (NaN); try a smaller --optim.lr")
    return {f"rows {int(batch['index'][0])}": torch.cat([table, score], dim=1)}


def unpack(state: Mapping[str, Tensor]) -> Rows | None:
    """All rows of a metric state; None where there are none."""
    if not state:
        return None
    table = np.concatenate([value.numpy() for value in state.values()])
    table = table[np.argsort(table[:, 0], kind="stable")]
    return Rows(table[:, 2:], table[:, 1].astype(np.int64))


def figures(rows: Rows, *, resamples: int = 0, seed: int = 0) -> dict[str, float]:
    """All figures, with the bounds of 95 % intervals where `resamples` > 0."""
    scorer = _Scorer(rows)
    found = {name: float(value[0]) for name, value in scorer(np.ones((1, len(rows.label)))).items()}
    if resamples:
        low, high = bootstrap(rows, resamples, seed)
        for name in low:
            found |= interval(name, low[name], high[name])
    names = [name for key in FORMATS for name in (key, *interval_names(key))]
    return {name: found[name] for name in names if name in found}


def bootstrap(rows: Rows, resamples: int = 1000, seed: int = 0) -> tuple[dict[str, float], dict[str, float]]:
    """2.5 % and 97.5 % quantiles of every figure under resampling of sequences."""
    count = len(rows.label)
    if count > _MANY_ROWS:
        resamples = min(resamples, 200)
    rng, scorer = np.random.default_rng(seed), _Scorer(rows)
    block = max(1, _BLOCK // count)
    parts = []
    for first in range(0, resamples, block):
        drawn = rng.integers(0, count, (min(block, resamples - first), count))
        drawn += np.arange(len(drawn))[:, None] * count
        weight = np.bincount(drawn.ravel(), minlength=len(drawn) * count).reshape(-1, count)
        parts.append(scorer(weight.astype(np.float64)))
    made = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    low, high = {}, {}
    for name, values in made.items():
        if np.isnan(values).all():
            low[name] = high[name] = float("nan")
        else:
            low[name], high[name] = (float(value) for value in np.nanquantile(values, (0.025, 0.975)))
    return low, high


class _Scorer:
    """Figures of one set of rows under many weightings at once."""

    def __init__(self, rows: Rows) -> None:
        probability, said, count = rows.probability, rows.said, len(rows.label)
        self.classes = rows.classes
        self.cell = _one_hot(rows.label * rows.classes + said, rows.classes**2)
        truth = _one_hot(rows.label, rows.classes)
        self.loss = -np.take_along_axis(rows.score, rows.label[:, None], axis=1)[:, 0]
        error = ((probability - truth) ** 2).sum(axis=1)
        self.error = error / 2 if rows.classes == 2 else error
        sure = probability[np.arange(count), said]
        place = _one_hot(np.clip(np.ceil(sure * BINS).astype(np.int64) - 1, 0, BINS - 1), BINS)
        self.miss = place * (sure - (said == rows.label))[:, None]
        which = [1] if rows.classes == 2 else range(rows.classes)
        # With two classes the difference of both scores orders rows that are sure beyond what a probability can tell.
        scores = [rows.score[:, 1] - rows.score[:, 0] if rows.classes == 2 else rows.score[:, k] for k in which]
        self.ranked = [_Ranked(score, truth[:, k]) for score, k in zip(scores, which)]

    def __call__(self, weight: np.ndarray) -> dict[str, np.ndarray]:
        """(R, N) weights -> name -> (R,)."""
        total = weight.sum(axis=1)
        confusion = (weight @ self.cell).reshape(-1, self.classes, self.classes)
        areas = np.array([one(weight) for one in self.ranked])  # (classes, 2, R)
        with np.errstate(invalid="ignore"):
            roc, precision = _mean(areas[:, 0]), _mean(areas[:, 1])
        return {
            "mcc": mcc(confusion),
            "auroc": roc,
            "auprc": precision,
            "accuracy": np.trace(confusion, axis1=1, axis2=2) / total,
            "f1": f1(confusion),
            "ece": np.abs(weight @ self.miss).sum(axis=1) / total,
            "brier": weight @ self.error / total,
            "logloss": weight @ self.loss / total,
        }


class _Ranked:
    """Rows in descending order of a score, equal ones in one group."""

    def __init__(self, score: np.ndarray, truth: np.ndarray) -> None:
        self.order = np.argsort(-score, kind="stable")
        ordered = score[self.order]
        self.begin = np.flatnonzero(np.concatenate([[True], ordered[1:] != ordered[:-1]]))
        self.truth = truth[self.order]

    def __call__(self, weight: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(R, N) weights -> areas under the ROC curve and the precision-recall curve, (R,) each; NaN without both."""
        weight = weight[:, self.order]
        hit = np.add.reduceat(weight * self.truth, self.begin, axis=1)
        miss = np.add.reduceat(weight, self.begin, axis=1) - hit
        hits, misses = hit.sum(axis=1), miss.sum(axis=1)
        below = misses[:, None] - np.cumsum(miss, axis=1)
        with np.errstate(invalid="ignore", divide="ignore"):
            roc = (hit * (below + miss / 2)).sum(axis=1) / (hits * misses)
            above = np.cumsum(hit, axis=1)
            taken = above + np.cumsum(miss, axis=1)
            precision = np.where(taken > 0, above / np.maximum(taken, 1e-300), 0.0)
            average = (hit * precision).sum(axis=1) / hits
        return roc, np.where(misses > 0, average, np.where(hits > 0, 1.0, np.nan))


def mcc(confusion: np.ndarray) -> np.ndarray:
    """(…, K, K) truth by row -> (…)."""
    total = confusion.sum(axis=(-2, -1))
    truth, said = confusion.sum(axis=-1), confusion.sum(axis=-2)
    right = np.trace(confusion, axis1=-2, axis2=-1)
    both = right * total - (truth * said).sum(axis=-1)
    spread = (total**2 - (said**2).sum(axis=-1)) * (total**2 - (truth**2).sum(axis=-1))
    return np.asarray(np.where(spread > 0, both / np.sqrt(np.maximum(spread, 1e-300)), 0.0))


def f1(confusion: np.ndarray) -> np.ndarray:
    """(…, K, K) -> (…): of the second class, or the mean over classes that occur or are said."""
    right = np.diagonal(confusion, axis1=-2, axis2=-1)
    size = confusion.sum(axis=-1) + confusion.sum(axis=-2)
    each = np.where(size > 0, 2 * right / np.maximum(size, 1e-300), 0.0)
    if confusion.shape[-1] == 2:
        return np.asarray(each[..., 1])
    return np.asarray(each.sum(axis=-1) / np.maximum((size > 0).sum(axis=-1), 1))


@dataclass(frozen=True)
class Curve:
    """Reliability: mean probability and share of hits of a bin, and its sequences, (M,) each."""

    predicted: np.ndarray
    happened: np.ndarray
    rows: np.ndarray


def reliability(probability: np.ndarray, happened: np.ndarray, bins: int = BINS) -> Curve:
    """Bins of equal width; empty ones are left out."""
    place = np.clip(np.ceil(probability * bins).astype(np.int64) - 1, 0, bins - 1)
    rows = np.bincount(place, minlength=bins)
    full = rows > 0
    return Curve(
        np.bincount(place, weights=probability, minlength=bins)[full] / rows[full],
        np.bincount(place, weights=happened.astype(np.float64), minlength=bins)[full] / rows[full],
        rows[full],
    )


def _one_hot(values: np.ndarray, count: int) -> np.ndarray:
    made = np.zeros((len(values), count))
    made[np.arange(len(values)), values] = 1.0
    return made


def _mean(values: np.ndarray) -> np.ndarray:
    """(M, R) -> (R,) over what is a number."""
    there = ~np.isnan(values)
    total = np.where(there, values, 0.0).sum(axis=0)
    return np.where(there.any(axis=0), total / np.maximum(there.sum(axis=0), 1), np.nan)
