"""KGAT against the common PyTorch port with the same weights, and what the port gets wrong; paths; where it starts.

`tests/golden/recsys_kgat.safetensors` holds what the port gave; the `.json` beside it names commit and settings.
"""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from attn_recsys.config import BPRMFConfig, KGATConfig
from attn_recsys.models.base import ItemsGraph, ItemsShape
from attn_recsys.models.bprmf import fingerprint
from attn_recsys.models.kgat import KGAT
from attn_shared import checkpoint
from attn_shared.errors import UserError

GOLDEN = Path(__file__).parents[1] / "golden" / "recsys_kgat.safetensors"
NOTE = json.loads(GOLDEN.with_suffix(".json").read_text(encoding="utf-8"))["cases"]
TENSORS = load_file(GOLDEN)
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5}
NONE = torch.empty(0, dtype=torch.int64)


def port(case: str, dtype: torch.dtype) -> tuple[KGAT, dict[str, Tensor]]:
    """Our model with the port's weights, and what the port gave."""
    found = {key.split(":", 1)[1]: value for key, value in TENSORS.items() if key.startswith(f"{case}:")}
    user, item = found["interactions"].unbind(1)
    head, relation, tail = found["triples"].unbind(1)
    graph = ItemsGraph(user=user, item=item, head=head, relation=relation, tail=tail)
    model = KGAT(KGATConfig(**NOTE[case]["config"]), ItemsShape(**NOTE[case]["shape"]), graph).to(dtype)
    weights = {key.removeprefix("weight/"): value for key, value in found.items() if key.startswith("weight/")}
    missing, unexpected = model.load_state_dict(weights, strict=False)
    assert not unexpected
    assert set(missing) == {"attention", "attention_epoch"}
    return model, found


def error(ours: Tensor, official: Tensor) -> float:
    """Largest difference, in units of the largest official value where that is above 1."""
    assert ours.shape == official.shape
    ours, official = ours.detach().double(), official.detach().double()
    return float((ours - official).abs().max() / official.abs().max().clamp(min=1.0))


def by_edge(model: KGAT) -> dict[tuple[int, int, int], float]:
    edges = zip(model.edge_head.tolist(), model.relation.tolist(), model.edge_tail.tolist(), strict=True)
    return dict(zip(edges, model.attention.tolist(), strict=True))


def edges_of(found: dict[str, Tensor]) -> list[tuple[int, int, int]]:
    return list(zip(*(found[name].tolist() for name in ("head", "relation", "tail")), strict=True))


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("kind", ["bi-interaction", "gcn", "graphsage"])
def test_the_port(kind: str, dtype: torch.dtype) -> None:
    model, found = port(f"simple {kind}", dtype)
    limit = TOLERANCE[dtype]
    model.start_epoch(0)
    ours = by_edge(model)
    assert len(ours) == len(edges_of(found))
    assert error(torch.tensor([ours[e] for e in edges_of(found)], dtype=torch.float64), found["attention"]) <= limit
    assert error(model.propagate(), found["embeddings"]) <= limit
    users, items = model.embeddings()
    assert error(users, found["embeddings"][14:]) <= limit
    assert error(items, found["embeddings"][:8]) <= limit
    losses = {
        "cf": model.cf_loss(found["user"], found["positive"], found["negative"].unsqueeze(1)),
        "kg": model.kg_loss(*(found[f"kg_{name}"] for name in ("head", "relation", "tail", "corrupt"))),
    }
    weights = dict(model.named_parameters())
    for name, loss in losses.items():
        assert error(loss.reshape(1), found[name]) <= limit
        official = {key.removeprefix(f"{name}/grad/"): g for key, g in found.items() if key.startswith(f"{name}/grad/")}
        ours = dict(zip(weights, torch.autograd.grad(loss, list(weights.values()), allow_unused=True), strict=True))
        assert {key for key, g in ours.items() if g is not None} == set(official)
        for key, gradient in official.items():
            assert error(ours[key], gradient) <= limit, (name, key)


