"""Every alternate of a VCF file, scored; the file again, or a table."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, Protocol, cast

import numpy as np

from attn_genomics.commands.scoring import Scorer, device, score_all
from attn_genomics.commands.windows import leftmost, windows
from attn_genomics.data.vcf import INFO, BadRecord, Change, Line, NoBases, Record, Vcf, open_vcf
from attn_genomics.tokens import N, decode, encode
from attn_shared.errors import UserError

_BATCH = 512
"""Alternates whose windows are gathered before they go through the model."""


class Genome(Protocol):
    """What is needed of a genome."""

    @property
    def lengths(self) -> Any: ...

    def match(self, name: str) -> str | None: ...

    def fetch(self, name: str, start: int, end: int) -> np.ndarray: ...


@dataclass
class Counts:
    """What was done, in a sentence."""

    records: int = 0
    alternates: int = 0
    scored_records: int = 0
    skipped_records: int = 0
    skipped_alternates: int = 0
    plain: int = 0
    seconds: float = 0.0

    def __str__(self) -> str:
        text = (
            f"scored {_count(self.alternates, 'alternate')} of {_count(self.scored_records, 'record')}, "
            f"{_count(self.skipped_records, 'record')} skipped"
        )
        if self.skipped_alternates:
            text += f", {_count(self.skipped_alternates, 'further alternate')} of scored records skipped"
        if self.plain:
            text += f", {_count(self.plain, 'record')} without an alternate"
        return f"{text}; {self.alternates / max(self.seconds, 1e-9):,.0f} alternates/s"


def _count(number: int, what: str) -> str:
    return f"{number:,} {what}{'' if number == 1 else 's'}"


@dataclass
class _Entry:
    """A line with what is known of its alternates: a pair of windows, a reason, or neither yet."""

    line: Line
    pairs: dict[int, tuple[np.ndarray, ...]] = field(default_factory=dict)
    reasons: dict[int, str] = field(default_factory=dict)
    scores: dict[int, tuple[float, float]] = field(default_factory=dict)


def score_file(
    scorer: Scorer, vcf: Path, genome: Genome, output: Path, *, context: int, field: str, source: str
) -> Counts:
    """Score all alternates of `vcf` and write `output`, atomically, in the order of the file.

    What cannot be scored is told on stderr, a line each.

    Args:
        context: bases of a window.
        field: INFO field of the scores.
        source: what the header says the model is.

    Raises:
        UserError: a file that cannot be read or written, or an INFO field that is there already.
    """
    counts, begun = Counts(), time.monotonic()
    with open_vcf(vcf) as opened, text_file(output) as out:
        table = output.name.lower().endswith((".tsv", ".tsv.gz"))
        if table:
            out.write("\t".join(("chrom", "pos", "id", "ref", "alt", "score", "reference", "alternate", "note")) + "\n")
        else:
            _write_header(opened, out, field, f"{source}: {scorer.says}, window of {context} bases")
        reader = _Reader(vcf, genome, context, counts)
        gathered: list[_Entry] = []
        waiting = 0
        for line in opened:
            entry = reader.entry(line)
            gathered.append(entry)
            waiting += len(entry.pairs)
            if waiting >= _BATCH or len(gathered) >= 50 * _BATCH:
                _finish(scorer, gathered, out, table, field)
                gathered, waiting = [], 0
        _finish(scorer, gathered, out, table, field)
    counts.seconds = time.monotonic() - begun
    return counts


class _Reader:
    """Lines -> windows, or reasons why there are none."""

    def __init__(self, vcf: Path, genome: Genome, context: int, counts: Counts) -> None:
        self.vcf, self.genome, self.context, self.counts = vcf, genome, context, counts
        self._names: dict[str, str | None] = {}

    def entry(self, line: Line) -> _Entry:
        entry = _Entry(line)
        if line.record is None and line.problem is None:
            return entry
        self.counts.records += 1
        try:
            if line.record is None:
                raise BadRecord(str(line.problem))
            name = self._fits(line.record)
        except BadRecord as error:
            self._skip(line, str(error))
            if line.record is not None:
                entry.reasons = {number: str(error) for number in range(len(line.record.alts))}
            return entry
        bad = []
        for number in range(len(line.record.alts)):
            try:
                entry.pairs[number] = self._windows(line.record, name, line.record.change(number))
            except BadRecord as error:
                entry.reasons[number] = str(error)
                if not isinstance(error, NoBases):
                    bad.append(str(error))
        if entry.pairs:
            self.counts.scored_records += 1
            self.counts.alternates += len(entry.pairs)
            self.counts.skipped_alternates += len(bad)
            if bad:
                told = "; ".join(dict.fromkeys(bad))
                print(f"{self.vcf}, line {line.number}: {told}; the others are scored", file=sys.stderr)
        elif bad:
            self._skip(line, "; ".join(dict.fromkeys(bad)))
        else:
            self.counts.plain += 1
        return entry

    def _skip(self, line: Line, reason: str) -> None:
        self.counts.skipped_records += 1
        print(f"{self.vcf}, line {line.number}: {reason}; skipped", file=sys.stderr)

    def _name(self, chrom: str) -> str | None:
        """The genome's name of a chromosome."""
        if chrom not in self._names:
            found = self._names[chrom] = self.genome.match(chrom)
            if found is not None and found != chrom:
                print(f"{self.vcf}: {chrom} is taken for {found} of the genome", file=sys.stderr)
        return self._names[chrom]

    def _fits(self, record: Record) -> str:
        """The name of the record's chromosome in the genome; its reference is what the genome has there."""
        name = self._name(record.chrom)
        if name is None:
            raise BadRecord(f"the genome has no {record.chrom}")
        length, start, end = int(self.genome.lengths[name]), record.pos - 1, record.pos - 1 + len(record.ref)
        if end > length:
            raise BadRecord(f"position {record.pos} is past the end of {name}, which has {length:,} bases")
        here = self.genome.fetch(name, start, end)
        if not np.array_equal(here, encode(record.ref)):
            raise BadRecord(
                f"reference {_shown(record.ref)}, but the genome has {_shown(decode(here))} at {name}:{record.pos}"
            )
        return name

    def _windows(self, record: Record, name: str, change: Change) -> tuple[np.ndarray, ...]:
        length = int(self.genome.lengths[name])
        if change.end > length:
            raise BadRecord(f"a deletion up to {change.end} is past the end of {name}, which has {length:,} bases")
        gone = self.genome.fetch(name, change.start, change.end) if change.end - change.start <= self.context else None
        if gone is not None and (gone == N).any():
            raise BadRecord("the reference has unknown bases (N) there")

        def fetch(start: int, end: int) -> np.ndarray:
            return self.genome.fetch(name, start, end)

        place = leftmost(fetch, change.start, change.end, encode(change.letters), self.context)
        return windows(fetch, length, *place, self.context)


