"""Rows beside every model: the commonest class, and logistic regression on what simple pooling leaves of a bag."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import minimize
from scipy.special import log_softmax, softmax

from attn_medseg.pathology.bags.data import BagSet
from attn_medseg.pathology.bags.metrics import Scored

_STRENGTH = 1.0  # of the penalty on weights of standardised features, per sample in the sum: sklearn's C = 1
_MOST_INSTANCES = 50_000


def predictions(train: BagSet, test: BagSet) -> dict[str, tuple[str, Scored]]:
    """Name of a baseline -> what it is, and what it says of the test bags."""
    label = np.array([bag.label for bag in train.bags])
    classes = len(train.state["classes"])
    share = np.bincount(label, minlength=classes) / len(label)
    found = {"majority": ("the share of each class in training", np.tile(share, (len(test), 1)))}
    for name, pool in (("mean", np.mean), ("max", np.max)):
        own, other = (np.stack([pool(part.pieces(i), axis=0) for i in range(len(part))]) for part in (train, test))
        note = f"logistic regression on the {name} of a bag's instances"
        found[f"{name} pooling"] = (note, _Logistic(own, label, classes)(other))
    single = _single(train, label, classes)
    if single is not None:
        chances = []
        for i in range(len(test)):
            each = single(test.pieces(i))
            chances.append(each[each[:, -1].argmax()] if classes == 2 else each.mean(axis=0))
        note = "logistic regression on instances, each with its bag's label; a bag is its most positive instance"
        if classes > 2:
            note = "logistic regression on instances, each with its bag's label; a bag is the mean of its instances"
        found["single instances"] = (note, np.stack(chances))
    index = np.arange(len(test))
    truth = np.array([bag.label for bag in test.bags])
    patient = np.array(test.patients)
    return {name: (note, Scored(index, patient, truth, chance)) for name, (note, chance) in found.items()}


def _single(train: BagSet, label: NDArray[np.int64], classes: int) -> _Logistic | None:
    """On instances; None where there are too many."""
    bags = []
    for i in range(len(train)):
        bags.append(train.pieces(i))
        if sum(map(len, bags)) > _MOST_INSTANCES:
            return None
    return _Logistic(np.concatenate(bags), np.repeat(label, [len(one) for one in bags]), classes)


class _Logistic:
    """Multinomial logistic regression with a squared penalty, on features standardised by those it is fitted on."""

    def __init__(self, x: NDArray[np.float32], label: NDArray[np.int64], classes: int) -> None:
        self.mean, self.scale = x.mean(axis=0), x.std(axis=0)
        self.scale[self.scale < 1e-8] = 1.0
        z = self._design(x)
        truth = np.eye(classes)[label]

        def loss(flat: NDArray[np.float64]) -> tuple[float, NDArray[np.float64]]:
            weight = flat.reshape(z.shape[1], classes)
            logits = z @ weight
            penalised = weight.copy()
            penalised[-1] = 0.0  # the constant
            value = -(truth * log_softmax(logits, axis=1)).sum() + 0.5 * _STRENGTH * (penalised**2).sum()
            return float(value), (z.T @ (softmax(logits, axis=1) - truth) + _STRENGTH * penalised).ravel()

        start = np.zeros(z.shape[1] * classes)
        found = minimize(loss, start, jac=True, method="L-BFGS-B", options={"maxiter": 500})
        self.weight = found.x.reshape(-1, classes)

    def _design(self, x: NDArray[np.float32]) -> NDArray[np.float64]:
        z = (x.astype(np.float64) - self.mean) / self.scale
        return np.concatenate([z, np.ones((len(z), 1))], axis=1)

    def __call__(self, x: NDArray[np.float32]) -> NDArray[np.float64]:
        """(N, C) -> (N, K) probabilities."""
        return np.asarray(softmax(self._design(x) @ self.weight, axis=1))
