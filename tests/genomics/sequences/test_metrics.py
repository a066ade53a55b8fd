"""Scores of classified sequences against scikit-learn and plain loops."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn import metrics as sklearn_metrics

from attn_genomics.sequences import metrics
from attn_shared.errors import UserError


def drawn(seed: int, classes: int, rows: int = 300, ties: bool = False) -> metrics.Rows:
    rng = np.random.default_rng(seed)
    label = rng.integers(0, classes, rows)
    score = rng.normal(size=(rows, classes)) + np.eye(classes)[label]
    if ties:
        score = score[rng.integers(0, rows // 5, rows)]
    score -= np.log(np.exp(score).sum(axis=1, keepdims=True))
    return metrics.Rows(score, label)


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("classes", [2, 4])
def test_figures_are_scikit_learns(classes: int, ties: bool) -> None:
    for seed in range(10):
        rows = drawn(seed, classes, ties=ties)
        found = metrics.figures(rows)
        truth, said, chance = rows.label, rows.said, rows.probability
        one = np.eye(classes)[truth]
        ranked = rows.score[:, 1] - rows.score[:, 0] if classes == 2 else chance
        binary = {"average": "binary"} if classes == 2 else {"average": "macro"}
        assert found["mcc"] == pytest.approx(sklearn_metrics.matthews_corrcoef(truth, said), abs=1e-12)
        assert found["auroc"] == pytest.approx(
            sklearn_metrics.roc_auc_score(truth, ranked, multi_class="ovr"), abs=1e-12
        )
        assert found["auprc"] == pytest.approx(
            sklearn_metrics.average_precision_score(truth if classes == 2 else one, ranked), abs=1e-12
        )
        assert found["accuracy"] == pytest.approx(sklearn_metrics.accuracy_score(truth, said), abs=1e-12)
        assert found["f1"] == pytest.approx(sklearn_metrics.f1_score(truth, said, **binary), abs=1e-12)
        assert found["brier"] == pytest.approx(
            sklearn_metrics.brier_score_loss(truth, chance[:, 1] if classes == 2 else chance), abs=1e-12
        )
        assert found["logloss"] == pytest.approx(sklearn_metrics.log_loss(truth, chance), abs=1e-12)


def test_calibration_error_is_that_of_a_loop() -> None:
    rows = drawn(3, 3)
    sure, right = rows.probability.max(axis=1), rows.said == rows.label
    error = 0.0
    for b in range(15):
        member = (sure > b / 15) & (sure <= (b + 1) / 15)
        if member.any():
            error += member.mean() * abs(sure[member].mean() - right[member].mean())
    assert metrics.figures(rows)["ece"] == pytest.approx(error, abs=1e-12)
    curve = metrics.reliability(sure, right)
    assert (curve.rows * abs(curve.predicted - curve.happened)).sum() / curve.rows.sum() == pytest.approx(error)


@pytest.mark.parametrize("classes", [2, 3])
def test_a_weight_counts_as_so_many_copies(classes: int) -> None:
    rows = drawn(1, classes, rows=80, ties=True)
    weight = np.random.default_rng(0).integers(0, 4, 80)
    found = metrics._Scorer(rows)(weight[None].astype(float))
    copies = metrics.Rows(rows.score.repeat(weight, axis=0), rows.label.repeat(weight))
    expected = metrics.figures(copies)
    for name, value in found.items():
        assert float(value[0]) == pytest.approx(expected[name], abs=1e-12), name


def test_what_cannot_be_told() -> None:
    one = metrics.Rows(np.log(np.array([[0.9, 0.1], [0.8, 0.2]])), np.array([0, 0]))
    found = metrics.figures(one, resamples=20)
    assert found["mcc"] == 0
    assert found["f1"] == 0
    assert np.isnan(found["auroc"])
    assert found["accuracy"] == found["accuracy, 95% from"] == 1
    sure = metrics.Rows(np.array([[-900.0, 0.0], [0.0, -900.0], [0.0, -901.0]]), np.array([1, 0, 1]))
    assert metrics.figures(sure)["logloss"] == pytest.approx(901 / 3)
    assert metrics.figures(sure)["auroc"] == pytest.approx(0.5)  # sure beyond 0 and 1, and still in order
    batch = {"index": torch.arange(2), "label": torch.zeros(2, dtype=torch.int64)}
    with pytest.raises(UserError, match=r"no longer numbers"):
        metrics.pack(batch, torch.tensor([[0.0, float("nan")], [0.0, 1.0]]))


def test_figures_do_not_depend_on_batches() -> None:
    rows = drawn(5, 2)
    expected = metrics.figures(rows, resamples=100)
    for size in (1, 33, 1000):
        state: dict[str, torch.Tensor] = {}
        for number in np.random.default_rng(size).permutation(-(-len(rows.label) // size)):
            index = torch.arange(number * size, min(len(rows.label), (number + 1) * size))
            batch = {"index": index, "label": torch.from_numpy(rows.label)[index]}
            state |= metrics.pack(batch, torch.from_numpy(rows.score)[index])
        made = metrics.unpack(state)
        assert made is not None
        assert metrics.figures(made, resamples=100) == expected
    assert metrics.unpack({}) is None
    for name in ("mcc", "auroc", "auprc", "accuracy", "f1", "brier", "logloss"):
        assert expected[f"{name}, 95% from"] < expected[name] < expected[f"{name}, 95% to"]


def test_interval_covers_the_spread_of_samples() -> None:
    fresh = [metrics.figures(drawn(seed, 2)) for seed in range(150)]
    for name in ("mcc", "auroc", "logloss"):
        low, high = metrics.bootstrap(drawn(3, 2), 300)
        spread = np.quantile([one[name] for one in fresh], 0.975) - np.quantile([one[name] for one in fresh], 0.025)
        assert 0.6 < (high[name] - low[name]) / spread < 1.7
