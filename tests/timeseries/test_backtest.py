"""A backtest is a loop of trainings and forecasts on files that end at each origin; what follows changes nothing."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from attn_shared import trainer
from attn_shared.config import RunConfig, TrainerConfig
from attn_shared.errors import UserError
from attn_timeseries.backtest import Settings, backtest
from attn_timeseries.cli import APP, main
from attn_timeseries.config import MODELS, ForecastTaskConfig
from attn_timeseries.data.cards import ForecastDataConfig

ROWS, L, H = 240, 24, 6


def series(seed: int = 0, rows: int = ROWS) -> pd.DataFrame:
    rng = np.random.default_rng(seed)
    t = np.arange(rows)
    frame = pd.DataFrame({"date": pd.date_range("2024-01-01", periods=rows, freq="h")})
    for c, name in enumerate("ab"):
        frame[name] = (5 * c + np.sin(2 * np.pi * t / 24 + c) + rng.normal(scale=0.3, size=rows).cumsum() / 5).round(6)
    return frame


def config(path: Path, model: str = "dlinear", task: ForecastTaskConfig | None = None, **args: Any) -> RunConfig:
    return RunConfig(
        app="timeseries",
        model=model,
        model_args=MODELS[model].config(),
        data=str(path),
        data_args=ForecastDataConfig(**{"seq_len": L, "label_len": 12, "pred_len": H, **args}),
        task_args=task or ForecastTaskConfig(),
        trainer=TrainerConfig(max_epochs=2, accelerator="cpu", progress=False, threads=1),
        kind="forecast",
    )


def write(folder: Path, frame: pd.DataFrame, name: str = "x.csv") -> Path:
    frame.to_csv(folder / name, index=False)
    return folder / name


@pytest.mark.parametrize(("refit", "window"), [(1, "expanding"), (2, "sliding"), (0, "expanding")])
def test_equals_a_loop_by_hand(refit: int, window: str, tmp_path: Path) -> None:
    """For each origin: a file that ends there, `train` on it, `predict` from it; nothing of the backtest is used."""
    frame = series()
    run = config(write(tmp_path, frame))
    settings = Settings(folds=3, step=9, refit=refit, window=window, train_rows=150 if window == "sliding" else None)
    result = backtest(run, settings)

    folder, expected, errors = None, [], []
    for number, at in enumerate((ROWS - H - 18, ROWS - H - 9, ROWS - H)):
        if folder is None or (refit and number % refit == 0):
            # As the test part, which training never reads, rows without any meaning.
            known = frame.iloc[at - 150 : at] if window == "sliding" else frame.iloc[:at]
            rows = len(known)
            junk = known.iloc[:H].assign(date=pd.date_range(known["date"].iloc[-1], periods=H + 1, freq="h")[1:])
            train = int(rows * (1 - 24 / 192))  # 70 % of 240 rows for training, 20 % for test: 168, 24 and 48
            args = {"train_fraction": (train + 0.5) / (rows + H), "test_fraction": (H + 0.5) / (rows + H)}
            path = write(tmp_path, pd.concat([known, junk]), "known.csv")
            alone = dataclasses.replace(config(path, **args), runs=str(tmp_path / "runs"))
            folder = trainer.train(APP, alone)
        history = write(tmp_path, frame.iloc[:at], "history.csv")
        (csv, _) = trainer.predict(APP, folder, [history], tmp_path / "out")
        forecast, truth = pd.read_csv(csv)[["a", "b"]].to_numpy(), frame.iloc[at : at + H][["a", "b"]].to_numpy()
        expected.append(forecast)
        errors.append(np.abs(forecast - truth).mean())

    got = result.forecasts["dlinear"].to_numpy().reshape(3, H, 2)
    np.testing.assert_allclose(got, np.stack(expected), rtol=1e-6)
    own = result.origins[result.origins["model"] == "dlinear"]
    np.testing.assert_allclose(own["mae_original"], errors, rtol=1e-6)
    assert result.overall["dlinear"]["mae_original"] == pytest.approx(np.mean(errors), rel=1e-6)
    assert len(result.fits) == {1: 3, 2: 2, 0: 1}[refit]
    assert own["fit"].tolist() == {1: [1, 2, 3], 2: [1, 1, 2], 0: [1, 1, 1]}[refit]
    # The simple rows: the last value, and the last day, of the rows before each origin.
    naive = result.forecasts["naive"].to_numpy().reshape(3, H, 2)
    for i, at in enumerate((ROWS - H - 18, ROWS - H - 9, ROWS - H)):
        values = frame[["a", "b"]].to_numpy()
        np.testing.assert_allclose(naive[i], np.repeat(values[at - 1 : at], H, axis=0), rtol=1e-6, atol=1e-6)
        day = result.forecasts["seasonal_naive"].to_numpy().reshape(3, H, 2)[i]
        np.testing.assert_allclose(day, values[at - 24 : at - 24 + H], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("loss", ["mse", "quantile"])
def test_the_future_changes_nothing_before_it(loss: str, tmp_path: Path) -> None:
    """Bit for bit: forecasts, intervals and fits of every origin up to the first altered row; and it is not blind."""
    frame, other = series(), series()
    at = ROWS - H - 9  # the second of three origins
    other.loc[at:, ["a", "b"]] = 1e3 * np.random.default_rng(9).normal(size=(ROWS - at, 2))
    task = ForecastTaskConfig(loss=loss, quantiles=[0.1, 0.5, 0.9], calibrate="conformal", coverage=0.8)  # type: ignore[arg-type]
    results = [
        backtest(config(write(tmp_path, one, f"{i}.csv"), task=task), Settings(folds=3, step=9))
        for i, one in enumerate((frame, other))
    ]
    columns = ["dlinear", "naive", "seasonal_naive", "dlinear (closed form)", "lower", "upper"]
    tables = [result.forecasts[columns].to_numpy().reshape(3, -1) for result in results]
    assert tables[0][:2].tobytes() == tables[1][:2].tobytes()
    assert not np.array_equal(tables[0][2], tables[1][2])
    first = [result.origins.iloc[:4].drop(columns="origin").to_csv() for result in results]
    assert first[0] == first[1]


def test_known_covariates_reach_over_the_origin_and_past_ones_do_not(tmp_path: Path) -> None:
    frame = series()
    frame["price"], frame["sensor"] = frame["a"].shift(-1, fill_value=0.0), frame["a"] * 2
    columns = {"columns": ["a"], "known_covariates": ["price"], "past_covariates": ["sensor"]}
    at = ROWS - H
    forecasts = []
    for name, column in (("same", None), ("known", "price"), ("past", "sensor")):
        changed = frame.copy()
        if column is not None:
            changed.loc[at:, column] = 50.0
        run = config(write(tmp_path, changed, f"{name}.csv"), **columns)
        forecasts.append(backtest(run, Settings(folds=2, step=12)).forecasts["dlinear"].to_numpy())
    same, known, past = forecasts
    assert past.tobytes() == same.tobytes()
    assert known[:H].tobytes() == same[:H].tobytes()
    assert not np.allclose(known[H:], same[H:])


def test_several_series_of_different_lengths(tmp_path: Path) -> None:
    """A series takes part at the origins where it has rows before and after; gaps in the truth are not scored."""
    long, short = series(1), series(2).iloc[ROWS - 40 :]
    long.loc[ROWS - 2, "a"] = np.nan
    frame = pd.concat([long.assign(shop="long"), short.assign(shop="short")])
    run = config(write(tmp_path, frame), model="naive")
    result = backtest(run, Settings(folds=4, step=8))
    own = result.origins[result.origins["model"] == "naive"]
    assert own["series"].tolist() == [1, 1, 2, 2]
    last = result.forecasts[(result.forecasts["origin"] == own["origin"].iloc[-1])]
    assert last["truth"].isna().sum() == 1
    error = (last["naive"] - last["truth"]).abs()
    assert own["mae_original"].iloc[-1] == pytest.approx(error.mean(), rel=1e-6)


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write(tmp_path, series())
    argv = ["backtest", "--model", "naive", "--data", str(path), "--data_args.seq_len", "24", "--data_args.label_len",
            "0", "--horizon", "6", "--folds", "3", "--trainer.progress", "false"]  # fmt: skip
    assert main([*argv, "--output", str(tmp_path / "out")]) == 0
    told = capsys.readouterr().out
    assert "3 origins 6 steps apart" in told
    record = json.loads((tmp_path / "out" / "backtest.json").read_text(encoding="utf-8"))
    assert len(record["origins"]) == 9
    assert record["overall"]["naive"]["windows"] == 3
    assert {p.name for p in (tmp_path / "out").iterdir()} == {
        "backtest.json", "config.yaml", "forecasts.csv", "origins.csv", "plots", "report.html"
    }  # fmt: skip
    forecasts = pd.read_csv(tmp_path / "out" / "forecasts.csv")
    assert len(forecasts) == 3 * 6 * 2
    assert list(forecasts.columns[:6]) == ["origin", "series", "column", "step", "time", "truth"]
    report = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    assert report.count("<figure>") == 3

    # By default: every origin of the test part, a horizon apart.
    assert main([*argv[:-4], "--trainer.progress", "false", "--runs", str(tmp_path / "runs")]) == 0
    assert "8 origins 6 steps apart" in capsys.readouterr().out
    assert list((tmp_path / "runs" / "timeseries" / "backtest-naive-x-own").iterdir())


def test_mistakes_are_a_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write(tmp_path, series())
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    base = ["--model", "naive", "--data", str(path), "--data_args.seq_len", "24", "--data_args.label_len", "0"]
    for argv, part in (
        ([*base, "--folds", "0"], "--folds takes a whole number from 1 on, got 0"),
        ([*base, "--horizon", "6", "--folds", "99"], "and 35 would fit in its 240 rows"),
        ([*base, "--window", "shrinking"], "--window takes expanding or sliding"),
        ([*base, "--train_rows", "9"], "--train_rows is for --window sliding"),
        ([*base, "--horizon", "6", "--window", "sliding", "--train_rows", "9"], "is too short"),
        ([*base, "--horizon", "6", "--data_args.train_fraction", "0.8"], "leave none"),
        ([*base, "--horizon", "6", "--output", str(tmp_path / "full")], "is there already"),
        ([*base, "--fold", "3"], "did you mean --folds"),
        (["x.csv"], "did you mean --data x.csv"),
    ):
        assert main(["backtest", *argv]) == 2, argv
        error = capsys.readouterr().err
        assert part in error, error
        assert len(error.strip().splitlines()) == 1, error
    assert main(["backtest", "--help"]) == 0
    assert "--refit" in capsys.readouterr().out
    with pytest.raises(UserError, match="only forecasts can be backtested"):
        backtest(dataclasses.replace(config(path), data="japanese_vowels", kind=None), Settings())
