"""Labelled sequences: readers of one's own files, splits without leaks, batches."""

from __future__ import annotations

import gzip
from pathlib import Path

import numpy as np
import pytest
import torch

from attn_genomics.cli import APP
from attn_genomics.data.check import check_file
from attn_genomics.data.fasta import Sequences, turned
from attn_genomics.sequences.cards import DATASETS, GUE
from attn_genomics.sequences.data import SequenceSet, load, load_bundle, prepare
from attn_genomics.sequences.labelled import Labelled
from attn_genomics.sequences.options import SequencesDataConfig
from attn_genomics.sequences.splits import TEST, TRAIN, VAL, choose_chromosomes, keys, overlap, random_parts
from attn_genomics.sequences.synthetic import FIRST, SECOND, synthetic
from attn_genomics.tokens import N, decode, encode
from attn_shared import datasets, options
from attn_shared.errors import UserError


def drawn(count: int, length: int = 20, seed: int = 0) -> list[str]:
    rng = np.random.default_rng(seed)
    return ["".join("ACGT"[i] for i in row) for row in rng.integers(0, 4, (count, length))]


def genome(folder: Path, **records: int) -> Path:
    path = folder / "genome.fa"
    text = [f">{name}\n{drawn(1, length, seed)[0]}\n" for seed, (name, length) in enumerate(records.items())]
    path.write_text("".join(text))
    return path


# -- splits ---------------------------------------------------------------------------------------------------------


def test_drawn_parts_keep_equal_sequences_and_other_strands_together() -> None:
    rows = [encode(one) for one in drawn(300)]
    rows += [turned(one) for one in rows[:100]] + rows[50:120]
    sequences = Sequences(rows)
    part = random_parts(keys(sequences), 0.1, 0.2, np.random.default_rng(0))
    assert all(either == 0 for _, either in overlap(sequences, part).values())
    assert np.bincount(part) / len(part) == pytest.approx([0.7, 0.1, 0.2], abs=0.03)
    again = random_parts(keys(sequences), 0.1, 0.2, np.random.default_rng(0))
    assert (part == again).all()


def test_the_overlap_is_counted_by_hand() -> None:
    sequences = Sequences([encode(one) for one in ("AACC", "GGTA", "AACC", "TACC", "CCCC", "ATAT")])
    part = np.array([TRAIN, TRAIN, TEST, TEST, TEST, VAL])
    assert overlap(sequences, part) == {"val in train": (0, 0), "test in train": (1, 2), "test in val": (0, 0)}


def test_whole_chromosomes() -> None:
    weight = {"I": 50, "II": 100, "III": 300, "IV": 550}
    for seed in range(20):
        part = choose_chromosomes(weight, (), (), 0.05, 0.1, np.random.default_rng(seed))
        assert sorted(set(part.values())) == [TRAIN, VAL, TEST]
        assert part["IV"] == TRAIN
    named = choose_chromosomes(weight, ("chrI",), ("IV",), 0.05, 0.1, np.random.default_rng(0))
    assert named == {"I": VAL, "II": TRAIN, "III": TRAIN, "IV": TEST}
    for val, test, sentence in (
        (("V",), (), "no chromosome 'V' for the val part; there are I, II"),
        (("I",), ("I",), "named twice"),
        (("I", "II"), ("III", "IV"), "leave none for training"),
    ):
        with pytest.raises(UserError, match=sentence):
            choose_chromosomes(weight, val, test, 0.1, 0.1, np.random.default_rng(0))


# -- the batch contract ---------------------------------------------------------------------------------------------


def test_batches_of_different_lengths() -> None:
    rows = [one[: 1 + i % 9] for i, one in enumerate(drawn(90))]
    label = np.array(["b" if one.startswith("A") else "a" for one in rows])
    data = Labelled(source="x", sequences=Sequences([encode(one) for one in rows]), label=label)
    bundle = prepare(data, SequencesDataConfig(val=0.2, test=0.2))
    assert bundle.state == {"classes": ["a", "b"], "length": 9, "data": "x"}
    for part in (bundle.train, bundle.val, bundle.test):
        assert part is not None
        batch = part.__getitems__(list(range(len(part))))  # type: ignore[attr-defined,arg-type]
        tokens, lengths = batch["tokens"], batch["lengths"]
        assert tokens.dtype == lengths.dtype == batch["label"].dtype == batch["index"].dtype == torch.int64
        assert tokens.shape == (len(part), int(lengths.max()))  # type: ignore[arg-type]
        assert batch["index"].tolist() == list(range(len(part)))  # type: ignore[arg-type]
        for row, size, label in zip(tokens, lengths, batch["label"]):
            text = decode(row[:size])
            assert label == text.startswith("A")
            assert (row[size:] == N).all()
        one = part[1]
        assert one["tokens"].shape == (int(one["lengths"]),)


