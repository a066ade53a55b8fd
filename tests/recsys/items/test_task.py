"""Training, evaluation and report of a ranking through the command line."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from attn_recsys.cli import APP, main
from attn_recsys.items.task import ItemsTask
from attn_shared import trainer
from attn_shared.errors import UserError


def results(run: Path) -> dict:
    return json.loads((run / "metrics.json").read_text(encoding="utf-8"))


def test_train_and_report(bprmf: Path) -> None:
    found = results(bprmf)
    test = found["splits"]["test"]
    rows = {row["model"]: row for row in found["baselines"]}
    assert set(rows) == {"random", "popularity", "item-kNN"}
    assert set(rows["item-kNN"]) - {"model", "note"} == set(test)
    assert test["auc"] > rows["random"]["auc"]
    assert "ranked among all items" in found["protocol"]
    assert {"ndcg_kgat@20", "coverage@10", "ndcg@10, 95% from"} <= set(test)
    assert (bprmf / "plots" / "activity.png").stat().st_size > 5000
    assert (bprmf / "plots" / "popularity.png").stat().st_size > 5000


def test_evaluation_does_not_depend_on_batches(bprmf: Path) -> None:
    expected = results(bprmf)["splits"]["test"]
    for size in (1, 37, 1000):
        found = trainer.evaluate(APP, bprmf, overrides={"trainer.eval_batch_size": size})["metrics"]
        assert found == pytest.approx(expected, abs=1e-12)
    with pytest.raises(UserError, match="leaves training items out"):
        trainer.evaluate(APP, bprmf, split="train")


def test_scores_are_the_models_and_known_items_are_masked(bprmf: Path) -> None:
    """Recall recomputed from the saved vectors, user by user."""
    task, config = trainer.load_task(APP, bprmf)
    assert isinstance(task, ItemsTask)
    bundle = trainer.load_data(APP, config, task.data_state)
    users, items = (vectors.detach() for vectors in task.network.embeddings())
    recalls = []
    for user in bundle.test.users:
        scores = (users[user] @ items.T).numpy()
        known = set(bundle.test.seen.of(int(user)).tolist())
        order = [item for item in np.argsort(-scores) if item not in known][:20]
        wanted = set(bundle.test.wanted.of(int(user)).tolist())
        recalls.append(len(wanted & set(order)) / len(wanted))
    assert results(bprmf)["splits"]["test"]["recall@20"] == pytest.approx(np.mean(recalls), abs=1e-9)


def test_sampled_figures_are_named(bprmf: Path) -> None:
    found = trainer.evaluate(APP, bprmf, overrides={"task_args.sampled": 20})
    assert all(name.startswith("sampled_") for name in found["metrics"])
    assert "SAMPLED" in found["protocol"]
    assert found["metrics"]["sampled_ndcg@10"] > results(bprmf)["splits"]["test"]["ndcg@10"]


def test_own_file_without_validation(train: Callable[..., Path], tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    rows = {(f"u{u}", f"i{i}") for u, i in zip(rng.integers(0, 30, 300), rng.integers(0, 20, 300))}
    (tmp_path / "own.csv").write_text("user,item\n" + "".join(f"{u},{i}\n" for u, i in sorted(rows)))
    run = train(
        *("--data", str(tmp_path / "own.csv"), "--model", "bprmf", "--data_args.val", "0"),
        *("--data_args.split", "leave_one_out", "--task_args.k", "[5]", "--task_args.groups", "1"),
    )
    found = results(run)
    assert "ndcg@5" in found["splits"]["test"]
    assert "last interaction" in found["protocol"]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--task_args.k", "[20, 10]"], "ascending"),
        (["--task_args.negatives", "0"], "--task_args.negatives must be 1 or more"),
        (["--task_args.sampled", "-1"], "--task_args.sampled must be 0 or more"),
        (["--data_args.test", "1.5"], "below 1 together"),
        (["--data_args.graph", "x.csv"], "synthetic has its own graph"),
        (["--data_args.split", "given"], "no split of its own"),
    ],
)
def test_refused(options: list[str], said: str, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["train", "--model", "bprmf", "--data", "synthetic", "--runs", str(tmp_path), *options]) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1
    assert not any(tmp_path.rglob("config.yaml"))


def test_models_are_told_of_each_epoch_once(bprmf: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also when a run goes on in the middle of an epoch."""
    task, config = trainer.load_task(APP, bprmf)
    assert isinstance(task, ItemsTask)
    bundle = trainer.load_data(APP, config, task.data_state)
    batch = task.example_batch(bundle, 8)
    told: list[int] = []
    monkeypatch.setattr(task.network, "start_epoch", told.append)
    for epoch in (50, 50, 51):
        task._epoch = epoch
        task.training_step(batch, 0)
    assert told == [50, 51]
    state = task.state_dict()
    other, _ = trainer.load_task(APP, bprmf)
    other.load_state_dict(state)
    assert isinstance(other, ItemsTask)
    monkeypatch.setattr(other.network, "start_epoch", told.append)
    other._epoch = 51
    other.training_step(batch, 0)
    assert told == [50, 51]


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys; from attn_recsys.cli import main; main(['train', '--help']); main(['recommend', '--help']);"
        "main(['data', 'list']); print([m for m in ('torch', 'numpy', 'pandas') if m in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, encoding="utf-8", check=True).stdout
    assert out.splitlines()[-1] == "[]"


def test_a_resumed_run_equals_one_without_a_break(train: Callable[..., Path]) -> None:
    """Stopped within an epoch: negatives, triples, attention and weights go on as if nothing had happened."""
    argv = ["--model", "kgat", "--data", "synthetic", "--trainer.batch_size", "512", "--trainer.max_epochs", "2"]
    argv += ["--trainer.threads", "1"]  # with more, gradients of looked-up rows are summed in no fixed order
    whole, broken = train(*argv), train(*argv, "--trainer.max_steps", "7")
    trainer.train(APP, trainer.resume_config(APP, broken, {"trainer.max_steps": "null"}), resume=broken)
    first, second = (load_file(run / "checkpoints" / "last" / "model.safetensors") for run in (whole, broken))
    assert results(whole)["steps"] == results(broken)["steps"] == 10
    assert all(torch.equal(first[name], second[name]) for name in first)
