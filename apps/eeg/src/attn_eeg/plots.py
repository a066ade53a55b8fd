"""Figures of EEG classification: subjects, confusion, attention between electrodes, and where on the head the bands
differ.

Heads are seen from above, nose up. Electrodes without a place in the 10-05 system are left out of heads.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from matplotlib.figure import Figure
from matplotlib.patches import Circle

from attn_eeg.data.channels import standard_montage
from attn_eeg.data.windows import WindowSet
from attn_eeg.metrics import Predictions
from attn_shared import plotting
from attn_shared.task import DataBundle, Picture
from core_attn import capture

if TYPE_CHECKING:
    from attn_eeg.task import EegTask

_MOST_SUBJECTS = 60
_MOST_WINDOWS = 512
_LEAST_PLACES = 4
_LINES = 24
_RIM = ("Fpz", "Oz", "T7", "T8")
DIVERGING = "RdBu_r"


def pictures(task: EegTask, bundle: DataBundle) -> Iterator[Picture]:
    """Everything that the report of a run shows, of the test part."""
    from attn_eeg.task import band_features, simple_predictions

    windows = bundle.test
    if not isinstance(windows, WindowSet):
        return
    found = task.predictions(windows)
    others = {}
    if bundle.train is not None:
        others = {k: v for k, v in simple_predictions(task.config, bundle).items() if k != "majority"}
    yield Picture(
        name="subjects",
        caption="Accuracy of each test subject's windows, the worst first; the lines are the means over subjects.",
        figure=subject_bars({task.config.model: found, **others}, windows.subjects),
    )
    yield Picture(
        name="confusion",
        caption="Test windows by true class (row) and predicted class (column): counts, and shares of the row.",
        figure=confusion_matrix(found.confusion(), windows.classes),
    )
    weights = electrode_attention(task, windows)
    if weights is not None:
        yield Picture(
            name="electrodes",
            caption="Attention between electrodes, mean over test windows, heads and layers. Left: a row for each "
            "electrode that reads, a column for each that is read. Right: the disc of an electrode is as large as "
            f"what all others read of it; the {_LINES} strongest pairs are lines. Evenly spread it would be "
            f"1/{len(weights)} everywhere.",
            figure=attention_head(weights, windows.channels),
        )
    maps = band_maps(task, windows if windows.features else None)
    if not windows.features and bundle.train is not None:
        prepared = band_features(task.config)
        assert prepared.test is not None
        maps = {"data": class_differences(prepared.test)}
        windows = prepared.test
    if maps and len(placed(windows.channels)) >= _LEAST_PLACES:
        model = " Below: what the model makes of it, the mean gradient of the same log-odds." if "model" in maps else ""
        first, last = windows.classes[0], windows.classes[-1]
        yield Picture(
            name="bands",
            caption=f"Band by band, where the test windows of {last!r} have more (red) or less (blue) than those of "
            f"{first!r}, in standard deviations of training.{model}",
            figure=topomaps(maps, windows.channels, windows.features, f"{last} - {first}"),
        )


# -- what is drawn ----------------------------------------------------------------------------------------------------


@torch.no_grad()
def electrode_attention(task: EegTask, windows: WindowSet) -> np.ndarray | None:
    """(C, C) attention of each electrode (row) to each (column), mean over windows, heads and layers.

    None where the model has no attention between electrodes, or its mechanism no maps.
    """
    channels, count, total = len(windows.channels), 0, np.zeros(())
    task.eval()
    for index in _sample(windows):
        batch = task.here(windows.__getitems__(index))
        try:
            with capture(task.network) as maps:
                task.forward_batch(batch)
        except ValueError:
            return None
        found = [maps[name].double().mean(dim=(0, 1)).cpu().numpy() for name in maps]
        found = [one for one in found if one.shape == (channels, channels)]
        if not found:
            return None
        total = total + np.mean(found, axis=0) * len(index)
        count += len(index)
    return np.asarray(total / count)


def class_differences(windows: WindowSet) -> np.ndarray:
    """(C, F) mean features of the last class less those of the first."""
    x, y = windows.arrays()
    x = x.reshape(len(x), *windows.shape).astype(np.float64)
    first, last = y == 0, y == len(windows.classes) - 1
    if not first.any() or not last.any():
        return np.zeros(windows.shape)
    return np.asarray(x[last].mean(axis=0) - x[first].mean(axis=0))


def band_maps(task: EegTask, windows: WindowSet | None) -> dict[str, np.ndarray]:
    """ "data": `class_differences`; "model": mean gradient of the log-odds of last to first class; each (C, F)."""
    if windows is None:
        return {}
    task.eval()
    total, count = np.zeros(windows.shape), 0
    for index in _sample(windows):
        batch = task.here(windows.__getitems__(index))
        with torch.enable_grad():
            x = batch["x"].requires_grad_()
            logits = task.forward_batch({**batch, "x": x})
            (gradient,) = torch.autograd.grad((logits[:, -1] - logits[:, 0]).sum(), x)
        total += gradient.double().sum(dim=0).cpu().numpy()
        count += len(index)
    return {"data": class_differences(windows), "model": total / count}


def _sample(windows: WindowSet) -> Iterator[list[int]]:
    """Batches of at most `_MOST_WINDOWS` windows in all, spread over the set."""
    chosen = np.unique(np.linspace(0, len(windows) - 1, min(len(windows), _MOST_WINDOWS)).astype(np.int64)).tolist()
    for first in range(0, len(chosen), 128):
        yield chosen[first : first + 128]


# -- figures ----------------------------------------------------------------------------------------------------------


def subject_bars(models: Mapping[str, Predictions], subjects: Sequence[str]) -> Figure:
    """Accuracy of each subject, a bar a model; the first model orders the subjects."""
    numbers, accuracy = next(iter(models.values())).by_subject()
    order = np.argsort(accuracy, kind="stable")[:_MOST_SUBJECTS]
    fig = plotting.figure(max(6.5, min(12.0, 1.6 + 0.35 * len(order) * len(models) ** 0.5)), 3.1)
    width = 0.8 / len(models)
    with plotting.style():
        axes = fig.subplots()
        for i, (name, found) in enumerate(models.items()):
            colour = plotting.COLOURS[i % len(plotting.COLOURS)]
            own, values = found.by_subject()
            value = dict(zip(own.tolist(), values.tolist()))
            heights = [value[int(number)] for number in numbers[order]]
            places = np.arange(len(order)) + (i - (len(models) - 1) / 2) * width
            sd = f" ± {values.std(ddof=1):.3f}" if len(values) > 1 else ""
            label = f"{name} {values.mean():.3f}{sd}"
            bars = axes.bar(places, heights, 0.92 * width, color=colour, label=label, alpha=1.0 if i == 0 else 0.6)
            if i == 0 and len(order) <= 20:
                axes.bar_label(bars, fmt="%.2f", fontsize=7, color=colour)
            axes.axhline(values.mean(), color=colour, linewidth=1.0, linestyle="--")
        axes.set_xticks(range(len(order)), [subjects[int(n)] for n in numbers[order]], rotation=60, ha="right")
        axes.tick_params(axis="x", labelsize=8)
        axes.set(ylabel="accuracy", ylim=(0, 1))
        axes.grid(False, axis="x")
        fig.legend(loc="outside upper left", ncols=len(models))
    return fig


def confusion_matrix(counts: np.ndarray, classes: Sequence[str]) -> Figure:
    """(K, K) counts, true class by row."""
    share = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    side = 1.7 + 0.8 * min(len(classes), 10)
    fig = plotting.figure(side + 0.8, side)
    with plotting.style():
        axes = fig.subplots()
        axes.imshow(share, cmap=plotting.SEQUENTIAL, vmin=0, vmax=1)
        axes.grid(False)
        for row, column in np.ndindex(*counts.shape):
            axes.text(
                column,
                row,
                f"{counts[row, column]:,}\n{share[row, column]:.0%}",
                ha="center",
                va="center",
                fontsize=9 if len(classes) < 6 else 7,
                color="#ffffff" if share[row, column] < 0.6 else "#000001",
            )
        axes.set_xticks(range(len(classes)), classes, rotation=30, ha="right")
        axes.set_yticks(range(len(classes)), classes)
        axes.set(xlabel="predicted", ylabel="true")
    return fig


def attention_head(weights: np.ndarray, channels: Sequence[str]) -> Figure:
    """(C, C) attention as a matrix and, where the electrodes' places are known, on a head."""
    where = placed(channels)
    on_head = len(where) >= _LEAST_PLACES
    fig = plotting.figure(9.4 if on_head else 5.2, 4.6)
    with plotting.style():
        grid = fig.subplots(1, 2 if on_head else 1, squeeze=False)[0]
        image = grid[0].imshow(weights, cmap=plotting.SEQUENTIAL, interpolation="nearest")
        grid[0].grid(False)
        size = 8 if len(channels) <= 24 else 5
        grid[0].set_xticks(range(len(channels)), channels, rotation=90, fontsize=size)
        grid[0].set_yticks(range(len(channels)), channels, fontsize=size)
        grid[0].set(xlabel="is read", ylabel="reads")
        fig.colorbar(image, ax=grid[0], shrink=0.8)
        if on_head:
            _draw_pairs(grid[1], weights, channels, where)
    return fig


