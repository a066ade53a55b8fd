"""DIN against another library's with the same weights, and what both must do with padding.

`tests/golden/recsys_din.safetensors` holds what the library gave; the `.json` beside it names version and settings.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from attn_recsys.config import DINConfig
from attn_recsys.models.behaviour import BehaviourInput, Dice, Inputs
from attn_recsys.models.clicks import ClicksShape, Vocabulary
from attn_recsys.models.din import DIN

GOLDEN = Path(__file__).parents[1] / "golden" / "recsys_din.safetensors"
NOTE = json.loads(GOLDEN.with_suffix(".json").read_text(encoding="utf-8"))
TENSORS = load_file(GOLDEN)
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5}
SHAPE = ClicksShape(
    fields=(Vocabulary(name="user", size=9), Vocabulary(name="item", size=12), Vocabulary(name="brand", size=6)),
    numeric=("age",),
    item="item",
    user="user",
    behaviour=("item", "brand"),
)
# Theirs: user, item, brand, history of items, history of brands, age; ours: the rest, the item, the history.
ORDER = torch.tensor([0, 1, 2, 3, 20, *range(4, 20)])


def by_our_names(found: dict[str, Tensor], kind: str) -> dict[str, Tensor]:
    """Their parameters or gradients under our names, columns in our order."""
    theirs = {key.removeprefix(f"{kind}/"): value for key, value in found.items() if key.startswith(f"{kind}/")}
    ours = {
        f"inputs.tables.{i}.weight": theirs[f"embedding_dict.{n}.weight"]
        for i, n in enumerate(("user", "item", "brand"))
    }
    att, dnn = "attention.local_att.dnn", "dnn"
    names = {
        "unit.first": f"{att}.linears.0",
        "unit.rest.linears.0": f"{att}.linears.1",
        "unit.last": "attention.local_att.dense",
    }
    for ours_name, name in (names | {f"tower.linears.{i}": f"{dnn}.linears.{i}" for i in (0, 1)}).items():
        ours |= {f"{ours_name}.{part}": theirs[f"{name}.{part}"] for part in ("weight", "bias")}
    dice = {"unit.start": f"{att}.activation_layers.0", "unit.rest.activations.0": f"{att}.activation_layers.1"}
    for ours_name, name in (dice | {f"tower.activations.{i}": f"{dnn}.activation_layers.{i}" for i in (0, 1)}).items():
        if f"{name}.alpha" in theirs:
            ours[f"{ours_name}.alpha"] = theirs[f"{name}.alpha"].flatten()
        for part in ("running_mean", "running_var"):
            if f"{name}.bn.{part}" in theirs:
                ours[f"{ours_name}.norm.{part}"] = theirs[f"{name}.bn.{part}"]
    ours["score.weight"], ours["score.bias"] = theirs["dnn_linear.weight"], theirs["out.bias"]
    ours["tower.linears.0.weight"] = ours["tower.linears.0.weight"][:, ORDER]
    return ours


def case(name: str, dtype: torch.dtype) -> tuple[DIN, dict[str, Tensor], dict[str, Tensor]]:
    """Our model with the library's weights, the batch as ours, and everything kept."""
    found = {key.split(":", 1)[1]: value for key, value in TENSORS.items() if key.startswith(f"{name}:")}
    note, sizes = NOTE["cases"][name], NOTE["settings"]
    config = DINConfig(
        embed_dim=sizes["embedding"],
        attention_hidden=tuple(sizes["attention_hidden"]),
        hidden=tuple(sizes["hidden"]),
        activation=note["activation"],
        attention_softmax=note["attention_softmax"],
    )
    model = DIN(config, SHAPE).to(dtype)
    missing, unexpected = model.load_state_dict(by_our_names(found, "weight"), strict=False)
    assert not unexpected
    assert all(key.endswith("num_batches_tracked") for key in missing)
    model.train(note["training"])
    batch = {
        "names": torch.stack([found["user"], found["item"], found["brand"]], 1),
        "numbers": found["age"].to(dtype),
        "label": found["label"].to(dtype),
    }
    for field in ("item", "brand"):  # their padding stands at the end
        rows = [row[:n].tolist() for row, n in zip(found[f"past_{field}"], found["length"], strict=True)]
        batch[f"past.{field}"] = torch.tensor([[0] * (5 - len(row)) + row for row in rows])
    return model, batch, found


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("name", NOTE["cases"])
def test_library(name: str, dtype: torch.dtype) -> None:
    model, batch, found = case(name, dtype)
    limit = TOLERANCE[dtype]
    assert (torch.sigmoid(model(batch)).double() - found["probability"]).abs().max() <= limit
    loss = model.loss(batch)
    assert (loss.detach().double() - found["loss"]).abs() <= limit
    loss.backward()
    wanted = by_our_names(found | {k: v for k, v in found.items() if "running" in k}, "grad")
    parameters = dict(model.named_parameters())
    assert set(parameters) == set(wanted)
    for key, value in wanted.items():
        grad = parameters[key].grad
        assert grad is not None
        assert (grad.double() - value).abs().max() <= limit * value.abs().max().clamp(min=1.0), key


