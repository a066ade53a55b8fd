"""Synthetic speech, which lies in the package. No human speaks in it, and it is never called anything else."""

from __future__ import annotations

from pathlib import Path

from attn_shared.app import DataCard
from attn_speech.data.corpus import Corpus
from attn_speech.data.options import SpeechDataConfig
from attn_speech.data.readers import read_csv


def load(card: DataCard, args: SpeechDataConfig) -> Corpus:
    """40 voices of a formant synthesiser, no voice in two parts."""
    found = read_csv(Path(__file__).with_name("voices") / "utterances.csv", args)
    notes = ["synthetic: spoken by a formant synthesiser, no human voice", *found.notes]
    return Corpus(name=card.name, utterances=found.utterances, notes=notes)
