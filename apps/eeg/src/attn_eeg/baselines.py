"""Rows that stand beside every model: the commonest class, linear discriminant analysis, the nearest neighbour.

The nearest neighbour is the witness for leaks: it can only win by finding a window of the same recording.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from attn_eeg.data.windows import WindowSet
from attn_eeg.metrics import Predictions


@dataclass(frozen=True)
class Baseline:
    """A classifier that no gradient trains.

    Attributes:
        name: for tables.
        note: how it was made.
        fit: from training values (N, D), their classes (N,), values to classify (M, D) and the number of classes K to
            probabilities (M, K).
    """

    name: str
    note: str
    fit: Callable[[np.ndarray, np.ndarray, np.ndarray, int], np.ndarray]


def majority(x: np.ndarray, y: np.ndarray, tested: np.ndarray, classes: int) -> np.ndarray:
    """Shares of the classes in training, whatever the window; (M, K)."""
    share = np.bincount(y, minlength=classes) / len(y)
    return np.tile(share, (len(tested), 1))


def lda(x: np.ndarray, y: np.ndarray, tested: np.ndarray, classes: int) -> np.ndarray:
    """Linear discriminant analysis with a covariance shrunk as Ledoit and Wolf say; (M, K)."""
    from sklearn.discriminant_analysis import LinearDiscriminantAnalysis

    kinds = np.unique(y)
    if len(kinds) < 2:
        return majority(x, y, tested, classes)
    fitted = LinearDiscriminantAnalysis(solver="lsqr", shrinkage="auto").fit(x.astype(np.float64), y)
    return _spread(fitted.predict_proba(tested.astype(np.float64)), kinds, classes)


def nearest(x: np.ndarray, y: np.ndarray, tested: np.ndarray, classes: int) -> np.ndarray:
    """The class of the nearest training window, Euclidean distance; (M, K) of zeros and ones."""
    from sklearn.neighbors import KNeighborsClassifier

    fitted = KNeighborsClassifier(1, algorithm="brute").fit(x, y)
    return _spread(np.eye(classes)[fitted.predict(tested)], np.arange(classes), classes)


def _spread(probability: np.ndarray, kinds: np.ndarray, classes: int) -> np.ndarray:
    """Columns of the classes met in training put at their places among all classes."""
    whole = np.zeros((len(probability), classes))
    whole[:, kinds] = probability
    return whole


BASELINES = (
    Baseline("lda", "linear discriminant analysis on the same features, shrunk covariance", lda),
    Baseline("1-nn", "nearest training window on the same features: what it wins, recognition wins", nearest),
    Baseline("majority", "the commonest class of the training part", majority),
)


def predictions(baseline: Baseline, train: WindowSet, test: WindowSet) -> Predictions:
    """What a baseline fitted on `train` says of every window of `test`."""
    x, y = train.arrays()
    tested, truth = test.arrays()
    probability = baseline.fit(x, y, tested, len(test.classes))
    return Predictions(np.arange(len(test)), truth, test.subject.numpy(), probability)
