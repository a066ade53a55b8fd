"""Click models against their equations, written out plainly."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from attn_recsys.config import MODELS, AutoIntConfig, DCNv2Config, FMConfig, HiformerConfig, LogisticConfig
from attn_recsys.models.autoint import AutoInt
from attn_recsys.models.clicks import ClicksShape, Vocabulary
from attn_recsys.models.dcn import DCNv2
from attn_recsys.models.fields import FieldVectors
from attn_recsys.models.fm import FM
from attn_recsys.models.hiformer import CompositeLinear, FieldLinear, Hiformer, low_rank
from attn_recsys.models.logistic import LogisticRegression
from attn_shared.app import load

SHAPE = ClicksShape(
    fields=(
        Vocabulary(name="user", size=12),
        Vocabulary(name="item", size=9),
        Vocabulary(name="tags", size=7, many=True),
        Vocabulary(name="hour", size=5),
    ),
    numeric=("price", "age"),
    item="item",
    user="user",
    behaviour=("item", "tags"),
)
PLAIN = ("logistic", "fm", "dcnv2", "autoint", "hiformer")


def batch(rows: int = 6, seed: int = 0, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)

    def drawn(size: int, *dims: int) -> Tensor:
        return torch.randint(0, size, (rows, *dims), generator=generator)

    return {
        "names": torch.stack([drawn(12), drawn(9), drawn(5)], dim=1),
        "many.tags": drawn(7, 4).sort(dim=1, descending=True).values,
        "past.item": drawn(9, 3).sort(dim=1).values,
        "past.tags": drawn(7, 3, 2).sort(dim=2, descending=True).values,
        "numbers": torch.randn(rows, 2, generator=generator, dtype=dtype),
        "label": drawn(2).to(dtype),
    }


def made(cls: type, config: Any, *, seed: int = 0, **options: Any) -> Any:
    torch.manual_seed(seed)
    model = cls(config, SHAPE, **options).double().eval()
    with torch.no_grad():  # nothing stays at zero, or at one
        for parameter in model.parameters():
            parameter += 0.3 * torch.randn_like(parameter)
    return model


def tokens(vectors: FieldVectors, data: dict[str, Tensor], row: int) -> Tensor:
    """(T, D) vectors of one row, field by field."""
    table, begin = vectors.table.weight, {"user": 0, "item": 12, "tags": 21, "hour": 28}

    def mean(numbers: list[int], field: str) -> Tensor:
        here = [table[begin[field] + n] for n in numbers if n != 0]
        return torch.stack(here).mean(0) if here else torch.zeros(table.shape[1], dtype=table.dtype)

    found = [table[begin[f] + int(data["names"][row, i])] for i, f in enumerate(("user", "item", "hour"))]
    found.append(mean(data["many.tags"][row].tolist(), "tags"))
    found.append(mean(data["past.item"][row].tolist(), "item"))
    found.append(mean(data["past.tags"][row].flatten().tolist(), "tags"))
    if vectors.slope is not None and vectors.level is not None:
        found += [data["numbers"][row, i] * vectors.slope[i] + vectors.level[i] for i in range(2)]
    return torch.stack(found)


def test_vectors_of_fields() -> None:
    vectors = made_vectors()
    data = batch()
    expected = torch.stack([tokens(vectors, data, row) for row in range(6)])
    torch.testing.assert_close(vectors(data), expected, atol=1e-12, rtol=0)
    assert vectors.names == ["user", "item", "hour", "tags", "past item", "past tags", "price", "age"]


def made_vectors() -> FieldVectors:
    torch.manual_seed(0)
    return FieldVectors(SHAPE, 4).double()


def test_names_that_training_lacked_start_at_zero() -> None:
    data = batch()
    data["names"] = torch.ones_like(data["names"])
    assert not bool(FieldVectors(SHAPE, 4)(data | {"numbers": data["numbers"].float()})[:, :3].any())


def test_logistic_regression_and_factorization_machine() -> None:
    data = batch()
    logistic = made(LogisticRegression, LogisticConfig())
    machine = made(FM, FMConfig(embed_dim=4))
    for row in range(6):
        linear = tokens(logistic.linear.weights, data, row).sum() + logistic.linear.bias
        assert abs(float(logistic(data)[row] - linear)) < 1e-12
        v = tokens(machine.vectors, data, row)
        pairs = sum(v[i] @ v[j] for i in range(len(v)) for j in range(i))
        linear = tokens(machine.linear.weights, data, row).sum() + machine.linear.bias
        assert abs(float(machine(data)[row] - linear - pairs)) < 1e-11


@pytest.mark.parametrize("rank", [0, 3])
def test_cross_network(rank: int) -> None:
    model, data = made(DCNv2, DCNv2Config(embed_dim=4, layers=2, rank=rank, hidden=(5,))), batch()
    for row in range(6):
        start = torch.cat([tokens(model.vectors, data, row).flatten(), data["numbers"][row]])
        x = start
        for layer in model.cross:
            if rank:
                w, b = layer[1].weight @ layer[0].weight, layer[1].bias
            else:
                w, b = layer.weight, layer.bias
            x = start * (w @ x + b) + x
        deep = torch.relu(model.deep[0].weight @ start + model.deep[0].bias)
        odds = model.score.weight[0] @ torch.cat([x, deep]) + model.score.bias[0]
        assert abs(float(model(data)[row] - odds)) < 1e-10


def heads_of(weight: Tensor, heads: int) -> Tensor:
    """(H, D, C): the rows of a projection, head by head."""
    return weight.unflatten(0, (heads, -1))


@pytest.mark.parametrize("scale", [False, True])
def test_autoint(scale: bool) -> None:
    """Equations (5) to (9), head by head and field by field."""
    model, data = made(AutoInt, AutoIntConfig(embed_dim=6, heads=2, layers=2, scale=scale, hidden=(5,))), batch()
    for row in range(6):
        e = start = tokens(model.vectors, data, row)
        for mixer, residual in zip(model.mixers, model.residuals):
            q, k, v = (heads_of(getattr(mixer, name).weight, 2) for name in ("q_proj", "k_proj", "v_proj"))
            out = []
            for m in range(len(e)):
                heads = []
                for h in range(2):
                    scores = torch.stack([(q[h] @ e[m]) @ (k[h] @ e[n]) for n in range(len(e))])
                    weights = torch.softmax(scores / (math.sqrt(3) if scale else 1.0), 0)
                    heads.append(sum(weights[n] * (v[h] @ e[n]) for n in range(len(e))))
                out.append(torch.relu(torch.cat(heads) + residual.weight @ e[m]))
            e = torch.stack(out)
        deep = torch.relu(model.deep[0].weight @ start.flatten() + model.deep[0].bias)
        odds = model.score.weight[0] @ e.flatten() + model.score.bias[0] + model.deep_score.weight[0] @ deep
        assert abs(float(model(data)[row] - odds)) < 1e-11


def projected(module: Any, e: Tensor) -> list[Tensor]:
    """What each token gets, from the definition: a matrix of its own, or its rows of one over all tokens."""
    if isinstance(module, FieldLinear):
        return [module.weight[i].T @ e[i] + (0 if module.bias is None else module.bias[i]) for i in range(len(e))]
    if isinstance(module, CompositeLinear):
        whole = module.right if module.left is None else module.right @ module.left
        return list((whole @ e.flatten()).unflatten(0, (len(e), -1)))
    return [module.weight @ one + (0 if module.bias is None else module.bias) for one in e]


def hiformer_odds(model: Hiformer, e: Tensor, heads: int) -> Tensor:
    """Every token through every layer, nothing pruned."""

    def norm(module: Any, x: Tensor) -> Tensor:
        return (x - x.mean()) / torch.sqrt(x.var(unbiased=False) + module.eps) * module.weight + module.bias

    for block in model.blocks:
        mixer: Any = block.mixer
        q, k, v = (projected(getattr(mixer, name), e) for name in ("q_proj", "k_proj", "v_proj"))
        width = len(q[0]) // heads
        mixed = []
        for i in range(len(e)):
            out = []
            for h in range(heads):
                part = slice(h * width, (h + 1) * width)
                scores = torch.stack([q[i][part] @ k[j][part] for j in range(len(e))]) / math.sqrt(width)
                weights = torch.softmax(scores, 0)
                out.append(sum(weights[j] * v[j][part] for j in range(len(e))))
            mixed.append(torch.cat(out))
        mixed = projected(mixer.out_proj, torch.stack(mixed))
        x = torch.stack([norm(block.attention_norm, e[i] + mixed[i]) for i in range(len(e))])
        inner = torch.nn.functional.gelu(torch.stack(projected(block.widen, x)))
        fed = projected(block.narrow, inner)
        e = torch.stack([norm(block.feed_forward_norm, x[i] + fed[i]) for i in range(len(e))])
    return model.score.weight[0] @ e[0] + model.score.bias[0]


@pytest.mark.parametrize("pruned", [False, True])
@pytest.mark.parametrize(
    ("projection", "rank"), [("composite", 0), ("composite", 5), ("heterogeneous", 0), ("shared", 0)]
)
def test_hiformer_is_its_equations(projection: str, rank: int, pruned: bool) -> None:
    config = HiformerConfig(embed_dim=6, layers=2, projection=projection, rank=rank, pruned=pruned)  # type: ignore[arg-type]
    model, data = made(Hiformer, config), batch()
    weights = torch.linspace(-1, 2, 6, dtype=torch.float64)
    parameters = list(model.parameters())
    found = model(data)
    expected = torch.stack(
        [hiformer_odds(model, torch.cat([model.task[None], tokens(model.vectors, data, row)]), 2) for row in range(6)]
    )
    torch.testing.assert_close(found, expected, atol=1e-11, rtol=0)
    ours = torch.autograd.grad(found @ weights, parameters, allow_unused=True)
    theirs = torch.autograd.grad(expected @ weights, parameters, allow_unused=True)
    for mine, other in zip(ours, theirs):
        # What nothing reads has no gradient in one form and zeros in the other.
        mine, other = (torch.zeros(1, dtype=torch.float64) if one is None else one for one in (mine, other))
        torch.testing.assert_close(*torch.broadcast_tensors(mine, other), atol=1e-10, rtol=0)
    single = model.float()(batch(dtype=torch.float32))
    torch.testing.assert_close(single.double(), expected.detach(), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("projection", ["composite", "heterogeneous", "shared"])
def test_pruning_changes_nothing(projection: str) -> None:
    """Odds and gradients, with and without what the task token does not read."""
    config = HiformerConfig(embed_dim=6, layers=2, projection=projection, rank=4, pruned=False)  # type: ignore[arg-type]
    whole, data = made(Hiformer, config), batch()
    pruned = made(Hiformer, dataclasses.replace(config, pruned=True), seed=1)
    pruned.load_state_dict(whole.state_dict())
    assert [block.pruned for block in pruned.blocks] == [False, True]
    torch.testing.assert_close(pruned(data), whole(data), atol=1e-12, rtol=0)
    whole.loss(data).backward()
    pruned.loss(data).backward()
    for (name, a), b in zip(whole.named_parameters(), pruned.parameters()):
        expected = torch.zeros_like(a) if a.grad is None else a.grad
        found = torch.zeros_like(a) if b.grad is None else b.grad
        torch.testing.assert_close(found, expected, atol=1e-12, rtol=0, msg=name)


def test_low_rank_at_full_rank_is_the_full_form() -> None:
    config = HiformerConfig(embed_dim=6, layers=2, rank=0)
    full, data = made(Hiformer, config), batch()
    expected = full(data).detach()
    wide = (1 + len(full.vectors)) * 6
    factored = made(Hiformer, config)
    assert torch.equal(factored(data), expected)
    low_rank(factored, wide)
    assert all(block.mixer.q_proj.left.shape == (wide, wide) for block in factored.blocks)
    torch.testing.assert_close(factored(data), expected, atol=1e-10, rtol=0)
    errors = []
    for rank in (2, wide // 2, wide - 1):
        model = low_rank(made(Hiformer, config), rank)
        projection = model.blocks[0].mixer.q_proj
        whole = full.blocks[0].mixer.q_proj.right
        errors.append(float((projection.right @ projection.left - whole).norm()))
        # No map of that rank is nearer (Eckart and Young).
        assert errors[-1] == pytest.approx(float(torch.linalg.svdvals(whole)[rank:].norm()), rel=1e-9)
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] > 1e-3


def test_composite_projections_contain_the_heterogeneous_ones() -> None:
    """A block-diagonal composite matrix is one matrix a field; the same matrix for all of them, a Transformer's."""
    torch.manual_seed(0)
    own, all_fields = FieldLinear(3, 4, 5, bias=False).double(), CompositeLinear(3, 4, 5).double()
    with torch.no_grad():
        all_fields.right.copy_(torch.block_diag(*own.weight.transpose(1, 2)))
    x = torch.randn(7, 3, 4, dtype=torch.float64)
    torch.testing.assert_close(all_fields(x), own(x), atol=1e-12, rtol=0)
    torch.testing.assert_close(all_fields(x, 1), own(x[:, :1]), atol=1e-12, rtol=0)
    shared = own.weight[0].T
    with torch.no_grad():
        own.weight.copy_(shared.T.expand(3, 4, 5))
    torch.testing.assert_close(own(x), x @ shared.T, atol=1e-12, rtol=0)


