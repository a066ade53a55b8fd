"""The task: loss, scores, baselines, published rows, pictures."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from attn_shared.config import RunConfig
from attn_shared.errors import UserError
from attn_shared.task import DataBundle
from attn_shared.trainer import evaluate_split
from attn_timeseries.baselines import fit_linear, repeat_season
from attn_timeseries.config import MODELS
from attn_timeseries.data.cards import ForecastDataConfig
from attn_timeseries.task import ForecastTask

ETT = Path(os.environ.get("ATTN_DATA", "data")) / "timeseries" / "ETTh1.csv"
needs_data = [pytest.mark.data, pytest.mark.skipif(not ETT.is_file(), reason=f"no {ETT}: set ATTN_DATA")]
ARGS: dict[str, Any] = {"seq_len": 104, "label_len": 52, "pred_len": 52}


def config(
    data: str | Path = "co2", model: str = "dlinear", model_args: dict[str, Any] | None = None, **args: Any
) -> RunConfig:
    return RunConfig(
        app="timeseries",
        model=model,
        model_args=MODELS[model].config(**(model_args or {})),
        data=str(data),
        data_args=ForecastDataConfig(**{**ARGS, **args}),
    )


def build(run: RunConfig) -> tuple[ForecastTask, DataBundle]:
    bundle = ForecastTask.load_data(run)
    torch.manual_seed(0)
    return ForecastTask(run, bundle.state).eval(), bundle


def test_loss_is_the_squared_error_of_observed_values() -> None:
    task, bundle = build(config())
    batch = bundle.train.__getitems__(range(200, 232))  # the long gap of 1964 lies in these windows
    assert not batch["observed"].all()
    error = (task.forward_batch(batch) - batch["y"][:, -52:]).square()
    assert task.training_loss(batch).item() == pytest.approx(error[batch["observed"]].mean().item(), rel=1e-5)
    filled = {**batch, "y": batch["y"].clone()}
    filled["y"][:, -52:][~batch["observed"]] = 1e6
    assert task.training_loss(filled).item() == pytest.approx(task.training_loss(batch).item(), rel=1e-6)
    task.training_loss(batch).backward()
    assert all(p.grad is not None for p in task.network.parameters())


@pytest.mark.parametrize("model", ["naive", "seasonal_naive"])
def test_the_rules_score_as_their_baselines(model: str) -> None:
    task, bundle = build(config(model=model))
    rows = {row["model"]: row for row in ForecastTask.baselines(task.config, bundle)}
    figures = evaluate_split(task, bundle, "test", task.config)
    for name in ("mse", "mae", "mse_original", "mae_original", "mase", "smape"):
        assert figures[name] == pytest.approx(rows[model][name], rel=1e-6), name


def test_evaluation_is_the_same_for_every_batch_size() -> None:
    task, bundle = build(config())
    seen = []
    for size in (1, 32, 128, 512):
        task.config.trainer.eval_batch_size = size
        seen.append(evaluate_split(task, bundle, "test", task.config))
    for figures in seen[1:]:
        for name, value in figures.items():
            assert value == pytest.approx(seen[0][name], rel=1e-6), name
    assert seen[0]["windows"] == len(bundle.test) == 405


def test_baselines_order_on_co2() -> None:
    """A linear map beats repeating the season, and that beats repeating the last value, by far."""
    run = config()
    rows = {row["model"]: row["mse"] for row in ForecastTask.baselines(run, ForecastTask.load_data(run))}
    assert set(rows) == {"naive", "seasonal_naive", "dlinear (closed form)"}
    assert rows["dlinear (closed form)"] < 0.4 * rows["seasonal_naive"] < 0.4 * rows["naive"]


def test_linear_fit_finds_the_map_that_made_the_data(tmp_path: Path) -> None:
    """x_t = 0.5 x_{t-1} + 0.3 x_{t-2} + noise: the best one-step map weighs the last two steps so, and no other."""
    rng = np.random.default_rng(0)
    x = np.zeros(6000)
    for t in range(2, len(x)):
        x[t] = 0.5 * x[t - 1] + 0.3 * x[t - 2] + rng.normal()
    frame = pd.DataFrame({"date": pd.date_range("2024-01-01", periods=len(x), freq="h"), "x": x})
    frame.to_csv(tmp_path / "x.csv", index=False)
    bundle = ForecastTask.load_data(config(tmp_path / "x.csv", seq_len=12, label_len=0, pred_len=1))
    weight, bias, _ = fit_linear(bundle.train, bundle.val)
    expected = np.zeros(12)
    expected[-1], expected[-2] = 0.5, 0.3
    np.testing.assert_allclose(weight[:, 0], expected, atol=0.06)
    assert abs(bias.item()) < 0.05


def test_repeat_season() -> None:
    x = torch.arange(10.0)[None, :, None]
    assert repeat_season(x, 5, 3)[0, :, 0].tolist() == [7, 8, 9, 7, 8]
    assert repeat_season(x, 3, 20)[0, :, 0].tolist() == [9, 9, 9]


def test_published_rows_stand_only_under_their_protocol() -> None:
    def rows(**changes: Any) -> list[dict[str, Any]]:
        run = config(**changes)
        state = {"columns": ["co2"], "calendar": "W-SAT", "season": 52,
                 "scaler": {"groups": {"": 0}, "mean": [[0.0]], "std": [[1.0]]}, "seasonal_error": [[1.0]]}  # fmt: skip
        return ForecastTask(run, state).published()

    found = {row["model"]: row for row in rows(data="etth1", seq_len=96, pred_len=96)}
    assert found["autoformer"]["mse"] == 0.449
    assert found["informer"]["mae"] == 0.713
    assert all("20" in row["source"] for row in found.values())
    assert {row["model"]: row["mse"] for row in rows(data="exchange", pred_len=96)}["naive"] == 0.081
    assert rows(data="etth1", pred_len=96, split="ratio") == []
    assert rows(data="etth1", pred_len=97) == []
    assert rows(data="co2") == []


def test_pictures() -> None:
    task, bundle = build(config())
    evaluate_split(task, bundle, "test", task.config)
    pictures = {picture.name: picture for picture in task.pictures(bundle)}
    assert list(pictures) == ["forecasts", "horizon", "worst"]
    horizon = pictures["horizon"].figure.axes[0]
    assert horizon.lines[0].get_label() == "dlinear"
    assert len(horizon.lines) == 4
    assert len(pictures["forecasts"].figure.axes) == 4


def test_pictures_do_not_change_the_figures() -> None:
    task, bundle = build(config())
    before = evaluate_split(task, bundle, "test", task.config)
    list(task.pictures(bundle))
    assert evaluate_split(task, bundle, "test", task.config) == before


def test_worst_windows_are_the_worst() -> None:
    task, bundle = build(config(model="naive"))
    evaluate_split(task, bundle, "test", task.config)
    number, error = task._test_errors(bundle.test)
    batch = bundle.test.__getitems__(range(405))
    naive = (batch["x"][:, -1:] - batch["y"][:, -52:]).double().square()
    by_hand = naive.mean(dim=(1, 2))  # the test part of the series has no gap
    assert number[error.argmax()] == by_hand.argmax()
    torch.testing.assert_close(error[number.argsort()], by_hand, rtol=1e-6, atol=1e-9)


def test_other_data_is_judged_by_the_training_statistics(tmp_path: Path) -> None:
    dates = pd.date_range("2000-01-01", periods=600, freq="W-SUN")
    pd.DataFrame({"when": dates, "more": 1.0, "co2": 350.0}).to_csv(tmp_path / "x.csv", index=False)
    task, bundle = build(config())
    other = ForecastTask.load_data(config(tmp_path / "x.csv"), state=bundle.state)
    mean, std = bundle.state["scaler"]["mean"][0][0], bundle.state["scaler"]["std"][0][0]
    assert other.state == bundle.state
    assert other.test[0]["x"].shape[1] == 1
    torch.testing.assert_close(other.test[0]["x"], torch.full((104, 1), (350 - mean) / std))
    assert evaluate_split(task, other, "test", task.config)["windows"] == len(other.test)


def test_data_of_another_step_is_refused(tmp_path: Path) -> None:
    frame = pd.DataFrame({"date": pd.date_range("2000-01-01", periods=600, freq="h"), "co2": 350.0})
    frame.to_csv(tmp_path / "x.csv", index=False)
    _, bundle = build(config())
    with pytest.raises(UserError, match=r"x\.csv has steps of 'h' and the model was trained on steps of 'W-SAT'"):
        ForecastTask.load_data(config(tmp_path / "x.csv"), state=bundle.state)


def test_state_is_json() -> None:
    import json

    state = ForecastTask.load_data(config()).state
    assert json.loads(json.dumps(state, allow_nan=False)) == state


class TestETTh1:
    pytestmark = needs_data

    def test_repeat_last_and_the_linear_map(self) -> None:
        """Repeat-last is 1.295 and DLinear .375 in the papers' tables; the best linear map is a little better."""
        run = config("etth1", seq_len=336, label_len=48, pred_len=96)
        rows = {row["model"]: row for row in ForecastTask.baselines(run, ForecastTask.load_data(run))}
        assert rows["naive"]["mse"] == pytest.approx(1.295, abs=0.001)
        assert rows["naive"]["windows"] == 2785
        assert 0.36 < rows["dlinear (closed form)"]["mse"] < 0.38

    def test_repeat_last_on_exchange_is_the_published_figure(self) -> None:
        run = config("exchange", seq_len=96, label_len=48, pred_len=96)
        rows = {row["model"]: row for row in ForecastTask.baselines(run, ForecastTask.load_data(run))}
        assert rows["naive"]["mse"] == pytest.approx(0.081, abs=0.0005)

    def test_all_windows_at_every_batch_size(self) -> None:
        task, bundle = build(config("etth1", seq_len=96, label_len=48, pred_len=96))
        seen = []
        for size in (1, 32, 128, 512):
            task.config.trainer.eval_batch_size = size
            seen.append(evaluate_split(task, bundle, "test", task.config))
        for figures in seen:
            assert figures["windows"] == 2785
            assert figures["mse"] == pytest.approx(seen[0]["mse"], abs=1e-6)
            assert figures["mae"] == pytest.approx(seen[0]["mae"], abs=1e-6)
