"""Classifiers of whole series: an encoder over time steps whose tokens an output layer reads.

Flowformer: Linearizing Transformers with Conservation Flows (S217), section 4.3 and its code for the UEA archive. The
encoder is that of the mvts Transformer ("A Transformer-based Framework for Multivariate Time Series Representation
Learning", Zerveas et al., 2021) with layer normalisation; with softmax attention it is the Transformer.

Shapes: B batch, L = steps the model was built for, C channels, D = d_model, K classes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from attn_shared.layers import Dropout
from attn_timeseries.classification.cards import ClassifyTaskConfig
from attn_timeseries.config import TransformerConfig
from attn_timeseries.models.embedding import sinusoidal_positions
from attn_timeseries.models.layers import ACTIVATIONS, EncoderLayer, self_mixer


@dataclass(frozen=True, kw_only=True)
class ClassifyShape:
    """The shape of a classification problem.

    Attributes:
        length: steps L that series are padded to.
        channels: C.
        classes: K.
        ragged: whether any series is shorter than L.

    Raises:
        ValueError: a number below its minimum.
    """

    length: int
    channels: int
    classes: int
    ragged: bool = True

    def __post_init__(self) -> None:
        for name, least in (("length", 1), ("channels", 1), ("classes", 2)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}, got {getattr(self, name)}")


class SeriesClassifier(nn.Module):
    """x sqrt(D) W + positions, encoder layers, layer norm, activation; the steps that are there to the output layer.

    Args:
        config: sizes; `d_layers` belongs to forecasting and is not used.
        shape: the classification problem.
        task: positions, padding, readout.
        mixer: name of the `core_attn` mechanism of the encoder; None = `own_mixer`.
        mixer_args: its options.

    Raises:
        ValueError: a mixer that cannot compute self-attention, or one without a padding mask where series
            differ in length and padding is to be hidden; no encoder layer.
    """

    own_mixer: ClassVar[str] = "softmax"

    def __init__(
        self,
        config: TransformerConfig,
        shape: ClassifyShape,
        task: ClassifyTaskConfig | None = None,
        *,
        mixer: str | None = None,
        mixer_args: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        if config.e_layers < 1:
            raise ValueError(f"e_layers must be at least 1, got {config.e_layers}")
        self.config, self.shape, self.task = config, shape, task or ClassifyTaskConfig()
        c, name = config, mixer or self.own_mixer
        options = {**self.mixer_defaults(name), **(mixer_args or {})}
        self.embedding = nn.Linear(shape.channels, c.d_model)
        if self.task.positions == "learnable":
            self.positions = nn.Parameter(torch.empty(shape.length, c.d_model).uniform_(-0.02, 0.02))
        else:
            self.register_buffer("positions", sinusoidal_positions(shape.length, c.d_model), persistent=False)
        self.encoder = nn.ModuleList(
            EncoderLayer(
                self_mixer(name, c.d_model, c.n_heads, ordered=True, dropout=c.dropout, options=options),
                c.d_ff,
                dropout=c.dropout,
                activation=c.activation,
            )
            for _ in range(c.e_layers)
        )
        self.norm = nn.LayerNorm(c.d_model)
        self.dropout = Dropout(c.dropout)
        self.activation = ACTIVATIONS[c.activation]
        tokens = shape.length if self.task.readout == "flatten" else 1
        self.output = nn.Linear(tokens * c.d_model, shape.classes)
        first = self.encoder[0]
        assert isinstance(first, EncoderLayer)
        self.hides = first.attention.info.padding
        self.mixer_name = name
        if shape.ragged:
            self._check_padding()

    @staticmethod
    def mixer_defaults(name: str) -> dict[str, Any]:
        """Options of a mechanism that the published model sets."""
        return {}

    def _check_padding(self) -> None:
        if self.task.padding == "mask" and not self.hides:
            raise ValueError(
                f"series differ in length, and {self.mixer_name} cannot leave padding out; choose another mixer, or "
                f"--task_args.padding official, which lets padding take part"
            )

    def tokens(self, x: Tensor, mask: Tensor) -> Tensor:
        """(B, L, C), (B, L) -> (B, L, D): what the output layer reads, zeros behind the end of a series.

        Raises:
            ValueError: another shape than the model was built for; padding that the mechanism cannot leave out.
        """
        s = self.shape
        if tuple(x.shape[1:]) != (s.length, s.channels) or mask.shape != x.shape[:2]:
            raise ValueError(
                f"{type(self).__name__} was built for series of shape (B, {s.length}, {s.channels}) with a mask "
                f"(B, {s.length}), got {tuple(x.shape)} and {tuple(mask.shape)}"
            )
        hidden = None
        if self.task.padding == "mask" and not bool(mask.all()):
            self._check_padding()
            hidden = mask
        tokens = self.dropout(self.embedding(x) * math.sqrt(self.config.d_model) + self.positions)
        for layer in self.encoder:
            tokens = layer(tokens, hidden)
        tokens = self.dropout(self.activation(self.norm(tokens)))
        return torch.where(mask.unsqueeze(-1), tokens, 0.0)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """Logits.

        Args:
            x: (B, L, C) series, padded behind.
            mask: (B, L) bool, True = a step of the series.

        Returns:
            (B, K).
        """
        tokens = self.tokens(x, mask)
        if self.task.readout == "flatten":
            return self.output(tokens.flatten(1))
        return self.output(tokens.sum(dim=1) / mask.sum(dim=1, keepdim=True).clamp_min(1).to(tokens.dtype))


class TransformerClassifier(SeriesClassifier):
    """With softmax attention."""


class FlowformerClassifier(SeriesClassifier):
    """With Flow-Attention, linear in the number of steps."""

    own_mixer: ClassVar[str] = "flow"

    @staticmethod
    def mixer_defaults(name: str) -> dict[str, Any]:
        # The authors' time-series code does not limit the conserved source.
        return {"clamp": False} if name == "flow" else {}
