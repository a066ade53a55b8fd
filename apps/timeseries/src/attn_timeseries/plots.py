"""Figures of forecasts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure

TRUTH, FORECAST, BASELINE = "#222222", "#c2410c", "#7c8b9a"
COLOURS = (FORECAST, "#7c8b9a", "#3b82a0", "#8a6fb0", "#5b8c5a")


def _tidy(axis: Any) -> None:
    axis.spines[["top", "right"]].set_visible(False)
    axis.grid(alpha=0.25, linewidth=0.6)
    axis.tick_params(labelsize=8)


def forecast_panels(panels: Sequence[Mapping[str, Any]], columns: int = 2) -> Figure:
    """One panel a window: look-back, truth and forecast in the units of the data.

    A panel holds `title`, `times` (L + H), `history` (L,), `forecast` (H,), and where known `truth` (H,) and
    `others`, name -> (H,).
    """
    columns = min(columns, len(panels))
    rows = -(-len(panels) // columns)
    figure = Figure(figsize=(5.2 * columns, 2.5 * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).ravel()
    for axis, panel in zip(axes, panels):
        times, history = np.asarray(panel["times"]), np.asarray(panel["history"])
        seen, ahead = times[: len(history)], times[len(history) :]
        axis.plot(seen, history, color=TRUTH, linewidth=1.1)
        if "truth" in panel:
            axis.plot(ahead, panel["truth"], color=TRUTH, linewidth=1.1, label="truth")
        for colour, (name, values) in zip(COLOURS[1:], panel.get("others", {}).items()):
            axis.plot(ahead, values, color=colour, linewidth=1.0, linestyle="--", label=name)
        axis.plot(ahead, panel["forecast"], color=FORECAST, linewidth=1.6, label="forecast")
        axis.axvline(ahead[0], color=BASELINE, linewidth=0.8, linestyle=":")
        axis.set_title(panel["title"], fontsize=9, loc="left")
        _tidy(axis)
        _few_dates(axis)
    for axis in axes[len(panels) :]:
        axis.set_visible(False)
    axes[0].legend(fontsize=8, frameon=False, loc="best")
    return figure


def horizon_curves(curves: Mapping[str, np.ndarray], label: str = "MSE (scaled)") -> Figure:
    """Error at each step ahead, one line a model; the first is drawn strongest."""
    figure = Figure(figsize=(6.4, 3.2), layout="constrained")
    axis = figure.subplots()
    for number, (name, values) in enumerate(curves.items()):
        steps = np.arange(1, len(values) + 1)
        axis.plot(steps, values, color=COLOURS[number % len(COLOURS)], linewidth=1.8 if number == 0 else 1.1,
                  linestyle="-" if number == 0 else "--", label=name)  # fmt: skip
    axis.set_xlabel("steps ahead", fontsize=9)
    axis.set_ylabel(label, fontsize=9)
    axis.set_ylim(bottom=0)
    axis.legend(fontsize=8, frameon=False)
    _tidy(axis)
    return figure


def _few_dates(axis: Any) -> None:
    from matplotlib.dates import AutoDateLocator, ConciseDateFormatter

    locator = AutoDateLocator(minticks=3, maxticks=6)
    axis.xaxis.set_major_locator(locator)
    axis.xaxis.set_major_formatter(ConciseDateFormatter(locator))
