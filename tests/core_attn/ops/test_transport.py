"""sinkhorn: against POT and the official code of MOTCat, its definition, and gradients through every iteration."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from core_attn.ops import sinkhorn
from core_attn.ops.transport import implicit
from core_attn.testing.harness import worst

GOLDEN = Path(__file__).parents[2] / "golden" / "core_sinkhorn"
STORED = load_file(GOLDEN.with_suffix(".safetensors"))
CASES = json.loads(GOLDEN.with_suffix(".json").read_text(encoding="utf-8"))["cases"]
TIGHT = {"iterations": 100_000, "tolerance": 1e-14}


def problem(
    rows: int, columns: int, *, batch: int = 2, total: float = 1.0, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    cost = torch.rand(batch, rows, columns, generator=g, dtype=torch.float64)
    a, b = (torch.rand(batch, n, generator=g, dtype=torch.float64) + 0.1 for n in (rows, columns))
    return cost, a / a.sum(1, keepdim=True), total * b / b.sum(1, keepdim=True)


def outcome(cost: Tensor, a: Tensor, b: Tensor, **options: Any) -> list[Tensor]:
    """Plan and all gradients, for a loss that treats no two entries alike; what masses lose by scaling is projected."""
    leaves = [x.detach().clone().requires_grad_() for x in (cost, a, b)]
    masses = leaves[1:]
    if options.get("tau") is None:  # kept masses move together only: their sums must stay equal
        masses = [m / m.sum(1, keepdim=True).clamp(min=1e-30) for m in masses]
    plan = sinkhorn(leaves[0], *masses, **options)
    probe = torch.sin(torch.arange(plan.numel(), dtype=plan.dtype)).view(plan.shape)
    on_cost, *on_masses = torch.autograd.grad(plan, leaves, probe)
    # Of a point without mass, the scaling of its set above is all that would be left.
    return [plan.detach(), on_cost, *[g.masked_fill(m == 0, 0.0) for g, m in zip(on_masses, (a, b))]]


@pytest.mark.parametrize(
    ("case", "backend"),  # the smallest reg takes 20,000 iterations, and the reference seconds
    [(case, backend) for case in CASES for backend in ("torch", "reference") if case != "balanced_small"]
    + [("balanced_small", "torch")],
)
def test_plans_are_those_of_pot(case: str, backend: str) -> None:
    target = STORED["pot/target"] * (1.5 if "tau" in CASES[case] else 1.0)
    plan = sinkhorn(STORED["pot/cost"], STORED["pot/source"], target, backend=backend, **CASES[case], **TIGHT)
    assert (plan - STORED[f"pot/{case}"]).abs().max() <= 1e-12


@pytest.mark.parametrize("kept", [False, True])
def test_plan_of_the_official_co_attention(kept: bool) -> None:
    """The setting of MOTCat from its features on: in float64 as there, and in float32."""
    x, y = (t.squeeze(1) - t.squeeze(1).min(-1, keepdim=True)[0] for t in (STORED["motcat/x"], STORED["motcat/y"]))
    cost = torch.cdist(x, y) ** 2
    masses = [t.sum(1) / t.sum() for t in (x, y)] if kept else [None, None]
    name = "balanced_" if kept else ""
    for dtype in (torch.float64, torch.float32):
        scaled = (cost / cost.max()).to(dtype)
        plan = sinkhorn(scaled, *(None if m is None else m.to(dtype) for m in masses), tau=None if kept else 0.5)
        assert plan.dtype is dtype
        assert (plan.T - STORED[f"motcat/{name}plan"][0, 0]).abs().max() <= 1e-6
        distance = (cost * plan).sum()
        assert distance.item() == pytest.approx(STORED[f"motcat/{name}distance"].item(), rel=1e-5)


def test_the_plan_is_optimal() -> None:
    """The objective, written down, is larger at 200 plans around it; masses are kept where they must be."""

    def divergence(x: Tensor, y: Tensor) -> Tensor:
        return (x * (x / y).log() - x + y).sum()

    cost, a, b = (t[0] for t in problem(5, 7, total=1.3))
    for prior in (True, False):
        measure = a[:, None] * b if prior else torch.ones_like(cost)

        def objective(p: Tensor, measure: Tensor = measure) -> Tensor:
            relaxed = 0.5 * (divergence(p.sum(1), a) + divergence(p.sum(0), b))
            return (p * cost).sum() + 0.1 * divergence(p, measure) + relaxed

        plan = sinkhorn(cost, a, b, tau=0.5, prior=prior, **TIGHT)
        best = objective(plan)
        generator = torch.Generator().manual_seed(0)
        for _ in range(200):
            noise = torch.randn(plan.shape, generator=generator, dtype=plan.dtype)
            assert objective(plan * (0.01 * noise).exp()) > best
    plan = sinkhorn(cost, a, b / b.sum(), reg=0.05, **TIGHT)
    assert (plan.sum(1) - a).abs().max() < 1e-12
    assert (plan.sum(0) - b / b.sum()).abs().max() < 1e-12


def test_200_random_draws() -> None:
    """Sizes, options, points without mass, strides: the implicit gradient is that through all iterations."""
    for seed in range(200):
        g = torch.Generator().manual_seed(seed)

        def pick(*values: Any, g: torch.Generator = g) -> Any:
            return values[int(torch.randint(len(values), (), generator=g))]

        tau = pick(None, 0.5, 2.0)
        total = 1.0 if tau is None else 1.7
        cost, a, b = problem(pick(0, 1, 2, 5, 9), pick(1, 3, 7), batch=pick(0, 1, 3), total=total, seed=seed)
        if pick(False, True) and a.shape[1] > 2 and b.shape[1] > 1:
            a, b = a.clone(), b.clone()
            a[:, 1], b[:, -1] = 0.0, 0.0
            a, b = a / a.sum(1, keepdim=True), b / b.sum(1, keepdim=True)
        if pick(False, True):
            cost = cost.mT.contiguous().mT
        if a.shape[1] == 0:
            tau = 0.5  # masses that nothing can carry cannot be kept
        options: dict[str, Any] = {"reg": pick(0.1, 0.5), "tau": tau, "prior": pick(False, True), "tolerance": 0.0}
        found = outcome(cost, a, b, backend="torch", iterations=800, **options)
        expected = outcome(cost, a, b, backend="reference", iterations=800, **options)
        assert all(x.isfinite().all() for x in (*found, *expected)), seed
        assert worst(found, expected) < 1e-10, (seed, worst(found, expected))
        low = sinkhorn(cost.float(), a.float(), b.float(), **{**options, "iterations": 600})
        assert worst([low.double()], found[:1]) < 1e-5, seed


def test_points_without_mass_are_as_if_they_were_not_there() -> None:
    cost, a, b = problem(6, 4)
    a[0, 4:] = 0.0
    a = a / a.sum(1, keepdim=True)
    for tau in (None, 0.5):
        plan = sinkhorn(cost, a, b, tau=tau, **TIGHT)
        assert plan[0, 4:].abs().max() == 0
        alone = sinkhorn(cost[0, :4], a[0, :4], b[0], tau=tau, **TIGHT)
        assert (plan[0, :4] - alone).abs().max() < 1e-13
        nothing = sinkhorn(cost, torch.zeros_like(a), b, tau=0.5)
        assert nothing.abs().max() == 0


def test_tiny_regularisation_neither_overflows_nor_vanishes() -> None:
    cost, a, b = problem(8, 8, seed=3)
    for dtype, factor, tolerance in ((torch.float64, 1000, 1e-6), (torch.float32, 100, 1e-4)):
        given = [x.to(dtype) for x in (factor * cost, a, b)]
        plan = sinkhorn(*given, reg=0.5, iterations=20_000)
        assert plan.isfinite().all()
        assert (plan.sum(2) - given[1]).abs().max() < tolerance


def test_gradcheck() -> None:
    cost, a, b = (x.requires_grad_() for x in problem(4, 3, batch=1, total=1.4))
    for prior in (True, False):
        assert torch.autograd.gradcheck(
            lambda *x, prior=prior: sinkhorn(*x, reg=0.3, tau=0.7, prior=prior, tolerance=0.0), (cost, a, b)
        )


def test_operator_rules() -> None:
    """Schema, fake tensors and autograd registration, as torch.compile and torch.export rely on them."""
    given = tuple(x.float().requires_grad_() for x in problem(4, 3))
    torch.library.opcheck(implicit._op._opoverload, (*given, 0.2, 0.5, True, 50, 1e-6))
    compiled = torch.compile(lambda *x: sinkhorn(*x, tau=0.5), backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(*given), sinkhorn(*given, tau=0.5))
    (gradient,) = torch.autograd.grad(sinkhorn(*given, tau=0.5).square().sum(), given[0], create_graph=True)
    with pytest.raises(RuntimeError, match="backend='reference'"):
        gradient.sum().backward()


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"cost": torch.rand(4)}, "cost must be"),
        ({"reg": 0.0}, "reg must be"),
        ({"tau": float("nan")}, "tau must be"),
        ({"iterations": 0}, "iterations must be"),
        ({"source": torch.rand(5)}, r"source must be floating point of shape \(4,\)"),
        ({"target": torch.ones(3, dtype=torch.int64)}, "target must be"),
    ],
)
def test_bad_input_is_one_sentence(change: dict[str, Any], says: str) -> None:
    given: dict[str, Any] = {"cost": torch.rand(4, 3), **change}
    with pytest.raises(ValueError, match=says) as caught:
        sinkhorn(given.pop("cost"), **given)
    assert "\n" not in str(caught.value)
