"""Bags whose class no mean and no maximum tells, only an instance that is looked at by itself."""

from __future__ import annotations

import numpy as np

from attn_medseg.pathology.bags.corpus import Bag, Corpus
from attn_medseg.pathology.splits import Part

COUNTS: dict[Part, int] = {"train": 180, "val": 40, "test": 80}
FEATURES = 16
_MARK = 4.0
_PAIRS = 3


def synthetic() -> Corpus:
    """In a positive bag a few instances carry both marks and as many none, in a negative bag one mark each: the same
    mean, the same maximum of each feature."""
    rng = np.random.default_rng(0)
    bags = []
    for part, count in COUNTS.items():
        for number in range(count):
            label = number % 2
            size = int(rng.integers(15, 41))
            values = rng.standard_normal((size, FEATURES)).astype(np.float32)
            first, second = values[:_PAIRS], values[_PAIRS : 2 * _PAIRS]
            first[:, 0] += _MARK
            (first if label else second)[:, 1] += _MARK
            values = values[rng.permutation(size)]
            name = f"{part}_{number:03d}"
            bags.append(Bag(name=name, patient=name, label=label, instances=values, part=part))
    return Corpus(
        bags=tuple(bags),
        classes=("negative", "positive"),
        normalise="zscore",
        notes=("synthetic: an instance with two marks makes a bag positive",),
    )
