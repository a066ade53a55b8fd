"""AW-MoE and the plain mixture of experts against the equations, item by item and row by row."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from attn_recsys.config import AWMoEConfig, DINConfig, MoEConfig
from attn_recsys.models.awmoe import AWMoE, info_nce, kept
from attn_recsys.models.behaviour import PairUnit
from attn_recsys.models.clicks import ClickModel, ClicksShape, Vocabulary
from attn_recsys.models.din import DIN
from attn_recsys.models.moe import MoE

SHAPE = ClicksShape(
    fields=(
        Vocabulary(name="user", size=9),
        Vocabulary(name="item", size=12),
        Vocabulary(name="tags", size=8, many=True),
        Vocabulary(name="brand", size=6),
    ),
    numeric=("age", "price"),
    item="item",
    user="user",
    behaviour=("item", "brand"),
)
BARE = ClicksShape(fields=(Vocabulary(name="item", size=12),), item="item", behaviour=("item",))
LIMIT = {torch.float64: 1e-12, torch.float32: 1e-5}


def make_batch(dtype: torch.dtype, rows: int = 6, length: int = 5) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(1)
    there = torch.arange(length) >= torch.tensor([0, 3, 5, 4, 1, 2])[:rows, None]  # the third has no history

    def past(size: int) -> Tensor:
        return torch.where(there, torch.randint(1, size, (rows, length), generator=g), 0)

    return {
        "names": torch.stack([torch.randint(0, size, (rows,), generator=g) for size in (9, 12, 6)], 1),
        "many.tags": torch.tensor([[2, 3, 0], [4, 0, 0], [0, 0, 0], [5, 6, 7], [1, 0, 0], [2, 0, 0]])[:rows],
        "numbers": torch.randn(rows, 2, generator=g).to(dtype),
        "past.item": past(12),
        "past.brand": past(6),
        "label": torch.randint(0, 2, (rows,), generator=g).to(dtype),
    }


def make(kind: type[ClickModel], dtype: torch.dtype, shape: ClicksShape = SHAPE, **options: object) -> ClickModel:
    torch.manual_seed(0)
    config = {AWMoE: AWMoEConfig, MoE: MoEConfig, DIN: DINConfig}[kind](**{"embed_dim": 4, **options})  # type: ignore[arg-type]
    model = kind(config, shape).to(dtype)
    with torch.no_grad():
        for name, parameter in model.named_parameters():  # away from the small start, so that everything counts
            if "tables" in name:
                parameter.mul_(20)
    return model.eval()


# -- the definition, in loops -----------------------------------------------------------------------------------------


def pair(unit: PairUnit, a: Tensor, b: Tensor) -> Tensor:
    x = unit.start(unit.first(torch.cat([a, b, a - b, a * b])[None]))
    return unit.last(unit.rest(x))[0]


def weights(scores: list[Tensor], softmax: bool) -> list[Tensor]:
    if not softmax or not scores:
        return scores
    total = sum(torch.exp(s) for s in scores)
    return [torch.exp(s) / total for s in scores]


def by_definition(model: AWMoE | MoE, batch: dict[str, Tensor]) -> tuple[Tensor, list[Tensor]]:
    """Log odds, and the gate of each row."""
    # The vector of padding, a missing name, is zero and stays so.
    user, item, tags, brand = (t.weight * (torch.arange(len(t.weight)) > 0)[:, None] for t in model.inputs.tables)
    softmax = model.config.attention_softmax
    logits, gates = [], []
    for r, names in enumerate(batch["names"].tolist()):
        listed = [t for t in batch["many.tags"][r].tolist() if t]
        mean = sum((tags[t] for t in listed), torch.zeros_like(tags[0])) / max(1, len(listed))
        target = model.item_layer(torch.cat([item[names[1]], brand[names[2]]]))
        other = model.other_layer(torch.cat([user[names[0]], mean, batch["numbers"][r]]))
        past = [
            model.item_layer(torch.cat([item[i], brand[b]]))
            for i, b in zip(batch["past.item"][r].tolist(), batch["past.brand"][r].tolist(), strict=True)
            if i
        ]
        alpha = weights([pair(model.unit, target, h) for h in past], softmax)
        read = sum((a * h for a, h in zip(alpha, past, strict=True)), torch.zeros_like(target))
        v = torch.cat([target, read, other])
        experts = []
        for k in range(model.config.experts):
            x = v
            for i, (w, b) in enumerate(zip(model.experts.weights, model.experts.biases, strict=True)):
                x = x @ w[k] + b[k, 0]
                x = torch.relu(x) if i < len(model.experts.weights) - 1 else x
            experts.append(x[0])
        if isinstance(model, MoE):
            power = torch.exp(model.gate(v))
            gate = power / power.sum()
        elif past:
            beta = weights([pair(model.gate_attention, target, h) for h in past], softmax)
            gate = sum(w * pair(model.gate_unit, target, h) for w, h in zip(beta, past, strict=True))
        else:
            gate = model.no_history
        gates.append(gate)
        logits.append(sum(gate[k] * experts[k] for k in range(len(experts))))
    return torch.stack(logits), gates


@pytest.mark.parametrize("dtype", LIMIT, ids=str)
@pytest.mark.parametrize("softmax", [False, True])
@pytest.mark.parametrize("kind", [AWMoE, MoE])
def test_definition(kind: type[ClickModel], softmax: bool, dtype: torch.dtype) -> None:
    model, batch = make(kind, dtype, attention_softmax=softmax), make_batch(dtype)
    ours = model(batch)
    wanted, _ = by_definition(model, batch)
    assert (ours - wanted).abs().max() <= LIMIT[dtype]
    upstream = torch.linspace(-1, 1, len(ours), dtype=dtype)
    parameters = dict(model.named_parameters())
    left = torch.autograd.grad(ours, list(parameters.values()), upstream)
    right = torch.autograd.grad(wanted, list(parameters.values()), upstream)
    for name, a, b in zip(parameters, left, right, strict=True):
        assert (a - b).abs().max() <= LIMIT[dtype] * b.abs().max().clamp(min=1), name


def nce_by_definition(gate: Tensor, hidden: Tensor, others: list[int], user: list[int], temperature: float) -> Tensor:
    total = torch.zeros((), dtype=gate.dtype)
    for i in range(len(gate)):

        def like(j: int, i: int = i) -> Tensor:
            return torch.exp((gate[i] @ hidden[j]) / (gate[i].norm() * hidden[j].norm()) / temperature)

        total -= torch.log(like(i) / (like(i) + sum(like(j) for j in others if user[j] != user[i])))
    return total / len(gate)


def test_info_nce() -> None:
    g = torch.Generator().manual_seed(2)
    gate = torch.randn(7, 3, generator=g, dtype=torch.float64, requires_grad=True)
    hidden = torch.randn(7, 3, generator=g, dtype=torch.float64, requires_grad=True)
    others, user = [4, 0, 6, 1], [5, 5, 1, 2, 2, 3, 5]
    for who in (user, None):
        ours = info_nce(gate, hidden, torch.tensor(others), None if who is None else torch.tensor(who), 0.3)
        wanted = nce_by_definition(gate, hidden, others, who or list(range(7)), 0.3)
        assert abs(float((ours - wanted).detach())) <= 1e-12
        for a, b in zip(*(torch.autograd.grad(x, [gate, hidden]) for x in (ours, wanted)), strict=True):
            assert (a - b).abs().max() <= 1e-12
    assert info_nce(gate[:1], hidden[:1], torch.tensor([0]), None, 0.3).item() == 0.0


def test_loss_is_cross_entropy_and_contrast() -> None:
    """With nothing hidden the masked gate is the gate itself, so the whole loss follows from the definition."""
    model, batch = make(AWMoE, torch.float64, contrast=0.7, mask=0.0, negatives=100), make_batch(torch.float64)
    logits, gates = by_definition(model, batch)
    rows = [0, 1, 3, 4, 5]  # without the user who has no history
    gate = torch.stack([gates[r] for r in rows])
    user = batch["names"][rows, 0].tolist()
    wanted = F.binary_cross_entropy_with_logits(logits, batch["label"])
    wanted = wanted + 0.7 * nce_by_definition(gate, gate, list(range(5)), user, model.config.temperature)
    assert abs(float((model.loss(batch) - wanted).detach())) <= 1e-12
    plain = make(AWMoE, torch.float64, contrast=0.0)
    wanted = F.binary_cross_entropy_with_logits(logits, batch["label"])
    assert abs(float((plain.loss(batch) - wanted).detach())) <= 1e-12


def test_contrast_trains_the_gate_alone() -> None:
    model, batch = make(AWMoE, torch.float64, contrast=1.0, mask=0.5), make_batch(torch.float64)
    x, _ = model.read(batch)
    scores, votes = model.votes(x)
    gate = model.gate(x, scores, votes, x.there)
    assert gate.shape == (6, 4)
    with_it, without = (make(AWMoE, torch.float64, contrast=c, mask=0.5) for c in (1.0, 0.0))
    torch.manual_seed(3)
    with_it.loss(batch).backward()
    without.loss(batch).backward()
    other = dict(without.named_parameters())
    for name, parameter in with_it.named_parameters():
        same = torch.allclose(parameter.grad, other[name].grad, atol=1e-12)
        if name.startswith(("experts", "unit", "other_layer")):
            assert same, name
        if name.startswith(("gate_unit.last", "gate_attention.last.weight")):
            assert not same, name


def test_hiding() -> None:
    torch.manual_seed(0)
    counts = torch.randint(0, 12, (4000,))
    row = torch.arange(4000).repeat_interleave(counts)
    keep = kept(row, 4000, 0.4)
    assert torch.equal(torch.bincount(row[keep], minlength=4000) > 0, counts > 0)
    # Where many are there, the least-one rule hardly matters.
    many = counts[row] >= 8
    assert abs(float(keep[many].float().mean()) - 0.6) < 4 * math.sqrt(0.24 / int(many.sum()))
    assert kept(row, 4000, 0.0).all()
    last = torch.cat([row[1:] != row[:-1], torch.tensor([True])])
    assert torch.equal(kept(row, 4000, 0.9999999999), last)
    assert not len(kept(row[:0], 3, 0.5))


@pytest.mark.parametrize("kind", [AWMoE, MoE, DIN])
def test_any_batch(kind: type[ClickModel]) -> None:
    """Other padding changes nothing; no user at all with history trains, too; so do data with nothing but items."""
    model, batch = make(kind, torch.float64), make_batch(torch.float64)
    wide = batch | {f"past.{f}": F.pad(batch[f"past.{f}"], (3, 0)) for f in ("item", "brand")}
    assert torch.allclose(model(batch), model(wide), atol=1e-12)
    none = batch | {f"past.{f}": torch.zeros_like(batch[f"past.{f}"]) for f in ("item", "brand")}
    one = {name: value[1:2] for name, value in batch.items()}
    bare = {"names": batch["names"][:, 1:2], "past.item": batch["past.item"], "label": batch["label"]}
    for each, given in ((model, none), (model, one), (make(kind, torch.float64, BARE), bare)):
        loss = each.train().loss(given)
        loss.backward()
        assert torch.isfinite(loss)
        assert all(torch.isfinite(p.grad).all() for p in each.parameters() if p.grad is not None)


@pytest.mark.parametrize("kind", [AWMoE, MoE, DIN])
def test_exported(kind: type[ClickModel]) -> None:
    """The form without positions chosen by data, which export takes, gives the same at any batch size."""
    model, batch = make(kind, torch.float64), make_batch(torch.float64)
    rows = torch.export.Dim("rows", min=2, max=1000)
    given = {name: value for name, value in batch.items() if name != "label"}
    shapes = {name: {0: rows} for name in given}
    program = torch.export.export(model, (given,), dynamic_shapes=(shapes,)).module()
    assert torch.allclose(program(given), model(batch), atol=1e-12)
    few = {name: value[:3] for name, value in given.items()}
    assert torch.allclose(program(few), model(batch)[:3], atol=1e-12)


def test_wrong_options() -> None:
    with pytest.raises(ValueError, match="mask must be"):
        AWMoE(AWMoEConfig(mask=1.0), SHAPE)
    with pytest.raises(ValueError, match="temperature"):
        AWMoE(AWMoEConfig(temperature=0.0), SHAPE)
    with pytest.raises(ValueError, match="experts must be"):
        MoE(MoEConfig(experts=0), SHAPE)
    with pytest.raises(ValueError, match="awmoe reads what a user had before"):
        AWMoE(AWMoEConfig(), ClicksShape(fields=(Vocabulary(name="item", size=7),)))
