"""VCF files, read line by line so that one bad record is one clear sentence and the rest is still read.

HTSlib stops at the first line that it cannot parse, and rewrites what it can; here every line is kept as it is, so that
a file which is written again differs only in the fields that were added. Coordinates of `Change` count from 0, half
open; those of messages from 1, as in the file. The Variant Call Format Specification, version 4.3, is the reference.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

from attn_genomics.data.fasta import open_bytes
from attn_shared.errors import UserError

FIXED = ("#CHROM", "POS", "ID", "REF", "ALT", "QUAL", "FILTER", "INFO")
INFO = FIXED.index("INFO")
_LETTERS = re.compile(r"[ACGTNacgtn]+")
_IUPAC = re.compile(r"[ACGTNURYKMSWBDHVacgtnurykmswbdhv]+")
_INFO_NAME = re.compile(r"##INFO=<ID=([^,>]+)")


class BadRecord(Exception):
    """Why a record, or one of its alternates, cannot be used: the rest of a sentence that begins with its place."""


class NoBases(BadRecord):
    """An alternate that means no change by itself, as well-formed files have it: there is nothing to report."""


@dataclass(frozen=True)
class Change:
    """An alternate: bases [start, end) of the reference become `letters`; what both have in common is left out."""

    start: int
    end: int
    letters: str


@dataclass(frozen=True)
class Record:
    """A record as far as its variants go.

    Attributes:
        line: where it stands in the file, from 1.
        cells: all columns as they stand there.
        pos: POS, from 1.
        ref: in upper case.
        alts: as written; empty where ALT is "." alone.
    """

    line: int
    cells: list[str]
    pos: int
    ref: str
    alts: tuple[str, ...]

    @property
    def chrom(self) -> str:
        return self.cells[0]

    def info(self, name: str) -> str | None:
        """The value of an INFO field, None where it is not there or is "."."""
        for part in self.cells[INFO].split(";"):
            key, _, value = part.partition("=")
            if key == name and value not in ("", "."):
                return value
        return None

    def change(self, alternate: int) -> Change:
        """What the alternate of that number does.

        Raises:
            BadRecord: nothing that can be written as bases.
            NoBases: it says only that there may be others ("<NON_REF>" and "<*>" of gVCF).
        """
        letters = self.alts[alternate]
        if letters in ("<NON_REF>", "<*>"):
            raise NoBases(f"alternate {letters} stands for any other base")
        if letters.startswith("<") and letters.endswith(">"):
            return self._symbolic(letters, alternate)
        if letters == "*":
            raise BadRecord("alternate * is what a deletion before it left out: nothing to score")
        if "[" in letters or "]" in letters or (len(letters) > 1 and "." in (letters[0], letters[-1])):
            raise BadRecord(f"alternate {letters} is a breakend, whose other side lies elsewhere")
        if not letters or letters == ".":
            raise BadRecord("an empty alternate between others")
        if not _LETTERS.fullmatch(letters):
            raise BadRecord(f"alternate {_short(letters)} has letters other than A, C, G and T")
        letters = letters.upper()
        if "N" in letters:
            raise BadRecord(f"alternate {_short(letters)} has unknown bases (N)")
        return _trimmed(self.pos - 1, self.ref, letters)

    def _symbolic(self, letters: str, alternate: int) -> Change:
        if letters[1:-1].upper().split(":")[0] != "DEL":
            raise BadRecord(f"alternate {letters} does not say its bases")
        end, length = self.info("END"), self.info("SVLEN")
        lengths = length.split(",") if length else []
        # Without the bases, POS is the base before the deletion; REF holds that one only.
        last = end
        if last is None and len(lengths) == len(self.alts) and lengths[alternate].lstrip("-").isdecimal():
            last = str(self.pos + abs(int(lengths[alternate])))
        if last is None or not last.isdecimal():
            raise BadRecord(f"alternate {letters} has neither END nor SVLEN, which say what is deleted")
        if int(last) <= self.pos:
            raise BadRecord(f"alternate {letters} ends at {last}, before it begins")
        return Change(self.pos, int(last), "")


def _trimmed(start: int, ref: str, alt: str) -> Change:
    """Without the letters that both end with, then those that both begin with."""
    tail = 0
    while tail < min(len(ref), len(alt)) and ref[len(ref) - 1 - tail] == alt[len(alt) - 1 - tail]:
        tail += 1
    ref, alt = ref[: len(ref) - tail], alt[: len(alt) - tail]
    head = 0
    while head < min(len(ref), len(alt)) and ref[head] == alt[head]:
        head += 1
    if head == len(ref) == len(alt):
        raise BadRecord("the alternate is the reference")
    return Change(start + head, start + len(ref), alt[head:])


@dataclass
class Line:
    """A line of the file without its `end`; `record` where it is one, `problem` where it is a bad one."""

    number: int
    text: str
    end: str
    record: Record | None = None
    problem: str | None = None


@dataclass
class Vcf:
    """An open VCF file: its header is read, its records follow by iteration.

    Attributes:
        header: lines before #CHROM.
        ends: the end of each of them, and of the #CHROM line.
        columns: of the #CHROM line.
    """

    path: Path
    _lines: Iterator[tuple[int, str, str]]
    header: list[str] = field(default_factory=list)
    ends: list[str] = field(default_factory=list)
    columns: list[str] = field(default_factory=list)

    @property
    def info_names(self) -> set[str]:
        """INFO fields that the header declares."""
        return {match[1] for line in self.header if (match := _INFO_NAME.match(line))}

    def __iter__(self) -> Iterator[Line]:
        for number, text, end in self._lines:
            line = Line(number, text, end)
            if text.strip() and not text.startswith("#"):
                try:
                    line.record = parse(text, number, len(self.columns))
                except BadRecord as error:
                    line.problem = str(error)
            yield line


def parse(text: str, number: int, columns: int) -> Record:
    """One line as a record.

    Raises:
        BadRecord: it is none.
    """
    cells = text.split("\t")
    if len(cells) != columns:
        hint = "; they are separated by tabs" if len(cells) == 1 else ""
        raise BadRecord(f"{len(cells)} {'column' if len(cells) == 1 else 'columns'} instead of {columns}{hint}")
    chrom, pos, _, ref, alt = cells[:5]
    if not chrom or chrom == ".":
        raise BadRecord("no chromosome")
    if not pos.isdecimal() or not pos.isascii():
        raise BadRecord(f"position {_short(pos)!r} is no whole number")
    if int(pos) == 0:
        raise BadRecord("position 0 is the telomere before the first base")
    if not _IUPAC.fullmatch(ref):
        raise BadRecord(
            "no reference" if ref in ("", ".") else f"reference {_short(ref)} has letters that are no bases"
        )
    alts = () if alt == "." else tuple(alt.split(","))
    return Record(number, cells, int(pos), ref.upper().replace("U", "T"), alts)


def _short(text: str) -> str:
    return text if len(text) <= 20 else f"{text[:17]}…"


@contextmanager
def open_vcf(path: Path) -> Iterator[Vcf]:
    """`with open_vcf(path) as vcf:` the file, plain, gzip or bgzip, its header read.

    Raises:
        UserError: the file cannot be read, is damaged, or is no VCF.
    """
    with open_bytes(path) as file:
        yield _opened(path, file)


def _opened(path: Path, file: IO[bytes]) -> Vcf:
    vcf = Vcf(path, _lines(path, file))
    for number, text, end in vcf._lines:
        vcf.ends.append(end or "\n")
        if number == 1 and text.startswith("BCF"):
            raise UserError(
                f"{path} is BCF, the binary form; write it as text first: bcftools view {path.name} > FILE.vcf"
            )
        if text.startswith("##"):
            vcf.header.append(text)
        elif text.startswith("#CHROM") or text.startswith("#chrom"):
            vcf.columns = text.split("\t")
            break
        else:
            raise UserError(
                f"{path} is no VCF: line {number} comes before a line that begins with #CHROM and names the columns"
            )
    if not vcf.columns:
        raise UserError(f"{path} is no VCF: no line begins with #CHROM")
    if tuple(vcf.columns[: len(FIXED)]) != FIXED:
        raise UserError(
            f"{path}: the line that begins with #CHROM names other columns than {', '.join(FIXED)}, separated by tabs"
        )
    return vcf


def _lines(path: Path, file: IO[bytes]) -> Iterator[tuple[int, str, str]]:
    """Number, text and end of every line. Bytes that are no UTF-8 come back as they were when they are written."""
    number = 0
    try:
        for raw in file:
            number += 1
            text = raw.decode("utf-8", "surrogateescape")
            if number == 1:
                text = text.removeprefix("\ufeff")
            body = text.rstrip("\r\n")
            yield number, body, text[len(body) :]
    except EOFError:
        raise UserError(
            f"{path} ends in the middle of its compressed data, after line {number}; copy it again"
        ) from None
    except (OSError, zlib.error) as error:
        raise UserError(f"{path} is damaged after line {number}: {error}; copy it again") from None
