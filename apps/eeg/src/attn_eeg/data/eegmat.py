"""EEGMAT, 36 subjects at rest and counting backwards, at 128 Hz; see its card."""

from __future__ import annotations

import csv

import numpy as np

from attn_eeg.data.channels import electrode
from attn_eeg.data.options import EegDataConfig
from attn_eeg.data.readers import finish
from attn_eeg.data.recording import Corpus, Recording
from attn_shared.app import DataCard
from attn_shared.datasets import locate
from attn_shared.errors import UserError


def load(card: DataCard, args: EegDataConfig) -> Corpus:
    """Label "task": rest (its end, as long as the subject's task lasts) against arithmetic, two recordings a
    subject. Label "quality": bad or good at counting, the task's recording of each subject.
    """
    label = args.label or "task"
    if label not in ("task", "quality"):
        raise UserError(f"data set eegmat has the labels task and quality, not {label!r}")
    root = locate(card)
    with (root / "eegmat_128hz" / "subject-info.csv").open(encoding="utf-8-sig", newline="") as file:
        good = {row["Subject"]: int(row["Count quality"]) for row in csv.DictReader(file)}
    recordings = []
    for file_ in card.files:
        path = root / file_.path
        if path.suffix != ".npz":
            continue
        try:
            with np.load(path, allow_pickle=False) as found:
                scale, sfreq = np.float32(found["scale"]), float(found["sfreq"])
                parts = {name: found[name].astype(np.float32) * scale for name in ("rest", "task")}
                channels = [electrode(str(name)) for name in found["channels"]]
        except Exception as error:
            raise UserError(f"{path} is damaged ({type(error).__name__}); get it anew") from None
        parts["rest"] = parts["rest"][:, -parts["task"].shape[1] :]
        for number, (trial, data) in enumerate(parts.items()):
            if label == "quality" and trial == "rest":
                continue
            recordings.append(
                finish(
                    Recording(
                        subject=path.stem,
                        trial=trial,
                        data=data,
                        sfreq=sfreq,
                        channels=list(channels),
                        label=number if label == "task" else good[path.stem],
                        source=str(path),
                    )
                )
            )
    classes = ["rest", "arithmetic"] if label == "task" else ["bad counter", "good counter"]
    return Corpus(name=card.name, classes=classes, recordings=recordings, label=label)
