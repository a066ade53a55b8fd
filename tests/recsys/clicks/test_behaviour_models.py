"""Models of behaviour on a file of one's own: what a user had before comes as a column."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from attn_recsys.cli import main


def write(path: Path) -> Path:
    """Users click when an item is of the kind of their first item; the label of a row is in no other column."""
    rng = np.random.default_rng(0)
    lines = ["user,item,kind,label,had"]
    for user in range(80):
        had = [f"i{rng.integers(0, 30)}"]
        for _ in range(8):
            item = int(rng.integers(0, 30))
            click = item % 3 == int(had[0][1:]) % 3
            lines.append(f"u{user},i{item},k{item % 3},{int(click)},{' '.join(had)}")
            if click:
                had.append(f"i{item}")
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


@pytest.mark.parametrize("model", ["awmoe", "din", "moe"])
def test_behaviour_is_read(model: str, tmp_path: Path) -> None:
    """Item and user say nothing alone; against what the user had before they say all."""
    data = write(tmp_path / "own.csv")
    options = ["--trainer.accelerator", "cpu", "--trainer.progress", "false", "--runs", str(tmp_path / "runs")]
    options += ["--trainer.max_epochs", "12", "--trainer.patience", "12", "--trainer.batch_size", "32"]
    options += ["--optim.lr", "0.01", "--data_args.sequence", "had", "--data_args.split", "user"]
    assert main(["train", "--model", model, "--data", str(data), *options]) == 0
    (metrics,) = (tmp_path / "runs").rglob("metrics.json")
    assert json.loads(metrics.read_text(encoding="utf-8"))["splits"]["test"]["auc"] > 0.85


def test_without_behaviour(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = write(tmp_path / "own.csv")
    assert main(["train", "--model", "awmoe", "--data", str(data), "--runs", str(tmp_path / "runs")]) != 0
    assert "name it with --data_args.sequence" in capsys.readouterr().err
    assert not list((tmp_path / "runs").rglob("*.json"))
