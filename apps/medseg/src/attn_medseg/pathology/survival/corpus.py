"""What readers make of a data set of survival."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from attn_medseg.pathology import features
from attn_medseg.pathology.splits import Part
from attn_shared.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Patient:
    """One patient.

    Attributes:
        name: unique in its corpus.
        time: of the event or of the last contact; NaN = not known.
        event: whether the event came.
        genes: (number of columns,) values, NaN where one is missing.
        slides: feature files, or one array (N, C).
        part: where the data say in which part the patient is.
    """

    name: str
    time: float
    event: bool
    genes: NDArray[np.float64]
    slides: tuple[Path, ...] | NDArray[np.float32] = ()
    part: Part = ""

    @property
    def has_slides(self) -> bool:
        return len(self.slides) > 0

    def patches(self) -> NDArray[np.float32]:
        """(N, C) of all slides.

        Raises:
            UserError: a file cannot be read, or slides have different features.
        """
        if isinstance(self.slides, np.ndarray):
            return self.slides
        parts = [features.read(path).features for path in self.slides]
        for path, part in zip(self.slides, parts):
            if part.shape[1] != parts[0].shape[1]:
                raise UserError(
                    f"{path.name} has {part.shape[1]} features and {self.slides[0].name} {parts[0].shape[1]}"
                )
        return np.concatenate(parts)


@dataclass(frozen=True, kw_only=True)
class Corpus:
    """The patients of a data set.

    Attributes:
        patients: in the order of the data.
        genes: names of the columns.
        groups: name of a group -> its columns, a gene may be in several.
        notes: what the reader found and left out, a sentence each.
    """

    patients: tuple[Patient, ...]
    genes: tuple[str, ...]
    groups: dict[str, tuple[str, ...]]
    notes: tuple[str, ...] = field(default=())
