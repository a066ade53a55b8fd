"""Scores of traffic forecasts in the units of the data, at the usual distances ahead and over the whole horizon.

- mae, rmse: in the units of the data, such as miles an hour.
- mape: mean of 100 |y - f| / |y| over targets that are not 0, in per cent ("masked", as the traffic papers have it).
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from attn_timeseries import metrics
from attn_timeseries.traffic.data import step_of

_MINUTES = (15, 30, 45, 60)
_STEPS = (3, 6, 9, 12)
_NAMES = ("mape", "mape_count")

FORMAT: Mapping[str, str] = {
    "mae_original": ".3f",
    "rmse_original": ".3f",
    "mape": ".2f",
    **{
        f"{name}_{minutes}min": ".2f" if name == "mape" else ".3f"
        for minutes in _MINUTES
        for name in ("mae", "rmse", "mape")
    },
    **{name: form for name, form in metrics.FORMAT.items() if name not in ("mse", "mae", "mse_original", "smape")},
}


class TrafficScores(metrics.ForecastScores):
    """`ForecastScores` with the masked percentage error."""

    def reset(self) -> None:
        super().reset()
        self.sums |= {name: torch.zeros(self.pred_len, dtype=torch.float64) for name in _NAMES}

    def update(
        self,
        forecast: Tensor,
        target: Tensor,
        group: Tensor,
        observed: Tensor | None = None,
        index: Tensor | None = None,
    ) -> None:
        super().update(forecast, target, group, observed, index)
        device = self.mean.device
        f, y = forecast.detach().to(device, torch.float64), target.detach().to(device, torch.float64)
        std, mean = self.std[group.to(device)][:, None], self.mean[group.to(device)][:, None]
        # Scaling and back leaves a zero at 1e-6 times the deviation or so: such targets are zeros, too.
        actual = y * std + mean
        counted = actual.abs() > 1e-4 * std
        if observed is not None:
            counted &= observed.to(device)
        share = torch.where(counted, 100 * (f - y).abs() * std / actual.abs().clamp_min(1e-30), 0.0)
        self.sums["mape"] += share.sum(dim=(0, 2)).cpu()
        self.sums["mape_count"] += counted.sum(dim=(0, 2)).to(torch.float64).cpu()


def final(sums: Mapping[str, Tensor], frequency: str) -> dict[str, float]:
    """The figures of a split: over the horizon, then at each of `marked_steps`, then those of every forecast."""
    pred_len = len(sums["mape"])
    figures = _at(sums, slice(None), "original")
    for steps in marked_steps(frequency, pred_len):
        figures |= _at(sums, slice(steps - 1, steps), ahead(frequency, steps))
    figures["mape"] = figures.pop("mape_original")
    return figures | {name: value for name, value in metrics.final(sums).items() if name not in figures}


def _at(sums: Mapping[str, Tensor], steps: slice, label: str) -> dict[str, float]:
    def mean(name: str, count: str = "count") -> float:
        total = float(sums[count][steps].sum())
        return float(sums[name][steps].sum()) / total if total else float("nan")

    return {
        f"mae_{label}": mean("mae_original"),
        f"rmse_{label}": mean("mse_original") ** 0.5,
        f"mape_{label}": mean("mape", "mape_count"),
    }


def marked_steps(frequency: str, pred_len: int) -> list[int]:
    """Steps ahead scored by themselves: 15, 30, 45 and 60 minutes where the step divides them, else 3, 6, 9 and 12."""
    step = step_of(frequency)
    divides = pd.Timedelta(minutes=_MINUTES[0]) % step == pd.Timedelta(0)
    steps = [pd.Timedelta(minutes=m) // step for m in _MINUTES] if divides else _STEPS
    return [n for n in steps if n <= pred_len]


def ahead(frequency: str, steps: int) -> str:
    """How far ahead a number of steps is: "15min", "3h", "2D"."""
    step = step_of(frequency)
    span = steps * step
    for unit, size in (("D", pd.Timedelta(days=1)), ("h", pd.Timedelta(hours=1)), ("min", pd.Timedelta(minutes=1))):
        if step % size == pd.Timedelta(0):
            return f"{span // size}{unit}"
    return f"{span / pd.Timedelta(seconds=1):g}s"


def curve(sums: Mapping[str, Tensor]) -> np.ndarray:
    """Mean absolute error in the units of the data at each step ahead, (H,)."""
    return (sums["mae_original"] / sums["count"]).numpy()