def test_classes_hold_for_other_data() -> None:
    def labelled(names: list[str]) -> Labelled:
        rows = [encode(one) for one in drawn(len(names) * 10)]
        return Labelled(source="x", sequences=Sequences(rows), label=np.array(names * 10))

    state = prepare(labelled(["10", "9"]), SequencesDataConfig()).state
    assert state["classes"] == ["9", "10"]
    other = prepare(labelled(["10"]), SequencesDataConfig(test=1), state)
    assert other.train is None
    assert other.test is not None
    assert set(other.test.label.tolist()) == {1}  # type: ignore[attr-defined]
    assert other.state == state
    with pytest.raises(UserError, match="has the class '11', which the model does not know; it knows 9, 10"):
        prepare(labelled(["11", "9"]), SequencesDataConfig(), state)
    with pytest.raises(UserError, match="one class only"):
        prepare(labelled(["9"]), SequencesDataConfig())


def test_training_turns_half_of_its_sequences_and_another_half_in_the_next_epoch() -> None:
    data = load("synthetic", SequencesDataConfig())
    plain, bundle = (prepare(data, SequencesDataConfig(), turned=one) for one in (False, True))
    train = bundle.train
    assert train is not None
    rows = list(range(len(train)))  # type: ignore[arg-type]

    def tokens(dataset: object, count: int) -> torch.Tensor:
        batch = dataset.__getitems__(list(range(count)))  # type: ignore[attr-defined]
        assert (batch["lengths"] == batch["tokens"].shape[1]).all()
        return batch["tokens"]

    forward = tokens(plain.train, len(rows))
    drawn_twice = []
    for epoch in (1, 2):
        train.set_epoch(5, epoch)  # type: ignore[attr-defined]
        found = tokens(train, len(rows))
        other = (found != forward).any(dim=1)
        assert found[other].equal((3 - forward[other]).flip(1))
        assert float(other.float().mean()) == pytest.approx(0.5, abs=0.04)
        drawn_twice.append(other)
    assert float((drawn_twice[0] == drawn_twice[1]).float().mean()) == pytest.approx(0.5, abs=0.04)
    train.set_epoch(6, 1)  # type: ignore[attr-defined]
    assert not tokens(train, len(rows)).ne(forward).any(dim=1).equal(drawn_twice[0])
    train.set_epoch(5, 1)  # type: ignore[attr-defined]
    assert tokens(train, len(rows)).ne(forward).any(dim=1).equal(drawn_twice[0])
    for name in ("val", "test"):
        part, same = getattr(bundle, name), getattr(plain, name)
        part.set_epoch(5, 1)
        assert tokens(part, len(part)).equal(tokens(same, len(same)))


def test_what_stands_behind_a_turned_sequence_stays_behind_it() -> None:
    rows = [encode(one[: 3 + i % 7]) for i, one in enumerate(drawn(60))]
    train = SequenceSet(Sequences(rows), np.zeros(60, np.int64), turned=True)
    batch = train.__getitems__(list(range(60)))
    for i, (row, size) in enumerate(zip(batch["tokens"], batch["lengths"].tolist())):
        assert row[:size].tolist() == (turned(rows[i]) if train.other[i] else rows[i]).tolist()
        assert (row[size:] == N).all()


@pytest.mark.parametrize(("rc", "wanted"), [("none", 0), ("augment", 1), ("average", 1), ("equivariant", 0)])
def test_which_forms_turn_training_sequences(rc: str, wanted: int) -> None:
    words = ["--kind", "sequences", "--data", "synthetic", "--task_args.rc", rc, "--preset", "none"]
    train = load_bundle(options.resolve(APP, options.split(words))).train
    assert train.other.any() == wanted  # type: ignore[union-attr]


