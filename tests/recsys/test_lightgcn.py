"""LightGCN against torch_geometric's with the same weights, and BPR-MF against its definition."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from attn_recsys.config import BPRMFConfig, LightGCNConfig
from attn_recsys.models.base import ItemsGraph, ItemsShape
from attn_recsys.models.bprmf import BPRMF
from attn_recsys.models.draws import draw_others, is_pair, pair_keys
from attn_recsys.models.lightgcn import LightGCN

NONE = torch.empty(0, dtype=torch.int64)
USERS, ITEMS = 17, 23
SHAPE = ItemsShape(users=USERS, items=ITEMS)


def interactions() -> ItemsGraph:
    g = torch.Generator().manual_seed(0)
    keys = torch.randperm((USERS - 1) * (ITEMS - 1), generator=g)[:90]  # the last user and item have none
    return ItemsGraph(user=keys // (ITEMS - 1), item=keys % (ITEMS - 1), head=NONE, relation=NONE, tail=NONE)


def batch(graph: ItemsGraph) -> dict[str, torch.Tensor]:
    return {"user": graph.user[:20], "positive": graph.item[:20], "negative": torch.arange(20).unsqueeze(1)}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("layers", [0, 1, 3])
def test_torch_geometric(layers: int, dtype: torch.dtype) -> None:
    oracle = pytest.importorskip("torch_geometric.nn", reason="torch_geometric is the oracle").LightGCN
    limit = 1e-10 if dtype is torch.float64 else 1e-5
    graph = interactions()
    model = LightGCN(LightGCNConfig(embed_dim=12, layers=layers, l2=0.02), SHAPE, graph).to(dtype)
    if dtype is torch.float64:
        model.weight.copy_(LightGCN(model.config, SHAPE, graph).weight)
        degree = torch.bincount(model.edge_head, minlength=USERS + ITEMS).double()
        model.weight.copy_((degree[model.edge_head] * degree[model.edge_tail]).rsqrt())
    other = oracle(USERS + ITEMS, 12, layers).to(dtype)
    other.embedding.weight.data.copy_(model.embed.weight.data)
    item = graph.item + USERS
    edge_index = torch.stack([torch.cat([graph.user, item]), torch.cat([item, graph.user])])
    right = other.get_embedding(edge_index)
    assert (torch.cat(model.embeddings()) - right).abs().max() <= limit

    given = batch(graph)
    rows = [given["user"], given["positive"] + USERS, given["negative"].squeeze(1) + USERS]
    ranks = [(right[rows[0]] * right[other_rows]).sum(1) for other_rows in rows[1:]]
    # Its regulariser is lambda * |vectors|² / B, ours half of that.
    theirs = other.recommendation_loss(*ranks, node_id=torch.cat(rows), lambda_reg=0.01)
    ours = model.loss(given, 0)
    assert abs(float(ours - theirs)) <= limit
    ours.backward()
    theirs.backward()
    assert (model.embed.weight.grad - other.embedding.weight.grad).abs().max() <= limit


def test_bprmf_by_hand() -> None:
    graph = interactions()
    model = BPRMF(BPRMFConfig(embed_dim=5, l2=0.3), SHAPE, graph).double()
    given = {**batch(graph), "negative": torch.arange(40).remainder(ITEMS).view(20, 2)}
    right = 0.0
    for u, p, n in zip(given["user"], given["positive"], given["negative"], strict=True):
        pu, qp = model.user_embed.weight[u], model.item_embed.weight[p]
        for i in n:
            qn = model.item_embed.weight[i]
            right = right - F.logsigmoid(pu @ qp - pu @ qn) / 40 + 0.3 * (qn @ qn) / 80
        right = right + 0.3 * (pu @ pu + qp @ qp) / 40
    assert float(model.loss(given, 0)) == pytest.approx(float(right), rel=1e-12)
    scores = model.scores(torch.tensor([2]))[0]
    assert (scores - model.item_embed.weight @ model.user_embed.weight[2]).abs().max() < 1e-14


def test_users_and_items_without_interactions() -> None:
    model = LightGCN(LightGCNConfig(embed_dim=4), SHAPE, interactions())
    users, items = model.embeddings()
    assert torch.equal(users[-1], model.embed.weight[USERS - 1] / 4)
    assert torch.equal(items[-1], model.embed.weight[-1] / 4)
    assert users.isfinite().all()


def test_draws_avoid_pairs_and_reach_everything_else() -> None:
    graph = interactions()
    keys = pair_keys(graph.user, graph.item, ITEMS)
    torch.manual_seed(0)
    left = torch.arange(USERS).repeat_interleave(1000)
    drawn = draw_others(keys, left, ITEMS)
    assert not is_pair(keys, left, drawn, ITEMS).any()
    for user in range(USERS):
        own = set(graph.item[graph.user == user].tolist())
        assert set(drawn[left == user].tolist()) == set(range(ITEMS)) - own
    everything = pair_keys(torch.zeros(3, dtype=torch.int64), torch.arange(3), 3)
    assert draw_others(everything, torch.zeros(5, dtype=torch.int64), 3).shape == (5,)
    assert not is_pair(NONE, left, drawn, ITEMS).any()
