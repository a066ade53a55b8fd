"""Options of the task and of `predict`. Imports neither torch nor numpy."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(kw_only=True)
class SpeechTaskConfig:
    """How voices are trained and scored.

    Attributes:
        limit: decibels from which on a mixture counts as separated and no longer trains.
        measures: what the test part is scored by: "si_sdr" alone, also BSS-eval's "sdr", or "all", with STOI and, where
            the package pesq is installed, PESQ.
    """

    limit: float = 30.0
    measures: Literal["si_sdr", "sdr", "all"] = "all"


@dataclass(kw_only=True)
class PredictOptions:
    """How files of one's own are separated.

    Attributes:
        chunk: seconds separated at once, from which memory follows; 0 = the whole recording.
        overlap: share of a chunk that it has in common with the one before, by which voices are followed; up to 0.5.
        channel: channel to separate, from 1 on; 0 = the mean of all.
        format: kind of the files written: wav, flac or ogg.
    """

    chunk: float = 32.0
    overlap: float = 0.25
    channel: int = 0
    format: Literal["wav", "flac", "ogg"] = "wav"
