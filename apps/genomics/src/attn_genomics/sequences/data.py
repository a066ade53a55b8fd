"""From files and data sets to labelled sequences in batches."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from attn_genomics.data.fasta import Sequences
from attn_genomics.data.windows import centred
from attn_genomics.sequences.cards import DATASETS, GUE, GUE_PARTS
from attn_genomics.sequences.labelled import Labelled
from attn_genomics.sequences.options import TURNED, SequencesDataConfig
from attn_genomics.sequences.splits import (
    PARTS,
    TEST,
    TRAIN,
    VAL,
    chromosome_parts,
    keys,
    overlap,
    random_parts,
)
from attn_genomics.tokens import N, encode, reverse_complement
from attn_shared import datasets
from attn_shared.bundle import DataBundle
from attn_shared.config import RunConfig
from attn_shared.errors import UserError
from attn_shared.seeding import derive

_MOST_CLASSES = 1000


class SequenceSet(Dataset[dict[str, Tensor]]):
    """Sequences of a part: {"tokens" (B, L), "lengths", "label", "index" (B,)}.

    Args:
        sequences: of the part.
        label: (N,) numbers of classes.
        turned: give the other strand of half of them, others in each epoch.
        shift: move each by up to so many bases either way, otherwise in each epoch; N comes in at the other end.
        mutate: share of the bases that are drawn anew, others in each epoch.
    """

    def __init__(
        self, sequences: Sequences, label: np.ndarray, *, turned: bool = False, shift: int = 0, mutate: float = 0.0
    ) -> None:
        self.sequences, self.label, self.turned = sequences, label.astype(np.int64), turned
        self.shift, self.mutate = shift, mutate
        self.set_epoch(0, 0)

    def __len__(self) -> int:
        return len(self.label)

    def set_epoch(self, seed: int, epoch: int) -> None:
        """Draw which sequences an epoch turns, where it moves them and what it mutates."""
        rng = np.random.default_rng(derive(seed, "strands", epoch))
        self.other = rng.random(len(self)) < 0.5 if self.turned else np.zeros(len(self), bool)
        places = np.random.default_rng(derive(seed, "places", epoch))
        self.moved = places.integers(-self.shift, self.shift, len(self), endpoint=True)
        self.mutations = derive(seed, "mutations", epoch)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {name: value[0] for name, value in self.__getitems__([index]).items()}

    def __getitems__(self, indices: Sequence[int]) -> dict[str, Tensor]:
        rows = np.asarray(indices, np.int64)
        tokens, lengths = self.sequences.gather(rows)
        if self.mutate:
            self._change(tokens, lengths, rows)
        if self.shift:
            tokens = _moved(tokens, lengths, torch.from_numpy(self.moved[rows]))
        other = torch.from_numpy(self.other[rows])
        if other.any():
            tokens[other] = reverse_complement(tokens[other], lengths[other])
        return {
            "tokens": tokens,
            "lengths": lengths,
            "label": torch.from_numpy(self.label[rows]),
            "index": torch.from_numpy(rows),
        }

    def _change(self, tokens: Tensor, lengths: Tensor, rows: np.ndarray) -> None:
        """Mutate in place, each row by its own number: a batch's order and company change nothing. N stays."""
        for one, length, row in zip(tokens.numpy(), lengths.tolist(), rows.tolist()):
            rng = np.random.default_rng((self.mutations, row))
            bases = one[:length]
            places = (rng.random(length) < self.mutate) & (bases < N)
            bases[places] = rng.integers(0, N, length)[places]


def _moved(tokens: Tensor, lengths: Tensor, by: Tensor) -> Tensor:
    """(B, L) with each row's bases `by` (B,) places further on; what moves beyond its ends is lost, N comes in."""
    place = torch.arange(tokens.shape[1])
    source = place - by[:, None]
    bases = tokens.gather(1, source.clamp(0, tokens.shape[1] - 1))
    within = (source >= 0) & (source < lengths[:, None]) & (place < lengths[:, None])
    return bases.masked_fill(~within, N)


