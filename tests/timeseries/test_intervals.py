"""Intervals from the command line to the file: training, calibration, scores, pictures, forecasts, refusals."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from attn_shared import checkpoint, options, trainer
from attn_shared.config import RunConfig, TrainerConfig
from attn_shared.errors import UserError
from attn_shared.task import DataBundle
from attn_shared.trainer import evaluate_split
from attn_timeseries import metrics
from attn_timeseries.baselines import residual_quantiles
from attn_timeseries.calibration import widen
from attn_timeseries.cli import APP, main
from attn_timeseries.config import MODELS, ForecastTaskConfig
from attn_timeseries.data.cards import ForecastDataConfig
from attn_timeseries.task import ForecastTask

ROWS, SEQ, PRED = 500, 14, 7
LEVELS = [0.05, 0.1, 0.25, 0.5, 0.75, 0.9, 0.95]


def values(rows: int = ROWS, seed: int = 0) -> np.ndarray:
    """Weekly seasons and noise: of one size in column a, three times as large in b's last fifth."""
    rng = np.random.default_rng(seed)
    season = np.sin(2 * np.pi * np.arange(rows) / 7)
    noise = rng.normal(size=(rows, 2))
    noise[4 * rows // 5 :, 1] *= 3
    return np.stack([season + 0.3 * noise[:, 0], 10 * (season + 0.3 * noise[:, 1])], axis=1)


def write(path: Path, table: np.ndarray) -> Path:
    frame = pd.DataFrame(table, columns=["a", "b"])
    frame.insert(0, "date", pd.date_range("2023-01-01", periods=len(table), freq="D"))
    frame.to_csv(path, index=False)
    return path


def config(
    path: Path | str, model: str = "dlinear", loss: str = "mse", calibrate: str = "none", **task: Any
) -> RunConfig:
    return RunConfig(
        app="timeseries",
        model=model,
        model_args=MODELS[model].config(),
        data=str(path),
        data_args=ForecastDataConfig(seq_len=SEQ, label_len=7, pred_len=PRED, train_fraction=0.5, test_fraction=0.25),
        task_args=ForecastTaskConfig(loss=loss, calibrate=calibrate, **task),
        kind="forecast",
        trainer=TrainerConfig(max_epochs=2, threads=1, progress=False),
    )


def build(run: RunConfig) -> tuple[ForecastTask, DataBundle]:
    bundle = ForecastTask.load_data(run)
    torch.manual_seed(0)
    task = ForecastTask(run, bundle.state).eval()
    with torch.no_grad():
        task.after_training(lambda split: trainer._batches(task, bundle, split, run))
    return task, bundle


@pytest.fixture
def table(tmp_path: Path) -> Path:
    return write(tmp_path / "table.csv", values())


# -- options ----------------------------------------------------------------------------------------------------------


def test_levels_are_completed_by_the_coverage_and_the_median() -> None:
    task = ForecastTaskConfig(quantiles=[0.2, 0.8], coverage=0.95)
    assert task.levels == (0.025, 0.2, 0.5, 0.8, 0.975)
    assert task.pair == 0
    assert ForecastTaskConfig().levels == tuple(LEVELS)
    assert ForecastTaskConfig(coverage=0.5).pair == 2
    assert not ForecastTaskConfig().intervals


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--task_args.coverage", "1.5"], r"task_args: coverage is 1\.5; it must lie between 0 and 1"),
        (["--task_args.quantiles", "[0.1, 0.5]"], r"quantile 0\.1 needs 0\.9 beside it"),
        (["--task_args.quantiles", "[0.0, 1.0]"], r"quantile 0\.0 does not lie between 0 and 1"),
        (["--task_args.loss", "pinbal"], "--task_args.loss takes one of"),
        (["--model", "naive", "--task_args.loss", "quantile"], "naive learns nothing, so it has no quantiles"),
        (
            ["--task_args.calibrate", "adaptive", "--trainer.devices", "2"],
            "adaptive calibration follows the forecasts in order of time",
        ),
        (
            ["--task_args.calibrate", "conformal", "--data_args.train_fraction", "0.757", "--preset", "none"],
            r"needs 9 validation windows to be calibrated and there are \d;",
        ),
        (
            ["--task_args.calibrate", "conformal", "--task_args.coverage", "0.999"],
            r"from quantile 0\.0005 to 0\.9995 needs 999 validation windows to be calibrated and there are",
        ),
    ],
)
def test_what_cannot_be_is_refused_in_a_sentence(words: list[str], message: str, tmp_path: Path) -> None:
    words = words if "--model" in words else ["--model", "dlinear", *words]

    def start() -> None:
        run = options.resolve(APP, options.split([*words, "--data", "co2", "--runs", str(tmp_path)]))
        trainer.build_task(APP, run, trainer.load_data(APP, run).state)

    with pytest.raises(UserError, match=message):
        start()


