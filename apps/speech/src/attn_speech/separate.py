"""Separation of recordings of any length: overlapping chunks, each voice followed from one to the next.

A chunk starts on a frame of the encoder and shares its first part with the chunk before. There the voices are compared
with those already written, and the order is taken under which they agree best (the largest sum of inner products, all
orders being tried). Then the old fades into the new over the middle half of what is shared, where both had context.

Only a few chunks are in memory at any time.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np
import torch
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
    for piece in pieces:
        held = np.concatenate([held, piece])
        while chunk and len(held) > chunk:
            voices = _joined(_run(network, held[:chunk]), tail, fade)
            yield held[:hop], voices[:, :hop].numpy()
            past, held, tail = held[:hop], held[hop:], voices[:, hop:]
    if not len(held):
        return
    # The last chunk reaches back until it is as long as the others, for it would be short of context otherwise.
    back = (chunk - len(held)) // network.stride * network.stride if len(past) else 0
    voices = _run(network, np.concatenate([past[len(past) - back :], held]))[:, back:]
    yield held, _joined(voices, tail, fade).numpy()


def crossfade(size: int) -> np.ndarray:
    """(size,) weights of the new: 0 in the first quarter, 1 in the last, half a cosine between."""
    place = (np.arange(size) + 0.5) / size
    return (0.5 - 0.5 * np.cos(np.pi * np.clip(2 * place - 0.5, 0, 1))).astype(np.float32)


def agreement(old: Tensor, new: Tensor) -> tuple[int, ...]:
    """For each of the voices `old` (C, n) which of `new` it is; the order stays where nothing tells."""
    products = (old.double() @ new.double().T).tolist()
    return max(permutations(len(old)), key=lambda order: sum(products[i][j] for i, j in enumerate(order)))


def _joined(voices: Tensor, tail: Tensor | None, fade: Tensor) -> Tensor:
    """(C, n) voices of a chunk in the order of the chunk before, and faded in over its tail."""
    if tail is None:
        return voices
    size = tail.shape[1]
    voices = voices[list(agreement(tail, voices[:, :size]))]
    start = torch.lerp(tail, voices[:, :size], fade)
    return torch.cat([start, voices[:, size:]], dim=1)


@torch.no_grad()
def _run(network: Separator, samples: np.ndarray) -> Tensor:
    """(C, n) float32 voices of (n,) samples, on the CPU."""
    weight = next(network.parameters())
    mixture = torch.from_numpy(np.ascontiguousarray(samples)).to(weight.device, weight.dtype)
    found: Tensor = network(mixture[None])[0]
    return found.float().cpu()
