"""Chunks: aligned, joined without a seam, voices followed, exact length, flat memory.

The networks here separate perfectly what they can tell apart, positive samples from negative ones, and then spoil it as
real ones do: the order of voices changes from chunk to chunk, ends of chunks are wrong, levels drift.
"""

from __future__ import annotations

import tracemalloc
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from attn_speech.models.base import Separator
from attn_speech.separate import agreement, crossfade, separate

STRIDE = 8


class BySign(Separator):
    """Positive samples are one voice and negative ones the other; with 3 voices, large ones are the third."""

    def __init__(self, speakers: int = 2, *, order: int = 0, wrong: int = 0, drift: float = 0.0) -> None:
        nn.Module.__init__(self)
        self.config, self.speakers, self.stride, self.reach = None, speakers, STRIDE, None
        self.weight = nn.Parameter(torch.zeros(1))
        self.random, self.shuffled = np.random.default_rng(order), bool(order)
        self.wrong, self.drift, self.seen = wrong, drift, list[Tensor]()

    def forward(self, mixture: Tensor, lengths: Tensor | None = None) -> Tensor:
        self.seen.append(mixture[0])
        large = mixture.abs() > 2 if self.speakers == 3 else torch.zeros_like(mixture, dtype=torch.bool)
        voices = [torch.where((mixture > 0) & ~large, mixture, 0.0), torch.where((mixture < 0) & ~large, mixture, 0.0)]
        found = torch.stack([*voices, torch.where(large, mixture, 0.0)][: self.speakers], dim=1)
        if self.wrong:
            found[..., : self.wrong] = found[..., -self.wrong :] = 9.0
        found = found + self.drift * len(self.seen) * torch.ones(())
        return found[:, self.random.permutation(self.speakers).tolist()] if self.shuffled else found


def pieces(samples: np.ndarray, sizes: int = 700) -> Iterator[np.ndarray]:
    for first in range(0, len(samples), sizes):
        yield samples[first : first + sizes]


def run(network: Separator, samples: np.ndarray, *, chunk: int, overlap: int, size: int = 700) -> np.ndarray:
    parts = list(separate(network, pieces(samples, size), chunk=chunk, overlap=overlap))
    assert np.array_equal(np.concatenate([mixture for mixture, _ in parts]), samples)
    return np.concatenate([voices for _, voices in parts], axis=1)


def noise(samples: int) -> np.ndarray:
    return np.random.default_rng(samples).normal(size=samples).astype(np.float32)


@pytest.mark.parametrize("voices", [2, 3])
@pytest.mark.parametrize("samples", [1, 3, 399, 400, 401, 520, 800, 801, 1111, 5003])
def test_voices_are_followed_and_the_length_is_exact(samples: int, voices: int) -> None:
    x = noise(samples)
    network = BySign(voices, order=5)
    found = run(network, x, chunk=400, overlap=120)
    assert found.shape == (voices, samples)
    # Whatever the order of the first chunk, it holds to the end: each output is one voice everywhere.
    true = BySign(voices)(torch.from_numpy(x)[None])[0].numpy()
    for voice in true:
        assert any(np.allclose(voice, own, atol=1e-6) for own in found)


@pytest.mark.parametrize("size", [1, 37, 400, 10_000])
def test_pieces_of_any_size_give_the_same(size: int) -> None:
    x = noise(3001)
    assert np.array_equal(run(BySign(), x, chunk=400, overlap=120, size=size), run(BySign(), x, chunk=400, overlap=120))


def test_chunks_start_on_frames_and_are_as_long_as_each_other() -> None:
    network = BySign()
    run(network, np.arange(1, 3335, dtype=np.float32), chunk=403, overlap=101)
    starts = [int(one[0]) - 1 for one in network.seen]
    assert all(start % STRIDE == 0 for start in starts)
    assert starts[0] == 0
    lengths = [len(one) for one in network.seen]
    assert set(lengths[:-1]) == {400}
    assert 400 - STRIDE < lengths[-1] <= 400
    assert starts[-1] + lengths[-1] == 3334
    # One chunk, and as long as the recording, where that is short or where chunks are switched off.
    for chunk, samples in ((400, 390), (0, 5000)):
        network = BySign()
        run(network, noise(samples), chunk=chunk, overlap=100)
        assert [len(one) for one in network.seen] == [samples]


def test_ends_of_chunks_do_not_show() -> None:
    x = noise(4000)
    found = run(BySign(wrong=30), x, chunk=400, overlap=120)
    true = BySign()(torch.from_numpy(x)[None])[0].numpy()
    assert np.allclose(found[:, 30:-30], true[:, 30:-30], atol=1e-6)


def test_no_click_where_chunks_differ() -> None:
    """Each chunk is off by another constant; the step between them is spread over the fade."""
    x = np.zeros(4000, np.float32)
    found = run(BySign(drift=1.0), x, chunk=400, overlap=120)
    assert found.max() > 5
    assert np.abs(np.diff(found, axis=1)).max() <= np.pi / 120 + 1e-4


def test_voices_are_known_again_after_a_long_silence() -> None:
    """Nobody speaks in all that chunks share; one voice is smooth, the other is spikes."""
    random = np.random.default_rng(0)
    smooth = np.repeat(random.uniform(0.5, 1, 40), 50)
    spikes = np.where(np.arange(2000) % 2, -random.uniform(0.5, 1, 2000), 0.0)
    speech = np.where(np.arange(2000) // 100 % 2, smooth, spikes)
    x = np.concatenate([np.concatenate([speech, np.zeros(1000)]) for _ in range(12)]).astype(np.float32)
    found = run(BySign(order=3), x, chunk=2000, overlap=400)
    true = BySign()(torch.from_numpy(x)[None])[0].numpy()
    assert np.allclose(found, true, atol=1e-6) or np.allclose(found[::-1], true, atol=1e-6)


def test_memory_is_flat_in_length() -> None:
    def peak(samples: int) -> int:
        def stream() -> Iterator[np.ndarray]:
            for _ in range(samples // 1000):
                yield np.ones(1000, np.float32)

        tracemalloc.start()
        try:
            network = BySign()
            for _ in separate(network, stream(), chunk=4000, overlap=1000):
                network.seen.clear()
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    assert peak(2_000_000) < 1.5 * peak(50_000)


def test_crossfade_and_agreement() -> None:
    weights = crossfade(100)
    assert np.allclose(weights + weights[::-1], 1)
    assert not weights[:25].any()
    assert (weights[75:] == 1).all()
    old = torch.randn(3, 50)
    for order in ((0, 1, 2), (2, 0, 1), (1, 0, 2)):
        new = torch.empty(3, 50)
        new[list(order)] = old + 0.3 * torch.randn(3, 50)
        assert agreement(old, new) == order
    assert agreement(torch.zeros(2, 10), torch.randn(2, 10)) == (0, 1)
