"""Tables of sequences and of coordinates."""

from __future__ import annotations

import gzip
from pathlib import Path

import pytest

from attn_genomics.data.tables import Table, read_table
from attn_genomics.tokens import decode
from attn_shared.errors import UserError


def read(folder: Path, text: str, name: str = "a.csv", **options: object) -> Table:
    data = text.encode()
    (folder / name).write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
    return read_table(folder / name, **options)  # type: ignore[arg-type]


def sequences(table: Table) -> list[str]:
    assert table.sequences is not None
    return [decode(table.sequences[row]) for row in range(len(table))]


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.csv", "sequence,label\nACGT,0\nggnt,1\n"),
        ("a.csv.gz", "sequence,label\nACGT,0\nggnt,1\n"),
        ("a.tsv", "Label\tDNA_sequence\n0\tACGT\n1\tggnt\n"),
        ("a.tsv.gz", "Class\tSeq\r\n0.0\tACGT\r\n1.0\tggnt\r\n"),
        ("a.csv", "x,target\nACGTAC,0\nggntAC,1\n".replace("AC,", ",").replace("x,", "seq,")),
    ],
)
def test_forms(tmp_path: Path, name: str, text: str) -> None:
    table = read(tmp_path, text, name)
    assert sequences(table) == ["ACGT", "GGNT"]
    assert table.label is not None
    assert table.label.tolist() == ["0", "1"]
    assert table.line.tolist() == [2, 3]


def test_a_sequence_named_like_a_missing_value_is_a_sequence(tmp_path: Path) -> None:
    table = read(tmp_path, "sequence,label\nNA,NA\nNAN,no\n")
    assert sequences(table) == ["NA", "NAN"]
    assert table.label is not None
    assert table.label.tolist() == ["NA", "no"]


def test_a_column_of_sequences_is_found_by_what_it_holds(tmp_path: Path) -> None:
    table = read(tmp_path, "promoter,y\nACGTA,a\nCCCCC,b\n")
    assert sequences(table) == ["ACGTA", "CCCCC"]
    assert "sequences are taken from column 'promoter'" in table.notes[0]


def test_coordinates_and_splits(tmp_path: Path) -> None:
    table = read(
        tmp_path, "id,region,start,end,strand,set,label\n7,chr1,0,5,+,train,a\n8,chr2,3,9,-,dev,b\n9,2,3,9,.,TEST,b\n"
    )
    assert table.sequences is None
    assert table.places is not None
    assert table.places.spans() == [("chr1", 0, 5), ("chr2", 3, 9), ("2", 3, 9)]
    assert table.places.strand.tolist() == [1, -1, 0]
    assert table.part is not None
    assert table.part.tolist() == [0, 1, 2]
    assert table.name is not None
    assert table.name.tolist() == ["7", "8", "9"]


def test_a_column_called_set_need_not_be_a_split(tmp_path: Path) -> None:
    text = "sequence,label,set\nACGT,0,red\nACGA,1,train\n"
    table = read(tmp_path, text)
    assert table.part is None
    assert "'red' is none of train, dev and test" in table.notes[0]
    with pytest.raises(UserError, match=r"a\.csv:2: 'red' is none of train"):
        read(tmp_path, text, columns={"split": "set"})


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("", "a\\.csv is empty"),
        ("sequence,label\n", "holds a header but no rows"),
        ("sequence,label\nACGT,0\nACGT,0,1\n", ":3: 3 fields where the header"),
        ("sequence,label\nACGT,0\nACXZ,1\n", ":3: 'Z' is no nucleotide"),
        ("sequence,label\nMKLV,0\n", ":2: 'L' is no nucleotide; these are proteins"),
        ("sequence,label\n,0\nA,1\n", ":2: no sequence"),
        ("sequence,label\nACGT,0\nACGT,\n", ":3: no label"),
        ("sequence,label\nACGT,0\nACGT,0.25\n", ":3: label 0.25 is no class but a measured number"),
        ("ACGTACGT,0\nACGTACGG,1\n", ":1: the first line holds a sequence, not names"),
        ("motif,b\n1,2\n", "has no column of sequences and none of coordinates; its columns are motif, b"),
        ("chrom,start,label\n1,2,3\n", "for coordinates there is none of end"),
        ("chrom,start,end\n1,2,x\n", ":2: end 'x' is no whole number"),
        ("chrom,start,end\n1,5,5\n", ":2: end is not behind start"),
        ("chrom,start,end\n1,-5,5\n", ":2: start lies before the record"),
        ("chrom,start,end\n,0,5\n", ":2: no name of a chromosome"),
        ("chrom,start,end,strand\n1,0,5,up\n", ":2: strand 'up'"),
    ],
)
def test_refusals(tmp_path: Path, text: str, sentence: str) -> None:
    with pytest.raises(UserError, match=sentence) as error:
        read(tmp_path, text)
    assert "\n" not in str(error.value)


def test_unknown_columns_and_damaged_files(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="has no column 'dna'; its columns are sequence, label"):
        read(tmp_path, "sequence,label\nA,1\n", columns={"sequence": "dna"})
    (tmp_path / "b.csv.gz").write_bytes(gzip.compress(b"sequence,label\n" + b"ACGT,1\n" * 999)[:-20])
    with pytest.raises(UserError, match=r"b\.csv\.gz is damaged or cut off"):
        read_table(tmp_path / "b.csv.gz")
    with pytest.raises(UserError, match="there is no file"):
        read_table(tmp_path / "c.csv")
