"""Sound files, resampling, and what torchaudio computes too."""

from __future__ import annotations

import json
import os
import struct
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from safetensors.torch import load_file

from attn_shared.errors import UserError
from attn_speech import audio
from attn_speech.audio import Resampler, Sounds, Writer, blocks, info, read, resample, resampled, write
from attn_speech.audio_backend import spectrogram, torchaudio

GOLDEN = Path(__file__).parents[1] / "golden" / "speech_audio"
STEP = 2**-15  # of 16 bits


def tone(seconds: float, rate: int, hertz: float = 440.0) -> np.ndarray:
    return (0.5 * np.sin(2 * np.pi * hertz * np.arange(round(seconds * rate)) / rate)).astype(np.float32)


@pytest.mark.parametrize(("suffix", "error"), [(".wav", STEP), (".flac", STEP), (".ogg", 0.1), (".aiff", STEP)])
@pytest.mark.parametrize("rate", [8000, 44100])
def test_written_files_are_read_back(tmp_path: Path, suffix: str, error: float, rate: int) -> None:
    samples = np.stack([tone(0.5, rate), tone(0.5, rate, 700.0)])
    path = write(tmp_path / f"a{suffix}", samples, rate)
    head = info(path)
    assert (head.frames, head.rate, head.channels) == (samples.shape[1], rate, 2)
    found, found_rate = read(path, mono=False)
    assert found_rate == rate
    assert found.shape == samples.shape
    assert np.abs(found - samples).max() <= error
    mono, _ = read(path, 100, 50)
    assert np.abs(mono - samples[:, 100:150].mean(axis=0)).max() <= error
    assert np.array_equal(np.concatenate([*blocks(path, 777, mono=False)], axis=1), found)


def test_a_file_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    def fail() -> None:
        with Writer(tmp_path / "a.wav", 8000) as file:
            file.write(tone(0.1, 8000))
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        fail()
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(UserError, match=r"\.xyz cannot be written"):
        write(tmp_path / "a.xyz", tone(0.1, 8000), 8000)
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot write"):
        write(tmp_path / "file" / "a.wav", tone(0.1, 8000), 8000)


def test_samples_beyond_full_scale_stop_there(tmp_path: Path) -> None:
    found, _ = read(write(tmp_path / "a.wav", np.array([0.0, 1.5, -1.5], dtype=np.float32), 8000))
    assert found.tolist() == pytest.approx([0, 1, -1], abs=1e-4)
    kept, _ = read(write(tmp_path / "b.wav", np.array([0.0, 1.5, -1.5], dtype=np.float32), 8000, subtype="FLOAT"))
    assert kept.tolist() == [0, 1.5, -1.5]


def test_faulty_files_are_told_in_one_sentence(tmp_path: Path) -> None:
    good = write(tmp_path / "good.wav", tone(1, 8000), 8000)
    raw = good.read_bytes()
    cases = {
        "no such file": tmp_path / "missing.wav",
        "is a folder": tmp_path,
        "is empty": tmp_path / "empty.wav",
        "cannot be read as a sound file": tmp_path / "text.wav",
        "holds no samples": tmp_path / "none.wav",
        "is cut short: it holds 2000 of the 8000": tmp_path / "short.wav",
        "3 of its samples are no finite numbers": tmp_path / "nan.wav",
    }
    (tmp_path / "empty.wav").touch()
    (tmp_path / "text.wav").write_text("not a sound file at all, but some text that goes on for a while")
    soundfile.write(tmp_path / "none.wav", np.zeros(0), 8000)
    (tmp_path / "short.wav").write_bytes(raw[: 44 + 4001])
    values = tone(0.1, 8000)
    values[10:13] = [np.nan, np.inf, -np.inf]
    soundfile.write(tmp_path / "nan.wav", values, 8000, subtype="FLOAT")
    for text, path in cases.items():
        with pytest.raises(UserError, match=text):
            read(path)
        with pytest.raises(UserError, match=text):
            list(blocks(path, 1000))
    with pytest.raises(UserError, match="are not in it"):
        read(good, 7000, 2000)


