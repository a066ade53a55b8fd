"""From genomes to windows: training windows begin anywhere, those of validation and test score every base once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from attn_genomics.data.fasta import Genome
from attn_genomics.data.windows import Span, cut, intersect, merge, total
from attn_genomics.genome.cards import DATASETS, HELD_OUT
from attn_genomics.genome.options import GenomeDataConfig
from attn_genomics.sequences.options import TURNED
from attn_genomics.sequences.splits import TEST, TRAIN, VAL, choose_chromosomes
from attn_genomics.tokens import N, reverse_complement
from attn_shared import datasets
from attn_shared.bundle import DataBundle
from attn_shared.config import RunConfig
from attn_shared.errors import UserError
from attn_shared.seeding import derive

_FEW_RECORDS = 3
_WORD = 32  # bases of the words by which parts are compared: 2 bits each in 64
_MOST_COMPARED = 50_000_000


class Made(Genome):
    """A genome whose records are in memory from the start."""

    def __init__(self, name: str, codes: Mapping[str, np.ndarray]) -> None:
        self.path = Path(name)
        self._codes, self._file = dict(codes), None
        self.names = list(codes)
        self.lengths = {one: len(each) for one, each in codes.items()}
        self.empty = []


class TrainWindows(Dataset[dict[str, Tensor]]):
    """Windows that begin anywhere in the training part: {"tokens" (B, L)}.

    A span shorter than the window gives itself, with N behind it.

    Args:
        genome: the records.
        spans: the training part, a result of `merge`.
        window: bases of a window.
        bases: of an epoch.
        turned: give the other strand of half of them.
    """

    def __init__(self, genome: Genome, spans: Sequence[Span], window: int, bases: int, *, turned: bool = False) -> None:
        self.genome, self.spans, self.window, self.turned = genome, list(spans), window, turned
        starts = np.array([max(1, end - start - window + 1) for _, start, end in spans], np.int64)
        self.first = np.concatenate([[0], np.cumsum(starts)])
        self.count = max(1, bases // window)
        self.set_epoch(0, 0)

    def __len__(self) -> int:
        return self.count

    def set_epoch(self, seed: int, epoch: int) -> None:
        """Draw an epoch's windows and strands."""
        rng = np.random.default_rng(derive(seed, "windows", epoch))
        self.start = rng.integers(0, self.first[-1], self.count)
        self.other = rng.random(self.count) < 0.5 if self.turned else np.zeros(self.count, bool)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {name: value[0] for name, value in self.__getitems__([index]).items()}

    def __getitems__(self, indices: Sequence[int]) -> dict[str, Tensor]:
        codes = np.full((len(indices), self.window), N, np.int64)
        for row, index in enumerate(indices):
            draw = int(self.start[index])
            number = int(np.searchsorted(self.first, draw, side="right")) - 1
            name, left, right = self.spans[number]
            begin = left + draw - int(self.first[number])
            found = self.genome.fetch(name, begin, min(begin + self.window, right))
            codes[row, : len(found)] = found
        tokens = torch.from_numpy(codes)
        other = torch.from_numpy(self.other[np.asarray(indices, np.int64)])
        if other.any():
            tokens[other] = reverse_complement(tokens[other])
        return {"tokens": tokens}


