"""A recording in memory: what every reader gives and everything behind it takes."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np


@dataclass(kw_only=True)
class Recording:
    """A stretch of EEG of one subject, with one label or with labels along it.

    Attributes:
        subject: whose it is.
        session: which visit; trials of one session share the cap's seat.
        trial: which trial; unique within subject and session.
        data: (C, T) float32, microvolt; NaN where the file has no numbers: no window is made of such samples.
        sfreq: samples a second.
        channels: names of the C electrodes as `attn_eeg.data.channels.electrode` spells them ("Fp1", "T7").
        label: class number; -1 = unknown (prediction).
        labels: (T,) class numbers where they change within the recording, else None; a window takes the one that it
            has throughout, and windows with several are dropped.
        baseline: (C, Tb) of the same electrodes at rest before the trial, microvolt, or None.
        source: the file, for messages.
        notes: what was found on reading, sentences: flat electrodes, samples that are no numbers, units guessed.
    """

    subject: str
    session: str = "1"
    trial: str = "1"
    data: np.ndarray
    sfreq: float
    channels: list[str]
    label: int = -1
    labels: np.ndarray | None = None
    baseline: np.ndarray | None = None
    source: str = ""
    notes: list[str] = field(default_factory=list)


@dataclass(kw_only=True)
class Corpus:
    """A data set in memory.

    Attributes:
        name: of the data set, or of the folder or file.
        classes: names of the classes, by number.
        recordings: all of them, in a fixed order.
        label: which label the classes are of.
        notes: sentences about the whole.
    """

    name: str
    classes: list[str]
    recordings: list[Recording]
    label: str = ""
    notes: list[str] = field(default_factory=list)