def test_a_learning_curve_draws_from_training_only() -> None:
    data = load("synthetic", SequencesDataConfig())
    whole, part = (prepare(data, SequencesDataConfig(max_train=count)) for count in (0, 100))
    assert len(part.train) == 100  # type: ignore[arg-type]
    assert len(part.test) == len(whole.test) == 800  # type: ignore[arg-type]
    assert part.test[5]["tokens"].equal(whole.test[5]["tokens"])  # type: ignore[index]


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"val": 1.5}, "val is a share from 0 to 1"),
        ({"val": 0.6, "test": 0.6}, "leave nothing for training"),
        ({"max_train": -1}, "max_train must not be negative"),
        ({"length": -1}, "length must not be negative"),
        ({"split": "chromosome"}, "does not say on which chromosomes"),
        ({"split": "random", "chromosomes_test": ("I",)}, "are for --data_args.split chromosome"),
        ({"fasta": "x.fa"}, "are for files of your own"),
    ],
)
def test_options_that_cannot_be(options: dict[str, object], sentence: str) -> None:
    args = SequencesDataConfig(**options)  # type: ignore[arg-type]
    with pytest.raises(UserError, match=sentence):
        prepare(load("synthetic", args), args)


# -- the embedded set -----------------------------------------------------------------------------------------------


def test_the_synthetic_grammar() -> None:
    codes, label = synthetic()
    assert len(codes) == 4000
    assert label.mean() == 0.5
    again, _ = synthetic()
    assert all((one == other).all() for one, other in zip(codes, again))
    words = [FIRST, SECOND, *(decode(turned(encode(one))) for one in (FIRST, SECOND))]
    texts = [decode(one) for one in codes]
    held = np.array([[text.count(word) for word in words] for text in texts])
    # Every sequence holds both motifs, on one strand or the other, and both classes each form equally often.
    assert (held[:, 0] + held[:, 2] >= 1).all()
    assert (held[:, 1] + held[:, 3] >= 1).all()
    assert held[label == 1].mean(axis=0) == pytest.approx(held[label == 0].mean(axis=0), abs=0.06)
    right = 0
    for text, one in zip(texts, label):
        if one:
            strands = (text, decode(turned(encode(text))))
            distance = [
                s.find(SECOND, s.find(FIRST) + 8) - s.find(FIRST) - 8 for s in strands if FIRST in s and SECOND in s
            ]
            right += any(8 <= gap < 13 for gap in distance)
    assert right >= 0.99 * label.sum()


def test_counts_of_words_do_not_tell_the_classes() -> None:
    from sklearn.feature_extraction.text import CountVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.metrics import matthews_corrcoef

    codes, label = synthetic()
    texts = [decode(one) for one in codes]
    counts = CountVectorizer(analyzer="char", ngram_range=(4, 4), lowercase=False).fit_transform(texts)
    model = LogisticRegression(C=0.01, max_iter=200).fit(counts[:2800], label[:2800])
    assert abs(matthews_corrcoef(label[2800:], model.predict(counts[2800:]))) < 0.12


# -- files of one's own ---------------------------------------------------------------------------------------------


def test_a_table_with_its_own_split(tmp_path: Path) -> None:
    rows = drawn(40)
    parts = ["train"] * 20 + ["test"] * 20
    lines = [f"{one},{i % 2},{part}" for i, (one, part) in enumerate(zip(rows, parts))]
    (tmp_path / "a.csv").write_text("sequence,label,split\n" + "\n".join(lines) + "\n")
    bundle = prepare(load(str(tmp_path / "a.csv"), SequencesDataConfig()), SequencesDataConfig())
    assert [len(part) for part in (bundle.train, bundle.val, bundle.test)] == [18, 2, 20]  # type: ignore[arg-type]
    assert "10% of its training part drawn for val" in bundle.protocol


def test_leaks_between_given_parts_are_counted_and_told(tmp_path: Path) -> None:
    rows = drawn(10)
    other = decode(turned(encode(rows[1])))
    lines = [f"{one},{i % 2},train" for i, one in enumerate(rows)]
    lines += [f"{rows[0]},0,test", f"{other},1,test", f"{'ACGT' * 5},0,test", f"{rows[2]},1,dev"]
    (tmp_path / "a.csv").write_text("sequence,label,split\n" + "\n".join(lines) + "\n")
    bundle = prepare(load(str(tmp_path / "a.csv"), SequencesDataConfig()), SequencesDataConfig())
    assert bundle.facts["test sequences that are also in train"] == "1 of 3, 2 with other strands"
    assert "1 of 3 test sequences are in the training part, too (2 with other strands)" in bundle.protocol
    assert bundle.facts["repeated sequences"] == "3 (other strands too); 1 have several classes"
    problems = check_file(tmp_path / "a.csv")
    assert [problem.split(": ")[1] for problem in problems] == [
        "repeated sequences",
        "val sequences that are also in train",
        "test sequences that are also in train",
    ]


