"""LibriSpeech mini at 8 kHz; see its card. Validation speakers are held out of the training speakers."""

from __future__ import annotations

from attn_shared.app import DataCard
from attn_shared.datasets import locate
from attn_speech.data.corpus import Corpus
from attn_speech.data.options import SpeechDataConfig
from attn_speech.data.readers import read_csv


def load(card: DataCard, args: SpeechDataConfig) -> Corpus:
    """251 speakers with one utterance each to train and validate, 10 others with ten each to test."""
    found = read_csv(locate(card) / "librispeech_mini_8k" / "utterances.csv", args)
    return Corpus(name=card.name, utterances=found.utterances, notes=found.notes)
