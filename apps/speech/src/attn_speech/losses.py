"""The loss that separators are trained with."""

from __future__ import annotations

import torch
from torch import Tensor

from attn_speech.metrics import centred, permuted_means, similarity

_LEAST = 1e-7  # as near to 0 and 1 as float32 tells shares of energy


def pit_si_sdr(
    estimates: Tensor, sources: Tensor, mixture: Tensor, lengths: Tensor | None = None, *, limit: float = 30.0
) -> Tensor:
    """Negative SI-SDR in decibels under the best permutation of each utterance, all being tried; a scalar.

    An utterance that is already better than `limit` has no gradient, so that one near perfect does not steer the rest.
    A silent source asks for silence: its estimate's energy over the mixture's, in decibels, takes the place of the
    negative SI-SDR, not below -`limit` either. An utterance that is silent altogether counts nowhere.

    Args:
        estimates: (B, C, T); float32 or float64.
        sources: (B, C, T).
        mixture: (B, T).
        lengths: (B,) samples of each utterance, on which alone the loss depends; None = all.
        limit: decibels.
    """
    estimates, sources = centred(estimates, lengths), centred(sources, lengths)
    mixture = centred(mixture[:, None], lengths)
    share = similarity(estimates, sources)
    silent = torch.isnan(share)
    share = torch.where(silent, 0.5, share).clamp(_LEAST, 1 - _LEAST)
    worse = 10 * torch.log10((1 - share) / share)
    whole = mixture.square().sum(dim=-1)[:, :, None]
    energy = estimates.square().sum(dim=-1)[:, :, None] / torch.where(whole > 0, whole, 1.0)
    quiet = 10 * torch.log10(energy + 10 ** (-limit / 10)).expand_as(worse)
    best = permuted_means(torch.where(silent, quiet, worse)).amin(dim=1)
    counts = sources.abs().amax(dim=(1, 2)) > 0
    total = torch.where(counts, best.clamp(min=-limit), 0.0).sum()
    result: Tensor = total / counts.sum().clamp(min=1)
    return result
