"""Informer: Beyond Efficient Transformer for Long Sequence Time-Series Forecasting (S83)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attn_timeseries.config import InformerConfig
from attn_timeseries.models.base import SeriesShape
from attn_timeseries.models.layers import DecoderLayer, EncoderLayer, cross_mixer, neighbours, self_mixer
from attn_timeseries.models.transformer import Transformer
from core_attn.contract import TokenMixer
from core_attn.mechanisms.sparse.prob_sparse import ProbSparseAttention


class Informer(Transformer):
    """The Transformer with ProbSparse self-attention and an encoder that halves the sequence (Section 4).

    The decoder (Equation 6) reads the last label_len steps of the look-back, then zeros, and forecasts in one pass. The
    zeros carry only positions and calendar features, so nothing can leak from them: its self-attention is causal where
    the mixer has a causal form, and noncausal otherwise.

    Args:
        config, shape, mixer, mixer_args: see `ForecastModel`. The mixer is the self-attention of encoder and decoder;
            the cross-attention is softmax attention always, as in the paper.

    Raises:
        ValueError: a mixer that cannot compute self-attention; no encoder or no decoder layer.
    """

    config: InformerConfig  # type: ignore[assignment]
    own_mixer: ClassVar[str] = "prob_sparse"
    embedding_bias: ClassVar[bool] = True

    def __init__(
        self,
        config: InformerConfig,
        shape: SeriesShape,
        *,
        mixer: str | None = None,
        mixer_args: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(config, shape, mixer=mixer, mixer_args=mixer_args)  # type: ignore[arg-type]
        self.distil = nn.ModuleList(Distil(config.d_model) for _ in range(config.e_layers - 1 if config.distil else 0))

    def _encoder_layer(self, mixer: str, options: Mapping[str, Any]) -> EncoderLayer:
        if mixer == "prob_sparse":
            options = {"factor": self.config.factor, **options}
        return super()._encoder_layer(mixer, options)

    def _decoder_layer(self, mixer: str, options: Mapping[str, Any]) -> DecoderLayer:
        c = self.config
        attention: TokenMixer
        if mixer == "prob_sparse":
            options = {"factor": c.factor, "selection": "paper", **options}
        if mixer == "prob_sparse" and c.mix:
            attention = MixedProbSparse(c.d_model, heads=c.n_heads, causal=True, **options)
        else:
            attention = self_mixer(mixer, c.d_model, c.n_heads, causal=True, dropout=c.dropout, options=options)
        cross = cross_mixer("softmax", c.d_model, c.n_heads, dropout=c.dropout, options={})
        return DecoderLayer(attention, cross, c.d_ff, dropout=c.dropout, activation=c.activation)

    def encode(self, tokens: Tensor) -> Tensor:
        for i, layer in enumerate(self.encoder):
            tokens = layer(tokens)
            if i < len(self.distil):
                tokens = self.distil[i](tokens)
        return self.encoder_norm(tokens)


class MixedProbSparse(ProbSparseAttention):
    """ProbSparse attention that hands its heads on as the official decoder does (`InformerConfig.mix`).

    The (H, L) axes of the result are read as (L, H): token i gets H consecutive steps of one head instead of its own
    step of all heads. Published results were made so.
    """

    def merge_heads(self, x: Tensor) -> Tensor:
        """(B, H, L, D) -> (B, L, H·D)."""
        return x.reshape(x.shape[0], x.shape[2], -1)


class Distil(nn.Module):
    """Equation 5: (B, L, D) -> (B, ceil(L / 2), D), MaxPool(ELU(BatchNorm(Conv(x)))).

    The convolution is circular over three steps; the pooling takes windows of three with stride two.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.conv = nn.Linear(3 * dim, dim)
        self.norm = nn.BatchNorm1d(dim)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(neighbours(x))
        x = F.elu(self.norm(x.flatten(0, 1)).view_as(x))
        pooled, odd = x[:, 0::2], x[:, 1::2]
        pooled = torch.maximum(pooled, F.pad(odd, (0, 0, 0, pooled.shape[1] - odd.shape[1]), value=float("-inf")))
        return torch.maximum(pooled, F.pad(odd[:, : pooled.shape[1] - 1], (0, 0, 1, 0), value=float("-inf")))