# -- losses -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("loss", ["mse", "mae", "huber", "quantile"])
def test_losses_against_the_definitions(table: Path, loss: str) -> None:
    task, bundle = build(config(table, loss=loss))
    batch = bundle.train.__getitems__(range(20))
    target = task.target(batch).detach()
    output = task._output(batch).detach()
    error = target - task.forward_batch(batch).detach()
    expected = {
        "mse": lambda: error.square().mean(),
        "mae": lambda: error.abs().mean(),
        "huber": lambda: torch.where(error.abs() < 1, error.square() / 2, error.abs() - 0.5).mean(),
        "quantile": lambda: torch.stack(
            [
                2
                * torch.where(
                    target >= output[..., k], q * (target - output[..., k]), (1 - q) * (output[..., k] - target)
                )
                for k, q in enumerate(LEVELS)
            ]
        ).mean(),
    }[loss]()
    assert task.training_loss(batch).item() == pytest.approx(expected.item(), rel=1e-5)


def test_nothing_changes_where_no_intervals_are_asked_for(table: Path) -> None:
    run = config(table)
    plain, bundle = build(dataclasses.replace(run, task_args=None, kind=None))
    task, _ = build(run)
    assert list(task.state_dict()) == list(plain.state_dict())
    assert all(name.startswith("network.") for name in task.state_dict())
    figures = evaluate_split(task, bundle, "test", run)
    assert figures == evaluate_split(plain, bundle, "test", run)
    assert set(figures) == {*metrics.NAMES, "windows"}
    assert "calibrated_to" not in bundle.state


def test_the_head_leaves_the_models_own_start_as_it_is(table: Path) -> None:
    run = config(table, loss="quantile")
    bundle = ForecastTask.load_data(run)
    ours = trainer.build_task(APP, run, bundle.state).state_dict()
    plain = trainer.build_task(APP, config(table), bundle.state).state_dict()
    assert all(torch.equal(value, ours[name.replace("network.", "network.net.")]) for name, value in plain.items())


# -- scores -----------------------------------------------------------------------------------------------------------


def test_scores_against_numpy() -> None:
    rng = np.random.default_rng(0)
    q = np.sort(rng.normal(size=(40, 5, 2, 7)), axis=-1)
    y, known = rng.normal(size=(40, 5, 2)), rng.uniform(size=(40, 5, 2)) > 0.2
    std, group = rng.uniform(1, 3, size=(2, 2)), rng.integers(0, 2, size=40)
    parts = []
    for part in (slice(0, 13), slice(13, 40)):
        scores = metrics.IntervalScores(5, torch.from_numpy(std), LEVELS, 1)
        scores.update("", *(torch.from_numpy(v[part]) for v in (q, y, group, known)))
        parts.append(scores.state())
    sums = {name: parts[0][name] + parts[1][name] for name in parts[0]}
    blank = {name: torch.ones(5) for name in (*metrics.NAMES, "count", "mase_count")} | {"windows": torch.ones(1)}
    figures = metrics.final({**blank, **sums})
    low, high = q[..., 1], q[..., 5]
    inside = (y >= low) & (y <= high)
    outside = np.maximum(low - y, 0) + np.maximum(y - high, 0)
    error = y[..., None] - q
    pinball = 2 * np.maximum(np.array(LEVELS) * error, (np.array(LEVELS) - 1) * error).mean(axis=-1)
    expected = {
        "coverage": inside[known].mean(),
        "width": (high - low)[known].mean(),
        "width_original": ((high - low) * std[group][:, None])[known].mean(),
        "interval_score": (high - low + 2 / 0.2 * outside)[known].mean(),
        "pinball": pinball[known].mean(),
        "coverage_step_1": inside[:, 0][known[:, 0]].mean(),
        "width_step_5": (high - low)[:, 4][known[:, 4]].mean(),
    }
    for name, value in expected.items():
        assert figures[name] == pytest.approx(value, rel=1e-12), name
    below = [(y <= q[..., k])[known].mean() for k in range(7)]
    np.testing.assert_allclose(metrics.reliability(sums), below, rtol=1e-12)
    np.testing.assert_allclose(metrics.interval_curve(sums, "covered")[2], inside[:, 2][known[:, 2]].mean(), rtol=1e-12)


