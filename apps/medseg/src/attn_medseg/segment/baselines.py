"""Rows beside every model: nothing at all, the mean shape of training, and a threshold where there is one structure."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from attn_medseg.segment import metrics
from attn_medseg.segment.data import CaseSet, TrainSet, Whole
from attn_medseg.segment.options import SegmentTaskConfig
from attn_shared.task import DataBundle

_LARGEST = 64  # voxels of the normalised grid along an axis
_LEVELS = 40
_CHOOSING = 60  # training cases that choose a threshold

Segment = Callable[[Whole], Tensor | None]
"""A prepared case -> (*S) labels on its grid; None = background everywhere."""


def rows(bundle: DataBundle, chosen: SegmentTaskConfig) -> list[dict[str, Any]]:
    """Rows of a table, scored as models are."""
    from attn_medseg.segment.task import policy, score_case

    test, train = bundle.test, bundle.train
    if not isinstance(test, CaseSet) or not isinstance(train, TrainSet) or not len(test):
        return []
    state = bundle.state
    kinds: list[tuple[str, str, Segment]] = [("nothing", "background everywhere", lambda whole: None)]
    shape = mean_shape(train, len(state["structures"]) + 1)
    kinds.append(("mean shape", "the commonest label of training at each place of the image", placed(shape)))
    if len(state["structures"]) == 1:
        level, above = threshold(train)
        note = f"{'above' if above else 'below'} {level:.3g} of the normalised intensity, chosen on training"
        kinds.append(("threshold", note, lambda whole: at_level(whole.prepared.values, level, above)))
    found = []
    for name, note, segment in kinds:
        sums: dict[str, Tensor] = {}
        for index in range(len(test)):
            whole = test.whole(index)
            mask = segment(whole)
            labels = np.zeros_like(whole.label) if mask is None else whole.prepared.labels(mask)
            sums |= metrics.pack(
                index, test.patients[index], score_case(labels, whole.label, whole.prepared, state, chosen)
            )
        scored = metrics.unpack(sums)
        assert scored is not None
        figures = metrics.figures(scored, state["structures"], policy(chosen), resamples=chosen.bootstrap)
        found.append({"model": name, "note": note, **figures})
    return found


def mean_shape(train: TrainSet, classes: int) -> Tensor:
    """The commonest label at each place of a grid to which all training masks are brought; (*grid)."""
    shapes = np.array([tuple(train.example(number).full.shape) for number in range(len(train.cases))])
    grid = tuple(int(one) for one in np.clip(np.median(shapes, axis=0).round(), 1, _LARGEST))
    votes = torch.zeros(classes, *grid)
    for number in range(len(train.cases)):
        full = resized(train.example(number).full, grid)
        for label in range(classes):
            votes[label] += full == label
    return votes.argmax(dim=0).to(torch.uint8)


def placed(shape: Tensor) -> Segment:
    """The same mask in every image, as large as it."""
    return lambda whole: resized(shape, whole.prepared.undo.grid)


def resized(mask: Tensor, size: tuple[int, ...]) -> Tensor:
    """(*S) labels -> (*size), by the nearest voxel."""
    if tuple(mask.shape) == tuple(size):
        return mask
    return F.interpolate(mask[None, None].float(), tuple(size), mode="nearest-exact")[0, 0].to(torch.uint8)


def threshold(train: TrainSet) -> tuple[float, bool]:
    """The intensity with the best mean Dice in training, and whether the structure is brighter."""
    step = max(1, len(train.cases) // _CHOOSING)
    examples = [train.example(number) for number in range(0, len(train.cases), step)]
    values = [example.image.mean(dim=0) for example in examples]
    few = torch.cat([one.flatten()[:: max(1, one.numel() // 2000)] for one in values])
    # Evenly over the voxels and evenly over the range: few voxels may be bright.
    low, high = np.quantile(few.numpy(), (0.005, 0.995))
    levels = np.union1d(np.quantile(few.numpy(), np.linspace(0.02, 0.98, _LEVELS)), np.linspace(low, high, _LEVELS))
    best: Mapping[tuple[float, bool], float] = {
        (float(level), above): float(np.mean([_dice(v, e.full, level, above) for v, e in zip(values, examples)]))
        for level in levels
        for above in (True, False)
    }
    return max(best, key=lambda one: best[one])


def at_level(image: Tensor, level: float, above: bool) -> Tensor:
    """(C, *S) -> (*S) labels 0 and 1."""
    grey = image.mean(dim=0)
    return ((grey > level) if above else (grey < level)).to(torch.uint8)


def _dice(grey: Tensor, full: Tensor, level: NDArray[np.float64] | float, above: bool) -> float:
    mask, truth = (grey > level) if above else (grey < level), full == 1
    size = int(mask.sum() + truth.sum())
    return 2 * int((mask & truth).sum()) / size if size else 1.0
