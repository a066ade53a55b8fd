"""What every forecasting model is: its shape and its signature.

Shapes: B batch, L = seq_len look-back, S = label_len + pred_len decoder tokens, C channels, F calendar features.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn


@dataclass(frozen=True, kw_only=True)
class SeriesShape:
    """The shape of a forecasting problem.

    Attributes:
        seq_len: look-back, in steps.
        label_len: last steps of the look-back that start the decoder; models without a decoder ignore it.
        pred_len: steps to forecast.
        channels: series forecast together.
        marks: calendar features a step.
        season: steps of a season, such as 24 for hours; 1 = none known.
        graph: (channels, channels) weights of the edges between the series, 0 = no edge; None = no graph known.

    Raises:
        ValueError: a length below its minimum, or a decoder start longer than the look-back.
    """

    seq_len: int
    label_len: int
    pred_len: int
    channels: int
    marks: int
    season: int = 1
    graph: Tensor | None = field(default=None, compare=False)

    def __post_init__(self) -> None:
        for name, least in (("seq_len", 1), ("label_len", 0), ("pred_len", 1), ("channels", 1), ("marks", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}, got {getattr(self, name)}")
        if self.season < 1:
            raise ValueError(f"season must be at least 1 step, got {self.season}")
        if self.graph is not None and tuple(self.graph.shape) != (self.channels, self.channels):
            raise ValueError(
                f"a graph of {self.channels} series is a matrix of {self.channels} x {self.channels}, "
                f"got {tuple(self.graph.shape)}"
            )
        if self.label_len > self.seq_len:
            raise ValueError(
                f"label_len ({self.label_len}) cannot exceed seq_len ({self.seq_len}): the decoder starts with the end "
                f"of the look-back"
            )


class ForecastModel(nn.Module):
    """(x, x_mark, y_mark) -> forecast; all values scaled.

    Args:
        config: the model's dataclass in `attn_timeseries.config`.
        shape: the forecasting problem.
        mixer: name of the `core_attn` mechanism that mixes tokens; None = the paper's own.
        mixer_args: its options.

    Class attributes:
        any_length: whether the weights serve look-backs of every length; `allow_lengths` then lets them in.
    """

    any_length: ClassVar[bool] = False

    def __init__(
        self, config: Any, shape: SeriesShape, *, mixer: str | None = None, mixer_args: Mapping[str, Any] | None = None
    ) -> None:
        super().__init__()
        self.config = config
        self.shape = shape
        self.longest: int | None = None

    @property
    def shortest(self) -> int:
        """Steps of the shortest look-back that `allow_lengths` lets in."""
        return max(1, self.shape.label_len)

    def allow_lengths(self, longest: int) -> None:
        """From now on take look-backs of `shortest` to `longest` steps, not of the trained length alone.

        Raises:
            ValueError: the model has weights of its own for each step of the look-back.
        """
        if not self.any_length:
            raise ValueError(
                f"{type(self).__name__} has weights for each of the {self.shape.seq_len} steps of its look-back, so it "
                f"takes look-backs of that length only"
            )
        for module in self.modules():
            allow: Callable[[int], None] | None = getattr(module, "allow_lengths", None)
            if module is not self and allow is not None:
                allow(longest)
        self.longest = longest

    def forward(self, x: Tensor, x_mark: Tensor, y_mark: Tensor) -> Tensor:
        """Forecast.

        Args:
            x: (B, seq_len, C) the look-back.
            x_mark: (B, seq_len, F) its calendar features, floats in [-0.5, 0.5].
            y_mark: (B, label_len + pred_len, F) those of the decoder's steps.

        Returns:
            (B, pred_len, C).

        Raises:
            ValueError: a shape that is not the model's.
        """
        raise NotImplementedError

    def check_inputs(self, x: Tensor, x_mark: Tensor, y_mark: Tensor) -> None:
        """Refuse, in one sentence, tensors of another shape than the model was built for."""
        s, steps = self.shape, self.shape.seq_len
        if self.longest is not None and x.dim() == 3 and self.shortest <= x.shape[1] <= self.longest:
            steps = x.shape[1]
        for name, tensor, length, width in (
            ("x", x, steps, s.channels),
            ("x_mark", x_mark, steps, s.marks),
            ("y_mark", y_mark, s.label_len + s.pred_len, s.marks),
        ):
            if tensor.dim() != 3 or tuple(tensor.shape[1:]) != (length, width):
                raise ValueError(
                    f"{type(self).__name__} was built for {name} of shape (B, {length}, {width}), "
                    f"got {tuple(tensor.shape)}"
                )

    def decoder_values(self, x: Tensor) -> Tensor:
        """(B, L, C) -> (B, S, C): the last label_len steps, then zeros in the place of what is to be forecast."""
        start = x[:, x.shape[1] - self.shape.label_len :]
        return torch.cat([start, x.new_zeros(x.shape[0], self.shape.pred_len, x.shape[2])], dim=1)


class MixerFreeModel(ForecastModel):
    """A forecasting model that mixes no tokens by attention, and so takes no mixer.

    Raises:
        ValueError: a mixer is given.
    """

    def __init__(
        self, config: Any, shape: SeriesShape, *, mixer: str | None = None, mixer_args: Mapping[str, Any] | None = None
    ) -> None:
        super().__init__(config, shape)
        if mixer is not None or mixer_args:
            raise ValueError(f"{type(self).__name__} has no attention, so it takes no mixer and no mixer_args")
