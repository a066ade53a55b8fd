"""Classes of sequences in files, against the model asked directly."""

from __future__ import annotations

import functools
import gzip
from itertools import pairwise
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from attn_genomics.cli import APP
from attn_genomics.data import fasta
from attn_genomics.sequences import predict
from attn_genomics.sequences.task import SequencesTask
from attn_genomics.tokens import decode, encode, reverse_complement
from attn_shared import options, trainer
from attn_shared.errors import UserError

LENGTH, STRIDE = 40, 15


@pytest.fixture(scope="module")
def task() -> SequencesTask:
    config = options.config_from_dict(
        APP,
        {
            **{"app": "genomics", "kind": "sequences", "model": "cnn", "data": "synthetic"},
            **{"model_args": {"channels": 8}, "trainer": {"eval_batch_size": 7}},
        },
    )
    made = trainer.build_task(APP, config, {"classes": ["no", "yes"], "length": LENGTH})
    assert isinstance(made, SequencesTask)
    with torch.no_grad():
        for weight in made.parameters():
            weight.mul_(2.0)  # so that windows differ
    return made.eval()


@pytest.fixture(scope="module")
def records() -> dict[str, str]:
    rng = np.random.default_rng(0)
    drawn = {name: decode(rng.integers(0, 4, size)) for name, size in (("long", 333), ("short", 25), ("even", 40))}
    return {**drawn, "empty": "", "gap": "N" * 90, "soft": drawn["long"][:30].lower() + "NN" + drawn["long"][40:90]}


