"""Quantiles around any forecasting model's own forecast.

A small network of ours, no paper's: what is published for quantiles forecasts them together with the centre, which
would make every model another one.

Shapes: B batch, L look-back, H horizon, C channels, Q levels.
"""

from __future__ import annotations

from collections.abc import Sequence
from statistics import NormalDist

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from attn_timeseries.models.base import SeriesShape

_HIDDEN = 64


class QuantileModel(nn.Module):
    """A forecasting model, and a head that spreads quantiles around its forecast.

    The forecast is the median. Distances between neighbouring quantiles are positive by construction, so quantiles
    never cross. Each distance follows from the shape of the channel's look-back and of the forecast, both brought to
    mean 0 and deviation 1, and is measured in deviations of the look-back: where a window swings more, quantiles lie
    further apart. All channels share the head; each has its own bias for every step and distance.

    Args:
        net: the model, (x, x_mark, y_mark, **covariates) -> (B, H, C).
        shape: the forecasting problem.
        levels: increasing, in (0, 1), 0.5 among them.
    """

    def __init__(self, net: nn.Module, shape: SeriesShape, levels: Sequence[float]) -> None:
        super().__init__()
        self.net, self.shape = net, shape
        self.levels = tuple(levels)
        self.middle = self.levels.index(0.5)
        steps, count = shape.pred_len, len(self.levels) - 1
        self.hidden = nn.Linear(shape.seq_len + steps + 2, _HIDDEN)
        self.out = nn.Linear(_HIDDEN, steps * count)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)
        # At the start: a normal distribution of half the look-back's deviation.
        normal = [NormalDist().inv_cdf(level) for level in self.levels]
        gaps = 0.5 * torch.tensor(normal, dtype=torch.float64).diff()
        start = gaps.expm1().log().to(torch.get_default_dtype())  # the inverse of softplus
        self.bias = nn.Parameter(start.repeat(shape.channels, steps, 1))
        # Added to a look-back's deviation, so that a flat one does not promise certainty; softplus(-2.25) = 0.1.
        self.floor = nn.Parameter(torch.full((shape.channels,), -2.25))

    def forward(self, x: Tensor, x_mark: Tensor, y_mark: Tensor, **covariates: Tensor) -> Tensor:
        """(B, H, C, Q) quantiles, increasing along the last axis; arguments as the model's own."""
        forecast = self.net(x, x_mark, y_mark, **covariates)
        distance = self._distances(x, forecast)
        below = distance[..., : self.middle].flip(-1).cumsum(-1).flip(-1)
        above = distance[..., self.middle :].cumsum(-1)
        centre = forecast.unsqueeze(-1)
        return torch.cat([centre - below, centre, centre + above], dim=-1)

    def _distances(self, x: Tensor, forecast: Tensor) -> Tensor:
        """(B, H, C, Q - 1) positive distances between neighbouring quantiles."""
        deviation, mean = torch.std_mean(x, dim=1, correction=0, keepdim=True)
        scale = deviation + F.softplus(self.floor)
        change = (x[:, 1:] - x[:, :-1]).abs().mean(dim=1, keepdim=True) if x.shape[1] > 1 else deviation
        features = [
            (x - mean) / scale,
            (forecast.detach() - mean) / scale,  # the head learns from the forecast, the forecast not for the head
            scale.log(),
            change / scale,
        ]
        tokens = torch.cat(features, dim=1).transpose(1, 2)
        raw = self.out(F.gelu(self.hidden(tokens))).unflatten(-1, (self.shape.pred_len, -1)) + self.bias
        return (F.softplus(raw) * scale.transpose(1, 2).unsqueeze(-1)).transpose(1, 2)


def pinball(quantiles: Tensor, target: Tensor, levels: Tensor) -> Tensor:
    """(B, H, C, Q): twice the pinball loss of each quantile, so that at level 0.5 it is the absolute error.

    The mean over levels approximates the continuous ranked probability score.

    Args:
        quantiles: (B, H, C, Q).
        target: (B, H, C).
        levels: (Q,).
    """
    error = target.unsqueeze(-1) - quantiles
    return 2 * torch.maximum(levels * error, (levels - 1) * error)
