"""FASTA files: what is read is what HTSlib reads, and what is no DNA is told with its line."""

from __future__ import annotations

import gzip
from pathlib import Path

import numpy as np
import pysam
import pytest

from attn_genomics.data import fasta
from attn_genomics.data.fasta import Genome, Sequences, records, stream, turned
from attn_genomics.data.windows import cut, gaps, intersect, merge
from attn_genomics.tokens import N, decode, encode
from attn_shared.errors import UserError

PLAIN = b">one first record\nACGTACGTNN\nacgtnACGT\n>two\nGGGCCCTTTAAARYK\n\n>three x\nA\n"
EXPECTED = {"one": "ACGTACGTNNACGTNACGT", "two": "GGGCCCTTTAAANNN", "three": "A"}


def write(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


def contents(path: Path) -> dict[str, str]:
    return {name: decode(codes) for name, codes in records(path)}


@pytest.mark.parametrize(
    "content",
    [
        PLAIN,
        PLAIN.rstrip(b"\n"),
        PLAIN.replace(b"\n", b"\r\n"),
        PLAIN.replace(b"\n", b"\r"),
        b"\xef\xbb\xbf" + PLAIN,
        b"\n\n" + PLAIN + b"\n\n",
        PLAIN.replace(b"ACGTACGTNN\nacgtnACGT\n", b"ACGTACGTNNacgtnACGT\n"),
    ],
    ids=["plain", "no last line end", "CRLF", "CR", "byte order mark", "blank lines", "one line"],
)
def test_forms_of_text(tmp_path: Path, content: bytes) -> None:
    assert contents(write(tmp_path / "a.fa", content)) == EXPECTED


def test_gzip_and_bgzip_whatever_the_name(tmp_path: Path) -> None:
    assert contents(write(tmp_path / "a.fa", gzip.compress(PLAIN))) == EXPECTED
    with pysam.BGZFile(str(tmp_path / "b.fa.gz"), "wb") as file:
        file.write(PLAIN)
    assert fasta.is_bgzip(tmp_path / "b.fa.gz")
    assert contents(tmp_path / "b.fa.gz") == EXPECTED


@pytest.mark.parametrize("read", [1, 2, 3, 7, 64])
def test_blocks_may_end_anywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, read: int) -> None:
    monkeypatch.setattr(fasta, "_READ", read)
    for number, content in enumerate((PLAIN, PLAIN.replace(b"\n", b"\r\n"), b"\n" + PLAIN)):
        assert contents(write(tmp_path / f"{number}.fa", content)) == EXPECTED
    for bad, line in ((b">a\nACGT\nAC>T\n", 3), (b">a\n>b\n\nAC!T\n", 4)):
        with pytest.raises(UserError, match=rf"x\.fa:{line}: "):
            list(stream(write(tmp_path / "x.fa", bad)))


