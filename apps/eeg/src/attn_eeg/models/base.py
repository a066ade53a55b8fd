"""What every EEG model is: its shape and its signature.

Shapes: B batch, C electrodes, F features of an electrode, T samples of a window, K classes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn


@dataclass(frozen=True, kw_only=True)
class EegShape:
    """The shape of a classification problem.

    Attributes:
        channels: electrodes C.
        features: features F of an electrode, such as one for each band; 0 where the model gets raw windows.
        samples: samples T of a raw window; 0 where the model gets features.
        classes: classes K.
        channel_names: names of the electrodes, such as "Fp1"; empty where they have none.

    Raises:
        ValueError: fewer than one electrode or two classes; features and raw samples at once, or neither; another
            number of names than electrodes.
    """

    channels: int
    features: int
    samples: int
    classes: int
    channel_names: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.channels < 1:
            raise ValueError(f"there must be at least 1 electrode, got {self.channels}")
        if self.classes < 2:
            raise ValueError(f"there must be at least 2 classes, got {self.classes}")
        if min(self.features, self.samples) < 0 or (self.features > 0) == (self.samples > 0):
            raise ValueError(
                f"a window has either features or samples, got features={self.features} and samples={self.samples}"
            )
        if self.channel_names and len(self.channel_names) != self.channels:
            raise ValueError(f"{len(self.channel_names)} names were given for {self.channels} electrodes")

    @property
    def width(self) -> int:
        """Numbers that an electrode has in a window: F or T."""
        return self.features or self.samples


class EegModel(nn.Module):
    """A window -> logits of the classes.

    Args:
        config: the model's dataclass in `attn_eeg.config`.
        shape: the classification problem.
        mixer: name of the `core_attn` mechanism that mixes tokens; None = the paper's own.
        mixer_args: its options.
    """

    def __init__(
        self, config: Any, shape: EegShape, *, mixer: str | None = None, mixer_args: Mapping[str, Any] | None = None
    ) -> None:
        super().__init__()
        self.config = config
        self.shape = shape

    def forward(self, x: Tensor) -> Tensor:
        """Classify windows.

        Args:
            x: (B, C, F) features, or (B, C, T) raw windows, standardised as the data options say.

        Returns:
            (B, K) logits.

        Raises:
            ValueError: a shape that is not the model's.
        """
        raise NotImplementedError

    def check_inputs(self, x: Tensor) -> None:
        """Refuse, in one sentence, a tensor of another shape than the model was built for."""
        expected = (self.shape.channels, self.shape.width)
        if x.dim() != 3 or tuple(x.shape[1:]) != expected:
            raise ValueError(
                f"{type(self).__name__} was built for windows of shape (B, {expected[0]}, {expected[1]}), "
                f"got {tuple(x.shape)}"
            )


class MixerFreeModel(EegModel):
    """An EEG model that mixes no tokens by attention, and so takes no mixer.

    Raises:
        ValueError: a mixer is given.
    """

    def __init__(
        self, config: Any, shape: EegShape, *, mixer: str | None = None, mixer_args: Mapping[str, Any] | None = None
    ) -> None:
        super().__init__(config, shape)
        if mixer is not None or mixer_args:
            raise ValueError(f"{type(self).__name__} has no attention, so it takes no mixer and no mixer_args")
