"""KGAT: users, items and entities in one graph, whose vectors read each other with attention over relations.

"KGAT: Knowledge Graph Attention Network for Recommendation" (S32, KDD 2019). Numbers of equations are the paper's.

The collaborative knowledge graph: nodes 0…E-1 are the entities, of which the first are the items, nodes E…E+U-1 the
users. Relation 0 leads from a user to an item he had, relation 1 back; those of the knowledge graph follow.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from attn_recsys.config import BPRMFConfig
from attn_recsys.models.base import ItemModel, ItemsGraph, ItemsShape
from attn_recsys.models.bprmf import fingerprint, trained
from attn_recsys.models.draws import draw_others, pair_keys
from attn_recsys.models.graph import keep_edges, kept_edges
from attn_recsys.models.losses import bpr, half_square
from attn_shared import checkpoint
from attn_shared.errors import UserError
from core_attn.ops import edge_softmax, edge_sum, sort_edges
from core_attn.ops.edge import Edges

HAD, HAD_BY = 0, 1  # relations of interactions
_OWN = 2  # how many of them come before the knowledge graph's
_CHUNK = 1 << 16  # edges scored at once
_BEAM = 20_000  # unfinished paths kept


@dataclass(frozen=True)
class Hop:
    """One edge of a path.

    Attributes:
        relation: number among the knowledge graph's relations; -1 = the user had the item, -2 = the item was had by
            the user.
        node: where it leads: an entity (the first are the items), or the number of entities + a user's number.
        weight: attention of this edge among all edges of the node it leaves.
    """

    relation: int
    node: int
    weight: float


@dataclass(frozen=True)
class Path:
    """A way from a user to an item.

    Attributes:
        hops: from the user's first edge to the one that leads to the item.
        weight: the product of their attention.
    """

    hops: tuple[Hop, ...]
    weight: float


class Aggregator(nn.Module):
    """A node's vector and the sum of what it reads -> its next vector: eq. (6), (7) or (8)."""

    def __init__(self, kind: str, width: int, out: int, dropout: float) -> None:
        super().__init__()
        self.kind = kind
        if kind == "bi-interaction":
            self.linear1, self.linear2 = nn.Linear(width, out), nn.Linear(width, out)
        elif kind in ("gcn", "graphsage"):
            self.linear = nn.Linear(width if kind == "gcn" else 2 * width, out)
        else:
            raise ValueError(f"aggregation_type must be bi-interaction, gcn or graphsage, got {kind!r}")
        for layer in self.children():
            nn.init.xavier_uniform_(layer.weight)  # type: ignore[arg-type]
            nn.init.zeros_(layer.bias)  # type: ignore[arg-type]
        self.dropout = nn.Dropout(dropout)

    def forward(self, own: Tensor, read: Tensor) -> Tensor:
        if self.kind == "gcn":
            out = F.leaky_relu(self.linear(own + read))
        elif self.kind == "graphsage":
            out = F.leaky_relu(self.linear(torch.cat([own, read], dim=1)))
        else:
            out = F.leaky_relu(self.linear1(own + read)) + F.leaky_relu(self.linear2(own * read))
        dropped: Tensor = self.dropout(out)
        return dropped