def _shown(letters: str) -> str:
    return letters if len(letters) <= 20 else f"{letters[:17]}…"


def _finish(scorer: Scorer, entries: list[_Entry], out: IO[str], table: bool, field: str) -> None:
    """Score the windows that were gathered and write their lines."""
    keys = [(entry, number) for entry in entries for number in entry.pairs]
    values = score_all(scorer, [window for entry, number in keys for window in entry.pairs[number]], device())
    for (entry, number), pair in zip(keys, values.reshape(-1, 2)):
        entry.scores[number] = (float(pair[0]), float(pair[1]))
    for entry in entries:
        if table:
            _write_rows(entry, out)
        else:
            out.write(_with_scores(entry, field) + entry.line.end)


def _with_scores(entry: _Entry, field: str) -> str:
    record = entry.line.record
    if record is None or not entry.scores:
        return entry.line.text
    cells = list(record.cells)
    texts = [_text(entry, number) or "." for number in range(len(record.alts))]
    cells[INFO] = f"{'' if cells[INFO] in ('.', '') else cells[INFO] + ';'}{field}={','.join(texts)}"
    return "\t".join(cells)


def _text(entry: _Entry, number: int) -> str:
    if number not in entry.scores:
        return ""
    reference, alternate = entry.scores[number]
    return f"{alternate - reference:.6g}"


def _write_rows(entry: _Entry, out: IO[str]) -> None:
    record = entry.line.record
    for number, letters in enumerate(record.alts if record is not None else ()):
        assert record is not None
        scores = entry.scores.get(number)
        cells = [record.chrom, str(record.pos), record.cells[2], record.cells[3], letters, _text(entry, number)]
        cells += [f"{value:.6g}" for value in scores] if scores else ["", ""]
        out.write("\t".join((*cells, entry.reasons.get(number, ""))) + "\n")


def _write_header(vcf: Vcf, out: IO[str], field: str, description: str) -> None:
    if field in vcf.info_names:
        raise UserError(f"{vcf.path} has an INFO field {field} already; name another one: --field NAME")
    description = description.replace("\\", "\\\\").replace('"', '\\"')
    line = f'##INFO=<ID={field},Number=A,Type=Float,Description="Alternate minus reference, by genomics {description}">'
    last = max((number for number, text in enumerate(vcf.header) if text.startswith("##INFO=")), default=-1)
    if last < 0:
        last = len(vcf.header) - 1
    for number, (text, end) in enumerate(zip([*vcf.header, "\t".join(vcf.columns)], vcf.ends)):
        if number == last + 1:
            out.write(line + end)
        out.write(text + end)


class _Packed:
    """A text file that bgzip, tabix and gzip read."""

    def __init__(self, path: Path) -> None:
        from pysam import BGZFile

        self._file = BGZFile(str(path), "wb", None)

    def write(self, text: str) -> None:
        self._file.write(text.encode("utf-8", "surrogateescape"))

    def close(self) -> None:
        self._file.close()


@contextmanager
def text_file(path: Path) -> Iterator[IO[str]]:
    """A text file to write, bgzip where its name ends in .gz or .bgz; there whole, or not at all.

    Raises:
        UserError: it cannot be written.
    """
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix.lower() in (".gz", ".bgz"):
            file = cast(IO[str], _Packed(part))
        else:
            file = open(part, "w", encoding="utf-8", errors="surrogateescape", newline="")  # noqa: SIM115
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}") from None
    try:
        try:
            yield file
        finally:
            file.close()
        os.replace(part, path)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}") from None
    finally:
        part.unlink(missing_ok=True)
