"""Windows, borders, scalers and calendar features against independent arithmetic."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from attn_shared.config import RunConfig
from attn_shared.errors import UserError
from attn_timeseries.config import NaiveConfig
from attn_timeseries.data.benchmarks import borders
from attn_timeseries.data.calendar import calendar_features, feature_names, season_of
from attn_timeseries.data.cards import DATASETS, ForecastDataConfig
from attn_timeseries.data.sources import read_source, source_path
from attn_timeseries.data.windows import Windows, fill_between, fill_forward, next_observed
from attn_timeseries.task import ForecastTask

ETT = Path(os.environ.get("ATTN_DATA", "data")) / "timeseries" / "ETTh1.csv"
needs_data = [pytest.mark.data, pytest.mark.skipif(not ETT.is_file(), reason=f"no {ETT}: set ATTN_DATA")]


def config(data: str | Path, **args: object) -> RunConfig:
    return RunConfig(
        app="timeseries",
        model="naive",
        model_args=NaiveConfig(),
        data=str(data),
        data_args=ForecastDataConfig(**args),  # type: ignore[arg-type]
    )


def write(path: Path, values: np.ndarray, freq: str = "h", start: str = "2024-01-01") -> Path:
    frame = pd.DataFrame(values, columns=[f"v{i}" for i in range(values.shape[1])])
    frame.insert(0, "date", pd.date_range(start, periods=len(values), freq=freq))
    frame.to_csv(path, index=False)
    return path


@pytest.fixture
def noise() -> np.ndarray:
    return np.random.default_rng(0).normal(size=(400, 3)).cumsum(axis=0).round(6)


class TestBenchmarks:
    pytestmark = needs_data

    def test_etth1_windows_of_the_papers(self) -> None:
        bundle = ForecastTask.load_data(config("etth1"))
        assert [len(bundle.split(s)) for s in ("train", "val", "test")] == [8449, 2785, 2785]

    @pytest.mark.parametrize(
        ("data", "args", "rows", "counts"),
        [
            ("exchange", {}, 7588, [5120, 665, 1422]),
            ("ili", {"seq_len": 36, "label_len": 18, "pred_len": 24}, 966, [617, 74, 170]),
        ],
    )
    def test_ratio_windows(self, data: str, args: dict[str, int], rows: int, counts: list[int]) -> None:
        bundle = ForecastTask.load_data(config(data, **args))
        assert [len(bundle.split(s)) for s in ("train", "val", "test")] == counts
        window, horizon = args.get("seq_len", 96) + args.get("pred_len", 96), args.get("pred_len", 96)
        train, test = int(rows * 0.7), int(rows * 0.2)
        assert counts == [train - window + 1, rows - train - test - horizon + 1, test - horizon + 1]

    def test_values_are_the_files_scaled_by_the_first_8640_rows(self) -> None:
        raw = pd.read_csv(ETT).drop(columns="date").to_numpy()
        mean, std = raw[:8640].mean(axis=0), raw[:8640].std(axis=0)
        bundle = ForecastTask.load_data(config("etth1"))
        batch = bundle.test.__getitems__([0, 1234, 2784])
        for row, index in enumerate((0, 1234, 2784)):
            start = 16 * 720 - 96 + index
            scaled = (raw[start : start + 192] - mean) / std
            np.testing.assert_allclose(batch["x"][row], scaled[:96], atol=1e-6)
            np.testing.assert_allclose(batch["y"][row], scaled[48:], atol=1e-6)
        assert batch["x"].dtype == torch.float32
        assert 16 * 720 - 96 + 2784 + 192 == 20 * 720

    def test_files_are_those_of_the_cards(self) -> None:
        from attn_shared.datasets import verify

        for name in ("etth1", "etth2", "exchange", "ili"):
            assert verify(DATASETS[name]) == []


class TestEmbedded:
    def test_co2_is_read_as_it_is(self) -> None:
        table = read_source("co2", ForecastDataConfig())
        assert (table.frequency, table.columns, len(table.series)) == ("W-SAT", ["co2"], 1)
        assert table.series[0].values.shape == (2284, 1)
        assert int(np.isnan(table.series[0].values).sum()) == 59
        assert str(table.series[0].times[0])[:10] == "1958-03-29"

    def test_it_agrees_with_statsmodels(self) -> None:
        from statsmodels.datasets import co2

        theirs = co2.load_pandas().data["co2"].to_numpy()
        np.testing.assert_array_equal(read_source("co2", ForecastDataConfig()).series[0].values[:, 0], theirs)

    def test_unknown_name(self) -> None:
        with pytest.raises(UserError, match="unknown data set 'eth1'; did you mean 'etth1'"):
            source_path("eth1")


class TestWindows:
    def test_batch_equals_items_stacked(self, tmp_path: Path, noise: np.ndarray) -> None:
        noise[50:53, 1] = np.nan
        bundle = ForecastTask.load_data(config(write(tmp_path / "a.csv", noise), seq_len=20, label_len=7, pred_len=5))
        windows = bundle.train
        indices = [5, 0, 31, 31, len(windows) - 1]
        batch = windows.__getitems__(indices)
        for name, value in batch.items():
            torch.testing.assert_close(value, torch.stack([windows[i][name] for i in indices]))

    def test_shapes_and_overlap(self, tmp_path: Path, noise: np.ndarray) -> None:
        bundle = ForecastTask.load_data(config(write(tmp_path / "a.csv", noise), seq_len=20, label_len=7, pred_len=5))
        batch = bundle.val.__getitems__(range(4))
        assert batch["x"].shape == (4, 20, 3)
        assert batch["y"].shape == (4, 12, 3)
        assert batch["x_mark"].shape == (4, 20, 4)
        assert batch["y_mark"].shape == (4, 12, 4)
        torch.testing.assert_close(batch["y"][:, :7], batch["x"][:, 13:])
        torch.testing.assert_close(batch["y_mark"][:, :7], batch["x_mark"][:, 13:])
        assert "observed" not in batch

    def test_every_target_of_a_split_lies_in_it(self, tmp_path: Path) -> None:
        values = np.arange(400.0)[:, None]
        args = {"seq_len": 20, "label_len": 7, "pred_len": 5, "scale": "none"}
        bundle = ForecastTask.load_data(config(write(tmp_path / "a.csv", values), **args))
        seen = {}
        for split in ("train", "val", "test"):
            windows = bundle.split(split)
            targets = windows.__getitems__(range(len(windows)))["y"][:, -5:, 0]
            seen[split] = (int(targets.min()), int(targets.max()))
        assert seen == {"train": (20, 279), "val": (280, 319), "test": (320, 399)}

    def test_series_are_never_mixed(self, tmp_path: Path) -> None:
        frames = []
        for number, name in enumerate("abc"):
            rows = 100 + 20 * number
            dates = pd.date_range("2024-01-01", periods=rows, freq="D")
            frames.append(pd.DataFrame({"date": dates, "id": name, "v": 1000.0 * number + np.arange(rows)}))
        pd.concat(frames).to_csv(tmp_path / "a.csv", index=False)
        args = {"seq_len": 10, "label_len": 5, "pred_len": 4, "scale": "none"}
        bundle = ForecastTask.load_data(config(tmp_path / "a.csv", **args))
        total = 0
        for split in ("train", "val", "test"):
            windows = bundle.split(split)
            batch = windows.__getitems__(range(len(windows)))
            whole = torch.cat([batch["x"], batch["y"][:, -4:]], dim=1)[..., 0]
            assert (whole.diff(dim=1) == 1).all()
            total += len(windows)
        assert total == sum(n - 14 + 1 - 3 * 2 for n in (100, 120, 140))

    def test_times_of_a_window(self, tmp_path: Path, noise: np.ndarray) -> None:
        bundle = ForecastTask.load_data(config(write(tmp_path / "a.csv", noise), seq_len=20, label_len=7, pred_len=5))
        _, times = bundle.test.window_times(3)
        assert len(times) == 25
        assert times[20] == pd.Timestamp("2024-01-01") + pd.Timedelta(hours=320 + 3)

    def test_too_short_tells_the_arithmetic(self, tmp_path: Path, noise: np.ndarray) -> None:
        with pytest.raises(
            UserError, match=r"seq_len 96 \+ pred_len 96 = 192 training rows, and 70% of its 200 rows are 140"
        ):
            ForecastTask.load_data(config(write(tmp_path / "a.csv", noise[:200])))
        with pytest.raises(
            UserError, match="the validation part has 40 of 400 rows and one forecast takes pred_len 48"
        ):
            ForecastTask.load_data(config(write(tmp_path / "a.csv", noise), seq_len=48, pred_len=48))
        with pytest.raises(UserError, match="label_len is 30; it must lie between 0 and seq_len, 20"):
            ForecastTask.load_data(config(write(tmp_path / "a.csv", noise), seq_len=20, label_len=30, pred_len=5))
        with pytest.raises(UserError, match="split 'etth' needs 14,400 rows, the series has 400"):
            ForecastTask.load_data(config(write(tmp_path / "a.csv", noise), split="etth"))


class TestScaler:
    def test_constant_column_stays_finite(self, tmp_path: Path, noise: np.ndarray) -> None:
        noise[:, 1] = 0.1
        bundle = ForecastTask.load_data(config(write(tmp_path / "a.csv", noise), seq_len=20, label_len=7, pred_len=5))
        assert bundle.state["scaler"]["std"][0][1] == 1.0
        assert torch.isfinite(bundle.train.__getitems__([0])["x"]).all()
        assert (bundle.train.__getitems__([0])["x"][..., 1].abs() < 1e-6).all()

    def test_one_a_series_or_one_for_all(self, tmp_path: Path) -> None:
        dates = pd.date_range("2024-01-01", periods=100, freq="D")
        low = pd.DataFrame({"date": dates, "id": "low", "v": np.arange(100.0)})
        high = pd.DataFrame({"date": dates, "id": "high", "v": 1000 + 10 * np.arange(100.0)})
        pd.concat([low, high]).to_csv(tmp_path / "a.csv", index=False)
        args = {"seq_len": 10, "label_len": 5, "pred_len": 4}
        single = ForecastTask.load_data(config(tmp_path / "a.csv", **args)).state["scaler"]
        each = ForecastTask.load_data(config(tmp_path / "a.csv", **args, scaler="series")).state["scaler"]
        v = np.arange(70.0)
        np.testing.assert_allclose(single["mean"], [[np.concatenate([v, 1000 + 10 * v]).mean()]])
        assert each["groups"] == {"low": 0, "high": 1}
        np.testing.assert_allclose(each["mean"], [[v.mean()], [1000 + 10 * v.mean()]])
        np.testing.assert_allclose(each["std"], [[v.std()], [10 * v.std()]])


class TestFilling:
    def test_line_and_last_value(self) -> None:
        nan = np.nan
        values = np.array([[1.0], [nan], [nan], [4.0], [nan]])
        np.testing.assert_allclose(fill_between(values)[:, 0], [1, 2, 3, 4, 4])
        np.testing.assert_allclose(fill_forward(values)[:, 0], [1, 1, 1, 4, 4])
        np.testing.assert_array_equal(next_observed(values)[:, 0], [0, 3, 3, 3, 5])

    def test_a_look_back_that_ends_in_a_gap_sees_the_last_value(self, tmp_path: Path) -> None:
        values = np.arange(400.0)[:, None]
        values[100:104] = np.nan
        args = {"seq_len": 20, "label_len": 7, "pred_len": 5, "scale": "none"}
        windows = ForecastTask.load_data(config(write(tmp_path / "a.csv", values), **args)).train
        inside = windows[102 - 20]  # sees rows 82 … 101; 100 and 101 are missing
        assert inside["x"][-3:, 0].tolist() == [99, 99, 99]
        assert inside["observed"][:, 0].tolist() == [False, False, True, True, True]
        after = windows[105 - 20]  # sees rows 85 … 104, the whole gap: filled by the line
        assert after["x"][-6:, 0].tolist() == [99, 100, 101, 102, 103, 104]
        assert after["observed"].all()


class TestCalendar:
    @pytest.mark.parametrize(
        ("freq", "names"),
        [
            ("h", ["hour", "day of week", "day of month", "day of year"]),
            ("15min", ["minute", "hour", "day of week", "day of month", "day of year"]),
            ("s", ["second", "minute", "hour", "day of week", "day of month", "day of year"]),
            ("D", ["day of week", "day of month", "day of year"]),
            ("B", ["day of week", "day of month", "day of year"]),
            ("W-TUE", ["day of month", "week of year"]),
            ("MS", ["month"]),
            ("QE-MAR", ["month"]),
            ("YS", []),
        ],
    )
    def test_features_by_frequency(self, freq: str, names: list[str]) -> None:
        assert list(feature_names(freq)) == names
        times = pd.date_range("2020-01-01", periods=50, freq=freq)
        features = calendar_features(times, freq)
        assert features.shape == (50, len(names))
        assert (np.abs(features) <= 0.5).all()

    def test_formulas(self) -> None:
        moment = pd.DatetimeIndex([pd.Timestamp("2021-12-31 23:59:59")])  # a Friday, day 365, ISO week 52
        second = calendar_features(moment, "s")[0]
        np.testing.assert_allclose(second, [0.5, 0.5, 0.5, 4 / 6 - 0.5, 0.5, 364 / 365 - 0.5], atol=1e-15)
        week = calendar_features(moment, "W")[0]
        np.testing.assert_allclose(week, [0.5, 51 / 52 - 0.5], atol=1e-15)
        assert calendar_features(moment, "MS")[0, 0] == 0.5
        first = pd.DatetimeIndex([pd.Timestamp("2024-01-01 00:00")])  # a Monday
        np.testing.assert_allclose(calendar_features(first, "h")[0], [-0.5] * 4)

    @pytest.mark.parametrize(
        ("freq", "season"),
        [("h", 24), ("15min", 96), ("30min", 48), ("6h", 4), ("s", 60), ("D", 7), ("7D", 52), ("W-SUN", 52), ("B", 5),
         ("MS", 12), ("ME", 12), ("QS", 4), ("YS", 1), ("7h", 1), ("2MS", 6)],
    )  # fmt: skip
    def test_seasons(self, freq: str, season: int) -> None:
        assert season_of(freq) == season


def test_borders_round_as_the_released_code_does() -> None:
    args = ForecastDataConfig()
    for rows in (966, 7588, 101, 999):
        limits = borders(rows, "ratio", args)
        train, test = int(rows * 0.7), int(rows * 0.2)
        assert (limits.train, limits.val, limits.test) == (train, rows - test, rows)


def test_a_batch_is_a_copy(tmp_path: Path, noise: np.ndarray) -> None:
    """A batch shares no memory with the table, so training cannot change the data."""
    windows = ForecastTask.load_data(
        config(write(tmp_path / "a.csv", noise), seq_len=20, label_len=7, pred_len=5)
    ).train
    assert isinstance(windows, Windows)
    before = windows.values.clone()
    batch = windows.__getitems__([0, 1])
    batch["x"].zero_()
    batch["y"].zero_()
    torch.testing.assert_close(windows.values, before)
