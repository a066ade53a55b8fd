"""Sound files in and out, and resampling. Samples are float32 in -1..1; time is the last axis.

libsndfile (soundfile) reads and writes, soxr resamples. What torchaudio computes too is in `audio_backend`.
"""

from __future__ import annotations

import contextlib
import os
import struct
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import soundfile
import soxr

from attn_shared.errors import UserError

SUFFIXES = (".wav", ".flac", ".ogg", ".oga", ".opus", ".mp3", ".aiff", ".aif", ".au", ".w64", ".rf64", ".caf")
_QUALITY = "HQ"
_PIECE = 1 << 22  # samples


@dataclass(frozen=True, kw_only=True)
class SoundInfo:
    """What a sound file's header says.

    Attributes:
        frames: samples of each channel.
        rate: sampling rate, Hz.
        channels: 1 = mono.
        format, subtype: libsndfile's names, such as "WAV" and "PCM_16".
    """

    frames: int
    rate: int
    channels: int
    format: str
    subtype: str

    @property
    def seconds(self) -> float:
        return self.frames / self.rate


def info(path: Path) -> SoundInfo:
    """The header of a sound file.

    Raises:
        UserError: no such file, no sound file, no samples in it, or a WAV file that is shorter than its header
            announces; one sentence.
    """
    with _open(path) as file:
        return _info(path, file)


def _info(path: Path, file: soundfile.SoundFile) -> SoundInfo:
    if file.frames <= 0:
        raise UserError(f"{path} holds no samples")
    found = SoundInfo(
        frames=file.frames, rate=file.samplerate, channels=file.channels, format=file.format, subtype=file.subtype
    )
    announced = _announced(path, file)
    if announced is not None and announced > found.frames:
        raise UserError(_cut_short(path, found.frames, announced))
    return found


def _open(path: Path) -> soundfile.SoundFile:
    if path.is_dir():
        raise UserError(f"{path} is a folder, not a sound file")
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    if path.stat().st_size == 0:
        raise UserError(f"{path} is empty (0 bytes)")
    try:
        return soundfile.SoundFile(path)
    except (soundfile.SoundFileError, RuntimeError, TypeError, OSError) as error:
        raise UserError(f"{path} cannot be read as a sound file: {_reason(error)}") from None


def _reason(error: BaseException) -> str:
    text = str(getattr(error, "error_string", "") or error).strip()
    return text.splitlines()[0].rstrip(".") if text else type(error).__name__


def _cut_short(path: Path, there: int, announced: int) -> str:
    return f"{path} is cut short: it holds {there} of the {announced} samples that its header announces"


# Bytes of a sample in formats where they are all alike.
_WIDTHS = {
    "PCM_S8": 1,
    "PCM_U8": 1,
    "ULAW": 1,
    "ALAW": 1,
    "PCM_16": 2,
    "PCM_24": 3,
    "PCM_32": 4,
    "FLOAT": 4,
    "DOUBLE": 8,
}
# Container -> byte order, bytes before the first chunk, and of each chunk: name, length, whether the length counts
# both, to how many bytes it is rounded up. Of the samples' chunk: its name, bytes before the first sample.
_CHUNKS = {
    b"RIFF": ("<", 12, 4, 4, False, 2, b"data", 0),
    b"RF64": ("<", 12, 4, 4, False, 2, b"data", 0),
    b"RIFX": (">", 12, 4, 4, False, 2, b"data", 0),
    b"FORM": (">", 12, 4, 4, False, 2, b"SSND", 8),
    b"caff": (">", 8, 4, 8, False, 1, b"data", 4),
    b"riff": ("<", 40, 16, 8, True, 8, b"data", 0),  # Sony's Wave64
}


def _announced(path: Path, file: soundfile.SoundFile) -> int | None:
    """Samples of each channel that the header announces; None where it does not say.

    libsndfile silently corrects the length of a file that was cut off.
    """
    block = _WIDTHS.get(file.subtype, 0) * file.channels
    size = _announced_bytes(path) if block else None
    return None if size is None else size // block