@pytest.mark.parametrize("loss", ["mse", "quantile"])
@pytest.mark.parametrize("calibrate", ["conformal", "adaptive"])
def test_the_same_figures_for_every_batch_size(table: Path, loss: str, calibrate: str) -> None:
    task, bundle = build(config(table, loss=loss, calibrate=calibrate))
    seen = []
    for size in (1, 32, 512):
        task.config.trainer.eval_batch_size = size
        seen.append(evaluate_split(task, bundle, "test", task.config))
    for figures in seen[1:]:
        assert figures == pytest.approx(seen[0], rel=1e-5)


def test_the_validation_split_is_covered_as_it_was_calibrated(table: Path) -> None:
    """Of n windows, ceil((n + 1) 0.9) lie inside at every step of every column."""
    task, bundle = build(config(table, calibrate="conformal"))
    n = len(bundle.val)
    figures = evaluate_split(task, bundle, "val", task.config)
    assert figures["coverage"] == pytest.approx(np.ceil((n + 1) * 0.9) / n, abs=1e-9)
    assert figures["coverage_step_1"] == figures["coverage"]


def test_adaptation_follows_a_change_of_the_noise(table: Path) -> None:
    task, bundle = build(config(table, model="seasonal_naive", calibrate="adaptive"))
    figures = evaluate_split(task, bundle, "test", task.config)
    assert figures["coverage_conformal"] < 0.83
    assert 0.86 < figures["coverage"] < 0.92


def test_what_comes_later_changes_no_interval_before_it(tmp_path: Path) -> None:
    """Other values in the last 20 rows: intervals of forecasts made before them stay bit for bit."""
    ours, theirs = values(), values()
    theirs[-20:] = 100 * np.random.default_rng(5).normal(size=(20, 2))
    found = []
    for name, data in (("ours", ours), ("theirs", theirs)):
        task, bundle = build(config(write(tmp_path / f"{name}.csv", data), loss="quantile", calibrate="adaptive"))
        assert found == [] or bundle.state == found[0][0]
        factors = task._factors(bundle.test, set(range(len(bundle.test))))
        found.append((bundle.state, torch.stack([factors[i] for i in range(len(bundle.test))])))
    same = (found[0][1] == found[1][1]).flatten(1).all(dim=1)
    # The forecast made at row t (t rows known) is of window t - SEQ of the series; the change begins at row 480.
    first = ROWS - 20 - (ROWS - len(same) - PRED + 1) + 1
    assert same[:first].all()
    assert not same[first + 1 :].any()


# -- baselines --------------------------------------------------------------------------------------------------------


