"""What every model that predicts clicks is."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn


@dataclass(frozen=True, kw_only=True)
class Vocabulary:
    """A field of names.

    Attributes:
        name: the column.
        size: numbers used: 0 = padding or missing, 1 = unknown, then the names of the training rows.
        many: several names a row (mean of their vectors).
        shares: name of the field whose names (and so whose embedding) it shares, as behaviour shares the item's.
    """

    name: str
    size: int
    many: bool = False
    shares: str | None = None


@dataclass(frozen=True, kw_only=True)
class ClicksShape:
    """The fields of a table.

    Attributes:
        fields: fields of names; the order of `batch["names"]` for those with one name a row.
        numeric: names of the numeric fields.
        item: name of the field that is the item, where one is known.
        user: name of the field that is the user, where one is known.
        behaviour: fields of the user's earlier items, each sharing the vocabulary of a field of the item; the batch has
            them as `past.<field>` (B, L), padded at the start with 0; (B, L, W) where the field holds several names.
    """

    fields: tuple[Vocabulary, ...]
    numeric: tuple[str, ...] = ()
    item: str | None = None
    user: str | None = None
    behaviour: tuple[str, ...] = ()


class ClickModel(nn.Module):
    """Probability of a click.

    A batch is a dict: `names` (B, F1) int64, the fields with one name a row, in order; `many.<field>` (B, W) int64,
    padded at the end with 0; `numbers` (B, N) float32, standardised; `past.<field>` (B, L) or (B, L, W) int64; `label`
    (B,) float32.

    Args:
        config: the model's dataclass in `attn_recsys.config`.
        shape: the fields.
        mixer, mixer_args: as in every application.
    """

    def __init__(
        self,
        config: Any,
        shape: ClicksShape,
        *,
        mixer: str | None = None,
        mixer_args: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.config, self.shape = config, shape

    def forward(self, batch: Mapping[str, Tensor]) -> Tensor:
        """(B,) log odds of a click."""
        raise NotImplementedError

    def loss(self, batch: Mapping[str, Tensor]) -> Tensor:
        """Mean training loss; binary cross entropy where a model adds no term of its own."""
        return nn.functional.binary_cross_entropy_with_logits(self(batch), batch["label"])
