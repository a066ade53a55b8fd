"""Patients whose risk lies in what genes and slide say together."""

from __future__ import annotations

import numpy as np

from attn_medseg.pathology.splits import Part
from attn_medseg.pathology.survival.corpus import Corpus, Patient

COUNTS: dict[Part, int] = {"train": 480, "val": 80, "test": 160}
GROUPS, EACH, FEATURES = 6, 6, 24
_TOGETHER, _ALONE, _OTHER = 1.2, 0.5, 0.3
_SIGN = 1.5
_MARK = 4.0
_MARKED = 3  # every third patch


def synthetic() -> Corpus:
    """A third of a slide's patches carries one of two marks; with a group of genes high the one is the bad sign, with
    it low the other. Either by itself, and another group, matter less."""
    rng = np.random.default_rng(0)
    patients = []
    for part, count in COUNTS.items():
        for number in range(count):
            sign, mark = rng.choice([-1.0, 1.0], 2)
            genes = rng.standard_normal((GROUPS, EACH))
            genes[0] += _SIGN * sign
            other = rng.standard_normal()
            genes[1] += other
            patches = rng.standard_normal((int(rng.integers(20, 51)), FEATURES)).astype(np.float32)
            patches[: len(patches) // _MARKED, 0 if mark > 0 else 1] += _MARK
            log_hazard = _TOGETHER * sign * mark + _ALONE * (sign + mark) + _OTHER * other
            time = rng.exponential(24 * np.exp(-log_hazard))
            last = rng.exponential(60)
            patients.append(
                Patient(
                    name=f"{part}_{number:03d}",
                    time=float(min(time, last) + 0.1),
                    event=bool(time <= last),
                    genes=genes.ravel(),
                    slides=patches[rng.permutation(len(patches))],
                    part=part,
                )
            )
    names = [[f"G{group}{letter}_rnaseq" for letter in "abcdef"] for group in range(GROUPS)]
    return Corpus(
        patients=tuple(patients),
        genes=tuple(name for group in names for name in group),
        groups={f"group {number}": tuple(own) for number, own in enumerate(names)},
        notes=("synthetic: the risk is mostly the product of a group of genes and of a mark in the slide",),
    )
