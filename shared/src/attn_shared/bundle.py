"""What an application's data become, apart from `attn_shared.task` so that reading them does not import the trainer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch.utils.data import Dataset


@dataclass(kw_only=True)
class DataBundle:
    """The data of a run, split.

    Attributes:
        train, val, test: map-style data sets. An item is a dict of tensors; `__getitems__(list[int])` may return a
            whole batch at once, which is used as it is. A train set may define `set_epoch(seed, epoch)`: augmentation
            then follows from seed, epoch and index.
        state: JSON-able statistics fitted on the training split (scalers, vocabularies, names): all that `predict`
            needs beside the weights. Stored in the checkpoint.
        facts: what the report shows about the data: counts a split, ranges, gaps found.
        collate: as in torch's DataLoader; None = default.
        protocol: one sentence that names the evaluation protocol; stands under every table.
    """

    train: Dataset[Any] | None
    val: Dataset[Any] | None
    test: Dataset[Any] | None
    state: dict[str, Any]
    facts: dict[str, Any] = field(default_factory=dict)
    collate: Callable[[list[Any]], Any] | None = None
    protocol: str = ""

    def split(self, name: str) -> Dataset[Any] | None:
        return {"train": self.train, "val": self.val, "test": self.test}[name]
