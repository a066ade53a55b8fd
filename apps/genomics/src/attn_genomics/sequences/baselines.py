"""Rows beside every model: the commonest class, drawn classes, and logistic regression on counts of k-mers."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.sparse import coo_array, csr_array

from attn_genomics.sequences import metrics
from attn_genomics.tokens import N
from attn_shared.task import DataBundle

_PENALTIES = (0.003, 0.01, 0.03, 0.1, 0.3, 1.0)
_FIRST = 0.03  # with which forms are compared
_CHOOSING = 8000  # training sequences that choose


@dataclass(frozen=True)
class Sequences:
    """A part of the data as arrays.

    Attributes:
        tokens: (S, L) uint8 codes.
        lengths: (S,) bases of each row.
        label: (S,) int64.
    """

    tokens: np.ndarray
    lengths: np.ndarray
    label: np.ndarray

    def __len__(self) -> int:
        return len(self.label)

    def take(self, rows: np.ndarray) -> Sequences:
        return Sequences(self.tokens[rows], self.lengths[rows], self.label[rows])


@dataclass(frozen=True)
class Baseline:
    """A simple model's log probabilities on the test sequences, and what was chosen."""

    name: str
    score: np.ndarray
    note: str


@dataclass(frozen=True)
class Form:
    """How k-mers are counted.

    Attributes:
        k: letters.
        strands: a k-mer and its reverse complement count as one.
        parts: of equal length that are counted apart.
    """

    k: int
    strands: bool = False
    parts: int = 1

    def __str__(self) -> str:
        where = f" in each of {self.parts} parts" if self.parts > 1 else ""
        return f"{self.k}-mers{where}{', both strands as one' if self.strands else ''}"


PLAIN = tuple(Form(k, strands) for k in (3, 4, 5, 6) for strands in (False, True))
PLACED = tuple(Form(k, parts=parts) for k, parts in ((1, 32), (2, 16), (3, 8), (3, 16), (3, 32), (4, 8), (4, 16)))


def rows(bundle: DataBundle, resamples: int) -> list[dict[str, Any]]:
    """Rows of a table."""
    label = None if bundle.test is None else read(bundle.test).label
    return [
        {"model": one.name, "note": one.note, **metrics.figures(metrics.Rows(one.score, label), resamples=resamples)}
        for one in fitted(bundle)
        if label is not None
    ]


_FITTED: dict[bytes, list[Baseline]] = {}  # of the data seen last: a comparison asks once a run


def fitted(bundle: DataBundle) -> list[Baseline]:
    """All of them, fitted on training; what is chosen is chosen on validation."""
    if bundle.train is None or bundle.test is None:
        return []
    classes = len(bundle.state["classes"])
    train, test = read(bundle.train), read(bundle.test)
    val = None if bundle.val is None else read(bundle.val)
    digest = hashlib.blake2b(repr(classes).encode())
    for part in (train, test, val):
        if part is not None:
            for array in (part.tokens, part.lengths, part.label):
                digest.update(repr(array.shape).encode())
                digest.update(np.ascontiguousarray(array).tobytes())
    key = digest.digest()
    if key not in _FITTED:
        found = [commonest(train, test, classes), drawn(train, test, classes)]
        longest = int(max(train.lengths.max(), 1))
        plain = [form for form in PLAIN if form.k <= longest]
        placed = [form for form in PLACED if form.parts * form.k <= longest]
        for name, forms in (("k-mer counts", plain), ("k-mer counts by place", placed)):
            if forms:
                found.append(kmers(name, forms, train, val, test, classes))
        _FITTED.clear()
        _FITTED[key] = found
    return _FITTED[key]


def read(dataset: Any) -> Sequences:
    """A set of the application as arrays, training sequences as they stand in the data, none turned."""
    tokens, lengths = dataset.sequences.gather(np.arange(len(dataset)))
    return Sequences(tokens.numpy().astype(np.uint8), lengths.numpy(), np.asarray(dataset.label))


def commonest(train: Sequences, test: Sequences, classes: int) -> Baseline:
    """The training shares of the classes for every sequence."""
    share = np.bincount(train.label, minlength=classes) / len(train)
    score = np.log(np.maximum(share, 1e-12))
    return Baseline("commonest class", np.tile(score, (len(test), 1)), "the training shares for every sequence")


