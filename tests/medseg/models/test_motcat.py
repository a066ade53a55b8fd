"""MOTCat and its controls: the official code's numbers, the likelihood by hand, patients with slides of any size."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from attn_medseg.config import ABMILConfig, MOTCatConfig, SNNConfig
from attn_medseg.models.motcat import (
    SNN,
    MOTCat,
    SlideSurvival,
    SurvivalOutput,
    SurvivalShape,
    from_official,
    nll,
)

GOLDEN = Path(__file__).parents[2] / "golden"
STORED = load_file(GOLDEN / "medseg_motcat.safetensors")
SIZES = (10, 20, 30, 15, 25, 12)
OFFICIAL = json.loads((GOLDEN / "medseg_motcat.json").read_text(encoding="utf-8"))["parameters"]
"""Official name -> shape of each parameter, in the order in which they were drawn."""


def difference(found: Tensor, right: Tensor) -> float:
    assert found.shape == right.shape
    return ((found - right).abs().max() / right.abs().max().clamp(min=1)).item()


def official() -> tuple[MOTCat, dict[str, tuple[Tensor, Tensor]]]:
    """Our model with the official weights, and the patients of the cases."""
    generator = torch.Generator().manual_seed(11)
    weights = {}
    for name, shape in OFFICIAL.items():
        value = torch.randn(shape, generator=generator) * (shape[-1] ** -0.5 if len(shape) > 1 else 0.1)
        weights[name] = 1 + value if "norm" in name and name.endswith("weight") else value
    model = MOTCat(MOTCatConfig(), SurvivalShape(SIZES, 1024, 4)).eval()
    model.load_state_dict(from_official(weights))
    cases = {}
    for case, count in (("many", 40), ("few", 3)):
        x = torch.randn(1, count, 1024, generator=generator)
        cases[case] = (torch.cat([torch.randn(1, size, generator=generator) for size in SIZES], dim=1), x)
    return model, cases


@pytest.mark.parametrize("case", ["many", "few"])
def test_hazards_plan_losses_and_gradients_are_the_official_ones(case: str) -> None:
    model, cases = official()
    genes, x = cases[case]
    x.requires_grad_()
    output = model(genes, x, torch.ones(x.shape[:2], dtype=torch.bool))
    assert difference(output.hazards, STORED[f"{case}/hazards"]) <= 1e-5
    assert difference(output.survival, STORED[f"{case}/survival"]) <= 1e-5
    assert output.attention is not None
    assert (output.attention[0] - STORED[f"{case}/plan"]).abs().max() <= 1e-6
    losses = [
        nll(output, torch.tensor([y]), torch.tensor([not censored]), alpha=alpha).mean()
        for censored in (False, True)
        for y in range(4)
        for alpha in (0.0, 0.4)
    ]
    assert difference(torch.stack(losses), STORED[f"{case}/losses"]) <= 1e-5
    losses[2].backward()
    assert x.grad is not None
    assert difference(x.grad[0, :3], STORED[f"{case}/grad.x"]) <= 1e-5
    own = from_official({name: torch.tensor(number) for number, name in enumerate(OFFICIAL)})
    parameters = dict(model.named_parameters())
    assert set(own) == set(parameters)
    gradients = {name: parameter.grad for name, parameter in parameters.items()}
    assert all(one is not None for one in gradients.values())
    right = STORED[f"{case}/grad.sums"]
    for name, number in own.items():
        gradient = gradients[name]
        assert gradient is not None
        assert gradient.double().abs().sum().item() == pytest.approx(right[number].item(), rel=1e-4, abs=1e-6), name
    weight = gradients["classifier.weight"]
    assert weight is not None
    assert difference(weight, STORED[f"{case}/grad.classifier.weight"]) <= 1e-5


def test_the_likelihood_is_that_of_discrete_times() -> None:
    """Written down in Python floats; its chances of all that may happen add up to 1."""
    torch.manual_seed(0)
    output = SurvivalOutput(torch.randn(1, 4, dtype=torch.float64))
    hazards = output.hazards[0].tolist()
    survival = [math.prod(1 - h for h in hazards[:k]) for k in range(5)]
    for y in range(4):
        event = nll(output, torch.tensor([y]), torch.tensor([True])).item()
        assert event == pytest.approx(-math.log(survival[y]) - math.log(hazards[y]))
        for alpha in (0.0, 0.4):
            last = nll(output, torch.tensor([y]), torch.tensor([False]), alpha=alpha).item()
            assert last == pytest.approx(-(1 - alpha) * math.log(survival[y + 1]))
    chances = [math.exp(-nll(output, torch.tensor([y]), torch.tensor([True])).item()) for y in range(4)]
    assert sum(chances) + survival[4] == pytest.approx(1)
    assert output.risk.item() == pytest.approx(-sum(survival[1:]))


MODELS: dict[str, Any] = {
    "motcat": lambda shape: MOTCat(MOTCatConfig(width=16, heads=2), shape),
    "snn": lambda shape: SNN(SNNConfig(channels=(8, 8)), shape),
    "abmil": lambda shape: SlideSurvival(ABMILConfig(channels=(8,), hidden=4), shape),
}


@pytest.mark.parametrize("name", MODELS)
def test_a_batch_is_its_patients_one_by_one(name: str) -> None:
    torch.manual_seed(0)
    model = MODELS[name](SurvivalShape((3, 5), 6, 4)).double().eval()
    genes, x = torch.randn(3, 8, dtype=torch.float64), torch.randn(3, 9, 6, dtype=torch.float64)
    sizes = (1, 4, 9)
    mask = torch.arange(9) < torch.tensor(sizes)[:, None]
    together = model(genes, x.masked_fill(~mask[..., None], 1e6), mask)
    for i, size in enumerate(sizes):
        alone = model(genes[i : i + 1], x[i : i + 1, :size], mask[i : i + 1, :size])
        assert difference(together.logits[i], alone.logits[0]) < 1e-9
        if together.attention is not None:
            assert difference(together.attention[i, :, :size], alone.attention[0]) < 1e-9
            assert together.attention[i, :, size:].count_nonzero() == 0


@pytest.mark.parametrize(("name", "genes", "slides"), [("motcat", 1, 1), ("snn", 1, 0), ("abmil", 0, 1)])
def test_each_model_reads_what_it_says(name: str, genes: int, slides: int) -> None:
    torch.manual_seed(0)
    model = MODELS[name](SurvivalShape((3, 5), 6, 4)).eval()
    assert [("genes" in model.needs), ("slides" in model.needs)] == [bool(genes), bool(slides)]
    first = (torch.randn(1, 8, requires_grad=True), torch.randn(1, 5, 6, requires_grad=True))
    output = model(*first, torch.ones(1, 5, dtype=torch.bool))
    found = torch.autograd.grad(output.risk.sum(), first, allow_unused=True)
    assert [one is not None and bool(one.count_nonzero()) for one in found] == [bool(genes), bool(slides)]


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda s: MOTCat(MOTCatConfig(width=10, heads=4), s), "multiple of heads"),
        (lambda s: MOTCat(MOTCatConfig(dropout=1.0), s), "dropout"),
        (lambda s: SNN(SNNConfig(channels=()), s), "channels"),
    ],
)
def test_bad_options_are_one_sentence(make: Any, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        make(SurvivalShape((3,), 4, 4))


def test_evaluation_knows_autocast_and_float64() -> None:
    torch.manual_seed(0)
    model = MODELS["motcat"](SurvivalShape((3, 5), 6, 4)).eval()
    genes, x, mask = torch.randn(2, 8), torch.randn(2, 7, 6), torch.ones(2, 7, dtype=torch.bool)
    with torch.no_grad():
        right = model(genes, x, mask).survival
        with torch.autocast("cpu", torch.bfloat16):
            half = model(genes, x, mask).survival
        double = model.double()(genes.double(), x.double(), mask).survival
    assert difference(half.float(), right) < 0.05
    assert difference(double.float(), right) < 1e-5