def test_parallel_edges_which_the_port_adds_up() -> None:
    """Where two edges join the same nodes, the port's softmax takes the sum of their scores for one edge's."""
    model, found = port("parallel bi-interaction", torch.float64)
    model.start_epoch(0)
    ours = by_edge(model)
    every = edges_of(found)
    pairs = [(h, t) for h, _, t in every]
    touched = {h for (h, t) in pairs if pairs.count((h, t)) > 1}
    assert touched
    differs = {
        e for e, official in zip(every, found["attention"].tolist(), strict=True) if abs(ours[e] - official) > 1e-9
    }
    assert {h for h, _, _ in differs} == touched
    # By the definition, an edge at a time.
    x, relations = model.entity_user_embed.weight.detach(), model.relation_embed.weight.detach()
    for head in touched:
        own = [e for e in every if e[0] == head]
        scores = [(x[t] @ model.trans_M[r]) @ torch.tanh(x[head] @ model.trans_M[r] + relations[r]) for _, r, t in own]
        right = torch.stack(scores).softmax(0).detach()
        assert error(torch.tensor([ours[e] for e in own], dtype=torch.float64), right) < 1e-12


def test_attention_of_every_node_sums_to_one() -> None:
    model, _ = port("parallel bi-interaction", torch.float64)
    model.start_epoch(0)
    sums = torch.zeros(len(model.entity_user_embed.weight), dtype=torch.float64)
    sums.index_add_(0, model.edge_head, model.attention)
    has = torch.bincount(model.edge_head, minlength=len(sums)) > 0
    assert (sums[has] - 1).abs().max() < 1e-12
    assert (sums[~has] == 0).all()


def small(**options: object) -> tuple[KGAT, ItemsGraph, ItemsShape]:
    """Six users, five items, entities 5 to 7: a graph with a cycle, a loop, a lone item and a user without items."""
    torch.manual_seed(0)
    graph = ItemsGraph(
        user=torch.tensor([0, 0, 1, 1, 2, 3, 4]),
        item=torch.tensor([0, 1, 1, 2, 0, 2, 3]),
        head=torch.tensor([0, 5, 6, 5, 3, 7]),
        relation=torch.tensor([0, 0, 0, 1, 1, 0]),
        tail=torch.tensor([5, 6, 5, 0, 5, 7]),
    )
    shape = ItemsShape(users=6, items=5, entities=8, relations=2)
    return KGAT(KGATConfig(embed_dim=8, relation_dim=4, conv_dim_list=(8, 4, 4), **options), shape, graph), graph, shape


def batch(graph: ItemsGraph) -> dict[str, Tensor]:
    return {"user": graph.user, "positive": graph.item, "negative": torch.full((len(graph.user), 2), 4)}


def test_attention_is_held_through_an_epoch_and_follows_the_weights_outside_training() -> None:
    model, _, _ = small(mess_dropout=(0.0, 0.0, 0.0))
    model.start_epoch(0)
    held, before = model.attention.clone(), model.propagate().detach()
    assert not model.attention.requires_grad
    with torch.no_grad():
        model.entity_user_embed.weight += torch.randn(model.entity_user_embed.weight.shape)
        model.relation_embed.weight += 1.0
    model.start_epoch(0)  # a resumed run is told of the same epoch again
    assert torch.equal(model.attention, held)
    in_training = model.propagate()
    outside = model.eval().propagate()
    assert (in_training - outside).abs().max() > 1e-4
    assert (before - outside).abs().max() > 1e-4
    model.train().start_epoch(1)
    assert not torch.equal(model.attention, held)
    assert error(model.propagate(), outside) < 1e-6


def test_an_epoch_goes_on_from_a_checkpoint_with_the_attention_it_had() -> None:
    model, graph, shape = small(start="bprmf", start_epochs=2)
    model.start_epoch(0)
    with torch.no_grad():
        model.entity_user_embed.weight.mul_(3.0)
    other = KGAT(model.config, shape, graph)
    other.load_state_dict(model.state_dict())
    other.start_epoch(0)
    assert torch.equal(other.attention, model.attention)
    assert torch.equal(other.entity_user_embed.weight, model.entity_user_embed.weight)


@pytest.mark.parametrize("training", ["together", "alternate", "ranking"])
def test_which_loss_a_step_follows(training: str) -> None:
    model, graph, _ = small(training=training, mess_dropout=(0.0, 0.0, 0.0), kg_batch_size=50)
    model.start_epoch(0)
    moved = []
    for step in (0, 1):
        model.zero_grad()
        model.loss(batch(graph), step).backward()
        moved.append((model.trans_M.grad is not None, model.aggregator_layers[0].linear1.weight.grad is not None))
    both = {"together": (True, True), "ranking": (False, True)}
    assert moved == ([both[training]] * 2 if training in both else [(False, True), (True, False)])


