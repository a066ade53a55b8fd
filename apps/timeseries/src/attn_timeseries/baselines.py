"""Forecasts that stand beside every model: repeat the last value, repeat the season, and the best linear map."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor

from attn_timeseries.calibration import Calibration, Outcome, Streams, widen
from attn_timeseries.config import ForecastTaskConfig
from attn_timeseries.data.windows import Windows
from attn_timeseries.metrics import IntervalScores

Forecast = Callable[[Tensor], Tensor]
Effect = Callable[[Mapping[str, Tensor]], Tensor]
_PENALTIES = (1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0)
_WORK = 3e10  # multiplications spent on the normal equations: a second or two
_BATCH = 512
_ROWS = 100_000  # of a table at a time
_LEVELS = 200  # of a category that the regression gives a column each
_RESIDUALS = 2000  # training windows whose residuals make a baseline's quantiles


@dataclass(frozen=True, kw_only=True)
class Baseline:
    """A forecast without training by gradient: `(B, L, C) -> (B, H, C)`, and how it was made.

    Where it has an effect of covariates, batch -> (B, L + H, C), `forecast` is of what that effect leaves.
    """

    name: str
    note: str
    forecast: Forecast
    effect: Effect | None = None

    def of(self, batch: Mapping[str, Tensor]) -> Tensor:
        """(B, H, C) from the `x` of a batch and the covariates in it."""
        x = batch["x"]
        if self.effect is None:
            return self.forecast(x)
        effect = self.effect(batch).to(x)
        return self.forecast(x - effect[:, : x.shape[1]]) + effect[:, x.shape[1] :]


def repeat_last(x: Tensor, pred_len: int) -> Tensor:
    """(B, L, C) -> (B, H, C): y_h = x_L."""
    return x[:, -1:].expand(-1, pred_len, -1)


def repeat_season(x: Tensor, pred_len: int, season: int) -> Tensor:
    """(B, L, C) -> (B, H, C): y_h = x_{L - m + (h mod m)}; the last value where the look-back is shorter than m."""
    length = x.shape[1]
    if season > length:
        season = 1
    return x[:, length - season + torch.arange(pred_len, device=x.device) % season]


def batches(windows: Windows, size: int = _BATCH) -> Iterator[dict[str, Tensor]]:
    """All windows in order."""
    for first in range(0, len(windows), size):
        yield windows.__getitems__(range(first, min(first + size, len(windows))))


def fit_linear(train: Windows, val: Windows | None, effect: Effect | None = None) -> tuple[Tensor, Tensor, float]:
    """The linear map from look-back to horizon that DLinear trains towards, solved at once.

    DLinear's trend is a linear function of the look-back, so its two maps together are one affine map shared by all
    channels ("Are Transformers Effective for Time Series Forecasting?", Section 4). Its squared error on the training
    windows has a closed minimum; a ridge penalty, chosen on the validation windows, takes the place of early stopping.
    No random number is drawn. With an `effect` of covariates the map is that of what the effect leaves.

    Returns:
        weight (L, H) and bias (H,) float64, and the penalty as a share of the mean squared input.
    """
    length, horizon = train.seq_len, train.pred_len
    channels = train.values.shape[1]
    stride = max(1, round(len(train) * channels * (length + 1) * (length + 1 + horizon) / _WORK))
    gram = torch.zeros(length + 1, length + 1, dtype=torch.float64)
    cross = torch.zeros(length + 1, horizon, dtype=torch.float64)
    for first in range(0, len(train), _BATCH * stride):
        chosen = range(first, min(first + _BATCH * stride, len(train)), stride)
        inputs, targets = _pairs(train.__getitems__(chosen), horizon, effect)
        gram += inputs.T @ inputs
        cross += inputs.T @ targets
    unit = gram.diagonal()[:-1].mean()
    checks = [_pairs(batch, horizon, effect) for batch in batches(val)] if val is not None else []
    best: tuple[float, Tensor, float] | None = None
    for penalty in _PENALTIES:
        ridge = torch.full((length + 1,), float(penalty * unit), dtype=torch.float64)
        ridge[-1] = 1e-9 * float(unit)  # the bias is free
        solution = torch.linalg.solve(gram + ridge.diag(), cross)
        error = sum(float((x @ solution - y).square().sum()) for x, y in checks)
        if best is None or error < best[0]:
            best = (error, solution, penalty)
        if not checks and penalty >= 1e-3:
            best = (error, solution, penalty)
            break
    assert best is not None
    return best[1][:-1], best[1][-1], best[2]


def _pairs(batch: dict[str, Tensor], pred_len: int, effect: Effect | None = None) -> tuple[Tensor, Tensor]:
    """(B·C, L + 1) look-backs with a one at the end, (B·C, H) targets, both less the effect; float64."""
    inputs, targets = batch["x"].to(torch.float64), batch["y"][:, -pred_len:].to(torch.float64)
    if effect is not None:
        known = effect(batch)
        inputs, targets = inputs - known[:, :-pred_len], targets - known[:, -pred_len:]
    inputs, targets = inputs.transpose(1, 2).flatten(0, 1), targets.transpose(1, 2).flatten(0, 1)
    return torch.cat([inputs, inputs.new_ones(len(inputs), 1)], dim=1), targets


def fit_effect(train: Windows) -> Effect | None:
    """Least squares of the targets of a step on what is known of it: known and static covariates, from training rows.

    Numbers enter as they are, categories as one column a level. None where nothing is known ahead.
    """
    tables = train.covariates
    if not {"known", "known_cat"} & set(tables):
        return None
    levels = {
        role: [int(column.max()) + 1 for column in table.unbind(-1)]
        for role, table in tables.items()
        if role in ("known_cat", "static_cat")
    }

    def design(given: Mapping[str, Tensor], steps: Tensor) -> Tensor:
        """(…, Z) float64 from tables or a batch whose static ones are spread over `steps`."""
        parts = [torch.ones_like(steps, dtype=torch.float64)[..., None]]
        parts += [given[role].to(torch.float64) for role in ("known", "static") if role in given]
        for role, counts in levels.items():
            for c, count in enumerate(counts):
                if count <= _LEVELS:
                    places = torch.arange(count, device=steps.device)
                    parts.append((given[role][..., c, None] == places).to(torch.float64))
        return torch.cat(parts, dim=-1)

    lengths = torch.tensor([len(times) for times in train.times])
    rows = {
        role: table.repeat_interleave(lengths, dim=0) if role.startswith("static") else table
        for role, table in tables.items()
    }
    whole = train.observed.all(dim=1) if train.observed is not None else torch.ones(len(train.values), dtype=torch.bool)
    gram, cross = torch.zeros(()), torch.zeros(())
    for first in range(0, len(train.values), _ROWS):
        chosen = slice(first, first + _ROWS)
        z = design({role: table[chosen] for role, table in rows.items()}, train.values[chosen, 0])[whole[chosen]]
        gram = gram + z.T @ z
        cross = cross + z.T @ train.values[chosen][whole[chosen]].to(torch.float64)
    ridge = 1e-6 * gram.diagonal().mean() * torch.eye(len(gram), dtype=torch.float64)
    solution = torch.linalg.solve(gram + ridge, cross)

    def effect(batch: Mapping[str, Tensor]) -> Tensor:
        known = batch["known"] if "known" in batch else batch["known_cat"]
        count = known.shape[1]
        given = {
            role: value[:, None].expand(-1, count, -1) if role.startswith("static") else value
            for role, value in batch.items()
            if role in ("known", "known_cat", "static", "static_cat")
        }
        return design(given, known[..., 0]) @ solution.to(known.device)

    return effect


_FITTED: WeakKeyDictionary[Windows, list[Baseline]] = WeakKeyDictionary()


def baselines(train: Windows | None, val: Windows | None, season: int, pred_len: int) -> list[Baseline]:
    """Repeat-last, seasonal naive where there is a season, and the fitted linear map; fitted once a training set."""
    if train is not None and train in _FITTED:
        return _FITTED[train]
    rows = [Baseline(name="naive", note="repeats the last value", forecast=lambda x: repeat_last(x, pred_len))]
    if season > 1:
        short = train is not None and train.seq_len < season
        rows.append(
            Baseline(
                name="seasonal_naive",
                note=f"repeats the last {season} steps"
                if not short
                else f"the look-back is shorter than a season of {season} steps: repeats the last value",
                forecast=lambda x: repeat_season(x, pred_len, season),
            )
        )
    if train is not None:
        weight, bias, penalty = fit_linear(train, val)

        def linear(x: Tensor) -> Tensor:
            map_, shift = weight.to(x), bias.to(x)
            return (x.transpose(1, 2) @ map_ + shift).transpose(1, 2)

        rows.append(
            Baseline(
                name="dlinear (closed form)",
                note=f"best linear map from {train.seq_len} steps, ridge {penalty:g} chosen on the validation part",
                forecast=linear,
            )
        )
        effect = fit_effect(train)
        if effect is not None:
            around, level, share = fit_linear(train, val, effect)
            rows.append(
                Baseline(
                    name="regression (closed form)",
                    note="least squares on the known and static covariates, and the best linear map of what that "
                    f"leaves, ridge {share:g} chosen on the validation part",
                    forecast=lambda x: (x.transpose(1, 2) @ around.to(x) + level.to(x)).transpose(1, 2),
                    effect=effect,
                )
            )
        _FITTED[train] = rows
    return rows


def interval_scores(
    rows: Sequence[Baseline],
    train: Windows,
    val: Windows | None,
    test: Windows,
    std: Tensor,
    options: ForecastTaskConfig,
) -> dict[str, IntervalScores]:
    """Scores of intervals around each baseline: quantiles of its errors on training windows, calibrated as the model's.

    Args:
        std: (G, C) of the scaler.
        options: quantile levels, and how they are calibrated.
    """
    found = {}
    for row in rows:
        offsets = residual_quantiles(row, train, options.levels)
        scores = IntervalScores(train.pred_len, std, options.levels, options.pair)
        calibration = None
        if options.calibrate != "none" and val is not None:
            calibration = Calibration(options.levels, *offsets.shape[:2])
            calibration.fit(lambda r=row, o=offsets: _outcomes(r, o, val), online=options.calibrate == "adaptive")  # type: ignore[misc]
        streams = Streams(calibration) if calibration is not None else None
        for outcome, group in zip(_outcomes(row, offsets, test), batches(test)):
            quantiles = outcome.quantiles
            if calibration is not None and streams is not None:
                adaptive = options.calibrate == "adaptive"
                quantiles = widen(quantiles, streams.follow(outcome) if adaptive else calibration.conformal())
            scores.update("", quantiles, outcome.target, group["group"], outcome.known)
        found[row.name] = scores
    return found


def residual_quantiles(row: Baseline, windows: Windows, levels: Sequence[float]) -> Tensor:
    """(H, C, Q) quantiles of y - f over windows, 0 at the median.

    A forecast that is biased has quantiles of its error on one side only; of each pair, an end is at least a tenth as
    far from the forecast as the other.
    """
    chosen = range(0, len(windows), max(1, len(windows) // _RESIDUALS))
    batch = windows.__getitems__(chosen)
    error = (batch["y"][:, -windows.pred_len :] - row.of(batch)).double().numpy()
    if "observed" in batch:
        error = np.where(batch["observed"].numpy(), error, np.nan)
    quantile = np.nanquantile if np.isnan(error).any() else np.quantile
    offsets = np.nan_to_num(np.moveaxis(quantile(error, levels, axis=0), 0, -1))
    pairs = len(levels) // 2
    below, above = np.maximum(-offsets[..., :pairs], 0), np.maximum(offsets[..., :pairs:-1], 0)
    ends = [np.maximum(one, 0.1 * other) for one, other in ((below, above), (above, below))]
    offsets = np.concatenate([-ends[0], np.zeros_like(offsets[..., :1]), ends[1][..., ::-1]], axis=-1)
    return torch.from_numpy(offsets)


def _outcomes(row: Baseline, offsets: Tensor, windows: Windows) -> Iterator[Outcome]:
    for batch in batches(windows):
        quantiles = row.of(batch).double().unsqueeze(-1) + offsets
        yield Outcome.of(quantiles, batch["y"][:, -windows.pred_len :], batch.get("observed"), batch["series"])
