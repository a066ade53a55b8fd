"""The run folder."""

from __future__ import annotations

from pathlib import Path

import pytest

from attn_shared.errors import UserError
from attn_shared.runs import Run


def test_folders_are_unique_and_named(toy):
    runs = [Run.create(toy.config("--mixer", "softmax")) for _ in range(3)]
    assert len({run.path for run in runs}) == 3
    assert runs[0].path.parent == toy.folder / "runs" / "toyapp" / "mlp-points-softmax"
    assert runs[0].config()["mixer"] == "softmax"
    Path("a b.csv").write_text("", encoding="utf-8")
    assert Run.create(toy.config("--data", "a b.csv")).path.parent.name == "mlp-a_b-own"


def test_metrics_widen_trim_and_survive_a_torn_row(toy):
    run = Run.create(toy.config())
    assert run.read_metrics() == []
    run.append({"step": 1, "epoch": 0, "lr": 0.1, "train_loss": 0.1 + 0.2})
    run.append({"step": 2, "epoch": 0, "lr": 1e-4, "train_loss": float("nan")})
    run.append({"step": 2, "epoch": 0, "val_mse": 1.5})
    text = (run.path / "metrics.csv").read_text(encoding="utf-8")
    assert text.splitlines()[:2] == ["step,epoch,lr,train_loss,val_mse", "1,0,0.1,0.30000000000000004,"]
    with open(run.path / "metrics.csv", "a", encoding="utf-8") as file:
        file.write("3,0,0.")
    again = Run.open(run.path)
    assert len(again.read_metrics()) == 3
    again.trim(1)
    assert again.read_metrics() == [{"step": 1, "epoch": 0, "lr": 0.1, "train_loss": 0.1 + 0.2, "val_mse": None}]
    again.append({"step": 2, "val_mse": 3.0})
    assert again.read_metrics()[-1]["val_mse"] == 3


def test_errors_help(toy):
    run = Run.create(toy.config())
    with pytest.raises(UserError, match="has not finished"):
        run.results()
    with pytest.raises(UserError, match="did you mean .*" + run.path.name):
        Run.open(run.path.parent)
    with pytest.raises(UserError, match="there is no run at"):
        Run.open("nowhere")
    Path("file").write_text("", encoding="utf-8")
    with pytest.raises(UserError, match="choose another place with --runs"):
        Run.create(_at(toy, "file"))
    (run.path / "config.yaml").write_text("a: [")
    with pytest.raises(UserError, match="cannot read"):
        run.config()


def _at(toy, where: str):
    config = toy.config()
    config.runs = where
    return config
