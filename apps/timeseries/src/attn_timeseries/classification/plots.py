"""Figures of classification: confusion, recall by class, and series that went wrong."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
from matplotlib.figure import Figure

from attn_shared import plotting
from attn_shared.task import DataBundle, Picture
from attn_timeseries.classification.data import SeriesSet
from attn_timeseries.classification.metrics import Predictions

if TYPE_CHECKING:
    from attn_timeseries.classification.task import ClassifyTask

_MOST_CHANNELS = 6
_MOST_CLASSES = 30
_WORST = 6


def pictures(task: ClassifyTask, bundle: DataBundle) -> Iterator[Picture]:
    """Everything that the report of a run shows, of the test part."""
    from attn_timeseries.classification.task import simple_predictions

    series = bundle.test
    if not isinstance(series, SeriesSet):
        return
    found = task.predictions(series)
    others = {k: v for k, v in simple_predictions(task.config, bundle).items() if k != "majority"}
    yield Picture(
        name="confusion",
        caption="Test series by true class (row) and predicted class (column): counts, shaded by share of the row.",
        figure=confusion_matrix(found.confusion(), series.classes),
    )
    yield Picture(
        name="recall",
        caption="Share of each class's test series that is found.",
        figure=recall_bars({task.config.model: found, **others}, series.classes),
    )
    wrong = np.flatnonzero(found.said != found.truth)
    if len(wrong):
        worst = wrong[np.argsort(found.probability[wrong, found.truth[wrong]])][:_WORST]
        yield Picture(
            name="errors",
            caption="The test series whose own class the model held least likely, up to "
            f"{_WORST} of {len(wrong):,} mistaken; scaled, the first {_MOST_CHANNELS} channels.",
            figure=mistakes(series, found, worst),
        )


def confusion_matrix(counts: np.ndarray, classes: Sequence[str]) -> Figure:
    """(K, K) counts, true class by row."""
    share = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    side = 1.6 + 0.5 * min(len(classes), 16)
    fig = plotting.figure(side + 0.6, side)
    with plotting.style():
        axes = fig.subplots()
        axes.imshow(share, cmap=plotting.SEQUENTIAL, vmin=0, vmax=1)
        axes.grid(False)
        if len(classes) <= _MOST_CLASSES:
            for row, column in np.ndindex(*counts.shape):
                if counts[row, column]:
                    colour = "#ffffff" if share[row, column] < 0.6 else "#000001"
                    text = f"{counts[row, column]:,}"
                    axes.text(column, row, text, ha="center", va="center", fontsize=8, color=colour)
            axes.set_xticks(range(len(classes)), classes, rotation=30, ha="right")
            axes.set_yticks(range(len(classes)), classes)
        axes.set(xlabel="predicted", ylabel="true")
    return fig


def recall_bars(models: Mapping[str, Predictions], classes: Sequence[str]) -> Figure:
    """Recall of each class, a bar a model."""
    fig = plotting.figure(max(6.0, min(12.0, 1.6 + 0.14 * len(classes) * (len(models) + 1))), 3.1)
    width = 0.84 / len(models)
    with plotting.style():
        axes = fig.subplots()
        for i, (name, found) in enumerate(models.items()):
            counts = found.confusion()
            recall = counts.diagonal() / np.maximum(counts.sum(axis=1), 1)
            places = np.arange(len(classes)) + (i - (len(models) - 1) / 2) * width
            accuracy = float((found.said == found.truth).mean())
            label, colour = f"{name} {accuracy:.3f}", plotting.COLOURS[i % len(plotting.COLOURS)]
            axes.bar(places, recall, 0.92 * width, color=colour, label=label, alpha=1.0 if i == 0 else 0.6)
        axes.set_xticks(range(len(classes)), classes, rotation=30 if max(map(len, classes)) > 3 else 0)
        axes.set(ylabel="recall", ylim=(0, 1), xlabel="class")
        axes.grid(False, axis="x")
        fig.legend(loc="outside upper left", ncols=min(4, len(models)))
    return fig


def mistakes(series: SeriesSet, found: Predictions, index: np.ndarray) -> Figure:
    """A panel for each series: what it is, what was said."""
    columns = min(3, len(index))
    rows = -(-len(index) // columns)
    fig = plotting.figure(3.4 * columns, 2.2 * rows)
    with plotting.style():
        grid = fig.subplots(rows, columns, squeeze=False).ravel()
        for axes, i in zip(grid, index):
            values = series.x[i, : int(series.length[i]), :_MOST_CHANNELS].numpy()
            for c, column in enumerate(values.T):
                axes.plot(column, linewidth=1.0, color=plotting.COLOURS[c % len(plotting.COLOURS)])
            true, said = int(found.truth[i]), int(found.said[i])
            axes.set_title(
                f"{series.names[i]}: {series.classes[true]}, said {series.classes[said]} "
                f"({found.probability[i, said]:.0%})",
                fontsize=8,
                loc="left",
            )
        for axes in grid[len(index) :]:
            axes.set_visible(False)
    return fig