def test_a_folder_with_one_fasta_a_class(tmp_path: Path) -> None:
    folder = tmp_path / "set"
    folder.mkdir()
    for seed, name in enumerate(("promoter.fa", "other.fasta.gz")):
        text = "".join(f">r\n{one}\n" for one in drawn(30, 12, seed)).encode()
        (folder / name).write_bytes(gzip.compress(text) if name.endswith(".gz") else text)
    (folder / "README.md").write_text("words")
    data = load(str(folder), SequencesDataConfig())
    assert sorted(set(data.label.tolist())) == ["other", "promoter"]
    assert len(data.sequences) == 60
    assert prepare(data, SequencesDataConfig()).state["length"] == 12
    assert check_file(folder) == []
    (folder / "other.fasta.gz").unlink()
    assert "one class only, 'promoter'" in check_file(folder)[0]
    (folder / "promoter.fa").unlink()
    assert "holds no FASTA file (one a class)" in check_file(folder)[0]


def test_a_folder_of_gue(tmp_path: Path) -> None:
    for part, count in (("train", 20), ("dev", 6), ("test", 8)):
        lines = [f"{one},{i % 2}" for i, one in enumerate(drawn(count, 15, count))]
        (tmp_path / f"{part}.csv").write_text("sequence,label\n" + "\n".join(lines) + "\n")
    bundle = prepare(load(str(tmp_path), SequencesDataConfig()), SequencesDataConfig())
    assert [len(part) for part in (bundle.train, bundle.val, bundle.test)] == [20, 6, 8]  # type: ignore[arg-type]


def test_the_official_format_of_genomic_benchmarks(tmp_path: Path) -> None:
    from attn_genomics.data.fasta import Genome

    fasta = genome(tmp_path, chr1=400, chr2=300)
    folder = tmp_path / "set"
    for part in ("train", "test"):
        (folder / part).mkdir(parents=True)
        for shift, name in enumerate(("negative", "positive")):
            rows = [f"{i},chr{1 + i % 2},{10 * i + shift},{10 * i + 30 + shift},{'+-'[i % 2]}" for i in range(20)]
            text = "id,region,start,end,strand\n" + "\n".join(rows) + "\n"
            (folder / part / f"{name}.csv.gz").write_bytes(gzip.compress(text.encode()))
    (folder / "metadata.yaml").write_text("version: 0\n")
    args = SequencesDataConfig(fasta=str(fasta))
    data = load(str(folder), args)
    assert data.part is not None
    assert np.bincount(data.part).tolist() == [40, 0, 40]
    read = Genome(fasta)
    first = int(np.flatnonzero(data.label == "positive")[0])
    assert decode(data.sequences[first]) == decode(read.fetch("chr1", 1, 31))
    assert decode(data.sequences[first + 1]) == decode(turned(read.fetch("chr2", 11, 41)))
    bundle = prepare(data, args)
    assert bundle.state["classes"] == ["negative", "positive"]
    assert bundle.val is not None
    with pytest.raises(UserError, match=r"name the genome they are of with --data_args\.fasta"):
        load(str(folder), SequencesDataConfig())
    (folder / "test" / "positive.csv.gz").unlink()
    with pytest.raises(UserError, match="hold different classes: positive"):
        load(str(folder), args)


def test_texts_one_sequence_a_file(tmp_path: Path) -> None:
    for part in ("train", "test"):
        for name in ("a", "b"):
            (tmp_path / part / name).mkdir(parents=True)
            for i, one in enumerate(drawn(5, 9, ord(name))):
                (tmp_path / part / name / f"{i}.txt").write_text(one + "\n")
    data = load(str(tmp_path), SequencesDataConfig())
    assert len(data.sequences) == 20
    assert sorted(set(data.label.tolist())) == ["a", "b"]


