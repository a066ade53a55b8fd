"""Genomes in windows: every base of validation and test once, training inside its part."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from attn_genomics.data.check import check_file
from attn_genomics.data.fasta import turned
from attn_genomics.genome.cards import DATASETS
from attn_genomics.genome.data import EvalWindows, Made, TrainWindows, load_genome, prepare, repeated, split, words
from attn_genomics.genome.options import GenomeDataConfig
from attn_genomics.tokens import N, decode, encode
from attn_shared import datasets
from attn_shared.errors import UserError


def made(**lengths: int) -> Made:
    """Records without two equal places: base and place can be told from each other by `fetch`."""
    rng = np.random.default_rng(0)
    return Made("made.fa", {name: rng.integers(0, 4, size).astype(np.uint8) for name, size in lengths.items()})


@pytest.mark.parametrize("centred", [False, True])
@pytest.mark.parametrize(
    ("window", "context"), [(10, 5), (10, 1), (10, 9), (64, 32), (300, 150), (7, 3), (2, 1), (1000, 500)]
)
def test_every_base_is_scored_once(window: int, context: int, centred: bool) -> None:
    genome = made(a=203, b=7, c=64)
    genome._codes["a"][50:60] = N
    spans = [("a", 0, 100), ("a", 131, 203), ("b", 0, 7), ("c", 20, 40)]
    data = EvalWindows(genome, spans, window, context, centred=centred)
    seen = {name: np.zeros(size, int) for name, size in genome.lengths.items()}
    for index, (name, first, start, end) in enumerate(data.windows):
        item = data[index]
        assert item["tokens"].shape == item["scored"].shape == (window,)
        assert item["tokens"].dtype == torch.int64
        assert item["scored"].dtype == torch.bool
        assert int(item["index"]) == index
        places = first + torch.nonzero(item["scored"]).ravel().numpy()
        assert (genome.fetch(name)[places] == item["tokens"].numpy()[places - first]).all()
        seen[name][places] += 1
        behind = context // 2 if centred else 0
        assert first == 0 or start - first >= context - behind
        assert first + window >= genome.lengths[name] or first + window - end >= behind
    wanted = {name: np.zeros(size, int) for name, size in genome.lengths.items()}
    for name, start, end in spans:
        wanted[name][start:end] = genome.fetch(name, start, end) < N
    assert all((seen[name] == wanted[name]).all() for name in seen)
    assert data.bases == sum(end - start for _, start, end in spans)


def test_validation_may_be_cut_short() -> None:
    genome = made(a=1000, b=500)
    data = EvalWindows(genome, [("a", 100, 400), ("b", 0, 500)], 64, 32, bases=450)
    assert data.bases == 450
    assert {name for name, *_ in data.windows} == {"a", "b"}
    assert EvalWindows(genome, [("a", 100, 400), ("b", 0, 500)], 64, 32, bases=250).bases == 250


def test_training_windows_stay_in_their_part_and_follow_from_seed_and_epoch() -> None:
    genome = made(a=500, b=90, c=20)
    spans = [("a", 100, 300), ("b", 10, 80), ("c", 0, 20)]
    data = TrainWindows(genome, spans, 32, 32 * 400)
    assert len(data) == 400
    allowed = {decode(genome.fetch(name, at, at + 32)) for name, start, end in spans for at in range(start, end - 31)}
    short = decode(genome.fetch("c")) + "N" * 12
    data.set_epoch(3, 1)
    first = data.__getitems__(list(range(400)))["tokens"]
    texts = [decode(row) for row in first]
    assert set(texts) <= allowed | {short}
    assert short in texts
    assert len(set(texts)) > 150
    data.set_epoch(3, 2)
    assert not data.__getitems__(list(range(400)))["tokens"].equal(first)
    data.set_epoch(3, 1)
    assert data.__getitems__(list(range(400)))["tokens"].equal(first)
    assert data[7]["tokens"].equal(first[7])


def test_training_turns_half_of_its_windows_and_another_half_in_the_next_epoch() -> None:
    genome = made(a=3000, b=20)
    spans = [("a", 0, 3000), ("b", 0, 20)]
    plain, data = (TrainWindows(genome, spans, 32, 32 * 600, turned=one) for one in (False, True))
    seen = []
    for epoch in (1, 2):
        for one in (plain, data):
            one.set_epoch(5, epoch)
        forward, found = (one.__getitems__(list(range(600)))["tokens"] for one in (plain, data))
        other = (found != forward).any(dim=1)
        for row, strand in zip(forward[other], found[other]):
            assert strand.tolist() == turned(row.numpy()).tolist()
        assert float(other.float().mean()) == pytest.approx(0.5, abs=0.08)
        seen.append(other)
    assert float((seen[0] == seen[1]).float().mean()) == pytest.approx(0.5, abs=0.08)
    data.set_epoch(5, 2)
    assert data.__getitems__(list(range(600)))["tokens"].equal(found)
    data.set_epoch(6, 2)
    assert not data.__getitems__(list(range(600)))["tokens"].equal(found)
    assert not plain.other.any()


def test_validation_and_test_are_never_turned() -> None:
    genome = made(a=3000)
    plain, bundle = (prepare(genome, "x", GenomeDataConfig(window=64), turned=one) for one in (False, True))
    assert bundle.train.other.any()  # type: ignore[union-attr]
    for name in ("val", "test"):
        one, same = getattr(bundle, name), getattr(plain, name)
        rows = list(range(len(one)))
        assert one.__getitems__(rows)["tokens"].equal(same.__getitems__(rows)["tokens"])


def test_the_tail_of_every_record() -> None:
    genome = made(a=1000, b=200)
    parts, how = split(genome, "x", GenomeDataConfig(split="tail"))
    assert parts == [
        [("a", 0, 850), ("b", 0, 170)],
        [("a", 850, 900), ("b", 170, 180)],
        [("a", 900, 1000), ("b", 180, 200)],
    ]
    assert how == "the last 10% of every record for test, 5% before for validation"


def test_whole_records() -> None:
    genome = made(**{f"chr{i}": 300 + i for i in range(20)}, tiny=40)
    parts, how = split(genome, "x", GenomeDataConfig())
    names = [{name for name, *_ in spans} for spans in parts]
    assert sum(map(len, names)) == 20
    assert not names[0] & names[1] | names[1] & names[2] | names[0] & names[2]
    assert [len(one) for one in names] == [17, 1, 2]
    assert "1 records of less than 100 bases left out" in how
    named, _ = split(genome, "x", GenomeDataConfig(chromosomes_val=("3",), chromosomes_test=("chr5", "7")))
    assert [sorted(name for name, *_ in spans) for spans in named[1:]] == [["chr3"], ["chr5", "chr7"]]
    assert split(genome, "x", GenomeDataConfig(test=1))[0][:2] == [[], []]


def test_training_on_regions(tmp_path: Path) -> None:
    genome = made(a=1000, b=1000)
    (tmp_path / "r.bed").write_text("chra\t0\t100\nchra\t50\t200\nb\t880\t1000\n")
    bundle = prepare(genome, "x", GenomeDataConfig(window=16, regions=str(tmp_path / "r.bed")))
    assert bundle.train is not None
    assert bundle.train.spans == [("a", 0, 200)]  # type: ignore[attr-defined]
    assert bundle.test.bases == 200  # type: ignore[union-attr]
    assert "trained on 200 of 1,700 bases" in bundle.protocol
    (tmp_path / "r.bed").write_text("b\t950\t1000\n")
    with pytest.raises(UserError, match="holds no place in the training part"):
        prepare(genome, "x", GenomeDataConfig(window=16, regions=str(tmp_path / "r.bed")))


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"window": 1}, "window must be at least 2"),
        ({"context": 1024}, "context must be from 0 to less than the window"),
        ({"val": 0.5, "test": 0.5}, "leave nothing for training"),
        ({"test": 2.0}, "test is a share from 0 to 1"),
        ({"split": "tail", "chromosomes_test": ("a",)}, "are for --data_args.split chromosome"),
        ({"chromosomes_test": ("z",)}, "no chromosome 'z' for the test part; there are a, b, c"),
        ({"min_record": 5000}, "no record of x has 5000 bases or more"),
        ({"epoch_bases": -1}, "must not be negative"),
        ({"regions": "none.bed"}, "there is no file none.bed"),
    ],
)
def test_options_that_cannot_be(options: dict[str, object], sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        prepare(made(a=900, b=900, c=900), "x", GenomeDataConfig(**options))  # type: ignore[arg-type]


def test_words_are_those_of_either_strand() -> None:
    rng = np.random.default_rng(1)
    codes = rng.integers(0, 4, 70).astype(np.uint8)
    codes[40] = N
    found, clear = words(codes)
    assert clear.tolist() == [not 9 <= i <= 40 for i in range(39)][:39]

    def number(piece: np.ndarray) -> int:
        return int("".join(map(str, piece)), 4)

    for at in np.flatnonzero(clear):
        piece = codes[at : at + 32]
        assert int(found[at]) == min(number(piece), number(turned(piece)))
    assert len(words(codes[:31])[0]) == 0


def test_what_test_repeats_of_training_is_counted() -> None:
    genome = made(a=3200, b=320)
    genome._codes["b"][:64] = genome.fetch("a", 1000, 1064)
    genome._codes["b"][64:96] = turned(genome.fetch("a", 77, 109))
    assert repeated(genome, [("a", 0, 3200)], [("b", 0, 320)]).startswith("3 of 10 pieces of 32 bases (30.0%")
    assert repeated(genome, [("a", 0, 1001)], [("b", 0, 320)]).startswith("1 of 10 ")


def test_the_synthetic_genome() -> None:
    genome, again = load_genome("synthetic_genome"), load_genome("synthetic_genome")
    assert len(genome) == 300_000
    assert all((genome.fetch(name) == again.fetch(name)).all() for name in genome.names)
    bundle = prepare(genome, "synthetic_genome", GenomeDataConfig())
    assert bundle.train is not None
    assert bundle.state == {"length": 1024, "data": "synthetic_genome"}
    assert bundle.facts["bases (train / val / test)"] == "220,000 / 30,000 / 50,000"
    text = "".join(decode(genome.fetch(name)) for name in genome.names)
    box = "TTGACA" + "." * 17 + "TATAAT"
    import re

    other = decode(turned(encode(text)))
    assert min(len(re.findall(box, one)) for one in (text, other)) > 30
    assert "N" * 20 in text


def test_a_fasta_file_of_ones_own(tmp_path: Path) -> None:
    text = "".join(f">r{i}\n{decode(made(a=600 + i).fetch('a'))}\n" for i in range(12))
    path = tmp_path / "own.fna"
    path.write_text(text)
    bundle = prepare(load_genome(str(path)), str(path), GenomeDataConfig(window=50))
    assert bundle.train is not None
    assert bundle.val is not None
    assert bundle.test is not None
    assert check_file(path, GenomeDataConfig()) == []
    assert "the window" in check_file(path, GenomeDataConfig(window=4, context=9))[0]
    path.write_text(">a\nMKLE\n")
    assert "protein" in check_file(path)[0]


@pytest.mark.data
@pytest.mark.parametrize(
    ("name", "counts"), [("ecoli", "3,943,724 / 231,983 / 463,968"), ("lambda", "41,227 / 2,425 / 4,850")]
)
def test_the_end_of_real_genomes(name: str, counts: str) -> None:
    if datasets.state_of(DATASETS[name]) != "here":
        pytest.skip(f"{name} is not under ATTN_DATA")
    bundle = prepare(load_genome(name), name, GenomeDataConfig())
    assert bundle.facts["bases (train / val / test)"] == counts
    assert bundle.val.bases == min(200_000, int(counts.split(" / ")[1].replace(",", "")))  # type: ignore[union-attr]


@pytest.mark.data
def test_the_chromosomes_of_yeast() -> None:
    if datasets.state_of(DATASETS["yeast"]) != "here":
        pytest.skip("yeast is not under ATTN_DATA")
    genome = load_genome("yeast")
    parts, how = split(genome, "yeast", GenomeDataConfig())
    assert [[name for name, *_ in spans] for spans in parts[1:]] == [["V"], ["XVI"]]
    assert how == "XVI for test, V for validation"
    other, _ = split(genome, "yeast", GenomeDataConfig(chromosomes_test=("V",), chromosomes_val=("chrI",)))
    assert [[name for name, *_ in spans] for spans in other[1:]] == [["I"], ["V"]]