def test_a_flac_file_that_stops_early_is_refused(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    path = write(tmp_path / "a.flac", 0.1 * random.standard_normal(40000).astype(np.float32), 8000)
    path.write_bytes(path.read_bytes()[:20000])
    with pytest.raises(UserError, match=r"is cut short|is damaged"):
        read(path)


@pytest.mark.parametrize("suffix", [".wav", ".rf64", ".w64", ".aiff", ".au", ".caf"])
@pytest.mark.parametrize("subtype", ["PCM_16", "PCM_24", "FLOAT", "ULAW"])
def test_the_announced_length_is_compared_in_every_container(tmp_path: Path, suffix: str, subtype: str) -> None:
    path = write(tmp_path / f"a{suffix}", np.stack([tone(1, 8000)] * 2), 8000, subtype=subtype)
    assert info(path).frames == 8000
    raw = path.read_bytes()
    path.write_bytes(raw[: len(raw) // 2])
    with pytest.raises(UserError, match=r"is cut short: it holds \d+ of the 8000|cannot be read"):
        read(path)


@pytest.mark.parametrize("suffix", [".wav", ".flac", ".ogg", ".mp3", ".aiff", ".w64", ".caf", ".au", ".rf64"])
def test_damaged_files_end_in_samples_or_in_one_sentence(tmp_path: Path, suffix: str) -> None:
    random = np.random.default_rng(0)
    raw = write(tmp_path / f"a{suffix}", random.uniform(-0.5, 0.5, (2, 3000)).astype(np.float32), 16000).read_bytes()
    path = tmp_path / f"b{suffix}"
    for trial in range(45):
        wrong = bytearray(raw)
        for place in random.integers(0, (100, len(raw))[trial % 2], size=random.integers(1, 9)):
            wrong[place] = random.integers(256)
        path.write_bytes(wrong[: random.integers(len(raw))] if trial % 3 == 0 else wrong)
        try:
            samples, problem = read(path)[0], ""
        except UserError as error:
            samples, problem = np.zeros(0), str(error)
        assert np.isfinite(samples).all()
        assert "\n" not in problem


@pytest.mark.parametrize("length", [0, 0xFFFFFFFF])
def test_a_wav_written_into_a_pipe_is_read(tmp_path: Path, length: int) -> None:
    path = write(tmp_path / "a.wav", tone(1, 8000), 8000)
    raw = bytearray(path.read_bytes())
    raw[4:8] = raw[40:44] = struct.pack("<I", length)
    path.write_bytes(raw)
    if length:
        assert info(path).frames == 8000
    else:
        with pytest.raises(UserError):
            info(path)


def test_any_chunk_may_stand_before_the_samples(tmp_path: Path) -> None:
    raw = write(tmp_path / "a.wav", tone(1, 8000), 8000).read_bytes()
    odd = b"junk" + struct.pack("<I", 5) + b"12345\0"
    moved = raw[:36] + odd + raw[36:]
    (tmp_path / "b.wav").write_bytes(moved[:4] + struct.pack("<I", len(moved) - 8) + moved[8:])
    assert info(tmp_path / "b.wav").frames == 8000
    (tmp_path / "c.wav").write_bytes(moved[: len(odd) + 44 + 1000])
    with pytest.raises(UserError, match="it holds 500 of the 8000"):
        info(tmp_path / "c.wav")


@pytest.mark.parametrize(("old", "new"), [(16000, 8000), (44100, 8000), (8000, 44100), (48000, 8000), (8000, 11025)])
def test_resampling_keeps_a_tone_and_the_length(old: int, new: int) -> None:
    samples = tone(0.7, old)[:-13]
    found = resample(samples, old, new)
    assert len(found) == resampled(len(samples), old, new) == -(-len(samples) * new // old)
    wanted = 0.5 * np.sin(2 * np.pi * 440 * np.arange(len(found)) / new)
    inside = slice(new // 50, -new // 50)
    assert np.abs(found - wanted)[inside].max() < 2e-3


def test_nothing_is_resampled_to_nothing() -> None:
    assert resample(np.zeros((2, 0), dtype=np.float32), 8000, 16000).shape == (2, 0)
    assert resample(np.ones(1, dtype=np.float32), 44100, 8000).shape == (1,)


def test_resampling_takes_away_what_the_lower_rate_cannot_hold() -> None:
    assert np.abs(resample(tone(0.5, 16000, 5000.0), 16000, 8000)[200:-200]).max() < 1e-3


@pytest.mark.parametrize("count", [1, 3, 1000])
@pytest.mark.parametrize(("old", "new"), [(44100, 8000), (8000, 48000), (8000, 8000)])
def test_a_stream_is_resampled_as_the_whole(old: int, new: int, count: int) -> None:
    samples = np.random.default_rng(1).standard_normal((2, 5 * count)).astype(np.float32)
    stream = Resampler(old, new, channels=2)
    pieces = [stream.push(samples[:, i * count : (i + 1) * count], last=i == 4) for i in range(5)]
    whole = resample(samples, old, new)
    together = np.concatenate(pieces, axis=1)
    assert together.shape == whole.shape
    assert np.abs(together - whole).max() < 1e-5


@pytest.mark.parametrize("rate", [8000, 16000, 44100, 11025, 6000])
def test_a_stretch_of_a_long_file_is_that_of_the_whole(tmp_path: Path, rate: int) -> None:
    samples = np.random.default_rng(2).standard_normal(3 * rate + 17).astype(np.float32) * 0.1
    path = write(tmp_path / "a.wav", samples, rate)
    whole, stretches = Sounds(8000), Sounds(8000, whole=0.1)
    total = whole.length(len(samples), rate)
    every = whole.read(path, len(samples), rate)
    assert len(every) == total
    for start, count in [(0, 100), (1, 7), (5000, 8000), (total - 50, 50), (total - 10, 30), (0, total)]:
        found = stretches.read(path, len(samples), rate, start, count)
        assert len(found) == count
        wanted = whole.read(path, len(samples), rate, start, count)
        assert np.abs(found - wanted).max() < 2e-3, (start, count)


def test_the_memory_of_sounds_has_a_limit(tmp_path: Path) -> None:
    sounds = Sounds(8000, memory=3 * 32000)
    for number in range(6):
        path = write(tmp_path / f"{number}.wav", tone(1, 8000), 8000)
        sounds.read(path, 8000, 8000)
    assert len(sounds._kept) == 3
    assert sounds._bytes <= sounds.memory
    write(path, tone(0.5, 8000), 8000)
    sounds._kept.clear()
    with pytest.raises(UserError, match="has changed"):
        sounds.read(path, 8000, 8000)


def test_level() -> None:
    assert audio.rms(tone(1, 8000)) == pytest.approx(0.5 / np.sqrt(2), rel=1e-3)
    assert audio.rms(np.zeros(0)) == 0


def test_the_spectrogram_is_torchaudios() -> None:
    tensors = load_file(f"{GOLDEN}.safetensors")
    for case in json.loads(GOLDEN.with_suffix(".json").read_text(encoding="utf-8"))["spectrogram"]["cases"]:
        window, hop = map(int, case.split("_"))
        found = spectrogram(tensors["spectrogram/input"], window, hop, own=True)
        assert (found[..., ::3] - tensors[f"spectrogram/{case}"]).abs().max() < 1e-5


def test_both_sides_give_the_same_spectrogram() -> None:
    samples = torch.randn(2, 3, 1000, generator=torch.Generator().manual_seed(0))
    own = spectrogram(samples, 128, 32, own=True)
    assert own.shape == (2, 3, 65, 32)
    if torchaudio() is None:
        with pytest.raises(ImportError):
            spectrogram(samples, 128, 32, own=False)
        assert torch.equal(spectrogram(samples, 128, 32), own)
        pytest.skip("torchaudio cannot be imported here; its recorded figures are compared in another test")
    assert (own - spectrogram(samples, 128, 32, own=False)).abs().max() < 1e-6


@pytest.mark.data
def test_the_edge_cases() -> None:
    folder = Path(os.environ.get("ATTN_DATA", "data")) / "speech" / "esc_edge"
    if not folder.is_dir():
        pytest.skip("esc_edge is not under ATTN_DATA")
    for name, text in {
        "zero_samples": "holds no samples",
        "truncated": "cut short: it holds 2000 of the 8000",
        "corrupt_header": "cannot be read as a sound file",
    }.items():
        with pytest.raises(UserError, match=text):
            read(folder / f"{name}.wav")
    stereo, rate = read(folder / "stereo_44100.wav", mono=False)
    assert stereo.shape == (2, 22050)
    assert rate == 44100
    assert np.abs(stereo).max(axis=1).tolist() == pytest.approx([0.5, 0.25], abs=1e-3)
    silent, _ = read(folder / "silent.wav")
    assert not silent.any()


def test_a_torchaudio_that_cannot_be_loaded_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "torchaudio").mkdir()
    (tmp_path / "torchaudio" / "__init__.py").write_text("raise OSError('Could not load this library')")
    for name in [name for name in sys.modules if name.partition(".")[0] == "torchaudio"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.syspath_prepend(str(tmp_path))
    torchaudio.cache_clear()
    try:
        assert torchaudio() is None
        assert spectrogram(torch.ones(3), 16, 4).shape == (9, 1)
    finally:
        torchaudio.cache_clear()
