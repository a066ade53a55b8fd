"""Variants scored, against a first-order Markov chain whose likelihoods are added up here letter by letter."""

from __future__ import annotations

import math
import random
import subprocess
import sys
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
import pysam
import pytest
import torch
from torch import Tensor

from attn_genomics.cli import main
from attn_genomics.commands import variants
from attn_genomics.commands.scoring import ClassScorer, LikelihoodScorer, score_all
from attn_genomics.data.fasta import Genome
from attn_genomics.tokens import BASES, N, encode
from attn_shared.errors import UserError

CHAIN = torch.tensor([[0.5, 0.2, 0.2, 0.1], [0.1, 0.6, 0.1, 0.2], [0.25, 0.25, 0.3, 0.2], [0.05, 0.15, 0.2, 0.6]])


class Chain:
    """A language model as the commands see it: the next base follows from the one before."""

    objective, rc = "next", "none"

    def bits(self, tokens: Tensor, lengths: Tensor) -> Tensor:
        before, here = tokens[:, :-1].clamp(max=3), tokens[:, 1:].clamp(max=3)
        bits = torch.cat([torch.full((len(tokens), 1), 2.0), -CHAIN[before, here].log2()], dim=1)
        real = (torch.arange(tokens.shape[1]) < lengths[:, None]) & (tokens < N)
        return torch.where(real, bits, 0.0)


def likelihood(letters: str) -> float:
    """log2 by hand."""
    steps = pairwise(letters)
    return -2 + sum(math.log2(CHAIN[BASES.index(a), BASES.index(b)].item()) for a, b in steps)


def other_strand(letters: str) -> str:
    return letters[::-1].translate(str.maketrans("ACGT", "TGCA"))


@dataclass
class Files:
    fasta: Path
    genome: str

    def vcf(self, *lines: str, header: str = "") -> Path:
        path = self.fasta.with_name("in.vcf")
        columns = "#CHROM\tPOS\tID\tREF\tALT\tQUAL\tFILTER\tINFO\tFORMAT\tone\n"
        body = "".join("\t".join(line.split(" ")) + "\n" for line in lines)
        path.write_text(f"##fileformat=VCFv4.3\n{header}{columns}{body}", newline="")
        return path


@pytest.fixture
def files(tmp_path: Path) -> Files:
    draw = random.Random(1)
    genome = "".join(draw.choices("ACGT", k=200))
    genome = genome[:150] + "NNNNN" + genome[155:]
    fasta = tmp_path / "genome.fa"
    fasta.write_text(f">1\n{genome[:80]}\n{genome[80:160]}\n{genome[160:].lower()}\n>empty\n>small\nACGTACGT\n")
    return Files(fasta, genome)


def scored(files: Files, vcf: Path, name: str = "out.vcf", *, size: int = 20, strand: str = "forward") -> tuple:
    output = files.fasta.with_name(name)
    counts = variants.score_file(
        LikelihoodScorer(Chain(), size, strand),  # type: ignore[arg-type]
        vcf,
        Genome(files.fasta),
        output,
        context=size,
        field="ATTN_SCORE",
        source="chain",
    )
    return counts, output


def values(path: Path) -> list[tuple[float | None, ...] | None]:
    """Scores of each record, as HTSlib reads them."""
    with pysam.VariantFile(str(path)) as file:
        return [one.info.get("ATTN_SCORE") for one in file]


def row(files: Files, pos: int, ref: int, alt: str, chrom: str = "1", info: str = ".") -> str:
    return f"{chrom} {pos} . {files.genome[pos - 1 : pos - 1 + ref].upper()} {alt} . . {info} GT 0/1"


def expected(genome: str, start: int, gone: int, letters: str, size: int = 20) -> float:
    """Far from the ends: flanks of like length, as many bases in both windows, indels at their leftmost place."""
    while (not gone) != (not letters) and (letters or genome[start : start + gone])[-1] == genome[start - 1]:
        start, letters = start - 1, letters[-1:] + letters[:-1]
    longest = max(gone, len(letters))
    left = start - (size - longest) // 2
    changed = genome[:start] + letters + genome[start + gone :]
    return likelihood(changed[left : left + size]) - likelihood(genome[left : left + size])


