"""Images on the grid that a model reads, and back again; patches and augmentation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from attn_medseg.segment.corpus import Image
from attn_medseg.segment.readers.files import IGNORE, spacing_of
from attn_shared.errors import UserError

_LINEAR = {2: "bilinear", 3: "trilinear"}
_TURN = {2: 0.5, 3: 0.3}
"""Largest angle of augmentation, in radians."""
_ZOOM = 1.25
_MARGIN = 1.5
"""What is cut around a patch that is turned and zoomed, in patches."""


class Restore:
    """The way from the grid of a model back to that of a file.

    Attributes:
        size: voxels of the file along its axes.
        grid: voxels of the prepared image along the axes of the model.
        order: axis of the file that becomes each axis of the model.
        turned: axes of the file that are reversed.
    """

    def __init__(self, size: Sequence[int], grid: Sequence[int], order: Sequence[int], turned: Sequence[int]) -> None:
        self.size, self.grid = tuple(size), tuple(grid)
        self.order, self.turned = tuple(order), tuple(turned)

    @property
    def oriented(self) -> tuple[int, ...]:
        """Voxels of the file along the axes of the model."""
        return tuple(self.size[one] for one in self.order)

    def forth(self, array: Tensor) -> Tensor:
        """(…, *file axes) -> (…, *axes of the model) without resampling."""
        lead = array.ndim - len(self.size)
        array = array.flip([lead + one for one in self.turned]) if self.turned else array
        return array.permute(*range(lead), *(lead + one for one in self.order))

    def back(self, array: Tensor) -> Tensor:
        """The inverse of `forth`."""
        lead = array.ndim - len(self.size)
        inverse = np.argsort(self.order).tolist()
        array = array.permute(*range(lead), *(lead + one for one in inverse))
        return array.flip([lead + one for one in self.turned]) if self.turned else array

    def scores(self, scores: Tensor) -> Tensor:
        """(K, *grid) -> (K, *file axes), by linear resampling."""
        self._check(scores)
        return self.back(_resized(scores, self.oriented))

    def labels(self, scores: Tensor) -> NDArray[np.uint8]:
        """(K, *grid) scores, or a (*grid) mask of labels -> (*file axes) labels.

        Classes are resampled one at a time, so that memory is that of two volumes. A mask is resampled by the nearest
        voxel, scores linearly; of equal scores the first class wins.
        """
        if scores.ndim == len(self.grid):
            mask = scores[None, None].float()
            if self.grid != self.oriented:
                mask = F.interpolate(mask, self.oriented, mode="nearest-exact")
            return self.back(mask[0, 0].to(torch.uint8)).contiguous().numpy()
        self._check(scores)
        best = _resized(scores[:1], self.oriented)[0]
        found = torch.zeros(self.oriented, dtype=torch.uint8, device=scores.device)
        for label in range(1, scores.shape[0]):
            more = _resized(scores[label : label + 1], self.oriented)[0]
            found[more > best] = label
            best = torch.maximum(best, more)
        return self.back(found).contiguous().cpu().numpy()

    def _check(self, scores: Tensor) -> None:
        if tuple(scores.shape[1:]) != self.grid:
            raise ValueError(f"scores of a grid of {self.grid} were expected, got {tuple(scores.shape[1:])}")


class Prepared:
    """An image as a model reads it.

    Attributes:
        values: (C, *S) float32.
        undo: the way back to the file's grid.
        slices: axis of S along which a model of two axes takes it slice by slice; -1 = as a whole.
        spacing: millimetres between the file's voxels along its axes; ones where it knows none.
    """

    def __init__(self, values: Tensor, undo: Restore, slices: int, spacing: tuple[float, ...]) -> None:
        self.values, self.undo, self.slices, self.spacing = values, undo, slices, spacing

    def restore(self, scores: Tensor) -> Tensor:
        """(K, *S) scores -> (K, *file axes), by linear resampling."""
        return self.undo.scores(scores)

    def labels(self, scores: Tensor) -> NDArray[np.uint8]:
        """(K, *S) scores or (*S) labels -> (*file axes) uint8 labels. See `Restore.labels`."""
        return self.undo.labels(scores)


def orientation(affine: NDArray[np.float64] | None) -> str:
    """Letters of the directions in which the axes of a volume grow, such as "RAS"; empty where it knows none."""
    if affine is None:
        return ""
    import nibabel

    return "".join(one or "?" for one in nibabel.aff2axcodes(affine))


def prepare(image: Image, state: Mapping[str, Any]) -> Prepared:
    """An image on the grid that a model reads, its intensities normalised by themselves.

    Volumes of another orientation than those in training are brought to theirs, axes and directions exactly.

    Args:
        image: (channels, *axes) and its affine.
        state: `DataBundle.state`.

    Raises:
        UserError: another number of axes or channels than in training.
    """
    undo = plan(image, state)
    values = torch.from_numpy(np.ascontiguousarray(image.values, np.float32))
    channels = int(state["channels"])
    if values.shape[0] == 1 and channels == 3:
        values = values.expand(3, *values.shape[1:])
    if values.shape[0] != channels:
        raise UserError(f"the image has {values.shape[0]} channels, the model reads {channels}")
    values = _smaller(undo.forth(values).contiguous(), undo.grid)
    return Prepared(
        normalised(values, str(state["normalise"]), state["clip"], nonzero=int(state["axes"]) == 3),
        undo,
        int(state["slices"]),
        spacing_of(image.affine, len(undo.size)),
    )


def plan(image: Image, state: Mapping[str, Any]) -> Restore:
    """Where the axes of an image go, and to how many voxels.

    Raises:
        UserError: another number of axes than in training.
    """
    size = image.values.shape[1:]
    wanted = int(state["axes"])
    if len(size) != wanted:
        raise UserError(f"the image has {len(size)} axes, the model was trained on images of {wanted}")
    order, turned = _turn(image.affine, len(size), str(state["orientation"]))
    undo = Restore(size, size, order, turned)
    if image.affine is None and state["resize"] == "none":
        return undo  # an image without millimetres stays as it is
    spacing = spacing_of(image.affine, len(size))
    grid = grid_of(undo.oriented, tuple(spacing[one] for one in order), state)
    return Restore(size, grid, order, turned)


def grid_of(size: Sequence[int], spacing: Sequence[float], state: Mapping[str, Any]) -> tuple[int, ...]:
    """Voxels of an image, in the model's axes, after resampling."""
    slices = int(state["slices"])
    if state["resize"] == "whole":
        wanted = iter(state["size"])
        return tuple(one if axis == slices else int(next(wanted)) for axis, one in enumerate(size))
    if not state["spacing"]:
        return tuple(size)
    return tuple(
        max(1, round(count * has / wanted)) if wanted > 0 else count
        for count, has, wanted in zip(size, spacing, state["spacing"])
    )


