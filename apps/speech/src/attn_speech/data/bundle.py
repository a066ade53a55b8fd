"""From `--data NAME_OR_PATH` to the parts of a run."""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from attn_shared.errors import UserError
from attn_shared.task import DataBundle
from attn_speech.audio import Sounds
from attn_speech.data.cards import DATASETS
from attn_speech.data.corpus import Corpus, Part
from attn_speech.data.folders import PARTS
from attn_speech.data.mixing import FileMixtures, MadeMixtures, Mixtures, evaluation
from attn_speech.data.noise import Noise, find_noise
from attn_speech.data.options import SpeechDataConfig
from attn_speech.data.readers import read_any
from core_attn.naming import UnknownNameError, unknown


def load_corpus(data: str, args: SpeechDataConfig) -> Corpus:
    """Read a data set by its name, or one's own by a folder or a CSV.

    Raises:
        UserError: no such data set, file or folder, or contents that are not what they should be; one sentence.
    """
    if data in DATASETS:
        found: Corpus = importlib.import_module(f"attn_speech.data.{data}").load(DATASETS[data], args)
        return found
    path = Path(data).expanduser()
    if path.exists() or path.suffix or len(path.parts) > 1:
        return read_any(path, args)
    try:
        raise unknown("data set", data, DATASETS)
    except UnknownNameError as error:
        raise UserError(f"{error} (or name a folder of speech)") from None


def load_bundle(data: str, args: SpeechDataConfig, *, state: Mapping[str, Any] | None = None) -> DataBundle:
    """The parts of a run.

    Args:
        data: name of a data set, or path of a folder or a CSV.
        args: the options of the data.
        state: what a trained model was trained on: its rate, and its number of voices, which the data must have.

    Returns:
        Parts that are `Mixtures`, or None; `state` holds "rate", "speakers" and "data".

    Raises:
        UserError: data that cannot be used.
    """
    if state is not None:
        args = dataclasses.replace(args, rate=int(state["rate"]), speakers=int(state["speakers"]))
    check_options(args)
    corpus = load_corpus(data, args)
    sounds = Sounds(args.rate)
    notes = list(corpus.notes)
    noise: dict[Part, Noise] = {}
    if args.noise is not None:
        noise, more = find_noise(Path(args.noise).expanduser(), args.shuffle)
        notes += more
    parts: dict[Part, Mixtures] = {}
    for part in PARTS:
        if corpus.mixtures.get(part):
            parts[part] = FileMixtures(corpus.mixtures[part], args, sounds, part)
        elif corpus.utterances.get(part):
            made = MadeMixtures(corpus.utterances[part], args, sounds, part, noise.get(part))
            if len(made):
                parts[part] = made
    if not parts:
        raise UserError(f"{corpus.name} gives no mixture at all")
    return DataBundle(
        train=parts.get("train"),
        val=parts.get("val"),
        test=parts.get("test"),
        state={"rate": args.rate, "speakers": args.speakers, "data": corpus.name},
        facts=_facts(corpus, parts, notes),
        protocol=_protocol(corpus, parts, args),
    )


def check_options(args: SpeechDataConfig) -> None:
    """Refuse options that mean nothing.

    Raises:
        UserError: which one, and what it may be.
    """
    wrong = [
        (not 2 <= args.speakers <= 3, "speakers is 2 or 3", args.speakers),
        (not 1000 <= args.rate <= 192_000, "rate is a sampling rate from 1000 to 192000 Hz", args.rate),
        (not (args.seconds == 0 or args.seconds >= 0.1), "seconds is 0 (whole mixtures) or 0.1 and more", args.seconds),
        (not args.low_db <= args.high_db, "low_db lies above high_db", args.low_db),
        (not args.noise_low_db <= args.noise_high_db, "noise_low_db lies above noise_high_db", args.noise_low_db),
        (not 0 <= args.speed <= 0.5, "speed is 0 to 0.5", args.speed),
        (not 0 <= args.reverb <= 1, "reverb is a share from 0 to 1", args.reverb),
        (not 0 <= args.val < 1, "val is a share from 0 to below 1", args.val),
        (not 0 <= args.test <= 1, "test is a share from 0 to 1", args.test),
        (not 0.1 <= args.longest <= 3600, "longest is 0.1 to 3600 seconds", args.longest),
        (args.mixtures < 0, "mixtures is 0 or more", args.mixtures),
        (args.val_mixtures < 0, "val_mixtures is 0 or more", args.val_mixtures),
        (args.test_mixtures < 0, "test_mixtures is 0 or more", args.test_mixtures),
    ]
    for bad, rule, got in wrong:
        if bad:
            raise UserError(f"data_args: {rule}, got {got}")


def _facts(corpus: Corpus, parts: Mapping[Part, Mixtures], notes: list[str]) -> dict[str, Any]:
    facts: dict[str, Any] = {"data set": corpus.name}
    for part, found in parts.items():
        if isinstance(found, FileMixtures):
            minutes = sum(one.frames / one.rate for one in found.mixtures) / 60
            facts[part] = f"{len(found)} mixtures in files, {minutes:.1f} minutes"
        elif isinstance(found, MadeMixtures):
            minutes = sum(one.frames / one.rate for one in found.utterances) / 60
            sexes = [found.utterances[ones[0]].sex for ones in found.by_speaker.values()]
            known = f" ({sexes.count('F')} female, {sexes.count('M')} male)" if all(sexes) else ""
            facts[part] = (
                f"{len(found)} mixtures{' an epoch' if part == 'train' else ''} of {len(found.speakers)} speakers"
                f"{known}, {len(found.utterances)} utterances, {minutes:.1f} minutes"
            )
    if notes:
        facts["notes"] = "; ".join(notes)
    return facts


def _protocol(corpus: Corpus, parts: Mapping[Part, Mixtures], args: SpeechDataConfig) -> str:
    """One sentence: what the test mixtures are."""
    test = parts.get("test") or parts.get("val") or next(iter(parts.values()))
    head = f"{args.speakers} voices at {args.rate} Hz, "
    if isinstance(test, FileMixtures):
        return f"{head}{len(test)} whole mixtures of {corpus.name} as they are in its files"
    assert isinstance(test, MadeMixtures)
    cut = "" if all(one.frames <= args.longest * one.rate for one in test.utterances) else f" up to {args.longest:g} s"
    return (
        f"{head}{args.mode} mode, {len(test)} mixtures of whole utterances{cut} of {len(test.speakers)} speakers of "
        f"{corpus.name} who are in no other part, {evaluation(args)}"
    )
