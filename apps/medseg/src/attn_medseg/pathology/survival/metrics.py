"""Scores of predicted survival.

- c_index: Harrell's: of the pairs in which one patient is known to have had the event before the other, the share in
  which that one's risk is the higher, equal risks counting half. A patient censored at the time of another's event
  outlived it; two events at the same time are no pair.
- ibs: the mean over time of the Brier score, (chance of no event - whether there was none)², from 0 to the 90th
  percentile of training's times; patients censored before are made up for by the inverse chance of censoring (Graf
  1999), estimated on training patients. Less is better; Kaplan-Meier's is what knowing nothing of a patient gives.
- loss: the negative log-likelihood of intervals, censored patients weighing fully.

Intervals resample patients.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from attn_medseg.pathology.survival.estimates import Steps
from attn_shared.intervals import with_intervals

Array = NDArray[np.float64]
FORMAT: Mapping[str, str] = {
    "c_index": ".3f",
    "ibs": ".4f",
    "loss": ".4f",
    "patients": ",.0f",
    "events": ",.0f",
}
"""Metrics in the order of their weight: the first three stand in every table."""
_GRID = 60
_LEAST = 0.05  # chance of not being censored, below which weights would be wild
_LEAST_CHANCE = 1e-12
_TIE = 1e-8
_BLOCK = 100


@dataclass(frozen=True)
class Scored:
    """Predictions of patients.

    Attributes:
        index: (N,) place of each patient in its part.
        time: (N,) of the event or of the last contact.
        event: (N,) whether it came.
        risk: (N,) the higher, the earlier.
        loss: (N,), NaN where there is no likelihood.
        survival: (N, K) chance of no event up to the end of each interval.
    """

    index: NDArray[np.int64]
    time: Array
    event: NDArray[np.bool_]
    risk: Array
    loss: Array
    survival: Array


def pack(index: int, time: float, event: bool, risk: float, loss: float, survival: Tensor) -> dict[str, Tensor]:
    """A patient's entry of the metric state; each has one of its own, so that adding up over processes joins them."""
    head = torch.tensor([index, time, event, risk, loss], dtype=torch.float64)
    return {f"patient {index}": torch.cat([head, survival.detach().cpu().double()])}


def unpack(sums: Mapping[str, Tensor]) -> Scored | None:
    """All predictions of a metric state in the order of the patients; None where there are none."""
    if not sums:
        return None
    table = torch.stack(list(sums.values())).numpy()
    table = table[table[:, 0].argsort(kind="stable")]
    return Scored(table[:, 0].astype(np.int64), table[:, 1], table[:, 2] > 0, table[:, 3], table[:, 4], table[:, 5:])


def pairs(time: Array, event: NDArray[np.bool_], risk: Array) -> tuple[Array, Array]:
    """(N, N) whether row had the event before column, and what the pair counts: 1 right, 0.5 equal, 0 wrong."""
    earlier = time[:, None] < time[None, :]
    same = (time[:, None] == time[None, :]) & ~event[None, :]
    comparable = event[:, None] & (earlier | same)
    gap = risk[:, None] - risk[None, :]
    right = np.where(np.abs(gap) <= _TIE, 0.5, (gap > 0).astype(np.float64))
    return comparable.astype(np.float64), comparable * right


def c_index(time: Array, event: NDArray[np.bool_], risk: Array) -> float:
    """NaN where no pair can be compared."""
    comparable, right = pairs(time, event, risk)
    return float(right.sum() / comparable.sum()) if comparable.any() else math.nan


def brier(found: Scored, state: Mapping[str, Any]) -> Array:
    """(N,) each patient's part of the integrated Brier score, whose mean it is."""
    grid = np.linspace(0, state["horizon"], _GRID + 1)[1:]
    said = curves(found.survival, state["edges"], grid)
    censoring = Steps(np.asarray(state["censoring"][0], float), np.asarray(state["censoring"][1], float))
    then = np.maximum(censoring(grid), _LEAST)
    own = np.maximum(censoring.before(found.time), _LEAST)
    past = (found.time[:, None] <= grid) & found.event[:, None]
    alive = found.time[:, None] > grid
    score = past * said**2 / own[:, None] + alive * (1 - said) ** 2 / then
    return np.asarray(score.mean(axis=1))


def curves(survival: Array, edges: Sequence[float], when: Array) -> Array:
    """(N, T) chance of no event up to times: the hazard is the same all through an interval, 0 after the last."""
    ends = np.concatenate([[0.0], np.asarray(edges, float)[1:]])
    known = np.log(np.maximum(np.concatenate([np.ones((len(survival), 1)), survival], axis=1), _LEAST_CHANCE))
    return np.exp(np.stack([np.interp(when, ends, row) for row in known]))


def figures(found: Scored, state: Mapping[str, Any], *, resamples: int = 0) -> dict[str, float]:
    """Every score, with 95 % intervals where `resamples` > 0."""
    single = {"ibs": brier(found, state), "loss": found.loss}
    plain = {
        "c_index": c_index(found.time, found.event, found.risk),
        **{name: float(each.mean()) for name, each in single.items() if not np.isnan(each).any()},
    }
    bounds = intervals([found], state_of=[state], resamples=resamples) if resamples else {}
    return {**with_intervals(plain, bounds), "patients": float(len(found.time)), "events": float(found.event.sum())}


def intervals(
    parts: Sequence[Scored], *, state_of: Sequence[Mapping[str, Any]], resamples: int
) -> dict[str, tuple[float, float]]:
    """name -> 2.5 % and 97.5 % quantiles of the mean over parts (folds), in each of which patients are resampled."""
    rng = np.random.default_rng(0)
    total: dict[str, Array] = {}
    for found, state in zip(parts, state_of):
        count = len(found.time)
        comparable, right = pairs(found.time, found.event, found.risk)
        single = {"ibs": brier(found, state), "loss": found.loss}
        drawn: dict[str, list[Array]] = {}
        for first in range(0, resamples, _BLOCK):
            times = rng.multinomial(count, np.full(count, 1 / count), min(_BLOCK, resamples - first)).astype(float)
            below = ((times @ comparable) * times).sum(axis=1)
            with np.errstate(invalid="ignore"):
                value = np.where(below > 0, ((times @ right) * times).sum(axis=1) / below, math.nan)
            drawn.setdefault("c_index", []).append(value)
            for name, each in single.items():
                drawn.setdefault(name, []).append(times @ each / count)
        for name, blocks in drawn.items():
            total[name] = total.get(name, np.zeros(resamples)) + np.concatenate(blocks) / len(parts)
    found_bounds = {}
    for name, values in total.items():
        kept = values[~np.isnan(values)]
        if len(kept):
            low, high = np.quantile(kept, (0.025, 0.975))
            found_bounds[name] = (float(low), float(high))
    return found_bounds
