"""Bases as numbers, the same for every data set and model. Imports torch where tensors are made only."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from torch import Tensor

BASES = "ACGT"
A, C, G, T, N, MASK = range(6)
"""N is any letter but A, C, G and T, and what fills the end of shorter sequences; MASK hides a base in training."""

_CODES = np.full(256, N, dtype=np.uint8)
for _code, _letter in enumerate(BASES):
    _CODES[ord(_letter)] = _CODES[ord(_letter.lower())] = _code
_CODES[ord("U")] = _CODES[ord("u")] = T
_LETTERS = np.frombuffer(b"ACGTNN", dtype=np.uint8)


def encode(sequence: str | bytes) -> np.ndarray:
    """Letters -> uint8 codes; lower case (soft-masked) counts as upper case, U as T, any other letter as N."""
    raw = sequence.encode("ascii", "replace") if isinstance(sequence, str) else sequence
    return _CODES[np.frombuffer(raw, dtype=np.uint8)]


def decode(codes: np.ndarray | Tensor) -> str:
    """Codes -> letters in upper case."""
    values = codes if isinstance(codes, np.ndarray) else codes.cpu().numpy()
    return _LETTERS[values].tobytes().decode("ascii")


def complement(codes: Tensor) -> Tensor:
    """A <-> T, C <-> G, whatever the shape; N and MASK stay, as they have no complement."""
    import torch

    return torch.where(codes < N, 3 - codes, codes)


def reverse_complement(codes: Tensor, lengths: Tensor | None = None) -> Tensor:
    """The other strand, read in its own direction.

    Args:
        codes: (B, L).
        lengths: (B,) real bases of each row, which stay at its beginning; None = all.
    """
    other = complement(codes)
    return other.flip(1) if lengths is None else other.gather(1, mirror(lengths, codes.shape[1]))


def mirror(lengths: Tensor, length: int) -> Tensor:
    """(B, L) the place that each place of a row takes when it is read from its end; what fills it up stays behind."""
    import torch

    place = torch.arange(length, device=lengths.device)
    return (lengths[:, None] - 1 - place) % length