def _draw_pairs(axes: Any, weights: np.ndarray, channels: Sequence[str], where: Mapping[str, np.ndarray]) -> None:
    _outline(axes)
    known = [i for i, name in enumerate(channels) if name in where]
    both = (weights + weights.T) / 2
    pairs = sorted(((both[i, j], i, j) for a, i in enumerate(known) for j in known[a + 1 :]), reverse=True)[:_LINES]
    least, most = (pairs[-1][0], pairs[0][0]) if pairs else (0.0, 1.0)
    for value, i, j in reversed(pairs):
        strength = (value - least) / (most - least) if most > least else 1.0
        line = np.stack([where[channels[i]], where[channels[j]]])
        axes.plot(*line.T, color=plotting.COLOURS[0], linewidth=0.6 + 3.4 * strength, alpha=0.25 + 0.65 * strength)
    others = weights.copy()
    np.fill_diagonal(others, 0.0)
    taken = others.sum(axis=0) / max(len(channels) - 1, 1)
    for i in known:
        size = 420 * taken[i] / max(float(taken.max()), 1e-12)
        axes.scatter(*where[channels[i]], s=size, color=plotting.COLOURS[1], zorder=3, linewidths=0)
        axes.annotate(channels[i], where[channels[i]], ha="center", va="center", fontsize=7, zorder=4)


