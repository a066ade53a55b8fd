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

    A panel holds `title`, `times` (L + H), `history` (L,), `forecast` (H,), and where known `truth` (H,), `others`,
    name -> (H,), and `bands`, (lower, upper) of each interval, the widest first.
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
        for low, high in panel.get("bands", ()):
            axis.fill_between(ahead, low, high, color=FORECAST, alpha=0.15, linewidth=0)
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


def interval_curves(curves: Mapping[str, tuple[np.ndarray, np.ndarray]], promised: float) -> Figure:
    """Coverage and width of intervals at each step ahead; the first of `curves` is drawn strongest."""
    figure = Figure(figsize=(9.2, 3.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    left.axhline(promised, color=TRUTH, linewidth=0.8, linestyle=":")
    for number, (name, pair) in enumerate(curves.items()):
        for axis, values in zip((left, right), pair):
            axis.plot(np.arange(1, len(values) + 1), values, color=COLOURS[number % len(COLOURS)], label=name,
                      linewidth=1.8 if number == 0 else 1.1, linestyle="-" if number == 0 else "--")  # fmt: skip
    left.set_ylim(top=1)
    right.set_ylim(bottom=0)
    for axis, label in ((left, "share of the truth inside"), (right, "mean width (scaled)")):
        axis.set_xlabel("steps ahead", fontsize=9)
        axis.set_ylabel(label, fontsize=9)
        _tidy(axis)
    right.legend(fontsize=8, frameon=False)
    return figure


def reliability_curve(levels: Sequence[float], shares: Mapping[str, np.ndarray]) -> Figure:
    """Share of the truth at or below each quantile against its level; on the diagonal, quantiles are what they say."""
    figure = Figure(figsize=(3.6, 3.4), layout="constrained")
    axis = figure.subplots()
    axis.plot([0, 1], [0, 1], color=TRUTH, linewidth=0.8, linestyle=":")
    for number, (name, values) in enumerate(shares.items()):
        axis.plot(levels, values, color=COLOURS[number % len(COLOURS)], marker="o", markersize=3, label=name,
                  linewidth=1.8 if number == 0 else 1.1, linestyle="-" if number == 0 else "--")  # fmt: skip
    axis.set(xlim=(0, 1), ylim=(0, 1), aspect="equal")
    axis.set_xlabel("level of the quantile", fontsize=9)
    axis.set_ylabel("share of the truth below", fontsize=9)
    axis.legend(fontsize=8, frameon=False)
    _tidy(axis)
    return figure


def _few_dates(axis: Any) -> None:
    from matplotlib.dates import AutoDateLocator, ConciseDateFormatter

    locator = AutoDateLocator(minticks=3, maxticks=6)
    axis.xaxis.set_major_locator(locator)
    axis.xaxis.set_major_formatter(ConciseDateFormatter(locator))


def backtest_errors(origins: Any, model: str) -> Figure:
    """Squared error at each origin, one line a model; `origins` is a frame with origin, fit, model and mse."""
    figure = Figure(figsize=(8.4, 3.2), layout="constrained")
    axis = figure.subplots()
    moments = list(dict.fromkeys(origins["origin"]))
    names = [model, *(name for name in dict.fromkeys(origins["model"]) if name != model)]
    for number, name in enumerate(names):
        rows = origins[origins["model"] == name]
        axis.plot(
            [moments.index(moment) for moment in rows["origin"]],
            rows["mse"],
            color=COLOURS[number % len(COLOURS)],
            linewidth=1.8 if number == 0 else 1.0,
            linestyle="-" if number == 0 else "--",
            marker="o" if len(moments) == 1 else None,
            label=name,
        )
    for moment in origins.drop_duplicates("fit")["origin"]:
        axis.axvline(moments.index(moment), color=BASELINE, linewidth=0.7, linestyle=":")
    shown = range(0, len(moments), max(1, -(-len(moments) // 6)))
    axis.set_xticks(list(shown), [moments[i] for i in shown])
    axis.set_ylabel("MSE (scaled)", fontsize=9)
    axis.set_ylim(bottom=0)
    axis.legend(fontsize=8, frameon=False)
    _tidy(axis)
    return figure


def backtest_forecasts(forecasts: Any, model: str) -> Figure:
    """What came and the forecast from every origin, of the first series and column of a frame of forecasts."""
    import pandas as pd

    rows = forecasts[
        (forecasts["series"] == forecasts["series"].iloc[0]) & (forecasts["column"] == forecasts["column"].iloc[0])
    ]
    figure = Figure(figsize=(8.4, 3.2), layout="constrained")
    axis = figure.subplots()
    truth = rows.drop_duplicates("time").sort_values("time")
    axis.plot(pd.to_datetime(truth["time"]), truth["truth"], color=TRUTH, linewidth=1.1, label="truth")
    for number, (_, part) in enumerate(rows.groupby("origin", sort=False)):
        times = pd.to_datetime(part["time"])
        axis.plot(times, part[model], color=FORECAST, linewidth=1.2, label=model if number == 0 else None)
        if "lower" in part:
            axis.fill_between(times, part["lower"], part["upper"], color=FORECAST, alpha=0.15, linewidth=0)
    axis.set_title(str(rows["column"].iloc[0]), fontsize=9, loc="left")
    axis.legend(fontsize=8, frameon=False)
    _tidy(axis)
    _few_dates(axis)
    return figure