def test_bed_against_places_outside(tmp_path: Path) -> None:
    fasta = genome(tmp_path, chr1=2000, chr2=2000, chr3=2000)
    rows = [(f"chr{c}", 100 * i, 100 * i + 40, f"p{c}{i}") for c in (1, 2, 3) for i in range(15)]
    (tmp_path / "a.bed").write_text("".join(f"{c}\t{s}\t{e}\t{n}\t0\t-\n" for c, s, e, n in rows))
    args = SequencesDataConfig(fasta=str(fasta))
    data = load(str(tmp_path / "a.bed"), args)
    assert data.classes == ["outside", "inside"]
    assert np.unique(data.label, return_counts=True)[1].tolist() == [45, 45]
    from attn_genomics.data.fasta import Genome

    read = Genome(fasta)
    covered = {"".join(decode(read.fetch(c, s, e))) for c, s, e, _ in rows}
    for row in np.flatnonzero(data.label == "outside"):
        text = decode(turned(data.sequences[row]))
        place = decode(read.fetch(str(data.group[row]))).find(text)  # type: ignore[index]
        assert place >= 0
        assert text not in covered
        assert all(place + 40 <= s or place >= e for c, s, e, _ in rows if c == data.group[row])  # type: ignore[index]
    bundle = prepare(data, args)
    assert "by chromosome" in bundle.protocol


def test_bed_with_classes_in_its_fourth_column(tmp_path: Path) -> None:
    fasta = genome(tmp_path, one=1000)
    rows = [f"one\t{20 * i}\t{20 * i + 10}\t{'enhancer' if i % 3 else 'silencer'}\n" for i in range(40)]
    (tmp_path / "a.bed").write_text("".join(rows))
    data = load(str(tmp_path / "a.bed"), SequencesDataConfig(fasta=str(fasta), length=30))
    assert sorted(set(data.label.tolist())) == ["enhancer", "silencer"]
    assert set(data.sequences.lengths.tolist()) == {30}
    assert decode(data.sequences[0]).startswith("N" * 10)  # widened beyond the record's beginning


def test_gtf_features_against_the_rest(tmp_path: Path) -> None:
    fasta = genome(tmp_path, chrI=3000)
    rows = [f"I\tx\tCDS\t{200 * i + 1}\t{200 * i + 50}\t.\t+\t0\tid\n" for i in range(12)]
    (tmp_path / "a.gtf").write_text("".join(rows) + rows[0])
    args = SequencesDataConfig(fasta=str(fasta), length=60)
    data = load(str(tmp_path / "a.gtf"), args)
    assert data.classes == ["other", "CDS"]
    assert len(data.sequences) == 24
    assert any("1 places that repeat another one left out" in note for note in data.notes)
    assert any("I to chrI" in note for note in data.notes)
    assert check_file(tmp_path / "a.gtf") == []
    with pytest.raises(UserError, match="no feature 'exon'; it holds CDS"):
        load(str(tmp_path / "a.gtf"), SequencesDataConfig(fasta=str(fasta), feature="exon"))


def test_one_fasta_file_has_no_classes(tmp_path: Path) -> None:
    (tmp_path / "a.fa").write_text(">a\nACGT\n")
    with pytest.raises(UserError, match="a folder with one FASTA file for each class"):
        load(str(tmp_path / "a.fa"), SequencesDataConfig())
    assert check_file(tmp_path / "a.fa") == []
    (tmp_path / "b.fa").write_text(">a\n>b\nNNNN\n>c\nA\n")
    assert [problem.split(": ", 1)[1] for problem in check_file(tmp_path / "b.fa")] == [
        "record 'a' is empty",
        "80% of its 5 bases are unknown (N or other letters)",
    ]


# -- real data --------------------------------------------------------------------------------------------------------


def _here(name: str) -> None:
    if datasets.state_of(DATASETS[name]) != "here":
        pytest.skip(f"{name} is not under ATTN_DATA")


_REPEATS = {"gue_tf_1": 1, "gue_tf_3": 1, "gue_prom_core_all": 43, "gue_prom_core_notata": 30}
_REPEATS |= {"gue_prom_core_tata": 16, "gue_prom_300_tata": 6}


@pytest.mark.data
@pytest.mark.parametrize("name", ["gue_mouse_2", "gue_mouse_3", "gue_prom_core_tata", "gue_prom_300_tata"])
def test_gue(name: str) -> None:
    _here(name)
    bundle = prepare(load(name, SequencesDataConfig()), SequencesDataConfig())
    counts = [len(part) for part in (bundle.train, bundle.val, bundle.test)]  # type: ignore[arg-type]
    assert DATASETS[name].size.startswith(" / ".join(f"{count:,}" for count in counts))
    repeats = _REPEATS.get(name, 0)
    assert bundle.facts["test sequences that are also in train"].startswith(f"{repeats} of {counts[2]}")
    assert bundle.protocol.startswith("GUE: chosen on dev, reported on test")
    assert bundle.state["classes"] == ["0", "1"]


