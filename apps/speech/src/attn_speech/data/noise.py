"""Recordings of noise: which part may use which, and stretches of them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from attn_shared.errors import UserError
from attn_shared.seeding import derive
from attn_speech.audio import SUFFIXES, Sounds, info
from attn_speech.data.corpus import Part
from attn_speech.data.folders import PARTS, part_of, sound_files


@dataclass(frozen=True)
class Noise:
    """Recordings of one part.

    Attributes:
        files: path, frames and rate of each.
    """

    files: tuple[tuple[Path, int, int], ...]

    def draw(self, random: np.random.Generator, sounds: Sounds, count: int) -> np.ndarray:
        """(count,) samples from anywhere in a random recording; a shorter one is repeated."""
        path, frames, rate = self.files[random.integers(len(self.files))]
        there = sounds.length(frames, rate)
        if there >= count:
            return sounds.read(path, frames, rate, int(random.integers(there - count + 1)), count)
        once = sounds.read(path, frames, rate)
        return np.roll(np.resize(once, count), int(random.integers(count)))


def find_noise(folder: Path, shuffle: int) -> tuple[dict[Part, Noise], list[str]]:
    """The recordings of a folder by part, and notes.

    Folders train, val and test (or tr, cv, tt) inside decide the part. Without them the files are shared out, eight
    tenths to training; fewer than ten are used by all parts.

    Raises:
        UserError: no such folder, no sound file in it, or one that cannot be read.
    """
    if not folder.is_dir():
        raise UserError(f"there is no folder of noise {folder}")
    found = sound_files(folder)
    if not found:
        raise UserError(f"{folder} holds no recordings of noise ({', '.join(SUFFIXES[:4])}, …)")
    heads = [info(path) for path in found]
    files = [(path, head.frames, head.rate) for path, head in zip(found, heads)]
    named = [part_of(path.relative_to(folder).parts[0]) if path.parent != folder else None for path in found]
    if all(named):
        parts = {part: Noise(tuple(f for f, n in zip(files, named) if n == part)) for part in PARTS}
        return {part: one if one.files else parts["train"] for part, one in parts.items()}, []
    if len(files) < 10:
        return dict.fromkeys(PARTS, Noise(tuple(files))), [f"all parts share the {len(files)} recordings of noise"]
    order = np.random.default_rng(derive(shuffle, "noise")).permutation(len(files))
    tenth = len(files) // 10
    shares = {"test": order[:tenth], "val": order[tenth : 2 * tenth], "train": order[2 * tenth :]}
    return {part: Noise(tuple(files[i] for i in sorted(shares[part]))) for part in PARTS}, []