def test_baselines_have_intervals_too(table: Path) -> None:
    run = config(table, calibrate="conformal")
    bundle = ForecastTask.load_data(run)
    rows = {row["model"]: row for row in ForecastTask.baselines(run, bundle)}
    assert all({"coverage", "width", "pinball", "interval_score"} <= set(row) for row in rows.values())
    # By hand: errors of repeating the season, at the last step of column a.
    season = next(row for row in ForecastTask._simple(run, bundle) if row.name == "seasonal_naive")
    train, val = (split.__getitems__(range(len(split))) for split in (bundle.train, bundle.val))
    errors = [(batch["y"][:, -1, 0] - batch["x"][:, -7:][:, 6, 0]).double().numpy() for batch in (train, val)]
    offsets = residual_quantiles(season, bundle.train, LEVELS)
    np.testing.assert_allclose(
        offsets[-1, 0, [0, 3, 6]], [np.quantile(errors[0], 0.05), 0, np.quantile(errors[0], 0.95)]
    )
    score = np.where(errors[1] < 0, errors[1] / offsets[-1, 0, 0].item(), errors[1] / offsets[-1, 0, 6].item())
    factor = np.sort(score)[int(np.ceil((len(score) + 1) * 0.9)) - 1]
    width = (offsets[-1, 0, 6] - offsets[-1, 0, 0]).item() * factor
    sums = ForecastTask.simple_intervals(run, bundle)["seasonal_naive"]
    other = (offsets[-1, 1, 6] - offsets[-1, 1, 0]).item()
    assert metrics.interval_curve(sums, "width")[-1] * 2 == pytest.approx(
        width + other * _factor(bundle, offsets), rel=1e-6
    )


def _factor(bundle: DataBundle, offsets: torch.Tensor) -> float:
    val = bundle.val.__getitems__(range(len(bundle.val)))
    error = (val["y"][:, -1, 1] - val["x"][:, -1, 1]).double().numpy()
    score = np.where(error < 0, error / offsets[-1, 1, 0].item(), error / offsets[-1, 1, 6].item())
    return float(np.sort(score)[int(np.ceil((len(score) + 1) * 0.9)) - 1])


def test_a_biased_baseline_keeps_both_ends(tmp_path: Path) -> None:
    """A straight line: repeating the season errs upwards only."""
    line = np.stack([np.arange(ROWS) / 10.0, np.arange(ROWS) / 5.0], axis=1)
    run = config(write(tmp_path / "line.csv", line), calibrate="conformal")
    bundle = ForecastTask.load_data(run)
    row = next(row for row in ForecastTask._simple(run, bundle) if row.name == "seasonal_naive")
    offsets = residual_quantiles(row, bundle.train, LEVELS)
    assert (offsets[..., 0] < 0).all()
    torch.testing.assert_close(-10 * offsets[..., 0], offsets[..., -1])


# -- runs and files ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run with learnt quantiles, calibrated and adapting."""
    folder = tmp_path_factory.mktemp("intervals")
    path = write(folder / "table.csv", values())
    whole = dataclasses.replace(config(path, loss="quantile", calibrate="adaptive"), runs=str(folder / "runs"))
    return trainer.train(APP, whole)


def test_a_run_has_it_all(run: Path) -> None:
    results = json.loads((run / "metrics.json").read_text(encoding="utf-8"))
    figures = results["splits"]["test"]
    assert {"coverage", "coverage_conformal", "coverage_raw", "width", "width_original", "pinball"} <= set(figures)
    assert {"coverage_step_1", "coverage_step_4", f"coverage_step_{PRED}"} <= set(figures)
    assert "along the test windows by targets already past" in results["protocol"]
    assert all("coverage" in row for row in results["baselines"])
    assert {"coverage.png", "reliability.png"} <= {path.name for path in (run / "plots").iterdir()}
    assert trainer.evaluate(APP, run)["metrics"] == pytest.approx(figures, rel=1e-6)
    saved = checkpoint.load(run / "checkpoints" / "best").weights
    assert saved["calibration.fitted"]
    assert saved["calibration.factors"].shape == (PRED, 2, 3)


def test_evaluation_may_do_without_adaptation(run: Path) -> None:
    adaptive = trainer.evaluate(APP, run)["metrics"]
    plain = trainer.evaluate(APP, run, overrides={"task_args.calibrate": "conformal"})["metrics"]
    assert plain["coverage"] == adaptive["coverage_conformal"]
    assert "coverage_conformal" not in plain


def test_forecasts_have_the_columns_of_their_intervals(run: Path, tmp_path: Path) -> None:
    write(tmp_path / "new.csv", values())
    written = trainer.predict(APP, run, [tmp_path / "new.csv"], tmp_path / "out")
    frame = pd.read_csv(written[0])
    of = ["{}", "{}_lower", "{}_upper", "{}_q10", "{}_q25", "{}_q75", "{}_q90"]
    assert list(frame.columns) == ["date", *(name.format(c) for c in "ab" for name in of)]
    for column in "ab":
        ordered = [f"{column}{tail}" for tail in ("_lower", "_q10", "_q25", "", "_q75", "_q90", "_upper")]
        assert (frame[ordered].diff(axis=1).iloc[:, 1:] >= 0).all().all()
    assert written[1].read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


