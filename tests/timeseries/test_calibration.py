"""Conformal factors and online calibration against their definitions, coverage where theory promises it, no leaks."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from attn_shared.errors import UserError
from attn_timeseries import calibration as cal
from attn_timeseries.calibration import Calibration, Outcome, Streams, Tracker, TrackerState

LEVELS = (0.05, 0.25, 0.5, 0.75, 0.95)
ALPHA = cal.alphas(LEVELS)


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def quantiles(*shape: int, seed: int = 0) -> Tensor:
    gaps = torch.rand(*shape, len(LEVELS), generator=generator(seed), dtype=torch.float64) + 0.05
    return gaps.cumsum(-1) - 2


def some_scores(windows: int, horizon: int, columns: int, seed: int = 0) -> Tensor:
    wide = torch.randn(windows, horizon, columns, 1, generator=generator(seed), dtype=torch.float64).abs()
    return torch.cat([wide, 1.5 * wide], dim=-1)


def outcome(q: Tensor, y: Tensor, series: Tensor | None = None) -> Outcome:
    return Outcome.of(q, y, None, torch.zeros(len(y), dtype=torch.int64) if series is None else series)


def test_levels_pair_up() -> None:
    torch.testing.assert_close(ALPHA, torch.tensor([0.1, 0.5], dtype=torch.float64))
    assert cal.needed(LEVELS) == 9
    with pytest.raises(UserError, match=r"from quantile 0\.05 to 0\.95 needs 9 validation windows .* there are 8"):
        cal.check_windows(LEVELS, 8)
    cal.check_windows(LEVELS, 9)


def test_a_target_is_inside_where_its_score_is_at_most_the_factor() -> None:
    q, y = quantiles(200, 3, 2), torch.randn(200, 3, 2, generator=generator(1), dtype=torch.float64)
    for factor in (0.3, 1.0, 2.5):
        wide = cal.widen(q, torch.full((2,), factor, dtype=torch.float64))
        for pair in range(2):
            inside = (y >= wide[..., pair]) & (y <= wide[..., -1 - pair])
            assert torch.equal(inside, cal.scores(q, y)[..., pair] <= factor)
    torch.testing.assert_close(cal.widen(q, torch.ones(2, dtype=torch.float64)), q)


def test_widened_quantiles_never_cross_and_keep_the_median() -> None:
    q = quantiles(50, 4, 2)
    factors = 3 * torch.rand(50, 4, 2, 2, generator=generator(2), dtype=torch.float64)
    wide = cal.widen(q, factors)
    assert (wide.diff(dim=-1) >= 0).all()
    assert torch.equal(wide[..., 2], q[..., 2])


def test_a_point_forecast_scores_its_absolute_error() -> None:
    f, y = torch.randn(2, 9, 4, 3, dtype=torch.float64)
    torch.testing.assert_close(
        cal.scores(cal.unit_quantiles(f, 2), y), (y - f).abs().unsqueeze(-1).expand(-1, -1, -1, 2)
    )


def test_factors_are_the_order_statistics_of_the_definition() -> None:
    score = some_scores(57, 3, 2)
    known = torch.rand(57, 3, 2, generator=generator(3)) > 0.2
    known[:, 2, 1] = False
    found = cal.conformal_factors(score, known, ALPHA)
    for h in range(3):
        for c in range(2):
            for p in range(2):
                values = np.sort(score[known[:, h, c], h, c, p].numpy())
                if h == 2 and c == 1:
                    assert found[h, c, p] == 1
                    continue
                rank = math.ceil((len(values) + 1) * (1 - ALPHA[p].item()))
                assert found[h, c, p].item() == values[min(rank, len(values)) - 1]


def test_exchangeable_scores_are_covered_as_theory_promises() -> None:
    """P(score <= factor) lies between 1 - alpha and 1 - alpha + 1 / (n + 1), over many calibration sets."""
    n, sets = 39, 4000
    score = torch.randn(n + 1, sets, 1, 1, generator=generator(4), dtype=torch.float64).abs()
    alpha = torch.tensor([0.1], dtype=torch.float64)
    factors = cal.conformal_factors(score[:n], torch.ones(n, sets, 1, dtype=torch.bool), alpha)
    covered = (score[n] <= factors).double().mean().item()
    assert 0.9 - 0.015 < covered < 0.9 + 1 / (n + 1) + 0.015


def by_hand(score: np.ndarray, known: np.ndarray, start: np.ndarray) -> np.ndarray:
    """The tracker as its module tells it, in loops over plain numbers."""
    windows, horizon, columns, pairs = score.shape
    alpha = ALPHA.numpy()
    experts, shared = {r: np.log(start).copy() for r in cal.RATES}, {r: np.zeros(pairs) for r in cal.RATES}
    losses = dict.fromkeys(cal.RATES, 0.0)
    deficit, count = np.zeros_like(start), np.zeros((horizon, columns))
    used, then = np.zeros_like(score), []
    for n in range(windows):
        due = [
            (n - h - 1, h, c)
            for h in range(horizon)
            for c in range(columns)
            if n - h - 1 >= 0 and known[n - h - 1, h, c]
        ]
        now = {r: experts[r] + shared[r] for r in cal.RATES}
        for r in cal.RATES:
            own, together = r
            for w, h, c in due:
                for p in range(pairs):
                    s, size = score[w, h, c, p], math.exp(then[w][r][h, c, p])
                    pin = (1 - alpha[p]) * (s - size) if s > size else alpha[p] * (size - s)
                    losses[r] += pin / start[h, c, p] / (len(due) * pairs)
                    push = (s > math.exp(now[r][h, c, p])) - alpha[p]
                    experts[r][h, c, p] += own * push
                    shared[r][p] += together * push / len(due)
        for w, h, c in due:
            deficit[h, c] += (score[w, h, c] > used[w, h, c]) - alpha
            count[h, c] += 1
        least = min(losses.values())
        weights = {r: math.exp(-(losses[r] - least)) for r in cal.RATES}
        total = sum(weights.values())
        then.append({r: experts[r] + shared[r] for r in cal.RATES})
        for h in range(horizon):
            for c in range(columns):
                for p in range(pairs):
                    tracked = sum(weights[r] / total * math.exp(then[n][r][h, c, p]) for r in cal.RATES)
                    angle = deficit[h, c, p] * math.log(count[h, c] + 1) / (count[h, c] + 1) / (2 / math.pi)
                    pull = math.tan(min(max(angle, -1.4), 1.4))
                    used[n, h, c, p] = tracked * math.exp(min(max(pull, -2.0), 2.5))
    return used


@pytest.fixture
def start() -> Tensor:
    return 0.5 + torch.rand(4, 2, 2, generator=generator(5), dtype=torch.float64)


def tracker(start: Tensor) -> Tracker:
    return Tracker(TrackerState.start(start), start, ALPHA)


def test_the_tracker_equals_a_loop_by_hand(start: Tensor) -> None:
    score = some_scores(60, 4, 2) * torch.linspace(1, 4, 60, dtype=torch.float64)[:, None, None, None]
    known = torch.rand(60, 4, 2, generator=generator(6)) > 0.15
    found = tracker(start).follow(score, known)
    np.testing.assert_allclose(found, by_hand(score.numpy(), known.numpy(), start.numpy()), rtol=1e-12)


@pytest.mark.parametrize("sizes", [[1] * 40, [7, 7, 7, 7, 7, 5], [40]])
def test_batches_change_nothing(start: Tensor, sizes: list[int]) -> None:
    score, known = some_scores(40, 4, 2), torch.ones(40, 4, 2, dtype=torch.bool)
    one = tracker(start)
    parts = [one.follow(s, k) for s, k in zip(score.split(sizes), known.split(sizes))]
    assert torch.equal(torch.cat(parts), tracker(start).follow(score, known))


@pytest.mark.parametrize("step", range(4))
def test_a_target_counts_only_once_it_is_past(start: Tensor, step: int) -> None:
    """The target of step h (from 1) of forecast n is past when forecast n + h is made, and not before."""
    score, known = some_scores(30, 4, 2), torch.ones(30, 4, 2, dtype=torch.bool)
    other = score.clone()
    other[10, step] = 100.0
    ours, theirs = (tracker(start).follow(s, known) for s in (score, other))
    changed = (ours != theirs).flatten(1).any(dim=1).nonzero().flatten()
    assert changed[0] == 10 + step + 1


def test_what_was_not_observed_never_counts(start: Tensor) -> None:
    score, known = some_scores(30, 4, 2), torch.rand(30, 4, 2, generator=generator(7)) > 0.3
    other = torch.where(known.unsqueeze(-1), score, torch.nan)
    ours, theirs = tracker(start), tracker(start)
    assert torch.equal(ours.follow(score, known), theirs.follow(other, known))
    for one, two in zip(vars(ours.settle()).values(), vars(theirs.settle()).values()):
        assert torch.equal(one, two)
        assert one.isfinite().all()


def test_settling_learns_all_that_is_left(start: Tensor) -> None:
    one = tracker(start)
    one.follow(some_scores(13, 4, 2), torch.ones(13, 4, 2, dtype=torch.bool))
    assert one.settle().count.unique().tolist() == [13]


def shifting(windows: int, seed: int) -> tuple[Tensor, Tensor]:
    """Forecasts of 0 with fixed quantiles of a unit normal, for targets five times as wide."""
    spread = torch.tensor([-1.645, -0.674, 0, 0.674, 1.645], dtype=torch.float64)
    q = spread.expand(windows, 3, 2, 5)
    return q, torch.randn(windows, 3, 2, generator=generator(seed), dtype=torch.float64)


def calibrated(online: bool) -> Calibration:
    calibration = Calibration(LEVELS, 3, 2)
    q, y = shifting(200, 8)
    calibration.fit(lambda: [outcome(a, b) for a, b in zip(q.split(64), y.split(64))], online=online)
    return calibration


def coverage(q: Tensor, y: Tensor) -> float:
    return ((y >= q[..., 0]) & (y <= q[..., -1])).double().mean().item()


def test_adaptation_regains_the_coverage_that_a_shift_costs() -> None:
    q, y = shifting(600, 9)
    calibration = calibrated(online=True)
    assert abs(coverage(cal.widen(q, calibration.conformal()), y) - 0.9) < 0.03
    wilder = 5 * y
    assert coverage(cal.widen(q, calibration.conformal()), wilder) < 0.4
    factors = Streams(calibration).follow(outcome(q, wilder))
    assert 0.87 < coverage(cal.widen(q, factors), wilder) < 0.91
    # And where nothing shifts, it stays where it was.
    factors = Streams(calibration).follow(outcome(q, y))
    assert abs(coverage(cal.widen(q, factors), y) - 0.9) < 0.02


def test_series_are_streams_of_their_own() -> None:
    q, y = shifting(40, 10)
    series = torch.tensor([0] * 25 + [1] * 15)
    both = Streams(calibrated(online=True)).follow(outcome(q, y, series))
    alone = Streams(calibrated(online=True)).follow(outcome(q[25:], y[25:]))
    assert torch.equal(both[25:], alone)
    with pytest.raises(ValueError, match="the windows of series 0 do not follow one another"):
        Streams(calibrated(online=True)).follow(outcome(q, y, torch.tensor([0] * 10 + [1] * 20 + [0] * 10)))


def test_a_calibration_travels_with_the_weights() -> None:
    ours, theirs = calibrated(online=True), Calibration(LEVELS, 3, 2)
    assert not theirs.ready
    theirs.load_state_dict(ours.state_dict())
    assert theirs.ready
    q, y = shifting(20, 11)
    assert torch.equal(Streams(ours).follow(outcome(q, y)), Streams(theirs).follow(outcome(q, y)))
    theirs.forget()
    assert not theirs.ready


def test_following_the_validation_split_moves_only_the_start_of_the_tracker() -> None:
    followed, plain = calibrated(online=True), calibrated(online=False)
    assert torch.equal(followed.conformal(), plain.conformal())
    assert not torch.equal(followed.experts, plain.experts)


def test_long_splits_are_thinned_evenly(monkeypatch: pytest.MonkeyPatch) -> None:
    q, y = shifting(300, 12)
    parts = [outcome(a, b) for a, b in zip(q.split(7), y.split(7))]
    whole, known = cal._gather(parts)
    assert whole.shape == (300, 3, 2, 2)
    assert known.all()
    monkeypatch.setattr(cal, "_MOST", 1000)  # a third of the 3,600 scores
    thin, _ = cal._gather(parts)
    assert torch.equal(thin, whole[::4])
