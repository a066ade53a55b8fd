"""DREAMER: one MATLAB struct with 23 subjects, each with 18 films and a baseline before each."""

from __future__ import annotations

from typing import Any

import numpy as np

from attn_eeg.data.options import EegDataConfig
from attn_eeg.data.ratings import classes_of, grade
from attn_eeg.data.readers import finish, load_mat
from attn_eeg.data.recording import Corpus, Recording
from attn_shared.app import DataCard
from attn_shared.datasets import folder
from attn_shared.errors import UserError

CHANNELS = ["AF3", "F7", "F3", "FC5", "T7", "P7", "O1", "O2", "P8", "T8", "FC6", "F4", "F8", "AF4"]  # fmt: skip
LABELS = ("valence", "arousal", "dominance")


def load(card: DataCard, args: EegDataConfig) -> Corpus:
    """One recording a film; its baseline apart. Ratings 1 to 5 become two or five classes."""
    label = args.label or "valence"
    if label not in LABELS:
        raise UserError(f"data set dreamer has the labels {', '.join(LABELS)}, not {label!r}")
    path = folder(card) / "dreamer" / "DREAMER.mat"
    if not path.is_file():
        raise UserError(f"{path} is not there: {card.manual}")
    found = load_mat(path)
    recordings = []
    try:
        whole = _one(found["DREAMER"])
        sfreq = float(np.ravel(getattr(whole, "EEG_SamplingRate", 128))[0])
        for number, cell in enumerate(np.ravel(whole.Data), start=1):
            subject = _one(cell)
            eeg, ratings = _one(subject.EEG), np.ravel(getattr(subject, f"Score{label.capitalize()}"))
            films, before = np.ravel(eeg.stimuli), np.ravel(eeg.baseline)
            for film, (data, baseline, rating) in enumerate(zip(films, before, ratings, strict=True), start=1):
                recordings.append(
                    finish(
                        Recording(
                            subject=f"{number:02d}",
                            trial=f"{film:02d}",
                            data=np.asarray(data, dtype=np.float32).T,
                            baseline=np.asarray(baseline, dtype=np.float32).T,
                            sfreq=sfreq,
                            channels=list(CHANNELS),
                            label=grade(float(rating), args.levels, 5, str(path)),
                            source=f"{path}, subject {number}, film {film}",
                        )
                    )
                )
    except (AttributeError, KeyError, IndexError, ValueError, TypeError):
        raise UserError(
            f"{path} is no file of DREAMER: it needs DREAMER.Data{{i}}.EEG.stimuli, .EEG.baseline and "
            f".Score{label.capitalize()}"
        ) from None
    return Corpus(name=card.name, classes=classes_of(label, args.levels, 5), recordings=recordings, label=label)


def _one(value: Any) -> Any:
    """The struct inside the arrays of one element that MATLAB files wrap it in."""
    while isinstance(value, np.ndarray):
        value = value.flat[0]
    return value
