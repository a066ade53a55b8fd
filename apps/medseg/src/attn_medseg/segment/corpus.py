"""What readers make of a data set: its cases and the names of its structures."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

Part = Literal["", "train", "val", "test"]


@dataclass(frozen=True, kw_only=True)
class Image:
    """An image in memory, in the axes of its file.

    Attributes:
        values: (channels, *axes) float32 of an image, (*axes) uint8 of a mask.
        affine: (4, 4) voxel to world in millimetres, RAS as NIfTI; None where the source knows none.
    """

    values: NDArray[np.generic]
    affine: NDArray[np.float64] | None = None


@dataclass(frozen=True, kw_only=True)
class Case:
    """One image, or one volume of slices that a 2-D model takes one at a time.

    Attributes:
        name: unique in its corpus, such as "hippocampus_001" or "patient001_frame01".
        patient: what splits keep together.
        image: files of the image's channels, or what gives it.
        label: file of its mask, or what gives it; None = there is none.
        scribble: the same for scribbles; `Corpus.unlabelled` stands for voxels that nobody drew.
        part: where the data set says in which part the case is.
        slices: axis along which the image is a stack that 2-D models take slice by slice; -1 = it is one image.
    """

    name: str
    patient: str
    image: tuple[Path, ...] | Callable[[], Image]
    label: Path | Callable[[], Image] | None = None
    scribble: Path | Callable[[], Image] | None = None
    part: Part = ""
    slices: int = -1


@dataclass(frozen=True, kw_only=True)
class Corpus:
    """The cases of a data set.

    Attributes:
        cases: in order of their names.
        structures: names of labels 1, 2, …; label 0 is background.
        ndim: 2 or 3: what a model reads at once.
        channels: of an image.
        values: value in a file -> label, where files have other values than 0, 1, 2, …; empty = as they are.
        unlabelled: value of scribbles where nobody drew.
        unit: of the spacing: "mm", or "px" where the source knows none.
        defaults: what the data set is best read with, by names of `SegmentDataConfig`.
        notes: what the reader found and left out, a sentence each: labels without an image, broken files.
        exact: whether affines are real, so that volumes in ml are.
    """

    cases: tuple[Case, ...]
    structures: tuple[str, ...]
    ndim: int
    channels: int
    values: Mapping[int, int] = field(default_factory=dict)
    unlabelled: int = 255
    unit: Literal["mm", "px"] = "mm"
    defaults: Mapping[str, object] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    exact: bool = True
