"""The encoder-decoder Transformer over time steps, as the forecasting papers run it beside their own models.

"Attention Is All You Need" (Vaswani et al., 2017) with Informer's embedding and its one-pass decoder.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

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
        ValueError: a mixer that cannot compute self-attention; no encoder or no decoder layer.
    """

    config: TransformerConfig
    any_length: ClassVar[bool] = True
    own_mixer: ClassVar[str] = "softmax"
    embedding_bias: ClassVar[bool] = False

    def __init__(
        self,
        config: TransformerConfig,
        shape: SeriesShape,
        *,
        mixer: str | None = None,
        mixer_args: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(config, shape)
        if config.e_layers < 1 or config.d_layers < 1:
            raise ValueError(f"e_layers and d_layers must be at least 1, got {config.e_layers} and {config.d_layers}")
        c, name, options = config, mixer or self.own_mixer, dict(mixer_args or {})
        self.encoder_embedding = self._embedding(shape.seq_len)
        self.encoder = nn.ModuleList(self._encoder_layer(name, options) for _ in range(c.e_layers))
        self.encoder_norm = nn.LayerNorm(c.d_model)
        self.decoder_embedding = self._embedding(shape.label_len + shape.pred_len)
        self.decoder = nn.ModuleList(self._decoder_layer(name, options) for _ in range(c.d_layers))
        self.decoder_norm = nn.LayerNorm(c.d_model)
        self.projection = nn.Linear(c.d_model, shape.channels)

    def _embedding(self, steps: int) -> DataEmbedding:
        c, s = self.config, self.shape
        return DataEmbedding(
            s.channels, s.marks, c.d_model, dropout=c.dropout, positions=steps, bias=self.embedding_bias
        )

    def _encoder_layer(self, mixer: str, options: Mapping[str, Any]) -> EncoderLayer:
        c = self.config
        attention = self_mixer(mixer, c.d_model, c.n_heads, ordered=True, dropout=c.dropout, options=options)
        return EncoderLayer(attention, c.d_ff, dropout=c.dropout, activation=c.activation)

    def _decoder_layer(self, mixer: str, options: Mapping[str, Any]) -> DecoderLayer:
        c = self.config
        attention = self_mixer(
            mixer, c.d_model, c.n_heads, causal=True, ordered=True, dropout=c.dropout, options=options
        )
        cross = cross_mixer(mixer, c.d_model, c.n_heads, dropout=c.dropout, options=options)
        return DecoderLayer(attention, cross, c.d_ff, dropout=c.dropout, activation=c.activation)

    def encode(self, tokens: Tensor) -> Tensor:
        """(B, L, D) embedded look-back -> what the decoder reads, (B, M, D)."""
        for layer in self.encoder:
            tokens = layer(tokens)
        return self.encoder_norm(tokens)

    def forward(self, x: Tensor, x_mark: Tensor, y_mark: Tensor) -> Tensor:
        self.check_inputs(x, x_mark, y_mark)
        context = self.encode(self.encoder_embedding(x, x_mark))
        tokens = self.decoder_embedding(self.decoder_values(x), y_mark)
        for layer in self.decoder[:-1]:
            tokens = layer(tokens, context)
        tokens = self.decoder[-1](tokens, context, drop=self.shape.label_len)
        return self.projection(self.decoder_norm(tokens))
