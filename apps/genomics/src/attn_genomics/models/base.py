"""What every backbone is, and where weights to start from come from.

Shapes: B sequences, L bases, C channels, P places (L, or fewer where a model has strides).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True, kw_only=True)
class Shape:
    """What a backbone must know of the data: the longest sequence of training, in bases."""

    length: int


class Backbone(nn.Module):
    """Codes of bases -> what the model says of every place.

    Args:
        config: the model's dataclass in `attn_genomics.config`.
        shape: of the data.
        mixer, mixer_args: another attention mechanism than the model's own, and its options.

    Attributes:
        width: channels C of what `forward` gives.
        strides: bases a place of the output stands for, the last one of a row for what is left. 1 is what a language
            model needs.
    """

    strides: int = 1
    width: int

    def __init__(
        self,
        config: Any,
        shape: Shape,
        *,
        mixer: str | None = None,
        mixer_args: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.config, self.shape = config, shape

    @property
    def causal(self) -> bool:
        """Whether no place depends on a later base, so that the model can be trained by the next base."""
        return False

    @property
    def streams(self) -> bool:
        """Whether `init_state` and `step` carry a state of one size over any length."""
        return False

    @property
    def decodes(self) -> bool:
        """Whether `init_state` and `step` work, up to `longest` bases and at a cost that may grow with them."""
        return self.streams

    @property
    def longest(self) -> int | None:
        """The longest sequence that the model can take; None = any."""
        return None

    def forward(self, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
        """(B, L) codes of `attn_genomics.tokens` -> (B, P, C).

        Args:
            tokens: (B, L), int64.
            mask: (B, L), True = a base, False = what fills up a row; None = all are bases. What fills up changes
                nothing.

        Raises:
            ValueError: a sequence longer than the model can take.
        """
        raise NotImplementedError

    def bases(self, features: Tensor) -> Tensor | None:
        """(B, L, C) -> (B, L, 4) scores of A, C, G, T by a head that the published model has, or None."""
        return None

    def init_state(self, batch: int, *, device: torch.device | None = None, dtype: torch.dtype | None = None) -> Any:
        """The state before the first base; only where `decodes`."""
        raise ValueError(f"{type(self).__name__} carries no state")

    def step(self, tokens: Tensor, state: Any) -> tuple[Tensor, Any]:
        """(B, T) further bases and the state so far -> (B, T, C) and the state after them; only where `decodes`."""
        raise ValueError(f"{type(self).__name__} carries no state")

    def load_official(self, tensors: Mapping[str, Tensor]) -> None:
        """Take over published weights by their published names.

        Raises:
            ValueError: a name is left over or missing, or a shape is another, with the names.
        """
        raise ValueError(f"{type(self).__name__} has no published weights")
