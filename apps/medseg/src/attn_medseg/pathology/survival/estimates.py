"""Estimates of survival without a network: Kaplan and Meier, Cox."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import minimize

Array = NDArray[np.float64]
_PENALTIES = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0)


@dataclass(frozen=True)
class Steps:
    """A function of time that is 1 at first and changes at `times` to `values`."""

    times: Array
    values: Array

    def __call__(self, when: Array) -> Array:
        """Its value at times."""
        return np.concatenate([[1.0], self.values])[np.searchsorted(self.times, when, side="right")]

    def before(self, when: Array) -> Array:
        """Its value just before times."""
        return np.concatenate([[1.0], self.values])[np.searchsorted(self.times, when, side="left")]


def kaplan_meier(time: Array, event: NDArray[np.bool_]) -> Steps:
    """Chance of no event up to each time; of censoring with `event` turned round."""
    when = np.unique(time[event])
    at_risk = (time[None, :] >= when[:, None]).sum(axis=1)
    come = ((time[None, :] == when[:, None]) & event[None, :]).sum(axis=1)
    return Steps(when, np.cumprod(1 - come / at_risk))


@dataclass(frozen=True)
class Cox:
    """Cox's proportional hazards with a squared penalty, ties after Breslow.

    Attributes:
        weight: of the features.
        mean, scale: of the features in training.
        base: cumulative hazard at mean features, at the times of events.
        penalty: that was chosen.
    """

    weight: Array
    mean: Array
    scale: Array
    base: tuple[Array, Array]
    penalty: float

    def risk(self, x: Array) -> Array:
        """(N,) logarithm of the hazard against that of mean features."""
        return ((x - self.mean) / self.scale) @ self.weight

    def survival(self, x: Array, when: Array) -> Array:
        """(N, T) chance of no event up to each time."""
        times, hazard = self.base
        cumulative = np.concatenate([[0.0], hazard])[np.searchsorted(times, when, side="right")]
        return np.exp(-np.exp(np.clip(self.risk(x), -30, 30))[:, None] * cumulative)


def cox(x: Array, time: Array, event: NDArray[np.bool_], *, penalty: float | None = None, seed: int = 0) -> Cox:
    """Fit; without `penalty` one is chosen by the partial likelihood of left-out thirds of the patients.

    The sum that is lowered is, per patient, less the log partial likelihood plus penalty / 2 times the squared weights
    of standardised features.
    """
    mean, scale = x.mean(axis=0), x.std(axis=0)
    scale = np.where(scale < 1e-8, 1.0, scale)
    z = (x - mean) / scale
    if penalty is None:
        penalty = _chosen(z, time, event, seed)
    weight = _fit(z, time, event, penalty)
    when = np.unique(time[event])
    risk = np.exp(z @ weight)
    come = ((time[None, :] == when[:, None]) & event[None, :]).sum(axis=1)
    hazard = np.cumsum(come / ((time[None, :] >= when[:, None]) * risk[None, :]).sum(axis=1))
    return Cox(weight, mean, scale, (when, hazard), penalty)


def partial_likelihood(risk: Array, time: Array, event: NDArray[np.bool_]) -> tuple[float, Array]:
    """Log partial likelihood (Breslow) of log hazards, and its gradient in them."""
    order = np.argsort(-time, kind="stable")
    sorted_risk, when, come = risk[order], time[order], event[order]
    top = sorted_risk.max()
    weight = np.exp(sorted_risk - top)
    total = np.cumsum(weight)
    last = np.searchsorted(-when, -when, side="right") - 1  # everyone at risk, ties included
    at_risk = total[last]
    value = float((sorted_risk - top - np.log(at_risk))[come].sum())
    # A patient is in the sets at risk of all events up to its own time.
    share = np.where(come, 1 / at_risk, 0.0)
    first = np.searchsorted(-when, -when, side="left")
    after = np.cumsum(share[::-1])[::-1][first]
    gradient = np.empty_like(risk)
    gradient[order] = come - weight * after
    return value, gradient


def _fit(z: Array, time: Array, event: NDArray[np.bool_], penalty: float) -> Array:
    def loss(weight: Array) -> tuple[float, Array]:
        value, gradient = partial_likelihood(z @ weight, time, event)
        return -value / len(z) + 0.5 * penalty * float(weight @ weight), -z.T @ gradient / len(z) + penalty * weight

    return np.asarray(minimize(loss, np.zeros(z.shape[1]), jac=True, method="L-BFGS-B", options={"maxiter": 200}).x)


def _chosen(z: Array, time: Array, event: NDArray[np.bool_], seed: int) -> float:
    part = np.random.default_rng(seed).permutation(len(z)) % 3
    scores = []
    for penalty in _PENALTIES:
        score = 0.0
        for fold in range(3):
            rest = part != fold
            if not event[rest].any():
                continue
            risk = z @ _fit(z[rest], time[rest], event[rest], penalty)
            # What the left-out patients add to the likelihood of all.
            score += (
                partial_likelihood(risk, time, event)[0] - partial_likelihood(risk[rest], time[rest], event[rest])[0]
            )
        scores.append(score)
    return _PENALTIES[int(np.argmax(scores))]