def test_numbers_together() -> None:
    model = made(Hiformer, HiformerConfig(embed_dim=6, numeric_tokens=2))
    assert len(model.vectors) == 6
    assert model.blocks[0].mixer.q_proj.fields == 1 + 6 + 2
    data = batch()
    changed = data | {"numbers": data["numbers"] + 1}
    assert float((model(data) - model(changed)).abs().min()) > 0


@pytest.mark.parametrize("name", PLAIN)
def test_models_learn_a_row_each_on_their_own(name: str) -> None:
    """Rows do not mix, every parameter has a finite gradient, and the loss is the cross entropy."""
    card = MODELS[name]
    model = made(load(card.target), card.config())
    data = batch()
    odds = model(data)
    assert odds.shape == (6,)
    for row in range(6):
        alone = model({key: value[row : row + 1] for key, value in data.items()})
        torch.testing.assert_close(alone, odds[row : row + 1], atol=1e-11, rtol=0)
    p = torch.sigmoid(odds)
    entropy = -(data["label"] * p.log() + (1 - data["label"]) * (1 - p).log()).mean()
    loss = model.loss(data)
    extra = 0.0
    if name == "logistic":
        extra = float(1e-5 * model.linear.weights.table.weight.square().sum() / 2)
    assert float(loss) == pytest.approx(float(entropy) + extra, abs=1e-10)
    loss.backward()
    for key, parameter in model.named_parameters():
        assert parameter.grad is not None, key
        assert bool(torch.isfinite(parameter.grad).all()), key