def _turn(affine: NDArray[np.float64] | None, ndim: int, wanted: str) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Axis of the file for each axis of the model, and the axes of the file that are reversed."""
    same = tuple(range(ndim)), ()
    if affine is None or ndim != 3 or not wanted or "?" in (found := orientation(affine)) or found == wanted:
        return same
    from nibabel.orientations import axcodes2ornt, io_orientation, ornt_transform

    moves = ornt_transform(io_orientation(affine), axcodes2ornt(wanted))
    order = tuple(int(one) for one in np.argsort(moves[:, 0]))
    return order, tuple(axis for axis in range(3) if moves[axis, 1] < 0)


def normalised(values: Tensor, how: str, clip: Sequence[float], *, nonzero: bool) -> Tensor:
    """(C, *S) intensities by statistics of their own image alone. See `SegmentDataConfig.normalise`.

    Args:
        nonzero: of "zscore": 0 is what surrounds a body, neither counted nor changed.
    """
    from monai.transforms import (
        NormalizeIntensity,
        ScaleIntensity,
        ScaleIntensityRange,
        ScaleIntensityRangePercentiles,
    )

    transform: Any
    if how == "none":
        return values
    if how == "zscore":
        transform = NormalizeIntensity(nonzero=nonzero, channel_wise=True)
    elif how == "minmax":
        transform = ScaleIntensity(0.0, 1.0, channel_wise=True)
    elif how == "percentile":
        transform = ScaleIntensityRangePercentiles(0.5, 99.5, 0.0, 1.0, clip=True, channel_wise=True)
    else:
        transform = ScaleIntensityRange(clip[0], clip[1], 0.0, 1.0, clip=True)
    return _plain(transform(values.clone())).float()


def _plain(values: Any) -> Tensor:
    """A tensor without what MONAI tracks of it."""
    return values.as_tensor() if hasattr(values, "as_tensor") else torch.as_tensor(values)


def _resized(values: Tensor, size: Sequence[int]) -> Tensor:
    """(C, *S) -> (C, *size), linearly; voxels are centred."""
    if tuple(values.shape[1:]) == tuple(size):
        return values.float()
    return F.interpolate(values[None].float(), tuple(size), mode=_LINEAR[len(size)], align_corners=False)[0]


def _smaller(values: Tensor, size: Sequence[int]) -> Tensor:
    """An image on a coarser or finer grid, smoothed before where it loses voxels.

    As MONAI's Resize with anti-aliasing, but for the edges, where that mixes in 0, and its memory of twenty images.
    """
    if tuple(values.shape[1:]) == tuple(size):
        return values
    from monai.networks.layers import gaussian_1d
    from scipy.ndimage import correlate1d

    array = values.float().numpy()
    for axis, (has, wanted) in enumerate(zip(values.shape[1:], size), 1):
        if has > wanted:
            kernel = gaussian_1d(torch.tensor((has / wanted - 1) / 2), truncated=4.0).double().numpy()
            array = correlate1d(array, kernel / kernel.sum(), axis=axis, mode="reflect", output=np.float32)
    return _resized(torch.from_numpy(array), size)


def label_on_grid(label: NDArray[np.uint8], undo: Restore) -> Tensor:
    """(*file axes) labels -> (*grid) uint8, by the nearest voxel."""
    moved = undo.forth(torch.from_numpy(np.ascontiguousarray(label))).contiguous()
    if undo.grid == undo.oriented:
        return moved
    return F.interpolate(moved[None, None].float(), undo.grid, mode="nearest-exact")[0, 0].to(torch.uint8)


# -- patches ----------------------------------------------------------------------------------------------------------


def crop(array: Tensor, start: Sequence[int], size: Sequence[int], fill: float) -> Tensor:
    """(…, *S) -> (…, *size) from `start`, which may lie outside; what is outside is `fill`."""
    lead = array.ndim - len(size)
    inner = array
    outside = False
    for axis, (one, wide) in enumerate(zip(start, size), lead):
        has = array.shape[axis]
        low, high = min(max(0, one), has), min(max(0, one + wide), has)
        inner = inner.narrow(axis, low, high - low)
        outside = outside or high - low < wide
    if not outside:
        return inner
    found = array.new_full((*array.shape[:lead], *size), fill)
    there = found
    for axis, one in enumerate(start, lead):
        there = there.narrow(axis, min(max(0, -one), found.shape[axis]), inner.shape[axis])
    there.copy_(inner)
    return found


def place(
    size: Sequence[int], patch: Sequence[int], around: Sequence[int] | None, rng: np.random.Generator
) -> tuple[int, ...]:
    """Where a patch starts: drawn such that it holds the voxel `around`, or anywhere. It leaves an image only where the
    image is smaller, which then lies in its middle."""
    start = []
    for axis, (has, wants) in enumerate(zip(size, patch)):
        if has <= wants:
            start.append(-((wants - has) // 2))
        elif around is None:
            start.append(int(rng.integers(0, has - wants + 1)))
        else:
            at = int(around[axis]) - wants // 2 + int(rng.integers(-(wants // 4), wants // 4 + 1))
            start.append(min(max(0, at), has - wants))
    return tuple(start)


def cut(
    image: Tensor,
    labels: Sequence[Tensor],
    start: Sequence[int],
    size: Sequence[int],
    rng: np.random.Generator,
    *,
    augment: str,
    flips: Sequence[int],
) -> tuple[Tensor, list[Tensor]]:
    """A patch of an image (C, *S) and of labels (*S), augmented by what `rng` draws.

    Args:
        start: of the patch, which may lie outside; labels there are `IGNORE`, intensities 0.
        size: of the patch.
        augment: "none", "flip" or "full".
        flips: axes that may be reversed.
    """
    full = augment == "full"
    if full and rng.random() < 0.5:
        image, labels = _turned(image, labels, start, size, rng)
    else:
        image = crop(image, start, size, 0.0)
        labels = [crop(one, start, size, IGNORE) for one in labels]
    if augment != "none":
        for axis in flips:
            if rng.random() < 0.5:
                image = image.flip(axis + 1)
                labels = [one.flip(axis) for one in labels]
    if full:
        image = _brightened(image, rng)
    return image, labels


def _turned(
    image: Tensor, labels: Sequence[Tensor], start: Sequence[int], size: Sequence[int], rng: np.random.Generator
) -> tuple[Tensor, list[Tensor]]:
    """The patch turned and zoomed around its middle, resampled once from a larger one.

    In torch itself: MONAI's transforms have a cost of their own that small patches notice.
    """
    ndim = len(size)
    zoom = float(np.exp(rng.uniform(-np.log(_ZOOM), np.log(_ZOOM))))
    turn = _rotation(rng.uniform(-_TURN[ndim], _TURN[ndim], 1 if ndim == 2 else 3)) * zoom
    wide = [int(np.ceil(one * _MARGIN / 2)) * 2 + one % 2 for one in size]
    origin = [at - (more - one) // 2 for at, more, one in zip(start, wide, size)]
    # In shares of half an image, last axis first, as torch has it.
    theta = (turn * np.array(size) / np.array(wide)[:, None])[::-1, ::-1]
    theta = np.concatenate([theta, np.zeros((ndim, 1))], axis=1)
    grid = F.affine_grid(torch.from_numpy(theta[None].copy()).float(), [1, 1, *size], align_corners=False)
    found = F.grid_sample(crop(image, origin, wide, 0.0)[None], grid, mode="bilinear", align_corners=False)[0]
    # Shifted, so that what is outside becomes IGNORE.
    shifted = [crop(one, origin, wide, IGNORE)[None, None].float() - IGNORE for one in labels]
    moved = [F.grid_sample(one, grid, mode="nearest", align_corners=False) for one in shifted]
    return found, [(one[0, 0] + IGNORE).round().to(torch.uint8) for one in moved]


def _rotation(angles: np.ndarray) -> np.ndarray:
    """A rotation in the plane, or about the first, the second and the third axis in turn."""
    cos, sin = np.cos(angles), np.sin(angles)
    if len(angles) == 1:
        return np.array([[cos[0], -sin[0]], [sin[0], cos[0]]])
    turn = np.eye(3)
    for axis in range(3):
        one, other = (axis + 1) % 3, (axis + 2) % 3
        step = np.eye(3)
        step[one, one] = step[other, other] = cos[axis]
        step[one, other], step[other, one] = -sin[axis], sin[axis]
        turn = step @ turn
    return turn


def _brightened(image: Tensor, rng: np.random.Generator) -> Tensor:
    """Contrast, brightness and noise, in units of the image's own deviation."""
    scale = float(image.std()) or 1.0
    if rng.random() < 0.3:
        mean = image.mean()
        image = (image - mean) * float(rng.uniform(0.75, 1.25)) + mean
    if rng.random() < 0.3:
        image = image + scale * float(rng.uniform(-0.2, 0.2))
    if rng.random() < 0.15:
        noise = torch.from_numpy(rng.standard_normal(tuple(image.shape), dtype=np.float32))
        image = image + noise * (scale * float(rng.uniform(0, 0.2)))
    return image
