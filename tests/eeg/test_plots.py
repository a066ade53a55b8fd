"""Pictures of a trained model: they show what they say they show."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from attn_eeg import plots
from attn_eeg.cli import APP
from attn_eeg.data.windows import WindowSet
from attn_eeg.metrics import Predictions
from attn_eeg.task import EegTask
from attn_shared import plotting, trainer
from core_attn import capture


@pytest.fixture(scope="module")
def task(trained: Path) -> tuple[EegTask, WindowSet]:
    task, config = trainer.load_task(APP, trained)
    assert isinstance(task, EegTask)
    windows = trainer.load_data(APP, config, task.data_state).test
    assert isinstance(windows, WindowSet)
    return task, windows


def test_attention_is_the_mean_of_the_maps(task: tuple[EegTask, WindowSet]) -> None:
    model, windows = task
    found = plots.electrode_attention(model, windows)
    assert found is not None
    assert found.shape == (8, 8)
    assert found.sum(axis=1) == pytest.approx(1)
    with torch.no_grad(), capture(model.network) as maps:
        model.eval()
        model.forward_batch(windows.__getitems__(range(len(windows))))
    (one,) = (maps[name] for name in maps)
    assert found == pytest.approx(one.mean(dim=(0, 1)).numpy(), abs=1e-6)


def test_gradients_and_differences(task: tuple[EegTask, WindowSet]) -> None:
    model, windows = task
    maps = plots.band_maps(model, windows)
    x, y = windows.arrays()
    x = x.reshape(len(x), 8, -1)
    assert maps["data"] == pytest.approx(x[y == 1].mean(axis=0) - x[y == 0].mean(axis=0), abs=1e-5)
    # The planted effect: less alpha at the back in the second state.
    alpha = windows.features.index("alpha")
    back = [windows.channels.index(name) for name in ("O1", "O2")]
    assert (maps["data"][back, alpha] < 0).all()
    step = 1e-3
    with torch.no_grad():
        moved = torch.from_numpy(x).clone()
        moved[:, back[0], alpha] += step
        up, down = (model.forward_batch({"x": v}).double() for v in (moved, torch.from_numpy(x)))
    slope = ((up[:, 1] - up[:, 0]) - (down[:, 1] - down[:, 0])).mean().item() / step
    assert maps["model"][back[0], alpha] == pytest.approx(slope, rel=0.05, abs=1e-3)


def test_places_on_the_head() -> None:
    where = plots.placed(["Fpz", "Oz", "T7", "T8", "Cz", "Fp1", "X1"])
    assert "X1" not in where
    assert where["Fpz"][1] > 0.7 > -0.7 > where["Oz"][1]
    assert where["T7"][0] < -0.7
    assert where["T8"][0] > 0.7
    assert np.hypot(*where["Cz"]) < 0.15
    assert all(np.hypot(*place) < 1 for place in where.values())


def test_figures_of_unknown_places_and_many_classes() -> None:
    weights = np.full((5, 5), 0.2)
    assert len(plots.attention_head(weights, list("abcde")).axes) == 2  # the matrix and its scale, no head
    assert len(plots.attention_head(weights, ["C3", "C4", "O1", "O2", "e"]).axes) == 3
    plotting.png(plots.confusion_matrix(np.arange(64).reshape(8, 8), [str(i) for i in range(8)]))
    one = Predictions(np.arange(6), np.zeros(6, int), np.zeros(6, int), np.tile([0.6, 0.4], (6, 1)))
    plotting.png(plots.subject_bars({"a": one, "b": one}, ["only"]))


def test_models_without_attention_have_no_map(task: tuple[EegTask, WindowSet]) -> None:
    from attn_shared import options

    config = options.resolve(APP, options.split(["--model", "linear", "--preset", "none"]))
    bundle = trainer.load_data(APP, config)
    linear = trainer.build_task(APP, config, bundle.state)
    assert isinstance(linear, EegTask)
    names = [picture.name for picture in linear.pictures(bundle)]
    assert names == ["subjects", "confusion", "bands"]