def load_bundle(config: RunConfig, state: Mapping[str, Any] | None = None) -> DataBundle:
    """All that `SequencesTask.load_data` gives.

    Raises:
        UserError: what cannot be read or split, in one sentence.
    """
    turned = config.task_args is not None and config.task_args.rc in TURNED
    return prepare(load(config.data, config.data_args), config.data_args, state, turned=turned)


def load(name: str, args: SequencesDataConfig) -> Labelled:
    """A data set by its name, or a file or folder of the user's own."""
    if name in DATASETS:
        if args.fasta or args.sequence_column or args.label_column or args.split_column:
            raise UserError(f"{name} has its own columns; --data_args.fasta and columns are for files of your own")
        return _shorten(_known(name, args), args.length)
    from attn_genomics.sequences.readers import read_own

    return _shorten(read_own(Path(name).expanduser(), args), args.length)


def _known(name: str, args: SequencesDataConfig) -> Labelled:
    if name == "synthetic":
        from attn_genomics.sequences.synthetic import synthetic

        codes, label = synthetic()
        part = np.select([np.arange(len(label)) < 2800, np.arange(len(label)) < 3200], [TRAIN, VAL], TEST)
        return Labelled(source=name, sequences=Sequences(codes), label=label.astype(str), part=part)
    folder = datasets.locate(DATASETS[name])
    if name in GUE:
        return _gue(name, folder)
    if name == "yeast_coding":
        from attn_genomics.sequences.readers import read_yeast_coding

        return read_yeast_coding(folder, args)
    codes, label = _columns(folder / DATASETS[name].files[0].path)
    return Labelled(
        source=name,
        sequences=Sequences(codes),
        label=label,
        part=np.full(len(label), TEST, np.int64),
        protocol="Genomic Benchmarks: all official test sequences; the model was trained elsewhere",
    )


def _columns(path: Path) -> tuple[list[np.ndarray], np.ndarray]:
    """The columns `sequence` and `label` of a known file."""
    import pandas as pd

    try:
        frame = pd.read_csv(path, dtype=str, keep_default_na=False, usecols=["sequence", "label"])
    except (OSError, EOFError, ValueError) as error:
        raise UserError(f"{path} is damaged: {str(error).strip().splitlines()[0]}") from None
    return [encode(text) for text in frame["sequence"]], frame["label"].to_numpy(str)


def _gue(name: str, folder: Path) -> Labelled:
    codes: list[np.ndarray] = []
    labels, parts = [], []
    for number, part in enumerate(GUE_PARTS):
        found, label = _columns(folder / "gue" / GUE[name] / f"{part}.csv.gz")
        codes += found
        labels.append(label)
        parts.append(np.full(len(label), number, np.int64))
    return Labelled(
        source=name,
        sequences=Sequences(codes),
        label=np.concatenate(labels),
        part=np.concatenate(parts),
        protocol="GUE: chosen on dev, reported on test",
    )


def _shorten(data: Labelled, length: int) -> Labelled:
    """Sequences longer than `length` cut around their middle."""
    if length < 0:
        raise UserError(f"--data_args.length must not be negative, got {length}")
    if length and (data.sequences.lengths > length).any():
        rows = [data.sequences[row] for row in range(len(data.sequences))]
        data.sequences = Sequences([one[slice(*centred(0, max(len(one), length), length))] for one in rows])
    return data


