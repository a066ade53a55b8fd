"""Scores of segmentation, per case and structure, and what becomes of structures that are not there.

- dice: 2 |A ∩ B| / (|A| + |B|); iou: |A ∩ B| / |A ∪ B|.
- Surfaces are the voxels of a mask with a neighbour by a face outside of it; what lies beyond the image is outside.
  Distances go from each surface voxel of one mask to the nearest of the other, both ways, with the spacing.
- hd95_pooled: 95th percentile of both sets of distances together, as MedPy. hd95_maximum: the larger of both sets' 95th
  percentiles, as MONAI.
- assd: mean of both sets together, as MedPy and MONAI.
- volume_difference: predicted less true volume, in ml of volumes whose spacing is known, else in voxels; its mean is of
  the absolute values.

A structure is *missed* where the image has it and nothing of it is predicted, *invented* the other way round. A missed
or invented structure has Dice and IoU 0. Distances do not exist then, nor does Dice where a structure is neither there
nor predicted: `Policy` says what stands for them, "none" leaving them out of the mean. The counts of missed and
invented structures stand beside the means in either case, for a mean that leaves failures out improves with them.

A mean is over cases for each structure, then over structures. Intervals resample patients.
"""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import ndimage
from torch import Tensor

from attn_shared.intervals import interval

FORMAT: Mapping[str, str] = {
    "dice": ".4f",
    "hd95": ".3f",
    "missed": ",.0f",
    "invented": ",.0f",
    "iou": ".4f",
    "assd": ".3f",
    "volume_difference": ".3f",
    "cases": ",.0f",
}
"""Metrics in the order of their weight: the first three stand in every table."""
PERCENTILE = 95.0
_COLUMNS = ("truth", "predicted", "shared", "hd95_pooled", "hd95_maximum", "assd", "voxel", "diagonal")
_KEYS = ("case", "part", "structure", "patient")
_MEANS = ("dice", "iou", "hd95", "assd")
_BLOCK = 200  # resamples at once


@dataclass(frozen=True, kw_only=True)
class Policy:
    """What stands for scores that do not exist; the fields of `SegmentTaskConfig`."""

    empty: Literal["none", "one", "zero"] = "none"
    missed: Literal["none", "diagonal"] = "none"
    hd95: Literal["pooled", "maximum"] = "pooled"


@dataclass(frozen=True)
class Distances:
    """Between the surfaces of two masks; NaN where one is empty."""

    hd95_pooled: float = math.nan
    hd95_maximum: float = math.nan
    assd: float = math.nan


@dataclass(frozen=True)
class Rows:
    """Scores of structures in cases, in order.

    Attributes:
        keys: (N, 4) int64: case, part of the case (a slice, else 0), structure from 1 on, patient.
        values: (N, 8): voxels of the truth, of the prediction, of both; hd95_pooled, hd95_maximum, assd, all NaN where
            they do not exist or were not asked for; volume of a voxel, in ml where it is known; diagonal of the image.
    """

    keys: NDArray[np.int64]
    values: NDArray[np.float64]

    def column(self, name: str) -> NDArray[np.float64]:
        return self.values[:, _COLUMNS.index(name)]

    def key(self, name: str) -> NDArray[np.int64]:
        return self.keys[:, _KEYS.index(name)]

    @property
    def missed(self) -> NDArray[np.bool_]:
        return np.asarray((self.column("truth") > 0) & (self.column("predicted") == 0))

    @property
    def invented(self) -> NDArray[np.bool_]:
        return np.asarray((self.column("truth") == 0) & (self.column("predicted") > 0))

    def score(self, name: str, policy: Policy) -> NDArray[np.float64]:
        """(N,) of "dice", "iou", "hd95", "hd95_pooled", "hd95_maximum", "assd" or "volume_difference"; NaN = not
        counted."""
        truth, predicted, shared = (self.column(one) for one in ("truth", "predicted", "shared"))
        if name == "volume_difference":
            return np.asarray((predicted - truth) * self.column("voxel"))
        if name in ("dice", "iou"):
            whole = truth + predicted if name == "dice" else truth + predicted - shared
            value = np.where(whole > 0, (2 if name == "dice" else 1) * shared / np.maximum(whole, 1), math.nan)
            stands = {"none": math.nan, "one": 1.0, "zero": 0.0}[policy.empty]
            return np.where(whole > 0, value, stands)
        value = self.column(f"hd95_{policy.hd95}" if name == "hd95" else name)
        if policy.missed == "diagonal":
            value = np.where(self.missed | self.invented, self.column("diagonal"), value)
        return np.asarray(value)


# -- one pair of masks ------------------------------------------------------------------------------------------------


