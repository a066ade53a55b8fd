"""Small data and a small trained model, shared by the tests of ranking."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from attn_recsys.cli import main
from attn_recsys.items.corpus import Corpus, Interactions
from attn_recsys.items.graph import build_graph

SHORT = ["--preset", "none", "--trainer.accelerator", "cpu", "--trainer.progress", "false", "--trainer.max_epochs", "3"]


@pytest.fixture
def corpus() -> Corpus:
    """40 users, 25 items, random interactions with times, a graph with a cycle; user 0 has every item."""
    rng = np.random.default_rng(3)
    table = rng.random((40, 25)) < 0.3
    table[0] = True
    user, item = np.nonzero(table)
    order = rng.permutation(len(user))
    names = [f"i{i}" for i in range(25)]
    triples = [(f"i{i}", "kind", f"k{i % 4}") for i in range(25)]
    triples += [("k0", "next", "k1"), ("k1", "next", "k2"), ("k2", "next", "k0"), ("k3", "next", "k3")]
    head, relation, tail = zip(*triples)
    return Corpus(
        name="small",
        interactions=Interactions(
            users=[f"u{u}" for u in range(40)],
            items=names,
            user=user[order],
            item=item[order],
            time=np.arange(len(user), dtype=float),
        ),
        graph=build_graph(names, head, relation, tail)[0],
    )


@pytest.fixture(scope="session")
def train(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Run `recsys train` shortly; the run folder."""

    def run(*argv: str) -> Path:
        runs = tmp_path_factory.mktemp("runs")
        assert main(["train", "--runs", str(runs), *SHORT, *argv]) == 0
        (report,) = runs.glob("**/report.html")
        return report.parent

    return run


@pytest.fixture(scope="session")
def bprmf(train: Callable[..., Path]) -> Path:
    """A run of BPR-MF on the synthetic data."""
    return train(
        *("--model", "bprmf", "--data", "synthetic", "--trainer.batch_size", "256", "--optim.lr", "0.02"),
        *("--trainer.max_epochs", "12"),
    )


@pytest.fixture(scope="session")
def recsys_data() -> Path:
    """The folder of the real data; tests that ask for it are skipped where it is not."""
    root = Path(os.environ.get("ATTN_DATA", "data")) / "recsys"
    if not (root / "lastfm_hetrec").is_dir():
        pytest.skip("Last.FM is not under ATTN_DATA")
    return root
