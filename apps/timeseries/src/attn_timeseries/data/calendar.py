"""Calendar features and seasons by frequency.

Features as Informer (S83) takes them from GluonTS: each runs from -0.5 to 0.5 over its range, and a series has those
that its step can tell apart (an hourly one no minutes, a weekly one no hours).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pandas as pd

from attn_shared.errors import UserError

_FEATURES: dict[str, Callable[[pd.DatetimeIndex], Any]] = {
    "second": lambda t: t.second / 59 - 0.5,
    "minute": lambda t: t.minute / 59 - 0.5,
    "hour": lambda t: t.hour / 23 - 0.5,
    "day of week": lambda t: t.day_of_week / 6 - 0.5,
    "day of month": lambda t: (t.day - 1) / 30 - 0.5,
    "day of year": lambda t: (t.day_of_year - 1) / 365 - 0.5,
    "week of year": lambda t: (t.isocalendar().week.to_numpy() - 1) / 52 - 0.5,
    "month": lambda t: (t.month - 1) / 11 - 0.5,
}
_HOURLY = ("hour", "day of week", "day of month", "day of year")
_BY_UNIT: dict[str, tuple[str, ...]] = {
    "Y": (),
    "Q": ("month",),
    "M": ("month",),
    "W": ("day of month", "week of year"),
    "D": ("day of week", "day of month", "day of year"),
    "B": ("day of week", "day of month", "day of year"),
    "h": _HOURLY,
    "min": ("minute", *_HOURLY),
    "s": ("second", "minute", *_HOURLY),
}
_SECONDS = {"s": 1, "min": 60, "h": 3600, "D": 86400}
_SEASONS = {"Y": 1, "Q": 4, "M": 12, "W": 52, "B": 5}


def unit(frequency: str) -> str:
    """The unit of a pandas frequency: s, min, h, D, B, W, M, Q or Y; steps below a second count as seconds."""
    name = pd.tseries.frequencies.to_offset(frequency).rule_code.split("-")[0]
    for key, aliases in {"Y": ("YS", "YE", "BYS", "BYE"), "Q": ("QS", "QE", "BQS", "BQE")}.items():
        if name in aliases:
            return key
    if name in ("MS", "ME", "BMS", "BME", "SMS", "SME"):
        return "M"
    if name in ("ms", "us", "ns"):
        return "s"
    if name in _BY_UNIT:
        return name
    raise UserError(
        f"frequency {frequency!r} is not one of seconds, minutes, hours, days, weeks, months, quarters, years"
    )


def feature_names(frequency: str) -> tuple[str, ...]:
    """Names of the calendar features of a frequency, in order."""
    return _BY_UNIT[unit(frequency)]


def calendar_features(times: pd.DatetimeIndex, frequency: str) -> np.ndarray:
    """Features (T, F) float64 in [-0.5, 0.5] of each time; F and meaning follow `feature_names(frequency)`."""
    features = [np.asarray(_FEATURES[name](times), dtype=np.float64) for name in feature_names(frequency)]
    return np.stack(features, axis=1) if features else np.empty((len(times), 0))


def season_of(frequency: str) -> int:
    """Steps in the usual season: a day for steps below a day, a week for days, a year for longer ones."""
    kind = unit(frequency)
    multiple = pd.tseries.frequencies.to_offset(frequency).n
    if kind in _SEASONS:
        season, rest = divmod(_SEASONS[kind], multiple)
        return season if season and not rest else 1
    if kind == "D":
        return {1: 7, 7: 52}.get(multiple, 1)
    name = pd.tseries.frequencies.to_offset(frequency).rule_code
    if name in ("ms", "us", "ns"):
        return 1
    seconds = multiple * _SECONDS[kind]
    if kind == "s" and seconds < 60:
        return 60 // seconds if 60 % seconds == 0 else 1
    return 86400 // seconds if 86400 % seconds == 0 else 1
