"""Scores of predicted clicks.

- auc: chance that a click is given a higher probability than a row that was not clicked, equal ones counting half.
- gauc: AUC within each user's rows, averaged over users with both labels, weighted by their rows.
- logloss: mean -log of the probability given to what happened.
- ece: mean distance between mean probability and share of clicks over bins of equally many rows, weighted by rows.
- rate ratio: mean probability over the share of clicks; 1 where the level is right.

Rows are kept and put in order before anything is computed, so neither batch size nor processes change a figure.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from attn_recsys.items.metrics import activity_groups
from attn_shared.errors import UserError
from attn_shared.intervals import interval

FORMATS: Mapping[str, str] = {
    "auc": ".4f",
    "gauc": ".4f",
    "logloss": ".4f",
    "ece": ".4f",
    "rate ratio": ".3f",
}
_RESAMPLES = 1000
_MANY_ROWS = 100_000


@dataclass(frozen=True)
class Rows:
    """Scored rows, in order.

    Attributes:
        odds: (N,) float64 log odds.
        label: (N,) float64.
        user: (N,) int64.
        activity: (N,) int64.
    """

    odds: np.ndarray
    label: np.ndarray
    user: np.ndarray
    activity: np.ndarray

    @property
    def probability(self) -> np.ndarray:
        return sigmoid(self.odds)


def sigmoid(odds: np.ndarray) -> np.ndarray:
    """1 / (1 + exp(-odds)), without overflow."""
    small = np.exp(-np.abs(odds))
    return np.asarray(np.where(odds >= 0, 1 / (1 + small), small / (1 + small)))


def pack(batch: Mapping[str, Tensor], odds: Tensor) -> dict[str, Tensor]:
    """A batch's entry of the metric state."""
    columns = [batch["index"], odds.detach(), batch["label"], batch["user"], batch["activity"]]
    table = torch.stack([column.to("cpu", torch.float64) for column in columns], dim=1)
    if not bool(torch.isfinite(table[:, 1]).all()):
        raise UserError("the predictions are no longer numbers (NaN); try a smaller --optim.lr")
    return {f"rows {int(batch['index'][0])}": table}


def unpack(state: Mapping[str, Tensor]) -> Rows | None:
    """All rows of a metric state; None where there are none."""
    if not state:
        return None
    table = np.concatenate([value.numpy() for value in state.values()])
    table = table[np.argsort(table[:, 0], kind="stable")]
    return Rows(table[:, 1], table[:, 2], table[:, 3].astype(np.int64), table[:, 4].astype(np.int64))


def auc(score: np.ndarray, label: np.ndarray, weight: np.ndarray | None = None) -> float:
    """Area under the ROC curve, NaN where one label is missing."""
    order = np.argsort(score, kind="stable")
    return float(_auc_sorted(_ends(score[order]), label[order], None if weight is None else weight[order]))


def _ends(ordered: np.ndarray) -> np.ndarray:
    """Where each run of equal scores begins."""
    return np.flatnonzero(np.concatenate([[True], ordered[1:] != ordered[:-1]]))


def _auc_sorted(begin: np.ndarray, label: np.ndarray, weight: np.ndarray | None) -> float:
    weight = np.ones(len(label)) if weight is None else weight
    click = np.add.reduceat(weight * label, begin)
    rest = np.add.reduceat(weight * (1 - label), begin)
    total = click.sum() * rest.sum()
    if total == 0:
        return float("nan")
    below = np.cumsum(rest) - rest
    return float((click * (below + rest / 2)).sum() / total)


def gauc(score: np.ndarray, label: np.ndarray, user: np.ndarray) -> float:
    """Weighted mean of the users' AUC, NaN where none has both labels."""
    order = np.lexsort((score, user))
    score, label, user = score[order], label[order], user[order]
    begin = np.flatnonzero(np.concatenate([[True], (score[1:] != score[:-1]) | (user[1:] != user[:-1])]))
    click, rest = np.add.reduceat(label, begin), np.add.reduceat(1 - label, begin)
    owner = np.unique(user[begin], return_inverse=True)[1]
    first = np.searchsorted(owner, owner, side="left")
    below = np.cumsum(rest) - rest
    below -= below[first]
    clicks, rests = np.bincount(owner, weights=click), np.bincount(owner, weights=rest)
    above = np.bincount(owner, weights=click * (below + rest / 2))
    both = (clicks > 0) & (rests > 0)
    if not both.any():
        return float("nan")
    weight = (clicks + rests)[both]
    return float((above[both] / (clicks * rests)[both] * weight).sum() / weight.sum())


