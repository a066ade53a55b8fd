"""Simulated rooms against the definition, another library, and physics."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import load_file

from attn_speech.data.rooms import SOUND, draw_room, impulse_response, in_room, reflection_for

GOLDEN = Path(__file__).parents[1] / "golden" / "speech_audio"
SIZE, SOURCE, MICROPHONE = (4.1, 3.3, 2.7), (1.1, 2.2, 1.3), (2.9, 0.8, 1.6)


def by_definition(reflection: float, rate: int, seconds: float) -> np.ndarray:
    """Allen and Berkley's sum, image by image, each pulse a Hann-windowed sinc of 80 samples at its exact delay."""
    count = round(seconds * rate)
    response = np.zeros(count)
    t = np.arange(count)
    reach = range(-12, 13)
    for nx, ny, nz in itertools.product(reach, repeat=3):
        for px, py, pz in itertools.product((0, 1), repeat=3):
            steps = [
                (1 - 2 * p) * s + 2 * n * size - m
                for p, n, s, m, size in zip((px, py, pz), (nx, ny, nz), SOURCE, MICROPHONE, SIZE)
            ]
            distance = float(np.sqrt(np.sum(np.square(steps))))
            delay = distance / SOUND * rate
            if delay >= count - 1:
                continue
            walls = sum(abs(n - p) + abs(n) for n, p in zip((nx, ny, nz), (px, py, pz)))
            away = t - delay
            window = np.where(np.abs(away) < 40, 0.5 + 0.5 * np.cos(np.pi * away / 40), 0)
            response += reflection**walls / distance * np.sinc(away) * window
    return response


@pytest.mark.parametrize("reflection", [0.3, 0.8])
def test_a_room_is_the_sum_of_its_images(reflection: float) -> None:
    found = impulse_response(SIZE, SOURCE, MICROPHONE, 8000, reflection=reflection, seconds=0.05)
    wanted = by_definition(reflection, 8000, 0.05)
    assert np.abs(found - wanted)[:-41].max() < 2e-3 * wanted.max()


def test_rooms_agree_with_another_library() -> None:
    tensors, facts = (
        load_file(f"{GOLDEN}.safetensors"),
        json.loads(GOLDEN.with_suffix(".json").read_text(encoding="utf-8"))["room"],
    )
    for name, reflection in facts["reflection"].items():
        wanted = tensors[f"room/{name}"].numpy()
        found = impulse_response(
            facts["size"], facts["source"], facts["microphone"], 8000, reflection=reflection, seconds=0.25
        )
        assert np.abs(found[: len(wanted)] - wanted).max() < 2e-3 * wanted.max()


def test_without_reflection_only_the_direct_pulse_is_heard() -> None:
    found = impulse_response((9, 9, 9), (4, 4, 4), (4, 4, 4 + SOUND / 8000 * 50), 8000, reflection=0, seconds=0.02)
    assert found[50] == pytest.approx(1 / (SOUND / 8000 * 50), rel=1e-6)
    assert np.abs(np.delete(found, 50)).max() < 1e-6


@pytest.mark.parametrize("t60", [0.2, 0.4])
def test_sound_dies_away_in_the_time_asked_for(t60: float) -> None:
    size = (5.3, 4.7, 3.1)
    response = impulse_response(
        size, (1.3, 3.1, 1.4), (4.0, 1.2, 1.7), 8000, reflection=reflection_for(size, t60), seconds=t60
    )
    left = 10 * np.log10(np.cumsum(response[::-1] ** 2)[::-1] / np.sum(response**2))
    early, late = np.argmax(left < -5), np.argmax(left < -25)
    measured = 60 / 20 * (late - early) / 8000
    # Eyring's formula is for diffuse sound; image sources in a box die away somewhat more slowly.
    assert 0.8 * t60 < measured < 1.6 * t60


def test_voices_keep_their_place_and_level_in_a_room() -> None:
    responses = draw_room(np.random.default_rng(3), 3, 8000)
    assert len(responses) == 3
    for response in responses:
        assert response[0] == pytest.approx(1, abs=0.45)  # the direct pulse lies up to half a sample off
        assert np.argmax(np.abs(response)) < 3
    click = np.zeros(400, dtype=np.float32)
    click[100] = 1
    heard = in_room(click, responses[0])
    assert heard.shape == click.shape
    assert heard.dtype == np.float32
    assert np.abs(heard[:100]).max() < 1e-6
    assert np.argmax(np.abs(heard)) in (100, 101)


def test_rooms_follow_from_their_seed() -> None:
    first, again, other = (draw_room(np.random.default_rng(seed), 2, 8000) for seed in (5, 5, 6))
    assert all(np.array_equal(a, b) for a, b in zip(first, again))
    assert len(first[0]) != len(other[0]) or not np.array_equal(first[0], other[0])