class EvalWindows(Dataset[dict[str, Tensor]]):
    """Windows that overlap so that every base of a part is scored once: {"tokens", "scored" (B, L), "index" (B,)}.

    What stands before a part in its record is read, too, as context. N is not scored.

    Args:
        genome: the records.
        spans: the part, a result of `merge`.
        window: bases of a window.
        context: bases of a window before the first that counts, but for where a record begins.
        centred: half of the context stands behind the last base that counts.
        bases: at most so many are scored, the first ones; 0 = all.

    Attributes:
        windows: (record, first place, first scored place, place behind the last scored one) of each.
    """

    def __init__(
        self,
        genome: Genome,
        spans: Sequence[Span],
        window: int,
        context: int,
        *,
        centred: bool = False,
        bases: int = 0,
    ) -> None:
        self.genome, self.window = genome, window
        self.windows: list[tuple[str, int, int, int]] = []
        left = bases or total(spans)
        for name, first, last in spans:
            last = min(last, first + left)
            left -= last - first
            self.windows += _cover(name, first, last, genome.lengths[name], window, context, centred)
            if not left:
                break

    def __len__(self) -> int:
        return len(self.windows)

    @property
    def bases(self) -> int:
        """Places that are scored, N among them."""
        return sum(end - start for _, _, start, end in self.windows)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {name: value[0] for name, value in self.__getitems__([index]).items()}

    def __getitems__(self, indices: Sequence[int]) -> dict[str, Tensor]:
        codes = np.empty((len(indices), self.window), np.int64)
        scored = np.zeros((len(indices), self.window), bool)
        for row, index in enumerate(indices):
            name, first, start, end = self.windows[index]
            codes[row] = cut(self.genome, name, first, first + self.window)
            scored[row, start - first : end - first] = True
        return {
            "tokens": torch.from_numpy(codes),
            "scored": torch.from_numpy(scored & (codes < N)),
            "index": torch.as_tensor(np.asarray(indices, np.int64)),
        }


def _cover(
    name: str, first: int, last: int, length: int, window: int, context: int, centred: bool
) -> list[tuple[str, int, int, int]]:
    """Windows that score `first` to `last` of a record of `length` bases."""
    behind = context // 2 if centred else 0
    before = context - behind
    found, at = [], first
    while at < last:
        begin = max(0, at - before)
        end = min(last, begin + window - behind)
        if begin + window >= length:  # nothing stands behind the record's end
            end = last
            begin = max(0, min(begin, length - window)) if centred else begin
            end = min(last, begin + window)
        found.append((name, begin, at, end))
        at = end
    return found


def load_bundle(config: RunConfig, state: Mapping[str, Any] | None = None, *, centred: bool = False) -> DataBundle:
    """All that `GenomeTask.load_data` gives.

    Args:
        state: of a checkpoint, whose window then holds.
        centred: windows of validation and test have half of their context behind what counts: for "masked".

    Raises:
        UserError: what cannot be read or split, in one sentence.
    """
    turned = config.task_args is not None and config.task_args.rc in TURNED
    return prepare(load_genome(config.data), config.data, config.data_args, state, centred=centred, turned=turned)


def load_genome(name: str) -> Genome:
    """A data set by its name, or a FASTA file of the user's own."""
    if name == "synthetic_genome":
        from attn_genomics.genome.synthetic import synthetic_genome

        return Made(name, synthetic_genome())
    if name in DATASETS:
        return Genome(datasets.locate(DATASETS[name]) / DATASETS[name].files[0].path)
    return Genome(Path(name).expanduser())


