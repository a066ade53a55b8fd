"""Figures of traffic forecasts."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.figure import Figure

from attn_timeseries.plots import COLOURS, FORECAST, _tidy

_BINS = 4


def ahead_curves(curves: Mapping[str, np.ndarray], labels: Sequence[str]) -> Figure:
    """Error at each time ahead, one line a model; the first is drawn strongest."""
    figure = Figure(figsize=(6.4, 3.4), layout="constrained")
    axis = figure.subplots()
    steps = np.arange(1, len(labels) + 1)
    for number, (name, values) in enumerate(curves.items()):
        axis.plot(steps, values, color=COLOURS[number % len(COLOURS)], linewidth=1.8 if number == 0 else 1.1,
                  linestyle="-" if number == 0 else "--", marker="o", markersize=3, label=name)  # fmt: skip
    shown = steps[:: max(1, len(steps) // 12)]
    axis.set_xticks(shown, [labels[step - 1] for step in shown])
    axis.set_xlabel("time ahead", fontsize=9)
    axis.set_ylabel("MAE", fontsize=9)
    axis.set_ylim(bottom=0)
    axis.legend(fontsize=8, frameon=False)
    _tidy(axis)
    return figure


def attention_and_graph(attention: np.ndarray, graph: np.ndarray) -> Figure:
    """The attention between sensors (N, N), the weights of the graph, and the one by the other."""
    figure = Figure(figsize=(12, 3.9), layout="constrained")
    left, middle, right = figure.subplots(1, 3)
    for axis, values, title in ((left, attention, "attention"), (middle, graph, "graph")):
        image = axis.imshow(values, cmap="magma", interpolation="nearest", vmin=0)
        axis.set_title(title, fontsize=9, loc="left")
        axis.set_xlabel("sensor read", fontsize=8)
        axis.set_ylabel("sensor", fontsize=8)
        axis.tick_params(labelsize=7)
        figure.colorbar(image, ax=axis, shrink=0.8)
    names, groups = by_weight(attention, graph)
    right.boxplot(groups, widths=0.6, showfliers=False, medianprops={"color": FORECAST})
    right.axhline(1 / len(attention), color="#7c8b9a", linewidth=0.8, linestyle=":")
    right.set_xticks(range(1, len(names) + 1), names, rotation=30)
    right.set_xlabel("weight of the edge (dotted: even attention)", fontsize=8)
    right.set_ylabel("attention", fontsize=8)
    _tidy(right)
    right.tick_params(labelsize=7)
    return figure


def by_weight(attention: np.ndarray, graph: np.ndarray) -> tuple[list[str], list[np.ndarray]]:
    """Attention of pairs of sensors in groups: itself, no edge, then edges from light to heavy."""
    same = np.eye(len(graph), dtype=bool)
    weights = np.maximum(graph, graph.T)
    names, groups = ["itself"], [attention[same]]
    if ((weights == 0) & ~same).any():
        names.append("no edge")
        groups.append(attention[(weights == 0) & ~same])
    edges = (weights > 0) & ~same
    if edges.any():
        cuts = np.unique(np.quantile(weights[edges], np.linspace(0, 1, _BINS + 1)))
        if len(cuts) == 1:
            return [*names, f"{cuts[0]:.2g}"], [*groups, attention[edges]]
        for number, (low, high) in enumerate(itertools.pairwise(cuts)):
            inside = edges & (weights >= low) & ((weights <= high) if number == len(cuts) - 2 else (weights < high))
            names.append(f"{low:.2f}-{high:.2f}")
            groups.append(attention[inside])
    return names, groups
