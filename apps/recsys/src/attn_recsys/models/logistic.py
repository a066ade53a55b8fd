"""Logistic regression: a weight a name and a number."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from attn_recsys.models.clicks import ClickModel, ClicksShape
from attn_recsys.models.fields import FieldVectors, refuse_mixer


class LogisticRegression(ClickModel):
    """log odds = b + Σ w of the row's names and numbers."""

    def __init__(
        self,
        config: Any,
        shape: ClicksShape,
        *,
        mixer: str | None = None,
        mixer_args: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(config, shape)
        refuse_mixer("logistic", mixer, mixer_args)
        self.linear = Linear(shape)

    def forward(self, batch: Mapping[str, Tensor]) -> Tensor:
        found: Tensor = self.linear(batch)
        return found

    def loss(self, batch: Mapping[str, Tensor]) -> Tensor:
        total = super().loss(batch)
        if self.config.l2:
            total = total + self.config.l2 * self.linear.weights.table.weight.square().sum() / 2
        return total


class Linear(nn.Module):
    """The part of first order, (B,)."""

    def __init__(self, shape: ClicksShape) -> None:
        super().__init__()
        self.weights = FieldVectors(shape, 1)
        self.bias = nn.Parameter(torch.zeros(()))

    def forward(self, batch: Mapping[str, Tensor]) -> Tensor:
        total: Tensor = self.weights(batch).sum(dim=(1, 2)) + self.bias
        return total
