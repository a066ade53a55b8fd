"""EEG Eye State: one recording, labelled along its time; see its card."""

from __future__ import annotations

import numpy as np

from attn_eeg.data.options import EegDataConfig
from attn_eeg.data.readers import read_file
from attn_eeg.data.recording import Corpus
from attn_shared.app import DataCard
from attn_shared.datasets import locate
from attn_shared.errors import UserError

#: A few samples are thousands of units away from all others, which is no EEG: they count as no numbers.
_FARTHEST = 20.0


def load(card: DataCard, args: EegDataConfig) -> Corpus:
    """Samples farther than 20 robust deviations from their electrode's median are NaN; a note says how many."""
    if args.label not in ("", "eyes"):
        raise UserError(f"data set eye_state has the label eyes, not {args.label!r}")
    recording = read_file(locate(card) / card.files[0].path, rate=128.0)
    recording.subject, recording.trial = "1", "1"
    data = recording.data
    median = np.median(data, axis=1, keepdims=True)
    spread = 1.4826 * np.median(np.abs(data - median), axis=1, keepdims=True)
    outliers = (np.abs(data - median) > _FARTHEST * spread).any(axis=0)
    data[:, outliers] = np.nan
    recording.notes = [
        f"{int(outliers.sum())} samples are artefacts of thousands of units: windows over them are left out"
    ]
    return Corpus(name=card.name, classes=["open", "closed"], recordings=[recording], label="eyes")
