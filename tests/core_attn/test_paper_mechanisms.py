"""Auto-Correlation, ProbSparse and Flow-Attention against what their papers' own code computes, and the contract.

The golden tensors come from the official code run with the stored weights; the .json files beside them say which.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import core_attn
from core_attn.ops.prob_sparse import sample_keys

GOLDEN = Path(__file__).parents[1] / "golden"
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5}
NAMES = ("auto_correlation", "prob_sparse", "flow")


def _note(name: str) -> dict[str, Any]:
    note: dict[str, Any] = json.loads((GOLDEN / f"core_{name}.json").read_text(encoding="utf-8"))
    return note


def _options(name: str, facts: dict[str, Any]) -> dict[str, Any]:
    if name == "auto_correlation":
        return {"factor": facts["factor"]}
    if name == "prob_sparse":
        return {"factor": facts["factor"], "causal": facts["causal"], "selection": "paper"}
    return {"causal": facts["causal"], "clamp": facts["clamp"]}


@pytest.mark.parametrize("backend", ["torch", "reference"])
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize(("name", "case"), [(name, case) for name in NAMES for case in _note(name)["cases"]])
def test_official_outputs_and_gradients(
    name: str, case: str, dtype: torch.dtype, training: bool, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    stored = load_file(GOLDEN / f"core_{name}.safetensors")
    golden = {k.removeprefix(f"{case}/"): v for k, v in stored.items() if k.startswith(f"{case}/")}
    options = _options(name, _note(name)["cases"][case])
    mixer = core_attn.build(name, dim=8, heads=2, backend=backend, **options).to(dtype).train(training)
    mixer.load_state_dict({k: v.to(dtype) for k, v in golden.items() if k.split(".")[0].endswith("_proj")})
    if name == "prob_sparse":
        monkeypatch.setattr(mixer, "draw", lambda q, k, generator: golden["index"])
    inputs = {k: golden[k].to(dtype).requires_grad_() for k in ("x", "context") if k in golden}
    out = mixer(inputs["x"], context=inputs.get("context"))
    weight = torch.cos(torch.arange(out.numel(), dtype=dtype)).view_as(out)
    leaves = inputs | dict(mixer.named_parameters())
    gradients = torch.autograd.grad((out * weight).sum(), list(leaves.values()))

    # Where evaluation is not stored it gave the very bits of training.
    kind = str(dtype).removeprefix("torch.")
    mode = "train" if training or f"{kind}/eval/output" not in golden else "eval"
    found = {"output": out} | {f"grad.{k}": g for k, g in zip(leaves, gradients, strict=True)}
    for what, got in found.items():
        right = golden[f"{kind}/{mode}/{what}"]
        assert got.shape == right.shape
        assert _difference(got, right) <= TOLERANCE[dtype], what


def test_training_and_evaluation_of_auto_correlation_differ_in_the_golden_tensors() -> None:
    golden = load_file(GOLDEN / "core_auto_correlation.safetensors")
    for case in _note("auto_correlation")["cases"]:
        train, evaluation = (golden[f"{case}/float64/{mode}/output"] for mode in ("train", "eval"))
        assert _difference(train, evaluation) > 1e-2


def test_the_seeded_draw_is_the_official_one() -> None:
    golden = load_file(GOLDEN / "core_prob_sparse.safetensors")
    for case, facts in _note("prob_sparse")["cases"].items():
        keys = facts["context"] or facts["length"]
        generator = torch.Generator().manual_seed(facts["seed"])
        drawn = sample_keys(facts["length"], keys, factor=facts["factor"], generator=generator)
        assert torch.equal(drawn, golden[f"{case}/index"])
        torch.manual_seed(facts["seed"])
        assert torch.equal(sample_keys(facts["length"], keys, factor=facts["factor"]), drawn)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("auto_correlation", {"factor": 3.0}),
        ("auto_correlation", {"factor": 0.1}),
        ("prob_sparse", {"factor": 1}),
        ("flow", {"clamp": False}),
    ],
)
def test_contract_of_options(name: str, options: dict[str, Any]) -> None:
    core_attn.testing.check_mechanism(name, skip=["compile", "export", "determinism", "strides"], **options)


def test_the_papers_causal_selection_leaks_and_the_default_does_not() -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 60, 8, dtype=torch.float64)
    future = torch.cat([x[:, :40], 10 * torch.randn(2, 20, 8, dtype=torch.float64)], dim=1)
    for selection, leaks in (("paper", True), ("causal", False)):
        mixer = core_attn.build("prob_sparse", dim=8, heads=2, causal=True, factor=2, selection=selection)
        mixer = mixer.double().eval()
        with torch.no_grad():
            assert bool(_difference(mixer(x)[:, :40], mixer(future)[:, :40]) > 0) is leaks


def test_prob_sparse_draws() -> None:
    x = torch.randn(2, 60, 8)
    mixer = core_attn.build("prob_sparse", dim=8, heads=2, factor=1)
    with torch.no_grad():
        trained = [mixer.train()(x) for _ in range(2)]
        seeded = [mixer(x, generator=torch.Generator().manual_seed(seed)) for seed in (1, 1, 2)]
        evaluated = [mixer.eval()(x) for _ in range(2)]
    assert not torch.equal(*trained)
    assert torch.equal(*evaluated)
    assert torch.equal(seeded[0], seeded[1])
    assert not torch.equal(seeded[0], seeded[2])


def test_auto_correlation_trains_with_the_batch_and_evaluates_each_sample() -> None:
    torch.manual_seed(0)
    x = torch.randn(6, 50, 8)
    mixer = core_attn.build("auto_correlation", dim=8, heads=2)
    with torch.no_grad():
        assert _difference(mixer.train()(x)[:1], mixer(x[:1])) > 1e-3
        assert _difference(mixer.eval()(x)[:1], mixer(x[:1])) < 1e-6


def test_flow_decoding_state_holds_no_prompt() -> None:
    mixer = core_attn.build("flow", dim=8, heads=2, causal=True).eval()
    with torch.no_grad():
        _, state = mixer.step(torch.randn(2, 500, 8), mixer.init_state(2))
    assert sum(t.untyped_storage().nbytes() for t in state) == sum(
        t.untyped_storage().nbytes() for t in mixer.init_state(2)
    )


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: core_attn.build("auto_correlation", dim=8, heads=2, factor=0), "factor must be positive"),
        (lambda: core_attn.build("prob_sparse", dim=8, heads=2, factor=0), "factor must be a positive integer"),
        (lambda: core_attn.build("prob_sparse", dim=8, heads=2, selection="papers"), "'paper'"),
        (lambda: core_attn.build("flow", dim=8, heads=2).init_state(1), "token by token"),
        (lambda: core_attn.build("flow", dim=8, heads=2).step(torch.randn(1, 1, 8), None), "token by token"),
    ],
)
def test_errors(make: Callable[[], Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        make()


def _difference(a: Tensor, b: Tensor) -> float:
    difference = float((a - b).detach().abs().max())
    return difference if not math.isnan(difference) else math.inf
