"""Voices out of users' recordings: sound files of any rate, channels and length in, one file for each voice out."""

from __future__ import annotations

import contextlib
import math
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import numpy as np
import soundfile

from attn_shared.errors import UserError
from attn_shared.inputs import one_by_one, refuse
from attn_speech import audio
from attn_speech.models.base import Separator
from attn_speech.separate import separate

if TYPE_CHECKING:
    from attn_speech.task import SpeechTask

_BLOCK = 1 << 16
_FULL = 0.99
_SILENT = 3e-5  # root mean square: what rounding to 16 bits leaves of nothing


def predict_files(task: SpeechTask, inputs: Sequence[Path], output: Path, options: Mapping[str, Any]) -> list[Path]:
    """Separate each recording.

    Writes `<stem>_voice1.wav`, `<stem>_voice2.wav`, … for each input, at its rate and exactly as long. A folder stands
    for the sound files in it. What the voices sound like is what the model knows of the mean of all channels (or of
    one). Their sum is as near to the recording as one gain for all can bring it.

    Args:
        task: a trained model.
        inputs: files and folders.
        output: folder for the files.
        options: the fields of `attn_speech.cli.PredictOptions`.

    Raises:
        UserError: names every file that could not be separated and why; the others have been written all the same.
    """
    seconds, overlap = float(options.get("chunk", 32.0)), float(options.get("overlap", 0.25))
    if not (seconds == 0 or seconds >= 0.5) or not math.isfinite(seconds):
        raise UserError(f"--chunk is {seconds:g}; give seconds from 0.5 on, or 0 for the whole recording at once")
    if not 0 < overlap <= 0.5:
        raise UserError(f"--overlap is {overlap:g}; give the share of a chunk, above 0 and up to 0.5")
    settings = _Settings(
        chunk=round(seconds * task.rate),
        overlap=round(overlap * seconds * task.rate),
        channel=int(options.get("channel", 0)),
        kind=str(options.get("format", "wav")),
    )
    paths = _files(inputs)
    stems = [path.stem for path in paths]
    for stem in stems:
        if stems.count(stem) > 1:
            raise UserError(f"two inputs are called {stem!r} and would write the same files; rename one")
    task.eval()
    written, failed = one_by_one(
        paths, lambda path: _predict(task.network, path, task.rate, output, settings), lambda path: path.name
    )
    others = f"the other files were done ({output})" if written else ""
    refuse(failed, len(paths), what="files", done="separated", others=others)
    return written


@dataclass(frozen=True, kw_only=True)
class _Settings:
    """Samples of a chunk and of what it shares, the channel (0 = mean of all), the kind of the files."""

    chunk: int
    overlap: int
    channel: int
    kind: str


@dataclass
class _Sums:
    """What is known of a separation when it has ended: samples, and what decides the gain."""

    frames: int = 0
    across: float = 0.0
    within: float = 0.0
    loudest: float = 0.0
    energy: float = 0.0

    def add(self, mixture: np.ndarray, voices: np.ndarray) -> None:
        total = voices.sum(axis=0, dtype=np.float64)
        self.frames += len(mixture)
        self.across += float(total @ mixture)
        self.within += float(total @ total)
        self.energy += float(np.square(mixture, dtype=np.float64).sum())
        self.loudest = max(self.loudest, float(np.abs(voices).max(initial=0.0)))

    def gain(self) -> float:
        """What brings the sum of the voices nearest to the mixture, below full scale."""
        if not self.within or not self.across:
            return 1.0
        best = self.across / self.within
        return best if abs(best) * self.loudest <= _FULL else math.copysign(_FULL / self.loudest, best)


