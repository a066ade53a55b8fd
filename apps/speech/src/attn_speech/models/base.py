"""What every model that separates voices is."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn


class Separator(nn.Module):
    """(B, T) mixtures -> (B, C, T) voices.

    Args:
        config: the model's dataclass in `attn_speech.config`.
        speakers: C, voices.
        mixer: name of the `core_attn` mechanism that mixes frames; None = the paper's own.
        mixer_args: its options.

    Attributes:
        stride: samples between two frames of the encoder; a stretch that is cut at multiples of it keeps its frames.
        reach: samples after t that the voices at t depend on: of a causal model at most the encoder's window; None =
            the whole mixture.
    """

    stride: int
    reach: int | None

    def __init__(
        self, config: Any, speakers: int, *, mixer: str | None = None, mixer_args: Mapping[str, Any] | None = None
    ) -> None:
        super().__init__()
        self.config, self.speakers = config, speakers

    def forward(self, mixture: Tensor, lengths: Tensor | None = None) -> Tensor:
        """Voices.

        Args:
            mixture: (B, T).
            lengths: (B,) samples of each mixture; what lies behind has no influence on what lies before, and comes out
                as 0. None = all are T long.
        """
        raise NotImplementedError
