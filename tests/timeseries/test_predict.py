"""Forecasts of users' files: times continued, units, columns, refusals, whole files only."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from attn_shared.config import RunConfig
from attn_shared.errors import UserError
from attn_timeseries.config import MODELS
from attn_timeseries.data.cards import ForecastDataConfig
from attn_timeseries.predict import write_atomically
from attn_timeseries.task import ForecastTask

ARGS: dict[str, Any] = {"seq_len": 14, "label_len": 7, "pred_len": 7}


def frame(freq: str = "D", rows: int = 120, start: str = "2024-01-01", **columns: Any) -> pd.DataFrame:
    """a repeats 0 … 6, b repeats 0, 10 … 60: a seasonal naive forecast is known exactly."""
    steps = np.arange(rows) % 7
    values = columns or {"a": 1.0 * steps, "b": 10.0 * steps}
    return pd.DataFrame({"date": pd.date_range(start, periods=rows, freq=freq), **values})


def trained(path: Path, model: str = "seasonal_naive", **args: Any) -> ForecastTask:
    run = RunConfig(
        app="timeseries",
        model=model,
        model_args=MODELS[model].config(),
        data=str(path),
        data_args=ForecastDataConfig(**{**ARGS, **args}),
    )
    return ForecastTask(run, ForecastTask.load_data(run).state)


@pytest.fixture
def task(tmp_path: Path) -> ForecastTask:
    frame().to_csv(tmp_path / "train.csv", index=False)
    return trained(tmp_path / "train.csv")


def predict(task: ForecastTask, data: pd.DataFrame, folder: Path, name: str = "new.csv") -> pd.DataFrame:
    data.to_csv(folder / name, index=False)
    written = task.predict_files([folder / name], folder / "out", {})
    assert [path.name for path in written] == ["new_forecast.csv", "new_forecast.png"]
    assert written[1].read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    return pd.read_csv(written[0])


def test_times_go_on_and_values_are_in_the_files_units(task: ForecastTask, tmp_path: Path) -> None:
    out = predict(task, frame(rows=21), tmp_path)
    assert list(out.columns) == ["date", "a", "b"]
    assert out["date"].tolist() == [f"2024-01-{day}" for day in range(22, 29)]
    np.testing.assert_allclose(out["a"], np.arange(7.0), atol=1e-5)
    np.testing.assert_allclose(out["b"], 10 * np.arange(7.0), atol=1e-4)


@pytest.mark.parametrize(
    ("freq", "start", "following"),
    [
        ("h", "2024-02-28", "2024-02-29 06:00:00"),
        ("15min", "2024-01-01", "2024-01-01 07:30:00"),
        ("B", "2024-01-01", "2024-02-12"),
        ("MS", "2022-01-01", "2024-07-01"),
        ("ME", "2022-01-31", "2024-07-31"),
        ("QS", "2000-01-01", "2007-07-01"),
        ("W-SUN", "2024-01-07", "2024-08-04"),
        ("YS", "1990-01-01", "2020-01-01"),
    ],
)
def test_every_frequency_is_continued(tmp_path: Path, freq: str, start: str, following: str) -> None:
    frame(freq, start=start).to_csv(tmp_path / "train.csv", index=False)
    out = predict(trained(tmp_path / "train.csv", "naive"), frame(freq, rows=30, start=start), tmp_path)
    assert out["date"][0] == following
    assert list(pd.to_datetime(out["date"])) == list(pd.date_range(following, periods=7, freq=freq))


def test_columns_may_be_reordered_and_others_stand_between(task: ForecastTask, tmp_path: Path) -> None:
    data = frame(rows=21)
    data["city"] = "Oslo"
    out = predict(task, data[["b", "city", "date", "a"]], tmp_path)
    assert list(out.columns) == ["date", "city", "a", "b"]
    np.testing.assert_allclose(out["b"], 10 * np.arange(7.0), atol=1e-4)


def test_missing_column_is_named(task: ForecastTask, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"new\.csv: unknown column 'b'.*trained on columns 'a', 'b'"):
        predict(task, frame(rows=21)[["date", "a"]], tmp_path)


def test_a_column_without_a_number_is_named(task: ForecastTask, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="column 'b' holds no number at all, and the model forecasts it from its past"):
        predict(task, frame(rows=21).assign(b=None), tmp_path)


def test_too_short_history(task: ForecastTask, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"new\.csv: the history has 10 steps and the model looks back 14"):
        predict(task, frame(rows=10), tmp_path)
    assert list((tmp_path / "out").iterdir()) == []


def test_another_frequency(task: ForecastTask, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"new\.csv has steps of 'h' and the model was trained on steps of 'D'"):
        predict(task, frame("h", rows=30), tmp_path)


def test_series_of_a_long_table_keep_their_names(tmp_path: Path) -> None:
    parts = [frame(place=name, v=offset + np.arange(120) % 7) for name, offset in (("north", 0.0), ("south", 100.0))]
    pd.concat(parts).to_csv(tmp_path / "train.csv", index=False)
    task = trained(tmp_path / "train.csv")
    new = pd.concat([part.assign(place=name).head(21) for name, part in zip(("east", "west"), parts)])
    out = predict(task, new, tmp_path)
    assert list(out.columns) == ["date", "place", "v"]
    assert out["place"].tolist() == ["east"] * 7 + ["west"] * 7
    np.testing.assert_allclose(out["v"], np.concatenate([np.arange(7.0), 100 + np.arange(7.0)]), atol=1e-3)


def test_a_scaler_a_series_knows_only_its_own(tmp_path: Path) -> None:
    parts = [frame(place=name, v=offset + np.arange(120) % 7) for name, offset in (("north", 0.0), ("south", 100.0))]
    pd.concat(parts).to_csv(tmp_path / "train.csv", index=False)
    task = trained(tmp_path / "train.csv", scaler="series")
    out = predict(task, parts[1].head(21), tmp_path)
    np.testing.assert_allclose(out["v"], 100 + np.arange(7.0), atol=1e-3)
    with pytest.raises(UserError, match="series 'east' was not in training"):
        predict(task, parts[1].assign(place="east").head(21), tmp_path)


def test_a_gap_at_the_end_repeats_the_last_value(tmp_path: Path) -> None:
    frame(a=np.arange(120.0)).to_csv(tmp_path / "train.csv", index=False)
    data = frame(rows=30, a=np.arange(30.0))
    data.loc[28:, "a"] = np.nan
    out = predict(trained(tmp_path / "train.csv", "naive"), data, tmp_path)
    np.testing.assert_allclose(out["a"], 27.0, atol=1e-4)
    assert out["date"][0] == "2024-01-31"


def test_time_zone_is_kept(tmp_path: Path) -> None:
    data = frame("h")
    data["date"] = data["date"].dt.strftime("%Y-%m-%dT%H:%M:%S+02:00")
    data.to_csv(tmp_path / "train.csv", index=False)
    out = predict(trained(tmp_path / "train.csv"), data.head(24), tmp_path)
    assert out["date"][0] == "2024-01-02 00:00:00+02:00"


def test_parquet_in(task: ForecastTask, tmp_path: Path) -> None:
    frame(rows=21).to_parquet(tmp_path / "p.parquet")
    written = task.predict_files([tmp_path / "p.parquet"], tmp_path / "out", {})
    np.testing.assert_allclose(pd.read_csv(written[0])["a"], np.arange(7.0), atol=1e-5)


def test_what_was_written_before_a_bad_file_stays_whole(task: ForecastTask, tmp_path: Path) -> None:
    frame(rows=21).to_csv(tmp_path / "good.csv", index=False)
    (tmp_path / "bad.csv").write_text("date,a,b\n2024-01-01,1,x\n")
    with pytest.raises(UserError, match=r"bad\.csv"):
        task.predict_files([tmp_path / "good.csv", tmp_path / "bad.csv"], tmp_path / "out", {})
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["good_forecast.csv", "good_forecast.png"]
    assert len(pd.read_csv(tmp_path / "out" / "good_forecast.csv")) == 7


def test_two_inputs_of_one_name(task: ForecastTask, tmp_path: Path) -> None:
    for folder in ("x", "y"):
        (tmp_path / folder).mkdir()
        frame(rows=21).to_csv(tmp_path / folder / "new.csv", index=False)
    with pytest.raises(UserError, match="two inputs are called 'new'"):
        task.predict_files([tmp_path / "x" / "new.csv", tmp_path / "y" / "new.csv"], tmp_path / "out", {})


def test_a_failing_write_leaves_the_old_file(tmp_path: Path) -> None:
    target = tmp_path / "f.csv"
    target.write_text("old")

    def fail(path: Path) -> None:
        path.write_text("half", encoding="utf-8")
        raise RuntimeError

    with pytest.raises(RuntimeError):
        write_atomically(target, fail)
    assert target.read_text(encoding="utf-8") == "old"
    assert list(tmp_path.iterdir()) == [target]


def test_the_forecast_of_the_last_window_is_that_of_the_test_split(tmp_path: Path) -> None:
    """The same look-back gives the same forecast through the file and through the windows."""
    rng = np.random.default_rng(0)
    data = frame(rows=200, a=rng.normal(size=200).cumsum().round(4), b=rng.normal(size=200).round(4))
    data.to_csv(tmp_path / "train.csv", index=False)
    task = trained(tmp_path / "train.csv", "dlinear").eval()
    bundle = ForecastTask.load_data(task.config)
    last = bundle.test[len(bundle.test) - 1]
    scaled = task.forward_batch({name: value[None] for name, value in last.items()})[0].detach().double().numpy()
    mean, std = (np.array(bundle.state["scaler"][name][0]) for name in ("mean", "std"))
    out = predict(task, data.head(193), tmp_path)
    np.testing.assert_allclose(out[["a", "b"]].to_numpy(), scaled * std + mean, rtol=1e-5, atol=1e-5)