def surface_distances(
    a: NDArray[np.bool_], b: NDArray[np.bool_], spacing: Sequence[float]
) -> tuple[NDArray[np.float64], NDArray[np.float64]] | None:
    """From each surface voxel of `a` to the surface of `b`, and the other way; None where one mask is empty."""
    box = _box(a, b)
    if box is None:
        return None
    a, b = a[box], b[box]
    # Outside of the box both are empty, as beyond the image, so the box changes no surface and no distance.
    own = a & ~ndimage.binary_erosion(a)
    other = b & ~ndimage.binary_erosion(b)
    there = ndimage.distance_transform_edt(~other, sampling=tuple(spacing))[own]
    back = ndimage.distance_transform_edt(~own, sampling=tuple(spacing))[other]
    return there, back


def distances(a: NDArray[np.bool_], b: NDArray[np.bool_], spacing: Sequence[float]) -> Distances:
    """Of the surfaces of two masks."""
    found = surface_distances(a, b, spacing)
    if found is None:
        return Distances()
    both = np.concatenate(found)
    return Distances(
        hd95_pooled=float(np.percentile(both, PERCENTILE)),
        hd95_maximum=max(float(np.percentile(one, PERCENTILE)) for one in found),
        assd=float(both.mean()),
    )


def _box(a: NDArray[np.bool_], b: NDArray[np.bool_]) -> tuple[slice, ...] | None:
    """The smallest box that holds both masks; None where one is empty."""
    box = []
    for axis in range(a.ndim):
        others = tuple(i for i in range(a.ndim) if i != axis)
        ends = []
        for mask in (a, b):
            there = np.flatnonzero(mask.any(axis=others))
            if not len(there):
                return None
            ends.append((there[0], there[-1] + 1))
        box.append(slice(min(start for start, _ in ends), max(end for _, end in ends)))
    return tuple(box)


def score(
    predicted: NDArray[np.integer],
    truth: NDArray[np.integer],
    structures: int,
    spacing: Sequence[float],
    *,
    surfaces: bool = True,
    ignore: int | None = None,
    unit: Literal["mm", "px"] = "mm",
) -> NDArray[np.float64]:
    """(structures, 8) values of `Rows` of a case.

    Args:
        predicted, truth: labels on the same grid.
        spacing: of the voxels along each axis.
        surfaces: distances too, which take longer than all else.
        ignore: label of the truth whose voxels count nowhere.
        unit: of the spacing; volumes are in ml where it is mm and there are three axes, else in voxels.

    Raises:
        ValueError: grids of different sizes.
    """
    if predicted.shape != truth.shape:
        raise ValueError(f"a prediction of {predicted.shape} voxels does not fit a mask of {truth.shape}")
    if len(spacing) != truth.ndim:
        raise ValueError(f"an image of {truth.ndim} axes needs as many spacings, got {tuple(spacing)}")
    if ignore is not None and (hidden := truth == ignore).any():
        predicted, truth = np.where(hidden, 0, predicted), np.where(hidden, 0, truth)
    size = structures + 1
    pairs = np.bincount(
        truth.astype(np.int64).ravel() * size + predicted.astype(np.int64).ravel(), minlength=size * size
    ).reshape(size, size)
    values = np.full((structures, len(_COLUMNS)), math.nan)
    values[:, 0] = pairs.sum(axis=1)[1:]
    values[:, 1] = pairs.sum(axis=0)[1:]
    values[:, 2] = pairs.diagonal()[1:]
    values[:, 6] = math.prod(spacing) / 1000 if unit == "mm" and truth.ndim == 3 else 1.0
    values[:, 7] = math.hypot(*(step * max(0, count - 1) for step, count in zip(spacing, truth.shape)))
    if surfaces:
        for row in range(structures):
            found = distances(predicted == row + 1, truth == row + 1, spacing)
            values[row, 3:6] = found.hd95_pooled, found.hd95_maximum, found.assd
    return values


# -- cases ------------------------------------------------------------------------------------------------------------


def pack(case: int, patient: int, parts: Sequence[NDArray[np.float64]]) -> dict[str, Tensor]:
    """The scores of a case as an entry of the metric state, `score`'s values of each part of it.

    Each case has an entry of its own, so that adding states up over processes joins them.
    """
    rows = [
        (case, number, structure, patient, *values)
        for number, part in enumerate(parts)
        for structure, values in enumerate(part, 1)
    ]
    return {f"case {case}": torch.tensor(rows, dtype=torch.float64)}


def unpack(sums: Mapping[str, Tensor]) -> Rows | None:
    """All scores of a metric state in the order of the cases; None where there are none."""
    if not sums:
        return None
    table = torch.cat(list(sums.values())).numpy()
    table = table[np.lexsort((table[:, 2], table[:, 1], table[:, 0]))]
    return Rows(table[:, : len(_KEYS)].astype(np.int64), table[:, len(_KEYS) :])