def test_drawn_triples_are_of_the_graph_and_corrupt_ones_are_not() -> None:
    model, _, _ = small()
    known = set(zip(model.edge_head.tolist(), model.relation.tolist(), model.edge_tail.tolist(), strict=True))
    head, relation, tail, corrupt = (x.tolist() for x in model.draw(2000))
    assert set(zip(head, relation, tail, strict=True)) == known
    assert not known & set(zip(head, relation, corrupt, strict=True))
    assert set(corrupt) == set(range(14))


def test_node_dropout_silences_whole_nodes() -> None:
    model, _, _ = small(node_dropout=0.999, mess_dropout=(0.0, 0.0, 0.0), aggregation_type="gcn")
    model.start_epoch(0)
    x = model.entity_user_embed.weight
    alone = torch.nn.functional.leaky_relu(model.aggregator_layers[0].linear(x))
    first = model.propagate()[:, 8:16]
    assert error(first, torch.nn.functional.normalize(alone, dim=1)) < 1e-6
    assert (model.eval().propagate()[:, 8:16] - first).abs().max() > 1e-3


def test_training_lowers_the_loss_and_every_vector_is_finite() -> None:
    model, graph, _ = small()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    losses = []
    for epoch in range(30):
        model.start_epoch(epoch)
        optimizer.zero_grad()
        loss = model.loss(batch(graph), epoch)
        loss.backward()
        optimizer.step()
        losses.append(float(loss))
    assert sum(losses[-5:]) < 0.6 * sum(losses[:5])
    users, items = model.eval().embeddings()
    assert users.isfinite().all()
    assert items.isfinite().all()
    assert users.shape == (6, 24)
    assert items.shape == (5, 24)


def test_autocast() -> None:
    model, graph, _ = small(mess_dropout=(0.0, 0.0, 0.0))
    model.start_epoch(0)
    right = model.propagate()
    with torch.autocast("cpu", torch.bfloat16):
        assert error(model.propagate().float(), right) < 0.05
        model.loss(batch(graph), 0).backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())


def test_without_a_knowledge_graph() -> None:
    graph = ItemsGraph(user=torch.tensor([0, 1]), item=torch.tensor([1, 0]), head=NONE, relation=NONE, tail=NONE)
    model = KGAT(KGATConfig(), ItemsShape(users=2, items=3), graph)
    model.start_epoch(0)
    model.loss({"user": graph.user, "positive": graph.item, "negative": torch.tensor([[2], [2]])}, 0).backward()
    assert model.eval().scores(torch.tensor([0, 1])).shape == (2, 3)


# -- reasons ----------------------------------------------------------------------------------------------------------


def every_path(model: KGAT, user: int, item: int, hops: int) -> list[tuple[float, tuple[int, ...]]]:
    """All ways by depth-first search: weight and edges."""
    weights = model._weights().double()
    found = []

    def walk(node: int, taken: tuple[int, ...], seen: frozenset[int], weight: float) -> None:
        if node == item:
            found.append((weight, taken))
            return
        if len(taken) == hops:
            return
        for edge in (model.edge_head == node).nonzero().flatten().tolist():
            to = int(model.edge_tail[edge])
            if to not in seen:
                walk(to, (*taken, edge), seen | {to}, weight * float(weights[edge]))

    walk(model.entities + user, (), frozenset({model.entities + user}), 1.0)
    return sorted(found, key=lambda way: -way[0])


@pytest.mark.parametrize("hops", [1, 2, 3, 4])
def test_paths_are_the_heaviest(hops: int) -> None:
    model, _ = port("parallel bi-interaction", torch.float64)
    for user in range(0, 9, 2):
        for item, paths in enumerate(model.explain(user, range(8), paths=4, hops=hops)):
            right = every_path(model, user, item, hops)[:4]
            assert [p.weight for p in paths] == pytest.approx([weight for weight, _ in right], rel=1e-9)
            for path in paths:
                nodes = [model.entities + user, *(hop.node for hop in path.hops)]
                assert nodes[-1] == item
                assert len(set(nodes)) == len(nodes) <= hops + 1
                product = 1.0
                for (head, tail), hop in zip(pairwise(nodes), path.hops, strict=True):
                    relation = hop.relation + 2 if hop.relation >= 0 else -1 - hop.relation
                    edge = (model.edge_head == head) & (model.edge_tail == tail) & (model.relation == relation)
                    assert int(edge.sum()) == 1
                    product *= hop.weight
                assert path.weight == pytest.approx(product)


