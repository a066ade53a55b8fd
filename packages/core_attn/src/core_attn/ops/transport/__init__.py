"""Entropic optimal transport between two sets of weighted points, whose masses must or need not be kept.

Sinkhorn's iterations, "Sinkhorn Distances: Lightspeed Computation of Optimal Transport" (2013), and with relaxed masses
"Scaling Algorithms for Unbalanced Transport Problems" (2016), section 3; what "Multimodal Optimal Transport-based
Co-Attention Transformer with Global Structure Consistency for Survival Prediction" (S8) uses as a map from genes to
patches. Shapes: B batch, N points of the source, M points of the target.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from core_attn.dispatch import Backend, Operator
from core_attn.ops.transport import implicit, reference

OPERATOR = Operator("sinkhorn", [Backend("torch", implicit.run), Backend("reference", reference.run)])


def sinkhorn(
    cost: Tensor,
    source: Tensor | None = None,
    target: Tensor | None = None,
    *,
    reg: float = 0.1,
    tau: float | None = None,
    prior: bool = False,
    iterations: int = 1000,
    tolerance: float = 1e-9,
    backend: str = "auto",
) -> Tensor:
    """The plan P >= 0 that minimises Σ P C + reg · KL(P | R) + tau · (KL(P 1 | a) + KL(Pᵀ 1 | b)).

    With `tau` None the masses are kept: P 1 = a and Pᵀ 1 = b, of which a and b must have the same sum; then P does not
    depend on `prior`. Everything is computed with logarithms, so a small `reg` neither overflows nor underflows; in
    float64 for float64, else in float32.

    Args:
        cost: C, (B, N, M) or (N, M); finite.
        source: a, (B, N), or (N,) for a cost without batch; not negative; 1 / N each by default. A point of mass 0
            takes no part, so in a ragged batch the missing points have mass 0; its costs must be finite all the same.
        target: b, (B, M) or (M,); likewise.
        reg: weight of the entropy, positive.
        tau: weight of the masses' deviations, positive.
        prior: whether R = a bᵀ, as POT 0.9.7 has it where masses are relaxed; else R = 1, the bare entropy, as in
            MOTCat, which names POT 0.9.3.
        iterations: at most so many; each goes over source and target.
        tolerance: iterations end when no potential of the batch changes by more than this many `reg`, or than rounding
            does.
        backend: "auto", "torch" (gradients by the implicit function theorem: those of the limit, memory of a few plans)
            or "reference" (gradients through every iteration).

    Returns:
        P, the shape and dtype of `cost`; differentiable in cost, source and target.

    Raises:
        ValueError: shapes or dtypes that do not fit; an option out of its range.
        BackendError: the backend cannot run.
        UnknownNameError: no such backend.
    """
    if cost.dim() not in (2, 3) or not cost.is_floating_point():
        raise ValueError(
            f"cost must be floating point of shape (B, N, M) or (N, M), got {cost.dtype} of {tuple(cost.shape)}"
        )
    for name, value in (("reg", reg), *([("tau", tau)] if tau is not None else [])):
        if not (value > 0 and math.isfinite(value)):
            raise ValueError(f"{name} must be a positive number, got {value}")
    if iterations < 1 or not tolerance >= 0:
        raise ValueError(f"iterations must be positive and tolerance at least 0, got {iterations} and {tolerance}")
    batched = cost if cost.dim() == 3 else cost.unsqueeze(0)
    masses = []
    for name, mass, axis in (("source", source, 1), ("target", target, 2)):
        size = batched.shape[axis]
        if mass is None:
            masses.append(batched.new_full((batched.shape[0], size), 1.0 / max(size, 1)))
            continue
        wanted = (*cost.shape[:-2], size)
        if tuple(mass.shape) != wanted or not mass.is_floating_point():
            raise ValueError(
                f"{name} must be floating point of shape {wanted}, got {mass.dtype} of {tuple(mass.shape)}"
            )
        masses.append(mass.reshape(batched.shape[0], size))
    dtype = torch.promote_types(cost.dtype, torch.float32)
    with torch.autocast(cost.device.type, enabled=False):
        plan: Tensor = OPERATOR(
            batched.to(dtype),
            masses[0].to(dtype),
            masses[1].to(dtype),
            reg=reg,
            tau=tau,
            prior=prior,
            iterations=iterations,
            tolerance=tolerance,
            backend=backend,
        )
    return plan.to(cost.dtype).view(cost.shape)
