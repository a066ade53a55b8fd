"""DEAP, in the form of its MATLAB files: arrays data (40 trials, 40 signals, 8064 samples) and labels (40, 4)."""

from __future__ import annotations

import numpy as np

from attn_eeg.data.options import EegDataConfig
from attn_eeg.data.ratings import classes_of, grade
from attn_eeg.data.readers import finish, load_mat
from attn_eeg.data.recording import Corpus, Recording
from attn_shared.app import DataCard
from attn_shared.datasets import folder
from attn_shared.errors import UserError

SFREQ, BASELINE = 128.0, 3 * 128
# Order of the preprocessed files ("Geneva order"); signals 33 to 40 are not EEG.
_ORDER = "Fp1 AF3 F3 F7 FC5 FC1 C3 T7 CP5 CP1 P3 P7 PO3 O1 Oz Pz Fp2 AF4 Fz F4 F8 FC6 FC2 Cz C4 T8 CP6 CP2 P4 P8 PO4 O2"
CHANNELS = _ORDER.split()

LABELS = ("valence", "arousal", "dominance", "liking")


def load(card: DataCard, args: EegDataConfig) -> Corpus:
    """One recording a trial, its 3 s of baseline apart; ratings 1 to 9 become two or nine classes."""
    label = args.label or "valence"
    if label not in LABELS:
        raise UserError(f"data set deap has the labels {', '.join(LABELS)}, not {label!r}")
    root = folder(card) / "deap"
    files = sorted(root.glob("s[0-9][0-9].mat"))
    if not files:
        pickles = any(root.glob("s[0-9][0-9].dat"))
        why = " (the .dat files there are Python pickles and are not opened)" if pickles else ""
        raise UserError(f"no sNN.mat under {root}{why}: {card.manual}")
    recordings = []
    for path in files:
        arrays = load_mat(path)
        data, ratings = arrays.get("data"), arrays.get("labels")
        if data is None or ratings is None or data.ndim != 3 or data.shape[1] < 32 or ratings.shape != (len(data), 4):
            raise UserError(f"{path} is no file of DEAP: it needs data (trials, 40, samples) and labels (trials, 4)")
        if data.shape[2] <= BASELINE:
            raise UserError(f"{path}: trials of {data.shape[2]} samples hold nothing behind the {BASELINE} of baseline")
        for number, (signals, rating) in enumerate(zip(data, ratings), start=1):
            recordings.append(
                finish(
                    Recording(
                        subject=path.stem,
                        trial=f"{number:02d}",
                        data=signals[:32, BASELINE:].astype(np.float32),
                        baseline=signals[:32, :BASELINE].astype(np.float32),
                        sfreq=SFREQ,
                        channels=list(CHANNELS),
                        label=grade(float(rating[LABELS.index(label)]), args.levels, 9, str(path)),
                        source=str(path),
                    )
                )
            )
    return Corpus(name=card.name, classes=classes_of(label, args.levels, 9), recordings=recordings, label=label)
