"""Pictures of segmented images: planes through volumes with contours of the structures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.colors import to_rgba
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from numpy.typing import NDArray

from attn_shared import plotting

_HEIGHT = 3.0  # inches of a plane
_WIDEST = 2.2  # widths of a plane, in heights


@dataclass(frozen=True, kw_only=True)
class Shown:
    """An image, and what is drawn over it.

    Attributes:
        image: (C, *axes) in the file's axes.
        labels: (*axes) predicted labels.
        truth: (*axes) true ones, where they are known.
        affine: RAS affine; None where there is none.
        slices: axis along which the image is a stack of pictures; -1 = it is none.
    """

    image: NDArray[np.generic]
    labels: NDArray[np.uint8]
    truth: NDArray[np.uint8] | None = None
    affine: NDArray[np.float64] | None = None
    slices: int = -1


@dataclass(frozen=True)
class Plane:
    """One picture: its name, grey or colour values, predicted and true labels, height of a voxel over its width."""

    title: str
    values: NDArray[np.float32]
    labels: NDArray[np.uint8]
    truth: NDArray[np.uint8] | None
    aspect: float


def colour(structure: int) -> str:
    """Of a structure, counted from 1."""
    return plotting.COLOURS[(structure + 1) % len(plotting.COLOURS)]


def planes(shown: Shown) -> list[Plane]:
    """A picture as it is, three pictures of a stack, or the three planes through the structures of a volume.

    Volumes with an affine are shown as radiologists see them: the patient's right is on the left, front and head up.
    """
    # Scores and labels share the image's grid; the first channel stands for all but colours.
    image = np.asarray(shown.image, np.float32)
    if image.ndim == 3:
        return [Plane("", _grey(image), shown.labels, shown.truth, 1.0)]
    layers: list[NDArray[Any]] = [image[0], shown.labels, *([shown.truth] if shown.truth is not None else [])]
    slices, spacing = shown.slices, np.ones(3)
    known = shown.affine is not None
    if shown.affine is not None:
        layers, spacing, slices = _canonical(layers, shown.affine, slices)
    marked = layers[1] > 0
    if shown.truth is not None:
        marked = marked | (layers[2] > 0)
    if slices >= 0:
        at = [(slices, number) for number in _three(marked, slices)]
    else:
        at = [(axis, _fullest(marked, axis)) for axis in (2, 1, 0)]
    return [_plane(layers, axis, number, spacing, known) for axis, number in at]


def overlay(shown: Shown, structures: Sequence[str], title: str = "") -> Figure:
    """Planes with the predicted structures filled and outlined; true outlines, where known, are white and dashed."""
    parts = planes(shown)
    widths = [min(_WIDEST, part.values.shape[1] / (part.values.shape[0] * part.aspect)) for part in parts]
    names = [name for number, name in enumerate(structures, 1) if _has(shown, number)]
    fig = plotting.figure(max(2.6, _HEIGHT * sum(widths)), _HEIGHT + 0.75)
    with plotting.style():
        axes = np.atleast_1d(fig.subplots(1, len(parts), width_ratios=widths))
        for ax, part in zip(axes, parts):
            draw(ax, part)
        lines = [Line2D([], [], color=colour(list(structures).index(name) + 1), label=name) for name in names]
        if shown.truth is not None:
            lines.append(Line2D([], [], color=plotting.MUTED, linestyle="--", label="true"))
        if lines:
            fig.legend(handles=lines, loc="outside lower center", ncols=min(6, len(lines)))
        if title:
            fig.suptitle(title, x=0.01, ha="left", fontsize=10.5, fontweight="bold")
    return fig


def draw(ax: Any, part: Plane) -> None:
    """One plane into axes."""
    shape = part.labels.shape
    ax.imshow(part.values, cmap="gray", aspect=part.aspect, interpolation="nearest")
    tint = np.zeros((*shape, 4))
    for number in np.unique(part.labels[part.labels > 0]).tolist():
        tint[part.labels == number] = to_rgba(colour(number), 0.28)
    ax.imshow(tint, aspect=part.aspect, interpolation="nearest")
    for number in np.unique(part.labels[part.labels > 0]).tolist():
        _outline(ax, part.labels == number, colors=[colour(number)], linewidths=1.4)
    if part.truth is not None:
        for number in np.unique(part.truth[part.truth > 0]).tolist():
            _outline(ax, part.truth == number, colors=["white"], linewidths=1.0, linestyles="--")
    ax.set(xticks=[], yticks=[], title=part.title)
    ax.grid(visible=False)
    for side in ax.spines.values():
        side.set_visible(False)


def _outline(ax: Any, mask: NDArray[np.bool_], **look: Any) -> None:
    if min(mask.shape) < 2 or mask.all():
        return
    ax.contour(mask.astype(np.float32), levels=[0.5], **look)


def _has(shown: Shown, number: int) -> bool:
    return bool((shown.labels == number).any() or (shown.truth is not None and (shown.truth == number).any()))


def _grey(image: NDArray[np.float32]) -> NDArray[np.float32]:
    """(C, H, W) -> (H, W), or (H, W, 3) of colours, between 0 and 1 by the image's own percentiles."""
    values = image.transpose(1, 2, 0) if len(image) == 3 else image[0]
    return _stretched(values)


