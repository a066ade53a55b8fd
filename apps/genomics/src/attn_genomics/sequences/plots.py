"""Figures of classified sequences."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from matplotlib.figure import Figure

from attn_genomics.sequences import metrics
from attn_genomics.sequences.baselines import fitted
from attn_genomics.tokens import BASES, N
from attn_shared import plotting
from attn_shared.task import DataBundle, Picture

if TYPE_CHECKING:
    from attn_genomics.sequences.task import SequencesTask

_SHOWN = ("k-mer counts", "k-mer counts by place")
_LONGEST = 400  # bases of a sequence whose every base is shown
_EXAMPLES = 3


def pictures(task: SequencesTask, bundle: DataBundle) -> Iterator[Picture]:
    """Everything that the report of a run shows, of the test part."""
    test: Any = bundle.test
    own = task.rows()
    if test is None or own is None or len(own.label) != len(test):
        return
    simple = {one.name: metrics.Rows(one.score, own.label) for one in fitted(bundle) if one.name in _SHOWN}
    models = {task.config.model: own, **simple}
    if own.classes == 2 and 0 < own.label.sum() < len(own.label):
        yield Picture(
            name="curves",
            caption=f"How many sequences of class {task.classes[1]} are found at what price: false alarms (left) and "
            "precision (right), as the probability that counts as a yes falls.",
            figure=curves(models),
        )
    yield Picture(
        name="calibration",
        caption="How often the likeliest class is right against its probability, in bins of equal width; on the "
        "diagonal probabilities are right. Bars span 95 % intervals; below, how many sequences are how sure.",
        figure=calibration(models),
    )
    if own.classes > 2:
        yield Picture(
            name="confusion",
            caption="True classes by row, predicted ones by column, in shares of the true class.",
            figure=confusion(own, task.classes),
        )
    if test.__getitems__([0])["tokens"].shape[1] <= _LONGEST:
        yield Picture(
            name="saliency",
            caption="What counts in the test sequences that the model is surest of and right about: height is how much "
            "the difference in log probability between its class and the next would fall if the base were hidden; what "
            "points down speaks against the class.",
            figure=saliency(task, test, own),
        )


def curves(models: Mapping[str, metrics.Rows]) -> Figure:
    """ROC and precision-recall curves, the first model in front."""
    fig = plotting.figure(8.6, 4.0)
    with plotting.style():
        left, right = fig.subplots(1, 2)
        for number, (name, rows) in enumerate(models.items()):
            score = rows.score[:, 1] - rows.score[:, 0]
            order = np.argsort(-score, kind="stable")
            last = np.flatnonzero(np.append(np.diff(score[order]) != 0, True))
            hits, taken = np.cumsum(rows.label[order] == 1)[last], last + 1
            recall = hits / hits[-1]
            alarms = (taken - hits) / max(1, (taken - hits)[-1])
            found = metrics.figures(rows)
            look: dict[str, Any] = {
                "color": plotting.COLOURS[number],
                "linewidth": 2.0 if number == 0 else 1.2,
                "alpha": 1.0 if number == 0 else 0.8,
                "zorder": 5 - number,
            }
            left.plot(np.append(0, alarms), np.append(0, recall), label=f"{name} ({found['auroc']:.3f})", **look)
            right.step(recall, hits / taken, where="pre", label=f"{name} ({found['auprc']:.3f})", **look)
        share = float((next(iter(models.values())).label == 1).mean())
        left.plot([0, 1], [0, 1], color=plotting.MUTED, linewidth=1, linestyle="--")
        right.axhline(share, color=plotting.MUTED, linewidth=1, linestyle="--")
        left.set(xlabel="false alarms", ylabel="found", xlim=(0, 1), ylim=(0, 1.01), title="ROC (area)")
        right.set(xlabel="found", ylabel="precision", xlim=(0, 1), ylim=(0, 1.01), title="Precision-recall (area)")
        left.legend(loc="lower right")
        right.legend(loc="lower left")
    return fig


def calibration(models: Mapping[str, metrics.Rows]) -> Figure:
    """Reliability curves, the first model in colour; below the histogram of its probabilities."""
    fig = plotting.figure(6.4, 5.0)
    with plotting.style():
        upper, lower = fig.subplots(2, 1, height_ratios=(3, 1), sharex=True)
        least = 1.0
        for number, (name, rows) in enumerate(models.items()):
            sure, right = rows.probability.max(axis=1), rows.said == rows.label
            curve = metrics.reliability(sure, right)
            share = curve.happened
            spread = 1.96 * np.sqrt(np.maximum(share * (1 - share), 1e-12) / curve.rows)
            upper.errorbar(
                curve.predicted,
                share,
                yerr=spread if number == 0 else None,
                marker="o",
                markersize=4,
                color=plotting.COLOURS[number],
                alpha=1.0 if number == 0 else 0.75,
                linewidth=1.8 if number == 0 else 1.2,
                label=f"{name} (ECE {metrics.figures(rows)['ece']:.3f})",
                zorder=5 - number,
            )
            least = min(least, float(curve.predicted.min()))
        least = max(0.0, least - 0.03)
        upper.plot([least, 1], [least, 1], color=plotting.MUTED, linewidth=1, linestyle="--")
        upper.set(ylabel="share that is right", ylim=(0, 1.03), xlim=(least, 1.01))
        upper.legend(loc="lower right")
        first = next(iter(models.values()))
        sure, right = first.probability.max(axis=1), first.said == first.label
        lower.hist(
            [sure[right], sure[~right]],
            bins=30,
            range=(least, 1.0),
            stacked=True,
            color=[plotting.COLOURS[0], plotting.COLOURS[1]],
            label=["right", "wrong"],
        )
        lower.set(xlabel="probability of the likeliest class", ylabel="sequences")
        lower.legend()
    return fig


def confusion(rows: metrics.Rows, classes: list[str]) -> Figure:
    """Shares of each true class."""
    count = rows.classes
    table = np.bincount(rows.label * count + rows.said, minlength=count**2).reshape(count, count)
    share = table / np.maximum(1, table.sum(axis=1, keepdims=True))
    size = min(9.0, 2.4 + 0.55 * count)
    fig = plotting.figure(size + 0.8, size)
    with plotting.style():
        axes = fig.subplots()
        image = axes.imshow(share, cmap=plotting.SEQUENTIAL, vmin=0, vmax=1)
        for i in range(count if count <= 12 else 0):
            for j in range(count):
                axes.text(
                    j, i, f"{share[i, j]:.2f}", ha="center", va="center", fontsize=8,
                    color="white" if share[i, j] < 0.6 else "black",
                )  # fmt: skip
        axes.set_xticks(range(count), classes, rotation=60, ha="right")
        axes.set_yticks(range(count), classes)
        axes.set(xlabel="predicted", ylabel="true")
        axes.grid(visible=False)
        fig.colorbar(image, ax=axes, shrink=0.8)
    return fig


@torch.no_grad()
def effects(task: SequencesTask, tokens: torch.Tensor, label: int) -> np.ndarray:
    """(L,) how much the margin of class `label` over the likeliest other falls where a base is hidden; tokens (L,)."""
    length = len(tokens)
    rows = tokens.repeat(length + 1, 1)
    rows[torch.arange(length), torch.arange(length)] = N
    found = []
    size = max(1, task.config.trainer.eval_batch_size)
    for first in range(0, length + 1, size):
        part = rows[first : first + size].to(task.device)
        lengths = torch.full((len(part),), length, device=task.device)
        found.append(task.forward_batch({"tokens": part, "lengths": lengths}).double().cpu())
    score = torch.cat(found)
    other = score.clone()
    other[:, label] = -torch.inf
    margin = score[:, label] - other.amax(dim=1)
    return np.asarray((margin[-1] - margin[:-1]).numpy())


def saliency(task: SequencesTask, test: Any, rows: metrics.Rows) -> Figure:
    """The surest right sequences of each class, every base a letter."""
    chosen: list[tuple[int, int]] = []
    per_class = max(1, _EXAMPLES // rows.classes)
    for label in range(min(rows.classes, _EXAMPLES)):
        right = np.flatnonzero((rows.label == label) & (rows.said == label))
        order = right[np.argsort(-rows.score[right, label], kind="stable")]
        chosen += [(int(row), label) for row in order[:per_class]]
    fig = plotting.figure(11.0, 0.4 + 1.5 * max(1, len(chosen)))
    with plotting.style():
        axes = np.atleast_1d(fig.subplots(max(1, len(chosen)), 1))
        for ax, (row, label) in zip(axes, chosen):
            batch = test.__getitems__([row])
            tokens = batch["tokens"][0, : int(batch["lengths"][0])]
            letters(ax, tokens.numpy(), effects(task, tokens, label))
            ax.set_title(f"{task.classes[label]}: p = {np.exp(rows.score[row, label]):.3f}")
        axes[-1].set_xlabel("base")
    return fig


def letters(ax: Any, tokens: np.ndarray, height: np.ndarray) -> None:
    """Bars of the bases' heights in their colours, with the letters on the largest."""
    place = np.arange(len(tokens))
    for code, letter in enumerate(BASES):
        here = tokens == code
        ax.bar(place[here], height[here], width=0.9, color=plotting.COLOURS[(2, 0, 5, 6)[code]], label=letter)
    most = float(np.abs(height).max(initial=0.0))
    for i in np.argsort(-np.abs(height))[: min(len(height), 40)]:
        if tokens[i] < N and abs(height[i]) > 0.15 * most:
            ax.text(
                i, height[i], BASES[tokens[i]], ha="center", va="bottom" if height[i] >= 0 else "top",
                fontsize=7, fontweight="bold", clip_on=True,
            )  # fmt: skip
    ax.axhline(0, color=plotting.MUTED, linewidth=0.8)
    ax.set(
        xlim=(-1, len(tokens)),
        ylim=(min(0.0, float(height.min())) * 1.25 - 1e-9, max(float(height.max()), 1e-9) * 1.25),
    )
    ax.margins(x=0)
    if not ax.get_subplotspec().rowspan.start:
        ax.legend(ncols=4, loc="upper right", bbox_to_anchor=(1, 1.28), handlelength=0.8, columnspacing=1.0)
