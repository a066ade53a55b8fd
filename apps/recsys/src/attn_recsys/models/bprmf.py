"""BPR-MF: a vector for each user and each item, trained so that what a user had scores above what he had not.

"BPR: Bayesian Personalized Ranking from Implicit Feedback" (Rendle et al., UAI 2009), section 4.3.1.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from attn_recsys.models.base import ItemModel, ItemsGraph, ItemsShape
from attn_recsys.models.draws import draw_others, pair_keys
from attn_recsys.models.losses import bpr, half_square


class BPRMF(ItemModel):
    """score(u, i) = p_u · q_i.

    Its weights tell which training interactions they saw (`trained_on`): a model that starts from them refuses other
    ones, whose test part this one may have been trained with.
    """

    trained_on: Tensor

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
        self.user_embed = nn.Embedding(shape.users, config.embed_dim)
        self.item_embed = nn.Embedding(shape.items, config.embed_dim)
        for table in (self.user_embed, self.item_embed):
            nn.init.xavier_uniform_(table.weight)
        self.register_buffer("trained_on", fingerprint(graph, shape))

    def embeddings(self) -> tuple[Tensor, Tensor]:
        return self.user_embed.weight, self.item_embed.weight

    def loss(self, batch: Mapping[str, Tensor], step: int) -> Tensor:
        user, positive = self.user_embed(batch["user"]), self.item_embed(batch["positive"])
        negative = self.item_embed(batch["negative"])
        total = bpr(user, positive, negative)
        if self.config.l2:
            total = total + self.config.l2 * (half_square(user) + half_square(positive) + half_square(negative))
        return total


def fingerprint(graph: ItemsGraph, shape: ItemsShape) -> Tensor:
    """A number that tells a set of training interactions from others."""
    keys = (graph.user * shape.items + graph.item).sort().values.cpu()
    digest = hashlib.sha256(f"{shape.users} {shape.items} ".encode() + keys.numpy().tobytes()).digest()
    return torch.tensor(int.from_bytes(digest[:8], "little", signed=True))


def trained(config: Any, shape: ItemsShape, graph: ItemsGraph, *, epochs: int, lr: float, batch_size: int) -> BPRMF:
    """BPR-MF after `epochs` passes over the interactions with Adam, by torch's random numbers, where the graph is."""
    device = graph.user.device
    model = BPRMF(config, shape, graph).to(device)
    keys = pair_keys(graph.user, graph.item, shape.items)
    with torch.enable_grad():
        optimizer = torch.optim.Adam(model.parameters(), lr=lr, fused=True)
        for _ in range(epochs):
            for rows in torch.randperm(len(graph.user), device=device).split(batch_size):
                user = graph.user[rows]
                drawn = draw_others(keys, user, shape.items).unsqueeze(1)
                optimizer.zero_grad()
                model.loss({"user": user, "positive": graph.item[rows], "negative": drawn}, 0).backward()
                optimizer.step()
    return model