def test_no_path_no_reason() -> None:
    model, _, _ = small()
    assert model.explain(5, [0, 1]) == [[], []]  # a user without items
    assert model.explain(0, [4]) == [[]]  # an item that nothing leads to
    assert len(model.explain(0, [2], paths=1)[0]) == 1


# -- the start --------------------------------------------------------------------------------------------------------


def test_starts_from_bprmf_trained_inside() -> None:
    model, graph, _ = small(start="bprmf", start_epochs=60, start_lr=0.1, start_l2=0.0)
    entities = model.entity_user_embed.weight[5:8].clone()
    model.start_epoch(0)
    weight = model.entity_user_embed.weight
    assert torch.equal(weight[5:8], entities)
    scores = weight[8:] @ weight[:5].T
    had = torch.zeros(6, 5, dtype=torch.bool)
    had[graph.user, graph.item] = True
    for user in range(5):
        assert scores[user][had[user]].min() > scores[user][~had[user]].max()


def saved(folder: Path, graph: ItemsGraph, shape: ItemsShape, model: str = "bprmf", width: int = 8) -> Path:
    from attn_recsys.models.bprmf import BPRMF

    weights = BPRMF(BPRMFConfig(embed_dim=width), shape, graph).state_dict()
    state = checkpoint.Checkpoint(
        app="recsys",
        config={"model": model},
        data_state={},
        weights={f"network.{name}": weight for name, weight in weights.items()},
        trainer={},
        step=0,
        epoch=0,
        metrics={},
        versions={},
    )
    return checkpoint.save(state, folder / "best")


def test_starts_from_a_run_of_bprmf(tmp_path: Path) -> None:
    _, graph, shape = small()
    folder = saved(tmp_path, graph, shape)
    weights = load_file(folder / "model.safetensors")
    model, _, _ = small(start=str(folder))
    model.start_epoch(0)
    assert torch.equal(model.entity_user_embed.weight[:5], weights["network.item_embed.weight"])
    assert torch.equal(model.entity_user_embed.weight[8:], weights["network.user_embed.weight"])


def test_a_start_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    _, graph, shape = small()
    other = ItemsGraph(user=graph.user, item=graph.item.roll(1), head=NONE, relation=NONE, tail=NONE)
    for name, says, options in (
        ("split", "trained on other interactions", {"graph": other}),
        ("model", "takes a run of bprmf", {"graph": graph, "model": "lightgcn"}),
        ("width", "vectors of 6 numbers", {"graph": graph, "width": 6}),
    ):
        folder = saved(tmp_path / name, shape=shape, **options)
        model, _, _ = small(start=str(folder))
        with pytest.raises(UserError, match=says) as caught:
            model.start_epoch(0)
        assert "\n" not in str(caught.value)
    model, _, _ = small(start=str(tmp_path / "nothing"))
    with pytest.raises(UserError):
        model.start_epoch(0)


def test_fingerprint_is_of_the_set_of_interactions() -> None:
    _, graph, shape = small()
    order = torch.randperm(len(graph.user))
    same = ItemsGraph(user=graph.user[order], item=graph.item[order], head=NONE, relation=NONE, tail=NONE)
    fewer = ItemsGraph(user=graph.user[1:], item=graph.item[1:], head=NONE, relation=NONE, tail=NONE)
    assert int(fingerprint(graph, shape)) == int(fingerprint(same, shape)) != int(fingerprint(fewer, shape))


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"aggregation_type": "mean"}, "bi-interaction, gcn or graphsage"),
        ({"mess_dropout": (0.1,)}, "each of the 3 layers"),
        ({"node_dropout": 1.0}, "node_dropout"),
    ],
)
def test_errors(options: dict[str, object], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        small(**options)
