"""VCF files line by line, and the windows that their variants make."""

from __future__ import annotations

import gzip
import random
from pathlib import Path

import numpy as np
import pytest

from attn_genomics.commands.windows import windows
from attn_genomics.data.vcf import BadRecord, Change, NoBases, open_vcf, parse
from attn_genomics.tokens import decode, encode
from attn_shared.errors import UserError

HEAD = "##fileformat=VCFv4.3\n#CHROM\tPOS\tID\tREF\tALT\tQUAL\tFILTER\tINFO\n"


def record(pos: object, ref: str, alt: str, info: str = ".") -> object:
    return parse(f"1\t{pos}\t.\t{ref}\t{alt}\t.\t.\t{info}", 3, 8)


@pytest.mark.parametrize(
    ("pos", "ref", "alt", "wanted"),
    [
        (10, "A", "G", Change(9, 10, "G")),
        (10, "a", "g", Change(9, 10, "G")),
        (10, "AC", "GT", Change(9, 11, "GT")),
        (10, "A", "ACC", Change(10, 10, "CC")),
        (10, "ACC", "A", Change(10, 12, "")),
        (10, "GACT", "GTCT", Change(10, 11, "T")),
        (10, "CACAC", "CAC", Change(9, 11, "")),  # what both end with goes first
        (10, "ACG", "TT", Change(9, 12, "TT")),
    ],
)
def test_changes_are_what_alleles_do_not_share(pos: int, ref: str, alt: str, wanted: Change) -> None:
    assert record(pos, ref, alt).change(0) == wanted


def test_symbolic_deletions_take_their_end_from_info() -> None:
    assert record(10, "A", "<DEL>", "X;END=14").change(0) == Change(10, 14, "")
    assert record(10, "A", "<DEL>", "SVLEN=-4").change(0) == Change(10, 14, "")
    two = record(10, "A", "C,<DEL>", "SVLEN=.,4")
    assert two.change(0) == Change(9, 10, "C")
    assert two.change(1) == Change(10, 14, "")
    for info, said in (
        (".", "neither END nor SVLEN"),
        ("END=10", "before it begins"),
        ("END=x", "neither END nor SVLEN"),
        ("SVLEN=x", "neither END nor SVLEN"),
    ):
        with pytest.raises(BadRecord, match=said):
            record(10, "A", "<DEL>", info).change(0)


@pytest.mark.parametrize(
    ("alt", "said"),
    [
        ("*", "nothing to score"),
        ("<DUP>", "does not say its bases"),
        ("<INS:ME>", "does not say its bases"),
        ("G]17:198982]", "breakend"),
        ("[13:123457[C", "breakend"),
        ("G.", "breakend"),
        (".A", "breakend"),
        ("R", "other than A, C, G and T"),
        ("A-", "other than A, C, G and T"),
        ("AN", "unknown bases"),
        ("G,,T", "empty alternate"),
        ("G,.", "empty alternate"),
        ("A", "is the reference"),
    ],
)
def test_alternates_without_bases_are_told(alt: str, said: str) -> None:
    found = record(10, "A", alt)
    with pytest.raises(BadRecord, match=said):
        found.change(1 if alt.startswith("G,") else 0)


def test_no_alternate_and_any_other_alternate_are_nothing_to_report() -> None:
    assert record(10, "A", ".").alts == ()
    for letters in ("<NON_REF>", "<*>"):
        with pytest.raises(NoBases):
            record(10, "A", letters).change(0)


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("1\t10\t.\tA\tG\t.\t.", "7 columns instead of 8"),
        ("1\t10\t.\tA\tG\t.\t.\t.\tGT", "9 columns instead of 8"),
        ("1 10 . A G . . .", "1 column instead of 8; they are separated by tabs"),
        ("\t10\t.\tA\tG\t.\t.\t.", "no chromosome"),
        ("1\tx\t.\tA\tG\t.\t.\t.", "no whole number"),
        ("1\t-4\t.\tA\tG\t.\t.\t.", "no whole number"),
        ("1\t1e3\t.\tA\tG\t.\t.\t.", "no whole number"),
        ("1\t\t.\tA\tG\t.\t.\t.", "no whole number"),
        ("1\t0\t.\tN\tG\t.\t.\t.", "telomere"),
        ("1\t10\t.\t.\tG\t.\t.\t.", "no reference"),
        ("1\t10\t.\tA1\tG\t.\t.\t.", "no bases"),
    ],
)
def test_lines_that_are_no_records_are_told(line: str, said: str) -> None:
    with pytest.raises(BadRecord, match=said):
        parse(line, 3, 8)


def test_every_line_comes_back(tmp_path: Path) -> None:
    text = HEAD + "1\t10\t.\tA\tG\t.\t.\tX=\xe9\n\n# told\r\n1\tbad\n1\t11\t.\tC\tT\t.\t.\t."
    raw = text.encode("latin-1")  # a byte that is no UTF-8
    plain, packed = tmp_path / "a.vcf", tmp_path / "a.vcf.gz"
    plain.write_bytes(raw)
    packed.write_bytes(gzip.compress(raw))
    for path in (plain, packed):
        with open_vcf(path) as vcf:
            assert vcf.header == ["##fileformat=VCFv4.3"]
            lines = list(vcf)
        assert [line.number for line in lines] == [3, 4, 5, 6, 7]
        assert [line.record is not None for line in lines] == [True, False, False, False, True]
        assert [line.problem is not None for line in lines] == [False, False, False, True, False]
        back = "".join(line.text + line.end for line in lines)
        assert back.encode("utf-8", "surrogateescape") == raw[len(HEAD) :]


