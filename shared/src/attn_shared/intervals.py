"""Names of the bounds of a metric's interval, in one place: `Task.compute_metrics` writes them, tables read them."""

from __future__ import annotations

import math
from collections.abc import Mapping


def interval_names(metric: str) -> tuple[str, str]:
    """The names under which the lower and the upper bound of a metric's 95 % interval stand."""
    return f"{metric}, 95% from", f"{metric}, 95% to"


def interval(metric: str, low: float, high: float) -> dict[str, float]:
    """The bounds of a metric's interval by their names."""
    return dict(zip(interval_names(metric), (float(low), float(high))))


def with_intervals(figures: Mapping[str, float], bounds: Mapping[str, tuple[float, float]]) -> dict[str, float]:
    """`figures`, each followed by the bounds of its interval where there are some and the figure is a number."""
    found: dict[str, float] = {}
    for name, value in figures.items():
        found[name] = value
        if name in bounds and not math.isnan(value):
            found |= interval(name, *bounds[name])
    return found
