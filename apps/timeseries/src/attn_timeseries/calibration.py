"""Conformal calibration: intervals widened or narrowed until they cover what they promise.

An interval is a pair of quantiles around a forecast f, at distances a below and b above. A target y scores
(f - y) / a below the forecast and (y - f) / b above it: the factor by which the interval would have had to grow to
reach it (conformalised quantile regression, Romano, Patterson and Candes 2019, with the scaled score of Kivaranovic,
Johnson and Leeb 2020). Around a forecast without quantiles a and b are 1, and the score is the absolute residual.

- `conformal`: one factor for each step ahead, column and pair, the ceil((n + 1)(1 - alpha))-th smallest of the n scores
  of the validation windows (split conformal). Windows that overlap, and series that change, are not exchangeable: the
  guarantee of the theory does not hold, and coverage has to be measured.
- `adaptive`: the factor follows the stream of forecasts. A score counts only once its target is past when the forecast
  is made: the score of step h comes h steps late. The factor is the sum of two parts in the logarithm.
  One is quantile tracking, q <- q + rate (missed - alpha), where a score that has come in is held against the factor of
  now: against that of its own forecast, which may be long ago, the factor would go on growing for a whole horizon after
  it has become large enough. Experts with different rates, of their own for every step and column and of one shared by
  all, are mixed by exponential weights of the pinball losses of what they had said (Gibbs and Candes 2024).
  The other is the saturating integral of conformal PID control (Angelopoulos, Candes and Tibshirani 2023):
  tan(S log(t + 1) / ((t + 1) 2/pi)), S the sum of (missed - alpha) over the t intervals given out so far, which makes
  up for what the first part leaves.
  That steps are taken in the logarithm, and that experts share, is ours: where the scale of a series has changed, all
  its scores differ by a factor. The settings below are the same for all data.

Shapes: N windows, H horizon, C columns, Q levels, P = (Q - 1) / 2 pairs, the widest first.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from attn_shared.errors import UserError

# Rates of each expert: of its own at every step and column, and of the factor shared by all.
RATES = tuple((own, shared) for own in (0.0, 0.02, 0.1) for shared in (0.0, 0.1, 0.2))
_LEAST = 1e-6  # of a distance, in scaled units
_ANGLE = 1.4  # where the integral stops growing
_PULL = (-2.0, 2.5)  # smallest and largest logarithm of the integral's factor
_RANGE = 5.0  # of either part of an expert's logarithm, from where it started
_MOST = 20_000_000  # scores kept for the conformal factors; of longer splits every second window, fourth, …


def alphas(levels: Sequence[float]) -> Tensor:
    """(P,) share that each pair of levels leaves out."""
    return torch.tensor([2 * level for level in levels if level < 0.5], dtype=torch.float64)


def needed(levels: Sequence[float]) -> int:
    """Validation windows that the widest pair needs: with fewer its interval would be infinite."""
    return math.ceil((1 - 2 * levels[0]) / (2 * levels[0]) - 1e-9)


def distances(quantiles: Tensor) -> tuple[Tensor, Tensor]:
    """Distances (…, P) of each pair's ends below and above the median, from quantiles (…, Q); never quite 0."""
    pairs = quantiles.shape[-1] // 2
    middle = quantiles[..., pairs : pairs + 1]
    below, above = middle - quantiles[..., :pairs], quantiles[..., pairs + 1 :].flip(-1) - middle
    return below.clamp_min(_LEAST), above.clamp_min(_LEAST)


