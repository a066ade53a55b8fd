"""Neighbourhood attention by Triton against the definition in float64: outputs and gradients."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from core_attn.dispatch import BackendError
from core_attn.ops import neighborhood_attention

pytestmark = pytest.mark.gpu

CASES: dict[str, dict[str, Any]] = {
    "plane": {"grid": (5, 9), "kernel_size": 3},
    "even windows, stride": {"grid": (6, 7), "kernel_size": (4, 2), "stride": (3, 2)},
    "dilated by axis": {"grid": (7, 5), "kernel_size": (3, 1), "dilation": (2, 3), "stride": (2, 1)},
    "one causal axis": {"grid": (11, 3), "kernel_size": (4, 3), "causal": (True, False), "stride": (3, 1)},
    "window as large as the grid": {"grid": (5, 4), "kernel_size": (5, 4)},
    "blocked": {"grid": (4, 10), "kernel_size": (2, 5), "stride": (2, 5)},
    "bias": {"grid": (5, 7), "kernel_size": (3, 5), "rpb": True, "dilation": (1, 1)},
    "line": {"grid": (53,), "kernel_size": 6},
    "causal line, all options": {
        "grid": (47,), "kernel_size": 5, "stride": 4, "dilation": 3, "causal": True, "rpb": True,
    },
    "one token": {"grid": (1,), "kernel_size": 1},
}  # fmt: skip


def problem(
    device: str, dtype: torch.dtype, *, rpb: bool = False, heads: int = 2, groups: int = 1, channels: int = 5,
    value: int = 19, **options: Any,
) -> tuple[list[Tensor], dict[str, Any]]:  # fmt: skip
    torch.manual_seed(0)
    tokens, rank = math.prod(options["grid"]), len(options["grid"])
    size = options["kernel_size"]
    sizes = (size,) * rank if isinstance(size, int) else size
    shapes = [(1, heads, tokens, channels), (1, groups, tokens, channels), (1, groups, tokens, value)]
    if rpb:
        shapes.append((heads, *(2 * n - 1 for n in sizes)))
    return [torch.randn(s, dtype=torch.float64).to(device, dtype) for s in shapes], options


def outcome(backend: str, leaves: list[Tensor], options: dict[str, Any]) -> list[Tensor]:
    leaves = [x.detach().requires_grad_() for x in leaves]
    out = neighborhood_attention(*leaves[:3], rpb=leaves[3] if leaves[3:] else None, backend=backend, **options)
    probe = torch.sin(torch.arange(out.numel(), dtype=torch.float64)).view(out.shape).to(out)
    return [out.detach(), *torch.autograd.grad(out, leaves, probe)]


def errors(leaves: list[Tensor], options: dict[str, Any]) -> list[float]:
    """Of the output and each gradient, relative to its largest element where that is above 1."""
    found = outcome("triton", leaves, options)
    expected = outcome("reference", [x.double() for x in leaves], options)
    assert [x.shape for x in found] == [x.shape for x in expected]
    return [((a - b).abs().max() / b.abs().max().clamp(min=1)).item() for a, b in zip(found, expected)]


@pytest.mark.parametrize("name", CASES)
def test_float32_equals_the_definition(name: str, device: str) -> None:
    assert max(errors(*problem(device, torch.float32, **CASES[name]))) < 1e-5


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision(dtype: torch.dtype, device: str) -> None:
    """Both round their weights to the dtype once, so that an error is a few of its roundings."""
    leaves, options = problem(device, dtype, grid=(5, 6), kernel_size=3, rpb=True, channels=16, value=8)
    assert max(errors(leaves, options)) < 2 * torch.finfo(dtype).eps


def test_strides_and_a_batch(device: str) -> None:
    """Heads beside channels, as a projection leaves them, and an axis of channels that is not contiguous."""
    torch.manual_seed(0)
    q = torch.randn(2, 20, 4, 6, device=device).transpose(1, 2)
    k = torch.randn(2, 2, 6, 20, device=device).mT
    v = torch.randn(2, 20, 2, 12, device=device)[..., ::2].transpose(1, 2)
    assert max(errors([q, k, v], {"grid": (4, 5), "kernel_size": (3, 2)})) < 1e-5


def test_a_bias_may_forbid_offsets(device: str) -> None:
    """Where -inf forbids every key of a query, zeros and zero gradients."""
    leaves, options = problem(device, torch.float32, grid=(9,), kernel_size=3, rpb=True)
    leaves[3].fill_(-math.inf)
    leaves[3][..., 1] = 0.5  # only the key just before the query, which the first query has not
    found = outcome("triton", leaves, options)
    expected = outcome("reference", [x.double() for x in leaves], options)
    assert (found[0][:, :, 0] == 0).all()
    assert (found[1][:, :, 0] == 0).all()
    for a, b in zip(found, expected):
        assert torch.allclose(a.double(), b, atol=1e-5)


def test_what_it_cannot_do_it_says(device: str) -> None:
    cube = torch.randn(1, 1, 27, 4, device=device)
    with pytest.raises(BackendError, match="one or two axes"):
        neighborhood_attention(cube, cube, cube, grid=(3, 3, 3), kernel_size=3, backend="triton")
    with pytest.raises(BackendError, match="no extra keys"):
        neighborhood_attention(
            cube, cube, cube, grid=(27,), kernel_size=3, extra_k=cube, extra_v=cube, backend="triton"
        )
    wide = cube.double()
    with pytest.raises(BackendError, match="float16, bfloat16 or float32"):
        neighborhood_attention(wide, wide, wide, grid=(27,), kernel_size=3, backend="triton")


@pytest.mark.parametrize("rpb", [False, True])
def test_the_operator_keeps_the_rules_of_torch_library(rpb: bool, device: str) -> None:
    from core_attn.ops.neighborhood import triton

    leaves, _ = problem(device, torch.float32, grid=(3, 4), kernel_size=(3, 2), rpb=rpb)
    leaves = [x.requires_grad_() for x in leaves]
    options = ([3, 4], [3, 2], [1, 1], [1, 1], [False, True], 0.5)
    torch.library.opcheck(triton._op, (*leaves[:3], leaves[3] if rpb else None, *options))
