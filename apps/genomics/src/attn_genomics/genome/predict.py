"""How predictable the sequences of files are, streamed: memory does not grow with the file."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import numpy as np
import torch

from attn_genomics.data.fasta import Genome, stream, turned
from attn_genomics.data.places import read_bed
from attn_genomics.data.windows import cut
from attn_genomics.output import Pace, check_inputs, is_bed, is_fasta, stem, written
from attn_genomics.tokens import N
from attn_shared.errors import UserError

if TYPE_CHECKING:
    from attn_genomics.genome.task import GenomeTask

_KINDS = "FASTA, or BED with --fasta"


@dataclass(frozen=True)
class Stretch:
    """Consecutive bases of one sequence that have been scored.

    Attributes:
        name: of the record.
        start: place on it of the first one.
        bits: (T,) of each.
        known: (T,) False = N, which has no bits.
        source: number of the sequence in its file.
        strand: "+", "-" or ".".
        last: whether the sequence ends with it.
    """

    name: str
    start: int
    bits: np.ndarray
    known: np.ndarray
    source: int
    strand: str
    last: bool


def predict_files(task: GenomeTask, inputs: Sequence[Path], output: Path, options: Mapping[str, Any]) -> list[Path]:
    """`<stem>.bits.tsv` or `<stem>.bedgraph` for each file.

    Raises:
        UserError: a file that cannot be read; the ones before it have been written, of it nothing.
    """
    form, wide, block = options.get("format", "tsv"), int(options.get("bin", 100)), int(options.get("block", 8192))
    if wide < 1:
        raise UserError(f"--bin must be 1 or more, got {wide}")
    if block < 2:
        raise UserError(f"--block must be 2 or more, got {block}")
    check_inputs(inputs, _KINDS)
    genome = Genome(Path(options["fasta"]).expanduser()) if options.get("fasta") else None
    scorer = Scorer(task, block)
    done = []
    for path in inputs:
        pace = Pace()
        if is_fasta(path):
            found = scorer.fasta(path, pace)
        elif is_bed(path):
            found = _places(scorer, path, genome, pace, form)
        else:
            raise UserError(f"{path.name} is none of {_KINDS}")
        target = output / f"{stem(path)}.{'bits.tsv' if form == 'tsv' else 'bedgraph'}"
        with written(target) as file:
            if form == "tsv":
                _tsv(file, found)
            else:
                _bedgraph(file, found, wide)
        done.append(target)
        print(f"{path.name}: {pace}", file=sys.stderr)
    return done


def _places(scorer: Scorer, path: Path, genome: Genome | None, pace: Pace, form: str) -> Iterator[Stretch]:
    if genome is None:
        raise UserError(f"{path.name} holds coordinates; name the genome they are of with --fasta")
    places = read_bed(path).within(genome.lengths, genome.path.name)
    for note in places.notes:
        print(note, file=sys.stderr)
    if form == "bedgraph":
        places = places.take(np.lexsort((places.start, places.chrom.astype(str))))
        same = places.chrom[1:] == places.chrom[:-1]
        if bool((same & (places.start[1:] < places.end[:-1])).any()):
            raise UserError(f"{path.name} has places that overlap, which bedGraph cannot hold; take --format tsv")
    ways = {1: "+", -1: "-", 0: "."}
    for number, (name, start, end) in enumerate(places.spans()):
        codes = cut(genome, name, start, end)
        back = places.strand[number] < 0
        bits = np.concatenate(list(scorer.pieces([turned(codes) if back else codes])))
        pace.bases += len(codes)
        yield Stretch(
            name, start, bits[::-1] if back else bits, codes < N, number, ways[int(places.strand[number])], True
        )


class Scorer:
    """Bits of sequences of any length.

    Where the model carries a state, `block` bases go through it at once and the state goes on. Otherwise windows of
    `block` bases overlap by half, and the first half of all but the first is context; a model that reads both sides has
    a quarter before and a quarter behind. Windows are no longer than the model can read.
    """

    def __init__(self, task: GenomeTask, block: int) -> None:
        self.task, self.network = task, task.network.eval()
        self.streams = self.network.streams and task.options.rc in ("none", "augment")
        longest = getattr(self.network.backbone, "longest", None)
        self.block = block if self.streams or not longest else max(2, min(block, int(longest)))
        self.both = self.network.objective == "masked" or task.options.rc not in ("none", "augment")

    def fasta(self, path: Path, pace: Pace) -> Iterator[Stretch]:
        """The records of a FASTA file in order, in stretches; an empty one has one stretch without bases."""
        source, number = stream(path, distinct=False), -1
        waiting = next(source, None)
        while waiting is not None:
            name, number = waiting.name, number + 1
            known: list[np.ndarray] = []
            ended = False

            def codes() -> Iterator[np.ndarray]:
                nonlocal waiting, ended
                while waiting is not None and not ended:
                    piece = waiting
                    known.append(piece.codes < N)  # noqa: B023 - used before the next record begins
                    pace.bases += len(piece.codes)
                    yield piece.codes
                    ended = piece.last
                    waiting = next(source, None)

            start, real = 0, np.empty(0, bool)
            for bits in self.pieces(codes()):
                real = np.concatenate([real, *known])
                known.clear()
                yield Stretch(name, start, bits, real[: len(bits)], number, "+", False)
                start, real = start + len(bits), real[len(bits) :]
            yield Stretch(name, start, np.empty(0), np.empty(0, bool), number, "+", True)

    def pieces(self, codes: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
        """Bits of a sequence that comes in pieces, in pieces of another size, each base once."""
        return self._carried(codes) if self.streams else self._windows(codes)

    @torch.no_grad()
    def _carried(self, codes: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
        state = self.network.init_state(1)
        ahead = torch.full((1, 1, 4), -2.0)  # of the first base nothing is known: 2 bits
        for part in _blocks(codes, self.block):
            tokens = torch.from_numpy(part.astype(np.int64))[None].to(self.task.device)
            scores, state = self.network.step(tokens, state)
            told = scores.double().log_softmax(dim=-1).cpu() / np.log(2)
            both = torch.cat([ahead.to(told.dtype), told[:, :-1]], dim=1)
            ahead = told[:, -1:]
            found = -both[0].gather(1, tokens[0].cpu().clamp(max=3)[:, None])[:, 0]
            yield np.where(part < N, found.numpy(), 0.0)

    @torch.no_grad()
    def _windows(self, codes: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
        """Windows of one length in batches; the last one of a sequence ends with it."""
        size = self.block
        behind = size // 4 if self.both else 0
        before = size // 4 if self.both else size // 2
        step = size - before - behind
        rows = max(1, min(self.task.config.trainer.eval_batch_size, 65_536 // size))
        held, at, done = np.empty(0, np.uint8), 0, 0  # bases from place `at` on; scored up to `done`
        for part in codes:
            held = np.concatenate([held, part])
            while len(held) >= size + rows * step:
                batch = np.stack([held[i * step : i * step + size] for i in range(rows)])
                bits = self._bits(batch)
                found = [bits[0, done - at : size - behind], *(row[before : size - behind] for row in bits[1:])]
                yield np.concatenate(found)
                done = at + (rows - 1) * step + size - behind
                held, at = held[rows * step :].copy(), at + rows * step
        total = at + len(held)
        while done < total:
            window = held[:size]
            last = total if at + len(window) == total else at + size - behind
            yield self._bits(window[None])[0, done - at : last - at]
            held, at, done = held[step:], at + step, last

    def _bits(self, windows: np.ndarray) -> np.ndarray:
        tokens = torch.from_numpy(windows.astype(np.int64)).to(self.task.device)
        return np.asarray(self.network.bits(tokens).double().cpu().numpy())


def _blocks(codes: Iterable[np.ndarray], size: int) -> Iterator[np.ndarray]:
    """The same bases in blocks of one size; the last may be shorter."""
    held = np.empty(0, np.uint8)
    for part in codes:
        held = np.concatenate([held, part])
        whole = len(held) // size * size
        for first in range(0, whole, size):
            yield held[first : first + size]
        held = held[whole:].copy()
    if len(held):
        yield held


# -- files ------------------------------------------------------------------------------------------------------------


def _tsv(file: IO[str], found: Iterable[Stretch]) -> None:
    file.write("name\tstart\tend\tstrand\tbases\tbits_per_base\n")
    start, bits, count = None, 0.0, 0
    for stretch in found:
        start = stretch.start if start is None else start
        bits += float(stretch.bits[stretch.known].sum())
        count += int(stretch.known.sum())
        if stretch.last:
            end = stretch.start + len(stretch.bits)
            mean = f"{bits / count:.6g}" if count else "nan"
            file.write(f"{stretch.name}\t{start}\t{end}\t{stretch.strand}\t{count}\t{mean}\n")
            start, bits, count = None, 0.0, 0


def _bedgraph(file: IO[str], found: Iterable[Stretch], wide: int) -> None:
    """Means of `wide` bases from the beginning of each sequence on; lines without a known base are left out."""
    file.write('track type=bedGraph name="bits per base"\n')
    held, known, at = np.empty(0), np.empty(0, bool), None
    for stretch in found:
        at = stretch.start if at is None else at
        held, known = np.concatenate([held, stretch.bits]), np.concatenate([known, stretch.known])
        whole = len(held) if stretch.last else len(held) // wide * wide
        for first in range(0, whole, wide):
            here = known[first : first + wide]
            if here.any():
                mean = held[first : first + wide][here].mean()
                file.write(f"{stretch.name}\t{at + first}\t{at + first + len(here)}\t{mean:.6g}\n")
        held, known, at = held[whole:], known[whole:], at + whole
        if stretch.last:
            held, known, at = np.empty(0), np.empty(0, bool), None
