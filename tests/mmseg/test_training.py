"""The example config as a user runs it: trains, validates, keeps a checkpoint, goes on from it, segments a picture."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from attn_medseg.segment.synthetic import synthetic

CONFIG = Path(__file__).parents[2] / "apps" / "medseg" / "configs" / "mmseg_daeformer.py"
COUNTS = {"train": 32, "val": 8}
STOP, END = 60, 80
Trained = tuple[Path, Any, dict[str, float]]


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Discs in noise as PNG files beside masks of 0 and 1."""
    folder = tmp_path_factory.mktemp("pictures")
    cases = synthetic(2).cases
    for part, count in COUNTS.items():
        for case in [case for case in cases if case.part == part][:count]:
            assert callable(case.image)
            assert callable(case.label)
            grey = (case.image().values[0] * 200).clip(0, 255).astype(np.uint8)
            for kind, values in (("images", np.stack([grey] * 3, axis=-1)), ("masks", case.label().values > 0)):
                (folder / part / kind).mkdir(parents=True, exist_ok=True)
                Image.fromarray(values.astype(np.uint8)).save(folder / part / kind / f"{case.name}.png")
    return folder


@pytest.fixture(scope="module")
def train(pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Trained]:
    """Run the config; its folder, itself, and the last validation's metrics in percent."""

    def run(**options: Any) -> Trained:
        from mmengine.config import Config
        from mmengine.runner import Runner

        config = Config.fromfile(CONFIG)
        folder = tmp_path_factory.mktemp("run")
        for loader in (config.train_dataloader, config.val_dataloader):
            loader.dataset.data_root = str(pictures)
        config.merge_from_dict(
            {
                "work_dir": str(folder),
                "experiment_name": folder.name,
                "log_level": "WARNING",
                "train_cfg.max_iters": END,
                "train_cfg.val_interval": STOP,
                "param_scheduler": [{"type": "CosineAnnealingLR", "by_epoch": False, "T_max": END}],
                "default_hooks.checkpoint.interval": STOP,
                **options,
            }
        )
        runner = Runner.from_cfg(config)
        runner.train()
        assert runner.iter == config.train_cfg.max_iters
        return folder, config, runner.val()

    return run


@pytest.fixture(scope="module")
def whole(train: Callable[..., Trained]) -> Trained:
    """A run that nothing interrupts; it keeps a checkpoint on the way."""
    return train()


def overlaps(predicted: list[NDArray[np.bool_]], right: list[NDArray[np.bool_]]) -> dict[str, float]:
    """mIoU and mDice over background and structure, in percent, by their definitions."""
    p, t = (np.concatenate([one.ravel() for one in masks]) for masks in (predicted, right))
    both, either = ([(op(a, b)).sum() for a, b in ((~p, ~t), (p, t))] for op in (np.logical_and, np.logical_or))
    iou = [b / e for b, e in zip(both, either)]
    return {"mIoU": 100 * float(np.mean(iou)), "mDice": 100 * float(np.mean([2 * one / (1 + one) for one in iou]))}


def masks_of(pictures: Path) -> list[NDArray[np.bool_]]:
    return [np.asarray(Image.open(file)) > 0 for file in sorted((pictures / "val" / "masks").iterdir())]


def logged(folder: Path, key: str) -> dict[int, float]:
    """Iteration -> a number in the log of a run."""
    lines = next(folder.glob("*/vis_data/scalars.json")).read_text(encoding="utf-8").splitlines()
    return {row["step"]: row[key] for row in map(json.loads, lines) if key in row}


def weights_of(path: Path) -> dict[str, Tensor]:
    from mmengine.runner.checkpoint import get_torch_safe_globals

    with torch.serialization.safe_globals(get_torch_safe_globals()):
        found: dict[str, Tensor] = torch.load(path, weights_only=True)["state_dict"]
    return found


def test_it_learns_and_validates(whole: Trained, pictures: Path) -> None:
    folder, _, metrics = whole
    right = masks_of(pictures)
    nothing = overlaps([np.zeros_like(one) for one in right], right)
    validated = logged(folder, "mDice")
    assert list(validated) == [STOP, END]
    for name in ("mIoU", "mDice"):
        assert math.isfinite(metrics[name])
        assert metrics[name] > nothing[name] + 20
    assert validated[STOP] > nothing["mDice"] + 20
    losses = list(logged(folder, "loss").values())
    assert all(map(math.isfinite, losses))


def test_it_goes_on_from_a_checkpoint(whole: Trained, train: Callable[..., Trained]) -> None:
    """The weights of a run that was resumed are those of the run that was not, bit for bit."""
    first, _, metrics = whole
    assert sorted(path.name for path in first.glob("*.pth")) == [f"iter_{STOP}.pth", f"iter_{END}.pth"]
    second, _, again = train(resume=True, load_from=str(first / f"iter_{STOP}.pth"))
    assert sorted(path.name for path in second.glob("*.pth")) == [f"iter_{END}.pth"]
    weights, resumed, before = (
        weights_of(path) for path in (first / f"iter_{END}.pth", second / f"iter_{END}.pth", first / f"iter_{STOP}.pth")
    )
    assert set(weights) == set(resumed)
    assert all(torch.equal(weights[name], resumed[name]) for name in weights)
    assert any(not torch.equal(weights[name], before[name]) for name in weights)
    assert again == metrics


def test_a_picture_is_segmented(whole: Trained, pictures: Path) -> None:
    from mmseg.apis import inference_model, init_model

    folder, config, metrics = whole
    model = init_model(config, str(folder / f"iter_{END}.pth"), device="cpu")
    files = sorted((pictures / "val" / "images").iterdir())
    found = [inference_model(model, str(file)).pred_sem_seg.data[0].numpy() > 0 for file in files]
    scores = overlaps(found, masks_of(pictures))
    assert {name: round(value, 2) for name, value in scores.items()} == {name: metrics[name] for name in scores}
    odd = np.asarray(Image.open(files[0]))[:50, :61, ::-1]
    cut = inference_model(model, np.ascontiguousarray(odd)).pred_sem_seg.data[0].numpy() > 0
    assert cut.shape == (50, 61)
    assert (cut == found[0][:50, :61]).mean() > 0.9