class KGAT(ItemModel):
    """Attentive embedding propagation (section 3.2) over vectors that TransR keeps true to the graph (section 3.1).

    The attention of the edges is computed from the vectors at the start of each epoch and held through it, without
    gradient, as the official code does. Outside training it follows the vectors as they are.
    """

    reads_graph: ClassVar[bool] = True

    relation: Tensor
    by_relation: Tensor
    attention: Tensor
    attention_epoch: Tensor
    triples: Tensor
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
        self.entities = max(shape.entities, shape.items)
        nodes, relations = self.entities + shape.users, shape.relations + _OWN
        widths = [config.embed_dim, *config.conv_dim_list]
        if len(config.mess_dropout) != len(config.conv_dim_list):
            raise ValueError(
                f"mess_dropout takes a number for each of the {len(config.conv_dim_list)} layers of conv_dim_list, got "
                f"{len(config.mess_dropout)}"
            )
        if not 0 <= config.node_dropout < 1:
            raise ValueError(f"node_dropout must be at least 0 and below 1, got {config.node_dropout:g}")
        self.entity_user_embed = nn.Embedding(nodes, config.embed_dim)
        self.relation_embed = nn.Embedding(relations, config.relation_dim)
        self.trans_M = nn.Parameter(torch.empty(relations, config.embed_dim, config.relation_dim))
        for table in (self.entity_user_embed.weight, self.relation_embed.weight, self.trans_M):
            nn.init.xavier_uniform_(table)
        self.aggregator_layers = nn.ModuleList(
            Aggregator(config.aggregation_type, width, out, dropout)
            for width, out, dropout in zip(widths, widths[1:], config.mess_dropout)
        )

        user = graph.user + self.entities
        head = torch.cat([user, graph.item, graph.head])
        tail = torch.cat([graph.item, user, graph.tail])
        relation = torch.cat([torch.full_like(user, HAD), torch.full_like(user, HAD_BY), graph.relation + _OWN])
        order = torch.argsort(head * relations + relation, stable=True)
        edges = sort_edges(head[order], tail[order], heads=nodes)
        keep_edges(self, edges)
        self.register_buffer("relation", relation[order], persistent=False)
        self.register_buffer("by_relation", torch.argsort(self.relation, stable=True), persistent=False)
        self.counts = torch.bincount(self.relation, minlength=relations).tolist()
        self.register_buffer(
            "triples", pair_keys(edges.head * relations + self.relation, edges.tail, nodes), persistent=False
        )
        # Held through an epoch, and therefore part of the state that a resumed run needs.
        self.register_buffer("attention", self._weights())
        self.register_buffer("attention_epoch", torch.tensor(-1))
        self.register_buffer("trained_on", fingerprint(graph, shape), persistent=False)

    # -- attention ----------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def _weights(self) -> Tensor:
        """(edges,) attention by the vectors as they are, eq. (4) and (5)."""
        x, edges = self.entity_user_embed.weight, kept_edges(self)
        scores = x.new_empty(len(self.relation))
        for number, own in enumerate(self.by_relation.split(self.counts)):
            for part in own.split(_CHUNK):
                scores[part] = self._scores(x[edges.head[part]], number, x[edges.tail[part]])
        return edge_softmax(scores, edges)

    def _scores(self, head: Tensor, relation: int, tail: Tensor) -> Tensor:
        """(W_r e_t)ᵀ tanh(W_r e_h + e_r) of edges of one relation."""
        matrix = self.trans_M[relation]
        return ((tail @ matrix) * torch.tanh(head @ matrix + self.relation_embed.weight[relation])).sum(-1)

    def start_epoch(self, epoch: int) -> None:
        """Refresh the attention; before the first epoch, take over the vectors to start from."""
        if epoch <= int(self.attention_epoch):  # a run that goes on within the epoch
            return
        if epoch == 0 and self.config.start != "none":
            self._start()
        self.attention.copy_(self._weights())
        self.attention_epoch.fill_(epoch)

    @torch.no_grad()
    def _start(self) -> None:
        """The vectors of BPR-MF, trained here or read from a run, which section 4.2.3 starts from."""
        users, items = self._trained() if self.config.start == "bprmf" else self._read(self.config.start)
        weight = self.entity_user_embed.weight
        weight[: self.shape.items].copy_(items)
        weight[self.entities :].copy_(users)

    def _trained(self) -> tuple[Tensor, Tensor]:
        edges, config = kept_edges(self), self.config
        had, none = self.relation == HAD, edges.head.new_empty(0)
        graph = ItemsGraph(
            user=edges.head[had] - self.entities, item=edges.tail[had], head=none, relation=none, tail=none
        )
        return trained(
            BPRMFConfig(embed_dim=config.embed_dim, l2=config.start_l2),
            self.shape,
            graph,
            epochs=config.start_epochs,
            lr=config.start_lr,
            batch_size=config.start_batch_size,
        ).embeddings()

    def _read(self, run: str) -> tuple[Tensor, Tensor]:
        found = checkpoint.load(checkpoint.resolve(run), app="recsys")
        if found.config["model"] != "bprmf":
            raise UserError(f"model_args.start takes a run of bprmf, and {run} is one of {found.config['model']}")
        weights = {".".join(name.split(".")[1:]): weight for name, weight in found.weights.items()}
        if int(weights["trained_on"]) != int(self.trained_on):
            raise UserError(
                f"{run} was trained on other interactions than this run will be, so that it may have seen its test "
                "part; give both the same data and split"
            )
        users, items = weights["user_embed.weight"], weights["item_embed.weight"]
        if users.shape[1] != self.config.embed_dim:
            raise UserError(
                f"{run} has vectors of {users.shape[1]} numbers; set model_args.embed_dim to that, not to "
                f"{self.config.embed_dim}"
            )
        return users, items

    # -- propagation --------------------------------------------------------------------------------------------------

    def propagate(self) -> Tensor:
        """(nodes, sum of widths) vectors after 0, 1, … layers side by side, later ones of length 1: eq. (3)-(11)."""
        attention = self.attention if self.training else self._weights()
        x, edges = self.entity_user_embed.weight, kept_edges(self)
        found = [x]
        for layer in self.aggregator_layers:
            sent = x
            if self.training and self.config.node_dropout:
                # A node that is dropped sends to nobody in this layer.
                sent = x * F.dropout(x.new_ones(len(x), 1), self.config.node_dropout)
            # Sums over edges stay in float32 where autocast makes the layers' results shorter.
            x = layer(x, edge_sum(attention, sent.to(attention.dtype), edges))
            found.append(F.normalize(x, dim=1))
        return torch.cat(found, dim=1)

    def embeddings(self) -> tuple[Tensor, Tensor]:
        x = self.propagate()
        return x[self.entities :], x[: self.shape.items]

    # -- losses -------------------------------------------------------------------------------------------------------

    def loss(self, batch: Mapping[str, Tensor], step: int) -> Tensor:
        """Equation (14): both losses of each step together, or ("alternate") every second step one of them."""
        config = self.config
        if config.training == "alternate" and step % 2:
            return self.kg_loss(*self.draw(config.kg_batch_size or len(batch["user"])))
        total = self.cf_loss(batch["user"], batch["positive"], batch["negative"])
        if config.training == "together":
            total = total + self.kg_loss(*self.draw(config.kg_batch_size or len(batch["user"])))
        return total

    def cf_loss(self, user: Tensor, positive: Tensor, negative: Tensor) -> Tensor:
        """Ranking: eq. (12) and (13), with the mean L2 of the vectors it looks at."""
        users, items = self.embeddings()
        left, better, worse = users[user], items[positive], items[negative]
        regular = half_square(left) + half_square(better) + half_square(worse)
        return bpr(left, better, worse) + self.config.cf_l2loss_lambda * regular

    def draw(self, count: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Triples of the whole graph, interactions too, each with a node that is no tail of its head and relation."""
        edges = kept_edges(self)
        rows = torch.randint(
            max(1, len(self.relation)), (count if len(self.relation) else 0,), device=edges.head.device
        )
        head, relation = edges.head[rows], self.relation[rows]
        return (
            head,
            relation,
            edges.tail[rows],
            draw_others(self.triples, head * len(self.trans_M) + relation, edges.heads),
        )

    def kg_loss(self, head: Tensor, relation: Tensor, tail: Tensor, corrupt: Tensor) -> Tensor:
        """TransR: eq. (1) and (2), with the mean L2 of the projected vectors."""
        order = torch.argsort(relation, stable=True)
        counts = torch.bincount(relation, minlength=len(self.trans_M)).tolist()
        nodes = torch.stack([head, tail, corrupt])[:, order]
        # One product a relation: a matrix for every triple would be copied out of trans_M otherwise. And unbind, as the
        # gradient of every single trans_M[r] is as large as all of them.
        groups = zip(self.entity_user_embed(nodes).split(counts, dim=1), self.trans_M.unbind(0), counts)
        projected = torch.cat([x @ matrix for x, matrix, count in groups if count], dim=1)
        h, t, c = projected.unbind(0)
        r = self.relation_embed(relation[order])
        right, wrong = (h + r - t).square().sum(-1), (h + r - c).square().sum(-1)
        regular = half_square(h) + half_square(r) + half_square(t) + half_square(c)
        return self.config.kg_l2loss_lambda * regular - F.logsigmoid(wrong - right).mean()

    # -- reasons ------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def explain(self, user: int, items: Sequence[int], *, paths: int = 3, hops: int | None = None) -> list[list[Path]]:
        """For each item, the ways from the user to it along which most attention lies, best first.

        A node reads along its edges, so the product of the weights of a way's edges is the share of the item's vector
        in what the user reads over it (section 4.4.2). No node comes twice in a way.

        Args:
            user: number of a user.
            items: numbers of items.
            paths: how many ways an item at most.
            hops: longest way; None = as many as the model has layers, beyond which it reads nothing.

        Returns:
            A list an item, empty where no way is that short. Exact as long as there are at most 20,000 unfinished ways
            of a length, beyond which only the best are followed.
        """
        edges, weights = kept_edges(self), self._weights().double()
        hops = len(self.aggregator_layers) if hops is None else hops
        return [self._paths(edges, weights, self.entities + user, item, paths, hops) for item in items]

    def _paths(self, edges: Edges, weights: Tensor, first: int, last: int, count: int, hops: int) -> list[Path]:
        near = _near(edges, last, hops)
        # Unfinished ways: the edges taken and the product of their weights.
        taken, product = edges.head.new_empty(1, 0), weights.new_ones(1)
        ends = edges.head.new_tensor([first])
        found: list[tuple[float, list[int]]] = []
        for left in reversed(range(hops)):
            starts, stops = edges.head_starts[ends].long(), edges.head_starts[ends + 1].long()
            many = stops - starts
            before = torch.repeat_interleave(many)
            step = torch.arange(len(before), device=before.device) - (many.cumsum(0) - many)[before] + starts[before]
            to = edges.tail[step]
            fresh = near[left][to] & (to != first) & (edges.tail[taken[before]] != to.unsqueeze(1)).all(dim=1)
            before, step, to = before[fresh], step[fresh], to[fresh]
            product = product[before] * weights[step]
            taken = torch.cat([taken[before], step.unsqueeze(1)], dim=1)
            done = to == last
            best = product[done].topk(min(count, int(done.sum())))
            found += zip(best.values.tolist(), taken[done][best.indices].tolist())
            taken, product, ends = taken[~done], product[~done], to[~done]
            if len(product) > _BEAM:
                kept = product.topk(_BEAM).indices
                taken, product, ends = taken[kept], product[kept], ends[kept]
        found.sort(key=lambda way: -way[0])
        return [
            Path(
                tuple(
                    Hop(
                        int(self.relation[e]) - _OWN if self.relation[e] >= _OWN else -1 - int(self.relation[e]),
                        int(edges.tail[e]),
                        float(weights[e]),
                    )
                    for e in way
                ),
                weight,
            )
            for weight, way in found[:count]
        ]


def _near(edges: Edges, node: int, hops: int) -> list[Tensor]:
    """[k] (nodes,) whether `node` can be reached in at most k edges, for k = 0…hops - 1."""
    near = torch.zeros(edges.heads, dtype=torch.bool, device=edges.head.device)
    near[node] = True
    found = [near]
    for _ in range(1, hops):
        near = near.clone()
        near[edges.head[found[-1][edges.tail]]] = True
        found.append(near)
    return found
