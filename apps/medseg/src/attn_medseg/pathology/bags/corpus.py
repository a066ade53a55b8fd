"""What readers make of a data set of bags."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from attn_medseg.pathology import features
from attn_medseg.pathology.splits import Part


@dataclass(frozen=True, kw_only=True)
class Bag:
    """One bag.

    Attributes:
        name: unique in its corpus.
        patient: what splits keep together.
        label: number of its class; -1 = not known.
        instances: (N, C) float32, or the file that holds them.
        part: where the data say in which part the bag is.
        names: of the instances, where the data tell them.
    """

    name: str
    patient: str
    label: int
    instances: NDArray[np.float32] | Path
    part: Part = ""
    names: tuple[str, ...] = ()

    def read(self) -> features.Instances:
        """Its instances.

        Raises:
            UserError: the file cannot be read.
        """
        if isinstance(self.instances, Path):
            return features.read(self.instances)
        return features.Instances(self.instances)


@dataclass(frozen=True, kw_only=True)
class Corpus:
    """The bags of a data set.

    Attributes:
        bags: in the order of the data.
        classes: names of the classes, in order; of two the second is the positive one.
        normalise: what `--data_args.normalise auto` means here.
        notes: what the reader found and left out, a sentence each.
    """

    bags: tuple[Bag, ...]
    classes: tuple[str, ...]
    normalise: Literal["zscore", "none"]
    notes: tuple[str, ...] = ()
