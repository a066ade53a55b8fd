"""Sinkhorn's iterations as they stand in the papers, in logarithms; gradients go through every one of them."""

from __future__ import annotations

import torch
from torch import Tensor

_INF = float("inf")


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
    kernel = log_kernel(cost, source, target, reg=reg, prior=prior)
    f, g = potentials(kernel, source, target, reg=reg, tau=tau, iterations=iterations, tolerance=tolerance)
    return plan_of(kernel, f, g)


def log_kernel(cost: Tensor, source: Tensor, target: Tensor, *, reg: float, prior: bool) -> Tensor:
    """log R - C / reg; -inf in rows and columns without mass."""
    present = (source > 0)[:, :, None] & (target > 0)[:, None, :]
    kernel = -cost / reg
    if prior:
        kernel = kernel + (present_logs(source)[:, :, None] + present_logs(target)[:, None, :])
    return kernel.masked_fill(~present, -_INF)


def present_logs(mass: Tensor) -> Tensor:
    """log of masses, 0 with zero gradient where there is none."""
    return mass.masked_fill(mass <= 0, 1.0).log()


def potentials(
    kernel: Tensor,
    source: Tensor,
    target: Tensor,
    *,
    reg: float,
    tau: float | None,
    iterations: int,
    tolerance: float,
) -> tuple[Tensor, Tensor]:
    """f (B, N) and g (B, M), both divided by reg; 0 where there is no mass."""
    f, g = torch.zeros_like(source), torch.zeros_like(target)
    for _ in range(iterations):
        before = f, g
        f, g = iterate(kernel, source, target, g, reg=reg, tau=tau)
        if settled((f, g), before, tolerance):
            break
    return f, g


def iterate(
    kernel: Tensor, source: Tensor, target: Tensor, g: Tensor, *, reg: float, tau: float | None
) -> tuple[Tensor, Tensor]:
    """One iteration: the best f for this g, then the best g for that f."""
    power = 1.0 if tau is None else tau / (tau + reg)
    f = power * (present_logs(source) - _log_sum(kernel + g[:, None, :], 2))
    f = f.masked_fill(source <= 0, 0.0)
    g = power * (present_logs(target) - _log_sum(kernel + f[:, :, None], 1))
    return f, g.masked_fill(target <= 0, 0.0)


def settled(now: tuple[Tensor, Tensor], then: tuple[Tensor, Tensor], tolerance: float) -> bool:
    """Whether no potential changed by more than the tolerance, or than a few roundings where those are larger."""
    for a, b in zip(now, then):
        if a.numel():
            a, b = a.detach(), b.detach()
            least = 8 * torch.finfo(a.dtype).eps * a.abs().amax().clamp(min=1.0)
            if not bool((a - b).abs().amax() <= least.clamp(min=tolerance)):
                return False
    return True


def _log_sum(x: Tensor, axis: int) -> Tensor:
    """logsumexp, 0 with zero gradient where all is -inf."""
    none = (x == -_INF).all(axis, keepdim=True)
    return torch.logsumexp(x.masked_fill(none, 0.0), axis).masked_fill(none.squeeze(axis), 0.0)


def plan_of(kernel: Tensor, f: Tensor, g: Tensor) -> Tensor:
    return torch.exp(kernel + f[:, :, None] + g[:, None, :])
