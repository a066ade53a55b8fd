"""The encoder-decoder Transformer over time steps, as the forecasting papers run it beside their own models.

"Attention Is All You Need" (Vaswani et al., 2017) with Informer's embedding and its one-pass decoder.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from attn_timeseries.config import TransformerConfig
from attn_timeseries.models.base import ForecastModel, SeriesShape
from attn_timeseries.models.embedding import DataEmbedding
from attn_timeseries.models.layers import DecoderLayer, EncoderLayer, cross_mixer, self_mixer


class Transformer(ForecastModel):
    """Encoder over the look-back; decoder over its last label_len steps followed by zeros; one pass, no recursion.

    The decoder's tokens in the place of the future carry only positions and calendar features, so nothing can leak from
    them: its self-attention is causal where the mixer has a causal form, and noncausal otherwise.

    Args:
        config, shape, mixer, mixer_args: see `ForecastModel`. The mixer is the self-attention of encoder and decoder,
            and the cross-attention where it has a cross pattern (softmax otherwise).

    Raises:
        ValueError: a mixer that cannot compute noncausal self-attention.
    """

    config: TransformerConfig

    def __init__(
        self,
        config: TransformerConfig,
        shape: SeriesShape,
        *,
        mixer: str | None = None,
        mixer_args: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(config, shape)
        c, name, options = config, mixer or "softmax", dict(mixer_args or {})
        steps = shape.label_len + shape.pred_len
        layer = {"dropout": c.dropout, "activation": c.activation}
        self.encoder_embedding = self._embedding(shape.seq_len)
        self.encoder = nn.ModuleList(
            EncoderLayer(self_mixer(name, c.d_model, c.n_heads, dropout=c.dropout, options=options), c.d_ff, **layer)
            for _ in range(c.e_layers)
        )
        self.encoder_norm = nn.LayerNorm(c.d_model)
        self.decoder_embedding = self._embedding(steps)
        self.decoder = nn.ModuleList(self._decoder_layer(name, options) for _ in range(c.d_layers))
        self.decoder_norm = nn.LayerNorm(c.d_model)
        self.projection = nn.Linear(c.d_model, shape.channels)

    def _embedding(self, steps: int) -> DataEmbedding:
        c, s = self.config, self.shape
        return DataEmbedding(s.channels, s.marks, c.d_model, dropout=c.dropout, positions=steps)

    def _decoder_layer(self, mixer: str, options: Mapping[str, Any]) -> DecoderLayer:
        c = self.config
        return DecoderLayer(
            self_mixer(mixer, c.d_model, c.n_heads, causal=True, dropout=c.dropout, options=options),
            cross_mixer(mixer, c.d_model, c.n_heads, dropout=c.dropout, options=options),
            c.d_ff,
            dropout=c.dropout,
            activation=c.activation,
        )

    def forward(self, x: Tensor, x_mark: Tensor, y_mark: Tensor) -> Tensor:
        self.check_inputs(x, x_mark, y_mark)
        context = self.encoder_embedding(x, x_mark)
        for layer in self.encoder:
            context = layer(context)
        context = self.encoder_norm(context)
        tokens = self.decoder_embedding(self.decoder_values(x), y_mark)
        for layer in self.decoder:
            tokens = layer(tokens, context)
        return self.projection(self.decoder_norm(tokens[:, self.shape.label_len :]))
