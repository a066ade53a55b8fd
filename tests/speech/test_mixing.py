"""Mixtures made on the way and read from files: levels, lengths, seeds, speakers."""

from __future__ import annotations

import dataclasses
import pickle
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from attn_shared.errors import UserError
from attn_speech.audio import Sounds, info, rms, write
from attn_speech.data.bundle import load_bundle
from attn_speech.data.corpus import Utterance
from attn_speech.data.mixing import FileMixtures, MadeMixtures, Mixtures, active_level, mix
from attn_speech.data.noise import find_noise
from attn_speech.data.options import SpeechDataConfig


def voice(speaker: int, take: int, seconds: float, rate: int) -> np.ndarray:
    """A tone of the speaker's own with a pause in it."""
    t = np.arange(round(seconds * rate)) / rate
    samples = 0.3 * np.sin(2 * np.pi * (300 + 100 * speaker + 10 * take) * t)
    samples[len(t) // 3 : len(t) // 2] = 0
    return samples.astype(np.float32)


@pytest.fixture(scope="module")
def voices(tmp_path_factory: pytest.TempPathFactory) -> list[Utterance]:
    """5 speakers with 3 takes of 1 to 2.4 s each, some at 16 kHz."""
    folder, found = tmp_path_factory.mktemp("voices"), []
    for speaker in range(5):
        for take in range(3):
            rate = 16000 if speaker == 4 else 8000
            path = folder / f"{speaker}-{take}.wav"
            write(path, voice(speaker, take, 1 + 0.1 * (3 * speaker + take), rate), rate)
            head = info(path)
            found.append(Utterance(path=path, speaker=f"s{speaker}", sex="", frames=head.frames, rate=rate))
    return found


def made(voices: list[Utterance], part: str = "train", **options: object) -> MadeMixtures:
    args = dataclasses.replace(SpeechDataConfig(seconds=0.8), **options)  # type: ignore[arg-type]
    noise = find_noise(Path(args.noise), 0)[0][part] if args.noise else None  # type: ignore[index]
    return MadeMixtures(voices, args, Sounds(args.rate), part, noise)  # type: ignore[arg-type]


def level(samples: torch.Tensor | np.ndarray, rate: int = 8000) -> float:
    return float(20 * np.log10(active_level(np.asarray(samples), rate)))


def batches(data: Mixtures) -> list[torch.Tensor]:
    return [data[index]["mixture"] for index in range(len(data))]


def test_a_batch(voices: list[Utterance]) -> None:
    data = made(voices, "test", speakers=3, test_mixtures=7)
    batch = data.__getitems__([4, 0, 6])
    lengths = batch["lengths"]
    assert batch["mixture"].shape == (3, int(lengths.max()))
    assert batch["sources"].shape == (3, 3, int(lengths.max()))
    assert batch["mixture"].dtype == batch["sources"].dtype == torch.float32
    assert lengths.dtype == batch["index"].dtype == torch.int64
    assert batch["index"].tolist() == [4, 0, 6]
    assert len(set(lengths.tolist())) > 1
    for row, length in enumerate(lengths):
        assert not batch["mixture"][row, length:].any()
        assert not batch["sources"][row, :, length:].any()
        alone = data[[4, 0, 6][row]]
        assert torch.equal(alone["mixture"], batch["mixture"][row, :length])
        assert torch.equal(alone["sources"], batch["sources"][row, :, :length])
    assert (batch["sources"].sum(1) - batch["mixture"]).abs().max() < 1e-6


def test_every_voice_is_of_another_speaker_and_pieces_tell_whose(voices: list[Utterance]) -> None:
    data = made(voices, speakers=3, mixtures=60)
    for epoch in range(2):
        data.set_epoch(1, epoch)
        for index in range(len(data)):
            piece = data.piece(index)
            assert len(set(piece.speakers)) == 3
            # Each speaker's tone is where the piece says.
            for name, source in zip(piece.speakers, data[index]["sources"]):
                peak = float(torch.fft.rfft(source).abs().argmax()) * 8000 / len(source)
                assert abs(peak - (300 + 100 * int(name[1:]) + 10)) < 25


@pytest.mark.parametrize("part", ["val", "test"])
def test_fixed_mixtures_are_fixed(voices: list[Utterance], part: str) -> None:
    options = {"val_mixtures": 8, "test_mixtures": 8}
    data, again = made(voices, part, **options), made(voices, part, **options)
    again.set_epoch(3, 4)
    assert all(torch.equal(a, b) for a, b in zip(batches(data), batches(again)))
    other = made(voices, part, shuffle=1, **options)
    assert not all(a.shape == b.shape and torch.equal(a, b) for a, b in zip(batches(data), batches(other)))
    # In whatever options of the training they are used.
    changed = made(voices, part, seconds=0.3, speed=0.1, reverb=1.0, mixtures=5, **options)
    assert all(torch.equal(a, b) for a, b in zip(batches(data), batches(changed)))
    assert {data.piece(index).speakers[0] for index in range(5)} == {f"s{n}" for n in range(5)}


@pytest.mark.parametrize("part", ["val", "test"])
def test_fixed_mixtures_end_where_asked(voices: list[Utterance], part: str) -> None:
    options = {"val_mixtures": 8, "test_mixtures": 8}
    whole, cut = made(voices, part, **options), made(voices, part, longest=0.7, **options)
    assert {len(one) for one in batches(cut)} == {5600}
    assert {cut.piece(index).name for index in range(8)} == {whole.piece(index).name for index in range(8)}


def test_training_mixtures_follow_from_seed_epoch_and_index(voices: list[Utterance]) -> None:
    data, again = (made(voices, speed=0.1, reverb=0.5, mixtures=6) for _ in range(2))
    seen = []
    for seed, epoch in [(0, 0), (0, 1), (1, 0)]:
        data.set_epoch(seed, epoch)
        again.set_epoch(seed, epoch)
        seen.append(batches(data))
        backwards = [again[index]["mixture"] for index in reversed(range(6))][::-1]
        assert all(torch.equal(a, b) for a, b in zip(seen[-1], backwards))
    for a, b in pairwise([*seen, seen[0]]):
        assert not any(x.shape == y.shape and torch.equal(x, y) for x, y in zip(a, b))


def test_workers_give_the_same(voices: list[Utterance]) -> None:
    data = made(voices, speed=0.05)
    data.set_epoch(2, 1)
    alone = [data.__getitems__([i, i + 1])["mixture"] for i in range(0, 8, 2)]
    order = [[i, i + 1] for i in range(0, 8, 2)]
    loader = DataLoader(data, batch_sampler=order, num_workers=2, collate_fn=_same)
    assert all(torch.equal(a, b["mixture"]) for a, b in zip(alone, loader))
    copy = pickle.loads(pickle.dumps(data))
    assert len(pickle.dumps(data)) < 20_000
    assert torch.equal(copy.__getitems__([0, 1])["mixture"], alone[0])


def _same(batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return batch


def test_every_utterance_comes_first_in_turn(voices: list[Utterance]) -> None:
    data = made(voices, mixtures=5)
    first = []
    for epoch in range(3):
        data.set_epoch(0, epoch)
        first += [data.piece(index).name.partition("+")[0] for index in range(5)]
    assert sorted(first) == sorted(one.path.stem for one in voices)
    assert len(made(voices)) == len(voices)


@pytest.mark.parametrize("mode", ["min", "max"])
def test_min_and_max_mode(voices: list[Utterance], mode: str) -> None:
    lengths = {one.path.stem: one.frames * 8000 // one.rate for one in voices}
    data = made(voices, "test", mode=mode, test_mixtures=10)
    for index in range(10):
        one = data[index]
        parts = [lengths[name] for name in data.piece(index).name.split("+")]
        assert int(one["lengths"]) == (min(parts) if mode == "min" else max(parts))
        for source, length in zip(one["sources"], parts):
            assert source[length - 10 : length].any() or length > int(one["lengths"])
            assert not source[length:].any()
    training = made(voices, mode=mode, seconds=1.2)
    training.set_epoch(0, 0)
    assert max(int(training[i]["lengths"]) for i in range(15)) == 9600
    whole = made(voices, mode=mode, seconds=0)
    whole.set_epoch(0, 0)
    assert max(int(whole[i]["lengths"]) for i in range(15)) > 9600


def test_levels_lie_in_the_range(voices: list[Utterance]) -> None:
    data = made(voices, "test", low_db=-5.0, high_db=3.0, test_mixtures=60)
    found = []
    for index in range(60):
        first, second = (level(source) for source in data[index]["sources"])
        found.append(second - first)
    assert -5.05 < min(found) < -3.5
    assert 1.5 < max(found) < 3.05


def test_mixing_sets_levels_and_keeps_peaks_below_full_scale() -> None:
    random = np.random.default_rng(0)
    sources = random.standard_normal((2, 8000)).astype(np.float32)
    sources[1, 4000:] = 0  # a pause does not count
    mixture, voices = mix(sources, np.array([0.0, -6.0]), 8000)
    assert level(voices[0]) == pytest.approx(20 * np.log10(0.05), abs=0.01)
    assert level(voices[1]) == pytest.approx(20 * np.log10(0.05) - 6, abs=0.2)
    assert np.array_equal(mixture, voices.sum(axis=0))
    spiky = np.zeros((2, 8000), dtype=np.float32)
    spiky[0, 10], spiky[1] = 1.0, sources[1] * 1e-3
    mixture, voices = mix(spiky, np.zeros(2), 48000)
    assert np.abs(mixture).max() == pytest.approx(0.9, rel=1e-5)
    assert np.abs(mixture - voices.sum(axis=0)).max() < 1e-6
    mixture, voices = mix(np.zeros((2, 100), dtype=np.float32), np.zeros(2), 8000)
    assert not mixture.any()
    noise = random.standard_normal(8000).astype(np.float32)
    mixture, voices = mix(sources, np.zeros(2), 8000, (noise, 7.0))
    ratio = 20 * np.log10(rms(voices.sum(axis=0)) / rms(mixture - voices.sum(axis=0)))
    assert ratio == pytest.approx(7, abs=1e-3)


def test_speed_changes_pitch_within_its_range(voices: list[Utterance]) -> None:
    data = made(voices, speed=0.1, seconds=0.9, mixtures=40)
    data.set_epoch(0, 0)
    ratios = []
    for index in range(40):
        name = data.piece(index).name.partition("+")[0]
        speaker, take = map(int, name.split("-"))
        source = data[index]["sources"][0]
        padded = torch.fft.rfft(source * torch.hann_window(len(source)), 1 << 16).abs()
        ratios.append(float(padded.argmax()) * 8000 / (1 << 16) / (300 + 100 * speaker + 10 * take))
    # The pause shifts the peak of a spectrum by less than a hundredth.
    assert 0.885 < min(ratios) < 0.95
    assert 1.05 < max(ratios) < 1.115


def test_a_room_makes_voices_longer_and_leaves_the_sum(voices: list[Utterance]) -> None:
    dry, wet = made(voices, reverb=0.0), made(voices, reverb=1.0)
    one, other = dry[0], wet[0]
    assert one["mixture"].shape == other["mixture"].shape
    assert (other["sources"].sum(0) - other["mixture"]).abs().max() < 1e-6
    assert not torch.allclose(one["sources"], other["sources"], atol=1e-3)
    half = made(voices, reverb=0.5, mixtures=30)
    plain = made(voices, reverb=1e-12, mixtures=30)
    same = sum(torch.equal(half[i]["mixture"], plain[i]["mixture"]) for i in range(30))
    assert 6 <= same <= 24


def test_noise_comes_from_the_parts_own_recordings(voices: list[Utterance], tmp_path: Path) -> None:
    hums = {"train": 3000.0, "cv": 3300.0, "tt": 3600.0}
    for part, hertz in hums.items():
        for number in range(2):
            wave = 0.1 * np.sin(2 * np.pi * hertz * np.arange(4000 * (1 + 3 * number)) / 8000)
            write(tmp_path / part / f"{number}.wav", wave.astype(np.float32), 8000)
    for part, hertz in zip(("train", "val", "test"), hums.values()):
        data = made(voices, part, noise=str(tmp_path), noise_low_db=3.0, noise_high_db=6.0)
        for index in range(6):
            one = data[index]
            rest = one["mixture"] - one["sources"].sum(0)
            peak = float(torch.fft.rfft(rest).abs().argmax()) * 8000 / len(rest)
            assert abs(peak - hertz) < 20
            ratio = 20 * np.log10(rms(one["sources"].sum(0).numpy()) / rms(rest.numpy()))
            assert 2.9 < ratio < 6.1


def test_noise_without_parts_is_shared_out(tmp_path: Path) -> None:
    for number in range(20):
        write(tmp_path / f"{number:02d}.wav", np.full(800, 0.1, dtype=np.float32), 8000)
    parts, notes = find_noise(tmp_path, 0)
    assert [len(parts[part].files) for part in ("train", "val", "test")] == [16, 2, 2]
    assert len({file for one in parts.values() for file in one.files}) == 20
    assert notes == []
    for number in range(15):
        (tmp_path / f"{number:02d}.wav").unlink()
    parts, notes = find_noise(tmp_path, 0)
    assert len(parts["test"].files) == 5
    assert "share" in notes[0]
    with pytest.raises(UserError, match="no folder of noise"):
        find_noise(tmp_path / "missing", 0)


def test_mixtures_of_files_are_cut_in_training_only(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    for part in ("tr", "tt"):
        for folder in ("s1", "s2"):
            samples = random.uniform(-0.2, 0.2, 16000).astype(np.float32)
            write(tmp_path / part / folder / "a.wav", samples, 16000)
    bundle = load_bundle(str(tmp_path), SpeechDataConfig(seconds=0.5))
    assert isinstance(bundle.train, FileMixtures)
    assert isinstance(bundle.test, FileMixtures)
    whole = bundle.train.sounds.read(bundle.train.mixtures[0].sources[0], 16000, 16000)
    starts = set()
    for epoch in range(4):
        bundle.train.set_epoch(0, epoch)
        one = bundle.train[0]
        assert int(one["lengths"]) == 4000
        start = int(np.argmax(np.correlate(whole, one["sources"][0].numpy(), "valid")))
        assert np.array_equal(whole[start : start + 4000], one["sources"][0].numpy())
        assert torch.equal(one["mixture"], one["sources"].sum(0))
        starts.add(start)
    assert len(starts) > 1
    assert int(bundle.test[0]["lengths"]) == 8000
    assert bundle.state == {"rate": 8000, "speakers": 2, "data": tmp_path.name}
    assert "1 whole mixtures" in bundle.protocol


def test_a_trained_models_rate_and_voices_are_kept() -> None:
    bundle = load_bundle("synthetic", SpeechDataConfig(rate=16000, val_mixtures=3), state={"rate": 8000, "speakers": 3})
    assert bundle.test is not None
    assert bundle.test[0]["sources"].shape[0] == 3
    assert int(bundle.test[0]["lengths"]) <= 24000
    assert bundle.val is not None
    assert len(bundle.val) == 3  # type: ignore[arg-type]
    assert "3 voices at 8000 Hz, min mode" in bundle.protocol
    assert "8 female" not in bundle.facts["train"]
    assert "28 speakers (14 female, 14 male)" in bundle.facts["train"]


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"speakers": 4}, "speakers is 2 or 3, got 4"),
        ({"rate": 0}, "rate is a sampling rate"),
        ({"seconds": 0.01}, "seconds is 0"),
        ({"longest": 0.0}, "longest is 0.1 to 3600 seconds, got 0"),
        ({"low_db": 3.0}, "low_db lies above high_db"),
        ({"speed": 0.9}, "speed is 0 to 0.5"),
        ({"val": 1.0}, "val is a share"),
        ({"reverb": float("nan")}, "reverb is a share"),
        ({"noise": "/nowhere/at/all"}, "no folder of noise"),
    ],
)
def test_options_that_mean_nothing_are_refused(options: dict[str, object], text: str) -> None:
    with pytest.raises(UserError, match=text):
        load_bundle("synthetic", dataclasses.replace(SpeechDataConfig(), **options))  # type: ignore[arg-type]
