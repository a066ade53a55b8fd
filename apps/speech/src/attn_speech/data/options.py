"""The options that all data sets share. Imports neither torch nor numpy."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(kw_only=True)
class SpeechDataConfig:
    """How speech is read, mixed, cut and split.

    Attributes:
        rate: sampling rate, Hz; files of another rate are resampled.
        speakers: voices in a mixture, 2 or 3.
        seconds: length of training segments; 0 = whole mixtures.
        mode: "min" = a mixture is as long as its shortest voice, "max" = as its longest (the others end in silence).
        low_db, high_db: range from which each voice's level against the first one's is drawn, decibels.
        speed: a training voice is played this much faster or slower at most, such as 0.05; 0 = never.
        noise: folder of noise recordings mixed into training and evaluation mixtures; None = none.
        noise_low_db, noise_high_db: range of the level of the voices together over the noise, decibels.
        reverb: share of the training mixtures put into a simulated room.
        mixtures: mixtures made of each epoch's training utterances; 0 = one for each utterance.
        val_mixtures, test_mixtures: mixtures made once, by `shuffle`, for validation and test.
        longest: seconds of such a mixture at most; longer ones end there, as do a training epoch's whole ones.
        val: share of the training speakers held out for validation, where the data set has no such part.
        test: share of the speakers held out for test, where it has none; 1 = all, such as to evaluate files.
        shuffle: seed of the splits and of the fixed mixtures.
    """

    rate: int = 8000
    speakers: int = 2
    seconds: float = 4.0
    mode: Literal["min", "max"] = "min"
    low_db: float = -2.5
    high_db: float = 2.5
    speed: float = 0.0
    noise: str | None = None
    noise_low_db: float = 5.0
    noise_high_db: float = 20.0
    reverb: float = 0.0
    mixtures: int = 0
    val_mixtures: int = 40
    test_mixtures: int = 100
    longest: float = 60.0
    val: float = 0.1
    test: float = 0.1
    shuffle: int = 0