def _stretched(values: NDArray[np.float32]) -> NDArray[np.float32]:
    low, high = np.percentile(values, (0.5, 99.5))
    return np.clip((values - low) / max(float(high - low), 1e-12), 0, 1).astype(np.float32)


def _canonical(
    layers: list[NDArray[Any]], affine: NDArray[np.float64], slices: int
) -> tuple[list[NDArray[Any]], NDArray[np.float64], int]:
    """Layers with axes to the right, front and head, their spacing, and where the axis of a stack went."""
    from nibabel.orientations import apply_orientation, io_orientation

    turn = io_orientation(affine)
    spacing = np.linalg.norm(affine[:3, :3], axis=0)
    if np.isnan(turn).any():
        return layers, spacing, slices
    moved = np.empty(3)
    moved[turn[:, 0].astype(int)] = spacing
    made = [np.asarray(apply_orientation(layer, turn)) for layer in layers]
    return made, moved, int(turn[slices, 0]) if slices >= 0 else -1


def _plane(layers: Sequence[NDArray[Any]], axis: int, number: int, spacing: NDArray[np.float64], known: bool) -> Plane:
    cut = [layer.take(number, axis=axis) for layer in layers]
    first, second = (one for one in range(3) if one != axis)
    aspect = float(spacing[first] / spacing[second])
    title = f"slice {number + 1}"
    if known:
        # Axes (first, second) become columns and rows; rows begin at the head or front, columns at the patient's right.
        cut = [part.T[::-1, ::-1] if first == 0 else part.T[::-1] for part in cut]
        aspect = 1 / aspect
        title = f"{('sagittal', 'coronal', 'axial')[axis]} {number + 1}"
    values = np.asarray(cut[0], np.float32)
    return Plane(title, _stretched(values), cut[1], cut[2] if len(cut) > 2 else None, aspect)


def _fullest(marked: NDArray[np.bool_], axis: int) -> int:
    """The plane with most of the structures, else the middle one."""
    count = marked.sum(axis=tuple(one for one in range(3) if one != axis))
    return int(count.argmax()) if count.any() else marked.shape[axis] // 2


def _three(marked: NDArray[np.bool_], axis: int) -> list[int]:
    """A quarter, half and three quarters through what is marked."""
    there = np.flatnonzero(marked.any(axis=tuple(one for one in range(3) if one != axis)))
    low, high = (int(there[0]), int(there[-1])) if len(there) else (0, marked.shape[axis] - 1)
    return sorted({round(low + share * (high - low)) for share in (0.2, 0.5, 0.8)})
