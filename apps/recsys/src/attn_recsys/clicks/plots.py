"""Figures of predicted clicks: is the level right, and for whom is the order right."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

import numpy as np
from matplotlib.figure import Figure

from attn_recsys.clicks import metrics
from attn_recsys.clicks.baselines import fitted, scored
from attn_recsys.clicks.data import ClicksSet
from attn_shared import plotting
from attn_shared.task import DataBundle, Picture

if TYPE_CHECKING:
    from attn_recsys.clicks.task import ClicksTask

_SHOWN = ("logistic regression", "gradient boosting")


def pictures(task: ClicksTask, bundle: DataBundle) -> Iterator[Picture]:
    """Everything that the report of a run shows, of the test part."""
    test, own = bundle.test, task.rows()
    if not isinstance(test, ClicksSet) or own is None or len(own.label) != len(test):
        return
    simple = {one.name: scored(test, one.odds) for one in fitted(bundle) if one.name in _SHOWN}
    models = {task.config.model: own, **simple}
    yield Picture(
        name="calibration",
        caption="Share of clicks against the mean probability, in bins of equally many test rows; on the diagonal the "
        "probabilities are right. Bars span 95 % intervals of a share; below, how the probabilities are spread.",
        figure=calibration(models, task.options.bins),
    )
    groups = metrics.row_groups(own, task.options.groups)
    if groups:
        what = "earlier items" if test.past is not None else "clicks in training"
        yield Picture(
            name="activity",
            caption=f"AUC of the test rows of users with few and with many {what}.",
            figure=activity(models, groups),
        )


def calibration(models: Mapping[str, metrics.Rows], bins: int) -> Figure:
    """Curves, the first model in colour; below the histogram of its probabilities."""
    fig = plotting.figure(6.4, 5.2)
    with plotting.style():
        upper, lower = fig.subplots(2, 1, height_ratios=(3, 1), sharex=True)
        top = 0.0
        for number, (name, rows) in enumerate(models.items()):
            curve = metrics.calibration(rows.probability, rows.label, bins)
            share = curve.happened
            spread = 1.96 * np.sqrt(np.maximum(share * (1 - share), 1e-12) / curve.rows)
            upper.errorbar(
                curve.predicted,
                share,
                yerr=spread if number == 0 else None,
                marker="o",
                markersize=4,
                color=plotting.COLOURS[number % len(plotting.COLOURS)],
                alpha=1.0 if number == 0 else 0.75,
                linewidth=1.8 if number == 0 else 1.2,
                label=f"{name} (ECE {curve.error:.3f})",
            )
            top = max(top, float(curve.predicted.max()), float((share + spread).max()))
        top = min(1.0, 1.05 * top)
        upper.plot([0, top], [0, top], color=plotting.MUTED, linewidth=1, linestyle="--")
        upper.set(ylabel="share of clicks", ylim=(0, top), xlim=(0, top))
        upper.legend()
        first = next(iter(models.values()))
        for value, label, colour in ((0, "not clicked", plotting.MUTED), (1, "clicked", plotting.COLOURS[0])):
            chosen = first.probability[first.label == value]
            lower.hist(chosen, bins=40, range=(0, top), color=colour, alpha=0.6, label=label)
        lower.set(xlabel="probability of a click", ylabel="rows")
        lower.legend()
    return fig


def activity(models: Mapping[str, metrics.Rows], groups: list[tuple[str, np.ndarray]]) -> Figure:
    """A bar a model and group."""
    fig = plotting.figure(8.5, 3.2)
    with plotting.style():
        axes = fig.subplots()
        width = 0.8 / len(models)
        lowest = 1.0
        for number, (name, rows) in enumerate(models.items()):
            place = np.arange(len(groups)) + (number - (len(models) - 1) / 2) * width
            values = [metrics.auc(rows.odds[chosen], rows.label[chosen]) for _, chosen in groups]
            lowest = min(lowest, *values)
            axes.bar(
                place,
                values,
                width * 0.92,
                color=plotting.COLOURS[0] if number == 0 else plotting.MUTED,
                alpha=1.0 if number == 0 else 0.45 + 0.25 * number,
                label=name,
            )
        labels = [f"{label}\n({int(chosen.sum()):,} rows)" for label, chosen in groups]
        axes.set_xticks(np.arange(len(groups)), labels)
        axes.set(ylabel="AUC", ylim=(max(0.0, min(0.5, lowest - 0.02)), 1.0))
        axes.grid(visible=False, axis="x")
        axes.legend(loc="lower left", bbox_to_anchor=(0.0, 1.0), ncols=len(models))
    return fig