def _outline(axes: Any) -> None:
    axes.add_patch(Circle((0, 0), 1.0, fill=False, color=plotting.MUTED, linewidth=1.2))
    axes.plot([-0.12, 0, 0.12], [0.993, 1.13, 0.993], color=plotting.MUTED, linewidth=1.2)
    axes.set(xlim=(-1.2, 1.2), ylim=(-1.2, 1.25), aspect="equal")
    axes.set_axis_off()


def topomaps(maps: Mapping[str, np.ndarray], channels: Sequence[str], bands: Sequence[str], label: str = "") -> Figure:
    """Rows of `maps`, each (C, F), as one head a band, drawn by MNE."""
    import mne

    where = placed(channels)
    known = [i for i, name in enumerate(channels) if name in where]
    place = np.stack([where[channels[i]] for i in known])
    fig = plotting.figure(1.2 + 2.1 * len(bands), 0.5 + 2.1 * len(maps))
    with plotting.style():
        grid = fig.subplots(len(maps), len(bands), squeeze=False)
        for number, (row, (name, values)) in enumerate(zip(grid, maps.items())):
            limit = float(np.abs(values[known]).max()) or 1.0
            for column, (axes, band) in enumerate(zip(row, bands)):
                image, _ = mne.viz.plot_topomap(
                    values[known, column],
                    place,
                    axes=axes,
                    cmap=DIVERGING,
                    vlim=(-limit, limit),
                    sphere=(0.0, 0.0, 0.0, 1.0),
                    contours=4,
                    show=False,
                )
                axes.set_title("" if number else band, loc="center")
            row[0].set_ylabel(name)
            fig.colorbar(image, ax=row.tolist(), shrink=0.7, label=label if name == "data" else "log-odds per sd")
    return fig


@functools.cache
def _montage() -> dict[str, np.ndarray]:
    """Lower-case name -> (x, y) on a head of radius 1, seen from above: angles from the vertex become distances."""
    places = standard_montage().get_positions()["ch_pos"]
    # The head's middle is the centre of the sphere that fits these best.
    fitted = np.stack([places[name] for name in (*_RIM, "Cz", "C3", "C4", "Fz", "Pz")])
    middle = np.linalg.lstsq(np.c_[2 * fitted, np.ones(len(fitted))], (fitted**2).sum(axis=1), rcond=None)[0][:3]
    found = {}
    for name, position in places.items():
        x, y, z = position - middle
        found[name.lower()] = np.arctan2(np.hypot(x, y), z) * np.array([x, y]) / max(np.hypot(x, y), 1e-9)
    rim = np.mean([np.hypot(*found[name.lower()]) for name in _RIM])
    return {name: 0.9 * place / rim for name, place in found.items()}


def placed(channels: Sequence[str]) -> dict[str, np.ndarray]:
    """(x, y) of those electrodes whose place is known; the ring of Fpz, T7, Oz and T8 lies at distance 0.9."""
    montage = _montage()
    return {name: montage[name.lower()] for name in channels if name.lower() in montage}