def logloss(odds: np.ndarray, label: np.ndarray) -> np.ndarray:
    """(N,) from log odds, so that sure predictions stay exact."""
    return np.asarray(np.maximum(odds, 0) - odds * label + np.log1p(np.exp(-np.abs(odds))))


@dataclass(frozen=True)
class Curve:
    """Calibration.

    Attributes:
        predicted, happened: (M,) mean probability and share of clicks of a bin.
        rows: (M,) rows of it.
    """

    predicted: np.ndarray
    happened: np.ndarray
    rows: np.ndarray

    @property
    def error(self) -> float:
        """ECE."""
        return float((self.rows * np.abs(self.predicted - self.happened)).sum() / self.rows.sum())


def calibration(probability: np.ndarray, label: np.ndarray, bins: int) -> Curve:
    """Bins between the quantiles of the probability; equal ones stay together, so there may be fewer bins."""
    edges = np.quantile(probability, np.arange(1, bins) / bins)
    place = np.searchsorted(edges, probability)
    rows = np.bincount(place, minlength=bins)
    filled = rows > 0
    predicted = np.bincount(place, weights=probability, minlength=bins)[filled] / rows[filled]
    happened = np.bincount(place, weights=label, minlength=bins)[filled] / rows[filled]
    return Curve(predicted, happened, rows[filled])


def figures(rows: Rows, *, groups: int, bins: int, intervals: bool) -> dict[str, float]:
    """All figures of a split; by group of users and with the bounds of 95 % intervals."""
    probability = rows.probability
    found = {"auc": auc(rows.odds, rows.label)}
    users = len(np.unique(rows.user)) < len(rows.user)
    if users:
        found["gauc"] = gauc(rows.odds, rows.label, rows.user)
    found["logloss"] = float(logloss(rows.odds, rows.label).mean())
    found["ece"] = calibration(probability, rows.label, bins).error
    if rows.label.any():
        found["rate ratio"] = float(probability.mean() / rows.label.mean())
    for label, chosen in row_groups(rows, groups):
        found[f"auc, {label}"] = auc(rows.odds[chosen], rows.label[chosen])
    if intervals:
        low, high = bootstrap(rows)
        for name in low:
            found |= interval(name, low[name], high[name])
    return found


def row_groups(rows: Rows, groups: int) -> list[tuple[str, np.ndarray]]:
    """Label and (N,) membership of the rows of about equally many users each, by their activity."""
    if groups < 2 or len(np.unique(rows.user)) == len(rows.user):
        return []
    users, number = np.unique(rows.user, return_inverse=True)
    activity = np.zeros(len(users), np.int64)
    np.maximum.at(activity, number, rows.activity)
    found = []
    for name, chosen in activity_groups(activity, groups):
        member = chosen[number]
        if np.ptp(rows.label[member]) > 0:
            found.append((name.replace(" items", " clicks"), member))
    return found


def bootstrap(rows: Rows, resamples: int = _RESAMPLES, seed: int = 0) -> tuple[dict[str, float], dict[str, float]]:
    """2.5 % and 97.5 % quantiles of AUC and log-loss under resampling of users (of rows, where there are no users)."""
    if len(rows.label) > _MANY_ROWS:
        resamples = min(resamples, 200)
    rng = np.random.default_rng(seed)
    users, number = np.unique(rows.user, return_inverse=True)
    order = np.argsort(rows.odds, kind="stable")
    begin, label, owner = _ends(rows.odds[order]), rows.label[order], number[order]
    loss = np.bincount(number, weights=logloss(rows.odds, rows.label))
    sizes = np.bincount(number)
    made = np.empty((resamples, 2))
    for i in range(resamples):
        weight = np.bincount(rng.integers(0, len(users), len(users)), minlength=len(users)).astype(float)
        made[i] = _auc_sorted(begin, label, weight[owner]), (weight @ loss) / (weight @ sizes)
    low, high = np.nanquantile(made, 0.025, axis=0), np.nanquantile(made, 0.975, axis=0)
    names = ("auc", "logloss")
    return dict(zip(names, map(float, low))), dict(zip(names, map(float, high)))
