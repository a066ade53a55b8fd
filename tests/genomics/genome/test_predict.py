"""Bits of the bases of files, against the model asked directly; and a short training from the command line."""

from __future__ import annotations

import functools
import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from attn_genomics.cli import APP, main
from attn_genomics.data import fasta
from attn_genomics.genome import predict
from attn_genomics.genome.task import GenomeTask
from attn_genomics.tokens import decode, encode, reverse_complement
from attn_shared import options, trainer
from attn_shared.errors import UserError

SMALL = {
    "hybridna": {
        "dim": 16,
        "layers": 2,
        "every": 2,
        "heads": 2,
        "kv_heads": 1,
        "head_dim": 8,
        "state": 4,
        "window": 400,
    },
    "hyenadna": {"d_model": 8, "n_layer": 1, "filter_order": 8, "l_max": 128},
    "bigla": {"dim": 8, "layers": 1, "heads": 2, "kernel": 5},
}


def build(model: str, **chosen: object) -> GenomeTask:
    values = {
        **{"app": "genomics", "kind": "genome", "model": model, "data": "synthetic_genome"},
        **{"model_args": SMALL[model], "task_args": chosen},
    }
    made = trainer.build_task(APP, (options.config_from_dict(APP, values)), {"length": 64})
    assert isinstance(made, GenomeTask)
    return made.eval()


@pytest.fixture(scope="module")
def records() -> dict[str, str]:
    rng = np.random.default_rng(0)
    drawn = {name: decode(rng.integers(0, 4, size)) for name, size in (("long", 333), ("short", 25), ("two", 64))}
    return {**drawn, "empty": "", "soft": drawn["long"][:30].lower() + "NN" + drawn["long"][40:90], "gap": "NNNN"}


@pytest.fixture(scope="module")
def file(records: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("fasta") / "genome.fa"
    path.write_text("".join(f">{name}\n{text}\n" for name, text in records.items()))
    return path


def asked(task: GenomeTask, text: str) -> np.ndarray:
    with torch.no_grad():
        return task.network.bits(torch.from_numpy(encode(text).astype(np.int64))[None])[0].double().numpy()


@pytest.mark.parametrize("piece", [50, 1000])
def test_a_carried_state_is_the_whole_sequence(
    piece: int, records: dict[str, str], file: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    task = build("hybridna")
    monkeypatch.setattr(predict, "stream", functools.partial(fasta.stream, piece=piece))
    (target,) = predict.predict_files(task, [file], tmp_path, {"block": 48})
    found = pd.read_csv(target, sep="\t").set_index("name")
    assert list(found.index) == list(records)
    for name, text in records.items():
        count = sum(letter in "ACGTacgt" for letter in text)
        assert found.loc[name, "bases"] == count
        assert found.loc[name, "end"] == len(text)
        if count:
            assert found.loc[name, "bits_per_base"] == pytest.approx(asked(task, text).sum() / count, rel=1e-5)
        else:
            assert np.isnan(found.loc[name, "bits_per_base"])


@pytest.mark.parametrize(
    ("model", "chosen"),
    [("hyenadna", {}), ("bigla", {}), ("hyenadna", {"rc": "average"})],
)
def test_windows_score_every_base_once(model: str, chosen: dict[str, str], records: dict[str, str]) -> None:
    task = build(model, **chosen)
    scorer = predict.Scorer(task, 40)
    codes = encode(records["long"])
    for size in (60, 1000):
        parts = [codes[i : i + size] for i in range(0, len(codes), size)]
        found = np.concatenate(list(scorer.pieces(parts)))
        assert found.shape == (333,)
        assert (found > 0).all()
        expected = asked(task, records["long"][:40])
        sure = 30 if scorer.both else 40
        np.testing.assert_allclose(found[:sure], expected[:sure], rtol=1e-5)  # of the first window
    end = asked(task, records["short"])
    np.testing.assert_allclose(np.concatenate(list(scorer.pieces([encode(records["short"])]))), end, rtol=1e-5)


def test_places_and_bedgraph(records: dict[str, str], file: Path, tmp_path: Path) -> None:
    task = build("hybridna")
    bed = tmp_path / "places.bed"
    bed.write_text("long\t100\t150\ta\t0\t-\nlong\t5\t35\tb\t0\t+\n")
    (target,) = predict.predict_files(task, [bed], tmp_path, {"fasta": str(file)})
    found = pd.read_csv(target, sep="\t")
    text = torch.from_numpy(encode(records["long"][100:150]).astype(np.int64))[None]
    back = asked(task, decode(reverse_complement(text)[0]))
    assert found["bits_per_base"][0] == pytest.approx(back.mean(), rel=1e-5)
    (target,) = predict.predict_files(task, [file], tmp_path, {"format": "bedgraph", "bin": 20, "block": 50})
    rows = [line.split("\t") for line in target.read_text(encoding="utf-8").splitlines()[1:]]
    long = asked(task, records["long"])
    for name, start, end, value in rows:
        if name == "long":
            assert float(value) == pytest.approx(long[int(start) : int(end)].mean(), rel=1e-5)
    assert [int(row[2]) for row in rows if row[0] == "long"] == [*range(20, 333, 20), 333]
    assert "gap" not in {row[0] for row in rows}
    with pytest.raises(UserError, match=r"--fasta"):
        predict.predict_files(task, [bed], tmp_path, {})
    with pytest.raises(UserError, match=r"--bin must be 1 or more"):
        predict.predict_files(task, [file], tmp_path, {"bin": 0})


@pytest.mark.parametrize(("model", "sides"), [("hyenadna", "before it"), ("bigla", "on both sides")])
def test_train_and_report(model: str, sides: str, tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    codes = rng.integers(0, 4, 8_000)
    for i in range(3, len(codes)):
        if rng.random() < 0.5:
            codes[i] = codes[i - 3]
    path = tmp_path / "own.fa"
    path.write_text(f">one\n{decode(codes)}\n")
    assert (
        main(
            [
                *("train", "--data", str(path), "--model", model, "--runs", str(tmp_path / "runs"), "--preset", "none"),
                *(f"--model_args.{name}={value}" for name, value in SMALL[model].items()),
                *("--data_args.window", "64", "--trainer.max_steps", "3", "--trainer.accelerator", "cpu"),
                *("--trainer.progress", "false", "--data_args.val", "0.1"),
            ]
        )
        == 0
    )
    (file,) = tmp_path.glob("runs/**/metrics.json")
    found = json.loads(file.read_text(encoding="utf-8"))
    test, rows = found["splits"]["test"], {row["model"]: row["bits per base"] for row in found["baselines"]}
    assert sides in found["protocol"]
    assert rows["equal chances"] == 2
    assert rows["interpolated Markov model"] < 1.9
    assert ("interpolated Markov models of both sides" in rows) == (model == "bigla")
    assert 1.8 < test["bits per base"] < 2.3
    for name in ("along", "calibration", "bases"):
        assert (file.parent / "plots" / f"{name}.png").stat().st_size > 5000
    again = trainer.evaluate(APP, file.parent, overrides={"trainer.eval_batch_size": 7})["metrics"]
    assert again == pytest.approx(test, abs=1e-5)
