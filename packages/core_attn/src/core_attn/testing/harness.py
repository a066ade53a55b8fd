"""What the checks share: how they fail, how far numbers may differ, and how a mechanism is run and compared."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from core_attn.testing.subject import run

# Largest difference allowed, relative to the largest value of the right answer. float64 is tight: an error of method
# shows there. bfloat16 keeps 8 bits, of which a few roundings in a row cost two.
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5, torch.bfloat16: 3e-2}


class Broken(AssertionError):
    """The contract is broken; the message says how."""


class NotClaimed(Exception):
    """The mechanism does not promise what the check is about."""


def error_of(got: Tensor, right: Tensor, *, floor: float = 1e-6) -> float:
    """Largest difference, relative to the largest value of `right`; infinite where one is not finite.

    A largest value below `floor` counts as `floor`: such an answer is zero up to rounding, and a relative error would
    compare rounding errors.
    """
    if got.shape != right.shape:
        raise Broken(f"shapes differ: {shape_of(got)} and {shape_of(right)}")
    if got.numel() == 0:
        return 0.0
    got, right = got.detach().double(), right.detach().double()
    if not got.isfinite().all() or not right.isfinite().all():
        return float("inf")
    return ((got - right).abs().max() / right.abs().max().clamp(min=floor)).item()


def median_error_of(got: Tensor, right: Tensor) -> float:
    """The median over rows (..., C) of the largest difference, relative to the largest value of `right`.

    For what selects: rounding may swap two choices of nearly equal rank, which changes the rows that read them.
    """
    return ((got.double() - right).abs().amax(-1) / right.abs().max()).flatten().median().item()


def worst(got: Sequence[Tensor], right: Sequence[Tensor]) -> float:
    """The largest `error_of` of as many pairs, relative where the largest value of the right tensor is above 1."""
    return max((error_of(a, b, floor=1.0) for a, b in zip(got, right, strict=True)), default=0.0)


def with_grad(call: dict[str, Any]) -> dict[str, Any]:
    return {k: v.detach().clone().requires_grad_() if isinstance(v, Tensor) else v for k, v in call.items()}


def seeded(mixer: nn.Module, call: dict[str, Any], more: dict[str, Any]) -> Tensor:
    torch.manual_seed(3)
    return run(mixer, call, **more)  # type: ignore[arg-type]


def with_gradients(
    mixer: nn.Module, call: dict[str, Any], more: dict[str, Any], *, autocast: torch.dtype | None = None
) -> list[Tensor]:
    """Output, forward under `autocast`, then the gradients of a fixed scalar of it for inputs and parameters."""
    with torch.autocast("cpu", autocast, enabled=autocast is not None):
        out = seeded(mixer, call, more)
    leaves = [call[k] for k in tensor_names(call)] + [*mixer.parameters()]
    weight = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)
    gradients = torch.autograd.grad((out * weight).sum(), leaves, allow_unused=True)
    return [out.detach(), *[torch.zeros_like(p) if g is None else g for p, g in zip(leaves, gradients)]]


def pairs(got: Sequence[Tensor], right: Sequence[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
    """(output, output), then all gradients as one pair, so that a tiny gradient is measured beside its siblings."""
    yield got[0], right[0]
    if len(got) > 1:
        yield torch.cat([t.flatten() for t in got[1:]]), torch.cat([t.flatten() for t in right[1:]])


def tensor_names(call: dict[str, Any]) -> list[str]:
    return [k for k, v in call.items() if isinstance(v, Tensor)]


def keys_of(call: dict[str, Any]) -> Tensor:
    keys: Tensor = call.get("context", call["x"])
    return keys


def padding_masks(keys: Tensor) -> Tensor:
    """One sample padded at the end, one with holes and padding at the start, the rest whole; never all padding."""
    mask = torch.ones(keys.shape[:2], dtype=torch.bool)
    length = keys.shape[1]
    if length > 1:
        mask[0, length - length // 3 - 1 :] = False
        mask[1, : length // 4] = False
        mask[1, length // 2] = False
        mask[1, -1] = True
    return mask


def dense(t: Tensor) -> Tensor:
    return t.clone(memory_format=torch.contiguous_format)


def layouts() -> dict[str, Callable[[Tensor], Tensor]]:
    """Ways to lay out a (B, L, C) tensor otherwise than in one block of memory."""
    return {
        "transposed": lambda t: t.transpose(0, 1).contiguous().transpose(0, 1),
        "channels first": lambda t: t.transpose(1, 2).contiguous().transpose(1, 2),
        "every second channel": lambda t: torch.stack([t, t + 1], dim=-1).flatten(-2)[..., ::2],
        "expanded": lambda t: t[:1].expand(t.shape),
    }


def state_bytes(state: Any) -> int:
    """Bytes of all tensors that a decoding state holds."""
    seen: set[int] = set()

    def walk(value: Any) -> int:
        if id(value) in seen:
            return 0
        seen.add(id(value))
        if isinstance(value, Tensor):
            return value.numel() * value.element_size()
        if isinstance(value, dict):
            return sum(map(walk, value.values()))
        if isinstance(value, list | tuple | set):
            return sum(map(walk, value))
        slots = [getattr(value, n) for n in getattr(type(value), "__slots__", ()) if hasattr(value, n)]
        return sum(map(walk, [*getattr(value, "__dict__", {}).values(), *slots]))

    return walk(state)


def shape_of(t: Tensor) -> str:
    return str(tuple(t.shape))


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
