"""How values and calendar features become tokens (Informer, Appendix B; Autoformer drops the positions)."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attn_shared.layers import Dropout
from attn_timeseries.models.layers import neighbours


class DataEmbedding(nn.Module):
    """token(x) + calendar(marks) [+ position], then dropout.

    token is a circular convolution over three steps, calendar a linear map of the features (the papers' "timeF"
    encoding). Both being linear, they are one matrix product here.

    Args:
        channels: C, series.
        marks: F, calendar features.
        dim: D, channels of a token.
        dropout: probability.
        positions: longest sequence for which sinusoidal positions are added; None = no positions.
        bias: whether both maps have a bias.
    """

    positions: Tensor | None

    def __init__(
        self, channels: int, marks: int, dim: int, *, dropout: float, positions: int | None, bias: bool = False
    ) -> None:
        super().__init__()
        self.token = nn.Linear(3 * channels, dim, bias=bias)
        nn.init.kaiming_normal_(self.token.weight, mode="fan_in", nonlinearity="leaky_relu")
        self.calendar = nn.Linear(marks, dim, bias=bias) if marks else None
        self.dropout = Dropout(dropout)
        self.register_buffer(
            "positions", None if positions is None else sinusoidal_positions(positions, dim), persistent=False
        )

    def allow_lengths(self, longest: int) -> None:
        """Make room for sequences of up to `longest` steps: positions are computed, not learnt."""
        if self.positions is not None and longest > len(self.positions):
            self.positions = sinusoidal_positions(longest, self.token.out_features).to(self.positions)

    def forward(self, x: Tensor, marks: Tensor) -> Tensor:
        """(B, L, C), (B, L, F) -> (B, L, D)."""
        if self.calendar is None:
            tokens = self.token(neighbours(x))
        else:
            weight = torch.cat([self.token.weight, self.calendar.weight], dim=1)
            bias = None if self.token.bias is None else self.token.bias + self.calendar.bias
            tokens = F.linear(torch.cat([neighbours(x), marks], dim=-1), weight, bias)
        if self.positions is not None:
            tokens = tokens + self.positions[: x.shape[1]]
        return self.dropout(tokens)


def sinusoidal_positions(length: int, dim: int) -> Tensor:
    """(length, dim): sin and cos of position / 10000^(2i / dim), alternating ("Attention Is All You Need", 3.5)."""
    position = torch.arange(length, dtype=torch.float32).unsqueeze(1)
    rate = torch.exp(torch.arange(0, dim, 2, dtype=torch.float32) * (-math.log(10000.0) / dim))
    table = torch.zeros(length, dim)
    table[:, 0::2] = torch.sin(position * rate)
    table[:, 1::2] = torch.cos(position * rate)[:, : dim // 2]
    return table
