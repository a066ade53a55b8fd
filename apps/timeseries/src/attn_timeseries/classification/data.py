"""From labelled series to padded tensors: splits by class, statistics of the training series, batches."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from attn_shared.errors import UserError
from attn_shared.seeding import derive
from attn_timeseries.classification.cards import DATASETS, ClassifyDataConfig
from attn_timeseries.classification.cases import Cases, read_cases, source_files


class SeriesSet(Dataset[dict[str, Tensor]]):
    """N series of at most L steps, scaled and padded behind with zeros.

    Args:
        cases: the series.
        state: what `fit_state` found.
        labelled: whether the classes are wanted; then every series must have one that the model knows.

    Attributes:
        x: (N, L, C) float32.
        mask: (N, L) bool, True = a step of the series.
        y: (N,) class numbers; -1 where not `labelled`.
        length: (N,) steps.
        names, classes: of the series and of the classes.
    """

    def __init__(self, cases: Cases, state: Mapping[str, Any], *, labelled: bool = True) -> None:
        mean, std = (np.array(state[name], dtype=np.float64) for name in ("mean", "std"))
        steps = int(state["max_len"])
        count, channels = len(cases), len(mean)
        x = np.zeros((count, steps, channels), dtype=np.float32)
        length = np.zeros(count, dtype=np.int64)
        for i, values in enumerate(cases.values):
            values = (filled(values[:steps], mean) - mean) / std
            x[i, : len(values)], length[i] = values, len(values)
        self.x, self.length = torch.from_numpy(x), torch.from_numpy(length)
        self.mask = torch.arange(steps) < self.length.unsqueeze(1)
        self.names, self.classes = cases.names, list(state["classes"])
        self.y = torch.full((count,), -1)
        if labelled:
            self.y = torch.tensor(class_numbers(cases, self.classes))

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {name: value[0] for name, value in self.__getitems__([index]).items()}

    def __getitems__(self, index: Sequence[int]) -> dict[str, Tensor]:
        chosen = torch.as_tensor(index, dtype=torch.int64)
        return {"x": self.x[chosen], "mask": self.mask[chosen], "y": self.y[chosen], "index": chosen}

    def series(self) -> list[np.ndarray]:
        """The series as the model sees them, each (steps, C) float64, without padding."""
        return [self.x[i, :n].double().numpy() for i, n in enumerate(self.length.tolist())]


def filled(values: np.ndarray, mean: np.ndarray) -> np.ndarray:
    """(L, C) without gaps: a line between the values beside a gap, the nearest value at the ends, else `mean` (C,)."""
    if not np.isnan(values).any():
        return values
    values, steps = values.copy(), np.arange(len(values))
    for c in range(values.shape[1]):
        known = ~np.isnan(values[:, c])
        values[:, c] = np.interp(steps, steps[known], values[known, c]) if known.any() else mean[c]
    return values


def class_numbers(cases: Cases, classes: Sequence[str]) -> list[int]:
    """(N,) numbers of the classes.

    Raises:
        UserError: a series without class, or of an unknown one.
    """
    if cases.labels is None:
        raise UserError(f"{cases.source} names no classes, which training and evaluation need")
    numbers = {label: i for i, label in enumerate(classes)}
    unknown = [label for label in dict.fromkeys(cases.labels) if label not in numbers]
    if unknown:
        raise UserError(
            f"{cases.source} has class {unknown[0]!r}, which the training series do not have; theirs: "
            f"{', '.join(classes)}"
        )
    return [numbers[label] for label in cases.labels]


# -- splits -----------------------------------------------------------------------------------------------------------


@dataclass
class Splits:
    """The series of each part, and in words how they were parted."""

    train: Cases
    val: Cases | None
    test: Cases | None
    rule: str


def read_splits(data: str, args: ClassifyDataConfig, seed: int, state: Mapping[str, Any] | None = None) -> Splits:
    """Read the files and part the series.

    A single file under the `state` of other training data is a test set as a whole.

    Raises:
        UserError: a file that cannot be read, or parts that come out empty.
    """
    first, second = source_files(data, args)
    cases = read_cases(first, args)
    if cases.labels is None:
        raise UserError(f"{cases.source} names no classes, which training and evaluation need")
    if state is None and len(set(cases.labels)) < 2:
        raise UserError(f"{cases.source}: all series are of one class, so there is nothing to tell apart")
    none = cases.take([])
    if second is not None:
        tested = read_cases(second, args)
        if tested.channels != cases.channels:
            raise UserError(f"{second} has channels {_names(tested)}, and {first} has {_names(cases)}")
        train, val = held_out(cases, args.val_fraction, derive(seed, "validation"))
        rule = f"the test file is for the test alone; {_share(val, cases)} of the training file for validation"
        return Splits(train, val, tested, rule)
    if state is not None and state["data"] != _identity(data):
        return Splits(none, None, cases, "all series of the file")
    if cases.splits is not None:
        parts = {name: [i for i, s in enumerate(cases.splits) if s == name] for name in ("train", "val", "test")}
        if not parts["train"]:
            raise UserError(f"{cases.source}: no series has the split train")
        train, val = cases.take(parts["train"]), cases.take(parts["val"]) if parts["val"] else None
        rule = "splits as the file has them"
        if val is None:
            train, val = held_out(train, args.val_fraction, derive(seed, "validation"))
            rule += f", {_share(val, cases)} of the series taken from training for validation"
        return Splits(train, val, cases.take(parts["test"]) if parts["test"] else None, rule)
    rest, test = held_out(cases, args.test_fraction, derive(seed, "test"))
    train, val = held_out(rest, args.val_fraction, derive(seed, "validation"))
    rule = f"{_share(test, cases)} of the series for the test and {_share(val, cases)} for validation, class by class"
    return Splits(train, val, test, rule)


def _identity(data: str) -> str:
    return data if data in DATASETS else str(Path(data).expanduser().resolve())


def _names(cases: Cases) -> str:
    return ", ".join(cases.channels[:6]) + (" …" if len(cases.channels) > 6 else "")


def _share(part: Cases | None, whole: Cases) -> str:
    return f"{0 if part is None else len(part) / len(whole):.0%}"


def held_out(cases: Cases, fraction: float, seed: int) -> tuple[Cases, Cases | None]:
    """Part off a share of every class, drawn at random: at least one series of it, and never all."""
    if fraction == 0:
        return cases, None
    assert cases.labels is not None
    draw = np.random.default_rng(seed)
    chosen: list[int] = []
    for label in sorted(set(cases.labels)):
        own = [i for i, one in enumerate(cases.labels) if one == label]
        count = min(max(1, round(fraction * len(own))), len(own) - 1)
        chosen += [own[i] for i in draw.permutation(len(own))[:count]]
    taken = set(chosen)
    if not taken:
        raise UserError(
            f"{cases.source}: every class has a single series, so none can be held out; set "
            f"--data_args.val_fraction 0 and name a test file"
        )
    return cases.take(i for i in range(len(cases)) if i not in taken), cases.take(sorted(taken))


# -- statistics -------------------------------------------------------------------------------------------------------


def fit_state(data: str, splits: Splits, args: ClassifyDataConfig) -> dict[str, Any]:
    """All that is learnt from data outside the weights; it sees training series only.

    Raises:
        UserError: fewer than two classes.
    """
    train = splits.train
    # A declared class without training series cannot be learnt, but its column stays; the test may hold it.
    classes = train.classes or sorted(set(train.labels or []))
    if len(set(train.labels or [])) < 2:
        raise UserError(f"{train.source}: the training series are all of one class, so there is nothing to tell apart")
    rows = np.concatenate(train.values)
    known = (~np.isnan(rows)).sum(axis=0)
    if (known == 0).any():
        name = train.channels[int((known == 0).argmax())]
        raise UserError(f"{train.source}: channel {name!r} has no value in any training series")
    mean, std = np.zeros(rows.shape[1]), np.ones(rows.shape[1])
    if args.scale == "standard":
        mean, std = np.nanmean(rows, axis=0), np.nanstd(rows, axis=0)
        std[std <= 1e-12 * np.abs(mean)] = 1.0  # a constant channel
    lengths = [len(values) for values in train.values]
    max_len = args.max_len or max(lengths)
    everything = [values for part in (train, splits.val, splits.test) if part is not None for values in part.values]
    return {
        "data": _identity(data),
        "classes": list(classes),
        "channels": list(train.channels),
        "mean": mean.tolist(),
        "std": std.tolist(),
        "max_len": int(max_len),
        "ragged": any(len(values) < max_len for values in everything),
    }


def check_channels(cases: Cases, state: Mapping[str, Any]) -> None:
    """Refuse series of other channels than the training series'."""
    if len(cases.channels) != len(state["channels"]):
        raise UserError(
            f"{cases.source} has {len(cases.channels)} channels and the model was trained on {len(state['channels'])}"
        )
