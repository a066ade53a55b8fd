"""Rows beside every model: the share of clicks, the item's share of clicks, logistic regression, gradient boosting."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.sparse import csr_array, hstack

from attn_recsys.clicks import metrics
from attn_recsys.clicks.data import ClicksSet
from attn_recsys.clicks.encode import FIRST, Encoder
from attn_recsys.clicks.options import ClicksTaskConfig
from attn_shared.task import DataBundle

_PENALTIES = (0.03, 0.1, 0.3, 1.0, 3.0)
_CHOOSING = 50_000  # training rows that choose between them
_LEVELS = 250  # names that gradient boosting takes as they are; more are replaced by the share of clicks of each


@dataclass(frozen=True)
class Baseline:
    """A simple model's log odds on the test rows.

    Attributes:
        note: what it is, and what was chosen.
    """

    name: str
    odds: np.ndarray
    note: str


def rows(bundle: DataBundle, task: ClicksTaskConfig) -> list[dict[str, Any]]:
    """Rows of a table."""
    test = bundle.test
    if not isinstance(test, ClicksSet):
        return []
    return [
        {
            "model": one.name,
            "note": one.note,
            **metrics.figures(scored(test, one.odds), groups=task.groups, bins=task.bins, intervals=True),
        }
        for one in fitted(bundle)
    ]


def scored(data: ClicksSet, odds: np.ndarray) -> metrics.Rows:
    """The rows of a split with these log odds."""
    return metrics.Rows(odds, data.label.astype(np.float64), data.user, data.activity)


_FITTED: dict[bytes, list[Baseline]] = {}  # of the data seen last: a comparison asks once a run


def fitted(bundle: DataBundle) -> list[Baseline]:
    """All of them, fitted on training; what is chosen is chosen on validation."""
    train, val, test = bundle.train, bundle.val, bundle.test
    if not isinstance(train, ClicksSet) or not isinstance(test, ClicksSet):
        return []
    valid = val if isinstance(val, ClicksSet) else None
    key = _fingerprint(bundle.state, train, valid, test)
    if key not in _FITTED:
        encoder = Encoder(bundle.state)
        found = [rate(train, test)]
        if encoder.state["item"] in encoder.single:
            found.append(item_rate(train, valid, test, encoder))
        found += [logistic(train, valid, test, encoder), boosting(train, valid, test, encoder)]
        _FITTED.clear()
        _FITTED[key] = found
    return _FITTED[key]


def _fingerprint(state: Mapping[str, Any], *sets: ClicksSet | None) -> bytes:
    """Equal for equal rows that are read alike."""
    digest = hashlib.blake2b(json.dumps(state, sort_keys=True).encode())
    for one in sets:
        if one is None:
            digest.update(b"none")
            continue
        arrays = [one.names, one.numbers, one.label, one.user]
        arrays += [array for pair in one.many.values() for array in pair]
        arrays += [*(one.past or ()), *one.of_item.values()]
        for array in arrays:
            digest.update(repr((array.shape, array.dtype)).encode())
            digest.update(array.tobytes())
    return digest.digest()


def rate(train: ClicksSet, test: ClicksSet) -> Baseline:
    """The same for every row."""
    share = float(train.label.mean())
    return Baseline("share of clicks", np.full(len(test), _logit(share)), "the training share of clicks for every row")


def item_rate(train: ClicksSet, val: ClicksSet | None, test: ClicksSet, encoder: Encoder) -> Baseline:
    """How often an item was clicked in training, drawn towards the mean; how much is chosen on validation."""
    column = encoder.single.index(encoder.state["item"])
    share = float(train.label.mean())
    size = encoder.shape.fields[[field.name for field in encoder.shape.fields].index(encoder.state["item"])].size
    counts = np.bincount(train.names[:, column], minlength=size)
    clicks = np.bincount(train.names[:, column], weights=train.label, minlength=size)

    def odds(data: ClicksSet, strength: float) -> np.ndarray:
        found = (clicks + strength * share) / (counts + strength)
        return _logit(found)[data.names[:, column]]

    strengths = (1.0, 3.0, 10.0, 30.0)
    chosen = 10.0
    if val is not None:
        chosen = min(strengths, key=lambda one: _loss(odds(val, one), val))
    return Baseline(
        "item's share", odds(test, chosen), f"the item's training share of clicks, {chosen:g} rows of mean added"
    )


def logistic(train: ClicksSet, val: ClicksSet | None, test: ClicksSet, encoder: Encoder) -> Baseline:
    """scikit-learn's logistic regression on a column for every name."""
    from sklearn.linear_model import LogisticRegression

    wide = one_hot(train, encoder)
    chosen = 0.3
    if val is not None:
        rows = np.random.default_rng(0).permutation(len(train))[:_CHOOSING]
        losses = {}
        for penalty in _PENALTIES:
            model = LogisticRegression(C=penalty, max_iter=200, tol=1e-3).fit(wide[rows], train.label[rows])
            losses[penalty] = _loss(model.decision_function(one_hot(val, encoder)), val)
        chosen = min(losses, key=lambda one: losses[one])
    model = LogisticRegression(C=chosen, max_iter=200, tol=1e-3).fit(wide, train.label)
    odds = np.asarray(model.decision_function(one_hot(test, encoder)), np.float64)
    return Baseline("logistic regression", odds, f"scikit-learn, a column a name, C = {chosen:g}")