@pytest.mark.parametrize("training", [False, True])
def test_padding_changes_nothing(training: bool) -> None:
    """Neither the width of the padding nor what lies beside shorter histories changes a figure."""
    model, batch, _ = case("dice", torch.float64)
    model.train(training)
    wide = dict(batch)
    for field in ("item", "brand"):
        wide[f"past.{field}"] = torch.nn.functional.pad(batch[f"past.{field}"], (7, 0))
    assert torch.allclose(model(batch), model(wide), atol=1e-12)


def test_no_history() -> None:
    model, batch, _ = case("softmax", torch.float64)
    for field in ("item", "brand"):
        batch[f"past.{field}"] = torch.zeros_like(batch[f"past.{field}"])
    for mode in (True, False):
        loss = model.train(mode).loss(batch)
        loss.backward()
        assert torch.isfinite(loss)
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)


def test_dice_of_one_row() -> None:
    dice = Dice(3).train()
    x = torch.randn(1, 3)
    assert torch.allclose(dice(x), torch.sigmoid(x / (1 + 1e-8) ** 0.5) * x)  # running mean 0, variance 1


def test_weights() -> None:
    torch.manual_seed(0)
    there = torch.rand(4, 6) > 0.4
    there[0] = False
    scores = torch.randn(4, 6) * 100
    none = torch.zeros(4, 0)
    row = torch.arange(4).repeat_interleave(6)
    flat = {"target": none, "past": none, "other": none}
    dense = Inputs(**flat, row=row, there=there.flatten().float(), length=6)
    short = Inputs(**flat, row=row[there.flatten()], there=torch.ones(int(there.sum())))
    for softmax in (False, True):
        a = dense.weights(scores.view(-1, 1), dense.there, softmax).view(4, 6)
        b = short.weights(scores[there].unsqueeze(1), short.there, softmax).squeeze(1)
        wanted = (scores.masked_fill(~there, -torch.inf).softmax(1) if softmax else scores).nan_to_num() * there
        assert torch.allclose(a, wanted)
        assert torch.allclose(b, wanted[there])


def test_several_names_and_fields_of_their_own() -> None:
    """Attributes of earlier items are averaged as the item's; behaviour may be a field that shares the item's names."""
    fields = (Vocabulary(name="item", size=7), Vocabulary(name="tags", size=9, many=True))
    inputs = BehaviourInput(ClicksShape(fields=fields, item="item", behaviour=("item", "tags")), 4, "din")
    batch = {
        "names": torch.tensor([[3], [4]]),
        "many.tags": torch.tensor([[2, 5, 0], [0, 0, 0]]),
        "past.item": torch.tensor([[0, 3], [1, 4]]),
        "past.tags": torch.tensor([[[0, 0, 0], [2, 5, 0]], [[8, 0, 0], [0, 0, 0]]]),
    }
    x = inputs(batch)
    assert torch.equal(x.past[0], x.target[0])
    assert torch.equal(x.past[2], x.target[1])
    tags = inputs.tables[1].weight
    assert torch.allclose(x.target[0, 4:], (tags[2] + tags[5]) / 2)
    assert torch.equal(x.past[1, 4:], tags[8])
    assert x.row.tolist() == [0, 1, 1]
    assert x.other.shape == (2, 0)

    own = (
        Vocabulary(name="item", size=7),
        Vocabulary(name="had", size=7, shares="item"),
        Vocabulary(name="age", size=4),
    )
    inputs = BehaviourInput(ClicksShape(fields=own, item="item", behaviour=("had",)), 4, "din")
    x = inputs({"names": torch.tensor([[3, 2]]), "past.had": torch.tensor([[0, 3]])})
    assert torch.equal(x.past, x.target)
    assert torch.equal(x.other[0], inputs.tables[1].weight[2])


def test_data_without_behaviour_is_refused() -> None:
    with pytest.raises(ValueError, match="din reads what a user had before"):
        DIN(DINConfig(), ClicksShape(fields=(Vocabulary(name="item", size=7),), item="item"))
