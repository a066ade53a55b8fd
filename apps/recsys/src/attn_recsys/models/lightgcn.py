"""LightGCN: vectors of users and items, smoothed over the graph of interactions and nothing else.

"LightGCN: Simplifying and Powering Graph Convolution Network for Recommendation" (He et al., SIGIR 2020).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from attn_recsys.models.base import ItemModel, ItemsGraph, ItemsShape
from attn_recsys.models.graph import keep_edges, kept_edges
from attn_recsys.models.losses import bpr, half_square
from core_attn.ops import edge_sum, sort_edges


class LightGCN(ItemModel):
    """E_(k+1) = D^(-1/2) A D^(-1/2) E_k over users and items; the mean of all layers ranks (eq. 3 to 8)."""

    weight: Tensor

    def __init__(
        self,
        config: Any,
        shape: ItemsShape,
        graph: ItemsGraph,
        *,
        mixer: str | None = None,
        mixer_args: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(config, shape, graph, mixer=mixer, mixer_args=mixer_args)
        if config.layers < 0:
            raise ValueError(f"layers must be 0 or more, got {config.layers}")
        self.embed = nn.Embedding(shape.users + shape.items, config.embed_dim)
        nn.init.normal_(self.embed.weight, std=config.init)
        item = graph.item + shape.users
        edges = sort_edges(
            torch.cat([graph.user, item]), torch.cat([item, graph.user]), heads=shape.users + shape.items
        )
        keep_edges(self, edges)
        degree = edges.head_starts.diff().double()
        self.register_buffer(
            "weight", (degree[edges.head] * degree[edges.tail]).rsqrt().to(self.embed.weight.dtype), persistent=False
        )

    def embeddings(self) -> tuple[Tensor, Tensor]:
        edges = kept_edges(self)
        x = total = self.embed.weight
        for _ in range(self.config.layers):
            x = edge_sum(self.weight, x, edges)
            total = total + x
        mean = total / (self.config.layers + 1)
        users, items = mean.split([self.shape.users, self.shape.items])
        return users, items

    def loss(self, batch: Mapping[str, Tensor], step: int) -> Tensor:
        users, items = self.embeddings()
        total = bpr(users[batch["user"]], items[batch["positive"]], items[batch["negative"]])
        if self.config.l2:
            # Equation 15 counts the vectors before the layers, which are the only parameters.
            first = self.shape.users
            rows = (batch["user"], batch["positive"] + first, batch["negative"] + first)
            total = total + self.config.l2 * torch.stack([half_square(self.embed(r)) for r in rows]).sum()
        return total