def test_substitutions_and_indels_are_the_difference_of_two_likelihoods(files: Files) -> None:
    genome = files.genome
    snv = next(base for base in BASES if base != genome[49])
    vcf = files.vcf(
        row(files, 50, 1, snv),
        row(files, 60, 3, "GTC" if genome[59:62] != "GTC" else "CAG"),
        row(files, 70, 1, genome[69] + "ACG"),
        row(files, 80, 4, genome[79]),
        row(files, 90, 1, "<DEL>", info="SVTYPE=DEL;END=93"),
    )
    counts, output = scored(files, vcf)
    found = [one[0] for one in values(output)]
    assert found[0] == pytest.approx(expected(genome, 49, 1, snv), abs=1e-4)
    assert found[2] == pytest.approx(expected(genome, 70, 0, "ACG"), abs=1e-4)
    assert found[3] == pytest.approx(expected(genome, 80, 3, ""), abs=1e-4)
    assert found[4] == pytest.approx(expected(genome, 90, 3, ""), abs=1e-4)
    assert (counts.alternates, counts.scored_records, counts.skipped_records) == (5, 5, 0)


def test_the_same_change_written_in_another_way_has_the_same_score(files: Files) -> None:
    base, after = files.genome[99], files.genome[100]
    other = next(letter for letter in BASES if letter not in (base, after))
    vcf = files.vcf(
        row(files, 100, 1, other), row(files, 100, 2, other + after), row(files, 99, 2, files.genome[98] + other)
    )
    _, output = scored(files, vcf)
    assert len({one[0] for one in values(output)}) == 1


def test_an_indel_in_a_repeat_has_one_score_wherever_it_is_written(files: Files) -> None:
    genome = files.genome[:60] + "ACACACAC" + files.genome[68:]
    files.fasta.write_text(f">1\n{genome}\n")
    files.genome = genome
    deletions = [row(files, place, 3, genome[place - 1]) for place in range(60, 66)]
    insertions = [
        row(files, place, 1, genome[place - 1 : place] + genome[place : place + 2]) for place in range(60, 66)
    ]
    insertions += [row(files, 68, 1, "CAC")]
    _, output = scored(files, files.vcf(*deletions, *insertions))
    found = [one[0] for one in values(output)]
    assert len(set(found[:6])) == len(set(found[6:])) == 1
    assert found[0] == pytest.approx(expected(genome, 60, 2, ""), abs=1e-4)
    assert found[6] == pytest.approx(expected(genome, 60, 0, "AC"), abs=1e-4)


def test_each_alternate_of_a_record_has_its_own_score(files: Files) -> None:
    genome = files.genome
    three = [base for base in BASES if base != genome[99]]
    vcf = files.vcf(row(files, 100, 1, f"{three[0]},*,{three[1]},{genome[99]}TT,<NON_REF>"))
    counts, output = scored(files, vcf)
    (found,) = values(output)
    assert found is not None
    assert found[1] is None
    assert found[4] is None
    assert found[0] == pytest.approx(expected(genome, 99, 1, three[0]), abs=1e-4)
    assert found[2] == pytest.approx(expected(genome, 99, 1, three[1]), abs=1e-4)
    assert found[3] == pytest.approx(expected(genome, 100, 0, "TT"), abs=1e-4)
    assert "scored 3 alternates of 1 record, 0 records skipped, 1 further alternate of scored records" in str(counts)


