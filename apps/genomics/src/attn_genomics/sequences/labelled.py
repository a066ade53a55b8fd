"""Labelled sequences as they were read."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from attn_genomics.data.fasta import Sequences


@dataclass(kw_only=True)
class Labelled:
    """Labelled sequences as they were read.

    Attributes:
        source: name of the file or data set.
        sequences: all of them.
        label: (N,) names of classes.
        part: (N,) 0, 1, 2 = train, val, test where the data say it; None = they do not.
        group: (N,) chromosome of each; None = not known.
        classes: order of the classes where the data have one; None = by name.
        notes: what a user must know.
        protocol: how its figures are to be read, where it is a known benchmark.
    """

    source: str
    sequences: Sequences
    label: np.ndarray
    part: np.ndarray | None = None
    group: np.ndarray | None = None
    classes: list[str] | None = None
    notes: list[str] = field(default_factory=list)
    protocol: str = ""
