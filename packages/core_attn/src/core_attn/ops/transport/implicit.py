"""Entropic transport whose gradient is that of the limit, by the implicit function theorem.

At the optimum the potentials f and g solve F = (a e^(-f/τ) - P 1, b e^(-g/τ) - Pᵀ 1) = 0 (with a and b themselves where
masses are kept). For the gradient G of the plan, the adjoint (λ, μ) solves the symmetric system

    [diag(r (1 + reg/τ))  P                  ] [λ]   [(G ∘ P) 1 ]
    [Pᵀ                   diag(c (1 + reg/τ))] [μ] = [(G ∘ P)ᵀ 1],    r = P 1, c = Pᵀ 1

by its Schur complement on the smaller side, min(N, M)²; then dC = P ∘ (λ 1ᵀ + 1 μᵀ - G) / reg. Where masses are kept,
the system leaves (1, -1) free, which changes no λ_i + μ_j: it is pinned.

Iterations are products of exp(kernel + f + g) with vectors, "Stabilized Sparse Scaling Algorithms for Entropy
Regularized Transport Problems" (2019), section 3.1: where potentials have moved too far from those in the exponent, one
iteration in logarithms follows and the exponent is taken anew.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from core_attn.ops.transport import reference

# How far potentials, divided by reg, may move before the matrix is made anew: e^20 is far from any overflow.
_FAR = 20.0
_OPTIONS = (
    "Tensor cost, Tensor source, Tensor target, float reg, float? tau, bool prior, int iterations, float tolerance"
)


def run(
    cost: Tensor,
    source: Tensor,
    target: Tensor,
    *,
    reg: float,
    tau: float | None,
    prior: bool,
    iterations: int,
    tolerance: float,
) -> Tensor:
    """The plan; arguments as `core_attn.ops.sinkhorn` hands them on."""
    plan: Tensor = _op(cost, source, target, reg, tau, prior, iterations, tolerance)
    return plan


def _forward(
    cost: Tensor,
    source: Tensor,
    target: Tensor,
    reg: float,
    tau: float | None,
    prior: bool,
    iterations: int,
    tolerance: float,
) -> Tensor:
    kernel = reference.log_kernel(cost, source, target, reg=reg, prior=prior)
    f, g = _potentials(kernel, source, target, reg, tau, iterations, tolerance)
    return reference.plan_of(kernel, f, g)


def _potentials(
    kernel: Tensor,
    source: Tensor,
    target: Tensor,
    reg: float,
    tau: float | None,
    iterations: int,
    tolerance: float,
) -> tuple[Tensor, Tensor]:
    """`reference.potentials` by products of a matrix and vectors."""
    power = 1.0 if tau is None else tau / (tau + reg)
    logs = reference.present_logs(source), reference.present_logs(target)
    f, g = torch.zeros_like(source), torch.zeros_like(target)
    done, ended = 0, False
    while done < iterations and not ended:
        before = f, g
        f, g = reference.iterate(kernel, source, target, g, reg=reg, tau=tau)
        done, ended = done + 1, reference.settled((f, g), before, tolerance)
        start, matrix = (f, g), reference.plan_of(kernel, f, g)
        while done < iterations and not ended:
            new_f = power * (logs[0] - _product(matrix, g - start[1]).log() + start[0])
            new_f = new_f.masked_fill(source <= 0, 0.0)
            new_g = power * (logs[1] - _product(matrix.mT, new_f - start[0]).log() + start[1])
            new_g = new_g.masked_fill(target <= 0, 0.0)
            moved = max(_largest(new_f - start[0]), _largest(new_g - start[1]))
            if not moved <= _FAR:  # NaN included: a row of the matrix may have vanished
                break
            done, ended = done + 1, reference.settled((new_f, new_g), (f, g), tolerance)
            f, g = new_f, new_g
    return f, g


def _product(matrix: Tensor, logs: Tensor) -> Tensor:
    return torch.bmm(matrix, logs.exp().unsqueeze(-1)).squeeze(-1)


def _largest(x: Tensor) -> float:
    return float(x.abs().amax()) if x.numel() else 0.0


def _backward(
    dplan: Tensor, plan: Tensor, source: Tensor, target: Tensor, reg: float, tau: float | None, prior: bool
) -> tuple[Tensor, Tensor, Tensor]:
    weighted = dplan * plan
    factor = 1.0 if tau is None else 1.0 + reg / tau
    rows, columns = plan.sum(2), plan.sum(1)
    right = weighted.sum(2), weighted.sum(1)
    if plan.shape[1] >= plan.shape[2]:
        small, large = _solve(plan, rows * factor, columns * factor, *right, kept=tau is None)
        adjoint = large, small
    else:
        adjoint = _solve(plan.mT, columns * factor, rows * factor, *reversed(right), kept=tau is None)
    on_rows, on_columns = adjoint
    # dlog P of the cost and of the prior, times P.
    moved = weighted - plan * (on_rows[:, :, None] + on_columns[:, None, :])
    dcost = -moved / reg
    dsource, dtarget = (
        _mass(m, total, on) for m, total, on in ((source, rows, on_rows), (target, columns, on_columns))
    )
    if prior:
        dsource = dsource + _over(moved.sum(2), source)
        dtarget = dtarget + _over(moved.sum(1), target)
    return dcost, dsource, dtarget


def _solve(
    plan: Tensor, large: Tensor, small: Tensor, right_large: Tensor, right_small: Tensor, *, kept: bool
) -> tuple[Tensor, Tensor]:
    """Adjoints of the small side (B, M) and of the large one (B, N) of a plan (B, N, M)."""
    scaled = plan * _inverse(large)[:, :, None]
    # Points without mass are decoupled: 1 on the diagonal, 0 on the right.
    matrix = torch.diag_embed(torch.where(small > 0, small, 1.0)) - plan.mT @ scaled
    if kept:
        # Σ of the right sides agree, so any multiple of 1 1ᵀ over the points with mass only picks one solution.
        present = (small > 0).to(plan.dtype)
        matrix = matrix + small.mean(-1)[:, None, None] * present[:, :, None] * present[:, None, :]
    right = right_small - (scaled.mT @ right_large.unsqueeze(-1)).squeeze(-1)
    on_small = torch.linalg.solve(matrix, right)
    on_large = _inverse(large) * (right_large - (plan @ on_small.unsqueeze(-1)).squeeze(-1))
    return on_small, on_large


def _mass(mass: Tensor, total: Tensor, adjoint: Tensor) -> Tensor:
    """The gradient of a mass by the constraint: a e^(-f/τ) equals the plan's own mass at the optimum."""
    return _over(adjoint * total, mass)