@pytest.fixture(scope="module")
def file(records: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("fasta") / "genome.fa"
    path.write_text("".join(f">{name} described\n{text}\n" for name, text in records.items()))
    return path


def asked(task: SequencesTask, text: str) -> float:
    tokens = torch.from_numpy(encode(text).astype(np.int64))[None]
    with torch.no_grad():
        return float(task.network.probabilities(tokens, torch.tensor([len(text)]))[0, 1])


def run(task: SequencesTask, path: Path, output: Path, **chosen: object) -> pd.DataFrame:
    output.mkdir(exist_ok=True)
    (target,) = predict.predict_files(task, [path], output, {"stride": STRIDE, **chosen})
    return pd.read_csv(target, sep="\t", dtype={"name": str, "class": str})


def test_windows_are_the_models(
    task: SequencesTask, file: Path, records: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = run(task, file, tmp_path)
    assert list(dict.fromkeys(found["name"])) == ["long", "short", "even", "soft"]  # order kept
    for row in found.itertuples():
        expected = asked(task, records[row.name][row.start : row.end])
        assert row.p_yes == pytest.approx(expected, abs=2e-6)
        assert row.p_no == pytest.approx(1 - expected, abs=2e-6)
        assert row._5 == ("yes" if expected > 0.5 else "no")
    long = found[found["name"] == "long"]
    assert long["start"].tolist() == [*range(0, 333 - LENGTH, STRIDE), 333 - LENGTH]
    assert (long["end"] - long["start"] == LENGTH).all()
    assert found["p_yes"].std() > 1e-3
    told = capsys.readouterr().err
    assert "1 empty sequences left out" in told
    assert "windows without a known base left out" in told
    assert f"{333 + 25 + 40 + 82:,} bases" in told
    whole = run(task, file, tmp_path, whole=True)
    assert len(whole) == 4
    assert whole["p_yes"][0] == pytest.approx(asked(task, records["long"]), abs=2e-6)


def test_pieces_and_packing_change_nothing(
    task: SequencesTask, file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = run(task, file, tmp_path)
    packed = tmp_path / "packed.fasta.gz"
    packed.write_bytes(gzip.compress(file.read_bytes()))
    pd.testing.assert_frame_equal(run(task, packed, tmp_path), expected)
    for piece in (1, 37, 55, 100):
        monkeypatch.setattr(predict, "stream", functools.partial(fasta.stream, piece=piece))
        pd.testing.assert_frame_equal(run(task, file, tmp_path), expected)


def test_places(task: SequencesTask, file: Path, records: dict[str, str], tmp_path: Path) -> None:
    bed = tmp_path / "places.bed"
    bed.write_text("chrlong\t100\t130\ta\t0\t-\nlong\t5\t35\tb\t0\t+\nsoft\t0\t60\tc\t0\t-\n")
    found = run(task, bed, tmp_path, fasta=str(file))
    assert found["name"].tolist()[:2] == ["long", "long"]
    assert found["strand"].tolist() == ["-", "+", "-", "-", "-"]
    for row in found.itertuples():
        text = records[row.name][row.start : row.end]
        if row.strand == "-":
            text = decode(reverse_complement(torch.from_numpy(encode(text).astype(np.int64))[None])[0])
        assert row.p_yes == pytest.approx(asked(task, text), abs=2e-6)
    with pytest.raises(UserError, match=r"name the genome they are of with --fasta"):
        run(task, bed, tmp_path)


def test_bed_and_bedgraph(task: SequencesTask, file: Path, tmp_path: Path) -> None:
    table = run(task, file, tmp_path)
    (target,) = predict.predict_files(task, [file], tmp_path, {"format": "bed", "stride": STRIDE})
    kept = [line.split("\t") for line in target.read_text(encoding="utf-8").splitlines()]
    yes = table[table["p_yes"] > 0.5]
    assert [(row[0], int(row[1]), int(row[2])) for row in kept] == list(zip(yes["name"], yes["start"], yes["end"]))
    assert {row[3] for row in kept} <= {"yes"}
    (target,) = predict.predict_files(
        task, [file], tmp_path, {"format": "bedgraph", "stride": STRIDE, "of_class": "no"}
    )
    head, *lines = target.read_text(encoding="utf-8").splitlines()
    assert head.startswith("track type=bedGraph")
    rows = [(name, int(a), int(b), float(value)) for name, a, b, value in (line.split("\t") for line in lines)]
    for one, other in pairwise(rows):
        assert one[0] != other[0] or one[2] == other[1]  # every base once, in order
    for name, start, end, value in rows:
        here = table[(table["name"] == name) & (table["start"] <= start) & (table["end"] > (start + end) / 2)]
        assert value == pytest.approx(here["p_no"].mean(), abs=2e-6)
    assert sum(end - start for name, start, end, _ in rows if name == "long") == 333


def test_tables(task: SequencesTask, records: dict[str, str], tmp_path: Path) -> None:
    path = tmp_path / "own.csv"
    pd.DataFrame({"id": ["a", "b"], "dna": [records["short"], records["even"]]}).to_csv(path, index=False)
    found = run(task, path, tmp_path)
    assert found["name"].tolist() == ["a", "b"]
    assert found["p_yes"][1] == pytest.approx(asked(task, records["even"]), abs=2e-6)


def test_nothing_is_left_of_a_bad_file(task: SequencesTask, file: Path, tmp_path: Path) -> None:
    bad = tmp_path / "bad.fa"
    bad.write_text(f">a\n{'ACGT' * 100}\n>b\nMKLV\n")
    with pytest.raises(UserError, match=r"bad.fa:4: .* amino acid"):
        run(task, bad, tmp_path / "out")
    assert not list((tmp_path / "out").iterdir())
    for chosen, message in (
        ({"stride": -1}, r"--stride must be 0 or more"),
        ({"of_class": "maybe"}, r"no class 'maybe'; its classes are no, yes"),
    ):
        with pytest.raises(UserError, match=message):
            run(task, file, tmp_path / "out", **chosen)
    with pytest.raises(UserError, match=r"two inputs are called 'genome'"):
        predict.predict_files(task, [file, tmp_path / "genome.fa.gz"], tmp_path, {})
