"""Figures of language models of genomes."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib.figure import Figure

from attn_genomics.genome import metrics
from attn_genomics.genome.baselines import fitted, read, scored
from attn_genomics.tokens import BASES
from attn_shared import plotting
from attn_shared.task import DataBundle, Picture

if TYPE_CHECKING:
    from attn_genomics.genome.task import GenomeTask

_POINTS = 300  # of a curve along the genome


def pictures(task: GenomeTask, bundle: DataBundle) -> Iterator[Picture]:
    """Everything that the report of a run shows, of the test part."""
    test: Any = bundle.test
    own = task.scores()
    if test is None or own is None or len(own.index) != len(test):
        return
    models = {task.config.model: own}
    simple = [one for one in fitted(bundle, task.network.objective) if one.name.startswith("interpolated")]
    if simple:
        models[simple[-1].name] = scored(read(test), simple[-1].probability)
    yield Picture(
        name="along",
        caption="Bits per base along the test part, in means of neighbouring windows: what lies low is well told, such "
        "as genes and repeats.",
        figure=along(models, test),
    )
    yield Picture(
        name="calibration",
        caption="How often the likeliest base is the right one against its probability, in bins of equal width; on the "
        "diagonal probabilities are right. Below, how many bases are told how surely.",
        figure=calibration(models),
    )
    yield Picture(
        name="bases",
        caption="Mean probability that is given to each base, by column, where each base stands, by row; in brackets "
        "how much more than its share.",
        figure=bases(own),
    )


def along(models: dict[str, metrics.Scores], test: Any) -> Figure:
    """Bits per base of stretches of the test part, record behind record."""
    fig = plotting.figure(9.0, 3.4)
    windows = test.windows
    names = [name for name, *_ in windows]
    edges = [0, *(i for i in range(1, len(names)) if names[i] != names[i - 1]), len(names)]
    with plotting.style():
        ax = fig.subplots()
        size = max(1, len(windows) // _POINTS)
        for number, (model, scores) in enumerate(models.items()):
            x: list[float] = []
            y: list[float] = []
            for first, last in pairwise(edges):
                for at in range(first, last, size):
                    part = slice(at, min(at + size, last))
                    if scores.count[part].sum():
                        x.append(scores.count[: part.start].sum() + scores.count[part].sum() / 2)
                        y.append(scores.bits[part].sum() / scores.count[part].sum())
                x.append(float("nan"))
                y.append(float("nan"))
            mean = scores.bits.sum() / scores.count.sum()
            ax.plot(
                np.asarray(x) / 1000, y, label=f"{model} ({mean:.4f})", color=plotting.COLOURS[number],
                linewidth=1.4 if number == 0 else 1.0, alpha=1.0 if number == 0 else 0.75, zorder=5 - number,
            )  # fmt: skip
        total = next(iter(models.values())).count
        for first in edges[:-1]:
            if first:
                ax.axvline(total[:first].sum() / 1000, color=plotting.MUTED, linewidth=0.8)
            if len(edges) < 14:
                ax.text(
                    total[:first].sum() / 1000, 1.0, f" {names[first]} from {windows[first][2]:,}",
                    transform=ax.get_xaxis_transform(), va="bottom", fontsize=8, color=plotting.MUTED,
                )  # fmt: skip
        ax.axhline(2, color=plotting.MUTED, linewidth=1, linestyle="--")
        ax.set(xlabel="thousand bases of the test part", ylabel="bits per base")
        ax.legend(loc="lower right")
    return fig


def calibration(models: dict[str, metrics.Scores]) -> Figure:
    """Reliability curves; below the histogram of the first model's probabilities."""
    fig = plotting.figure(6.4, 5.0)
    with plotting.style():
        upper, lower = fig.subplots(2, 1, height_ratios=(3, 1), sharex=True)
        for number, (name, scores) in enumerate(models.items()):
            rows, chance, hits = scores.bins.T
            full = rows > 0
            error = np.abs(chance - hits).sum() / rows.sum()
            upper.plot(
                chance[full] / rows[full], hits[full] / rows[full], marker="o", markersize=4,
                color=plotting.COLOURS[number], alpha=1.0 if number == 0 else 0.75,
                label=f"{name} (ECE {error:.4f})", zorder=5 - number,
            )  # fmt: skip
        upper.plot([0.25, 1], [0.25, 1], color=plotting.MUTED, linewidth=1, linestyle="--")
        upper.set(ylabel="share that is right", ylim=(0.2, 1.02), xlim=(0.24, 1.01))
        upper.legend(loc="lower right")
        first = next(iter(models.values())).bins[:, 0]
        middle = (np.arange(metrics.BINS) + 0.5) / metrics.BINS
        lower.bar(middle, first, width=0.9 / metrics.BINS, color=plotting.COLOURS[0])
        lower.set(xlabel="probability of the likeliest base", ylabel="bases", yscale="log")
    return fig


def bases(scores: metrics.Scores) -> Figure:
    """Mean probabilities by true base."""
    rows = scores.told.sum(axis=1)
    share = scores.told / np.maximum(rows[:, None], 1e-12)
    usual = scores.told.sum(axis=0) / max(rows.sum(), 1e-12)
    fig = plotting.figure(5.2, 4.2)
    with plotting.style():
        ax = fig.subplots()
        image = ax.imshow(share, cmap=plotting.SEQUENTIAL)
        middle = (share.min() + share.max()) / 2
        for i in range(4):
            for j in range(4):
                ax.text(
                    j, i, f"{share[i, j]:.3f}\n({share[i, j] - usual[j]:+.3f})", ha="center", va="center", fontsize=8.5,
                    color="white" if share[i, j] < middle else "black",
                )  # fmt: skip
        ax.set_xticks(range(4), list(BASES))
        ax.set_yticks(range(4), list(BASES))
        ax.set(xlabel="told", ylabel="stands there")
        ax.grid(visible=False)
        fig.colorbar(image, ax=ax, shrink=0.85)
    return fig