def prepare(
    data: Labelled, args: SequencesDataConfig, state: Mapping[str, Any] | None = None, *, turned: bool = False
) -> DataBundle:
    """Split, with classes as numbers.

    Args:
        state: of a checkpoint, whose classes then hold.
        turned: half of the training part is of the other strand, another half in each epoch.
    """
    for name in ("val", "test"):
        if not 0 <= getattr(args, name) <= 1:
            raise UserError(f"--data_args.{name} is a share from 0 to 1, got {getattr(args, name)}")
    if args.val + args.test > 1 and args.test < 1:
        raise UserError("--data_args.val and --data_args.test leave nothing for training")
    if args.shift < 0 or not 0 <= args.mutate < 1:
        raise UserError(
            "--data_args.shift must not be negative and --data_args.mutate is a share from 0 to 1, got "
            f"{args.shift} and {args.mutate}"
        )
    if args.max_train < 0:
        raise UserError(f"--data_args.max_train must not be negative, got {args.max_train}")
    classes = list(state["classes"]) if state is not None else _classes(data)
    number = {name: i for i, name in enumerate(classes)}
    strange = [name for name in dict.fromkeys(data.label.tolist()) if name not in number]
    if strange:
        raise UserError(
            f"{data.source} has the class {strange[0]!r}, which the model does not know; it knows {', '.join(classes)}"
        )
    label = np.array([number[name] for name in data.label.tolist()], np.int64)
    part, how = _parts(data, args)
    rows = [np.flatnonzero(part == one) for one in (TRAIN, VAL, TEST)]
    if args.max_train and len(rows[TRAIN]) > args.max_train:
        drawn = np.random.default_rng(derive(args.shuffle, "max_train")).permutation(len(rows[TRAIN]))
        rows[TRAIN] = np.sort(rows[TRAIN][drawn[: args.max_train]])
        how += f", {args.max_train:,} of the training sequences drawn"
    if state is None and len(rows[TRAIN]) and len(set(label[rows[TRAIN]].tolist())) < len(classes):
        missing = next(name for i, name in enumerate(classes) if i not in set(label[rows[TRAIN]].tolist()))
        raise UserError(f"the training part of {data.source} has no sequence of class {missing!r}; split it otherwise")

    trained: dict[str, Any] = {"turned": turned, "shift": args.shift, "mutate": args.mutate}
    sets = [
        SequenceSet(data.sequences.take(chosen), label[chosen], **(trained if part == TRAIN else {}))
        if len(chosen)
        else None
        for part, chosen in enumerate(rows)
    ]
    kept = np.full(len(label), -1, np.int64)
    for one, chosen in enumerate(rows):
        kept[chosen] = one
    leaks = overlap(data.sequences, kept)
    if state is None:
        known = rows[TRAIN] if len(rows[TRAIN]) else np.arange(len(label))
        state = {"classes": classes, "length": int(data.sequences.lengths[known].max()), "data": data.source}
    return DataBundle(
        train=sets[TRAIN],
        val=sets[VAL],
        test=sets[TEST],
        state=dict(state),
        facts=_facts(data, label, classes, rows, leaks, how),
        protocol=_protocol(data, how, leaks, len(rows[TEST])),
    )


def _classes(data: Labelled) -> list[str]:
    found = data.classes or sorted(set(data.label.tolist()))
    if data.classes is None and all(name.lstrip("-").isdigit() for name in found):
        found.sort(key=int)
    if len(found) < 2:
        raise UserError(f"{data.source} has one class only, {found[0]!r}; there is nothing to tell apart")
    if len(found) > _MOST_CLASSES:
        raise UserError(f"{data.source} has {len(found):,} different labels; are they numbers rather than classes?")
    return found


