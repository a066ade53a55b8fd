"""Classes of sequences in files, streamed: memory does not grow with the file.

Sequences up to the longest of training are read whole. Longer ones are read in windows of that length, `stride` bases
apart, the last of which ends with the sequence. Windows without any known base are left out.
"""

from __future__ import annotations

import sys
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import numpy as np
import torch

from attn_genomics.data.fasta import Genome, stream, turned
from attn_genomics.data.places import Places, read_bed
from attn_genomics.data.tables import read_table
from attn_genomics.data.windows import cut
from attn_genomics.output import Pace, check_inputs, is_bed, is_fasta, stem, written
from attn_genomics.tokens import N
from attn_shared.errors import UserError

if TYPE_CHECKING:
    from attn_genomics.sequences.task import SequencesTask

_KINDS = "FASTA, tables of sequences or places, BED with --fasta"


@dataclass(frozen=True)
class Window:
    """What the model reads at once.

    Attributes:
        name: of the sequence or the record it is on.
        start, end: places on it, counted from 0, the end excluded.
        codes: uint8, as the model reads them.
        strand: "+", "-" or ".".
        source: number of the sequence in its file, which keeps sequences of one name apart.
    """

    name: str
    start: int
    end: int
    codes: np.ndarray
    strand: str
    source: int


@dataclass
class Left:
    """What was left out."""

    empty: int = 0
    unknown: int = 0