def test_strands(files: Files) -> None:
    base = next(base for base in BASES if base != files.genome[49])
    vcf = files.vcf(row(files, 50, 1, base))
    here, changed = files.genome[40:60], files.genome[40:49] + base + files.genome[50:60]
    window = slice(49 - 19 // 2, 49 - 19 // 2 + 20)
    here, changed = files.genome[window], (files.genome[:49] + base + files.genome[50:])[window]
    forward = likelihood(changed) - likelihood(here)
    reverse = likelihood(other_strand(changed)) - likelihood(other_strand(here))
    for strand, wanted in (("forward", forward), ("reverse", reverse), ("both", (forward + reverse) / 2)):
        _, output = scored(files, vcf, strand=strand)
        assert values(output)[0][0] == pytest.approx(wanted, abs=1e-4)


def test_bad_records_are_told_by_line_and_stay_without_a_score(
    files: Files, capsys: pytest.CaptureFixture[str]
) -> None:
    wrong = next(base for base in BASES if base != files.genome[9])
    lines = [
        row(files, 10, 1, wrong),
        f"1 10 . {wrong} {files.genome[9]} . . . GT 0/1",  # line 4: reference mismatch
        "1 201 . A G . . . GT 0/1",  # line 5: past the end
        row(files, 199, 2, "A") if files.genome[198] == "A" else f"1 199 . {files.genome[198:]}A A . . . GT 0/1",
        "2 10 . A G . . . GT 0/1",  # line 7: unknown contig
        "1 10 . A G . . .",  # line 8: columns
        "1 ten . A G . . . GT 0/1",
        row(files, 20, 1, "<DUP>"),
        row(files, 20, 1, "*"),
        row(files, 20, 1, "G[2:5["),
        row(files, 20, 1, "."),
        row(files, 20, 1, "X"),
        row(files, 151, 1, "A"),  # line 15: N in the genome
        row(files, 30, 1, "A" * 15),  # line 16: longer than half a window
        row(files, 20, 1, "<DEL>", info="END=500"),  # line 17
    ]
    counts, output = scored(files, files.vcf(*lines))
    told = capsys.readouterr().err.splitlines()
    for number, words in {
        4: "but the genome has",
        5: "position 201 is past the end of 1, which has 200 bases",
        6: "past the end",
        7: "the genome has no 2",
        8: "8 columns instead of 10",
        9: "'ten' is no whole number",
        10: "<DUP> does not say its bases",
        11: "nothing to score",
        12: "breakend",
        14: "other than A, C, G and T",
        15: "unknown bases (N)",
        16: "more than half of a window of 20",
        17: "a deletion up to 500 is past the end",
    }.items():
        mine = [line for line in told if f"line {number}:" in line]
        assert len(mine) == 1, (number, told)
        assert words in mine[0]
        assert mine[0].endswith("; skipped")
    assert len(told) == 13
    assert str(counts).startswith("scored 1 alternate of 1 record, 13 records skipped, 1 record without an alternate")
    before, after = (
        path.read_text(encoding="utf-8").splitlines() for path in (files.fasta.with_name("in.vcf"), output)
    )
    assert [line for line in after if line not in before] == [after[1], after[3]]
    assert after[1].startswith("##INFO=<ID=ATTN_SCORE,Number=A,Type=Float,")


def test_a_table_has_a_row_an_alternate_and_says_why_there_is_no_score(files: Files) -> None:
    base = next(base for base in BASES if base != files.genome[49])
    vcf = files.vcf(row(files, 50, 1, f"{base},*"), "1 201 . A G . . . GT 0/1", row(files, 60, 1, "."))
    _, output = scored(files, vcf, "out.tsv")
    head, *rows = [line.split("\t") for line in output.read_text(encoding="utf-8").splitlines()]
    assert head == ["chrom", "pos", "id", "ref", "alt", "score", "reference", "alternate", "note"]
    assert [one[4] for one in rows] == [base, "*", "G"]
    score, reference, alternate = (float(cell) for cell in rows[0][5:8])
    assert score == pytest.approx(alternate - reference, abs=1e-3)
    assert rows[0][8] == ""
    assert rows[1][5:8] == rows[2][5:8] == ["", "", ""]
    assert "deletion before" in rows[1][8]
    assert "past the end" in rows[2][8]


def test_all_lines_stay_as_they_were_but_for_the_score(files: Files) -> None:
    header = '##INFO=<ID=DP,Number=1,Type=Integer,Description="x">\r\n##contig=<ID=1,length=200>\n'
    base = next(base for base in BASES if base != files.genome[49])
    vcf = files.vcf(row(files, 50, 1, base, info="DP=3;DB") + "\r", "", row(files, 60, 1, "."), header=header)
    _, output = scored(files, vcf)
    before, after = vcf.read_bytes().split(b"\n"), output.read_bytes().split(b"\n")
    assert after[2].startswith(b"##INFO=<ID=ATTN_SCORE")
    del after[2]
    assert [old for old, new in zip(before, after) if old != new] == [before[3 + 1]]
    assert b"\tDP=3;DB;ATTN_SCORE=" in after[4]
    assert after[4].endswith(b"\tGT\t0/1\r")
    with pytest.raises(UserError, match="has an INFO field ATTN_SCORE already; name another"):
        scored(files, output, "again.vcf")
    assert not output.with_name("again.vcf").exists()


def test_packed_files_are_bgzip_that_htslib_indexes(files: Files) -> None:
    bases = [next(base for base in BASES if base != files.genome[place - 1]) for place in range(20, 120)]
    vcf = files.vcf(*(row(files, place, 1, base) for place, base in zip(range(20, 120), bases)))
    _, plain = scored(files, vcf)
    packed = pysam.tabix_compress(str(vcf), str(vcf) + ".gz", force=True) or Path(str(vcf) + ".gz")
    _, output = scored(files, packed, "out.vcf.gz")
    assert values(output) == values(plain)
    pysam.tabix_index(str(output), preset="vcf")
    with pysam.VariantFile(str(output)) as file:
        assert len(list(file.fetch("1", 49, 59))) == 10


def test_names_of_chromosomes_with_and_without_chr(files: Files, capsys: pytest.CaptureFixture[str]) -> None:
    base = next(base for base in BASES if base != files.genome[49])
    vcf = files.vcf(row(files, 50, 1, base, chrom="chr1"), row(files, 50, 1, base))
    _, output = scored(files, vcf)
    chr1, plain = values(output)
    assert chr1 == plain
    assert capsys.readouterr().err.count("chr1 is taken for 1 of the genome") == 1


def test_near_the_ends_and_in_a_small_record(files: Files) -> None:
    genome = files.genome
    first, last = (next(base for base in BASES if base != genome[place]) for place in (0, 199))
    vcf = files.vcf(row(files, 1, 1, first), row(files, 200, 1, last), "small 4 . T A . . . GT 0/1")
    _, output = scored(files, vcf)
    found = [one[0] for one in values(output)]
    assert found[0] == pytest.approx(likelihood(first + genome[1:20]) - likelihood(genome[:20]), abs=1e-4)
    assert found[1] == pytest.approx(likelihood(genome[180:199] + last) - likelihood(genome[180:]), abs=1e-4)
    assert found[2] == pytest.approx(likelihood("ACGAACGT") - likelihood("ACGTACGT"), abs=1e-4)


def test_an_error_leaves_no_file(files: Files) -> None:
    vcf = files.vcf(row(files, 50, 1, "A"))
    vcf.write_bytes(b"##fileformat=VCFv4.3\n>no\n")
    with pytest.raises(UserError, match="is no VCF"):
        scored(files, vcf)
    assert sorted(path.name for path in files.fasta.parent.iterdir()) == ["genome.fa", "in.vcf"]


def test_a_file_without_records_is_written_again(files: Files) -> None:
    counts, output = scored(files, files.vcf())
    assert str(counts).startswith("scored 0 alternates of 0 records, 0 records skipped")
    assert values(output) == []


def test_equal_windows_are_read_once_and_any_length_goes() -> None:
    class Counting(Chain):
        rows = 0

        def bits(self, tokens: Tensor, lengths: Tensor) -> Tensor:
            self.rows += len(tokens)
            return super().bits(tokens, lengths)

    model, draw = Counting(), random.Random(2)
    texts = ["".join(draw.choices("ACGT", k=draw.randint(1, 40))) for _ in range(600)]
    texts += texts[:300]
    found = score_all(LikelihoodScorer(model, 40, "forward"), [encode(text) for text in texts])  # type: ignore[arg-type]
    assert model.rows == len(set(texts))
    assert np.allclose(found, [likelihood(text) for text in texts], atol=1e-4)


class Counter(torch.nn.Module):
    """A classifier: logits are the shares of A, C and G, sharpened."""

    def forward(self, tokens: Tensor, lengths: Tensor) -> Tensor:
        return torch.stack([(tokens == code).sum(dim=1) / lengths for code in range(3)], dim=1) * 50


def test_log_odds_of_a_class_keep_their_digits_where_probabilities_are_near_1() -> None:
    tokens = torch.from_numpy(encode("AAAAAAAAAC").astype(np.int64))[None]
    scorer = ClassScorer(Counter(), ["a", "c", "g"], 0, 10, "forward")
    logits = torch.tensor([45.0, 5.0, 0.0], dtype=torch.float64)
    wanted = logits[0] - logits[1:].logsumexp(0)
    assert scorer.score(tokens, torch.tensor([10])).item() == pytest.approx(wanted.item(), rel=1e-6)
    both = ClassScorer(Counter(), ["a", "c", "g"], 1, 10, "both")
    shares = (logits.softmax(0)[1] + torch.tensor([0.0, 0.0, 5.0]).double().softmax(0)[1]) / 2
    assert both.score(tokens, torch.tensor([10])).item() == pytest.approx(torch.logit(shares).item(), rel=1e-6)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], None),
        (["RUN"], "needs --vcf FILE, --fasta GENOME and --output FILE"),
        (["--vcf", "a", "--fasta", "b", "--output", "c.vcf"], "takes one run"),
        (["RUN", "--vcf", "V", "--fasta", "F", "--output", "c.txt"], "ends in .vcf"),
        (["RUN", "--vcf", "none", "--fasta", "F", "--output", "c.vcf"], "there is no file none"),
        (
            ["RUN", "--vcf", "V", "--fasta", "F", "--output", "c.vcf", "--context", "0"],
            "--context takes a whole number",
        ),
        (["RUN", "--vcf", "V", "--fasta", "F", "--output", "c.vcf", "--strand", "up"], "--strand takes forward"),
        (["RUN", "--vcf", "V", "--fasta", "F", "--output", "c.vcf", "--field", "1 x"], "--field takes letters"),
        (["RUN", "--vcf", "V", "--fasta", "F", "--output", "c.vcf", "--fild", "x"], "--field"),
        (["RUN", "--vcf", "V", "--fasta", "F", "--output", "c.vcf"], "there is no run or checkpoint at RUN"),
    ],
)
def test_wrong_command_lines(
    files: Files, words: list[str], said: str | None, capsys: pytest.CaptureFixture[str]
) -> None:
    files.vcf()
    replace = {"V": str(files.fasta.with_name("in.vcf")), "F": str(files.fasta)}
    assert main(["score-variants", *(replace.get(word, word) for word in words)]) == 2
    shown = capsys.readouterr()
    assert "usage: genomics score-variants" in shown.out if said is None else said in shown.err
    assert len(shown.err.splitlines()) <= 1


@pytest.mark.parametrize("command", ["pretrain", "generate", "score-variants", "mutagenesis"])
def test_help_imports_nothing_heavy(command: str) -> None:
    code = (
        "import sys; from attn_genomics.cli import main\n"
        f"assert main(['{command}', '--help']) == 0\n"
        "assert not {'torch', 'numpy', 'pandas', 'pysam', 'matplotlib'} & set(sys.modules), 'heavy'"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, encoding="utf-8", check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"usage: genomics {command}")
