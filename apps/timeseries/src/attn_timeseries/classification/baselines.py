"""Rows that stand beside every classifier: the commonest class, nearest neighbours, and MiniRocket with ridge.

They are fitted on all series of training and validation: none of them chooses anything on the latter.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from attn_timeseries.classification.data import SeriesSet
from attn_timeseries.classification.metrics import Predictions
from attn_timeseries.classification.rocket import MiniRocket, batches, ridge_probabilities

NOTES = {
    "majority": "the commonest class of the training series",
    "1-nn euclidean": "the nearest training series, all stretched to one length",
    "1-nn dtw": "the nearest training series by dynamic time warping over all channels together, no window",
    "minirocket": "9,996 fixed convolutions and a ridge classifier; probabilities are a softmax of its margins",
}
_MOST_CELLS = 4e10  # of all warping tables: a quarter of an hour; larger sets go without that row


@dataclass(frozen=True)
class _Problem:
    train: list[np.ndarray]
    y: np.ndarray
    test: list[np.ndarray]
    classes: int


def predictions(parts: Sequence[SeriesSet], test: SeriesSet, *, seed: int) -> dict[str, Predictions]:
    """What each baseline says of every test series."""
    problem = _Problem(
        train=[one for part in parts for one in part.series()],
        y=np.concatenate([part.y.numpy() for part in parts]),
        test=test.series(),
        classes=len(test.classes),
    )
    said = {"majority": _majority(problem), "1-nn euclidean": _euclidean(problem)}
    lengths = sum(map(len, problem.train)) * float(sum(map(len, problem.test)))
    if lengths * problem.train[0].shape[1] <= _MOST_CELLS:
        said["1-nn dtw"] = _dtw(problem)
    transform = MiniRocket(seed=seed).fit(problem.train)
    x, tested = (np.concatenate([transform(s[b]) for b in batches(len(s))]) for s in (problem.train, problem.test))
    said["minirocket"] = ridge_probabilities(x, problem.y, tested, problem.classes)
    index = np.arange(len(test))
    return {name: Predictions(index, test.y.numpy(), p) for name, p in said.items()}


def _majority(problem: _Problem) -> np.ndarray:
    share = np.bincount(problem.y, minlength=problem.classes) / len(problem.y)
    return np.tile(share, (len(problem.test), 1))


def _one_hot(problem: _Problem, nearest: np.ndarray) -> np.ndarray:
    return np.asarray(np.eye(problem.classes)[problem.y[nearest]])


def _euclidean(problem: _Problem) -> np.ndarray:
    longest = max(map(len, problem.train))
    train, test = (
        np.stack([stretched(one, longest).ravel() for one in part]) for part in (problem.train, problem.test)
    )
    distance = (test**2).sum(axis=1)[:, None] + (train**2).sum(axis=1) - 2 * test @ train.T
    return _one_hot(problem, distance.argmin(axis=1))


def stretched(series: np.ndarray, steps: int) -> np.ndarray:
    """(L, C) -> (steps, C), linearly between its values, first and last kept."""
    if len(series) == steps:
        return series
    at = np.linspace(0, len(series) - 1, steps)
    return np.stack([np.interp(at, np.arange(len(series)), column) for column in series.T], axis=1)


def _dtw(problem: _Problem) -> np.ndarray:
    lengths = np.array([len(one) for one in problem.train])
    train = np.zeros((len(lengths), lengths.max(), problem.train[0].shape[1]))
    for i, one in enumerate(problem.train):
        train[i, : len(one)] = one
    nearest = [dtw_distances(one, train, lengths).argmin() for one in problem.test]
    return _one_hot(problem, np.array(nearest))


def dtw_distances(series: np.ndarray, others: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """(N,) warped squared distances between (L, C) and N series padded to (N, M, C), `lengths` (N,) of them real.

    The cost of a pair of steps is the squared distance over all channels; a path begins with both first steps, ends
    with both last ones, and goes one step on in one or both series at a time.
    """
    cost = (series**2).sum(axis=1)[:, None, None] + (others**2).sum(axis=2).T
    cost = np.maximum(cost - 2 * np.einsum("lc,nmc->lmn", series, others), 0.0)  # (L, M, N)
    steps, width = cost.shape[:2]
    # By diagonals: all cells i + j = d follow from the two diagonals before. Kept by i, with a rim at i = -1.
    before = np.full((steps + 1, len(others)), np.inf)
    last = before.copy()
    last[0] = 0.0  # so that the first cell costs only itself
    final = np.empty(len(others))
    for d in range(steps + width - 1):
        i = np.arange(max(0, d - width + 1), min(steps, d + 1))
        # (i, j-1) and (i-1, j) lie on the diagonal before, (i-1, j-1) on the one before that.
        best = np.minimum(np.minimum(last[i + 1], last[i]), before[i]) if d else np.zeros((1, len(others)))
        now = np.full_like(last, np.inf)
        now[i + 1] = best + cost[i, d - i]
        ended = lengths - 1 == d - (steps - 1)
        final[ended] = now[steps, ended]
        before, last = last, now
        if d == 0:
            before[:] = np.inf
    return final