def prepare(
    genome: Genome,
    data: str,
    args: GenomeDataConfig,
    state: Mapping[str, Any] | None = None,
    *,
    centred: bool = False,
    turned: bool = False,
) -> DataBundle:
    """Split a genome into parts and these into windows. See `load_bundle`."""
    window = args.window
    context = args.context or window // 2
    if window < 2:
        raise UserError(f"--data_args.window must be at least 2 bases, got {window}")
    if not 0 <= args.context < window:
        raise UserError(f"--data_args.context must be from 0 to less than the window of {window}, got {args.context}")
    if args.epoch_bases < 0 or args.eval_bases < 0:
        raise UserError("--data_args.epoch_bases and --data_args.eval_bases must not be negative")
    parts, how = split(genome, data, args)
    notes = []
    if args.regions is not None:
        from attn_genomics.data.places import read_bed

        places = read_bed(Path(args.regions).expanduser()).within(genome.lengths, genome.path.name)
        notes += places.notes
        before = total(parts[TRAIN])
        parts[TRAIN] = intersect(parts[TRAIN], merge(places.spans()))
        how += f"; trained on {total(parts[TRAIN]):,} of {before:,} bases, those of {Path(args.regions).name}"
        if before and not parts[TRAIN]:
            raise UserError(f"{args.regions} holds no place in the training part")
    train = None
    if parts[TRAIN]:
        bases = args.epoch_bases or total(parts[TRAIN])
        train = TrainWindows(genome, parts[TRAIN], window, bases, turned=turned)
    val = EvalWindows(genome, parts[VAL], window, context, centred=centred, bases=args.eval_bases)
    test = EvalWindows(genome, parts[TEST], window, context, centred=centred)
    if state is None:
        state = {"length": window, "data": data}
    return DataBundle(
        train=train,
        val=val if len(val) else None,
        test=test if len(test) else None,
        state=dict(state),
        facts=_facts(genome, parts, val, how, window, context, args)
        | {f"note {i + 1}": n for i, n in enumerate(notes)},
        protocol=f"Split: {how}; every base but N of the part scored once, by windows of {window:,} bases with "
        + (f"{context:,} of them as context on both sides" if centred else f"{context:,} or more bases before it"),
    )


def split(genome: Genome, data: str, args: GenomeDataConfig) -> tuple[list[list[Span]], str]:
    """Spans of training, validation and test, and how they were made, in words.

    Raises:
        UserError: shares or chromosomes that cannot be.
    """
    for name in ("val", "test"):
        if not 0 <= getattr(args, name) <= 1:
            raise UserError(f"--data_args.{name} is a share from 0 to 1, got {getattr(args, name)}")
    used = {name: length for name, length in genome.lengths.items() if length >= max(1, args.min_record)}
    if not used:
        raise UserError(f"no record of {data} has {args.min_record} bases or more (--data_args.min_record)")
    left = len(genome.lengths) - len(used)
    short = f", {left:,} records of less than {args.min_record} bases left out" if left else ""
    whole = [(name, 0, length) for name, length in used.items()]
    if args.test == 1:
        return [[], [], whole], f"all of it test{short}"
    if args.val + args.test >= 1:
        raise UserError("--data_args.val and --data_args.test leave nothing for training")
    named_val, named_test = args.chromosomes_val, args.chromosomes_test
    choice = args.split
    if choice == "auto":
        named = bool(named_val or named_test)
        choice = "chromosome" if named or len(used) >= _FEW_RECORDS else "tail"
    if choice == "tail":
        if named_val or named_test:
            raise UserError("--data_args.chromosomes_val and chromosomes_test are for --data_args.split chromosome")
        parts: list[list[Span]] = [[], [], []]
        for name, _, length in whole:
            test, val = length - round(length * args.test), length - round(length * (args.test + args.val))
            for part, span in ((TRAIN, (name, 0, val)), (VAL, (name, val, test)), (TEST, (name, test, length))):
                if span[1] < span[2]:
                    parts[part].append(span)
        each = "" if len(whole) == 1 else " of every record"
        return parts, f"the last {args.test:.0%}{each} for test, {args.val:.0%} before for validation{short}"
    drawn = not (named_val and named_test) and data not in HELD_OUT
    if data in HELD_OUT:
        usual_val, usual_test = HELD_OUT[data]
        named_test = named_test or tuple(name for name in usual_test if name not in named_val)
        named_val = named_val or tuple(name for name in usual_val if name not in named_test)
    chosen = choose_chromosomes(
        used, named_val, named_test, args.val, args.test, np.random.default_rng(derive(args.shuffle, "split"))
    )
    parts = [[span for span in whole if chosen[span[0]] == part] for part in (TRAIN, VAL, TEST)]
    names = [", ".join(name for name, *_ in spans[:8]) + (", …" if len(spans) > 8 else "") for spans in parts]
    how = f"{names[TEST] or 'none'} for test, {names[VAL] or 'none'} for validation"
    return parts, how + (f" (drawn, shuffle {args.shuffle})" if drawn else "") + short


