"""Windows: where they lie, what is known of each, and whole batches of them at a time.

Legend: N windows, C electrodes, T samples a window, F features an electrode, B windows of a batch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from attn_eeg.data.features import standardise
from attn_eeg.data.recording import Recording


@dataclass(frozen=True, kw_only=True)
class Meta:
    """What is known of N windows; every attribute has N entries.

    Attributes:
        subject: names.
        session: names, unique within a subject.
        trial: names, unique within subject and session.
        recording: number of the recording in the corpus.
        start: seconds from the start of the recording.
        stop: seconds at which the window ends.
        duration: seconds of the whole recording.
        label: class numbers; -1 = unknown.
    """

    subject: np.ndarray
    session: np.ndarray
    trial: np.ndarray
    recording: np.ndarray
    start: np.ndarray
    stop: np.ndarray
    duration: np.ndarray
    label: np.ndarray

    def __len__(self) -> int:
        return len(self.label)

    def take(self, index: np.ndarray) -> Meta:
        return Meta(**{f.name: getattr(self, f.name)[index] for f in fields(self)})

    @classmethod
    def join(cls, parts: Sequence[Meta]) -> Meta:
        if not parts:
            text, number = np.array([], dtype=str), np.array([], dtype=np.int64)
            none = np.array([], dtype=np.float64)
            return cls(subject=text, session=text, trial=text, recording=number, start=none, stop=none,
                       duration=none, label=number)  # fmt: skip
        return cls(**{f.name: np.concatenate([getattr(part, f.name) for part in parts]) for f in fields(cls)})


@dataclass(frozen=True)
class Cut:
    """Where the windows of a recording begin.

    Attributes:
        starts: (n,) first samples.
        labels: (n,) class numbers.
        whole: (n,) False for windows with samples that are no numbers.
        mixed: windows left out because their label changes within.
    """

    starts: np.ndarray
    labels: np.ndarray
    whole: np.ndarray
    mixed: int


def cut(recording: Recording, length: int, stride: int) -> Cut:
    """All windows of `length` samples, `stride` apart, that lie within the recording and have one label throughout."""
    starts = np.arange(0, recording.data.shape[-1] - length + 1, stride, dtype=np.int64)
    whole = _nothing_between(~np.isfinite(recording.data).all(axis=0), starts, starts + length)
    if recording.labels is None:
        labels, even = np.full(len(starts), recording.label, dtype=np.int64), np.ones(len(starts), dtype=bool)
    else:
        labels = recording.labels[starts].astype(np.int64)
        changes = np.concatenate([[False], recording.labels[1:] != recording.labels[:-1]])
        even = _nothing_between(changes, starts + 1, starts + length)
    return Cut(starts[even], labels[even], whole[even], mixed=int((~even).sum()))


def _nothing_between(marks: np.ndarray, first: np.ndarray, last: np.ndarray) -> np.ndarray:
    """For each pair whether no mark is set in [first, last)."""
    count = np.concatenate([[0], np.cumsum(marks)])
    return np.asarray(count[last] == count[first])


def gather(data: np.ndarray, starts: np.ndarray, length: int) -> np.ndarray:
    """(n, C, T) windows of (C, time), a copy."""
    views = np.lib.stride_tricks.sliding_window_view(data, length, axis=-1)
    return np.ascontiguousarray(views[:, starts].swapaxes(0, 1))


class WindowSet(Dataset[dict[str, Tensor]]):
    """The windows of one part of the data.

    An item or a batch is a dict: `x` (B, C, F) features or (B, C, T) samples, float32; `y` (B,) class numbers;
    `subject` (B,) places in `subjects`, -1 for synthetic windows; `index` (B,) the window's number in the set.

    Attributes:
        meta: what is known of each window, synthetic ones (at the end, `synthetic` of them) left out.
        subjects: names, sorted.
        channels: names of the C electrodes.
        features: names of the F bands; empty for samples.
        classes: names.
        sfreq: Hz.
    """

    def __init__(
        self,
        meta: Meta,
        *,
        subjects: Sequence[str],
        channels: Sequence[str],
        features: Sequence[str],
        classes: Sequence[str],
        sfreq: float,
        shape: tuple[int, int],
    ) -> None:
        self.meta = meta
        self.subjects, self.channels, self.classes = list(subjects), list(channels), list(classes)
        self.features, self.sfreq, self.shape = list(features), sfreq, shape
        self.synthetic = 0
        self.y = torch.from_numpy(meta.label.astype(np.int64))
        place = {name: i for i, name in enumerate(self.subjects)}
        self.subject = torch.tensor([place[str(name)] for name in meta.subject], dtype=torch.int64)

    def __len__(self) -> int:
        return len(self.y)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {name: value[0] for name, value in self.__getitems__([index]).items()}

    def __getitems__(self, indices: Sequence[int]) -> dict[str, Tensor]:
        """A whole batch at once."""
        index = torch.as_tensor(indices, dtype=torch.int64)
        return {"x": self.values(index), "y": self.y[index], "subject": self.subject[index], "index": index}

    def values(self, index: Tensor) -> Tensor:
        """(B, C, F or T) float32 of these windows."""
        raise NotImplementedError

    def arrays(self) -> tuple[np.ndarray, np.ndarray]:
        """(N, C·F) values and (N,) class numbers of all windows, as classifiers outside PyTorch take them."""
        index = torch.arange(len(self))
        return self.values(index).reshape(len(self), -1).numpy(), self.y.numpy()


class FeatureWindows(WindowSet):
    """Windows whose features are in memory."""

    def __init__(self, x: np.ndarray, meta: Meta, **about: Any) -> None:
        super().__init__(meta, shape=(x.shape[1], x.shape[2]), **about)
        self.x = torch.from_numpy(np.ascontiguousarray(x, dtype=np.float32))

    def values(self, index: Tensor) -> Tensor:
        return self.x[index]

    def add(self, x: np.ndarray, y: np.ndarray) -> None:
        """Put synthetic windows behind the real ones."""
        self.x = torch.cat([self.x, torch.from_numpy(x.astype(np.float32))])
        self.y = torch.cat([self.y, torch.from_numpy(y.astype(np.int64))])
        self.subject = torch.cat([self.subject, torch.full((len(y),), -1)])
        self.synthetic += len(y)


class RawWindows(WindowSet):
    """Windows of samples, cut out of the recordings when they are asked for: overlap costs no memory."""

    def __init__(
        self,
        signals: Sequence[np.ndarray],
        starts: Sequence[np.ndarray],
        length: int,
        meta: Meta,
        *,
        normalize: str,
        scale: Mapping[str, np.ndarray],
        **about: Any,
    ) -> None:
        """From (C, time) signals and the first samples of the windows of each.

        `scale` holds `mean` and `std`, each (N, C, 1) or (1, C, 1), applied after `normalize`.
        """
        super().__init__(meta, shape=(signals[0].shape[0], length), **about)
        self.length, self.normalize = length, normalize
        offsets = np.cumsum([0, *(one.shape[-1] for one in signals[:-1])])
        self.signal = torch.from_numpy(np.concatenate(signals, axis=-1))
        self.starts = torch.from_numpy(np.concatenate([s + o for s, o in zip(starts, offsets)]))
        self.mean, self.std = (torch.from_numpy(scale[name].astype(np.float32)) for name in ("mean", "std"))

    def values(self, index: Tensor) -> Tensor:
        channels, total = self.signal.shape
        views = self.signal.as_strided((channels, total - self.length + 1, self.length), (total, 1, 1))
        # Not index_select: it would first copy the view, every sample as many times as windows could hold it.
        x = views[:, self.starts[index]].transpose(0, 1)
        if self.normalize != "none":
            x = torch.from_numpy(standardise(x.numpy().astype(np.float64), self.normalize)).float()
        whose = index if len(self.mean) > 1 else torch.zeros_like(index)
        return (x - self.mean[whose]) / self.std[whose]
