"""`genomics data check FILE`: what is wrong with a file of the user's own, a sentence each."""

from __future__ import annotations

from pathlib import Path

from attn_genomics.data.fasta import stream
from attn_genomics.data.places import read_bed, read_gtf
from attn_genomics.genome.cards import FILE_SUFFIXES as FASTA_SUFFIXES
from attn_genomics.genome.options import GenomeDataConfig
from attn_genomics.sequences.options import SequencesDataConfig
from attn_genomics.tokens import N
from attn_shared.errors import UserError

_MANY_UNKNOWN = 0.5
_RARE = 0.01


def check_file(path: Path, args: SequencesDataConfig | GenomeDataConfig | None = None) -> list[str]:
    """Problems of a FASTA file, of a table, BED or GTF file, or of a folder; empty when there is none.

    Args:
        args: options of its kind; None = the defaults.
    """
    path = Path(path)
    try:
        if path.is_file() and path.name.lower().endswith(FASTA_SUFFIXES):
            return check_fasta(path) + (_check_genome(path, args) if isinstance(args, GenomeDataConfig) else [])
        return check_sequences(path, args if isinstance(args, SequencesDataConfig) else SequencesDataConfig())
    except UserError as error:
        return [str(error)]


def check_fasta(path: Path) -> list[str]:
    """Every letter of a FASTA file is read, in pieces; see `attn_genomics.data.fasta.stream` for what is refused."""
    problems = []
    bases = unknown = 0
    for piece in stream(path):
        if piece.last and not piece.start and not len(piece.codes):
            problems.append(f"{path.name}:{piece.line}: record {piece.name!r} is empty")
        bases += len(piece.codes)
        unknown += int((piece.codes == N).sum())
    if not bases:
        problems.append(f"{path.name} holds records but no bases")
    elif unknown / bases > _MANY_UNKNOWN:
        problems.append(f"{path.name}: {unknown / bases:.0%} of its {bases:,} bases are unknown (N or other letters)")
    return problems


def _check_genome(path: Path, args: GenomeDataConfig) -> list[str]:
    """Whether it can be split as the options say."""
    from attn_genomics.genome.data import load_genome, prepare

    prepare(load_genome(str(path)), str(path), args)
    return []


def check_sequences(path: Path, args: SequencesDataConfig) -> list[str]:
    """Whether labelled sequences can be read and split; sequences with several classes, rare classes, N."""
    from attn_genomics.sequences.data import load, prepare

    name = path.name.lower()
    if path.is_file() and not args.fasta and name.endswith((".bed", ".bed.gz")):
        read_bed(path)
        return []
    if path.is_file() and not args.fasta and name.endswith((".gtf", ".gff", ".gff3", ".gtf.gz", ".gff.gz", ".gff3.gz")):
        read_gtf(path)
        return []
    data = load(str(path), args)
    bundle = prepare(data, args)
    problems = []
    again = str(bundle.facts.get("repeated sequences", ""))
    if "several classes" in again:
        problems.append(f"{path.name}: repeated sequences: {again}")
    for part in ("val", "test"):
        found = str(bundle.facts.get(f"{part} sequences that are also in train", "0 of"))
        if data.part is not None and (not found.startswith("0 of") or "other strands" in found):
            problems.append(f"{path.name}: {part} sequences that are also in train: {found}")
    labels = data.label.tolist()
    for one in dict.fromkeys(labels):
        share = labels.count(one) / len(labels)
        if share < _RARE:
            problems.append(f"{path.name}: class {one!r} has {labels.count(one):,} of {len(labels):,} sequences only")
    unknown = float((data.sequences.flat == N).mean()) if data.sequences.flat.size else 0.0
    if unknown > _MANY_UNKNOWN:
        problems.append(f"{path.name}: {unknown:.0%} of the bases are unknown (N or other letters)")
    return problems