def _over(x: Tensor, mass: Tensor) -> Tensor:
    return x * _inverse(mass)


def _inverse(x: Tensor) -> Tensor:
    return torch.where(x > 0, 1.0 / torch.where(x > 0, x, 1.0), 0.0)


_op = torch.library.custom_op("core_attn::sinkhorn", _forward, mutates_args=(), schema=f"({_OPTIONS}) -> Tensor")
_backward_op = torch.library.custom_op(
    "core_attn::sinkhorn_backward",
    _backward,
    mutates_args=(),
    schema="(Tensor dplan, Tensor plan, Tensor source, Tensor target, float reg, float? tau, bool prior)"
    " -> (Tensor, Tensor, Tensor)",
)


@_op.register_fake
def _(cost: Tensor, *rest: Any) -> Tensor:
    return cost.new_empty(cost.shape)


@_backward_op.register_fake
def _(dplan: Tensor, plan: Tensor, source: Tensor, target: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    return plan.new_empty(plan.shape), source.new_empty(source.shape), target.new_empty(target.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.numbers = inputs[3:6]
    ctx.save_for_backward(output, *inputs[1:3])


def _differentiate(ctx: Any, dplan: Tensor) -> tuple[Any, ...]:
    return (*_backward_op(dplan, *ctx.saved_tensors, *ctx.numbers), None, None, None, None, None)


def _no_second_derivative(ctx: Any, *grads: Tensor) -> None:
    raise RuntimeError("sinkhorn has no second derivative; use backend='reference' for gradients of gradients")


_op.register_autograd(_differentiate, setup_context=_save)
_backward_op.register_autograd(_no_second_derivative)
