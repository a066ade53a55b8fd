"""Nothing after a border reaches what lies before it, and nothing after a look-back reaches its forecast."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from attn_shared.config import RunConfig
from attn_timeseries.config import MODELS
from attn_timeseries.data.cards import ForecastDataConfig
from attn_timeseries.task import ForecastTask

ROWS, TRAIN, VAL = 400, 280, 320
ARGS: dict[str, Any] = {"seq_len": 24, "label_len": 12, "pred_len": 8}
SMALL = {"d_model": 16, "d_ff": 16, "n_heads": 2}


def series(seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(ROWS, 3)).cumsum(axis=0).round(6)


def write(path: Path, values: np.ndarray) -> Path:
    frame = pd.DataFrame(values, columns=["a", "b", "c"])
    frame.insert(0, "date", pd.date_range("2024-01-01", periods=len(values), freq="h"))
    frame.to_csv(path, index=False)
    return path


def config(path: Path, model: str = "naive", **args: Any) -> RunConfig:
    kind = MODELS[model].config
    sizes = {name: value for name, value in SMALL.items() if name in kind.__dataclass_fields__}
    return RunConfig(
        app="timeseries",
        model=model,
        model_args=kind(**sizes),
        data=str(path),
        data_args=ForecastDataConfig(**{**ARGS, **args}),
    )


def train_batches(bundle: Any) -> dict[str, torch.Tensor]:
    return bundle.train.__getitems__(range(len(bundle.train)))


def with_gaps(values: np.ndarray) -> np.ndarray:
    values = values.copy()
    values[100:105, 0] = np.nan
    values[TRAIN - 3 : TRAIN + 4, 1] = np.nan  # a gap over the border
    values[150, :] = np.nan
    return values


@pytest.mark.parametrize("gaps", [False, True])
@pytest.mark.parametrize("scaler", ["global", "series"])
def test_values_after_the_border_change_no_scaler_and_no_training_batch(
    tmp_path: Path, gaps: bool, scaler: str
) -> None:
    values = with_gaps(series()) if gaps else series()
    other = values.copy()
    known = ~np.isnan(other[TRAIN:])
    other[TRAIN:][known] = 1e3 * np.random.default_rng(1).normal(size=known.sum())
    bundles = [
        ForecastTask.load_data(config(write(tmp_path / f"{n}.csv", v), scaler=scaler))
        for n, v in (("ours", values), ("other", other))
    ]
    assert bundles[0].state == bundles[1].state
    ours, theirs = (train_batches(bundle) for bundle in bundles)
    assert ours.keys() == theirs.keys()
    for name in ours:
        assert torch.equal(ours[name], theirs[name]), name
    # The change is real: it reaches the test part.
    assert not torch.equal(bundles[0].test[0]["y"], bundles[1].test[0]["y"])


def test_values_after_the_border_change_no_fitted_baseline(tmp_path: Path) -> None:
    from attn_timeseries.baselines import fit_linear

    values = series()
    other = values.copy()
    other[VAL:] = 1e3 * np.random.default_rng(1).normal(size=other[VAL:].shape)
    bundles = [ForecastTask.load_data(config(write(tmp_path / f"{i}.csv", v))) for i, v in enumerate((values, other))]
    ours, theirs = (fit_linear(bundle.train, bundle.val) for bundle in bundles)
    assert torch.equal(ours[0], theirs[0])
    assert torch.equal(ours[1], theirs[1])
    assert ours[2] == theirs[2]


@pytest.mark.parametrize("model", [n for n, card in MODELS.items() if card.trainable and "forecast" in card.kinds])
def test_the_future_changes_no_forecast(tmp_path: Path, model: str) -> None:
    """The forecast of every test window is the same whatever comes after its look-back."""
    values = with_gaps(series())
    values[350:355, 0] = np.nan
    ours = config(write(tmp_path / "ours.csv", values), model)
    bundle = ForecastTask.load_data(ours)
    torch.manual_seed(0)
    task = ForecastTask(ours, bundle.state).eval()
    rng = np.random.default_rng(2)
    for index in (0, 20, 31, 32, 33, 34, 40):  # look-backs that end before, in and after the gap at row 350
        border = VAL + index
        changed = values.copy()
        known = ~np.isnan(changed[border:])
        changed[border:][known] = 1e3 * rng.normal(size=known.sum())
        theirs = config(write(tmp_path / "theirs.csv", changed), model)
        other = ForecastTask.load_data(theirs, state=bundle.state)
        with torch.no_grad():
            forecasts = []
            for one in (bundle, other):
                torch.manual_seed(1)
                forecasts.append(task.forward_batch(one.test.__getitems__([index])))
        assert torch.equal(*forecasts), f"window {index}"
        assert not torch.equal(bundle.test[index]["y"], other.test[index]["y"])


def test_gaps_of_the_future_change_no_look_back(tmp_path: Path) -> None:
    """Where later values go missing, what a look-back shows does not change."""
    values = with_gaps(series())
    ours = ForecastTask.load_data(config(write(tmp_path / "a.csv", values)))
    for border in (VAL, VAL + 7, VAL + 30):
        holes = values.copy()
        holes[border : border + 6, 2] = np.nan
        theirs = ForecastTask.load_data(config(write(tmp_path / "b.csv", holes)), state=ours.state)
        index = border - VAL
        assert torch.equal(ours.test[index]["x"], theirs.test[index]["x"])
        assert torch.equal(ours.test[index]["x_mark"], theirs.test[index]["x_mark"])


def test_other_series_change_no_look_back(tmp_path: Path) -> None:
    """With a global scaler fitted before, the values and the order of other series reach no window of this one."""
    dates = pd.date_range("2024-01-01", periods=200, freq="D")
    values = np.random.default_rng(0).normal(size=(3, 200)).round(6)

    def bundle(order: str, scale: float, state: Any = None) -> Any:
        frames = [
            pd.DataFrame({"date": dates, "id": n, "v": values["abc".index(n)] * (1.0 if n == "a" else scale)})
            for n in order
        ]
        path = tmp_path / f"{order}{scale}.csv"
        pd.concat(frames).to_csv(path, index=False)
        return ForecastTask.load_data(config(path), state=state)

    first = bundle("abc", 1.0)
    windows = {name: [] for name in ("first", "other")}
    for name, one in (("first", first), ("other", bundle("cba", 50.0, first.state))):
        for i in range(len(one.test)):
            if one.test.window_times(i)[0] == "a":
                windows[name].append(one.test[i])
    assert len(windows["first"]) == len(windows["other"]) > 0
    for ours, theirs in zip(windows["first"], windows["other"]):
        for key in ("x", "x_mark", "y", "y_mark"):
            assert torch.equal(ours[key], theirs[key])


def test_splits_share_no_target(tmp_path: Path) -> None:
    values = np.arange(float(ROWS))[:, None].repeat(3, axis=1)
    bundle = ForecastTask.load_data(config(write(tmp_path / "a.csv", values), scale="none"))
    targets = {}
    for split in ("train", "val", "test"):
        windows = bundle.split(split)
        y = windows.__getitems__(range(len(windows)))["y"][:, -ARGS["pred_len"] :, 0]
        targets[split] = set(y.flatten().tolist())
    for one, two in itertools.combinations(targets.values(), 2):
        assert not one & two
