"""Mixtures: made on the way from single voices, or read from files; and batches of them."""

from __future__ import annotations

from abc import abstractmethod
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from attn_shared.errors import UserError
from attn_shared.seeding import derive
from attn_speech.audio import Sounds, resample, rms
from attn_speech.data.corpus import Mixture, Part, Utterance
from attn_speech.data.noise import Noise
from attn_speech.data.options import SpeechDataConfig
from attn_speech.data.rooms import draw_room, in_room

_LEVEL = 0.05  # level of the first voice, about -26 dB below full scale
_PEAK = 0.9


@dataclass(frozen=True)
class Piece:
    """What is known about one mixture.

    Attributes:
        name: for tables.
        speakers, sexes: of each voice in order; "" where not known.
    """

    name: str
    speakers: tuple[str, ...]
    sexes: tuple[str, ...]


class Mixtures(Dataset[dict[str, Tensor]]):
    """Mixtures with their voices.

    `__getitems__` gives a batch: "mixture" (B, T) and "sources" (B, C, T) float32, zero behind each one's end;
    "lengths" (B,) samples of each; "index" (B,). T is the longest of the batch.

    Args:
        args: the options of the data.
        sounds: what reads files.
        part: "train" draws anew every epoch; the others are fixed.
    """

    def __init__(self, args: SpeechDataConfig, sounds: Sounds, part: Part) -> None:
        self.args, self.sounds, self.part = args, sounds, part
        self.seed, self.epoch = 0, 0

    @property
    def training(self) -> bool:
        return self.part == "train"

    def set_epoch(self, seed: int, epoch: int) -> None:
        """From here on a training mixture follows from `seed`, `epoch` and its index."""
        self.seed, self.epoch = seed, epoch

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def piece(self, index: int) -> Piece:
        """What is known about a mixture; of a training mixture in this epoch."""

    @abstractmethod
    def samples(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """(T,) mixture and (C, T) voices."""

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {name: value[0] for name, value in self.__getitems__([index]).items()}

    def __getitems__(self, indices: Sequence[int]) -> dict[str, Tensor]:
        found = [self.samples(index) for index in indices]
        lengths = [len(mixture) for mixture, _ in found]
        mixtures = torch.zeros(len(found), max(lengths))
        sources = torch.zeros(len(found), self.args.speakers, max(lengths))
        for row, (mixture, voices) in enumerate(found):
            mixtures[row, : lengths[row]] = torch.from_numpy(mixture)
            sources[row, :, : lengths[row]] = torch.from_numpy(voices)
        return {
            "mixture": mixtures,
            "sources": sources,
            "lengths": torch.tensor(lengths),
            "index": torch.tensor(list(indices)),
        }

    def _random(self, index: int) -> np.random.Generator:
        if self.training:
            return np.random.default_rng(derive(self.seed, "mixture", self.epoch, index))
        return np.random.default_rng(derive(self.args.shuffle, "mixture", self.part, index))

    def __getstate__(self) -> dict[str, Any]:
        # A worker process reads files anew rather than get a copy of all that was read.
        kept = Sounds(self.sounds.rate, memory=self.sounds.memory, whole=self.sounds.whole)
        return {**self.__dict__, "sounds": kept}


# -- made here --------------------------------------------------------------------------------------------------------


class MadeMixtures(Mixtures):
    """Mixtures of single voices, each of another speaker.

    The first voice of mixture i is utterance i (of the epoch's round), the others are drawn: a speaker, then one of
    that speaker's utterances. In training also: the stretch that is cut, levels, speed, noise and room. For evaluation
    whole utterances are mixed, from their beginnings, at their speed and in no room.

    Args:
        utterances: the part's voices.
        noise: its recordings of noise, or None.

    Raises:
        UserError: fewer speakers than voices in a mixture.
    """

    def __init__(
        self, utterances: Sequence[Utterance], args: SpeechDataConfig, sounds: Sounds, part: Part, noise: Noise | None
    ) -> None:
        super().__init__(args, sounds, part)
        self.utterances, self.noise = list(utterances), noise
        self.by_speaker: dict[str, list[int]] = defaultdict(list)
        for number, one in enumerate(self.utterances):
            self.by_speaker[one.speaker].append(number)
        self.speakers = sorted(self.by_speaker)
        if len(self.speakers) < args.speakers:
            raise UserError(
                f"mixtures of {args.speakers} voices need as many speakers, and the {part} part has "
                f"{len(self.speakers)}"
            )
        counts = {"train": args.mixtures or len(self.utterances), "val": args.val_mixtures, "test": args.test_mixtures}
        self.count = counts[part]
        # So that a small number of fixed mixtures meets all speakers and not only the first ones.
        order = np.random.default_rng(derive(args.shuffle, "first voices", part)).permutation(len(self.utterances))
        self.order = _by_turns([int(i) for i in order], [one.speaker for one in self.utterances])

    def __len__(self) -> int:
        return self.count

    def _voices(self, index: int, random: np.random.Generator) -> list[Utterance]:
        place = index + (self.epoch * self.count if self.training else 0)
        first = self.utterances[self.order[place % len(self.order)]]
        others = [name for name in self.speakers if name != first.speaker]
        chosen = random.choice(len(others), self.args.speakers - 1, replace=False)
        found = [first]
        for number in chosen:
            own = self.by_speaker[others[number]]
            found.append(self.utterances[own[random.integers(len(own))]])
        return found

    def piece(self, index: int) -> Piece:
        voices = self._voices(index, self._random(index))
        name = "+".join(one.path.stem for one in voices)
        return Piece(name, tuple(one.speaker for one in voices), tuple(one.sex for one in voices))

    def samples(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        args, random = self.args, self._random(index)
        voices = self._voices(index, random)
        levels = np.concatenate([[0.0], random.uniform(args.low_db, args.high_db, args.speakers - 1)])
        speeds = np.ones(args.speakers)
        if self.training and args.speed:
            # In steps of a thousandth: resampling is fast where the rates are small whole numbers.
            speeds = random.uniform(1 - args.speed, 1 + args.speed, args.speakers).round(3)
        rooms = None
        if self.training and args.reverb and random.random() < args.reverb:
            rooms = draw_room(random, args.speakers, args.rate)

        there = [int(self.sounds.length(one.frames, one.rate) / speed) for one, speed in zip(voices, speeds)]
        length = min(there) if args.mode == "min" else max(there)
        most = args.seconds if self.training and args.seconds else args.longest
        length = max(1, min(length, round(most * args.rate)))

        sources = np.zeros((args.speakers, length), dtype=np.float32)
        for row, (one, speed, have) in enumerate(zip(voices, speeds, there)):
            voice = self._stretch(one, float(speed), have, length, random)
            if rooms is not None:
                voice = in_room(voice, rooms[row])
            sources[row, : len(voice)] = voice
        background = None
        if self.noise is not None:
            over = random.uniform(args.noise_low_db, args.noise_high_db)
            background = (self.noise.draw(random, self.sounds, length), float(over))
        return mix(sources, levels, args.rate, background)

    def _stretch(self, one: Utterance, speed: float, have: int, length: int, random: np.random.Generator) -> np.ndarray:
        """(min(have, length),) samples of an utterance played at `speed`."""
        length = min(have, length)
        taken = length if speed == 1 else int(np.ceil(length * speed))
        slack = max(0, self.sounds.length(one.frames, one.rate) - taken)
        # A stretch of silence teaches nothing: another one is tried a few times.
        for _ in range(4 if self.training else 1):
            start = int(random.integers(slack + 1)) if self.training else 0
            voice = self.sounds.read(one.path, one.frames, one.rate, start, taken)
            if rms(voice) > 1e-3 or not slack:
                break
        if speed == 1:
            return voice
        return resample(voice, round(1000 * speed), 1000)[:length]


def _by_turns(order: Sequence[int], speakers: Sequence[str]) -> list[int]:
    """`order` rearranged so that every speaker's first comes before anybody's second."""
    seen: dict[str, int] = defaultdict(int)
    turns = []
    for number in order:
        turns.append(seen[speakers[number]])
        seen[speakers[number]] += 1
    return [number for _, number in sorted(zip(turns, order), key=lambda pair: pair[0])]


def mix(
    sources: np.ndarray, levels: np.ndarray, rate: int, noise: tuple[np.ndarray, float] | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Set levels and add up.

    Args:
        sources: (C, T) voices; a silent one stays silent.
        levels: (C,) decibels of each voice's level while it speaks.
        rate: sampling rate, Hz.
        noise: (T,) samples, and the level of the voices together over it, decibels.

    Returns:
        (T,) mixture and (C, T) voices as they are in it. A level of 0 is about -26 dB below full scale; where the
        mixture or a voice would pass 0.9 of full scale, all are turned down together.
    """
    found = np.zeros_like(sources)
    for row, voice in enumerate(sources):
        level = active_level(voice, rate)
        if level > 0:
            found[row] = voice * (_LEVEL * 10 ** (levels[row] / 20) / level)
    mixture = found.sum(axis=0)
    if noise is not None:
        background, over = noise
        level = rms(background)
        if level > 0:
            mixture = mixture + background * np.float32(rms(mixture) / level * 10 ** (-over / 20))
    peak = max(float(np.abs(mixture).max(initial=0)), float(np.abs(found).max(initial=0)))
    if peak > _PEAK:
        mixture, found = mixture * np.float32(_PEAK / peak), found * np.float32(_PEAK / peak)
    return mixture.astype(np.float32), found


def active_level(voice: np.ndarray, rate: int) -> float:
    """Level of a voice while it speaks: root mean square over the 20 ms frames less than 40 dB below the loudest."""
    frame = max(1, rate // 50)
    count = len(voice) // frame
    if not count:
        return rms(voice)
    power = np.square(voice[: count * frame].reshape(count, frame), dtype=np.float64).mean(axis=1)
    if not power.max() > 0:
        return rms(voice)
    return float(np.sqrt(power[power > 1e-4 * power.max()].mean()))


# -- read from files --------------------------------------------------------------------------------------------------


class FileMixtures(Mixtures):
    """Mixtures that exist as files, as they are; in training a stretch of each, another one every epoch.

    Args:
        mixtures: the part's mixtures.
    """

    def __init__(self, mixtures: Sequence[Mixture], args: SpeechDataConfig, sounds: Sounds, part: Part) -> None:
        super().__init__(args, sounds, part)
        self.mixtures = list(mixtures)
        for one in self.mixtures:
            if len(one.sources) != args.speakers:
                raise UserError(
                    f"{one.name} is a mixture of {len(one.sources)} voices, not of {args.speakers}; "
                    f"set --data_args.speakers {len(one.sources)}"
                )

    def __len__(self) -> int:
        return len(self.mixtures)

    def piece(self, index: int) -> Piece:
        one, blank = self.mixtures[index], ("",) * self.args.speakers
        return Piece(one.name, one.speakers or blank, one.sexes or blank)

    def samples(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        one, random = self.mixtures[index], self._random(index)
        total = self.sounds.length(one.frames, one.rate)
        start, count = 0, total
        if self.training and self.args.seconds:
            count = min(total, round(self.args.seconds * self.args.rate))
            start = int(random.integers(total - count + 1))

        def stretch(path: Any) -> np.ndarray:
            return self.sounds.read(path, one.frames, one.rate, start, count)

        voices = np.stack([stretch(path) for path in one.sources])
        if one.mixture is not None:
            return stretch(one.mixture), voices
        mixture = voices.sum(axis=0)
        return (mixture if one.noise is None else mixture + stretch(one.noise)), voices


def evaluation(args: SpeechDataConfig) -> str:
    """The options that fixed mixtures are made by, in words."""
    defaults = SpeechDataConfig()
    text = f"levels within {args.low_db:g} to {args.high_db:g} dB"
    if args.noise:
        text += f", noise {args.noise_low_db:g} to {args.noise_high_db:g} dB below the voices"
    if args.shuffle != defaults.shuffle:
        text += f", drawn by seed {args.shuffle}"
    return text
