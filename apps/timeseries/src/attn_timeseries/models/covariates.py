"""Covariates for every forecasting model: a regression on them around the model, which forecasts what it leaves.

The form is regression with structured errors (Box and Jenkins' transfer function models) with learned functions: an
effect g of what is known at a step is taken off the look-back and added to the forecast, the model in between forecasts
the rest, and a second term r, which also sees the past covariates of the whole look-back, corrects each step:

    forecast = base(x - g(z[:L])) + g(z[L:]) + r(z[L:], u, h)

z are the known covariates of a step and the static ones, u a summary of the look-back (its past covariates, and the
last, mean and deviation of its values), h the step. The last layers of g and r begin at zero: at the start, this is the
base model.

Legend: L look-back, H horizon, C channels, Z numbers of a step, D width.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from attn_timeseries.models.base import ForecastModel

WIDTH = 64
_UNKNOWN = 0.05  # share of categories hidden in training, so that the index of the unknown learns what is usual


@dataclass(frozen=True, kw_only=True)
class CovariateShape:
    """Columns of each role; for categories the size of each column's vocabulary, index 0 (unknown) included."""

    past: int = 0
    known: int = 0
    static: int = 0
    past_cat: tuple[int, ...] = ()
    known_cat: tuple[int, ...] = ()
    static_cat: tuple[int, ...] = ()

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> CovariateShape:
        """From the state of a `CovariateCoder`."""
        shape: dict[str, Any] = {role: len(mean) for role, mean in state["mean"].items()}
        for role, lists in state["vocabulary"].items():
            shape[role] = tuple(len(levels) + 1 for levels in lists)
        return cls(**shape)


class CovariateModel(nn.Module):
    """A forecasting model with covariates.

    Args:
        base: any forecasting model; its weights keep their names under `base.`.
        shape: the covariates there are.
        width: units of the hidden layers.
        dropout: probability in them.
    """

    def __init__(self, base: ForecastModel, shape: CovariateShape, *, width: int = WIDTH, dropout: float = 0.1) -> None:
        super().__init__()
        self.base = base
        self.shape = base.shape
        self.config = base.config
        self.covariates = shape
        channels, steps = base.shape.channels, base.shape.pred_len
        self.static = _Numbers(shape.static, shape.static_cat)
        self.known = _Numbers(shape.known, shape.known_cat)
        self.past = _Numbers(shape.past, shape.past_cat)
        step = self.known.width + self.static.width
        self.effect = _head(step, width, channels, dropout) if step else None
        summary = 3 * channels + base.shape.seq_len * self.past.width
        self.summary = nn.Sequential(nn.Linear(summary, width), nn.ReLU(), nn.Dropout(dropout))
        self.step = nn.Parameter(0.02 * torch.randn(steps, width))
        self.correction = _head(step + 2 * width, width, channels, dropout)

    def forward(self, x: Tensor, x_mark: Tensor, y_mark: Tensor, **covariates: Tensor) -> Tensor:
        """Forecast (B, H, C).

        Args:
            x, x_mark, y_mark: as the base model takes them.
            covariates: past (B, L, P), known (B, L + H, K), static (B, S); past_cat, known_cat, static_cat likewise
                with integers.

        Raises:
            ValueError: a covariate is missing, is too many or has another shape than the model was built for.
        """
        self.check_covariates(x, covariates)
        length, steps = self.shape.seq_len, self.shape.pred_len
        static = self.static(covariates.get("static"), covariates.get("static_cat"))
        known = self.known(covariates.get("known"), covariates.get("known_cat"))
        past = self.past(covariates.get("past"), covariates.get("past_cat"))
        parts = [known] if known is not None else []
        if static is not None:
            parts.append(static[:, None].expand(-1, length + steps, -1))
        z = torch.cat(parts, dim=-1) if parts else None
        forecast: Tensor
        if self.effect is not None:
            effect = self.effect(z)
            forecast = self.base(x - effect[:, :length], x_mark, y_mark) + effect[:, length:]
        else:
            forecast = self.base(x, x_mark, y_mark)
        seen = [x[:, -1], x.mean(dim=1), x.std(dim=1, unbiased=False)]
        if past is not None:
            seen.append(past.flatten(1))
        context = self.summary(torch.cat(seen, dim=-1))[:, None].expand(-1, steps, -1)
        inputs = [context, self.step.expand(x.shape[0], -1, -1)]
        if z is not None:
            inputs.append(z[:, length:])
        return forecast + self.correction(torch.cat(inputs, dim=-1))

    def check_covariates(self, x: Tensor, covariates: Mapping[str, Tensor]) -> None:
        """Refuse, in one sentence, other covariates than the model was built for."""
        length, steps = self.shape.seq_len, self.shape.pred_len
        for role, size in vars(self.covariates).items():
            count = len(size) if isinstance(size, tuple) else size
            given = covariates.get(role)
            if given is None:
                if count:
                    raise ValueError(f"the model was built with {count} {role} covariates, and got none")
                continue
            rows = {"s": (), "p": (length,), "k": (length + steps,)}[role[0]]
            wanted = (x.shape[0], *rows, count)
            if tuple(given.shape) != wanted:
                raise ValueError(f"the model was built for {role} of shape {wanted}, got {tuple(given.shape)}")
        unknown = sorted(set(covariates) - set(vars(self.covariates)))
        if unknown:
            raise ValueError(f"{unknown[0]!r} is no kind of covariate; there are {', '.join(vars(self.covariates))}")


class _Numbers(nn.Module):
    """Numbers and embedded categories side by side: (…, Z) float; None where there are none."""

    def __init__(self, numbers: int, sizes: tuple[int, ...]) -> None:
        super().__init__()
        self.tables = nn.ModuleList(nn.Embedding(size, min(16, 1 + size // 2)) for size in sizes)
        for table in self.tables:
            nn.init.normal_(table.weight, std=0.5)  # type: ignore[arg-type]
        self.width = numbers + sum(table.embedding_dim for table in self.tables)  # type: ignore[misc]

    def forward(self, values: Tensor | None, indices: Tensor | None) -> Tensor | None:
        parts = [values] if values is not None and values.shape[-1] else []
        for c, table in enumerate(self.tables):
            assert indices is not None
            index = indices[..., c]
            if self.training:
                rows = (len(index), *[1] * (index.dim() - 1))
                index = index * (torch.rand(rows, device=index.device) >= _UNKNOWN)
            parts.append(table(index))
        return torch.cat(parts, dim=-1) if parts else None


def _head(inputs: int, width: int, outputs: int, dropout: float) -> nn.Sequential:
    """One hidden layer and a linear one that begins at zero."""
    last = nn.Linear(width, outputs)
    nn.init.zeros_(last.weight)
    nn.init.zeros_(last.bias)
    return nn.Sequential(nn.Linear(inputs, width), nn.ReLU(), nn.Dropout(dropout), last)
