"""Figures of survival: the curves of patients said to be at high and at low risk, and what groups of genes read."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np
import torch
from matplotlib.figure import Figure

from attn_medseg.pathology.survival import metrics
from attn_medseg.pathology.survival.data import PatientSet
from attn_medseg.pathology.survival.estimates import kaplan_meier
from attn_shared import plotting
from attn_shared.task import DataBundle, Picture

if TYPE_CHECKING:
    from attn_medseg.pathology.survival.task import SurvivalTask


def pictures(task: SurvivalTask, bundle: DataBundle) -> Iterator[Picture]:
    """Everything that the report of a run shows, of the test part."""
    test, found = bundle.test, task.scored()
    if not isinstance(test, PatientSet) or found is None or len(found.time) != len(test):
        return
    yield Picture(
        name="survival",
        caption="Kaplan-Meier curves of the test patients with the higher and the lower half of the predicted risks; "
        "dotted: the mean of the curves that the model predicts for them. Ticks are patients lost to follow-up.",
        figure=halves(task, found),
    )
    figure = reading(task, test, found)
    if figure is not None:
        yield Picture(
            name="coattention",
            caption="How much each group of genes reads of each patch, in the test patient of the highest risk: "
            "patches ordered by their mean; 1 is reading all alike.",
            figure=figure,
        )


def halves(task: SurvivalTask, found: metrics.Scored) -> Figure:
    """Curves of both halves by risk."""
    grid = np.linspace(0, float(found.time.max()), 200)
    high = found.risk > np.median(found.risk)
    fig = plotting.figure(7.0, 3.6)
    with plotting.style():
        ax = fig.subplots()
        for colour, name, rows in zip(plotting.COLOURS, ("lower", "higher"), (~high, high)):
            if not rows.any():
                continue
            curve = kaplan_meier(found.time[rows], found.event[rows])
            ax.plot(grid, curve(grid), color=colour, label=f"{name} risk, {int(rows.sum())} patients")
            lost = found.time[rows & ~found.event]
            ax.plot(lost, curve(lost), "|", color=colour)
            said = metrics.curves(found.survival[rows], task.data_state["edges"], grid)
            ax.plot(grid, said.mean(axis=0), ":", color=colour)
        ax.set(xlabel="time", ylabel="without the event", ylim=(0, 1.02))
        ax.legend()
    return fig


def reading(task: SurvivalTask, test: PatientSet, found: metrics.Scored) -> Figure | None:
    """Shares of patches of one patient; None where the model reads no slides."""
    index = int(found.index[int(found.risk.argmax())])
    batch = {name: value.to(task.device) for name, value in test.__getitems__([index]).items()}
    with torch.no_grad():
        attention = task.output(batch).attention
    if attention is None:
        return None
    shares = attention[0].double().cpu().numpy()
    shares = shares / np.maximum(shares.sum(axis=1, keepdims=True), 1e-30) * shares.shape[1]
    order = np.argsort(-shares.mean(axis=0), kind="stable")
    names = list(task.data_state["groups"]) if len(shares) > 1 else ["patches"]
    fig = plotting.figure(7.5, 1.2 + 0.35 * len(shares))
    with plotting.style():
        ax = fig.subplots()
        shown = ax.imshow(shares[:, order], aspect="auto", cmap=plotting.SEQUENTIAL, interpolation="nearest")
        ax.set(yticks=range(len(shares)), yticklabels=names, xlabel="patch", title=test.patients[index].name)
        ax.grid(visible=False)
        fig.colorbar(shown, ax=ax)
    return fig