def _facts(
    genome: Genome,
    parts: Sequence[Sequence[Span]],
    val: EvalWindows,
    how: str,
    window: int,
    context: int,
    args: GenomeDataConfig,
) -> dict[str, Any]:
    counts = np.zeros((3, 5), np.int64)
    for part, spans in enumerate(parts):
        for name, start, end in spans:
            for at in range(start, end, 1 << 24):
                counts[part] += np.bincount(genome.fetch(name, at, min(end, at + (1 << 24))), minlength=5)
    whole = counts.sum(axis=0)
    facts: dict[str, Any] = {
        "records": f"{len(genome.lengths):,}",
        "bases (train / val / test)": " / ".join(f"{total(spans):,}" for spans in parts),
        "GC (train / val / test)": " / ".join(
            f"{(row[1] + row[2]) / row[:4].sum():.3f}" if row[:4].any() else "-" for row in counts
        ),
        "window": f"{window:,} bases, {context:,} of them context in validation and test",
        "split": how,
    }
    if whole[N]:
        facts["unknown bases (N), not scored"] = f"{whole[N]:,} of {whole.sum():,}"
    if args.eval_bases and total(parts[VAL]) > val.bases:
        facts["validation after an epoch"] = f"the first {val.bases:,} of {total(parts[VAL]):,} bases"
    if parts[TRAIN] and parts[TEST]:
        facts["test also in training"] = repeated(genome, parts[TRAIN], parts[TEST])
    return facts


def words(codes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(L - 31,) every 32 bases as a uint64, the smaller of both strands', and whether they are without N."""
    count = len(codes) - _WORD + 1
    if count <= 0:
        return np.empty(0, np.uint64), np.empty(0, bool)
    known = codes < N
    clear = np.cumsum(np.concatenate([[0], ~known]))
    base = np.where(known, codes, 0).astype(np.uint64)
    forward, other = base.copy(), np.uint64(3) - base
    width = 1
    while width < _WORD:  # words of twice the length from two of the length
        left, right = forward[:-width], forward[width:]
        forward = (left << np.uint64(2 * width)) | right
        left, right = other[:-width], other[width:]
        other = (right << np.uint64(2 * width)) | left
        width *= 2
    return np.minimum(forward, other), (clear[_WORD:] - clear[:-_WORD]) == 0


def repeated(genome: Genome, train: Sequence[Span], test: Sequence[Span]) -> str:
    """How much of the test part stands in the training part, either strand: words of 32 bases, one every 32."""
    if total(train) > _MOST_COMPARED:
        return f"not counted (more than {_MOST_COMPARED:,} bases)"
    asked = []
    for name, start, end in test:
        found, clear = words(genome.fetch(name, start, end))
        asked.append(found[::_WORD][clear[::_WORD]])
    wanted = np.concatenate(asked) if asked else np.empty(0, np.uint64)
    distinct, number = np.unique(wanted, return_inverse=True)
    if not len(distinct):
        return "nothing to compare"
    hit = np.zeros(len(distinct), bool)
    maybe = np.zeros(1 << 22, bool)  # most words are ruled out by 22 of their bits
    maybe[_bits(distinct)] = True
    for name, start, end in train:
        for at in range(start, end, 1 << 20):
            found, clear = words(genome.fetch(name, at, min(end, at + (1 << 20) + _WORD - 1)))
            found = found[clear & maybe[_bits(found)]]
            place = np.searchsorted(distinct, found).clip(max=len(distinct) - 1)
            hit[place[distinct[place] == found]] = True
    count = int(hit[number].sum())
    return f"{count:,} of {len(wanted):,} pieces of {_WORD} bases ({count / len(wanted):.1%}, either strand)"


def _bits(found: np.ndarray) -> np.ndarray:
    """22 well mixed bits of each word."""
    return (found * np.uint64(0x9E3779B97F4A7C15)) >> np.uint64(42)
