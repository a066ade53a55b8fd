"""ACMIL and ABMIL: the official code's numbers, the loss terms by hand, bags of different sizes, options."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from attn_medseg.config import ABMILConfig, ACMILConfig
from attn_medseg.models.mil import ABMIL, ACMIL, BagShape, from_official

STORED = load_file(Path(__file__).parents[2] / "golden" / "medseg_acmil.safetensors")
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5}
LABEL = {"x": 2, "small": 0}


def official(dtype: torch.dtype) -> ACMIL:
    model = ACMIL(ACMILConfig(channels=(8,), hidden=6), BagShape(9, 3)).to(dtype)
    weights = {name.removeprefix("weight."): value for name, value in STORED.items() if name.startswith("weight.")}
    model.load_state_dict(from_official(weights))
    return model


def difference(found: Tensor, right: Tensor) -> float:
    assert found.shape == right.shape
    return ((found - right).abs().max() / right.abs().max().clamp(min=1)).item()


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize(("mode", "bag"), [("eval", "x"), ("train", "x"), ("train", "small")])
def test_outputs_losses_and_gradients_are_the_official_ones(mode: str, bag: str, dtype: torch.dtype) -> None:
    """Evaluation, and masked training with the same random draw, of a large bag and of one smaller than the top 10."""
    model = official(dtype).train(mode == "train")
    key = f"{mode}_{bag}/{str(dtype).removeprefix('torch.')}"
    x = STORED[bag].to(dtype)
    torch.manual_seed(7)
    output = model(x, torch.ones(x.shape[:2], dtype=torch.bool))
    assert difference(output.branches[0], STORED[f"{key}/branches"]) <= TOLERANCE[dtype]
    assert difference(output.logits, STORED[f"{key}/slide"]) <= TOLERANCE[dtype]
    assert difference(output.weights, STORED[f"{key}/attention"]) <= TOLERANCE[dtype]
    masked = {"eval": 0, "train": 5 * int(0.6 * min(10, x.shape[1]))}[mode]
    assert (output.weights == 0).sum() == masked
    terms = model.losses(output, torch.tensor([LABEL[bag]]))
    found = torch.stack([terms["bag"], terms["branch"], terms["diversity"], torch.stack(list(terms.values())).sum()])
    assert difference(found, STORED[f"{key}/losses"]) <= TOLERANCE[dtype]
    found[-1].backward()
    names = {
        name.removeprefix(f"{key}/grad."): value for name, value in STORED.items() if name.startswith(f"{key}/grad.")
    }
    right = from_official(names)
    own = dict(model.named_parameters())
    assert own.keys() == right.keys()
    for name, value in right.items():
        gradient = own[name].grad
        assert gradient is not None
        assert difference(gradient, value) <= TOLERANCE[dtype], name


@pytest.mark.parametrize("kind", [ACMIL, ABMIL])
def test_bags_filled_up_are_what_they_are_alone(kind: Any) -> None:
    torch.manual_seed(0)
    config = ACMILConfig(channels=(6, 5), hidden=4) if kind is ACMIL else ABMILConfig(channels=(6, 5), hidden=4)
    model = kind(config, BagShape(3, 2)).double().eval()
    sizes = (1, 4, 9)
    x = torch.randn(3, 9, 3, dtype=torch.float64)
    mask = torch.arange(9) < torch.tensor(sizes)[:, None]
    together = model(x.masked_fill(~mask[..., None], 1e6), mask)
    for i, size in enumerate(sizes):
        alone = model(x[i : i + 1, :size], mask[i : i + 1, :size])
        assert difference(together.logits[i], alone.logits[0]) < 1e-12
        assert difference(together.attention[i, :size], alone.attention[0]) < 1e-12
        assert together.attention[i].sum().item() == pytest.approx(1)
    label = torch.tensor([0, 1, 1])
    mean = {
        name: sum(
            model.losses(model(x[i : i + 1, :n], mask[i : i + 1, :n]), label[i : i + 1])[name]
            for i, n in enumerate(sizes)
        )
        / 3
        for name in model.losses(together, label)
    }
    for name, value in model.losses(together, label).items():
        assert value.item() == pytest.approx(mean[name].item(), abs=1e-12), name


def test_abmil_is_acmil_with_one_branch_and_no_mask() -> None:
    """As the official notes say: one token, nothing masked; its loss is the bag's alone."""
    torch.manual_seed(0)
    model = ABMIL(ABMILConfig(channels=(5,), hidden=4), BagShape(3, 2))
    x, mask = torch.randn(2, 7, 3), torch.ones(2, 7, dtype=torch.bool)
    torch.manual_seed(1)
    train = model.train()(x, mask)
    assert torch.equal(train.logits, model.eval()(x, mask).logits)
    assert list(model.losses(train, torch.tensor([0, 1]))) == ["bag"]


def test_class_weights_and_the_weight_of_diversity() -> None:
    torch.manual_seed(0)
    x, mask, label = torch.randn(2, 7, 3), torch.ones(2, 7, dtype=torch.bool), torch.tensor([0, 1])
    model = ACMIL(ACMILConfig(channels=(5,), hidden=4, diversity=0.5), BagShape(3, 2)).eval()
    whole = ACMIL(ACMILConfig(channels=(5,), hidden=4), BagShape(3, 2)).eval()
    whole.load_state_dict(model.state_dict())
    output = model(x, mask)
    assert model.losses(output, label)["diversity"] * 2 == whole.losses(output, label)["diversity"]
    plain = model.losses(output, label)["bag"]
    assert torch.equal(plain, model.losses(output, label, weight=torch.tensor([2.0, 2.0]))["bag"])
    assert plain != model.losses(output, label, weight=torch.tensor([1.0, 9.0]))["bag"]


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"branches": 1}, "one branch is the model abmil"),
        ({"channels": ()}, "channels and hidden"),
        ({"dropout": 1.0}, "dropout"),
        ({"drop": 1.0}, "drop must lie"),
    ],
)
def test_bad_options_are_one_sentence(options: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        ACMIL(ACMILConfig(**options), BagShape(3, 2))
