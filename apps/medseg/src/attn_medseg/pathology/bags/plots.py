"""Figures of classified bags: ROC curve, probabilities by class, and how attention spreads over a bag."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np
import torch
from matplotlib.figure import Figure
from numpy.typing import NDArray

from attn_medseg.pathology.bags import metrics
from attn_medseg.pathology.bags.data import BagSet
from attn_shared import plotting
from attn_shared.task import DataBundle, Picture

if TYPE_CHECKING:
    from attn_medseg.pathology.bags.task import BagsTask

_BAGS = 3


def pictures(task: BagsTask, bundle: DataBundle) -> Iterator[Picture]:
    """Everything that the report of a run shows, of the test part."""
    test, found = bundle.test, task.scored()
    if not isinstance(test, BagSet) or found is None or len(found.label) != len(test):
        return
    if len(task.classes) == 2:
        yield Picture(
            name="roc",
            caption=f"Share of the {task.classes[1]} bags found against the share of the {task.classes[0]} bags "
            "wrongly named, at every threshold. Right: what the model says of the bags of each class.",
            figure=curve(found, task.classes),
        )
    yield Picture(
        name="attention",
        caption="Attention on the instances of the test bags that the model is surest of, the highest first: solid the "
        "bag's, thin each branch's. The dotted line is attention that looks at all instances alike.",
        figure=attention(task, test, found),
    )


def curve(found: metrics.Scored, classes: tuple[str, ...]) -> Figure:
    """ROC curve, and probabilities by class."""
    score, label = found.chance[:, 1], found.label == 1
    order = np.argsort(-score, kind="stable")
    ends = np.flatnonzero(np.diff(score[order], append=-1.0))  # ties rise together
    fig = plotting.figure(8.0, 3.4)
    with plotting.style():
        left, right = fig.subplots(1, 2)
        for ax, kinds in ((left, (label[order], ~label[order])),):
            rises = [np.concatenate([[0], one.cumsum()[ends] / max(1, one.sum())]) for one in kinds]
            ax.plot(rises[1], rises[0], color=plotting.COLOURS[0])
            ax.plot([0, 1], [0, 1], color=plotting.MUTED, linestyle=":")
            ax.set(xlabel=f"{classes[0]} named {classes[1]}", ylabel=f"{classes[1]} found", title="ROC")
        rng = np.random.default_rng(0)
        for kind in range(2):
            own = score[found.label == kind]
            right.scatter(kind + rng.uniform(-0.15, 0.15, len(own)), own, s=12, color=plotting.COLOURS[kind])
        right.set(xticks=[0, 1], xticklabels=classes, ylabel=f"probability of {classes[1]}", title="Test bags")
    return fig


def attention(task: BagsTask, test: BagSet, found: metrics.Scored) -> Figure:
    """Sorted attention of a few bags."""
    chosen = np.argsort(-found.chance[:, -1], kind="stable")[:_BAGS]
    fig = plotting.figure(8.0, 3.0)
    with plotting.style():
        axes = fig.subplots(1, len(chosen), squeeze=False)[0]
        for ax, row in zip(axes, chosen.tolist()):
            bag, branches = weights(task, test, int(found.index[row]))
            order = np.argsort(-bag, kind="stable")
            for one in branches if len(branches) > 1 else ():
                ax.plot(np.arange(len(bag)), one[order], color=plotting.MUTED, linewidth=0.8)
            ax.plot(np.arange(len(bag)), bag[order], color=plotting.COLOURS[0])
            ax.axhline(1 / len(bag), color=plotting.MUTED, linestyle=":")
            ax.set(xlabel="instance", title=test.bags[int(found.index[row])].name)
        axes[0].set_ylabel("attention")
    return fig


def weights(task: BagsTask, part: BagSet, index: int) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """(N,) attention of a bag and (M, N) of its branches."""
    batch = {name: value.to(task.device) for name, value in part.__getitems__([index]).items()}
    with torch.no_grad():
        output = task.output(batch)
    return output.attention[0].float().cpu().numpy(), output.weights[0].float().cpu().numpy()
