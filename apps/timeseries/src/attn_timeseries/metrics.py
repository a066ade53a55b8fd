"""Scores of forecasts, summed exactly.

Every figure is a mean over all windows, steps and channels of a split, from float64 sums that neither the batch size
nor the number of processes changes. Filled gaps are never scored.

- mse, mae: on scaled values, as the papers print them.
- mse_original, mae_original: in the units of the data.
- smape: mean of 200 |y - f| / (|y| + |f|), in per cent, 0 where both are 0 (Makridakis 1993, in the M4 form).
- mase: mean of |y - f| / q, q the mean absolute error of the seasonal naive forecast on the training rows of the same
  column (Hyndman and Koehler 2006). Below 1: better than repeating the season was in training.

Of forecasts with intervals, on scaled values where nothing else is said:
- coverage: share of the truth inside the interval; _conformal, _raw: before adaptation, before calibration.
- width, width_original: mean distance of its ends.
- interval_score: width, and 2 / alpha for each unit that the truth lies outside (Gneiting and Raftery 2007); lower is
  better, and no interval can gain by promising another coverage.
- pinball: mean over the quantile levels of twice the pinball loss, which approximates the continuous ranked
  probability score; of the median alone it is the MAE.
- coverage_step_h, width_step_h: of single steps ahead.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

NAMES = ("mse", "mae", "mse_original", "mae_original", "mase", "smape")
FORMAT = {
    "mse": ".4f",
    "mae": ".4f",
    "coverage": ".1%",
    "width": ".3f",
    "pinball": ".4f",
    "mse_original": ".4g",
    "mae_original": ".4g",
    "mase": ".3f",
    "smape": ".2f",
    "windows": ",.0f",
    "coverage_conformal": ".1%",
    "width_conformal": ".3f",
    "coverage_raw": ".1%",
    "width_raw": ".3f",
    "interval_score": ".3f",
    "width_original": ".4g",
}


def seasonal_error(parts: Sequence[np.ndarray], season: int) -> np.ndarray:
    """Mean |y_t - y_{t-m}| of each column over training rows: (C,), NaN where it is 0 or no pair was observed.

    Args:
        parts: (T, C) training rows of each series, original scale, NaN in gaps.
        season: m, in steps; a series no longer than m contributes nothing.
    """
    channels = parts[0].shape[1]
    total, count = np.zeros(channels), np.zeros(channels)
    for values in parts:
        if len(values) > season:
            error = np.abs(values[season:] - values[:-season])
            total += np.nansum(error, axis=0)
            count += (~np.isnan(error)).sum(axis=0)
    with np.errstate(invalid="ignore", divide="ignore"):
        mean = total / count
    return np.where(mean > 0, mean, np.nan)


class ForecastScores:
    """Sums over windows, kept for each step of the horizon.

    Args:
        pred_len: H, steps of the horizon.
        mean, std: (G, C) of the scaler, one row a group of series.
        seasonal: (G, C) `seasonal_error` in original units, NaN where MASE is undefined.
    """

    def __init__(self, pred_len: int, mean: Tensor, std: Tensor, seasonal: Tensor) -> None:
        self.mean, self.std, self.seasonal = (t.to(torch.float64) for t in (mean, std, seasonal))
        self.pred_len = pred_len
        self.reset()

    def reset(self) -> None:
        names = (*NAMES, "count", "mase_count")
        self.sums = {name: torch.zeros(self.pred_len, dtype=torch.float64) for name in names}
        self.windows = torch.zeros(1, dtype=torch.float64)
        self._window: list[tuple[Tensor, Tensor]] = []

    def update(
        self,
        forecast: Tensor,
        target: Tensor,
        group: Tensor,
        observed: Tensor | None = None,
        index: Tensor | None = None,
    ) -> None:
        """Take in a batch.

        Args:
            forecast, target: (B, H, C) scaled.
            group: (B,) row of the scaler each window belongs to.
            observed: (B, H, C) False where the target was filled; None = all observed.
            index: (B,) numbers of the windows, to tell the worst afterwards.
        """
        device = self.mean.device
        f, y = forecast.detach().to(device, torch.float64), target.detach().to(device, torch.float64)
        group = group.to(device)
        known = torch.ones_like(y, dtype=torch.bool) if observed is None else observed.to(device)
        std, mean = self.std[group][:, None], self.mean[group][:, None]
        error = (f - y).abs()
        original = error * std
        size = (f * std + mean).abs() + (y * std + mean).abs()
        mase = original / self.seasonal[group][:, None]
        scores = {
            "mse": error.square(),
            "mae": error,
            "mse_original": original.square(),
            "mae_original": original,
            "smape": torch.where(size > 0, 200 * original / size.clamp_min(torch.finfo(torch.float64).tiny), 0.0),
            "count": torch.ones_like(error),
        }
        for name, value in scores.items():
            self.sums[name] += torch.where(known, value, 0.0).sum(dim=(0, 2)).cpu()
        defined = known & mase.isfinite()
        self.sums["mase"] += torch.where(defined, mase, 0.0).sum(dim=(0, 2)).cpu()
        self.sums["mase_count"] += defined.sum(dim=(0, 2)).to(torch.float64).cpu()
        self.windows += len(f)
        if index is not None:
            per_window = torch.where(known, scores["mse"], 0.0).sum(dim=(1, 2)) / known.sum(dim=(1, 2)).clamp_min(1)
            self._window.append((index.cpu(), per_window.cpu()))

    def state(self) -> dict[str, Tensor]:
        return {**self.sums, "windows": self.windows}

    def window_errors(self) -> tuple[Tensor, Tensor]:
        """Numbers of the windows seen here and the MSE of each."""
        if not self._window:
            return torch.empty(0, dtype=torch.int64), torch.empty(0, dtype=torch.float64)
        index, error = (torch.cat(parts) for parts in zip(*self._window))
        return index, error


class IntervalScores:
    """Sums over windows of forecasts with quantiles, kept for each step of the horizon.

    Args:
        pred_len: H, steps of the horizon.
        std: (G, C) of the scaler.
        levels: Q quantile levels.
        pair: the interval that is scored, among the pairs of levels, the widest being 0.
    """

    NAMES = ("covered", "width", "width_original", "interval_score", "pinball", "known")

    def __init__(self, pred_len: int, std: Tensor, levels: Sequence[float], pair: int) -> None:
        self.pred_len, self.std = pred_len, std.to(torch.float64)
        self.levels, self.pair = torch.tensor(levels, dtype=torch.float64), pair
        self.sums: dict[str, Tensor] = {}

    def update(
        self, variant: str, quantiles: Tensor, target: Tensor, group: Tensor, observed: Tensor | None = None
    ) -> None:
        """Take in a batch.

        Args:
            variant: "" for the intervals as they are given out, or a name for others beside them.
            quantiles: (B, H, C, Q) scaled, increasing.
            target, group, observed: as in `ForecastScores`.
        """
        q, y = (t.detach().cpu().to(torch.float64) for t in (quantiles, target))
        known = torch.ones_like(y, dtype=torch.bool) if observed is None else observed.cpu()
        low, high = q[..., self.pair], q[..., -1 - self.pair]
        width = high - low
        outside = (low - y).clamp_min(0) + (y - high).clamp_min(0)
        alpha = 2 * self.levels[self.pair]
        error = y.unsqueeze(-1) - q
        scores = {
            "covered": ((y >= low) & (y <= high)).to(torch.float64),
            "width": width,
            "width_original": width * self.std[group.cpu()][:, None],
            "interval_score": width + 2 / alpha * outside,
            "pinball": 2 * torch.maximum(self.levels * error, (self.levels - 1) * error).mean(dim=-1),
            "known": torch.ones_like(y),
        }
        for name, value in scores.items():
            self._add(variant, name, torch.where(known, value, 0.0).sum(dim=(0, 2)))
        below = (error <= 0) & known.unsqueeze(-1)
        self._add(variant, "below", below.sum(dim=(0, 1, 2)).to(torch.float64))

    def _add(self, variant: str, name: str, value: Tensor) -> None:
        key = f"interval/{variant}/{name}"
        self.sums[key] = self.sums[key] + value if key in self.sums else value

    def state(self) -> dict[str, Tensor]:
        return dict(self.sums)


def variants(sums: Mapping[str, Tensor]) -> list[str]:
    """The kinds of intervals in a summed state, "" first."""
    return sorted({key.split("/")[1] for key in sums if key.startswith("interval/")})


def interval_curve(sums: Mapping[str, Tensor], name: str, variant: str = "") -> np.ndarray:
    """An interval's score at each step of the horizon, (H,)."""
    return (sums[f"interval/{variant}/{name}"] / sums[f"interval/{variant}/known"]).numpy()