def test_gue_has_13_tasks() -> None:
    assert len(GUE) == 13
    assert all(len(DATASETS[name].files) == 3 for name in GUE)


@pytest.mark.data
def test_genomic_benchmarks_are_for_evaluation() -> None:
    _here("nontata_promoters")
    bundle = prepare(load("nontata_promoters", SequencesDataConfig()), SequencesDataConfig())
    assert bundle.train is None
    assert bundle.val is None
    assert len(bundle.test) == 9034  # type: ignore[arg-type]
    assert int(bundle.test.label.sum()) == 4915  # type: ignore[union-attr]


@pytest.mark.data
def test_yeast_coding() -> None:
    _here("yeast_coding")
    args = SequencesDataConfig()
    data = load("yeast_coding", args)
    assert set(data.sequences.lengths.tolist()) == {200}
    assert set(data.group[data.part == TEST]) == {"XVI"}  # type: ignore[index]
    assert set(data.group[data.part == VAL]) == {"V"}  # type: ignore[index]
    # Genes are open reading frames: in one of six frames a coding piece has no stop codon.
    stops = {"TAA", "TAG", "TGA"}

    def opened(text: str) -> bool:
        ways = (text, decode(turned(encode(text))))
        return any(not stops & {way[i : i + 3] for i in range(frame, 198, 3)} for way in ways for frame in range(3))

    rng = np.random.default_rng(0)
    share = {
        name: np.mean(
            [opened(decode(data.sequences[row])) for row in rng.permutation(np.flatnonzero(data.label == name))[:300]]
        )
        for name in ("coding", "other")
    }
    assert share["coding"] > 0.97
    assert share["other"] < 0.5


def test_training_sequences_are_moved_and_mutated_otherwise_in_each_epoch():
    rng = np.random.default_rng(0)
    codes = [rng.integers(0, 4, length).astype(np.uint8) for length in (30, 20, 30, 25) * 20]
    plain = SequenceSet(Sequences(codes), np.zeros(80))
    moved = SequenceSet(Sequences(codes), np.zeros(80), shift=4)
    moved.set_epoch(1, 1)
    rows = list(range(80))
    found, usual = moved.__getitems__(rows), plain.__getitems__(rows)
    assert torch.equal(found["lengths"], usual["lengths"])
    by = set()
    for row, length in enumerate(usual["lengths"].tolist()):
        steps = int(moved.moved[row])
        by.add(steps)
        now, before = found["tokens"][row], usual["tokens"][row]
        lost = abs(steps)
        assert (now[length:] == N).all()
        if steps >= 0:
            assert torch.equal(now[lost:length], before[: length - lost])
            assert (now[:lost] == N).all()
        else:
            assert torch.equal(now[: length - lost], before[lost:length])
            assert (now[length - lost :] == N).all()
    assert by == set(range(-4, 5))

    mutated = SequenceSet(Sequences(codes), np.zeros(80), mutate=0.2)
    mutated.set_epoch(1, 1)
    first = mutated.__getitems__(rows)["tokens"]
    share = (first != usual["tokens"]).sum() / usual["lengths"].sum()
    assert 0.12 < share < 0.18  # a quarter of the bases drawn are as before
    alone = mutated[1]["tokens"]  # shorter than others of its batch
    assert torch.equal(alone, first[1, : len(alone)])
    mutated.set_epoch(1, 2)
    assert not torch.equal(mutated.__getitems__(rows)["tokens"], first)
    mutated.set_epoch(1, 1)
    assert torch.equal(mutated.__getitems__(rows)["tokens"], first)
    assert torch.equal(plain.__getitems__(rows)["tokens"], usual["tokens"])  # what is kept has not changed


def test_only_training_is_moved_and_mutated():
    args = SequencesDataConfig(shift=5, mutate=0.1)
    bundle = prepare(load("synthetic", args), args)
    assert (bundle.train.shift, bundle.train.mutate) == (5, 0.1)
    assert (bundle.test.shift, bundle.test.mutate) == (bundle.val.shift, bundle.val.mutate) == (0, 0.0)
    for wrong in (SequencesDataConfig(shift=-1), SequencesDataConfig(mutate=1.0)):
        with pytest.raises(UserError, match="shift must not be negative"):
            prepare(load("synthetic", wrong), wrong)
