"""Figures of rankings: who is served how well, and how popular is what is recommended."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

import numpy as np
from matplotlib.figure import Figure

from attn_recsys.items import metrics
from attn_recsys.items.data import UserSet
from attn_shared import plotting
from attn_shared.task import DataBundle, Picture

if TYPE_CHECKING:
    from attn_recsys.items.task import ItemsTask

_PARTS = 10


def pictures(task: ItemsTask, bundle: DataBundle) -> Iterator[Picture]:
    """Everything that the report of a run shows, of the test part."""
    from attn_recsys.items.task import simple_rankings

    users = bundle.test
    if not isinstance(users, UserSet):
        return
    k = task.options.k[-1]
    name = f"{metrics.SAMPLED if task.options.sampled else ''}recall@{k}"
    simple = {one.name: found for one, found in simple_rankings(task.config, bundle) if one.name != "random"}
    found = {task.config.model: task.rankings(users), **simple}
    groups = metrics.activity_groups(users.activity[users.users], task.options.groups)
    if groups:
        yield Picture(
            name="activity",
            caption=f"{name} of users with few and with many items in training; bars span 95 % intervals over users.",
            figure=activity_bars({model: one.figures[name] for model, one in found.items()}, dict(groups), name),
        )
    if not task.options.sampled:
        wanted = np.zeros(users.wanted.size)
        np.add.at(wanted, np.concatenate([users.wanted.of(int(user)) for user in users.users]), 1)
        shares = {"had in test": wanted, **{model: one.recommended[k] for model, one in found.items()}}
        yield Picture(
            name="popularity",
            caption=f"Where the first {k} recommendations lie when items are put in order of popularity and cut into "
            f"{_PARTS} parts that were had equally often in training: {100 / _PARTS:.0f} % each would be as training "
            "was. Beside it what users had in test.",
            figure=popularity_lines(shares, np.bincount(users.train.number, minlength=users.train.size)),
        )


def activity_bars(figures: Mapping[str, np.ndarray], groups: Mapping[str, np.ndarray], name: str) -> Figure:
    """Means by group of users, a bar a model.

    Args:
        figures: model -> (N,) a figure of each user.
        groups: label -> (N,) membership.
    """
    fig = plotting.figure(8.5, 3.4)
    with plotting.style():
        axes = fig.subplots()
        width = 0.8 / len(figures)
        for number, (model, values) in enumerate(figures.items()):
            place = np.arange(len(groups)) + (number - (len(figures) - 1) / 2) * width
            means = np.array([values[chosen].mean() for chosen in groups.values()])
            bounds = [metrics.bootstrap(values[chosen][:, None]) for chosen in groups.values()]
            low, high = (np.array([bound[side][0] for bound in bounds]) for side in (0, 1))
            axes.bar(
                place,
                means,
                width * 0.92,
                yerr=np.abs(np.stack([means - low, high - means])),
                color=plotting.COLOURS[number % len(plotting.COLOURS)] if number == 0 else plotting.MUTED,
                alpha=1.0 if number == 0 else 0.45 + 0.25 * number,
                error_kw={"elinewidth": 1, "ecolor": plotting.INK},
                label=model,
            )
        labels = [f"{label}\n({int(chosen.sum()):,} users)" for label, chosen in groups.items()]
        axes.set_xticks(np.arange(len(groups)), labels)
        axes.set_ylabel(name)
        axes.grid(visible=False, axis="x")
        axes.legend()
    return fig


def popularity_lines(amounts: Mapping[str, np.ndarray], counts: np.ndarray) -> Figure:
    """Shares of each amount in parts of the items, the most popular first.

    Args:
        amounts: name -> (I,).
        counts: (I,) how often each item was had in training; the parts have equal sums of it.
    """
    order = np.argsort(-counts, kind="stable")
    before = np.cumsum(counts[order]) - counts[order]
    part = np.minimum(_PARTS - 1, (before * _PARTS / max(1, counts.sum())).astype(int))
    fig = plotting.figure(8.5, 3.2)
    with plotting.style():
        axes = fig.subplots()
        sizes = np.bincount(part, minlength=_PARTS)
        for number, (name, amount) in enumerate(amounts.items()):
            share = 100 * np.bincount(part, weights=amount[order], minlength=_PARTS) / max(1.0, amount.sum())
            colour = plotting.INK if number == 0 else plotting.COLOURS[(number - 1) % len(plotting.COLOURS)]
            axes.plot(
                np.arange(_PARTS),
                share,
                marker="o",
                markersize=4,
                color=colour,
                label=name,
                linestyle="--" if number == 0 else "-",
            )
        axes.axhline(100 / _PARTS, color=plotting.MUTED, linewidth=1)
        axes.set_xticks(np.arange(_PARTS), [f"{size:,}" for size in sizes])
        axes.set(xlabel="items of the part, the most popular first", ylabel="share, %", ylim=(0, None))
        axes.legend()
    return fig
