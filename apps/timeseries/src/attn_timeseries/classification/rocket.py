"""MiniRocket: series as shares of positive outputs of many fixed convolutions.

"MiniRocket: A Very Fast (Almost) Deterministic Transform for Time Series Classification" (Dempster, Schmidt and Webb,
2021), written from the paper; channels are drawn as its authors do for multivariate series. Series may differ in
length: a feature counts positions inside the series only.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

_TAPS = 9
_TWOS = np.array(list(itertools.combinations(range(_TAPS), 3)))  # where a kernel has weight 2; elsewhere -1
_MOST_DILATIONS = 32
_MOST_CHANNELS = 9
_GOLDEN = (np.sqrt(5) + 1) / 2


@dataclass(frozen=True)
class _Group:
    """The features that one kernel gives at one dilation."""

    kernel: int
    dilation: int
    channels: np.ndarray
    biases: np.ndarray
    padded: bool


class MiniRocket:
    """The transform.

    Args:
        features: how many; a multiple of 84 below it is made.
        seed: decides the series and channels drawn.
    """

    def __init__(self, features: int = 9_996, *, seed: int = 0) -> None:
        self.features = max(features, len(_TWOS))
        self.seed = seed
        self.groups: list[_Group] = []

    def fit(self, series: Sequence[np.ndarray]) -> MiniRocket:
        """Choose dilations, channels and biases from training series, each (steps, channels)."""
        draw = np.random.default_rng(self.seed)
        longest, width = max(map(len, series)), series[0].shape[1]
        dilations, counts = _dilations(longest, self.features // len(_TWOS))
        quantiles = iter(np.arange(1, len(_TWOS) * counts.sum() + 1) * _GOLDEN % 1)
        self.groups = []
        for number, (dilation, count) in enumerate(zip(dilations, counts)):
            for kernel in range(len(_TWOS)):
                most = min(width, _MOST_CHANNELS)
                many = int(2 ** draw.uniform(0, np.log2(most + 1)))
                channels = draw.choice(width, min(many, most), replace=False)
                one = series[int(draw.integers(len(series)))]
                alone, taps = _shifts([one], dilation, len(one))
                output = _convolve(alone, taps, kernel, channels)[0]
                biases = np.quantile(output, [next(quantiles) for _ in range(count)])
                self.groups.append(_Group(kernel, dilation, channels, biases, (number + kernel) % 2 == 0))
        return self

    def __call__(self, series: Sequence[np.ndarray]) -> np.ndarray:
        """(N, features) float32, in [0, 1]."""
        lengths = np.array([len(one) for one in series])
        longest = int(lengths.max())
        found: list[np.ndarray] = []
        place = np.arange(longest)
        for dilation, groups in itertools.groupby(self.groups, key=lambda group: group.dilation):
            alone, taps = _shifts(series, dilation, longest)
            reach = dilation * (_TAPS // 2)
            whole = place < lengths[:, None]
            # Without padding, only where the kernel lies in the series; where it never does, the whole series counts.
            inner = (place >= reach) & (place < lengths[:, None] - reach)
            inner = np.where(inner.any(axis=1, keepdims=True), inner, whole)
            for group in groups:
                output = _convolve(alone, taps, group.kernel, group.channels)
                counted = whole if group.padded else inner
                total = counted.sum(axis=1)
                found += [((output > bias) & counted).sum(axis=1) / total for bias in group.biases]
        return np.stack(found, axis=1).astype(np.float32)


def _dilations(longest: int, features: int) -> tuple[list[int], np.ndarray]:
    """Dilations of a kernel, spread evenly over their logarithms, and the features at each (section 3.1)."""
    most = np.log2(max(longest - 1, 1) / (_TAPS - 1)) if longest > _TAPS else 0.0
    grid = np.floor(2 ** np.linspace(0, max(most, 0.0), min(features, _MOST_DILATIONS))).astype(int)
    values, counts = np.unique(grid, return_counts=True)
    counts = np.maximum(1, counts * features // counts.sum())
    counts[: max(0, features - int(counts.sum()))] += 1
    return values.tolist(), counts


def _shifts(series: Sequence[np.ndarray], dilation: int, longest: int) -> tuple[np.ndarray, np.ndarray]:
    """(9, N, L, C) the series shifted by every tap, zeros outside, and the sum of these, (N, L, C)."""
    reach = dilation * (_TAPS // 2)
    padded = np.zeros((len(series), longest + 2 * reach, series[0].shape[1]), dtype=np.float32)
    for i, one in enumerate(series):
        padded[i, reach : reach + len(one)] = one
    taps = np.stack([padded[:, t * dilation : t * dilation + longest] for t in range(_TAPS)])
    return taps.sum(axis=0), taps


def _convolve(alone: np.ndarray, taps: np.ndarray, kernel: int, channels: np.ndarray) -> np.ndarray:
    """(N, L): -1 times all taps plus 3 times those with weight 2, summed over channels."""
    weighted = 3 * taps[_TWOS[kernel]][..., channels].sum(axis=(0, 3)) - alone[..., channels].sum(axis=2)
    return np.asarray(weighted)


def ridge_probabilities(x: np.ndarray, y: np.ndarray, tested: np.ndarray, classes: int) -> np.ndarray:
    """(M, K): a ridge classifier whose strength leave-one-out chooses; its margins through a softmax."""
    from sklearn.linear_model import RidgeClassifierCV

    mean, std = x.mean(axis=0), x.std(axis=0)
    std[std == 0] = 1
    model = RidgeClassifierCV(alphas=np.logspace(-3, 3, 10)).fit((x - mean) / std, y)
    margin = model.decision_function((tested - mean) / std)
    if margin.ndim == 1:
        margin = np.stack([-margin, margin], axis=1)
    margin = np.exp(margin - margin.max(axis=1, keepdims=True))
    whole = np.zeros((len(tested), classes))
    whole[:, model.classes_] = margin / margin.sum(axis=1, keepdims=True)
    return whole


def batches(count: int, size: int = 256) -> Iterator[slice]:
    """Slices of at most `size`."""
    for first in range(0, count, size):
        yield slice(first, first + size)