@pytest.mark.parametrize("model", ["hiformer", "autoint"])
def test_other_mechanisms(model: str) -> None:
    card = MODELS[model]
    data = batch()
    plain = made(load(card.target), card.config())
    # One that is built of plain queries, keys and values.
    mixed = made(load(card.target), card.config(), mixer="flow")
    assert mixed(data).shape == (6,)
    assert not torch.allclose(mixed(data), plain(data))
    if model == "hiformer":
        with pytest.raises(ValueError, match="does not read plain queries"):
            Hiformer(HiformerConfig(), SHAPE, mixer="lightning")
        shared = made(load(card.target), card.config(projection="shared"), mixer="lightning")
        assert shared(data).shape == (6,)


@pytest.mark.parametrize("name", ["logistic", "fm", "dcnv2"])
def test_models_without_attention_take_no_mixer(name: str) -> None:
    card = MODELS[name]
    with pytest.raises(ValueError, match="takes no mixer"):
        load(card.target)(card.config(), SHAPE, mixer="softmax")


def test_options_out_of_range() -> None:
    for options, message in (
        ({"layers": 0}, "layers must be 1"),
        ({"heads": 5}, "heads must divide"),
        ({"rank": -1}, "rank must be"),
    ):
        with pytest.raises(ValueError, match=message):
            Hiformer(HiformerConfig(**options), SHAPE)
