"""Scores against plain numpy, and equal for every batch size."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from attn_timeseries.metrics import ForecastScores, curve, final, seasonal_error

H, C, N = 6, 3, 50


@pytest.fixture
def data() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {
        "forecast": rng.normal(size=(N, H, C)),
        "target": rng.normal(size=(N, H, C)),
        "mean": rng.normal(size=(2, C)) * 10,
        "std": rng.uniform(0.5, 3, size=(2, C)),
        "seasonal": rng.uniform(0.5, 3, size=(2, C)),
        "group": rng.integers(0, 2, size=N),
    }


def scores(data: dict[str, np.ndarray], batch: int, observed: np.ndarray | None = None) -> ForecastScores:
    tensors = {name: torch.from_numpy(value) for name, value in data.items()}
    result = ForecastScores(H, tensors["mean"], tensors["std"], tensors["seasonal"])
    for first in range(0, N, batch):
        part = slice(first, first + batch)
        result.update(
            tensors["forecast"][part],
            tensors["target"][part],
            tensors["group"][part],
            None if observed is None else torch.from_numpy(observed[part]),
            torch.arange(N)[part],
        )
    return result


def expected(data: dict[str, np.ndarray], known: np.ndarray) -> dict[str, float]:
    mean, std, q = (data[n][data["group"]][:, None] for n in ("mean", "std", "seasonal"))
    f, y = data["forecast"] * std + mean, data["target"] * std + mean
    scaled = data["forecast"] - data["target"]
    smape = 200 * np.abs(f - y) / (np.abs(f) + np.abs(y))
    return {
        "mse": (scaled[known] ** 2).mean(),
        "mae": np.abs(scaled[known]).mean(),
        "mse_original": ((f - y)[known] ** 2).mean(),
        "mae_original": np.abs((f - y)[known]).mean(),
        "smape": smape[known].mean(),
        "mase": (np.abs(f - y) / q)[known].mean(),
        "windows": N,
    }


@pytest.mark.parametrize("holes", [False, True])
def test_against_numpy(data: dict[str, np.ndarray], holes: bool) -> None:
    known = np.random.default_rng(1).uniform(size=(N, H, C)) > (0.3 if holes else -1)
    result = final(scores(data, 7, known if holes else None).state())
    for name, value in expected(data, known).items():
        assert result[name] == pytest.approx(value, rel=1e-12), name


@pytest.mark.parametrize("batch", [1, 2, 32, 50, 512])
def test_the_same_figure_for_every_batch_size(data: dict[str, np.ndarray], batch: int) -> None:
    ours, whole = final(scores(data, batch).state()), final(scores(data, N).state())
    for name, value in whole.items():
        assert ours[name] == pytest.approx(value, rel=1e-13), name


def test_sums_add_up_over_processes(data: dict[str, np.ndarray]) -> None:
    parts = [{n: (v if n in ("mean", "std", "seasonal") else v[i::2]) for n, v in data.items()} for i in range(2)]
    states = []
    for part in parts:
        t = {n: torch.from_numpy(np.ascontiguousarray(v)) for n, v in part.items()}
        one = ForecastScores(H, t["mean"], t["std"], t["seasonal"])
        one.update(t["forecast"], t["target"], t["group"])
        states.append(one.state())
    total = final({name: states[0][name] + states[1][name] for name in states[0]})
    assert total == pytest.approx(final(scores(data, N).state()), rel=1e-13)


def test_horizon_curve(data: dict[str, np.ndarray]) -> None:
    state = scores(data, 8).state()
    np.testing.assert_allclose(curve(state), ((data["forecast"] - data["target"]) ** 2).mean(axis=(0, 2)), rtol=1e-12)
    assert curve(state).mean() == pytest.approx(final(state)["mse"])


def test_window_errors(data: dict[str, np.ndarray]) -> None:
    index, error = scores(data, 8).window_errors()
    assert index.tolist() == list(range(N))
    np.testing.assert_allclose(error, ((data["forecast"] - data["target"]) ** 2).mean(axis=(1, 2)), rtol=1e-12)


def test_perfect_and_zero_forecasts() -> None:
    one = ForecastScores(2, torch.zeros(1, 1), torch.ones(1, 1), torch.ones(1, 1))
    zeros = torch.zeros(3, 2, 1)
    one.update(zeros, zeros, torch.zeros(3, dtype=torch.int64))
    assert final(one.state()) == {
        "mse": 0, "mae": 0, "mse_original": 0, "mae_original": 0, "smape": 0, "mase": 0, "windows": 3,
    }  # fmt: skip


def test_reset_forgets() -> None:
    one = ForecastScores(2, torch.zeros(1, 1), torch.ones(1, 1), torch.ones(1, 1))
    one.update(torch.ones(3, 2, 1), torch.zeros(3, 2, 1), torch.zeros(3, dtype=torch.int64), index=torch.arange(3))
    one.reset()
    assert one.state()["windows"].item() == 0
    assert len(one.window_errors()[0]) == 0


def test_mase_leaves_out_columns_without_a_seasonal_error() -> None:
    """A constant training column has no seasonal error to divide by."""
    one = ForecastScores(1, torch.zeros(1, 2), torch.ones(1, 2), torch.tensor([[2.0, float("nan")]]))
    one.update(torch.ones(4, 1, 2), torch.zeros(4, 1, 2), torch.zeros(4, dtype=torch.int64))
    figures = final(one.state())
    assert figures["mase"] == 0.5
    assert figures["mae"] == 1.0


class TestSeasonalError:
    def test_against_the_formula(self) -> None:
        values = np.random.default_rng(0).normal(size=(40, 2))
        np.testing.assert_allclose(seasonal_error([values], 7), np.abs(values[7:] - values[:-7]).mean(axis=0))

    def test_constant_column_and_short_series(self) -> None:
        values = np.stack([np.ones(10), np.arange(10.0)], axis=1)
        result = seasonal_error([values], 2)
        assert np.isnan(result[0])
        assert result[1] == 2
        assert np.isnan(seasonal_error([values], 20)).all()

    def test_gaps_and_several_series(self) -> None:
        a, b = np.arange(6.0)[:, None], 10 * np.arange(6.0)[:, None]
        a[2] = np.nan
        assert seasonal_error([a, b], 1)[0] == pytest.approx((3 * 1 + 5 * 10) / 8)
