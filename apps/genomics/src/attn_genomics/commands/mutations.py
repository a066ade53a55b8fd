"""Every base of a sequence with each of the three others: scores, a table, and a picture a sequence."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from attn_genomics.commands.scoring import Scorer, device, score_all
from attn_genomics.commands.variants import text_file
from attn_genomics.commands.windows import windows
from attn_genomics.data.fasta import Genome, records, turned
from attn_genomics.data.places import read_bed
from attn_genomics.tokens import BASES, N, decode, encode
from attn_shared.errors import UserError
from attn_shared.runs import slug, write_atomically


@dataclass(frozen=True, kw_only=True)
class Target:
    """What is changed, within what is read.

    Attributes:
        name: of the sequence.
        codes: all that may be read.
        start, end: bases of `codes` that are changed.
        chrom: record of a genome; "" where the sequence is of none.
        first: place in the record (from 0) of `codes[start]`; of the strand "-" it is the last base of the place.
        strand: "+" or "-".
    """

    name: str
    codes: np.ndarray
    start: int
    end: int
    chrom: str = ""
    first: int = 0
    strand: str = "+"

    @property
    def letters(self) -> str:
        """What is changed."""
        return decode(self.codes[self.start : self.end])

    def position(self, place: int) -> int:
        """Where a base lies, from 1: in its record, or in the sequence."""
        if not self.chrom:
            return place + 1
        return (self.first + place if self.strand != "-" else self.first - place) + 1


def of_text(text: str) -> Iterator[Target]:
    """The records of a FASTA file, or one sequence as letters.

    Raises:
        UserError: neither.
    """
    if Path(text).expanduser().is_file():
        for name, codes in records(Path(text).expanduser()):
            yield Target(name=name, codes=codes, start=0, end=len(codes))
    elif text and set(text.upper()) <= set("ACGTUN"):
        yield Target(name="sequence", codes=encode(text), start=0, end=len(text))
    else:
        raise UserError(f"mutagenesis takes letters of DNA or a FASTA file, and there is no file {text}")


def of_bed(bed: Path, fasta: Path, around: int = 1 << 16) -> Iterator[Target]:
    """The places of a BED file with `around` bases on both sides, each on its strand.

    Raises:
        UserError: a file that cannot be read, or a place that the genome does not have.
    """
    genome, places = Genome(fasta), read_bed(bed)
    for number in range(len(places)):
        chrom, start, end = str(places.chrom[number]), int(places.start[number]), int(places.end[number])
        name = str(places.name[number]) if places.name[number] else f"{chrom}:{start + 1}-{end}"
        found = genome.match(chrom)
        where = f"{bed}, line {int(places.line[number])}"
        if found is None:
            raise UserError(f"{where}: the genome has no {chrom}")
        if end > genome.lengths[found]:
            raise UserError(f"{where}: {chrom} ends at {genome.lengths[found]:,}, before {end:,}")
        left, right = max(0, start - around), min(genome.lengths[found], end + around)
        codes = genome.fetch(found, left, right)
        if places.strand[number] < 0:
            codes, inner, first, strand = turned(codes), (right - end, right - start), end - 1, "-"
        else:
            inner, first, strand = (start - left, end - left), start, "+"
        yield Target(name=name, codes=codes, start=inner[0], end=inner[1], chrom=found, first=first, strand=strand)


def chosen(targets: Iterator[Target], name: str | None, limit: int) -> list[Target]:
    """Those of that name, or all.

    Raises:
        UserError: there is none, one has no bases, or one is longer than `limit`.
    """
    names, found = [], []
    for target in targets:
        names.append(target.name)
        if name is None or target.name == name:
            found.append(target)
    if not found:
        shown = ", ".join(names[:5]) + (", …" if len(names) > 5 else "")
        raise UserError(f"there is no sequence {name}; there are: {shown}" if names else "there are no sequences")
    for target in found:
        bases = target.end - target.start
        if not bases:
            raise UserError(f"{target.name} has no bases")
        if bases > limit:
            raise UserError(
                f"{target.name} has {bases:,} bases, so {3 * bases:,} changes; name a shorter place with --bed, or "
                f"allow it with --limit {bases}"
            )
    return found


def effects(scorer: Scorer, target: Target, context: int) -> np.ndarray:
    """(L, 4) what each base in each place does: 0 for the base that is there, NaN where that is unknown (N)."""
    result = np.full((target.end - target.start, 4), np.nan)
    keys: list[tuple[int, int]] = []
    pairs: list[np.ndarray] = []
    for place in range(len(result)):
        at = target.start + place
        here = int(target.codes[at])
        if here >= N:
            continue
        result[place, here] = 0.0
        for base in range(4):
            if base != here:
                letters = np.array([base], dtype=np.uint8)
                pairs += windows(
                    lambda first, last: target.codes[first:last], len(target.codes), at, at + 1, letters, context
                )
                keys.append((place, base))
    if keys:
        values = score_all(scorer, pairs, device()).reshape(-1, 2)
        for (place, base), (reference, changed) in zip(keys, values):
            result[place, base] = changed - reference
    return result


def write(scorer: Scorer, targets: Sequence[Target], output: Path, *, context: int) -> list[Path]:
    """mutagenesis.tsv and the pictures, in the folder `output`; the files written."""
    from attn_genomics.commands.heatmap import picture
    from attn_shared import plotting
    from attn_shared.trainer import output_folder

    written = [output / "mutagenesis.tsv"]
    with output_folder(output), text_file(written[0]) as file:
        file.write("sequence\tposition\tchrom\tstrand\tref\talt\tscore\n")
        names: set[str] = set()
        for target in targets:
            found = effects(scorer, target, context)
            for place, row in enumerate(found):
                here = int(target.codes[target.start + place])
                for base in range(4) if here < N else ():
                    if base != here:
                        cells = [target.name, str(target.position(place)), target.chrom or ".", target.strand]
                        file.write("\t".join((*cells, BASES[here], BASES[base], f"{row[base]:.6g}")) + "\n")
            positions = [target.position(place) for place in range(len(found))]
            name = slug(target.name)
            while name in names:
                name += "_"
            names.add(name)
            written.append(output / f"{name}.png")
            write_atomically(
                written[-1], plotting.png(picture(target.name, target.letters, found, positions, scorer.says))
            )
    return written
