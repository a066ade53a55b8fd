"""Flowformer: Linearizing Transformers with Conservation Flows (S217), in its authors' forecasting form."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from attn_timeseries.config import FlowformerConfig
from attn_timeseries.models.layers import DecoderLayer, EncoderLayer
from attn_timeseries.models.transformer import Transformer


class Flowformer(Transformer):
    """The Transformer with Flow-Attention, linear in the look-back, in the encoder.

    As in the official forecasting code, the decoder keeps softmax attention, causal in itself.

    Args:
        config, shape, mixer, mixer_args: see `ForecastModel`. The mixer is the encoder's self-attention.

    Raises:
        ValueError: a mixer that cannot compute self-attention; no encoder or no decoder layer.
    """

    config: FlowformerConfig
    own_mixer: ClassVar[str] = "flow"

    def _encoder_layer(self, mixer: str, options: Mapping[str, Any]) -> EncoderLayer:
        if mixer == "flow":
            options = {"clamp": False, **options}  # the authors' time-series code does not limit the conserved source
        return super()._encoder_layer(mixer, options)

    def _decoder_layer(self, mixer: str, options: Mapping[str, Any]) -> DecoderLayer:
        return super()._decoder_layer("softmax", {})
