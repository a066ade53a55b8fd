"""Autoformer: Decomposition Transformers with Auto-Correlation for Long-Term Series Forecasting (S73).

Shapes: B batch, L tokens, M context tokens, D = d_model, C channels of the series.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attn_shared.layers import Dropout
from attn_timeseries.config import AutoformerConfig
from attn_timeseries.models.base import ForecastModel, SeriesShape
from attn_timeseries.models.embedding import DataEmbedding
from attn_timeseries.models.layers import FeedForward, SeriesDecomposition, cross_mixer, self_mixer
from core_attn.contract import TokenMixer


class Autoformer(ForecastModel):
    """Section 3.1: a decomposition after every sublayer leaves the seasonal part; trends are gathered on the way.

    The encoder sees the look-back. With s, t the look-back's seasonal part and trend, the decoder's seasonal stream is
    the end of s, then zeros; its trend stream the end of t, then the look-back's mean. Embeddings have no positions:
    Auto-Correlation knows the order. The forecast is the sum of both streams.

    Args:
        config, shape, mixer, mixer_args: see `ForecastModel`. The mixer is the self-attention of encoder and decoder,
            and the cross-attention where it has a cross pattern (softmax otherwise). The decoder's self-attention is
            noncausal, as the paper's: its tokens in the place of the future hold no values, so nothing can leak.

    Raises:
        ValueError: a mixer that cannot compute noncausal self-attention; an even `moving_avg`.
    """

    config: AutoformerConfig
    any_length: ClassVar[bool] = True

    def __init__(
        self,
        config: AutoformerConfig,
        shape: SeriesShape,
        *,
        mixer: str | None = None,
        mixer_args: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(config, shape)
        c, name, options = config, mixer or "auto_correlation", dict(mixer_args or {})
        if name == "auto_correlation":
            options = {"factor": c.factor, **options}
        steps = shape.label_len + shape.pred_len

        def attention() -> TokenMixer:
            return self_mixer(name, c.d_model, c.n_heads, dropout=c.dropout, options=options)

        def feed_forward() -> FeedForward:
            return FeedForward(c.d_model, c.d_ff, dropout=c.dropout, activation=c.activation, bias=False)

        def decomposition() -> SeriesDecomposition:
            return SeriesDecomposition(c.moving_avg, shape.seq_len, steps)

        def embedding() -> DataEmbedding:
            return DataEmbedding(shape.channels, shape.marks, c.d_model, dropout=c.dropout, positions=None)

        self.decomposition = decomposition()
        self.encoder_embedding = embedding()
        self.encoder = nn.ModuleList(
            SeasonalEncoderLayer(attention(), feed_forward(), decomposition(), dropout=c.dropout)
            for _ in range(c.e_layers)
        )
        self.encoder_norm = SeasonalNorm(c.d_model)
        self.decoder_embedding = embedding()
        self.decoder = nn.ModuleList(
            SeasonalDecoderLayer(
                attention(),
                cross_mixer(name, c.d_model, c.n_heads, dropout=c.dropout, options=options),
                feed_forward(),
                decomposition(),
                shape.channels,
                dropout=c.dropout,
            )
            for _ in range(c.d_layers)
        )
        self.decoder_norm = SeasonalNorm(c.d_model)
        self.projection = nn.Linear(c.d_model, shape.channels)

    def forward(self, x: Tensor, x_mark: Tensor, y_mark: Tensor) -> Tensor:
        self.check_inputs(x, x_mark, y_mark)
        seasonal, trend = self.decomposition(x)
        start = x.shape[1] - self.shape.label_len
        mean = x.mean(dim=1, keepdim=True).expand(-1, self.shape.pred_len, -1)
        trend = torch.cat([trend[:, start:], mean], dim=1)

        context = self.encoder_embedding(x, x_mark)
        for layer in self.encoder:
            context = layer(context)
        context = self.encoder_norm(context)

        tokens = self.decoder_embedding(self.decoder_values(seasonal), y_mark)
        for layer in self.decoder:
            tokens, more = layer(tokens, context)
            trend = trend + more
        seasonal = self.projection(self.decoder_norm(tokens))
        return (trend + seasonal)[:, self.shape.label_len :]


class SeasonalEncoderLayer(nn.Module):
    """Equation 3: S1 = seasonal(x + attention(x)),  S2 = seasonal(S1 + feed_forward(S1)). The trends are dropped."""

    def __init__(
        self, attention: TokenMixer, feed_forward: FeedForward, decomposition: SeriesDecomposition, *, dropout: float
    ) -> None:
        super().__init__()
        self.attention = attention
        self.feed_forward = feed_forward
        self.decomposition = decomposition
        self.dropout = Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        x = self.decomposition.remainder(x + self.dropout(self.attention(x)))
        return self.decomposition.remainder(x + self.feed_forward(x))


class SeasonalDecoderLayer(nn.Module):
    """Equation 4: three sublayers, each followed by a decomposition; T1 + T2 + T3 are mapped to the channels.

    What the three decompositions took out is what went in less what is left, so the trends need no sums of their own:

        T1 + T2 + T3 = x + attention(x) + cross_attention(S1) + feed_forward(S2) - S3.
    """

    def __init__(
        self,
        attention: TokenMixer,
        cross_attention: TokenMixer,
        feed_forward: FeedForward,
        decomposition: SeriesDecomposition,
        channels: int,
        *,
        dropout: float,
    ) -> None:
        super().__init__()
        self.attention = attention
        self.cross_attention = cross_attention
        self.feed_forward = feed_forward
        self.decomposition = decomposition
        self.dropout = Dropout(dropout)
        self.trend = TrendProjection(attention.dim, channels)

    def forward(self, x: Tensor, context: Tensor) -> tuple[Tensor, Tensor]:
        """(B, L, D), (B, M, D) -> seasonal part (B, L, D), trend (B, L, C)."""
        read = x + self.dropout(self.attention(x))
        seasonal = self.decomposition.remainder(read)
        cross = self.dropout(self.cross_attention(seasonal, context=context))
        seasonal = self.decomposition.remainder(seasonal + cross)
        fed = self.feed_forward(seasonal)
        seasonal = self.decomposition.remainder(seasonal + fed)
        return seasonal, self.trend(read + cross + fed - seasonal)


class TrendProjection(nn.Module):
    """(B, L, D) -> (B, L, C): circular convolution over three steps, without bias.

    One matrix product to 3 C numbers a step, of which each step then takes its own and its two neighbours': D is large
    and C small, so the neighbours are gathered after the product. weight (3 C, D), rows: step before, step, step after.
    """

    def __init__(self, dim: int, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(3 * channels, dim))
        bound = (3 * dim) ** -0.5
        nn.init.uniform_(self.weight, -bound, bound)

    def forward(self, x: Tensor) -> Tensor:
        before, here, after = F.linear(x, self.weight).chunk(3, dim=-1)
        return before.roll(1, dims=1) + here + after.roll(-1, dims=1)


class SeasonalNorm(nn.Module):
    """LayerNorm less its mean over time, so that the seasonal part keeps no level.

    A bias would be such a level and cancel; there is none.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(x)
        return x - x.mean(dim=1, keepdim=True)
