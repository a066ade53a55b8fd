"""Rows beside the models of records: what is common, and two classifiers of summaries that no network makes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from attn_timeseries.records.data import RecordSet
from attn_timeseries.records.metrics import Predictions


@dataclass(frozen=True)
class Baseline:
    """A classifier of summaries: (training features, labels 0/1, features to classify) -> probabilities."""

    name: str
    note: str
    features: Callable[[RecordSet], np.ndarray]
    fit: Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray]


def values(held: RecordSet) -> np.ndarray:
    """(N, 4 V) last, mean, least and largest scaled value of each variable; NaN where it was never observed."""
    found = np.full((len(held), 4, len(held.variables)), np.nan)
    for i, x in enumerate(held.x):
        seen = ~np.isnan(x)
        some = seen.any(axis=0)
        if not some.any():
            continue
        part = x[:, some]
        last = len(part) - 1 - seen[::-1, some].argmax(axis=0)
        found[i][:, some] = (
            part[last, np.arange(part.shape[1])],
            np.nanmean(part, axis=0),
            np.nanmin(part, axis=0),
            np.nanmax(part, axis=0),
        )
    return found.reshape(len(held), -1)


def notes(held: RecordSet) -> np.ndarray:
    """(N, E) sum of each stay's hashed or embedded notes."""
    if held.notes is None:
        return np.zeros((len(held), 0))
    cuts = pairwise(held.note_from)
    return np.stack([np.asarray(held.notes[a:b].sum(axis=0)).reshape(-1) for a, b in cuts])


def values_and_notes(held: RecordSet) -> np.ndarray:
    return np.concatenate([values(held), notes(held)], axis=1)


def everything(held: RecordSet) -> np.ndarray:
    """As `values_and_notes`, and how often each variable was observed."""
    counts = np.stack([(~np.isnan(x)).sum(axis=0) for x in held.x])
    return np.concatenate([values(held), counts, notes(held)], axis=1)


def majority(x: np.ndarray, y: np.ndarray, tested: np.ndarray) -> np.ndarray:
    return np.full(len(tested), y.mean())


def logistic(x: np.ndarray, y: np.ndarray, tested: np.ndarray) -> np.ndarray:
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    model = make_pipeline(StandardScaler(), LogisticRegression(C=0.1, max_iter=2000))
    model.fit(np.nan_to_num(x), y)  # scaled values: 0 is the training mean
    return np.asarray(model.predict_proba(np.nan_to_num(tested))[:, 1])


def boosting(x: np.ndarray, y: np.ndarray, tested: np.ndarray) -> np.ndarray:
    from sklearn.ensemble import HistGradientBoostingClassifier
    from threadpoolctl import threadpool_limits

    model = HistGradientBoostingClassifier(max_iter=150, learning_rate=0.05, max_leaf_nodes=8, random_state=0)
    with threadpool_limits(1, user_api="openmp"):  # its threads spin, which on busy cores costs far more than it gives
        return np.asarray(model.fit(x, y).predict_proba(tested)[:, 1])


BASELINES = (
    Baseline("majority", "share of positives in training", values, majority),
    Baseline(
        "logistic regression",
        "last, mean, least and largest value of each variable, and the notes' words",
        values_and_notes,
        logistic,
    ),
    Baseline(
        "gradient boosting", "the same, what was never measured, and counts of measurements", everything, boosting
    ),
)


def predictions(one: Baseline, train: RecordSet, tested: RecordSet) -> Predictions:
    """What a baseline says of a set, label by label."""
    x, other = one.features(train), one.features(tested)
    columns = []
    for k in range(train.y.shape[1]):
        known = ~np.isnan(train.y[:, k])
        columns.append(one.fit(x[known], (train.y[known, k] > 0.5).astype(np.int64), other))
    return Predictions(np.arange(len(tested)), tested.patient, tested.y.astype(np.float64), np.stack(columns, axis=1))
