"""Simulated rooms: the image method in a box (Allen and Berkley, 1979), and rooms drawn at random."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
from scipy.signal import fftconvolve

SOUND = 343.0  # m/s
_HALF = 40  # samples on either side of a reflection that its band-limited pulse covers
_FINE = 16


def impulse_response(
    size: Sequence[float] | np.ndarray,
    source: Sequence[float] | np.ndarray,
    microphone: Sequence[float] | np.ndarray,
    rate: int,
    *,
    reflection: float,
    seconds: float,
) -> np.ndarray:
    """What a microphone in a box-shaped room hears of a pulse.

    Every reflection is a pulse from a mirror image of the source: delayed by its distance over the speed of sound,
    weaker by 1/distance and by the walls it met, and band-limited (a windowed sinc at its exact delay).

    Args:
        size: metres along x, y, z.
        source, microphone: positions inside, metres.
        rate: sampling rate, Hz.
        reflection: pressure that a wall gives back, 0 to below 1.
        seconds: length; later reflections are left out.

    Returns:
        (round(seconds * rate),) float64; the direct pulse has a height of 1 / distance in metres.
    """
    count = round(seconds * rate)
    reach = seconds * SOUND
    # Along an axis the images lie at (1 - 2p)·s + 2·n·size, after |n - p| + |n| walls (p is 0 or 1).
    offsets, walls = [], []
    for length, s, m in zip(size, source, microphone):
        most = int(reach // (2 * length)) + 1
        n = np.arange(-most, most + 1)
        pairs = list(itertools.product((0, 1), n))
        p, n = (np.array(one) for one in zip(*pairs))
        offset = (1 - 2 * p) * s + 2 * n * length - m
        near = np.abs(offset) < reach
        offsets.append(offset[near])
        walls.append((np.abs(n - p) + np.abs(n))[near])
    squares = [o**2 for o in offsets]
    distance = np.sqrt(squares[0][:, None, None] + squares[1][:, None] + squares[2])
    met = walls[0][:, None, None] + walls[1][:, None] + walls[2]
    near = distance * rate / SOUND < count - 1
    distance, met = distance[near], met[near]
    # Beyond 100 dB below the direct pulse a reflection changes nothing that could be heard.
    gain = reflection ** met.astype(np.float64) / np.maximum(distance, 1e-2)
    loud = gain > 1e-5 * gain.max()
    delay, gain = distance[loud] * (rate / SOUND), gain[loud]

    # Between samples a pulse is shared out to the two nearest points of a grid _FINE times as fine.
    place = delay * _FINE
    left = np.floor(place).astype(np.int64)
    right = place - left
    fine = np.bincount(left, weights=gain * (1 - right), minlength=count * _FINE)
    fine += np.bincount(left + 1, weights=gain * right, minlength=count * _FINE)[: len(fine)]
    t = np.arange(-_HALF * _FINE, _HALF * _FINE + 1) / _FINE
    pulse = np.sinc(t) * (0.5 + 0.5 * np.cos(np.pi * t / _HALF))
    return fftconvolve(fine[: count * _FINE], pulse)[_HALF * _FINE :: _FINE][:count]


def reflection_for(size: Sequence[float] | np.ndarray, t60: float) -> float:
    """Reflection of the walls that makes sound die away by 60 dB in `t60` seconds (Eyring's formula), 0 to 0.99."""
    x, y, z = size
    surface = 2 * (x * y + y * z + x * z)
    absorption = 1 - np.exp(-24 * np.log(10) * x * y * z / (SOUND * surface * t60))
    return float(np.clip(np.sqrt(1 - absorption), 0, 0.99))


def draw_room(random: np.random.Generator, voices: int, rate: int) -> list[np.ndarray]:
    """Impulse responses of `voices` places in one random room, to one microphone.

    The room is 4 to 8 by 4 to 8 by 2.5 to 3.5 metres, its reverberation time 0.15 to 0.5 s; voices stand 0.7 m or more
    from the microphone and 0.4 m or more from the walls. Each response begins with its direct pulse and is scaled by
    it, so that a voice keeps its place in time and its level.
    """
    size = np.array([random.uniform(4, 8), random.uniform(4, 8), random.uniform(2.5, 3.5)])
    t60 = random.uniform(0.15, 0.5)
    reflection = reflection_for(size, t60)

    def place() -> np.ndarray:
        spot = 0.4 + random.random(3) * (size - 0.8)
        spot[2] = random.uniform(1.0, 2.0)
        return spot

    microphone, found = place(), []
    for _ in range(voices):
        source = place()
        while (distance := float(np.linalg.norm(source - microphone))) < 0.7:
            source = place()
        response = impulse_response(size, source, microphone, rate, reflection=reflection, seconds=t60)
        found.append(response[round(distance * rate / SOUND) :] * distance)
    return found


def in_room(voice: np.ndarray, response: np.ndarray) -> np.ndarray:
    """(T,) voice with its echoes, cut to (T,)."""
    return fftconvolve(voice, response)[: len(voice)].astype(np.float32)
