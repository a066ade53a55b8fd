"""Labelled sequences from files and folders of the user's own, and from the annotation of yeast."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from attn_genomics.data.fasta import Genome, Sequences, records, turned
from attn_genomics.data.places import Places, read_bed, read_gtf
from attn_genomics.data.tables import PARTS, Table, read_table, sequence
from attn_genomics.data.windows import Span, centred, cut, gaps, merge
from attn_genomics.genome.cards import FILE_SUFFIXES as FASTA_SUFFIXES
from attn_genomics.sequences.cards import YEAST_FASTA, YEAST_GTF
from attn_genomics.sequences.labelled import Labelled
from attn_genomics.sequences.options import SequencesDataConfig
from attn_genomics.sequences.splits import TEST, TRAIN, VAL
from attn_genomics.tokens import N
from attn_shared.errors import UserError
from attn_shared.seeding import derive

BED_SUFFIXES = (".bed", ".bed.gz")
GTF_SUFFIXES = (".gtf", ".gff", ".gff3", ".gtf.gz", ".gff.gz", ".gff3.gz")
TABLE_SUFFIXES = (".csv", ".tsv", ".txt", ".csv.gz", ".tsv.gz", ".txt.gz")
_MOST_NAMES = 100  # of BED's fourth column, to be classes
_CODING_LENGTH = 200
_TRIES = 20


def read_own(path: Path, args: SequencesDataConfig) -> Labelled:
    """A file or folder of the user's own.

    Raises:
        UserError: what cannot be read, in one sentence.
    """
    name = path.name.lower()
    if not path.exists():
        raise UserError(f"there is no file {path}")
    if path.is_dir():
        return _folder(path, args)
    if name.endswith(FASTA_SUFFIXES):
        raise UserError(f"{path.name} has no classes; to classify, name a folder with one FASTA file for each class")
    if name.endswith(BED_SUFFIXES):
        return from_bed(path, args)
    if name.endswith(GTF_SUFFIXES):
        return _from_gtf(path, args)
    return _from_tables([(None, path)], path.name, args)


# -- tables -----------------------------------------------------------------------------------------------------------


def _table(path: Path, args: SequencesDataConfig) -> Table:
    columns = {"sequence": args.sequence_column, "label": args.label_column, "split": args.split_column}
    return read_table(path, columns=columns, delimiter=args.delimiter)


def _from_tables(files: Sequence[tuple[int | None, Path]], source: str, args: SequencesDataConfig) -> Labelled:
    """One table, or several of which each is a part."""
    codes: list[np.ndarray] = []
    label, part, group, notes = [], [], [], []
    genome = None
    for number, path in files:
        table = _table(path, args)
        if table.label is None:
            raise UserError(f"{path.name} has no column of labels; name it with --data_args.label_column")
        if table.places is not None:
            genome = genome or _genome(args, path.name)
            places = _placed(table.places, genome)
            codes += place_codes(genome, places, args.length)
            group.append(places.chrom.astype(str))
            notes += places.notes
        else:
            assert table.sequences is not None
            codes += [table.sequences[row] for row in range(len(table))]
        label.append(table.label)
        notes += table.notes
        given = table.part if number is None else np.full(len(table), number, np.int64)
        if given is not None:
            part.append(given)
    return Labelled(
        source=source,
        sequences=Sequences(codes),
        label=np.concatenate(label),
        part=np.concatenate(part) if len(part) == len(files) else None,
        group=np.concatenate(group) if len(group) == len(files) else None,
        notes=list(dict.fromkeys(notes)),
    )


# -- coordinates ------------------------------------------------------------------------------------------------------


def _genome(args: SequencesDataConfig, source: str) -> Genome:
    if not args.fasta:
        raise UserError(f"{source} holds coordinates; name the genome they are of with --data_args.fasta")
    return Genome(Path(args.fasta).expanduser())


def _placed(places: Places, genome: Genome) -> Places:
    return places.within(genome.lengths, genome.path.name)


def place_codes(genome: Genome, places: Places, length: int) -> list[np.ndarray]:
    """Sequences of places, widened or cut around their middle to `length` (0 = as they are); strand -1 is turned."""
    rows = zip(places.chrom.tolist(), places.start.tolist(), places.end.tolist(), places.strand.tolist())
    found = [(cut(genome, name, *centred(start, end, length)), way) for name, start, end, way in rows]
    return [turned(codes) if way < 0 else codes for codes, way in found]


def from_bed(path: Path, args: SequencesDataConfig) -> Labelled:
    """A BED file. Its fourth column holds classes where it has a few names; else its places are the class `inside`,
    and as many places of the same lengths outside all of them are the class `outside`."""
    genome = _genome(args, path.name)
    places = _placed(read_bed(path), genome)
    names, counts = np.unique(places.name.astype(str), return_counts=True)
    if 2 <= len(names) <= _MOST_NAMES and counts.min() >= 2 and len(places) >= 2 * len(names):
        return Labelled(
            source=path.name,
            sequences=Sequences(place_codes(genome, places, args.length)),
            label=places.name.astype(str),
            group=places.chrom.astype(str),
            notes=[*places.notes, f"{path.name}: classes are the names in its fourth column"],
        )
    return _against_outside(genome, places, args, ("outside", "inside"))


def _from_gtf(path: Path, args: SequencesDataConfig) -> Labelled:
    genome = _genome(args, path.name)
    places = _placed(read_gtf(path, args.feature), genome)
    return _against_outside(genome, places, args, ("other", args.feature))


def _against_outside(genome: Genome, places: Places, args: SequencesDataConfig, classes: tuple[str, str]) -> Labelled:
    keys = list(zip(places.chrom, places.start.tolist(), places.end.tolist(), places.strand.tolist()))
    first = np.array(sorted({key: row for row, key in reversed(list(enumerate(keys)))}.values()), np.int64)
    notes = list(places.notes)
    if len(first) < len(places):
        notes.append(f"{places.source}: {len(places) - len(first):,} places that repeat another one left out")
        places = places.take(first)
    other = outside(genome, places, args.length, args.shuffle)
    if len(other) < len(places):
        notes.append(
            f"{places.source}: {len(places) - len(other):,} places have no other of their length outside all places"
        )
    if not len(other):
        raise UserError(f"{places.source} leaves no place of {genome.path.name} free for the class {classes[0]!r}")
    notes.append(f"class {classes[0]}: places drawn outside all those of {places.source}, of the same lengths")
    codes = place_codes(genome, places, args.length) + place_codes(genome, other, args.length)
    return Labelled(
        source=places.source,
        sequences=Sequences(codes),
        label=np.repeat([classes[1], classes[0]], [len(places), len(other)]),
        group=np.concatenate([places.chrom, other.chrom]).astype(str),
        classes=list(classes),
        notes=notes,
    )


def outside(genome: Genome, places: Places, length: int, seed: int) -> Places:
    """For each place one of the same length and strand that touches none of them, on the same record if it can be.

    Args:
        length: bases that places are widened or cut to; 0 = as they are.
        seed: of the draws.
    """
    rng = np.random.default_rng(derive(seed, "outside"))
    wide = [(name, *centred(start, end, max(length, end - start))) for name, start, end in places.spans()]
    free = gaps(merge((name, max(0, start), end) for name, start, end in wide), genome.lengths)
    by_name: dict[str, list[Span]] = {}
    for span in free:
        by_name.setdefault(span[0], []).append(span)
    rows, found = [], []
    for row, (name, start, end) in enumerate(places.spans()):
        size = length or end - start
        for spans in (by_name.get(name, []), free):
            drawn = _draw(genome, spans, size, rng)
            if drawn is not None:
                rows.append(row)
                found.append(drawn)
                break
    chosen = places.take(np.array(rows, np.int64))
    chosen.chrom = np.array([name for name, _, _ in found], object)
    chosen.start = np.array([start for _, start, _ in found], np.int64)
    chosen.end = np.array([end for _, _, end in found], np.int64)
    return chosen


def _draw(genome: Genome, spans: Sequence[Span], size: int, rng: np.random.Generator) -> Span | None:
    """`size` places inside a span, drawn, not more than half of them N; None where there are none."""
    room = np.array([max(0, end - start - size + 1) for _, start, end in spans], np.int64)
    limits = np.cumsum(room)
    if not len(limits) or not limits[-1]:
        return None
    for _ in range(_TRIES):
        draw = int(rng.integers(limits[-1]))
        number = int(np.searchsorted(limits, draw, side="right"))
        name, first, _ = spans[number]
        start = first + draw - int(limits[number] - room[number])
        if (genome.fetch(name, start, start + size) == N).mean() <= 0.5:
            return name, start, start + size
    return None


# -- folders ----------------------------------------------------------------------------------------------------------


def _folder(path: Path, args: SequencesDataConfig) -> Labelled:
    entries = sorted(entry for entry in path.iterdir() if not entry.name.startswith("."))
    parts = {entry: PARTS[_stem(entry)] for entry in entries if _stem(entry) in PARTS}
    tables = [(number, entry) for entry, number in parts.items() if entry.name.lower().endswith(TABLE_SUFFIXES)]
    if tables and TRAIN in {number for number, _ in tables}:
        return _from_tables(tables, path.name, args)
    folders = [(number, entry) for entry, number in parts.items() if entry.is_dir()]
    if folders:
        return _classes(path.name, folders, args)
    return _classes(path.name, [(None, path)], args)


def _stem(path: Path) -> str:
    """Name of a file without suffixes that tell its format, in lower case."""
    name = path.name.lower()
    ends = [suffix for suffix in (*FASTA_SUFFIXES, *TABLE_SUFFIXES) if name.endswith(suffix)]
    return name[: -len(max(ends, key=len))] if ends and path.is_file() else name


def _classes(source: str, folders: Sequence[tuple[int | None, Path]], args: SequencesDataConfig) -> Labelled:
    """Folders of which each holds a FASTA file, a table of coordinates or a folder of texts for every class."""
    codes: list[np.ndarray] = []
    label: list[str] = []
    part: list[int] = []
    group: list[str] = []
    notes: list[str] = []
    genome = None
    known: set[str] | None = None
    for number, folder in folders:
        here: set[str] = set()
        for entry in sorted(folder.iterdir()):
            lower = entry.name.lower()
            found: list[np.ndarray]
            if entry.name.startswith("."):
                continue
            if entry.is_dir():
                found = _texts(entry)
            elif lower.endswith(FASTA_SUFFIXES):
                found = [one for _, one in records(entry, distinct=False)]
                if any(not len(one) for one in found):
                    notes.append(f"{entry.name}: {sum(not len(one) for one in found):,} records without bases left out")
                    found = [one for one in found if len(one)]
            elif lower.endswith((".csv", ".csv.gz", ".tsv", ".tsv.gz")):
                table = _table(entry, args)
                notes += table.notes
                if table.places is not None:
                    genome = genome or _genome(args, entry.name)
                    places = _placed(table.places, genome)
                    notes += places.notes
                    found = place_codes(genome, places, args.length)
                    group += places.chrom.astype(str).tolist()
                else:
                    assert table.sequences is not None
                    found = [table.sequences[row] for row in range(len(table))]
            else:
                continue
            if not found:
                raise UserError(f"{entry} holds no sequence")
            name = entry.name[: len(_stem(entry))]
            if name in here:
                raise UserError(f"{folder} holds class {name!r} twice")
            here.add(name)
            codes += found
            label += [name] * len(found)
            part += [-1 if number is None else number] * len(found)
        if known is not None and here != known:
            raise UserError(f"the folders of {source} hold different classes: {', '.join(sorted(here ^ known))}")
        known = here
    if not codes:
        raise UserError(f"the folder {source} holds no FASTA file (one a class) and no train and test part")
    return Labelled(
        source=source,
        sequences=Sequences(codes),
        label=np.array(label),
        part=np.array(part, np.int64) if part[0] >= 0 else None,
        group=np.array(group) if len(group) == len(codes) else None,
        notes=list(dict.fromkeys(notes)),
    )


def _texts(folder: Path) -> list[np.ndarray]:
    """One sequence a file, as Genomic Benchmarks writes them."""
    found = []
    for path in sorted(folder.glob("*.txt")):
        try:
            found.append(sequence(path.read_bytes(), str(path)))
        except OSError as error:
            raise UserError(f"{path} cannot be read: {error.strerror or error}") from None
    return found


# -- yeast ------------------------------------------------------------------------------------------------------------


def read_yeast_coding(folder: Path, args: SequencesDataConfig) -> Labelled:
    """Pieces of 200 bases (or `length`) inside coding sequences, and as many that touch none, of every chromosome."""
    length = args.length or _CODING_LENGTH
    genome = Genome(folder / YEAST_FASTA.path)
    coding = merge(read_gtf(folder / YEAST_GTF.path, "CDS").within(genome.lengths, genome.path.name).spans())
    other = gaps(coding, genome.lengths)
    rng = np.random.default_rng(derive(args.shuffle, "coding"))
    codes: list[np.ndarray] = []
    label: list[str] = []
    group: list[str] = []
    for name in genome.names:
        if name == "Mito":
            continue
        both = [_pieces([span for span in spans if span[0] == name], length, rng) for spans in (other, coding)]
        count = min(map(len, both))
        for kind, pieces in zip(("other", "coding"), both):
            drawn = np.sort(rng.permutation(len(pieces))[:count])
            codes += [genome.fetch(name, pieces[row], pieces[row] + length) for row in drawn]
            label += [kind] * count
            group += [name] * count
    chromosome = np.array(group)
    return Labelled(
        source="yeast_coding",
        sequences=Sequences(codes),
        label=np.array(label),
        part=np.select([chromosome == "XVI", chromosome == "V"], [TEST, VAL], TRAIN),
        group=chromosome,
        classes=["other", "coding"],
    )


def _pieces(spans: Sequence[Span], length: int, rng: np.random.Generator) -> list[int]:
    """Where pieces of spans begin that do not overlap; the first of a span is shifted by a draw, so that none is
    known by where a gene begins."""
    starts: list[int] = []
    for _, start, end in spans:
        count, rest = divmod(end - start, length)
        if count:
            first = start + int(rng.integers(rest + 1))
            starts += range(first, first + count * length, length)
    return starts