def drawn(train: Sequences, test: Sequences, classes: int) -> Baseline:
    """Probabilities drawn at random around the training shares."""
    share = np.maximum(np.bincount(train.label, minlength=classes) / len(train), 1e-3)
    chance = np.random.default_rng(0).dirichlet(share * classes, len(test))
    return Baseline("drawn", np.log(np.maximum(chance, 1e-12)), "probabilities drawn around the training shares")


def kmers(
    name: str,
    forms: tuple[Form, ...] | list[Form],
    train: Sequences,
    val: Sequences | None,
    test: Sequences,
    classes: int,
) -> Baseline:
    """scikit-learn's logistic regression on log(1 + count); form and penalty by MCC on validation, then log-loss."""
    from sklearn.linear_model import LogisticRegression

    rng = np.random.default_rng(0)
    few = train.take(np.sort(rng.permutation(len(train))[:_CHOOSING]))

    def fit(wide: csr_array, label: np.ndarray, penalty: float) -> Callable[[csr_array], np.ndarray]:
        model = LogisticRegression(C=penalty, max_iter=300, tol=1e-3).fit(wide, label)

        def score(other: csr_array) -> np.ndarray:
            found = np.full((other.shape[0], classes), -50.0)
            found[:, model.classes_] = model.predict_log_proba(other)
            return found

        return score

    if len(np.unique(train.label)) < 2:
        return Baseline(name, commonest(train, test, classes).score, "one class only in training")
    form, penalty, how = forms[len(forms) // 2], 0.1, "not chosen, as there is no validation part"
    if val is not None and len(val) and len(np.unique(few.label)) > 1:

        def quality(form: Form, penalty: float) -> tuple[float, float]:
            if form not in wide:
                wide[form] = features(few, form), features(val, form)
            found = metrics.figures(metrics.Rows(fit(wide[form][0], few.label, penalty)(wide[form][1]), val.label))
            return found["mcc"], -found["logloss"]

        wide: dict[Form, tuple[csr_array, csr_array]] = {}
        form = max(forms, key=lambda one: quality(one, _FIRST))
        penalty = max(_PENALTIES, key=lambda one: quality(form, one))
        how = "chosen on validation"
    score = fit(features(train, form), train.label, penalty)(features(test, form))
    return Baseline(name, score, f"logistic regression on {form}, C = {penalty:g}, {how}")


def features(data: Sequences, form: Form) -> csr_array:
    """(S, parts 4^k) log(1 + count); a k-mer with a letter other than A, C, G and T counts nowhere."""
    k, length = form.k, data.tokens.shape[1]
    size = 4**k
    shape = (len(data), form.parts * size)
    if length < k:
        return csr_array(shape)
    number = kmer_numbers(data.tokens, k)
    if form.strands:
        number = np.where(number < 0, number, np.minimum(number, _other_strand(k)[number]))
    row, place = np.nonzero(number >= 0)
    column = number[row, place]
    if form.parts > 1:
        part = place * form.parts // np.maximum(1, data.lengths[row] - k + 1)
        column = column + np.minimum(part, form.parts - 1) * size
    made = csr_array(coo_array((np.ones(len(row)), (row, column)), shape=shape))
    made.sum_duplicates()
    made.data = np.log1p(made.data)
    return made


def kmer_numbers(tokens: np.ndarray, k: int) -> np.ndarray:
    """(S, L) codes -> (S, L - k + 1) number of the k-mer that begins at each place, the first letter counting most; -1
    where one of its letters is none of A, C, G and T."""
    count = tokens.shape[1] - k + 1
    number = np.zeros((len(tokens), count), dtype=np.int64)
    bad = np.zeros((len(tokens), count), dtype=bool)
    for i in range(k):
        letters = tokens[:, i : i + count]
        number = 4 * number + letters
        bad |= letters >= N
    return np.where(bad, -1, number)


def _other_strand(k: int) -> np.ndarray:
    """(4^k,) number of each k-mer's reverse complement."""
    number = np.arange(4**k)
    turned = np.zeros_like(number)
    for _ in range(k):
        turned = 4 * turned + 3 - number % 4
        number = number // 4
    return turned
