"""Block-sparse attention by Triton against the definition in float64: outputs and gradients."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from core_attn.dispatch import BackendError
from core_attn.ops import block_sparse_attention

pytestmark = pytest.mark.gpu

CASES: dict[str, dict[str, Any]] = {
    "whole blocks": {"queries": 32, "keys": 48},
    "one for all heads": {"queries": 37, "keys": 37, "tables": ()},
    "one each head and item": {"queries": 37, "keys": 53, "tables": (2, 4), "batch": 2},
    "one each item": {"queries": 20, "keys": 33, "tables": (2, 1), "batch": 2},
    "causal": {"queries": 45, "keys": 45, "causal": True},
    "causal, fewer keys": {"queries": 41, "keys": 19, "causal": True},
    "causal, more keys, padding": {"queries": 19, "keys": 41, "causal": True, "padding": True, "batch": 2},
    "several tiles a block": {"queries": 70, "keys": 50, "size": (32, 48), "padding": True},
    "more than 16 blocks": {"queries": 16, "keys": 300, "heads": 2},
    "one query": {"queries": 1, "keys": 17},
}


def problem(
    device: str,
    dtype: torch.dtype,
    *,
    queries: int,
    keys: int,
    tables: tuple[int, ...] = (4,),
    batch: int = 1,
    heads: int = 4,
    groups: int = 2,
    size: tuple[int, int] = (16, 16),
    causal: bool = False,
    padding: bool = False,
    density: float = 0.6,
) -> tuple[list[Tensor], dict[str, Any]]:
    torch.manual_seed(0)
    tables = tuple(min(n, heads) for n in tables)
    blocks = torch.rand(*tables, -(-queries // size[0]), -(-keys // size[1])) < density
    shapes = (batch, heads, queries, 5), (batch, groups, keys, 5), (batch, groups, keys, 19)
    return [torch.randn(s, dtype=torch.float64).to(device, dtype) for s in shapes], {
        "blocks": blocks.to(device),
        "block_size": size,
        "causal": causal,
        "key_padding_mask": (torch.rand(batch, keys) < 0.7).to(device) if padding else None,
    }


def outcome(backend: str, leaves: list[Tensor], options: dict[str, Any]) -> list[Tensor]:
    leaves = [x.detach().requires_grad_() for x in leaves]
    out = block_sparse_attention(*leaves, backend=backend, **options)
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
    assert (
        max(errors(*problem(device, dtype, queries=35, keys=50, causal=True, padding=True)))
        < 2 * torch.finfo(dtype).eps
    )


def test_queries_without_keys_give_zeros(device: str) -> None:
    """For want of a block, of a real key, or of a past; NaN in what may not be read does not matter."""
    leaves, options = problem(device, torch.float32, queries=48, keys=40, causal=True, density=1.0)
    options["blocks"][:, 1] = False
    options["key_padding_mask"] = torch.arange(40, device=device)[None] >= 3
    for x in leaves[1:]:
        x[~options["key_padding_mask"][:, None].expand(x.shape[:3])] = float("nan")
    out, *gradients = outcome("triton", leaves, options)
    expected, *_ = outcome("reference", [x.double() for x in leaves], options)
    empty = torch.zeros(48, dtype=torch.bool, device=device)
    empty[:11] = empty[16:32] = True
    assert (out[:, :, empty] == 0).all()
    assert (gradients[0][:, :, empty] == 0).all()
    assert (out[:, :, ~empty] != 0).any(-1).all()
    assert torch.allclose(out.double(), expected, atol=1e-5)
    assert all(g.isfinite().all() for g in gradients)


def test_strides(device: str) -> None:
    """Heads beside channels, as a projection leaves them, an axis of channels and blocks that are not contiguous."""
    torch.manual_seed(0)
    q = torch.randn(2, 20, 4, 6, device=device).transpose(1, 2)
    k = torch.randn(2, 2, 6, 40, device=device).mT
    v = torch.randn(2, 40, 2, 12, device=device)[..., ::2].transpose(1, 2)
    blocks = (torch.rand(3, 2, 4, device=device) < 0.7).permute(2, 1, 0)
    assert max(errors([q, k, v], {"blocks": blocks, "block_size": 16})) < 1e-5


def test_what_it_cannot_do_it_says(device: str) -> None:
    x = torch.randn(1, 1, 24, 4, device=device)
    blocks = torch.ones(2, 2, dtype=torch.bool, device=device)
    with pytest.raises(BackendError, match="multiples of 16, got 12 and 12"):
        block_sparse_attention(x, x, x, blocks=blocks, block_size=12, backend="triton")


def test_the_operator_keeps_the_rules_of_torch_library(device: str) -> None:
    from core_attn.ops.block_sparse import triton

    leaves, options = problem(device, torch.float32, queries=20, keys=20, padding=True)
    leaves = [x.requires_grad_() for x in leaves]
    torch.library.opcheck(
        triton._op, (*leaves, options["blocks"][None], options["key_padding_mask"], 16, 16, True, 0.5)
    )
