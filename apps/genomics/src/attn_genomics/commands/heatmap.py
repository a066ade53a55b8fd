"""The picture of a mutagenesis: letters as high as changes matter, over a heat map of every change."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties
from matplotlib.patches import PathPatch
from matplotlib.textpath import TextPath
from matplotlib.transforms import Affine2D

from attn_genomics.tokens import BASES
from attn_shared import plotting

_ROW = 80
"""Bases of a line."""
_LETTERS = 1200
"""Bases of a sequence that is drawn in letters."""
_COLUMNS = 600
"""Columns of the picture of a longer one."""
_DIVERGING = "RdBu_r"
_PALETTE = dict(zip(BASES, (plotting.COLOURS[2], plotting.COLOURS[0], plotting.COLOURS[5], plotting.COLOURS[6])))


def picture(name: str, letters: str, effects: np.ndarray, positions: Sequence[int], says: str) -> Figure:
    """Effects of every change along a sequence.

    Args:
        name: of the sequence.
        letters: the sequence.
        effects: (L, 4) of A, C, G, T; 0 of the base that is there, NaN of unknown ones.
        positions: (L,) what the horizontal axis calls the bases.
        says: what a score is.
    """
    height = heights(effects)
    title = f"{name}: what a change of one base does\nchange of {says}"
    if len(letters) > _LETTERS:
        return _overview(title, effects, height, positions)
    rows = [range(at, min(at + _ROW, len(letters))) for at in range(0, len(letters), _ROW)]
    width = max(5.0, 1.6 + 0.13 * len(rows[0]))
    fig = plotting.figure(width, 0.7 + 1.75 * len(rows))
    limit = float(np.nanmax(np.abs(effects), initial=0.0)) or 1.0
    low, high = min(0.0, float(height.min(initial=0.0))), max(0.0, float(height.max(initial=0.0)))
    image: Any = None
    with plotting.style():
        fig.suptitle(title, x=0.01, ha="left", fontsize=10)
        axes = fig.subplots(2 * len(rows), 1, squeeze=False, height_ratios=[1.0, 0.8] * len(rows))[:, 0]
        for number, row in enumerate(rows):
            logo, heat = axes[2 * number], axes[2 * number + 1]
            _letters(logo, letters, height, row, len(rows[0]), (low, high or 1.0))
            logo.set_ylabel("mean loss")
            image = _heat(heat, effects[row.start : row.stop], letters[row.start : row.stop], len(rows[0]), limit)
            at = [place for place in range(len(row)) if place % 10 == 0]
            heat.set_xticks(at, [f"{positions[row.start + place]:,}" for place in at])
        bar = fig.colorbar(image, ax=list(axes), fraction=0.03, pad=0.01, aspect=max(12, 14 * len(rows)))
        bar.outline.set_visible(False)
    return fig


def heights(effects: np.ndarray) -> np.ndarray:
    """(L,) how high letters are: by how much the three changes lower the score on average; 0 of unknown bases."""
    known = ~np.isnan(effects).any(axis=1)
    return np.where(known, -np.nan_to_num(effects).sum(axis=1) / 3, 0.0)


def _letters(ax: Axes, letters: str, height: np.ndarray, row: range, columns: int, limits: tuple[float, float]) -> None:
    font = FontProperties(family="DejaVu Sans", weight="bold")
    shapes = {letter: TextPath((0, 0), letter, size=1, prop=font) for letter in BASES}
    for place in row:
        if letters[place] in shapes and height[place]:
            shape = shapes[letters[place]]
            box = shape.get_extents()
            fit = Affine2D().translate(-box.x0, -box.y0).scale(0.9 / box.width, height[place] / box.height)
            fit = fit.translate(place - row.start - 0.45, 0)
            ax.add_patch(PathPatch(fit.transform_path(shape), color=_PALETTE[letters[place]], linewidth=0))
    ax.axhline(0, color=plotting.MUTED, linewidth=0.7)
    ax.set_xlim(-0.5, columns - 0.5)
    ax.set_ylim(*limits)
    ax.set_xticks([])
    ax.grid(visible=False)
    ax.spines["bottom"].set_visible(False)


def _heat(ax: Axes, effects: np.ndarray, letters: str, columns: int, limit: float) -> Any:
    image = ax.imshow(effects.T, cmap=_DIVERGING, vmin=-limit, vmax=limit, aspect="auto", interpolation="nearest")
    there = [place for place, letter in enumerate(letters) if letter in BASES]
    ax.scatter(there, [BASES.index(letters[place]) for place in there], s=5, color=plotting.INK, linewidths=0)
    _base_axis(ax)
    ax.set_xlim(-0.5, columns - 0.5)
    return image


def _base_axis(ax: Axes) -> None:
    ax.set_yticks(range(4), list(BASES))
    ax.tick_params(length=0)
    ax.grid(visible=False)
    for spine in ax.spines.values():
        spine.set_visible(False)


def _overview(title: str, effects: np.ndarray, height: np.ndarray, positions: Sequence[int]) -> Figure:
    """A long sequence: of each stretch the change of every base that does most."""
    edges = np.linspace(0, len(effects), min(_COLUMNS, len(effects)) + 1).astype(int)
    stretches = [np.nan_to_num(effects[a:b]) for a, b in pairwise(edges)]
    most = np.stack([np.take_along_axis(part, np.abs(part).argmax(axis=0)[None], 0)[0] for part in stretches])
    mean = [float(height[a:b].mean()) for a, b in pairwise(edges)]
    limit = float(np.abs(most).max(initial=0.0)) or 1.0
    fig = plotting.figure(12, 4)
    with plotting.style():
        fig.suptitle(title, x=0.01, ha="left", fontsize=10)
        line, heat = fig.subplots(2, 1, sharex=True)
        line.fill_between(range(len(mean)), mean, color=plotting.COLOURS[0], linewidth=0)
        line.set_ylabel("mean loss")
        image = heat.imshow(most.T, cmap=_DIVERGING, vmin=-limit, vmax=limit, aspect="auto", interpolation="nearest")
        _base_axis(heat)
        at = list(range(0, len(mean), 100))
        heat.set_xticks(at, [f"{positions[edges[place]]:,}" for place in at])
        bar = fig.colorbar(image, ax=[line, heat], fraction=0.03, pad=0.01)
        bar.outline.set_visible(False)
    return fig