def scores(quantiles: Tensor, target: Tensor) -> Tensor:
    """(…, P): the factor by which each pair would have had to grow to reach its target (…)."""
    below, above = distances(quantiles)
    error = (target - quantiles[..., quantiles.shape[-1] // 2]).unsqueeze(-1)
    return torch.where(error < 0, -error / below, error / above)


def widen(quantiles: Tensor, factors: Tensor) -> Tensor:
    """Quantiles (…, Q) with each pair grown by its factor (…, P); a wider pair is never inside a narrower one."""
    below, above = ((side * factors).flip(-1).cummax(dim=-1).values.flip(-1) for side in distances(quantiles))
    pairs = factors.shape[-1]
    middle = quantiles[..., pairs : pairs + 1]
    return torch.cat([middle - below, middle, middle + above.flip(-1)], dim=-1)


def conformal_factors(score: Tensor, known: Tensor, alpha: Tensor) -> Tensor:
    """(H, C, P): the ceil((n + 1)(1 - alpha))-th smallest of the n known scores.

    Args:
        score: (N, H, C, P).
        known: (N, H, C) False where a target was not observed.
        alpha: (P,). Where n is too small for it, the largest score is taken; where n is 0, 1.
    """
    count = known.sum(dim=0).unsqueeze(-1)
    ordered = torch.where(known.unsqueeze(-1), score, torch.inf).sort(dim=0).values
    rank = torch.ceil((count + 1) * (1 - alpha) - 1e-9).clamp(max=count).to(torch.int64)
    found = ordered.gather(0, (rank - 1).clamp_min(0).unsqueeze(0))[0]
    return torch.where(count > 0, found, 1.0).clamp_min(_LEAST)


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """Forecasts of a batch of windows in order, and what came.

    Attributes:
        quantiles: (B, H, C, Q) scaled.
        target: (B, H, C) scaled.
        known: (B, H, C) False where the target was not observed.
        series: (B,) which series each window is of.
    """

    quantiles: Tensor
    target: Tensor
    known: Tensor
    series: Tensor

    @classmethod
    def of(cls, quantiles: Tensor, target: Tensor, observed: Tensor | None, series: Tensor) -> Outcome:
        """On the CPU, in float64."""
        target = target.detach().cpu().to(torch.float64)
        known = torch.ones_like(target, dtype=torch.bool) if observed is None else observed.cpu()
        quantiles = quantiles.detach().cpu().to(torch.float64)
        return cls(quantiles=quantiles, target=target, known=known, series=series.cpu())

    def scores(self) -> Tensor:
        """(B, H, C, P)."""
        return scores(self.quantiles, self.target)


_STATE = ("experts", "shared", "losses", "deficit", "count")


@dataclass(kw_only=True)
class TrackerState:
    """Where online calibration stands.

    Attributes:
        experts: (K, H, C, P) own logarithms of the factor, of each expert.
        shared: (K, P) its logarithms of the factor shared by all steps and columns.
        losses: (K,) pinball losses so far.
        deficit: (H, C, P) sum of (missed - alpha).
        count: (H, C, 1) scores in it.
    """

    experts: Tensor
    shared: Tensor
    losses: Tensor
    deficit: Tensor
    count: Tensor

    @classmethod
    def start(cls, factors: Tensor) -> TrackerState:
        """From factors (H, C, P) that a calibration split gave."""
        return cls(
            experts=factors.log().expand(len(RATES), *factors.shape).clone(),
            shared=factors.new_zeros(len(RATES), factors.shape[-1]),
            losses=factors.new_zeros(len(RATES)),
            deficit=torch.zeros_like(factors),
            count=factors.new_zeros(*factors.shape[:2], 1),
        )

    def copy(self) -> TrackerState:
        return TrackerState(**{name: value.clone() for name, value in vars(self).items()})


class Tracker:
    """Factors along one stream of forecasts whose origins lie one step apart.

    Args:
        state: where to start from; copied.
        unit: (H, C, P) size of the scores, by which losses are measured: the conformal factors.
        alpha: (P,).
    """

    def __init__(self, state: TrackerState, unit: Tensor, alpha: Tensor) -> None:
        self.state, self.unit, self.alpha = state.copy(), unit, alpha
        self.own, self.shared = torch.tensor(RATES, dtype=torch.float64).unbind(dim=1)
        self.horizon = unit.shape[0]
        self.made = 0
        # What was forecast at the last H origins, origin n in row n mod H.
        self._scores = unit.new_zeros(self.horizon, *unit.shape)
        self._known = torch.zeros(self.horizon, *unit.shape[:2], 1, dtype=torch.bool)
        self._used = unit.new_zeros(self.horizon, *unit.shape)
        self._experts = unit.new_zeros(self.horizon, len(RATES), *unit.shape)

    def follow(self, score: Tensor, known: Tensor) -> Tensor:
        """(N, H, C, P) factors of N successive forecasts, each from what was past when it was made.

        Args:
            score: (N, H, C, P), (N, H, C) of these forecasts. They reach the factors only as their targets pass.
        """
        factors = torch.empty(score.shape, dtype=torch.float64)
        for i in range(len(score)):
            used = factors[i] = self.next()
            row = self.made % self.horizon
            self._scores[row], self._known[row] = score[i], known[i].unsqueeze(-1)
            self._used[row], self._experts[row] = used, self._said()
            self.made += 1
        return factors

    def next(self) -> Tensor:
        """(H, C, P) factors for the forecast that is made next."""
        self._absorb()
        state = self.state
        weight = torch.softmax(-state.losses, dim=0)[:, None, None, None]
        tracked = (weight * self._said().exp()).sum(dim=0)
        angle = state.deficit * (state.count + 1).log() / (state.count + 1) * (math.pi / 2)
        return tracked * angle.clamp(-_ANGLE, _ANGLE).tan().clamp(*_PULL).exp()

    def _said(self) -> Tensor:
        """(K, H, C, P) logarithms of the factor, of each expert."""
        return self.state.experts + self.state.shared[:, None, None]

    def settle(self) -> TrackerState:
        """The state once the targets of all forecasts made are past."""
        for _ in range(self.horizon):
            self._absorb()
            self._known[self.made % self.horizon] = False
            self.made += 1
        self._absorb()
        return self.state

    def _absorb(self) -> None:
        """Learn from the targets that passed between the last origin and this one: step h of the forecast h ago."""
        steps = torch.arange(min(self.horizon, self.made))
        rows = (self.made - 1 - steps) % self.horizon
        known = self._known[rows, steps]
        if not known.any():
            return
        state, unit, total = self.state, self.unit[steps], known.sum()
        score = torch.where(known, self._scores[rows, steps], 0.0)
        size = self._experts[rows, :, steps].transpose(0, 1).exp()
        loss = torch.maximum((1 - self.alpha) * (score - size), self.alpha * (size - score)) / unit
        state.losses += torch.where(known, loss, 0.0).sum(dim=(1, 2, 3)) / (total * len(self.alpha))
        missed = (score > self._said()[:, steps].exp()).to(torch.float64)
        push = torch.where(known, missed - self.alpha, 0.0)
        start = unit.log()
        moved = state.experts[:, steps] + self.own[:, None, None, None] * push
        state.experts[:, steps] = moved.clamp(start - _RANGE, start + _RANGE)
        state.shared += self.shared[:, None] * push.sum(dim=(1, 2)) / total
        state.shared.clamp_(-_RANGE, _RANGE)
        late = (score > self._used[rows, steps]).to(torch.float64)
        state.deficit[steps] += torch.where(known, late - self.alpha, 0.0)
        state.count[steps] += known
        self._known[rows, steps] = False  # each score is learnt from once


class Calibration(nn.Module):
    """What calibration learnt on the validation split, as buffers: it travels with the weights.

    Args:
        levels: quantile levels, symmetric about 0.5.
        pred_len: H.
        channels: C.
    """

    def __init__(self, levels: Sequence[float], pred_len: int, channels: int) -> None:
        super().__init__()
        self.alpha = alphas(levels)
        self.fitted: Tensor
        self.factors: Tensor
        shape = (pred_len, channels, len(self.alpha))
        self.register_buffer("fitted", torch.zeros((), dtype=torch.bool))
        self.register_buffer("factors", torch.ones(shape, dtype=torch.float64))
        for name, value in vars(TrackerState.start(torch.ones(shape, dtype=torch.float64))).items():
            self.register_buffer(name, value)

    @property
    def ready(self) -> bool:
        return bool(self.fitted)

    def forget(self) -> None:
        """As before calibration."""
        self.fitted.fill_(False)

    def fit(self, outcomes: Callable[[], Iterable[Outcome]], *, online: bool) -> None:
        """Calibrate on the windows of the validation split, given in order, each time anew.

        Args:
            online: also follow them in time, so that `tracker` goes on from their end: of several series, from the
                mean of where each stands.
        """
        self.forget()
        factors = conformal_factors(*_gather(outcomes()), self.alpha)
        start = TrackerState.start(factors)
        self._set(factors, [start])
        if online:
            streams = Streams(self)
            for outcome in outcomes():
                streams.follow(outcome)
            self._set(factors, streams.settle())

    def _set(self, factors: Tensor, states: Sequence[TrackerState]) -> None:
        self.factors = factors.to(self.factors)
        for name in _STATE:
            mean = torch.stack([getattr(state, name) for state in states]).mean(dim=0)
            setattr(self, name, mean.to(getattr(self, name)))
        self.fitted.fill_(True)

    def conformal(self) -> Tensor:
        """(H, C, P) on the CPU."""
        return self.factors.cpu().to(torch.float64)

    def tracker(self) -> Tracker:
        """A new stream, from where the validation split ended."""
        state = TrackerState(**{n: getattr(self, n).cpu().to(torch.float64) for n in _STATE})
        return Tracker(state, self.conformal(), self.alpha)


class Streams:
    """A tracker for each series of a split, one series after the other, fed with batches in order.

    Args:
        calibration: where each starts.
    """

    def __init__(self, calibration: Calibration) -> None:
        self.calibration = calibration
        self.states: dict[int, TrackerState] = {}  # of the series that are through
        self._series: int | None = None
        self._tracker: Tracker | None = None

    def follow(self, outcome: Outcome) -> Tensor:
        """(B, H, C, P) factors of the next batch.

        Raises:
            ValueError: windows of a series that another one has followed already.
        """
        score = outcome.scores()
        factors = torch.empty_like(score)
        for number in outcome.series.unique_consecutive().tolist():
            if self._tracker is None or number != self._series:
                self.settle()
                if number in self.states:
                    raise ValueError(f"the windows of series {number} do not follow one another")
                self._series, self._tracker = number, self.calibration.tracker()
            mine = outcome.series == number
            factors[mine] = self._tracker.follow(score[mine], outcome.known[mine])
        return factors

    def settle(self) -> list[TrackerState]:
        """Where each series stands once all its targets are past."""
        if self._tracker is not None and self._series is not None:
            self.states[self._series] = self._tracker.settle()
        self._series = self._tracker = None
        return list(self.states.values())


def check_windows(levels: Sequence[float], windows: int) -> None:
    """Refuse to calibrate on fewer validation windows than the widest pair of levels needs."""
    least = needed(levels)
    if windows < least:
        raise UserError(
            f"an interval from quantile {levels[0]:g} to {levels[-1]:g} needs {least} validation windows to be "
            f"calibrated and there are {windows}; take more rows for validation, a lower coverage, or "
            "--task_args.calibrate none"
        )


def unit_quantiles(forecast: Tensor, pairs: int) -> Tensor:
    """(…, Q) around a forecast without quantiles: all distances 1, so that a score is the absolute error."""
    middle = forecast.unsqueeze(-1)
    return torch.cat([(middle - 1).expand(*forecast.shape, pairs), middle, (middle + 1).expand(*forecast.shape, pairs)],
                     dim=-1)  # fmt: skip


def _gather(outcomes: Iterable[Outcome]) -> tuple[Tensor, Tensor]:
    """Scores (N, H, C, P) and known (N, H, C) of all windows, or of evenly spaced ones where they are very many."""
    kept: list[tuple[Tensor, Tensor]] = []
    every, seen, size = 1, 0, 0
    for outcome in outcomes:
        first = -seen % every
        seen += len(outcome.target)
        score, known = outcome.scores()[first::every], outcome.known[first::every]
        kept.append((score, known))
        size += score.numel()
        if size > _MOST:
            whole = [torch.cat(parts)[::2] for parts in zip(*kept)]
            kept, every, size = [(whole[0], whole[1])], 2 * every, whole[0].numel()
    score, known = (torch.cat(parts) for parts in zip(*kept))
    return score, known