def _parts(data: Labelled, args: SequencesDataConfig) -> tuple[np.ndarray, str]:
    """(N,) part of every row, and how it was made, in words."""
    if args.test == 1:
        return np.full(len(data.label), TEST, np.int64), "all of it test"
    choice = args.split
    named = bool(args.chromosomes_val or args.chromosomes_test)
    if choice == "auto":
        several = data.group is not None and len(set(data.group.tolist())) > 2
        choice = "chromosome" if named or (several and data.part is None) else "given"
        if choice == "given" and data.part is None:
            choice = "random"
    rng = np.random.default_rng(derive(args.shuffle, "split"))
    if choice == "chromosome":
        if data.group is None:
            raise UserError(f"{data.source} does not say on which chromosomes its sequences are; take another split")
        names, counts = np.unique(data.group.astype(str), return_counts=True)
        part = chromosome_parts(
            data.group,
            dict(zip(names.tolist(), counts.tolist())),
            chromosomes_val=args.chromosomes_val,
            chromosomes_test=args.chromosomes_test,
            val=args.val,
            test=args.test,
            rng=rng,
        )
        held = [sorted(set(data.group[part == one].tolist())) for one in (TEST, VAL)]
        return part, f"by chromosome: {_few(held[0])} for test, {_few(held[1])} for validation (shuffle {args.shuffle})"
    if named:
        raise UserError("--data_args.chromosomes_val and chromosomes_test are for --data_args.split chromosome")
    if choice == "random":
        part = random_parts(keys(data.sequences), args.val, args.test, rng)
        shares = f"{1 - args.val - args.test:.0%} / {args.val:.0%} / {args.test:.0%}"
        return part, f"drawn, {shares}, equal sequences and other strands in one part (shuffle {args.shuffle})"
    if data.part is None:
        raise UserError(f"{data.source} has no split of its own; take --data_args.split random or chromosome")
    part, how = data.part.copy(), "the data's own split"
    for one, share, option in ((TEST, args.test, "test"), (VAL, args.val, "val")):
        train = np.flatnonzero(part == TRAIN)
        if (part == one).any() or not len(train) or share <= 0:
            continue
        drawn = random_parts(keys(data.sequences.take(train)), 0.0, share, rng)
        part[train[drawn == TEST]] = one
        how += f", {share:.0%} of its training part drawn for {option} (shuffle {args.shuffle})"
    return part, how


def _few(names: Sequence[str], most: int = 8) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "") or "none"


def _facts(
    data: Labelled,
    label: np.ndarray,
    classes: Sequence[str],
    rows: Sequence[np.ndarray],
    leaks: Mapping[str, tuple[int, int]],
    how: str,
) -> dict[str, Any]:
    lengths = data.sequences.lengths
    unknown = int((data.sequences.flat == N).sum())
    facts: dict[str, Any] = {
        "sequences (train / val / test)": " / ".join(f"{len(one):,}" for one in rows),
        "classes": f"{_few(list(classes))}" + (f" ({classes[-1]} is the positive one)" if len(classes) == 2 else ""),
        f"share of class {classes[-1]} (train / val / test)": " / ".join(
            f"{(label[one] == len(classes) - 1).mean():.3f}" if len(one) else "-" for one in rows
        ),
        "bases of a sequence": f"{lengths.min():,}"
        + (f" to {lengths.max():,}" if lengths.min() < lengths.max() else ""),
        "split": how,
    }
    if unknown:
        facts["unknown bases (N)"] = f"{unknown:,} of {data.sequences.flat.size:,}"
    for name, (same, either) in leaks.items():
        one, other = name.split(" in ")
        count = len(rows[PARTS.index(one)])
        facts[f"{one} sequences that are also in {other}"] = f"{same:,} of {count:,}" + (
            f", {either:,} with other strands" if either > same else ""
        )
    key = keys(data.sequences)
    distinct, number = np.unique(key, return_inverse=True)
    if len(distinct) < len(key):
        low, high = np.full(len(distinct), len(classes)), np.full(len(distinct), -1)
        np.minimum.at(low, number, label)
        np.maximum.at(high, number, label)
        mixed = int((low < high).sum())
        facts["repeated sequences"] = f"{len(key) - len(distinct):,} (other strands too)" + (
            f"; {mixed:,} have several classes" if mixed else ""
        )
    return facts | {f"note {i + 1}": note for i, note in enumerate(data.notes)}


def _protocol(data: Labelled, how: str, leaks: Mapping[str, tuple[int, int]], tests: int) -> str:
    """One sentence: how was split, and what of test is in training."""
    text = data.protocol or f"Split: {how}"
    same, either = leaks.get("test in train", (0, 0))
    if either:
        text += f"; {same:,} of {tests:,} test sequences are in the training part, too"
        text += f" ({either:,} with other strands)" if either > same else ""
    return text