def reliability(sums: Mapping[str, Tensor], variant: str = "") -> np.ndarray:
    """Share of the truth at or below each quantile, (Q,)."""
    return (sums[f"interval/{variant}/below"] / sums[f"interval/{variant}/known"].sum()).numpy()


def _interval_figures(sums: Mapping[str, Tensor]) -> dict[str, float]:
    figures = {}
    for variant in variants(sums):
        tail = f"_{variant}" if variant else ""
        known = sums[f"interval/{variant}/known"]
        for name, key in (("coverage", "covered"), ("width", "width"), ("width_original", "width_original"),
                          ("interval_score", "interval_score"), ("pinball", "pinball")):  # fmt: skip
            figures[name + tail] = _ratio(sums[f"interval/{variant}/{key}"].sum(), known.sum())
        if not variant:
            steps = len(known)
            for step in sorted({1, -(-steps // 4), -(-steps // 2), steps}):
                for name, key in (("coverage", "covered"), ("width", "width")):
                    figures[f"{name}_step_{step}"] = _ratio(sums[f"interval//{key}"][step - 1], known[step - 1])
    return figures


def final(sums: Mapping[str, Tensor]) -> dict[str, float]:
    """The figures of a split from the summed state."""
    figures = {
        name: _ratio(sums[name].sum(), sums["mase_count" if name == "mase" else "count"].sum()) for name in NAMES
    }
    return {**figures, "windows": float(sums["windows"].sum()), **_interval_figures(sums)}


def curve(sums: Mapping[str, Tensor], name: str = "mse") -> np.ndarray:
    """A score at each step of the horizon, (H,)."""
    return (sums[name] / sums["mase_count" if name == "mase" else "count"]).numpy()


def _ratio(total: Tensor, count: Tensor) -> float:
    return float(total / count) if count > 0 else float("nan")
