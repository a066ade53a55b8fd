"""What is wrong with a user's own speech: `data check PATH`."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import numpy as np

from attn_shared.errors import UserError
from attn_speech.audio import SUFFIXES, read, rms
from attn_speech.data.corpus import Corpus, Mixture
from attn_speech.data.folders import sound_files
from attn_speech.data.options import SpeechDataConfig
from attn_speech.data.readers import SHORTEST, read_any

_MOST = 40  # sentences
_QUIET = 1e-4  # of full scale: -80 dB
_LEAST_SHARE = 0.2


def check_file(path: Path) -> list[str]:
    """Sentences about a sound file, a folder of speech or a table; empty when nothing is wrong.

    Every file is read to its end. What is said: files that are missing, damaged, cut short, silent, too short or hold
    no finite numbers; voices of unknown speakers; a speaker in two parts; too few speakers; mixtures whose files do
    not fit together.
    """
    if path.suffix.lower() in SUFFIXES and path.is_file():
        return check_sound(path)
    problems: list[str] = []
    try:
        corpus = read_any(path, SpeechDataConfig(), problems.append)
    except UserError as error:
        if path.is_dir() and problems:  # recordings of nobody known may still be faulty
            problems += [problem for one in sound_files(path) for problem in check_sound(one)]
        return [*_some([*dict.fromkeys(problems)]), str(error)]
    for one in _files(corpus):
        problems += check_sound(one)
    for part, voices in corpus.utterances.items():
        speakers = {voice.speaker for voice in voices}
        if len(speakers) < 2:
            problems.append(f"the {part} part has one speaker only ({speakers.pop()}), and a mixture needs two")
    if not problems:
        for mixtures in corpus.mixtures.values():
            for mixture in mixtures:
                problems += check_mixture(mixture)
    return _some(problems)


def _some(problems: list[str]) -> list[str]:
    more = len(problems) - _MOST
    return problems if more <= 0 else [*problems[:_MOST], f"and {more} more"]


def _files(corpus: Corpus) -> Iterable[Path]:
    found: dict[Path, None] = {}
    for voices in corpus.utterances.values():
        found |= dict.fromkeys(voice.path for voice in voices)
    for mixtures in corpus.mixtures.values():
        for one in mixtures:
            found |= dict.fromkeys(path for path in (one.mixture, *one.sources, one.noise) if path is not None)
    return found


def check_sound(path: Path) -> list[str]:
    """Sentences about one sound file."""
    try:
        samples, rate = read(path, mono=False)
    except UserError as error:
        return [str(error)]
    if rms(samples) < _QUIET:
        return [f"{path} is silent"]
    if samples.shape[1] < SHORTEST * rate:
        return [f"{path} lasts {samples.shape[1] / rate:.3f} s; speech shorter than {SHORTEST:g} s is left out"]
    full = float(np.mean(np.abs(samples) >= 1 - 2**-15))
    if full > 0.01:
        return [f"{path} is overdriven: {full:.1%} of its samples are at full scale"]
    return []


def check_mixture(one: Mixture) -> list[str]:
    """Sentences about a mixture: whether its voices are in it."""
    if one.mixture is None:
        return []
    files = [*one.sources, *([one.noise] if one.noise else [])]
    mixture, *parts = (read(path)[0][: one.frames].astype(np.float64) for path in (one.mixture, *files))
    gains, *_ = np.linalg.lstsq(np.stack(parts, axis=1), mixture, rcond=None)
    rest = mixture - np.stack(parts, axis=1) @ gains
    share = 1 - float(np.square(rest).sum() / np.square(mixture).sum())
    if share < _LEAST_SHARE:
        return [f"mixture {one.name}: its voices make up {share:.0%} of it; do they belong to it?"]
    return []