def _announced_bytes(path: Path) -> int | None:
    """Length of the samples in a file of chunks, as its header says."""
    with path.open("rb") as file:
        kind = file.read(4)
        if kind == b".snd":
            size = int.from_bytes(file.read(8)[4:], "big")
            return size if size != 0xFFFFFFFF else None
        if kind not in _CHUNKS:
            return None
        order, first, named, counted, both, rounded, wanted, before = _CHUNKS[kind]
        file.seek(first)
        there = path.stat().st_size
        large = 0  # of RF64 the true length, in a chunk of its own
        while len(head := file.read(named + counted)) == named + counted:
            name, size = head[:4], struct.unpack(order + ("I" if counted == 4 else "Q"), head[named:])[0]
            size -= named + counted if both else 0
            if name == wanted:
                if kind == b"RF64" and size == 0xFFFFFFFF:
                    size = large
                # Programs that write into a pipe leave the length at 0 or at the largest number.
                return size - before if 0 < size < (0x7FFFFF00 if counted == 4 and not large else 1 << 62) else None
            if not 0 <= size < there:
                return None
            here = file.tell()
            if name == b"ds64" and size >= 16:
                large = int.from_bytes(file.read(16)[8:], "little")
            file.seek(here + size + -size % rounded)
    return None


def read(path: Path, start: int = 0, frames: int | None = None, *, mono: bool = True) -> tuple[np.ndarray, int]:
    """Samples of a sound file.

    Args:
        path: the file.
        start: first sample.
        frames: how many; None = to the end.
        mono: the mean of the channels rather than all of them.

    Returns:
        (T,) or, not mono, (channels, T) float32, and the sampling rate.

    Raises:
        UserError: as `info`, or samples that are no numbers, or fewer samples than announced.
    """
    with _open(path) as file:
        head = _info(path, file)
        wanted = head.frames - start if frames is None else frames
        if start < 0 or wanted < 0 or start + wanted > head.frames:
            raise UserError(f"{path} has {head.frames} samples; {start} to {start + wanted} are not in it")
        try:
            if start:
                file.seek(start)
            # In pieces: a damaged header may announce more than fits in memory.
            pieces = [file.read(min(wanted, _PIECE), dtype="float32", always_2d=True)]
            while len(pieces[-1]) == _PIECE and (done := _PIECE * len(pieces)) < wanted:
                pieces.append(file.read(min(wanted - done, _PIECE), dtype="float32", always_2d=True))
        except (soundfile.SoundFileError, RuntimeError) as error:
            raise UserError(f"{path} is damaged: {_reason(error)}") from None
    samples = pieces[0] if len(pieces) == 1 else np.concatenate(pieces)
    return _checked(path, samples, start, wanted, head, mono), head.rate


def _checked(path: Path, samples: np.ndarray, start: int, wanted: int, head: SoundInfo, mono: bool) -> np.ndarray:
    if len(samples) < wanted:
        raise UserError(_cut_short(path, start + len(samples), head.frames))
    wrong = int((~np.isfinite(samples)).any(axis=1).sum())
    if wrong:
        raise UserError(f"{path}: {wrong} of its samples are no finite numbers")
    return _mono(samples) if mono else np.ascontiguousarray(samples.T)


def _mono(samples: np.ndarray) -> np.ndarray:
    return samples[:, 0].copy() if samples.shape[1] == 1 else samples.mean(axis=1, dtype=np.float32)


def blocks(path: Path, size: int, *, mono: bool = True) -> Iterator[np.ndarray]:
    """A sound file in pieces of `size` samples (the last one shorter), as `read` gives them.

    Raises:
        UserError: as `read`; a fault in the middle of the file is met when its piece is asked for.
    """
    with _open(path) as file:
        head = _info(path, file)
        done = 0
        while done < head.frames:
            wanted = min(size, head.frames - done)
            try:
                samples = file.read(wanted, dtype="float32", always_2d=True)
            except (soundfile.SoundFileError, RuntimeError) as error:
                raise UserError(f"{path} is damaged: {_reason(error)}") from None
            yield _checked(path, samples, done, wanted, head, mono)
            done += wanted


