"""Scores of language models of genomes.

- bits per base: mean -log2 of the probability given to the base that stands there; 2 = nothing is known.
- perplexity: 2 to the power of that.
- accuracy: share of bases that are the likeliest ones.
- ece: mean distance between the probability of the likeliest base and how often it is right, over 15 bins of equal
  width, weighted by bases.

Each base of a part counts once; N counts nowhere. Sums are kept by window and added in order, so neither batch size nor
processes change a figure. Intervals come from drawing windows anew.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from attn_shared.errors import UserError
from attn_shared.intervals import interval

FORMATS: Mapping[str, str] = {"bits per base": ".4f", "perplexity": ".4f", "accuracy": ".4f", "ece": ".4f"}
BINS = 15
_RESAMPLES = 1000
_BLOCK = 2_000_000


@dataclass(frozen=True)
class Scores:
    """Sums over the scored bases of a part.

    Attributes:
        index: (W,) numbers of windows, ascending.
        bits, count, right: (W,) of each window.
        bins: (BINS, 3) bases, probability of the likeliest and hits, by that probability.
        told: (4, 4) probability given to each base, by column, where each base stands, by row.
    """

    index: np.ndarray
    bits: np.ndarray
    count: np.ndarray
    right: np.ndarray
    bins: np.ndarray
    told: np.ndarray


def pack(batch: Mapping[str, Tensor], scores: Tensor) -> dict[str, Tensor]:
    """A batch's entry of the metric state, from (B, L, 4) base-2 logarithms of probabilities."""
    tokens, scored = batch["tokens"].cpu(), batch["scored"].cpu()
    found = scores.detach().to("cpu", torch.float64)
    if bool(torch.isnan(found[scored]).any()):
        raise UserError("the predictions are no longer numbers (NaN); try a smaller --optim.lr")
    truth = tokens.clamp(max=3)
    bits = torch.where(scored, -found.gather(2, truth[..., None])[..., 0], 0.0)
    sure, said = found.max(dim=2)
    right = (said == truth) & scored
    window = torch.stack([batch["index"].cpu().double(), bits.sum(1), scored.sum(1).double(), right.sum(1).double()], 1)
    chance = torch.exp2(found)[scored]
    chance = chance / chance.sum(dim=1, keepdim=True)  # the mean of both strands' logarithms sums to less than 1
    sure, said, truth = chance.amax(dim=1), right[scored].double(), truth[scored]
    place = ((sure * BINS).ceil().long() - 1).clamp(0, BINS - 1)
    bins = torch.zeros(BINS, 3, dtype=torch.float64)
    bins.index_add_(0, place, torch.stack([torch.ones_like(sure), sure, said], dim=1))
    told = torch.zeros(4, 4, dtype=torch.float64).index_add_(0, truth, chance)
    return {f"windows {int(batch['index'][0])}": window, "bins": bins, "told": told}


def join(state: dict[str, Tensor], entry: Mapping[str, Tensor]) -> None:
    """Take an entry into a metric state."""
    for name, value in entry.items():
        state[name] = state[name] + value if name in state else value


def unpack(state: Mapping[str, Tensor]) -> Scores | None:
    """All of a metric state; None where there is nothing."""
    windows = [value.numpy() for name, value in state.items() if name.startswith("windows ")]
    if not windows:
        return None
    table = np.concatenate(windows)
    table = table[np.argsort(table[:, 0], kind="stable")]
    return Scores(
        table[:, 0].astype(np.int64), table[:, 1], table[:, 2], table[:, 3],
        state["bins"].numpy(), state["told"].numpy(),
    )  # fmt: skip


def figures(scores: Scores, *, intervals: bool, seed: int = 0) -> dict[str, float]:
    """All figures, with the bounds of 95 % intervals where asked for."""
    total = scores.count.sum()
    if not total:
        return {}
    bits = float(scores.bits.sum() / total)
    found = {"bits per base": bits}
    rows, chance, hits = scores.bins.T
    rest = {
        "perplexity": 2**bits,
        "accuracy": float(scores.right.sum() / total),
        "ece": float(np.abs(chance - hits).sum() / rows.sum()),
    }
    if intervals and len(scores.index) > 1:
        low, high = bootstrap(scores, seed=seed)
        found |= interval("bits per base", low, high)
    return found | rest


def bootstrap(scores: Scores, resamples: int = _RESAMPLES, seed: int = 0) -> tuple[float, float]:
    """2.5 % and 97.5 % quantiles of the bits per base under resampling of windows."""
    rng, count = np.random.default_rng(seed), len(scores.index)
    made = []
    block = max(1, _BLOCK // count)
    for first in range(0, resamples, block):
        drawn = rng.integers(0, count, (min(block, resamples - first), count))
        made.append(scores.bits[drawn].sum(axis=1) / np.maximum(scores.count[drawn].sum(axis=1), 1))
    low, high = np.quantile(np.concatenate(made), (0.025, 0.975))
    return float(low), float(high)
