"""Training and evaluation of classifiers through the command line, and the simple models beside them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from attn_genomics.cli import APP, main
from attn_genomics.sequences import baselines
from attn_genomics.sequences.options import SequencesTaskConfig
from attn_genomics.sequences.task import SequencesTask, options
from attn_genomics.tokens import decode
from attn_shared import trainer
from attn_shared.config import RunConfig
from attn_shared.errors import UserError

SMALL = ("--model", "cnn", "--model_args.channels", "8", "--preset", "none", "--trainer.accelerator", "cpu")


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Class b has TTGACA somewhere, class c has it at the beginning."""
    rng = np.random.default_rng(0)
    rows = []
    for number in range(360):
        text, label = decode(rng.integers(0, 4, rng.integers(36, 49))), "abc"[number % 3]
        at = 0 if label == "c" else int(rng.integers(8, 30))
        rows.append((text if label == "a" else text[:at] + "TTGACA" + text[at + 6 :], label))
    path = tmp_path_factory.mktemp("data") / "motif.csv"
    pd.DataFrame(rows, columns=["sequence", "label"]).to_csv(path, index=False)
    return path


@pytest.fixture(scope="module")
def run(table: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    runs = tmp_path_factory.mktemp("runs")
    chosen = ("--task_args.class_weights", "true", "--task_args.rc", "average", "--task_args.bootstrap", "50")
    limits = ("--trainer.max_epochs", "2", "--trainer.progress", "false", "--data_args.test", "0.3")
    assert main(["train", "--data", str(table), "--runs", str(runs), *SMALL, *chosen, *limits]) == 0
    (file,) = runs.glob("**/metrics.json")
    return file.parent


def test_train_and_report(run: Path) -> None:
    found = json.loads((run / "metrics.json").read_text(encoding="utf-8"))
    test = found["splits"]["test"]
    rows = {row["model"]: row for row in found["baselines"]}
    assert set(rows) == {"commonest class", "drawn", "k-mer counts", "k-mer counts by place"}
    for row in rows.values():
        assert set(row) - {"model", "note"} == set(test)
    assert rows["commonest class"]["mcc"] == 0
    # Where the motif is, tells more than that it is there.
    assert rows["k-mer counts by place"]["mcc"] > rows["k-mer counts"]["mcc"] > 0.25
    for name in ("calibration", "confusion", "saliency"):
        assert (run / "plots" / f"{name}.png").stat().st_size > 5000
    again = trainer.evaluate(APP, run, overrides={"trainer.eval_batch_size": 7})["metrics"]
    assert again == pytest.approx(test, abs=1e-5)


def test_counts_of_kmers_are_those_of_a_loop() -> None:
    texts = ["ACGTACGTNACG", "TTTT", "AC", "GGGCCCNNGGG"]
    tokens = np.full((4, 12), 4, np.uint8)
    for row, text in enumerate(texts):
        tokens[row, : len(text)] = ["ACGTN".index(letter) for letter in text]
    data = baselines.Sequences(tokens, np.array([len(text) for text in texts]), np.zeros(4, np.int64))
    words = [a + b + c for a in "ACGT" for b in "ACGT" for c in "ACGT"]
    other = str.maketrans("ACGT", "TGCA")
    for strands in (False, True):
        found = np.expm1(baselines.features(data, baselines.Form(3, strands)).toarray())
        for row, text in enumerate(texts):
            for number, word in enumerate(words):
                turned = word.translate(other)[::-1]
                same = {word, turned} if strands else {word}
                times = sum(text[i : i + 3] in same for i in range(len(text)))
                assert found[row, number] == pytest.approx(times if not strands or word <= turned else 0), word
    placed = np.expm1(baselines.features(data, baselines.Form(1, parts=2)).toarray()).round(9)
    assert placed[3].tolist() == [0, 3, 3, 0, 0, 0, 3, 0]
    assert placed[1].tolist() == [0, 0, 0, 2, 0, 0, 0, 2]


def test_options_are_checked() -> None:
    def config(**chosen: object) -> RunConfig:
        args = SequencesTaskConfig(**chosen)  # type: ignore[arg-type]
        return RunConfig(app="genomics", model="cnn", model_args=None, data="x", data_args=None, task_args=args)

    for chosen, message in (
        ({"bins": 0}, r"--task_args.bins must be 1 or more"),
        ({"dropout": 1.0}, r"--task_args.dropout must be 0 or more and below 1"),
        ({"freeze": True}, r"name what the rest starts from with --task_args.start"),
    ):
        with pytest.raises(UserError, match=message):
            options(config(**chosen))
    with pytest.raises(UserError, match=r"there is nothing at nowhere"):
        SequencesTask.load_data(config(start="nowhere"))
