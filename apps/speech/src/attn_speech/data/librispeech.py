"""LibriSpeech, made or downloaded by the user; see its card."""

from __future__ import annotations

from attn_shared.app import DataCard
from attn_speech.data.corpus import Corpus
from attn_speech.data.options import SpeechDataConfig
from attn_speech.data.readers import read_under


def load(card: DataCard, args: SpeechDataConfig) -> Corpus:
    """Its own parts, for the rate, mode and number of voices asked for."""
    return read_under(card, "LibriSpeech", args)