class Writer:
    """Write a sound file piece by piece. It appears under its name when it is whole, and not at all after an error.

    Args:
        path: the file; its suffix decides the format.
        rate: sampling rate, Hz.
        channels: 1 = mono.
        subtype: libsndfile's name of the sample format; None = 16 bits, or the format's own default.

    Raises:
        UserError: an unknown suffix, or a folder that cannot be written.
    """

    def __init__(self, path: Path, rate: int, *, channels: int = 1, subtype: str | None = None) -> None:
        kind = path.suffix[1:].upper()
        kind = {"OGA": "OGG", "OPUS": "OGG", "AIF": "AIFF"}.get(kind, kind)
        if kind not in soundfile.available_formats():
            raise UserError(f"{path}: sound files of kind {path.suffix or 'without a suffix'} cannot be written")
        if subtype is None:
            subtype = "OPUS" if path.suffix == ".opus" else soundfile.default_subtype(kind)
        self.path, self.part = path, path.with_name(f".{path.name}.part")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = soundfile.SoundFile(self.part, "w", rate, channels, subtype, format=kind)
        except (soundfile.SoundFileError, RuntimeError, ValueError, OSError) as error:
            with contextlib.suppress(OSError):
                self.part.unlink()
            raise UserError(f"cannot write {path}: {_reason(error)}") from None
        # Whole numbers wrap around beyond full scale in some libraries; here they stop there.
        self._clip = not subtype.startswith(("FLOAT", "DOUBLE"))

    def write(self, samples: np.ndarray) -> None:
        """Append (T,) or (channels, T) samples.

        Raises:
            UserError: no room left, or another failure of the disk.
        """
        samples = np.clip(samples, -1, 1) if self._clip else samples
        try:
            self._file.write(np.ascontiguousarray(samples.T))
        except (soundfile.SoundFileError, RuntimeError, OSError) as error:
            raise UserError(f"cannot write {self.path}: {_reason(error)}") from None

    def close(self, *, keep: bool = True) -> None:
        """Finish the file; `keep=False` throws it away."""
        self._file.close()
        if keep:
            os.replace(self.part, self.path)
        else:
            self.part.unlink(missing_ok=True)

    def __enter__(self) -> Writer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close(keep=error is None)


def write(path: Path, samples: np.ndarray, rate: int, *, subtype: str | None = None) -> Path:
    """Write (T,) or (channels, T) samples as one file, as `Writer` does; the path.

    Raises:
        UserError: it cannot be written.
    """
    channels = 1 if samples.ndim == 1 else len(samples)
    with Writer(path, rate, channels=channels, subtype=subtype) as file:
        file.write(samples)
    return path


# -- resampling -------------------------------------------------------------------------------------------------------