def figures(rows: Rows, structures: Sequence[str], policy: Policy, *, resamples: int = 0) -> dict[str, float]:
    """All figures of a split: means over structures, then those of each, with intervals where `resamples` > 0."""
    which = rows.key("structure")
    found: dict[str, float] = {}
    each: dict[str, dict[str, float]] = {name: {} for name in structures}
    values = {name: rows.score(name, policy) for name in (*_MEANS, "volume_difference")}
    bounds = _intervals(rows, {name: values[name] for name in _MEANS}, len(structures), resamples)
    for name, value in values.items():
        value = np.abs(value)
        means = [_mean(value[which == number]) for number in range(1, len(structures) + 1)]
        if name not in ("dice", "iou") and all(math.isnan(one) for one in means):
            continue  # nothing was measured, as in validation
        found[name] = _mean(np.array(means))
        if name in bounds:
            found |= interval(name, *bounds[name][-1])
        for number, structure in enumerate(structures):
            if name in ("dice", "hd95") and len(structures) > 1:
                each[structure][f"{name} {structure}"] = means[number]
                if name in bounds:
                    each[structure] |= interval(f"{name} {structure}", *bounds[name][number])
    for name, mask in (("missed", rows.missed), ("invented", rows.invented)):
        found[name] = float(mask.sum())
        for number, structure in enumerate(structures, 1):
            if len(structures) > 1:
                each[structure][f"{name} {structure}"] = float(mask[which == number].sum())
    found["cases"] = float(len(np.unique(rows.keys[:, :2], axis=0)))
    for own in each.values():
        found |= own
    return found


def _mean(values: NDArray[np.float64]) -> float:
    kept = values[~np.isnan(values)]
    return float(kept.mean()) if kept.size else math.nan


def _intervals(
    rows: Rows, values: Mapping[str, NDArray[np.float64]], structures: int, resamples: int
) -> dict[str, list[tuple[float, float]]]:
    """name -> 2.5 % and 97.5 % quantiles for each structure, the last of their mean; resampled are patients."""
    if not resamples:
        return {}
    _, patient = np.unique(rows.key("patient"), return_inverse=True)
    count = int(patient.max()) + 1
    structure = rows.key("structure") - 1
    rng = np.random.default_rng(0)
    weights = []
    for first in range(0, resamples, _BLOCK):
        drawn = rng.integers(0, count, (min(_BLOCK, resamples - first), count))
        drawn += np.arange(len(drawn))[:, None] * count
        weights.append(np.bincount(drawn.ravel(), minlength=len(drawn) * count).reshape(-1, count))
    weight = np.concatenate(weights).astype(np.float64)
    done = {}
    for name, value in values.items():
        there = ~np.isnan(value)
        if not there.any():
            continue
        total, number = np.zeros((count, structures)), np.zeros((count, structures))
        np.add.at(total, (patient[there], structure[there]), value[there])
        np.add.at(number, (patient[there], structure[there]), 1.0)
        held = weight @ number
        with np.errstate(invalid="ignore"):
            means = np.where(held > 0, (weight @ total) / np.maximum(held, 1), math.nan)  # (R, structures)
        seen = (~np.isnan(means)).sum(axis=1)
        overall = np.where(seen > 0, np.nansum(means, axis=1) / np.maximum(seen, 1), math.nan)
        done[name] = [_bounds(one) for one in (*means.T, overall)]
    return done


def _bounds(values: NDArray[np.float64]) -> tuple[float, float]:
    kept = values[~np.isnan(values)]
    if not kept.size:
        return math.nan, math.nan
    low, high = np.quantile(kept, (0.025, 0.975))
    return float(low), float(high)


def table(
    rows: Rows, names: Mapping[int, str], structures: Sequence[str], policy: Policy, unit: str, volume: str
) -> str:
    """CSV text: a line for each structure of each case, both definitions of HD95 included.

    Args:
        names: case -> its name.
        unit: of distances, "mm" or "px".
        volume: unit of volumes, "ml" or "voxels".
    """
    sliced = bool(rows.key("part").any())
    head = ["case", *(["slice"] if sliced else []), "structure", "dice", "iou"]
    head += [f"hd95_pooled_{unit}", f"hd95_maximum_{unit}", f"assd_{unit}"]
    head += [f"true_volume_{volume}", f"predicted_volume_{volume}", "missed", "invented"]
    scores = {name: rows.score(name, policy) for name in ("dice", "iou", "hd95_pooled", "hd95_maximum", "assd")}
    missed, invented = rows.missed, rows.invented
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(head)
    for i, (case, part, structure, _) in enumerate(rows.keys.tolist()):
        line: list[object] = [names.get(case, str(case)), *([part] if sliced else []), structures[structure - 1]]
        line += ["" if math.isnan(value[i]) else f"{value[i]:.6g}" for value in scores.values()]
        line += [f"{rows.column(name)[i] * rows.column('voxel')[i]:.6g}" for name in ("truth", "predicted")]
        writer.writerow([*line, int(missed[i]), int(invented[i])])
    return out.getvalue()
