"""What every model that ranks items is."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn


@dataclass(frozen=True, kw_only=True)
class ItemsShape:
    """Numbers of users, items, entities (items included) and relations (inverse ones included)."""

    users: int
    items: int
    entities: int = 0
    relations: int = 0


@dataclass(frozen=True, kw_only=True)
class ItemsGraph:
    """What a model may look at beside a batch: training interactions and triples. Never validation or test.

    Attributes:
        user, item: (N,) int64, training interactions.
        head, relation, tail: (T,) int64, triples (inverse ones included); empty without a knowledge graph.
    """

    user: Tensor
    item: Tensor
    head: Tensor
    relation: Tensor
    tail: Tensor


class ItemModel(nn.Module):
    """Ranks items for users.

    Args:
        config: the model's dataclass in `attn_recsys.config`.
        shape: numbers of users, items, entities and relations.
        graph: training interactions and triples.
        mixer, mixer_args: as in every application; models without tokens take none.

    Class attributes:
        reads_graph: whether it reads the triples, so that an item that nobody had yet can be ranked.
    """

    reads_graph: ClassVar[bool] = False

    def __init__(
        self,
        config: Any,
        shape: ItemsShape,
        graph: ItemsGraph,
        *,
        mixer: str | None = None,
        mixer_args: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.config, self.shape = config, shape

    def start_epoch(self, epoch: int) -> None:
        """Called before the first step of each epoch, with the weights as they are then."""

    def loss(self, batch: Mapping[str, Tensor], step: int) -> Tensor:
        """Mean training loss.

        Args:
            batch: `user` (B,), `positive` (B,), `negative` (B, negatives). What a model needs of the graph beside it
                draws itself.
            step: optimiser step, from 0.
        """
        raise NotImplementedError

    def embeddings(self) -> tuple[Tensor, Tensor]:
        """Final vectors, (U, D) of users and (I, D) of items, whose dot product is the score."""
        raise NotImplementedError

    def scores(self, users: Tensor) -> Tensor:
        """(B, I) scores of all items for `users` (B,). Models that are no dot product override it."""
        left, right = self.embeddings()
        return left[users] @ right.T