def _predict(network: Separator, path: Path, rate: int, output: Path, settings: _Settings) -> list[Path]:
    """Write the voices of one file and say on stderr how it went; the files."""
    head = audio.info(path)
    if settings.channel > head.channels:
        raise UserError(f"{path} has {head.channels} channels, so there is no channel {settings.channel}")
    if rate >= 2 * head.rate:
        quality = f"its {head.rate} Hz are far below the {rate} Hz that the model was trained with"
    elif head.rate > rate:
        quality = f"the model works at {rate} Hz, so the voices hold nothing above {rate // 2} Hz"
    else:
        quality = ""
    started = time.perf_counter()
    subtype = _subtype(settings.kind, head.subtype)
    targets = [output / f"{path.stem}_voice{i + 1}.{settings.kind}" for i in range(network.speakers)]
    with _temporary(output) as store:
        sums = _Sums()
        resampler = audio.Resampler(head.rate, rate)
        pieces = _mixture(path, settings.channel, head, resampler)
        for mixture, voices in separate(network, pieces, chunk=settings.chunk, overlap=settings.overlap):
            if not np.isfinite(voices).all():
                raise UserError(f"{path}: the model gave voices that are no numbers; its training may have failed")
            sums.add(mixture, voices)
            store.write(np.ascontiguousarray(voices.T, dtype=np.float32).tobytes())
        _write(store, sums, targets, network.speakers, rate, head, subtype)
    seconds = time.perf_counter() - started
    print(
        f"{path.name}: {head.seconds:.1f} s, {network.speakers} voices in {seconds:.1f} s "
        f"(real-time factor {seconds / head.seconds:.3f})",
        file=sys.stderr,
    )
    notes = [quality]
    if sums.energy <= _SILENT**2 * sums.frames:
        alone = head.channels == 1 or settings.channel
        notes.append("it is silent" if alone else "its channels together are silent; --channel chooses one")
    elif head.channels > 1 and not settings.channel:
        notes.append(f"the mean of its {head.channels} channels was separated; --channel chooses one")
    for note in notes:
        if note:
            print(f"{path.name}: {note}", file=sys.stderr)
    return targets


@contextlib.contextmanager
def _temporary(folder: Path) -> Iterator[IO[bytes]]:
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            yield file
    except OSError as error:
        raise UserError(f"cannot write to {folder}: {error.strerror or error}") from None


def _mixture(path: Path, channel: int, head: audio.SoundInfo, resampler: audio.Resampler) -> Iterator[np.ndarray]:
    """One channel of a file, or the mean of all, at the model's rate, in pieces."""
    done = 0
    for block in audio.blocks(path, _BLOCK, mono=not channel):
        samples = block if block.ndim == 1 else block[channel - 1]
        done += len(samples)
        yield resampler.push(samples[None], last=done == head.frames)[0]


def _write(
    store: IO[bytes],
    sums: _Sums,
    targets: Sequence[Path],
    voices: int,
    rate: int,
    head: audio.SoundInfo,
    subtype: str | None,
) -> None:
    """The stored voices, interleaved, as files at the recording's rate and exactly as long."""
    gain = sums.gain()
    resampler = audio.Resampler(rate, head.rate, channels=voices)
    store.seek(0)
    read = given = 0
    with contextlib.ExitStack() as stack:
        files = [stack.enter_context(audio.Writer(target, head.rate, subtype=subtype)) for target in targets]
        while read < sums.frames:
            block = np.frombuffer(store.read(_BLOCK * 4 * voices), np.float32).reshape(-1, voices).T
            read += block.shape[1]
            found = resampler.push(block * np.float32(gain), last=read == sums.frames)
            # There and back again may give a sample more or less than there were.
            found = found[:, : head.frames - given]
            given += found.shape[1]
            if read == sums.frames and given < head.frames:
                found = np.pad(found, ((0, 0), (0, head.frames - given)))
            for file, voice in zip(files, found):
                file.write(voice)


def _subtype(kind: str, own: str) -> str | None:
    """The recording's numbers where the files can hold them, else 16 bits."""
    if kind not in ("wav", "flac", "ogg"):
        raise UserError(f"--format is {kind!r}; it may be wav, flac or ogg")
    wanted = {"PCM_24": "PCM_24", "PCM_32": "PCM_24", "FLOAT": "FLOAT", "DOUBLE": "FLOAT"}.get(own, "PCM_16")
    if kind == "ogg":
        return None
    return wanted if soundfile.check_format(kind.upper(), wanted) else "PCM_24"


def _files(inputs: Sequence[Path]) -> list[Path]:
    found: list[Path] = []
    for path in inputs:
        if not path.is_dir():
            found.append(path)
            continue
        inside = sorted(file for file in path.iterdir() if file.suffix.lower() in audio.SUFFIXES)
        if not inside:
            raise UserError(f"{path} holds no sound files")
        found += inside
    return found
