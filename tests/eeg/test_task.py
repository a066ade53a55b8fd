"""Training, evaluation and what stands beside the model in its table."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from attn_eeg.baselines import BASELINES, lda, nearest
from attn_eeg.cli import APP, main
from attn_eeg.data.windows import WindowSet
from attn_eeg.task import EegTask, data_args
from attn_shared import options, trainer
from attn_shared.config import RunConfig
from attn_shared.errors import UserError


def configured(*argv: str) -> RunConfig:
    return options.resolve(APP, options.split(["--preset", "none", *argv]))


def task_of(*argv: str) -> tuple[EegTask, WindowSet]:
    config = configured(*argv)
    bundle = trainer.load_data(APP, config)
    task = trainer.build_task(APP, config, bundle.state)
    assert isinstance(task, EegTask)
    assert isinstance(bundle.train, WindowSet)
    return task, bundle.train


def test_a_run_holds_its_table(trained: Path) -> None:
    results = json.loads((trained / "metrics.json").read_text(encoding="utf-8"))
    test = results["splits"]["test"]
    assert test["accuracy"] > 0.6
    assert test["windows"] == 60
    rows = {row["model"]: row for row in results["baselines"]}
    assert list(rows) == ["lda", "1-nn", "majority"]
    assert rows["majority"]["accuracy"] == 0.5
    assert all(set(test) <= set(row) for row in rows.values())
    assert "no subject on both sides" in results["protocol"]
    assert "WARNING" not in results["protocol"]
    html = (trained / "report.html").read_text(encoding="utf-8")
    assert "synthetic" in html
    for name in ("subjects", "confusion", "electrodes", "bands"):
        assert (trained / "plots" / f"{name}.png").stat().st_size > 3000


def test_eval_gives_the_same_figures(trained: Path, tmp_path: Path) -> None:
    assert main(["eval", str(trained), "--output", str(tmp_path / "e.json"), "--trainer.eval_batch_size", "7"]) == 0
    expected = json.loads((trained / "metrics.json").read_text(encoding="utf-8"))["splits"]["test"]
    assert json.loads((tmp_path / "e.json").read_text(encoding="utf-8"))["metrics"] == pytest.approx(expected, abs=1e-6)


def test_random_split_warns_wherever_its_figures_stand(
    train: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    split = ("--data_args.split", "random", "--data_args.stride", "2", "--data_args.normalize", "array")
    run = train("--model", "linear", *split, small=False)
    assert "this split leaks" in capsys.readouterr().err
    results = json.loads((run / "metrics.json").read_text(encoding="utf-8"))
    assert "WARNING, this split leaks" in results["protocol"]
    assert "WARNING, this split leaks" in (run / "report.html").read_text(encoding="utf-8")
    assert next(row for row in results["baselines"] if row["model"] == "1-nn")["accuracy"] > 0.95
    assert main(["eval", str(run)]) == 0
    assert "WARNING, this split leaks" in capsys.readouterr().out


def test_comparison_goes_through_the_folds(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--runs", str(tmp_path), "--trainer.max_epochs", "1", "--trainer.progress", "false"]
    assert main(["compare", "--model", "linear", "--seeds", "2", "--data_args.split", "random", *words]) == 0
    printed = capsys.readouterr().out
    assert "fold 1-2 of 6" in printed
    assert "WARNING, this split leaks" in printed
    (found,) = tmp_path.glob("**/comparison.json")
    rows = {row["model"]: row["metrics"]["accuracy"] for row in json.loads(found.read_text(encoding="utf-8"))["rows"]}
    assert set(rows) == {"linear", "lda", "1-nn", "majority"}
    assert len(rows["linear"]["values"]) == len(rows["lda"]["values"]) == 2
    assert rows["lda"]["sd"] is not None


def test_a_model_of_samples_gets_samples() -> None:
    task, train = task_of("--model", "eegnet", "--data_args.balance", "smote")
    assert data_args(task.config).features == "raw"
    assert task.shape.samples == 512
    batch = train.__getitems__([0, 1, 2])
    assert batch["x"].shape == (3, 8, 512)
    assert task.forward_batch(batch).shape == (3, 2)
    # The simple ones beside it read band features of the same windows.
    other = configured("--model", "mlp")
    expected = EegTask.baselines(other, trainer.load_data(APP, other))
    config = configured("--model", "eegnet")
    assert EegTask.baselines(config, trainer.load_data(APP, config)) == expected


def test_loss_is_cross_entropy_with_weights_and_smoothing() -> None:
    task, train = task_of("--data_args.balance", "weights", "--model", "mlp", "--model_args.label_smoothing", "0.2")
    task.eval()
    task.class_weights = torch.tensor([0.5, 2.0])
    batch = train.__getitems__(range(0, len(train), 7))
    log = task.forward_batch(batch).log_softmax(dim=-1)
    target = 0.8 * F.one_hot(batch["y"], 2) + 0.1
    weight = task.class_weights
    expected = -(target * weight * log).sum() / weight[batch["y"]].sum()
    assert task.training_loss(batch).item() == pytest.approx(expected.item(), rel=1e-5)


def test_class_weights_come_from_the_data() -> None:
    task, _ = task_of("--data_args.balance", "weights", "--model", "linear")
    assert task.class_weights is not None
    assert task.class_weights.tolist() == pytest.approx([1.0, 1.0])
    assert "class_weights" not in task.state_dict()


@pytest.mark.parametrize(
    ("argv", "sentence"),
    [
        (["--data_args.features", "raw"], "features to bde"),
        (["--model", "linear", "--model_args.label_smoothing", "1"], "label_smoothing"),
        (["--data_args.folds", "13"], "12 subjects cannot be parted into 13 folds"),
        (["--data_args.label", "mood"], "state"),
    ],
)
def test_errors_are_one_sentence(argv: list[str], sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        task_of(*argv)


def test_baselines_keep_the_places_of_classes() -> None:
    x = torch.randn(30, 4, generator=torch.Generator().manual_seed(0)).numpy()
    y = torch.arange(30).remainder(2).numpy() * 2  # class 1 does not occur in training
    for classify in (lda, nearest):
        found = classify(x, y, x[:5], 3)
        assert found.shape == (5, 3)
        assert (found[:, 1] == 0).all()
        assert found.sum(axis=1) == pytest.approx(1)
    assert (nearest(x, y, x, 3).argmax(axis=1) == y).all()
    assert [one.name for one in BASELINES] == ["lda", "1-nn", "majority"]
