"""SEED: a MATLAB file for each session, an array (62, samples) for each clip; the clips' labels in label.mat."""

from __future__ import annotations

import re

import numpy as np

from attn_eeg.data.channels import electrode
from attn_eeg.data.options import EegDataConfig
from attn_eeg.data.readers import finish, load_mat
from attn_eeg.data.recording import Corpus, Recording
from attn_shared.app import DataCard
from attn_shared.datasets import folder
from attn_shared.errors import UserError

SFREQ = 200.0
_ORDER = (
    "FP1 FPZ FP2 AF3 AF4 F7 F5 F3 F1 FZ F2 F4 F6 F8 FT7 FC5 FC3 FC1 FCZ FC2 FC4 FC6 FT8 T7 C5 C3 C1 CZ C2 C4 C6 "
    "T8 TP7 CP5 CP3 CP1 CPZ CP2 CP4 CP6 TP8 P7 P5 P3 P1 PZ P2 P4 P6 P8 PO7 PO5 PO3 POZ PO4 PO6 PO8 CB1 O1 OZ O2 "
    "CB2"
)
CHANNELS = _ORDER.split()


def load(card: DataCard, args: EegDataConfig) -> Corpus:
    """One recording a clip; files are <subject>_<date>.mat, sessions in the order of their dates."""
    if args.label not in ("", "emotion"):
        raise UserError(f"data set seed has the label emotion, not {args.label!r}")
    root = folder(card) / "seed"
    files = sorted(
        (int(found[1]), found[2], path)
        for path in root.glob("*.mat")
        if (found := re.fullmatch(r"(\d+)_(\d+)", path.stem)) is not None
    )
    if not files or not (root / "label.mat").is_file():
        raise UserError(f"no <subject>_<date>.mat with a label.mat under {root}: {card.manual}")
    labels = np.ravel(load_mat(root / "label.mat").get("label", [])).astype(int)
    if not len(labels) or not set(labels.tolist()) <= {-1, 0, 1}:
        raise UserError(f"{root / 'label.mat'} needs an array label of -1, 0 and 1")
    recordings, sessions = [], dict.fromkeys((subject for subject, _, _ in files), 0)
    for subject, _, path in files:
        sessions[subject] += 1
        clips = {int(m[1]): a for n, a in load_mat(path).items() if (m := re.fullmatch(r"[A-Za-z]+_eeg(\d+)", n))}
        if sorted(clips) != list(range(1, len(labels) + 1)):
            raise UserError(f"{path} holds {len(clips)} clips (<name>_eeg1 on), label.mat has {len(labels)} labels")
        for clip, data in sorted(clips.items()):
            if data.ndim != 2 or data.shape[0] != len(CHANNELS):
                raise UserError(f"{path}: clip {clip} has shape {data.shape}, not ({len(CHANNELS)}, samples)")
            recordings.append(
                finish(
                    Recording(
                        subject=f"{subject:02d}",
                        session=str(sessions[subject]),
                        trial=f"{sessions[subject]}-{clip:02d}",
                        data=data.astype(np.float32),
                        sfreq=SFREQ,
                        channels=[electrode(name) for name in CHANNELS],
                        label=int(labels[clip - 1]) + 1,
                        source=f"{path}, clip {clip}",
                    )
                )
            )
    return Corpus(name=card.name, classes=["negative", "neutral", "positive"], recordings=recordings, label="emotion")
