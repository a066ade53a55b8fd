"""Make the synthetic speech that lies in the package: sentences of our own, spoken by espeak-ng in many voices.

    pip install espeakng-loader
    python apps/speech/tools/make_synthetic.py apps/speech/src/attn_speech/data/voices

The same samples every time with the same release of espeak-ng; 1.52 (espeakng-loader 0.2.4) made those in the package.
Only the serial number inside of each OGG file differs.
"""

from __future__ import annotations

import argparse
import csv
import ctypes
import shutil
from dataclasses import dataclass
from pathlib import Path

import espeakng_loader
import numpy as np
import soundfile
import soxr

RATE, CLIPS, SECONDS = 8000, 8, 3.0

SUBJECTS = [
    "the old sailor",
    "my neighbour",
    "a small brown dog",
    "the young teacher",
    "our baker",
    "that tall woman",
    "the quiet farmer",
    "her cousin",
    "a tired driver",
    "the museum guide",
    "his sister",
    "the evening nurse",
]
VERBS = [
    "found",
    "carried",
    "sold",
    "painted",
    "followed",
    "remembered",
    "opened",
    "borrowed",
    "fixed",
    "watched",
    "described",
    "counted",
]
OBJECTS = [
    "a blue bottle",
    "the wooden gate",
    "seven oranges",
    "an empty box",
    "the garden chair",
    "a broken clock",
    "two heavy bags",
    "the yellow curtain",
    "a letter",
    "the fishing boat",
    "some warm bread",
    "a silver coin",
]
PLACES = ["near the river", "before sunrise", "in the narrow street", "behind the station", "without a word",
          "after the storm", "at the market", "under the bridge", "on Thursday", "beside the church", "last winter",
          "across the field"]  # fmt: skip


@dataclass(frozen=True)
class Voice:
    """A speaker: espeak-ng's variant and accent, pitch (0 to 99), words a minute."""

    variant: str
    sex: str
    accent: str
    pitch: int
    speed: int


ACCENTS = ("en-us", "en", "en-gb-scotland", "en-gb-x-rp", "en-gb-x-gbcwmd", "en-gb-x-gbclan", "en-us-nyc", "en-029")
# A variant is in one part only, however it is pitched.
WOMEN = {
    "test": ["f2", "linda", "steph3", "Annie"],
    "val": ["f4", "belinda"],
    "train": ["f1", "f3", "f5", "Alicia", "Andrea", "anika", "aunty", "grandma", "steph", "steph2", "f1", "f3",
              "Alicia", "anika"],
}  # fmt: skip
MEN = {
    "test": ["m3", "Hugo", "travis", "david"],
    "val": ["m6", "Denis"],
    "train": ["m1", "m2", "m4", "m5", "m7", "m8", "Andy", "Diogo", "Lee", "Marco", "antonio", "michel", "sandro",
              "victor"],
}  # fmt: skip


class Speaker:
    """espeak-ng as a function from text to samples."""

    def __init__(self) -> None:
        self.library = ctypes.CDLL(espeakng_loader.get_library_path())
        synchronous, milliseconds = 2, 0
        self.rate = self.library.espeak_Initialize(
            synchronous, milliseconds, espeakng_loader.get_data_path().encode(), 0
        )
        if self.rate <= 0:
            raise SystemExit("espeak-ng does not start")
        kind = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.c_void_p)
        self.pieces: list[np.ndarray] = []

        def take(samples: ctypes._Pointer, count: int, events: int | None) -> int:
            if samples and count > 0:
                self.pieces.append(np.ctypeslib.as_array(samples, (count,)).copy())
            return 0

        self._callback = kind(take)
        self.library.espeak_SetSynthCallback(self._callback)

    def say(self, text: str, voice: Voice) -> np.ndarray:
        """Samples of `text` at RATE, float64 in -1..1, silence at both ends cut off."""
        name = f"{voice.accent}+{voice.variant}".encode()
        if self.library.espeak_SetVoiceByName(name) != 0:
            raise SystemExit(f"espeak-ng has no voice {name.decode()}")
        rate, pitch, utf8 = 1, 3, 1
        self.library.espeak_SetParameter(rate, voice.speed, 0)
        self.library.espeak_SetParameter(pitch, voice.pitch, 0)
        self.pieces.clear()
        self.library.espeak_ng_SetRandSeed(len(text))  # breath is noise
        said = text.encode()
        self.library.espeak_Synth(said, len(said) + 1, 0, 1, 0, utf8, None, None)
        self.library.espeak_Synchronize()
        samples = soxr.resample(np.concatenate(self.pieces) / 32768, self.rate, RATE)
        loud = np.flatnonzero(np.abs(samples) > 0.01 * np.abs(samples).max())
        return samples[loud[0] : loud[-1] + 1]


def voices() -> dict[str, list[Voice]]:
    """All speakers by part."""
    random, found = np.random.default_rng(6), {}
    for part in ("train", "val", "test"):
        found[part] = [
            Voice(
                variant,
                sex,
                ACCENTS[int(random.integers(len(ACCENTS)))],
                int(random.integers(30, 71)),
                int(random.integers(145, 196)),
            )
            for sex, names in (("F", WOMEN[part]), ("M", MEN[part]))
            for variant in names
        ]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("output", type=Path, help="folder; what lies in it is replaced")
    output = parser.parse_args().output
    shutil.rmtree(output, ignore_errors=True)
    speaker, random, rows = Speaker(), np.random.default_rng(7), []
    for part, ones in voices().items():
        for number, voice in enumerate(ones, 1):
            name = f"{part}-{voice.sex.lower()}{number:02d}"
            (output / name).mkdir(parents=True)
            for clip in range(CLIPS):
                words = [group[int(random.integers(len(group)))] for group in (SUBJECTS, VERBS, OBJECTS, PLACES)]
                samples = speaker.say(" ".join(words) + ".", voice)[: round(SECONDS * RATE)]
                fade = np.minimum(1, np.arange(len(samples))[::-1] / (0.01 * RATE))
                samples = samples * fade * (0.7 / np.abs(samples).max())
                file = f"{name}/{clip + 1:02d}.ogg"
                with soundfile.SoundFile(
                    output / file, "w", RATE, 1, "VORBIS", format="OGG", compression_level=0.6
                ) as out:
                    out.write(samples)
                rows.append([file, name, voice.sex, part])
    with (output / "utterances.csv").open("w", newline="", encoding="utf-8") as table:
        writer = csv.writer(table, lineterminator="\n")
        writer.writerow(["file", "speaker", "sex", "split"])
        writer.writerows(rows)


if __name__ == "__main__":
    main()
