"""Scores of predicted clicks against scikit-learn and plain loops."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn import metrics as sklearn_metrics
from sklearn.calibration import calibration_curve

from attn_recsys.clicks import metrics
from attn_shared.errors import UserError


def drawn(seed: int, rows: int = 400, ties: bool = False) -> metrics.Rows:
    rng = np.random.default_rng(seed)
    odds = rng.normal(size=rows)
    if ties:
        odds = np.round(odds, 1)
    label = (rng.random(rows) < metrics.sigmoid(odds + rng.normal(size=rows))).astype(float)
    user = rng.integers(0, 30, rows)
    return metrics.Rows(odds, label, user, user % 9)


@pytest.mark.parametrize("ties", [False, True])
def test_auc_and_logloss_are_scikit_learns(ties: bool) -> None:
    for seed in range(20):
        rows = drawn(seed, ties=ties)
        assert metrics.auc(rows.odds, rows.label) == pytest.approx(
            sklearn_metrics.roc_auc_score(rows.label, rows.odds), abs=1e-12
        )
        weight = np.random.default_rng(seed).random(len(rows.odds))
        assert metrics.auc(rows.odds, rows.label, weight) == pytest.approx(
            sklearn_metrics.roc_auc_score(rows.label, rows.odds, sample_weight=weight), abs=1e-12
        )
        assert metrics.logloss(rows.odds, rows.label).mean() == pytest.approx(
            sklearn_metrics.log_loss(rows.label, rows.probability), abs=1e-12
        )


def test_gauc_is_the_weighted_mean_over_users() -> None:
    for seed in range(10):
        rows = drawn(seed, ties=True)
        total = weights = 0.0
        for user in np.unique(rows.user):
            mine = rows.user == user
            if np.ptp(rows.label[mine]) > 0:
                total += mine.sum() * sklearn_metrics.roc_auc_score(rows.label[mine], rows.odds[mine])
                weights += mine.sum()
        assert metrics.gauc(rows.odds, rows.label, rows.user) == pytest.approx(total / weights, abs=1e-12)
    one = drawn(0)
    assert np.isnan(metrics.gauc(one.odds, np.ones(len(one.odds)), one.user))
    assert np.isnan(metrics.auc(one.odds, np.zeros(len(one.odds))))


def test_calibration_curve_is_scikit_learns() -> None:
    for seed in range(10):
        rows = drawn(seed)
        curve = metrics.calibration(rows.probability, rows.label, 10)
        happened, predicted = calibration_curve(rows.label, rows.probability, n_bins=10, strategy="quantile")
        np.testing.assert_allclose(curve.happened, happened, atol=1e-12)
        np.testing.assert_allclose(curve.predicted, predicted, atol=1e-12)
        assert curve.rows.sum() == len(rows.label)
    level = metrics.calibration(np.full(10, 0.3), np.array([1, 1, 1, 0, 0, 0, 0, 0, 0, 0.0]), 5)
    assert level.error == pytest.approx(0.0, abs=1e-12)
    assert len(level.rows) == 1


def test_sure_predictions_keep_their_loss() -> None:
    np.testing.assert_allclose(metrics.logloss(np.array([900.0, -900.0]), np.array([0.0, 1.0])), [900.0, 900.0])
    np.testing.assert_array_equal(metrics.sigmoid(np.array([900.0, -900.0])), [1.0, 0.0])


def test_figures_do_not_depend_on_batches() -> None:
    rows = drawn(5)

    def state(size: int) -> metrics.Rows:
        found: dict[str, torch.Tensor] = {}
        order = np.random.default_rng(size).permutation(-(-len(rows.odds) // size))
        for number in order:  # batches may come in any order
            index = torch.arange(number * size, min(len(rows.odds), (number + 1) * size))
            batch = {
                "index": index,
                "label": torch.from_numpy(rows.label)[index],
                "user": torch.from_numpy(rows.user)[index],
                "activity": torch.from_numpy(rows.activity)[index],
            }
            found |= metrics.pack(batch, torch.from_numpy(rows.odds)[index])
        made = metrics.unpack(found)
        assert made is not None
        return made

    expected = metrics.figures(rows, groups=3, bins=7, intervals=True)
    for size in (1, 33, 1000):
        assert metrics.figures(state(size), groups=3, bins=7, intervals=True) == expected
    assert expected["auc, 95% from"] < expected["auc"] < expected["auc, 95% to"]
    groups = [member for _, member in metrics.row_groups(rows, 3)]
    assert len(groups) > 1
    np.testing.assert_array_equal(np.sum(groups, axis=0), np.ones(len(rows.odds)))


def test_interval_covers_the_spread_of_samples() -> None:
    """The bootstrap's width is about that of AUC over fresh samples of users."""
    fresh = [metrics.auc(r.odds, r.label) for r in (drawn(seed, rows=300) for seed in range(100))]
    low, high = metrics.bootstrap(drawn(3, rows=300), resamples=300)
    spread = np.quantile(fresh, 0.975) - np.quantile(fresh, 0.025)
    assert 0.5 < (high["auc"] - low["auc"]) / spread < 2.0


def test_nan_is_refused() -> None:
    batch = {name: torch.zeros(2) for name in ("index", "label", "user", "activity")}
    with pytest.raises(UserError, match=r"no longer numbers"):
        metrics.pack(batch, torch.tensor([0.0, float("nan")]))