def predict_files(task: SequencesTask, inputs: Sequence[Path], output: Path, options: Mapping[str, Any]) -> list[Path]:
    """`<stem>.classes.tsv`, `.bed` or `.bedgraph` for each file.

    Raises:
        UserError: a file that cannot be read; the ones before it have been written, of it nothing.
    """
    form, stride, whole = options.get("format", "tsv"), int(options.get("stride", 0)), bool(options.get("whole", False))
    if stride < 0:
        raise UserError(f"--stride must be 0 or more, got {stride}")
    wanted = options.get("of_class") or task.classes[-1]
    if wanted not in task.classes:
        raise UserError(f"the model has no class {wanted!r}; its classes are {', '.join(task.classes)}")
    length = int(task.data_state["length"])
    check_inputs(inputs, _KINDS)
    genome = Genome(Path(options["fasta"]).expanduser()) if options.get("fasta") else None
    done = []
    for path in inputs:
        pace, left = Pace(), Left()
        source = _windows(task, path, genome, 0 if whole else length, stride or max(1, length // 2), form, left)
        target = output / f"{stem(path)}.{'classes.tsv' if form == 'tsv' else form}"
        found = _scored(task, source, pace)
        with written(target) as file:
            if form == "tsv":
                count = _tsv(file, found, task.classes)
            elif form == "bed":
                count = _bed(file, found, task.classes)
            else:
                count = _bedgraph(file, found, task.classes.index(wanted), wanted)
        done.append(target)
        print(f"{path.name}: {count:,} windows, {pace}", file=sys.stderr)
        if left.empty:
            print(f"{path.name}: {left.empty:,} empty sequences left out", file=sys.stderr)
        if left.unknown:
            print(f"{path.name}: {left.unknown:,} windows without a known base left out", file=sys.stderr)
    return done


# -- windows ----------------------------------------------------------------------------------------------------------


def _windows(
    task: SequencesTask, path: Path, genome: Genome | None, length: int, stride: int, form: str, left: Left
) -> Iterator[Window]:
    if is_fasta(path):
        found = fasta_windows(path, length, stride, left)
    elif is_bed(path):
        found = _place_windows(read_bed(path), path, genome, length, stride, form)
    else:
        args = task.config.data_args
        table = read_table(path, columns={"sequence": args.sequence_column}, delimiter=args.delimiter)
        for note in table.notes:
            print(note, file=sys.stderr)
        if table.places is not None:
            found = _place_windows(table.places, path, genome, length, stride, form)
        else:
            assert table.sequences is not None
            names = table.name if table.name is not None else [f"line {line}" for line in table.line]
            rows = ((str(name), table.sequences[row]) for row, name in enumerate(names))
            found = _sequence_windows(rows, length, stride, left)
    for window in found:
        if (window.codes < N).any():
            yield window
        else:
            left.unknown += 1


def fasta_windows(path: Path, length: int, stride: int, left: Left) -> Iterator[Window]:
    """Windows of a FASTA file's records in order; `length` 0 = records whole."""
    held, start, number = np.empty(0, np.uint8), 0, -1
    for piece in stream(path, distinct=False):
        if piece.start == 0:
            held, start, number = np.empty(0, np.uint8), 0, number + 1
        held = np.concatenate([held, piece.codes])
        # What may be the last window waits for the record's end.
        while length and not piece.last and len(held) >= length + stride:
            count = (len(held) - length) // stride
            for i in range(count):
                at = i * stride
                yield Window(piece.name, start + at, start + at + length, held[at : at + length], "+", number)
            held, start = held[count * stride :].copy(), start + count * stride
        if piece.last:
            if not len(held):
                left.empty += 1
            for first, last in _cover(len(held), length, stride):
                yield Window(piece.name, start + first, start + last, held[first:last], "+", number)


def _cover(total: int, length: int, stride: int) -> list[tuple[int, int]]:
    """Windows of a sequence, the last one ending with it."""
    if not total:
        return []
    if not length or total <= length:
        return [(0, total)]
    starts = [*range(0, total - length, stride), total - length]
    return [(at, at + length) for at in starts]


def _sequence_windows(rows: Iterable[tuple[str, np.ndarray]], length: int, stride: int, left: Left) -> Iterator[Window]:
    for number, (name, codes) in enumerate(rows):
        if not len(codes):
            left.empty += 1
        for first, last in _cover(len(codes), length, stride):
            yield Window(name, first, last, codes[first:last], "+", number)


def _place_windows(
    places: Places, path: Path, genome: Genome | None, length: int, stride: int, form: str
) -> Iterator[Window]:
    if genome is None:
        raise UserError(f"{path.name} holds coordinates; name the genome they are of with --fasta")
    places = places.within(genome.lengths, genome.path.name)
    for note in places.notes:
        print(note, file=sys.stderr)
    if form == "bedgraph":
        rows = np.lexsort((places.start, places.chrom.astype(str)))
        ordered = places.take(rows)
        same = ordered.chrom[1:] == ordered.chrom[:-1]
        if bool((same & (ordered.start[1:] < ordered.end[:-1])).any()):
            raise UserError(f"{path.name} has places that overlap, which bedGraph cannot hold; take --format tsv")
        places = ordered
    ways = {1: "+", -1: "-", 0: "."}
    for number, (name, start, end) in enumerate(places.spans()):
        back = places.strand[number] < 0
        for first, last in _cover(end - start, length, stride):
            codes = cut(genome, name, start + first, start + last)
            way = ways[int(places.strand[number])]
            yield Window(name, start + first, start + last, turned(codes) if back else codes, way, number)


# -- scores -----------------------------------------------------------------------------------------------------------


def _scored(task: SequencesTask, windows: Iterable[Window], pace: Pace) -> Iterator[tuple[Window, np.ndarray]]:
    """Each window with its (K,) probabilities, in order."""
    task.eval()
    size, held = max(1, task.config.trainer.eval_batch_size), []
    reach: dict[int, int] = {}  # of the sequence read last, so that bases of overlapping windows count once
    for window in windows:
        pace.bases += max(0, window.end - max(window.start, reach.get(window.source, 0)))
        reach = {window.source: max(window.end, reach.get(window.source, 0))}
        held.append(window)
        if len(held) == size:
            yield from zip(held, probabilities(task, held))
            held = []
    if held:
        yield from zip(held, probabilities(task, held))


@torch.no_grad()
def probabilities(task: SequencesTask, windows: Sequence[Window]) -> np.ndarray:
    """(W, K) float64."""
    lengths = np.array([len(window.codes) for window in windows], np.int64)
    tokens = np.full((len(windows), int(lengths.max())), N, np.int64)
    for row, window in enumerate(windows):
        tokens[row, : lengths[row]] = window.codes
    batch = {
        "tokens": torch.from_numpy(tokens).to(task.device),
        "lengths": torch.from_numpy(lengths).to(task.device),
    }
    try:
        return np.asarray(task.forward_batch(batch).exp().cpu().numpy(), np.float64)
    except ValueError as error:
        longest = windows[int(lengths.argmax())]
        raise UserError(f"{longest.name}: {error}") from None


# -- files ------------------------------------------------------------------------------------------------------------


def _tsv(file: IO[str], found: Iterable[tuple[Window, np.ndarray]], classes: Sequence[str]) -> int:
    file.write("\t".join(["name", "start", "end", "strand", "class", *(f"p_{name}" for name in classes)]) + "\n")
    count = 0
    for window, chance in found:
        count += 1
        shares = "\t".join(f"{value:.6g}" for value in chance)
        said = classes[int(chance.argmax())]
        file.write(f"{window.name}\t{window.start}\t{window.end}\t{window.strand}\t{said}\t{shares}\n")
    return count


def _bed(file: IO[str], found: Iterable[tuple[Window, np.ndarray]], classes: Sequence[str]) -> int:
    count = 0
    for window, chance in found:
        count += 1
        said = int(chance.argmax())
        if said:
            row = (window.name, window.start, window.end, classes[said], round(1000 * chance[said]), window.strand)
            file.write("\t".join(map(str, row)) + "\n")
    return count


def _bedgraph(file: IO[str], found: Iterable[tuple[Window, np.ndarray]], number: int, name: str) -> int:
    """Between the beginnings of two windows, the mean over those windows that hold the middle."""
    file.write(f'track type=bedGraph name="p({name})"\n')
    count = 0
    over: deque[tuple[Window, float]] = deque()

    def flush(until: int | None) -> None:
        window = over[-1][0]
        start, end = window.start, window.end if until is None else min(until, window.end)
        while over[0][0].end <= (start + end) / 2:
            over.popleft()
        value = sum(chance for _, chance in over) / len(over)
        if end > start:
            file.write(f"{window.name}\t{start}\t{end}\t{value:.6g}\n")

    for window, chance in found:
        count += 1
        if over and over[-1][0].source != window.source:
            flush(None)
            over.clear()
        elif over:
            flush(window.start)
        over.append((window, float(chance[number])))
    if over:
        flush(None)
    return count
