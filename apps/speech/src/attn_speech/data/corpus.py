"""Speech as every reader gives it."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

Part = Literal["train", "val", "test"]


@dataclass(frozen=True, kw_only=True)
class Utterance:
    """One voice by itself: raw material for mixtures made on the way.

    Attributes:
        path: sound file.
        speaker: name; nobody is in two parts.
        sex: "F", "M", or "" where it is not known.
        frames, rate: length and sampling rate, as the file says.
    """

    path: Path
    speaker: str
    sex: str
    frames: int
    rate: int


@dataclass(frozen=True, kw_only=True)
class Mixture:
    """A mixture that exists as files.

    Attributes:
        name: for tables.
        mixture: sound file; None = the sum of the sources.
        sources: sound files of the voices, as long as the mixture.
        noise: sound file of what else is in it, or None.
        speakers: names, "" where not known.
        sexes: "F", "M" or "".
        frames, rate: as in `Utterance`.
    """

    name: str
    mixture: Path | None
    sources: tuple[Path, ...]
    noise: Path | None = None
    speakers: tuple[str, ...] = ()
    sexes: tuple[str, ...] = ()
    frames: int = 0
    rate: int = 0


@dataclass(frozen=True, kw_only=True)
class Corpus:
    """A data set as read: utterances to mix, or mixtures; a part may have either.

    Attributes:
        name: for messages and reports.
        utterances, mixtures: by part.
        notes: what was found: other rates, files left out and why, parts split here.
    """

    name: str
    utterances: dict[Part, list[Utterance]] = field(default_factory=dict)
    mixtures: dict[Part, list[Mixture]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