@pytest.mark.parametrize(
    ("raw", "said"),
    [
        (b"", "no line begins with #CHROM"),
        (b"##fileformat=VCFv4.3\n", "no line begins with #CHROM"),
        (b">chr1\nACGT\n", "line 1 comes before"),
        (b"##x\n1\t10\t.\tA\tG\t.\t.\t.\n", "line 2 comes before"),
        (b"#CHROM\tPOS\tREF\tALT\n", "names other columns"),
        (b"#CHROM POS ID REF ALT QUAL FILTER INFO\n", "separated by tabs"),
        (b"BCF\x02\x02rest", "is BCF"),
        (gzip.compress(b"BCF\x02\x02rest"), "is BCF"),
        (gzip.compress((HEAD + "1\t10\t.\tA\tG\t.\t.\t.\n" * 50_000).encode())[:600], "middle"),
        (b"\x1f\x8b" + b"no gzip" * 9, "damaged"),
    ],
)
def test_files_that_are_no_vcf_are_refused(tmp_path: Path, raw: bytes, said: str) -> None:
    path = tmp_path / "a.vcf"
    path.write_bytes(raw)
    with pytest.raises(UserError, match=said), open_vcf(path) as vcf:
        list(vcf)


def test_a_missing_file_is_told(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="there is no file"), open_vcf(tmp_path / "none.vcf"):
        pass


# -- windows ----------------------------------------------------------------------------------------------------------


def pair(genome: str, start: int, end: int, letters: str, size: int) -> tuple[str, ...]:
    codes = encode(genome)
    found = windows(lambda a, b: codes[a:b], len(codes), start, end, encode(letters), size)
    return tuple(decode(one) for one in found)


def test_windows_hold_the_change_in_their_middle_and_are_as_long() -> None:
    genome = "AAAACCCCGGGGTTTT"
    assert pair(genome, 8, 9, "T", 5) == ("CCGGG", "CCTGG")
    assert pair(genome, 8, 8, "TA", 6) == ("CCGGGG", "CCTAGG")  # two bases leave at the right
    assert pair(genome, 8, 10, "", 6) == ("CCGGGG", "CCGGTT")  # two come in
    assert pair(genome, 8, 10, "T", 6) == ("CCGGGG", "CCTGGT")


def test_windows_at_the_ends_of_a_record() -> None:
    genome = "AAAACCCCGGGGTTTT"
    assert pair(genome, 0, 1, "G", 5) == ("AAAAC", "GAAAC")
    assert pair(genome, 15, 16, "G", 5) == ("GTTTT", "GTTTG")
    assert pair(genome, 14, 16, "", 6) == ("GGTTTT", "GGGGTT")  # nothing is left at the right to come in
    assert pair(genome, 16, 16, "AC", 6) == ("GGTTTT", "TTTTAC")  # nor to leave
    assert pair(genome, 3, 4, "G", 100) == (genome, "AAAGCCCCGGGGTTTT")
    assert pair(genome, 3, 4, "", 100) == (genome, "AAACCCCGGGGTTTT")
    assert pair(genome, 3, 3, "G", 100) == (genome, "AAAGACCCCGGGGTTTT")


def test_a_change_longer_than_half_a_window_is_told() -> None:
    with pytest.raises(BadRecord, match="more than half of a window of 6"):
        pair("ACGT" * 10, 10, 14, "", 6)
    with pytest.raises(BadRecord, match="--context"):
        pair("ACGT" * 10, 10, 10, "ACGT", 6)


def test_windows_of_many_random_changes() -> None:
    """Every base with a name of its own, so that each is found again."""
    draw = random.Random(0)
    for _ in range(1000):
        length, size = draw.randint(1, 60), draw.randint(10, 40)
        genome = np.arange(length)
        start = draw.randint(0, length)
        end = min(length, start + draw.randint(0, 5))
        letters = 1000 + np.arange(draw.randint(0, 5))
        here, other = windows(lambda a, b, whole=genome: whole[a:b], length, start, end, letters, size)
        changed = np.concatenate((genome[:start], letters, genome[end:]))
        for window, whole in ((here, genome), (other, changed)):
            at = int(np.flatnonzero(whole == window[0])[0]) if len(window) else 0
            assert np.array_equal(window, whole[at : at + len(window)])
            assert len(window) <= size
        assert set(genome[start:end]) <= set(here)
        assert set(letters) <= set(other)
        # Where bases went, what stood beside them is seen side by side.
        assert set(changed[max(0, start - 1) : start + len(letters) + 1]) <= set(other)
        if min(length, len(changed)) >= size:
            assert len(here) == len(other) == size