def test_a_forecast_of_the_past_has_the_interval_that_the_test_gave_it(run: Path, tmp_path: Path) -> None:
    """A file that ends where a test window's look-back does: adaptation has seen the same targets."""
    task, whole = trainer.load_task(APP, run)
    assert isinstance(task, ForecastTask)
    bundle = trainer.load_data(APP, whole, task.data_state)
    number = len(bundle.test) - 10
    factors = task._factors(bundle.test, {number})[number]
    with torch.no_grad():
        quantiles = task._output(bundle.test.__getitems__([number]))[0].double()
    mean, std = task.scaler.mean[0], task.scaler.std[0]
    expected = widen(quantiles, factors)[..., 0].numpy() * std + mean
    known = ROWS - PRED - (len(bundle.test) - 1 - number)
    write(tmp_path / "new.csv", values()[:known])
    frame = pd.read_csv(trainer.predict(APP, run, [tmp_path / "new.csv"], tmp_path / "out")[0])
    # The first forecast that adaptation follows is the first whose targets are all new, there as here.
    np.testing.assert_allclose(frame[["a_lower", "b_lower"]], expected, rtol=1e-4, atol=1e-4)


def test_a_file_of_the_training_years_moves_nothing(run: Path, tmp_path: Path) -> None:
    task, _ = trainer.load_task(APP, run)
    assert isinstance(task, ForecastTask)
    write(tmp_path / "old.csv", values()[:200])
    trainer.predict(APP, run, [tmp_path / "old.csv"], tmp_path / "out")
    from attn_timeseries.predict import _factors

    table = task.read_input(tmp_path / "old.csv")
    assert torch.equal(_factors(task, table.series[0], table, torch.float32), task.calibration.tracker().next())


def test_a_column_that_has_the_name_of_an_interval(tmp_path: Path) -> None:
    frame = pd.read_csv(write(tmp_path / "x.csv", values())).rename(columns={"b": "a_lower"})
    frame.to_csv(tmp_path / "x.csv", index=False)
    task, _ = build(config(tmp_path / "x.csv", calibrate="conformal"))
    with pytest.raises(UserError, match="the interval of column 'a' would have the name of column 'a_lower'"):
        task.predict_files([tmp_path / "x.csv"], tmp_path / "out", {})
    assert list((tmp_path / "out").iterdir()) == []


def test_a_rule_gets_conformal_intervals(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write(tmp_path / "x.csv", values())
    words = ["train", "--model", "seasonal_naive", "--data", str(path), "--task_args.calibrate", "conformal"]
    words += ["--data_args.seq_len", "14", "--data_args.pred_len", "7", "--data_args.label_len", "7"]
    assert main([*words, "--runs", str(tmp_path / "runs"), "--trainer.progress", "false"]) == 0
    folder = Path(capsys.readouterr().out.split()[-1])
    assert main(["predict", str(folder), str(path), "--output", str(tmp_path / "out")]) == 0
    frame = pd.read_csv(tmp_path / "out" / "x_forecast.csv")
    assert list(frame.columns) == ["date", "a", "a_lower", "a_upper", "b", "b_lower", "b_upper"]
    np.testing.assert_allclose(frame["a_upper"] - frame["a"], frame["a"] - frame["a_lower"], rtol=1e-6)
    checkpoint.load(folder / "checkpoints" / "best")


def test_gaps_are_never_scored_or_learnt_from(tmp_path: Path) -> None:
    data = values()
    data[400:404, 0] = np.nan
    data[300:303, 1] = np.nan
    task, bundle = build(config(write(tmp_path / "x.csv", data), loss="quantile", calibrate="adaptive"))
    figures = evaluate_split(task, bundle, "test", task.config)
    assert all(np.isfinite(value) for value in figures.values())
    sums = task.metric_state("test")
    assert sums["interval//known"].sum() == bundle.test.__getitems__(range(len(bundle.test)))["observed"].sum()