def resampled(frames: int, old: float, new: float) -> int:
    """Length of `frames` samples at rate `old` after resampling to `new`: as many as still begin inside."""
    if float(old).is_integer() and float(new).is_integer():
        return -(-frames * int(new) // int(old))
    return int(np.ceil(frames * new / old - 1e-9))


def resample(samples: np.ndarray, old: float, new: float) -> np.ndarray:
    """(…, T) at rate `old` -> (…, `resampled(T, old, new)`) at rate `new`, by soxr."""
    if old == new:
        return samples
    flat = samples.reshape(int(np.prod(samples.shape[:-1])), samples.shape[-1])
    count = resampled(flat.shape[1], old, new)
    out = np.zeros((len(flat), count), dtype=np.float32)
    if out.size:
        found = soxr.resample(np.ascontiguousarray(flat.T, dtype=np.float32), old, new, quality=_QUALITY).T[:, :count]
        out[:, : found.shape[1]] = found
    return out.reshape(*samples.shape[:-1], count)


class Resampler:
    """Resample a stream piece by piece; the pieces together are what `resample` makes of the whole, up to rounding.

    Args:
        old, new: sampling rates, Hz.
        channels: channels of the pieces.
    """

    def __init__(self, old: int, new: int, *, channels: int = 1) -> None:
        self.old, self.new, self.channels = old, new, channels
        self._read = self._given = 0
        self._stream: Any = None if old == new else soxr.ResampleStream(old, new, channels, "float32", _QUALITY)

    def push(self, samples: np.ndarray, *, last: bool = False) -> np.ndarray:
        """(channels, T) samples in -> (channels, any) samples out. With `last`, all that is still held back."""
        if self._stream is None:
            return samples
        self._read += samples.shape[-1]
        piece = np.ascontiguousarray(samples.T, dtype=np.float32)
        out = self._stream.resample_chunk(piece if self.channels > 1 else piece.reshape(-1), last=last)
        out = out.reshape(-1, self.channels).T
        total = resampled(self._read, self.old, self.new)
        if last:
            fitted = np.zeros((self.channels, total - self._given), dtype=np.float32)
            count = min(fitted.shape[1], out.shape[1])
            fitted[:, :count] = out[:, :count]
            out = fitted
        self._given += out.shape[1]
        return np.ascontiguousarray(out)


# -- many files -------------------------------------------------------------------------------------------------------


class Sounds:
    """Stretches of sound files at one rate, mono. Files that were read stay in memory up to a limit.

    Args:
        rate: sampling rate of what is given, Hz.
        memory: bytes kept.
        whole: files up to this many seconds are read whole; of longer ones only the stretch.
    """

    def __init__(self, rate: int, *, memory: int = 512 << 20, whole: float = 60.0) -> None:
        self.rate, self.memory, self.whole = rate, memory, whole
        self._kept: OrderedDict[Path, np.ndarray] = OrderedDict()
        self._bytes = 0

    def length(self, frames: int, rate: int) -> int:
        """Samples at this rate of a file of `frames` at `rate`."""
        return resampled(frames, rate, self.rate)

    def read(self, path: Path, frames: int, rate: int, start: int = 0, count: int | None = None) -> np.ndarray:
        """(count,) samples from `start` on, both at this rate; zeros behind the end.

        Args:
            frames, rate: length and rate of the file, as its header says.

        Raises:
            UserError: the file cannot be read, or has changed.
        """
        total = self.length(frames, rate)
        count = total - start if count is None else count
        if frames <= self.whole * rate:
            found = self._whole(path, frames, rate)[start : start + count]
        else:
            # A margin on both sides, so that the resampling filter meets the file's samples and no edge.
            margin = 0 if rate == self.rate else 256 * -(-rate // self.rate)
            first = max(0, start * rate // self.rate - margin)
            # The stretch begins on a sample of both rates.
            first -= first % (rate // np.gcd(rate, self.rate))
            last = min(frames, -(-(start + count) * rate // self.rate) + margin)
            part, _ = read(path, first, max(0, last - first))
            skip = start - first * self.rate // rate
            found = resample(part, rate, self.rate)[skip : skip + count]
        if len(found) < count:
            found = np.concatenate([found, np.zeros(count - len(found), dtype=np.float32)])
        return found

    def _whole(self, path: Path, frames: int, rate: int) -> np.ndarray:
        if path in self._kept:
            self._kept.move_to_end(path)
            return self._kept[path]
        samples, found = read(path)
        if found != rate or len(samples) < frames:
            raise UserError(f"{path} has changed since its header was read")
        samples = resample(samples, rate, self.rate)
        self._kept[path] = samples
        self._bytes += samples.nbytes
        while self._bytes > self.memory and len(self._kept) > 1:
            self._bytes -= self._kept.popitem(last=False)[1].nbytes
        return samples


def rms(samples: np.ndarray) -> float:
    """Root of the mean square; 0 of nothing."""
    return float(np.sqrt(np.mean(np.square(samples, dtype=np.float64)))) if samples.size else 0.0