def test_pieces_are_full_and_join_to_the_record(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    codes = {name: rng.integers(0, 5, size).astype(np.uint8) for name, size in (("a", 1000), ("b", 300), ("c", 7))}
    text = "".join(
        f">{name}\n" + "\n".join(decode(x)[i : i + 60] for i in range(0, len(x), 60)) + "\n"
        for name, x in codes.items()
    )
    found: dict[str, list[fasta.Piece]] = {}
    for piece in stream(write(tmp_path / "a.fa", text.encode()), piece=100):
        found.setdefault(piece.name, []).append(piece)
    for name, pieces in found.items():
        assert [piece.last for piece in pieces] == [False] * (len(pieces) - 1) + [True]
        assert [piece.start for piece in pieces] == [100 * i for i in range(len(pieces))]
        assert all(len(piece.codes) == 100 for piece in pieces[:-1])
        assert (np.concatenate([piece.codes for piece in pieces]) == codes[name]).all()


def test_streaming_keeps_memory_flat(tmp_path: Path) -> None:
    import tracemalloc

    path = tmp_path / "long.fa"
    with path.open("wb") as file:
        file.write(b">long\n")
        for _ in range(200):
            file.write(b"ACGTTGCAAC" * 10_000 + b"\n")
    tracemalloc.start()
    total = sum(len(piece.codes) for piece in stream(path))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert total == 20_000_000
    assert peak < 12_000_000


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b"", "is empty"),
        (b" \n\n", "is empty but for white space"),
        (b"ACGT\n", ":1: no FASTA, which begins with '>'"),
        (b"@read\nACGT\n+\nIIII\n", ":1: begins with '@' as FASTQ does"),
        (b">a\nACGT\n>\nACGT\n", ":3: a record without a name"),
        (b">a\nACGT\n> b\nACGT\n", ":3: a record without a name"),
        (b">a\nACGT\n>b\nAC\n>a\nA\n", ":5: a second record 'a', as on line 1"),
        (b">a\nACGT\n>b\nACGTMKLEW\n", ":4: 'L' is an amino acid's letter; the file holds protein"),
        (b">a\nAC--GT\n", ":2: '-' is no nucleotide; take gaps"),
        (b">a\nACGT*\n", ":2: '\\*' is no nucleotide"),
        (b">a\nACGT\nAC>GT\n", ":3: '>' inside a line"),
        (b">a\n;comment\nACGT\n", ":2: ';' comments"),
        (b">a\nAC1GT\n", ":2: '1' is no nucleotide"),
        (b">a\nACGT\0\n", ":2: a zero byte"),
        (b"\0\1\2\3", "is binary"),
        (gzip.compress(PLAIN * 100)[:-30], "is damaged or cut off"),
    ],
)
def test_refusals_name_file_and_line(tmp_path: Path, content: bytes, sentence: str) -> None:
    with pytest.raises(UserError, match=f"bad\\.fa ?{sentence}") as error:
        list(stream(write(tmp_path / "bad.fa", content)))
    assert "\n" not in str(error.value)


def test_missing_files_and_folders(tmp_path: Path) -> None:
    for path in (tmp_path / "none.fa", tmp_path):
        with pytest.raises(UserError, match=r"there is no file|is a folder"):
            list(stream(path))
        with pytest.raises(UserError, match=r"there is no file|is a folder"):
            Genome(path)


def test_names_may_repeat_where_nobody_asks_by_name(tmp_path: Path) -> None:
    path = write(tmp_path / "a.fa", b">a\nAC\n>a\nGT\n")
    assert [decode(codes) for _, codes in records(path, distinct=False)] == ["AC", "GT"]


def test_empty_records_stay_and_are_told(tmp_path: Path) -> None:
    genome = Genome(write(tmp_path / "a.fa", b">a\n>b\nACGT\n>c\n"))
    assert genome.empty == ["a", "c"]
    assert genome.lengths == {"a": 0, "b": 4, "c": 0}
    with pytest.raises(UserError, match="records but no bases"):
        Genome(write(tmp_path / "b.fa", b">a\n"))


@pytest.mark.parametrize("packed", [False, True])
def test_the_index_gives_what_memory_gives(tmp_path: Path, packed: bool) -> None:
    path = tmp_path / ("a.fa.gz" if packed else "a.fa")
    text = b">one\n" + b"ACGTN\n" * 40 + b">two\nGATTACA\n"
    if packed:
        with pysam.BGZFile(str(path), "wb") as file:
            file.write(text)
    else:
        path.write_bytes(text)
    memory, indexed = Genome(path, in_memory=True), Genome(path, in_memory=False)
    assert indexed.indexed
    assert not memory.indexed
    assert path.with_name(path.name + ".fai").is_file()
    assert memory.names == indexed.names
    assert memory.lengths == indexed.lengths
    for name, start, end in (("one", 0, 200), ("one", 37, 91), ("two", 3, 3), ("two", 0, 7)):
        assert (memory.fetch(name, start, end) == indexed.fetch(name, start, end)).all()
    for genome in (memory, indexed):
        with pytest.raises(ValueError, match="not within its 7 bases"):
            genome.fetch("two", 5, 8)


