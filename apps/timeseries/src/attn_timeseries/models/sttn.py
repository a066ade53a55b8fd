"""STTN: Spatial-Temporal Transformer Networks for Traffic Flow Forecasting (Xu et al., S100).

Shapes: B batch, M = seq_len steps, N sensors, D = d_model channels of a sensor at a step, K Chebyshev polynomials.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attn_shared.layers import Dropout
from attn_timeseries.config import STTNConfig
from attn_timeseries.models.base import ForecastModel, SeriesShape
from attn_timeseries.models.layers import self_mixer
from core_attn.contract import TokenMixer

SUM_SHARE = 0.1  # of the graph convolution, where the two spatial features are summed


class STTN(ForecastModel):
    """Section 3: blocks of a spatial and a temporal transformer, then a prediction layer.

        X^T = X + S(X),   X^{l+1} = X^T + T(X^T),   Y = Conv(Conv(X^{last}))

    The speeds enter through one linear map of a number to D channels; all steps of the horizon are forecast at once.

    Args:
        config, shape, mixer, mixer_args: see `ForecastModel`; `shape.graph` is needed. The mixer is the attention
            between sensors, over time, or both (`config.mixer_in`); what it does not replace is softmax attention.

    Raises:
        ValueError: no graph, or a mixer that cannot compute noncausal self-attention.
    """

    config: STTNConfig

    def __init__(
        self,
        config: STTNConfig,
        shape: SeriesShape,
        *,
        mixer: str | None = None,
        mixer_args: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(config, shape)
        if shape.graph is None:
            raise ValueError("STTN needs a graph of the sensors; name its file with --data_args.graph")
        c = config
        if c.layers < 1 or c.order < 1:
            raise ValueError(f"layers and order must be at least 1, got {c.layers} and {c.order}")

        def attention(where: str) -> TokenMixer:
            replaced = c.mixer_in in (where, "both")
            name, options = (mixer or "softmax", mixer_args or {}) if replaced else ("softmax", {})
            return self_mixer(name, c.d_model, c.n_heads, dropout=c.dropout, options=options)

        self.input = nn.Linear(1 + (shape.marks if c.calendar else 0), c.d_model)
        self.spatial = nn.ModuleList(
            SpatialTransformer(attention("spatial"), shape.graph, shape.seq_len, c) for _ in range(c.layers)
        )
        self.temporal = nn.ModuleList(
            TemporalTransformer(attention("temporal"), shape.seq_len, c) for _ in range(c.layers)
        )
        self.features = nn.Linear(c.d_model * (shape.seq_len if c.head == "window" else 1), c.d_head)
        self.output = nn.Linear(c.d_head, shape.pred_len)
        self.register_buffer("kernels", chebyshev(shape.graph, c.order), persistent=False)

    def forward(self, x: Tensor, x_mark: Tensor, y_mark: Tensor) -> Tensor:
        self.check_inputs(x, x_mark, y_mark)
        values = x.unsqueeze(-1)
        if self.config.calendar:
            marks = x_mark.unsqueeze(2).expand(-1, -1, x.shape[2], -1)
            values = torch.cat([values, marks], dim=-1)
        h = self.input(values)
        for spatial, temporal in zip(self.spatial, self.temporal):
            h = h + spatial(h, self.kernels)
            h = h + temporal(h)
        last = h.transpose(1, 2).flatten(2) if self.config.head == "window" else h[:, -1]
        return self.output(F.relu(self.features(last))).transpose(1, 2)


class SpatialTransformer(nn.Module):
    """Section 4.1, for every step by itself: sensors read each other along the graph, and wherever attention leads.

        X' = F([X, D^S, D^T])                       D^S (N, N) starts as the graph, D^T (M, M) as one-hot steps
        X^G = sum_k T_k(L) X' Theta_k               fixed: the graph's Chebyshev convolution
        U = Attention(X') + X',  Y = FFN(U) + U     dynamic: directed, from the sensors' present features
        g = sigmoid(f_S(Y) + f_G(X^G)),  g Y + (1 - g) X^G

    FFN has three layers. A layer norm follows both sums where `config.norm`.
    """

    def __init__(self, attention: TokenMixer, graph: Tensor, steps: int, config: STTNConfig) -> None:
        super().__init__()
        c, dim = config, config.d_model
        self.fusion = c.fusion
        self.sensors = nn.Parameter(graph.to(torch.get_default_dtype()).clone())
        self.steps = nn.Parameter(torch.eye(steps))
        self.embed = nn.Linear(dim, dim)
        self.embed_sensor = nn.Linear(len(graph), dim, bias=False)
        self.embed_step = nn.Linear(steps, dim, bias=False)
        self.fixed = nn.Linear(c.order * dim, dim)
        self.dynamic = AttentionAndFeedForward(attention, c)
        if c.fusion == "gate":
            self.gate_dynamic = nn.Linear(dim, 1)
            self.gate_fixed = nn.Linear(dim, 1, bias=False)

    def forward(self, x: Tensor, kernels: Tensor) -> Tensor:
        """(B, M, N, D), (K, N, N) -> (B, M, N, D)."""
        x = self.embed(x) + self.embed_sensor(self.sensors) + self.embed_step(self.steps).unsqueeze(1)
        fixed = self.fixed(torch.cat([x, *(kernel @ x for kernel in kernels[1:].to(x.dtype))], dim=-1))  # T_0 = I
        dynamic = self.dynamic(x.flatten(0, 1)).view_as(x)
        if self.fusion == "sum":
            return F.relu(dynamic + x + SUM_SHARE * fixed)
        gate = torch.sigmoid(self.gate_dynamic(dynamic) + self.gate_fixed(fixed))
        return gate * dynamic + (1 - gate) * fixed


class TemporalTransformer(nn.Module):
    """Section 4.2, for every sensor by itself: X' = F([X, D^T]), U = Attention(X') + X', FFN(U) + U, over the steps."""

    def __init__(self, attention: TokenMixer, steps: int, config: STTNConfig) -> None:
        super().__init__()
        self.steps = nn.Parameter(torch.eye(steps))
        self.embed = nn.Linear(config.d_model, config.d_model)
        self.embed_step = nn.Linear(steps, config.d_model, bias=False)
        self.dynamic = AttentionAndFeedForward(attention, config)

    def forward(self, x: Tensor) -> Tensor:
        """(B, M, N, D) -> (B, M, N, D)."""
        x = (self.embed(x) + self.embed_step(self.steps).unsqueeze(1)).transpose(1, 2)
        return self.dynamic(x.flatten(0, 1)).view_as(x).transpose(1, 2)


