"""Rows that stand beside every model: the mixture itself, and an oracle that knows the voices."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

_WINDOW, _HOP = 0.032, 0.008


@dataclass(frozen=True)
class Baseline:
    """A way to separate without learning.

    Attributes:
        name, note: for tables.
        oracle: whether it knows the true voices.
        voices: (B, T) mixtures and (B, C, T) true voices -> (B, C, T) estimates.
    """

    name: str
    note: str
    oracle: bool
    voices: Callable[[Tensor, Tensor, int], Tensor]


def mixture_itself(mixture: Tensor, sources: Tensor, rate: int) -> Tensor:
    """The mixture for every voice: what improvements are counted from."""
    return mixture[:, None].expand_as(sources)


def ideal_ratio_mask(mixture: Tensor, sources: Tensor, rate: int) -> Tensor:
    """The mixture's spectrum with each voice's true share of the magnitudes, Hann windows of 32 ms every 8 ms.

    As the papers on time-domain separation state it (Conv-TasNet, table V): an upper bound of masking spectra.
    """
    size, hop = max(4, round(_WINDOW * rate)), max(1, round(_HOP * rate))
    window = torch.hann_window(size, dtype=mixture.dtype, device=mixture.device)

    def spectrum(x: Tensor) -> Tensor:
        return torch.stft(x, size, hop, window=window, return_complex=True, pad_mode="constant")

    batch, voices, length = sources.shape
    magnitude = spectrum(sources.flatten(0, 1)).abs().unflatten(0, (batch, voices))
    share = magnitude / magnitude.sum(dim=1, keepdim=True).clamp(min=1e-12)
    found = torch.istft((share * spectrum(mixture)[:, None]).flatten(0, 1), size, hop, window=window, length=length)
    return found.unflatten(0, (batch, voices))


BASELINES = (
    Baseline("ideal ratio mask (oracle)", "knows the true voices: a bound of masking spectra", True, ideal_ratio_mask),
    Baseline("mixture", "the mixture itself for every voice", False, mixture_itself),
)