def one_hot(data: ClicksSet, encoder: Encoder) -> csr_array:
    """(N, names + numbers): 1 for a name of the row, 1 / n for each of n in a list, the numbers as they are."""
    sizes = {field.name: field.size for field in encoder.shape.fields}
    count = len(data)
    parts = []
    for i, name in enumerate(encoder.single):
        parts.append(csr_array((np.ones(count), data.names[:, i], np.arange(count + 1)), shape=(count, sizes[name])))
    lists: Mapping[str, tuple[np.ndarray, np.ndarray]] = dict(data.many)
    if data.past is not None and encoder.state["item"] in sizes:
        lists = {**lists, encoder.state["item"]: data.past}
    for name, (start, number) in lists.items():
        counts = np.diff(start)
        weight = np.repeat(1 / np.maximum(1, counts), counts)
        parts.append(csr_array((weight, number, start), shape=(count, sizes[name])))
    if data.numbers.shape[1]:
        parts.append(csr_array(data.numbers.astype(np.float64)))
    return hstack(parts, format="csr")


def boosting(train: ClicksSet, val: ClicksSet | None, test: ClicksSet, encoder: Encoder) -> Baseline:
    """scikit-learn's histogram gradient boosting, stopped on validation.

    Fields of few names as categories, of many as the share of clicks of each name (for training rows that of the other
    folds) and how often it occurs; of lists, their length; of the past, also how often it has the item, and each
    attribute's name.
    """
    from sklearn.ensemble import HistGradientBoostingClassifier
    from sklearn.model_selection import StratifiedKFold
    from sklearn.preprocessing import TargetEncoder

    sizes = {field.name: field.size for field in encoder.shape.fields}
    small = [i for i, name in enumerate(encoder.single) if sizes[name] <= _LEVELS]
    large = [i for i, name in enumerate(encoder.single) if sizes[name] > _LEVELS]
    target = TargetEncoder(target_type="binary", cv=StratifiedKFold(5, shuffle=True, random_state=0)) if large else None
    counts = {i: np.bincount(train.names[:, i], minlength=sizes[encoder.single[i]]) for i in large}

    def features(data: ClicksSet) -> np.ndarray:
        columns = [data.names[:, small].astype(float), data.numbers.astype(float)]
        if target is not None:
            names = data.names[:, large]
            shares = target.fit_transform(names, data.label) if data is train else target.transform(names)
            columns += [shares, *(counts[i][data.names[:, i]][:, None].astype(float) for i in large)]
        columns += [np.diff(start)[:, None].astype(float) for start, _ in data.many.values()]
        if data.past is not None:
            columns.append(np.stack(past_matches(data, encoder), axis=1))
        return np.concatenate(columns, axis=1)

    table = features(train)
    mask = [i < len(small) for i in range(table.shape[1])]
    model = HistGradientBoostingClassifier(
        categorical_features=mask if small else None,
        learning_rate=0.1,
        max_iter=300,
        early_stopping=val is not None,
        n_iter_no_change=15,
        random_state=0,
    )
    if val is None:
        model.fit(table, train.label)
    else:
        model.fit(table, train.label, X_val=features(val), y_val=val.label)
    odds = np.asarray(model.decision_function(features(test)), np.float64)
    return Baseline("gradient boosting", odds, f"scikit-learn's histogram form, {model.n_iter_} trees")


def past_matches(data: ClicksSet, encoder: Encoder) -> list[np.ndarray]:
    """(N,) each: length of the past; share of it that is the row's item; that has the item's names, by attribute."""
    assert data.past is not None
    start, number = data.past
    counts = np.diff(start)
    owner = np.repeat(np.arange(len(data)), counts)
    found = [counts.astype(float)]
    item = data.names[:, encoder.single.index(encoder.state["item"])]
    pairs = [(number, item)]
    for name, lookup in data.of_item.items():
        if lookup.ndim == 1:
            pairs.append((lookup[number], data.names[:, encoder.single.index(name)]))
        else:
            begin, names = data.many[name]
            found.append(_shared(lookup[number], owner, begin, names, len(data)) / np.maximum(1, counts))
    for past, own in pairs:
        same = (past == own[owner]) & (past >= FIRST)
        found.append(np.bincount(owner, weights=same, minlength=len(data)) / np.maximum(1, counts))
    return found


def _shared(past: np.ndarray, owner: np.ndarray, start: np.ndarray, names: np.ndarray, count: int) -> np.ndarray:
    """(N,) how many names of the row's list its past items have, all together."""
    top = int(max(past.max(initial=0), names.max(initial=0))) + 1
    have = np.unique(np.repeat(np.arange(count), np.diff(start)) * top + names)
    keys = owner[:, None] * top + past
    hit = np.isin(keys, have) & (past >= FIRST)
    return np.bincount(owner, weights=hit.sum(axis=1), minlength=count)


def _loss(odds: np.ndarray, data: ClicksSet) -> float:
    return float(metrics.logloss(odds, data.label).mean())


def _logit(share: float | np.ndarray) -> np.ndarray:
    kept = np.clip(share, 1e-6, 1 - 1e-6)
    return np.asarray(np.log(kept) - np.log1p(-kept))