def test_what_cannot_be_indexed_is_kept_in_memory(tmp_path: Path) -> None:
    plain_gzip = write(tmp_path / "a.fa.gz", gzip.compress(PLAIN))
    ragged = write(tmp_path / "b.fa", b">a\nACGT\nAC\nACGTACGT\n")
    for path in (plain_gzip, ragged):
        genome = Genome(path, in_memory=False)
        assert not genome.indexed
    assert decode(genome.fetch("a")) == "ACGTACACGTACGT"


def test_an_old_index_is_made_anew(tmp_path: Path) -> None:
    import os

    path = write(tmp_path / "a.fa", b">a\nACGT\n")
    assert Genome(path, in_memory=False).lengths == {"a": 4}
    path.write_bytes(b">a\nACGTAA\n>b\nAC\n")
    os.utime(tmp_path / "a.fa.fai", (1, 1))
    assert Genome(path, in_memory=False).lengths == {"a": 6, "b": 2}


def test_names_with_and_without_chr(tmp_path: Path) -> None:
    genome = Genome(write(tmp_path / "a.fa", b">1\nAC\n>chrX\nAC\n>MT\nAC\n"))
    assert [genome.match(name) for name in ("1", "chr1", "X", "chrX", "chrM", "M", "2", "chr", "")] == (
        ["1", "1", "chrX", "chrX", "MT", "MT", None, None, None]
    )


def test_sequences_in_batches() -> None:
    rows = ["ACGT", "A", "GGCCNTT"]
    sequences = Sequences([encode(row) for row in rows])
    tokens, lengths = sequences.gather(np.array([2, 0, 1, 0]))
    assert tokens.shape == (4, 7)
    assert lengths.tolist() == [7, 4, 1, 4]
    assert [decode(row[:size]) for row, size in zip(tokens, lengths)] == [rows[i] for i in (2, 0, 1, 0)]
    assert all((row[size:] == N).all() for row, size in zip(tokens, lengths))
    assert [decode(one) for one in (sequences.take(np.array([1, 2]))[0], sequences.take(np.array([1, 2]))[1])] == rows[
        1:
    ]


def test_the_other_strand_twice_is_the_first() -> None:
    assert decode(turned(encode("AACGTN"))) == "NACGTT"
    assert decode(turned(turned(encode("ACCGNTTA")))) == "ACCGNTTA"


def test_pieces_of_genomes(tmp_path: Path) -> None:
    genome = Genome(write(tmp_path / "a.fa", b">a\nACGT\n"))
    assert decode(cut(genome, "a", -2, 6)) == "NNACGTNN"
    assert decode(cut(genome, "a", 5, 8)) == "NNN"
    spans = merge([("a", 5, 9), ("b", 0, 2), ("a", 0, 3), ("a", 3, 4), ("a", 7, 12)])
    assert spans == [("a", 0, 4), ("a", 5, 12), ("b", 0, 2)]
    assert gaps(spans, {"a": 20, "b": 2, "c": 4}) == [("a", 4, 5), ("a", 12, 20), ("c", 0, 4)]
    assert intersect(spans, [("a", 2, 6), ("b", 1, 9)]) == [("a", 2, 4), ("a", 5, 6), ("b", 1, 2)]


@pytest.mark.data
@pytest.mark.parametrize("name", ["lambda_virus.fa", "phix174_NC_001422.1.fna", "ecoli.fa.gz"])
def test_real_genomes_as_htslib_reads_them(name: str) -> None:
    from attn_shared.datasets import data_root

    path = data_root() / "genomics" / "genomes" / name
    if not path.is_file():
        pytest.skip(f"{path} is not there")
    genome = Genome(path)
    with pysam.FastxFile(str(path)) as file:
        theirs = {record.name: encode(record.sequence) for record in file}
    assert genome.names == list(theirs)
    assert all((genome.fetch(one) == codes).all() for one, codes in theirs.items())
