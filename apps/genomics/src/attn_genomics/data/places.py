"""Places in genomes: BED, GTF and GFF3 files, plain or packed.

Parsed strictly, line by line, so that every line that cannot be right is told; the tests compare what is read with
HTSlib's own parsers.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from attn_genomics.data.fasta import match_name, read_blocks
from attn_genomics.data.windows import Span
from attn_shared.errors import UserError

STRANDS = {"+": 1, "-": -1, ".": 0, "?": 0, "": 0}


@dataclass(kw_only=True)
class Places:
    """Places, counted from 0, the end excluded, as in BED.

    Attributes:
        source: name of the file.
        chrom: (N,) names of records.
        start, end: (N,) int64.
        strand: (N,) int8: 1, -1, 0 = none told.
        name: (N,) BED's fourth column, a GTF file's feature; "" where there is none.
        line: (N,) of the file.
        notes: what a user must know, such as names that were matched.
    """

    source: str
    chrom: np.ndarray
    start: np.ndarray
    end: np.ndarray
    strand: np.ndarray
    name: np.ndarray
    line: np.ndarray
    notes: list[str] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.start)

    def take(self, rows: np.ndarray) -> Places:
        """Some of them."""
        return Places(
            source=self.source,
            chrom=self.chrom[rows],
            start=self.start[rows],
            end=self.end[rows],
            strand=self.strand[rows],
            name=self.name[rows],
            line=self.line[rows],
            notes=self.notes,
        )

    def where(self, row: int) -> str:
        """`file:line` of a place."""
        return f"{self.source}:{self.line[row]}"

    def spans(self) -> list[Span]:
        """As (record, first place, place behind the last)."""
        return list(zip(self.chrom.tolist(), self.start.tolist(), self.end.tolist()))

    def within(self, lengths: dict[str, int], genome: str) -> Places:
        """The same places with the names that the genome's records have.

        "chr1" is taken for "1" and the other way round, which the notes tell.

        Args:
            lengths: bases of each record.
            genome: name of its file.

        Raises:
            UserError: a place whose record or end the genome does not have, with its line.
        """
        names, number = np.unique(self.chrom.astype(str), return_inverse=True)
        known = [match_name(str(name), lengths) for name in names]
        lost = [i for i, name in enumerate(known) if name is None]
        if lost:
            rows = np.isin(number, lost)
            raise UserError(
                f"{self.where(int(rows.argmax()))}: {genome} has no record {self.chrom[rows.argmax()]!r} "
                f"({int(rows.sum()):,} of {len(self):,} places are on records it does not have; it has "
                f"{_few(list(lengths))})"
            )
        chrom = np.array(known, object)[number]
        size = np.array([lengths[str(name)] for name in known], np.int64)[number]
        over = self.end > size
        if over.any():
            row = int(over.argmax())
            raise UserError(
                f"{self.where(row)}: {self.chrom[row]}:{self.start[row]}-{self.end[row]} ends behind the record, which "
                f"has {size[row]:,} bases in {genome}; is the file of another release of the genome?"
            )
        changed = [(str(name), one) for name, one in zip(names, known) if name != one]
        notes = list(self.notes)
        if changed:
            notes.append(
                f"{self.source}: {len(changed)} names of records matched to those of {genome}, such as "
                f"{changed[0][0]} to {changed[0][1]}"
            )
        return Places(
            source=self.source,
            chrom=chrom,
            start=self.start,
            end=self.end,
            strand=self.strand,
            name=self.name,
            line=self.line,
            notes=notes,
        )


def _few(names: Sequence[str], most: int = 5) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most:,} more" if len(names) > most else "")


Row = tuple[str, int, int, int, str, int]


def places(source: str, rows: Iterable[Row], notes: Sequence[str] = ()) -> Places:
    """From rows of (record, start, end, strand, name, line)."""
    table = list(rows)
    columns = list(zip(*table)) if table else [()] * 6
    return Places(
        source=source,
        chrom=np.array(columns[0], object),
        start=np.array(columns[1], np.int64),
        end=np.array(columns[2], np.int64),
        strand=np.array(columns[3], np.int8),
        name=np.array(columns[4], object),
        line=np.array(columns[5], np.int64),
        notes=list(notes),
    )


def read_lines(path: Path) -> Iterator[tuple[int, str]]:
    """Number and text of every line of a file, plain or packed.

    Raises:
        UserError: it cannot be read, or is no text.
    """
    rest, number = b"", 0
    for block in read_blocks(path):
        if number == 0 and not rest:
            block = block.removeprefix(b"\xef\xbb\xbf")
        lines = (rest + block).split(b"\n")
        rest = lines.pop()
        for line in lines:
            number += 1
            yield number, _text(line, path, number)
    if rest:
        yield number + 1, _text(rest, path, number + 1)


def _text(line: bytes, path: Path, number: int) -> str:
    if b"\0" in line:
        raise UserError(f"{path.name}:{number}: a zero byte; the file is binary or damaged")
    try:
        return line.decode()
    except UnicodeDecodeError:
        return line.decode("latin-1")


def _whole(text: str, what: str, where: str) -> int:
    try:
        if text.strip() != text or "_" in text:
            raise ValueError
        return int(text)
    except ValueError:
        raise UserError(f"{where}: {what} {text!r} is no whole number") from None


def _strand(text: str, where: str) -> int:
    if text not in STRANDS:
        raise UserError(f"{where}: strand {text!r} is none of + - .")
    return STRANDS[text]


def read_bed(path: Path) -> Places:
    """A BED file of 3 to 12 columns, or more; `track`, `browser` and comment lines are passed over.

    Raises:
        UserError: a line that is no place, or no place at all.
    """
    return places(path.name, _bed_rows(path))


def _bed_rows(path: Path) -> Iterator[Row]:
    width = 0
    for number, line in read_lines(path):
        if not line.strip() or line.startswith("#") or line.split(None, 1)[0] in ("track", "browser"):
            continue
        where = f"{path.name}:{number}"
        cells = line.split("\t") if "\t" in line else line.split()
        if len(cells) < 3:
            raise UserError(f"{where}: {len(cells)} columns where BED has at least 3 (record, start, end)")
        if not width:
            width = len(cells)
        elif len(cells) != width:
            raise UserError(f"{where}: {len(cells)} columns where the lines before have {width}")
        if not cells[0].strip():
            raise UserError(f"{where}: no name of a record in the first column")
        start, end = _whole(cells[1], "start", where), _whole(cells[2], "end", where)
        if start < 0:
            raise UserError(f"{where}: start {start} lies before the record; BED counts from 0")
        if end <= start:
            raise UserError(f"{where}: end {end} is not behind start {start}; BED's end is excluded")
        strand = _strand(cells[5], where) if width > 5 else 0
        if width >= 12:
            _check_blocks(cells, end - start, where)
        yield cells[0].strip(), start, end, strand, cells[3].strip() if width > 3 else "", number
    if not width:
        raise UserError(f"{path.name} holds no place")


def _check_blocks(cells: Sequence[str], length: int, where: str) -> None:
    count = _whole(cells[9], "number of blocks", where)
    sizes, starts = (
        [_whole(cell, what, where) for cell in text.split(",") if cell]
        for text, what in ((cells[10], "size of a block"), (cells[11], "start of a block"))
    )
    if len(sizes) != count or len(starts) != count:
        raise UserError(f"{where}: {len(sizes)} sizes and {len(starts)} starts of blocks where column 10 says {count}")
    if any(start < 0 or start + size > length for start, size in zip(starts, sizes)):
        raise UserError(f"{where}: a block lies outside the place")


def read_gtf(path: Path, feature: str | None = None) -> Places:
    """A GTF or GFF3 file; its places (counted from 1, the end included) become those of BED.

    Args:
        feature: only features of this kind, such as "CDS"; None = all.

    Raises:
        UserError: a line that is no feature, or no such feature at all.
    """
    kinds: dict[str, int] = {}
    rows = list(_gtf_rows(path, feature, kinds))
    if not kinds:
        raise UserError(f"{path.name} holds no feature")
    if not rows:
        usual = sorted(kinds, key=lambda kind: -kinds[kind])
        raise UserError(f"{path.name} holds no feature {feature!r}; it holds {_few(usual)}")
    return places(path.name, rows)


def _gtf_rows(path: Path, feature: str | None, kinds: dict[str, int]) -> Iterator[Row]:
    for number, line in read_lines(path):
        if line.startswith("##FASTA"):
            return
        if not line.strip() or line.startswith("#"):
            continue
        where = f"{path.name}:{number}"
        cells = line.split("\t")
        if len(cells) not in (8, 9):
            hint = "; GTF is separated by tabs" if len(cells) == 1 and len(line.split()) >= 8 else ""
            raise UserError(f"{where}: {len(cells)} columns where GTF and GFF3 have 9{hint}")
        if not cells[0] or not cells[2]:
            raise UserError(f"{where}: no name of a record or no feature")
        start, end = _whole(cells[3], "start", where), _whole(cells[4], "end", where)
        if start < 1:
            raise UserError(f"{where}: start {start} lies before the record; GTF and GFF3 count from 1")
        if end < start:
            raise UserError(f"{where}: end {end} lies before start {start}")
        strand = _strand(cells[6], where)
        kinds[cells[2]] = kinds.get(cells[2], 0) + 1
        if feature is None or cells[2] == feature:
            yield cells[0], start - 1, end, strand, cells[2], number