class AttentionAndFeedForward(nn.Module):
    """U = Attention(X) + X, then FFN(U) + U with FFN(U) = ReLU(ReLU(U W_0) W_1) W_2; (·, L, D) -> same."""

    def __init__(self, attention: TokenMixer, config: STTNConfig) -> None:
        super().__init__()
        dim = attention.dim
        self.attention = attention
        self.norm1 = nn.LayerNorm(dim) if config.norm else nn.Identity()
        self.feed_forward = nn.Sequential(
            nn.Linear(dim, config.d_ff),
            nn.ReLU(),
            nn.Linear(config.d_ff, config.d_ff),
            nn.ReLU(),
            nn.Linear(config.d_ff, dim),
        )
        self.norm2 = nn.LayerNorm(dim) if config.norm else nn.Identity()
        self.dropout = Dropout(config.dropout)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm1(x + self.dropout(self.attention(x)))
        x = self.norm2(x + self.dropout(self.feed_forward(x)))
        return x


def scaled_laplacian(graph: Tensor) -> Tensor:
    """2 L / lambda_max - I with L = I - D^{-1/2} W D^{-1/2}: eigenvalues in [-1, 1]. (N, N) float64 -> same.

    A directed graph counts each pair by the heavier of its two edges, for only a symmetric Laplacian has real
    eigenvalues. A sensor without an edge has a row of zeros in L.
    """
    weights = torch.maximum(graph, graph.T).to(torch.float64)
    weights = weights - weights.diagonal().diag()
    degree = weights.sum(dim=1)
    scale = torch.where(degree > 0, degree, 1.0).rsqrt()
    laplacian = (degree > 0).to(torch.float64).diag() - scale[:, None] * weights * scale
    largest = torch.linalg.eigvalsh(laplacian)[-1]
    if largest <= 0:
        return torch.zeros_like(laplacian)  # no edge at all: every polynomial of order 1 and up is a multiple of I
    return 2 / largest * laplacian - torch.eye(len(graph), dtype=torch.float64)


def chebyshev(graph: Tensor, order: int) -> Tensor:
    """T_0 = I, T_1 = L, T_k = 2 L T_{k-1} - T_{k-2} of the scaled Laplacian L: (K, N, N) float64."""
    laplacian = scaled_laplacian(graph)
    terms = [torch.eye(len(graph), dtype=torch.float64), laplacian]
    while len(terms) < order:
        terms.append(2 * laplacian @ terms[-1] - terms[-2])
    return torch.stack(terms[:order])
