"""A small trained click model, shared by the tests."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from attn_recsys.cli import main

SHORT = ["--preset", "none", "--trainer.accelerator", "cpu", "--trainer.progress", "false", "--trainer.max_epochs", "2"]


@pytest.fixture(scope="session")
def train_clicks(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Run `recsys train` shortly; the run folder."""

    def run(*argv: str) -> Path:
        runs = tmp_path_factory.mktemp("runs")
        assert main(["train", "--runs", str(runs), *SHORT, *argv]) == 0
        (report,) = runs.glob("**/report.html")
        return report.parent

    return run


@pytest.fixture(scope="session")
def table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A CSV of impressions with every kind of column."""
    rng = np.random.default_rng(0)
    rows = 500
    item = rng.integers(0, 20, rows)
    taste, user = rng.normal(size=(30, 4)), rng.integers(0, 30, rows)
    odds = taste[user, item % 4] + 0.3 * (item % 3) - 0.5
    frame = pd.DataFrame(
        {
            "user_id": [f"u{n:03d}" for n in user],
            "item_id": item,
            "brand": [f"b{n % 4}" for n in item],
            "tags": [" ".join(f"t{k}" for k in range(n % 3)) for n in item],
            "price": np.where(rng.random(rows) < 0.05, np.nan, (item + 1) * 1.5 + rng.random(rows)).round(2),
            "code": rng.choice(["007", "7", "08"], rows),
            "history": [" ".join(map(str, rng.integers(0, 20, rng.integers(0, 6)))) for _ in range(rows)],
            "time": pd.date_range("2024-01-01", periods=rows, freq="h").astype(str),
            "clicked": (rng.random(rows) < 1 / (1 + np.exp(-odds))).astype(int),
        }
    )
    path = tmp_path_factory.mktemp("data") / "shop.csv"
    frame.to_csv(path, index=False)
    return path


@pytest.fixture(scope="session")
def own(train_clicks: Callable[..., Path], table: Path) -> Path:
    """A run of Hiformer on the table, sequences included."""
    return train_clicks(
        *("--data", str(table), "--model", "hiformer", "--model_args.embed_dim", "8", "--model_args.rank", "8"),
        *("--data_args.multi", "[tags]", "--data_args.sequence", "history", "--data_args.split", "time"),
    )
