"""Separation of recordings of any length: overlapping chunks, each voice followed from one to the next.

A chunk starts on a frame of the encoder and shares its first part with the chunk before. There the voices are compared
with those already written, and the order is taken under which they agree best (the largest sum of inner products, all
orders being tried). Where all were silent in what is shared, their spectra since the beginning are compared instead.
Then the old fades into the new over the middle half of what is shared, where both had context.

Only a few chunks are in memory at any time.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from attn_speech.metrics import permutations
from attn_speech.models.base import Separator


def separate(
    network: Separator, pieces: Iterable[np.ndarray], *, chunk: int, overlap: int
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """A mixture in pieces -> the same mixture and its voices, in other pieces.

    Args:
        network: in evaluation mode.
        pieces: stretches of the mixture, (any,) float32, one behind the other.
        chunk: samples separated at once; 0 = the whole mixture.
        overlap: samples that a chunk shares with the one before, at most half of it; both are rounded to frames.

    Yields:
        (n,) mixture and (C, n) voices, together exactly as long as what came in.
    """
    if not chunk:
        pieces = [np.concatenate([np.zeros(0, np.float32), *pieces])]
    else:
        overlap = max(1, round(min(overlap, chunk / 2) / network.stride)) * network.stride
        chunk = max(2 * overlap, round(chunk / network.stride) * network.stride)
    hop = chunk - overlap
    fade = torch.from_numpy(crossfade(overlap))
    held = np.zeros(0, np.float32)  # the input from the start of the chunk to come
    past = np.zeros(0, np.float32)  # the `hop` samples before it
    tail: Tensor | None = None  # (C, overlap) voices of the chunk before, not yet given
    heard = Heard(network.speakers)
    for piece in pieces:
        held = np.concatenate([held, piece])
        while chunk and len(held) > chunk:
            voices = _joined(_run(network, held[:chunk]), tail, fade, heard)
            heard.add(voices[:, :hop])
            yield held[:hop], voices[:, :hop].numpy()
            past, held, tail = held[:hop], held[hop:], voices[:, hop:]
    if not len(held):
        return
    # The last chunk reaches back until it is as long as the others, for it would be short of context otherwise.
    back = (chunk - len(held)) // network.stride * network.stride if len(past) else 0
    voices = _run(network, np.concatenate([past[len(past) - back :], held]))[:, back:]
    yield held, _joined(voices, tail, fade, heard).numpy()


def crossfade(size: int) -> np.ndarray:
    """(size,) weights of the new: 0 in the first quarter, 1 in the last, half a cosine between."""
    place = (np.arange(size) + 0.5) / size
    return (0.5 - 0.5 * np.cos(np.pi * np.clip(2 * place - 0.5, 0, 1))).astype(np.float32)


def agreement(old: Tensor, new: Tensor) -> tuple[int, ...]:
    """For each of the voices `old` (C, n) which of `new` it is; the order stays where nothing tells."""
    products = (old.double() @ new.double().T).tolist()
    return max(permutations(len(old)), key=lambda order: sum(products[i][j] for i, j in enumerate(order)))


class Heard:
    """What the voices of a recording sounded like so far: their mean power spectra.

    Args:
        voices: C.
    """

    WINDOW = 256
    SILENT = 1e-4  # of the mean power so far

    def __init__(self, voices: int) -> None:
        self.power, self.energy, self.samples = torch.zeros(voices, self.WINDOW // 2 + 1), 0.0, 0

    def add(self, voices: Tensor) -> None:
        """(C, n) more of them."""
        self.power += spectra(voices)
        self.energy += float(voices.double().square().sum())
        self.samples += voices.shape[1]

    def silent(self, voices: Tensor) -> bool:
        """Whether (C, n) is so much quieter than the rest that it tells nothing."""
        return float(voices.double().square().mean(dim=1).sum()) * self.samples <= self.SILENT * self.energy

    def order(self, voices: Tensor) -> tuple[int, ...]:
        """Which of (C, n) each voice is, by the correlations of their spectra in decibels."""
        return agreement(_shape(self.power), _shape(spectra(voices)))


def spectra(voices: Tensor) -> Tensor:
    """(C, F) power spectra of (C, n), summed over windows side by side."""
    windows = F.pad(voices, (0, -voices.shape[1] % Heard.WINDOW)).unfold(1, Heard.WINDOW, Heard.WINDOW)
    return torch.fft.rfft(windows * torch.hann_window(Heard.WINDOW)).abs().square().sum(dim=1)


def _shape(power: Tensor) -> Tensor:
    """(C, F) power spectra in decibels, without their mean and at length 1."""
    level = torch.log10(power + 1e-6 * power.amax(dim=1, keepdim=True) + 1e-30)
    return F.normalize(level - level.mean(dim=1, keepdim=True))


def _joined(voices: Tensor, tail: Tensor | None, fade: Tensor, heard: Heard) -> Tensor:
    """(C, n) voices of a chunk in the order of the chunk before, and faded in over its tail."""
    if tail is None:
        return voices
    size = tail.shape[1]
    order = heard.order(voices) if heard.silent(tail) else agreement(tail, voices[:, :size])
    voices = voices[list(order)]
    start = torch.lerp(tail, voices[:, :size], fade)
    return torch.cat([start, voices[:, size:]], dim=1)


@torch.no_grad()
def _run(network: Separator, samples: np.ndarray) -> Tensor:
    """(C, n) float32 voices of (n,) samples, on the CPU."""
    weight = next(network.parameters())
    mixture = torch.from_numpy(np.ascontiguousarray(samples)).to(weight.device, weight.dtype)
    found: Tensor = network(mixture[None])[0]
    return found.float().cpu()
