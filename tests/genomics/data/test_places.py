"""BED, GTF and GFF3: what is read is what HTSlib reads; lines that cannot be right are told."""

from __future__ import annotations

import gzip
from pathlib import Path
from typing import IO

import pysam
import pytest

from attn_genomics.data.places import read_bed, read_gtf
from attn_shared.errors import UserError

BED12 = "chr1\t10\t100\tgene\t0\t-\t10\t100\t0\t2\t20,30,\t0,60,\n"
GTF = '#!genome-build X\n1\tsgd\tgene\t1\t30\t.\t+\t.\tgene_id "a";\n1\tsgd\tCDS\t4\t9\t.\t-\t0\tgene_id "a";\n'


def write(path: Path, text: str) -> Path:
    path.write_bytes(gzip.compress(text.encode()) if path.name.endswith(".gz") else text.encode())
    return path


@pytest.mark.parametrize("columns", range(3, 13))
@pytest.mark.parametrize("suffix", [".bed", ".bed.gz"])
def test_bed_of_every_width(tmp_path: Path, columns: int, suffix: str) -> None:
    line = "\t".join(BED12.strip().split("\t")[:columns]) + "\n"
    text = "browser position chr1\ntrack name=x\n# comment\n\n" + line * 3
    places = read_bed(write(tmp_path / f"a{suffix}", text))
    theirs = list(pysam.tabix_iterator(_lines(tmp_path, line * 3), pysam.asBed()))
    assert [(one.contig, one.start, one.end) for one in theirs] == places.spans()
    assert set(places.strand.tolist()) == {-1 if columns > 5 else 0}
    assert set(places.name.tolist()) == {"gene" if columns > 3 else ""}
    assert places.line.tolist() == [5, 6, 7]


def _lines(folder: Path, text: str) -> IO[bytes]:
    path = folder / "lines.txt"
    path.write_text(text)
    return path.open("rb")


def test_bed_separated_by_blanks_and_windows_line_ends(tmp_path: Path) -> None:
    assert read_bed(write(tmp_path / "a.bed", "chr1 1 5\r\nchr2 2 9\r\n")).spans() == [("chr1", 1, 5), ("chr2", 2, 9)]


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("", "holds no place"),
        ("# only\ntrack x\n", "holds no place"),
        ("chr1\t5\n", ":1: 2 columns where BED has at least 3"),
        ("chr1\t1\t5\nchr1\t1\t5\tx\n", ":2: 4 columns where the lines before have 3"),
        ("chr1\t1.5\t5\n", ":1: start '1.5' is no whole number"),
        ("chr1\t1\tend\n", ":1: end 'end' is no whole number"),
        ("chr1\t-1\t5\n", ":1: start -1 lies before the record"),
        ("chr1\t5\t5\n", ":1: end 5 is not behind start 5"),
        ("chr1\t9\t5\n", ":1: end 5 is not behind start 9"),
        ("\t1\t5\n", ":1: no name of a record"),
        ("chr1\t1\t5\tx\t0\tplus\n", ":1: strand 'plus' is none of"),
        (BED12.replace("20,30,", "20,"), ":1: 1 sizes and 2 starts of blocks where column 10 says 2"),
        (BED12.replace("0,60,", "0,80,"), ":1: a block lies outside the place"),
        (BED12.replace("\t2\t", "\ttwo\t"), ":1: number of blocks 'two'"),
        ("chr1\t1\t5\n\0\n", ":2: a zero byte"),
    ],
)
def test_bad_bed(tmp_path: Path, text: str, sentence: str) -> None:
    with pytest.raises(UserError, match=f"a\\.bed ?{sentence}"):
        read_bed(write(tmp_path / "a.bed", text))


def test_gtf_and_gff3_become_places_of_bed(tmp_path: Path) -> None:
    places = read_gtf(write(tmp_path / "a.gtf.gz", GTF))
    assert places.spans() == [("1", 0, 30), ("1", 3, 9)]
    assert places.strand.tolist() == [1, -1]
    assert read_gtf(tmp_path / "a.gtf.gz", "CDS").spans() == [("1", 3, 9)]
    gff = "##gff-version 3\n" + GTF.split("\n", 1)[1].replace('gene_id "a";', "ID=a") + "##FASTA\n>1\nACGT\n"
    assert read_gtf(write(tmp_path / "a.gff3", gff)).spans() == places.spans()


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("# nothing\n", "holds no feature"),
        ("1 sgd gene 1 30 . + . x\n", ":1: 1 columns where GTF and GFF3 have 9; GTF is separated by tabs"),
        ("1\tsgd\tgene\t1\t30\n", ":1: 5 columns"),
        (GTF.replace("\t1\t30", "\t0\t30"), ":2: start 0 lies before the record; GTF and GFF3 count from 1"),
        (GTF.replace("\t4\t9", "\t9\t4"), ":3: end 4 lies before start 9"),
        (GTF.replace("\t4\t9", "\tx\t9"), ":3: start 'x' is no whole number"),
        (GTF.replace("\t-\t", "\t1\t"), ":3: strand '1'"),
        (GTF.replace("CDS", ""), ":3: no name of a record or no feature"),
    ],
)
def test_bad_gtf(tmp_path: Path, text: str, sentence: str) -> None:
    with pytest.raises(UserError, match=f"a\\.gtf ?{sentence}"):
        read_gtf(write(tmp_path / "a.gtf", text))


def test_a_feature_that_is_not_there_lists_those_that_are(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no feature 'exon'; it holds gene, CDS"):
        read_gtf(write(tmp_path / "a.gtf", GTF), "exon")


def test_names_of_records_are_matched_and_told(tmp_path: Path) -> None:
    places = read_bed(write(tmp_path / "a.bed", "chr1\t1\t5\nchrM\t0\t3\n"))
    found = places.within({"1": 10, "MT": 4}, "g.fa")
    assert found.spans() == [("1", 1, 5), ("MT", 0, 3)]
    assert found.notes == ["a.bed: 2 names of records matched to those of g.fa, such as chr1 to 1"]
    assert places.within({"chr1": 10, "chrM": 4}, "g.fa").notes == []


def test_places_that_the_genome_does_not_have(tmp_path: Path) -> None:
    places = read_bed(write(tmp_path / "a.bed", "chr1\t1\t5\nchr7\t1\t5\n"))
    with pytest.raises(UserError, match=r"a\.bed:2: g\.fa has no record 'chr7' \(1 of 2 places"):
        places.within({"1": 10}, "g.fa")
    with pytest.raises(UserError, match=r"a\.bed:1: chr1:1-5 ends behind the record, which has 4 bases"):
        places.within({"chr1": 4, "chr7": 9}, "g.fa")


@pytest.mark.data
def test_the_annotation_of_yeast_as_htslib_reads_it() -> None:
    from attn_shared.datasets import data_root

    path = data_root() / "genomics" / "genomes" / "Saccharomyces_cerevisiae.R64-1-1.96.gtf.gz"
    if not path.is_file():
        pytest.skip(f"{path} is not there")
    with gzip.open(path) as file:
        theirs = [(one.contig, one.start, one.end, one.feature) for one in pysam.tabix_iterator(file, pysam.asGTF())]
    places = read_gtf(path)
    assert theirs == list(zip(places.chrom, places.start, places.end, places.name))
    assert len(read_gtf(path, "CDS")) == 6913
