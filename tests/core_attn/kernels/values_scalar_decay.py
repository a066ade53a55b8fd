"""Linear attention with scalar decay by Triton against the definition in float64: outputs, states and gradients."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from core_attn import kernels
from core_attn.ops import scalar_decay_attention
from core_attn.ops.gated_linear import triton as gated_linear_triton
from core_attn.ops.scalar_decay import triton as scalar_decay_triton

pytestmark = pytest.mark.gpu

# In the interpreter chunks have 32 tokens and tiles 16 channels, so that these meet every kind of border.
CASES: dict[str, dict[str, Any]] = {
    "one token": {"length": 1},
    "a whole chunk": {"length": 32, "kind": "strong", "batch": 2},
    "several chunks, heads, tiles": {"length": 45, "heads": 2, "width": 20, "values": 35, "initial": True},
    "shared queries and keys": {"length": 37, "heads": 4, "groups": 2, "width": 20},
    "fixed decays": {"length": 70, "kind": "fixed", "heads": 4, "groups": 2, "batch": 2, "initial": True},
    "fixed strong decays": {"length": 40, "kind": "fixed strong", "heads": 2},
    "strong decays": {"length": 70, "kind": "strong", "initial": True},
    "decays of all sizes": {"length": 40, "kind": "all", "batch": 2},
    "no decay": {"length": 40, "kind": "none", "initial": True},
    "packed": {"length": 75, "offsets": (0, 5, 5, 38, 39, 75), "initial": True},
    "packed, fixed decays": {"length": 49, "offsets": (0, 33, 49), "kind": "fixed", "heads": 2, "groups": 1},
}


def decays(kind: str, *shape: int) -> Tensor:
    noise = torch.randn(*shape, dtype=torch.float64)
    if kind == "usual":
        return F.logsigmoid(noise) / 16
    if kind == "fixed":
        return -noise[0, :, 0].sigmoid()
    if kind == "fixed strong":
        return -30 * noise[0, :, 0].sigmoid()
    if kind == "strong":
        return -30 * torch.rand(*shape, dtype=torch.float64)
    if kind == "none":
        return torch.zeros(shape, dtype=torch.float64)
    return -(noise * 3).exp().clamp(max=1000.0)


def problem(
    device: str,
    dtype: torch.dtype,
    *,
    length: int,
    kind: str = "usual",
    batch: int = 1,
    heads: int = 1,
    groups: int | None = None,
    width: int = 5,
    values: int = 19,
    initial: bool = False,
    offsets: tuple[int, ...] | None = None,
    decay_dtype: torch.dtype = torch.float32,
) -> tuple[list[Tensor], dict[str, Any]]:
    torch.manual_seed(0)
    shared = (batch, groups or heads, length, width)
    q, k = (torch.randn(shared, dtype=torch.float64).to(device, dtype) for _ in range(2))
    v = torch.randn(batch, heads, length, values, dtype=torch.float64).to(device, dtype)
    leaves = [q, k, v, decays(kind, *v.shape[:3]).to(device, decay_dtype)]
    if initial:
        leaves.append(torch.randn(len(offsets) - 1 if offsets else batch, heads, width, values, device=device))
    cu_seqlens = torch.tensor(offsets, dtype=torch.int32, device=device) if offsets else None
    return leaves, {"cu_seqlens": cu_seqlens}


def attention(backend: str, leaves: list[Tensor], options: dict[str, Any]) -> tuple[Tensor, Tensor]:
    q, k, v, g, *state = leaves
    out, final = scalar_decay_attention(
        q, k, v, log_decay=g, initial_state=state[0] if state else None, return_state=True, backend=backend, **options
    )
    return out, final


def probe(x: Tensor) -> Tensor:
    return torch.sin(torch.arange(x.numel(), dtype=torch.float64)).view(x.shape).to(x)


def outcome(
    backend: str, leaves: list[Tensor], options: dict[str, Any], run: Callable[..., tuple[Tensor, Tensor]] = attention
) -> list[Tensor]:
    leaves = [x.detach().requires_grad_() for x in leaves]
    out, final = run(backend, leaves, options)
    gradients = torch.autograd.grad([out, final], leaves, [probe(out), probe(final)])
    return [out.detach(), final.detach(), *gradients]


def errors(leaves: list[Tensor], options: dict[str, Any]) -> list[float]:
    """Of output, state and each gradient, relative to its largest element where that is above 1."""
    found = outcome("triton", leaves, options)
    expected = outcome("reference", [x.double() for x in leaves], options)
    assert [x.shape for x in found] == [x.shape for x in expected]
    assert all(x.isfinite().all() for x in found)
    assert found[1].dtype is torch.float32
    return [((a - b).abs().max() / b.abs().max().clamp(min=1)).item() for a, b in zip(found, expected)]


@pytest.mark.parametrize("name", CASES)
def test_float32_equals_the_definition(name: str, device: str) -> None:
    assert max(errors(*problem(device, torch.float32, **CASES[name]))) < 1e-5


@pytest.mark.parametrize("kind", ["usual", "strong", "fixed"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision(dtype: torch.dtype, kind: str, device: str) -> None:
    """Queries, keys and weights are rounded to the dtype once for each product: a few of its roundings."""
    case = problem(device, dtype, length=45, kind=kind, heads=2, groups=1, initial=True)
    assert max(errors(*case)) < 2 * torch.finfo(dtype).eps


def test_decays_may_be_of_the_same_dtype(device: str) -> None:
    leaves, options = problem(device, torch.bfloat16, length=20, decay_dtype=torch.bfloat16)
    assert [x.dtype for x in outcome("triton", leaves, options)[2:]] == [torch.bfloat16] * 4
    assert max(errors(leaves, options)) < 2 * torch.finfo(torch.bfloat16).eps


def test_states_beyond_the_range_of_float16(device: str) -> None:
    """The sum of all keys and values is 245,760; what is read of it fits."""
    ones = torch.ones(1, 1, 60, 1, device=device, dtype=torch.float16)
    out, final = scalar_decay_attention(
        ones / 64,
        ones * 64,
        ones * 64,
        log_decay=torch.zeros(1, device=device),
        scale=1 / 64,
        return_state=True,
        backend="triton",
    )
    assert final.item() == 60 * 64 * 64
    assert torch.allclose(out.flatten().float(), torch.arange(1, 61, device=device).float(), rtol=1e-3)


def test_decays_of_nothing_forget_everything(device: str) -> None:
    """A log-decay of minus infinity is a factor of 0."""
    leaves, options = problem(device, torch.float32, length=50, initial=True)
    for place in (0, 7, 32, 45):
        leaves[3][:, :, place] = -float("inf")
    closed = [x.double() for x in leaves]
    closed[3] = closed[3].clamp(min=-1e4)
    found = outcome("triton", leaves, options)
    for a, b in zip(found, outcome("reference", closed, options)):
        assert a.isfinite().all()
        assert torch.allclose(a.double(), b, atol=1e-5)
    assert not found[-1].any()


def test_gradients_of_the_decays_are_left_out_where_not_wanted(device: str) -> None:
    (q, k, v, g), _ = problem(device, torch.float32, length=20, kind="fixed", heads=2)
    expected = outcome("triton", [q, k, v, g], {})[2:5]
    leaves = [x.requires_grad_() for x in (q, k, v)]
    out, final = scalar_decay_attention(*leaves, log_decay=g, return_state=True, backend="triton")
    for a, b in zip(torch.autograd.grad([out, final], leaves, [probe(out), probe(final)]), expected):
        assert torch.equal(a, b)


def test_strides(device: str) -> None:
    """Heads beside channels, as a projection leaves them, and an axis of channels that is not contiguous."""
    torch.manual_seed(0)
    q = torch.randn(1, 20, 2, 6, device=device).transpose(1, 2)
    k = torch.randn(1, 2, 6, 20, device=device).mT
    v = torch.randn(1, 20, 2, 12, device=device)[..., ::2].transpose(1, 2)
    g = -torch.rand(1, 20, 2, device=device).transpose(1, 2)
    assert max(errors([q, k, v, g], {})) < 1e-5
    assert max(errors([q, k, v, -torch.rand(4, device=device)[::2]], {})) < 1e-5


@pytest.mark.parametrize("kind", ["usual", "fixed"])
def test_the_operator_keeps_the_rules_of_torch_library(kind: str, device: str) -> None:
    from core_attn.ops.scalar_decay import triton

    offsets = (0, 7, 18) if kind == "usual" else None
    leaves, options = problem(device, torch.float32, length=18, kind=kind, initial=True, offsets=offsets)
    tensors = [x.requires_grad_() for x in leaves]
    torch.library.opcheck(triton._op._opoverload, (*tensors, options["cu_seqlens"], 11 if offsets else 18, 0.5))
    q = leaves[0].detach().requires_grad_()
    out = triton.run(q, *leaves[1:3], log_decay=leaves[3], scale=1.0, initial_state=None)[0]
    (dq,) = torch.autograd.grad(out.sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        dq.sum().backward()


@pytest.mark.parametrize("kind", ["usual", "fixed"])
def test_compiled(kind: str, device: str) -> None:
    """One graph; of packed sequences torch.compile breaks it where the host looks at their lengths."""
    for offsets in (None, (0, 7, 18)):
        case = problem(device, torch.float32, length=18, kind=kind, heads=2, offsets=offsets, initial=True)
        compiled = torch.compile(attention, backend="aot_eager", fullgraph=offsets is None)
        for a, b in zip(outcome("triton", *case, compiled), outcome("triton", *case), strict=True):
            assert torch.equal(a, b)


def test_gradients_of_one_of_both(device: str) -> None:
    """Outputs or final states that nothing is made of have gradients of zero."""
    leaves, options = problem(device, torch.float32, length=40)
    leaves = [x.requires_grad_() for x in leaves]
    both = torch.autograd.grad(found := attention("triton", leaves, options), leaves, [probe(x) for x in found])
    alone = []
    for one in range(2):
        x = attention("triton", leaves, options)[one]
        alone.append(torch.autograd.grad(x, leaves, probe(x), allow_unused=True))
    for whole, of_out, of_final in zip(both, *alone, strict=True):
        assert torch.allclose(whole, of_out + of_final, atol=1e-5)


@pytest.mark.parametrize(("dtype", "which"), [(torch.float32, 0), (torch.float16, -1)], ids=str)
def test_block_sizes_of_a_card(dtype: torch.dtype, which: int, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of the interpreter are smaller."""
    real = kernels.launch

    def with_config(*args: Any, **options: Any) -> None:
        *others, configs = args
        real(*others, [configs[which]], **options)

    as_on_a_card = SimpleNamespace(**{**vars(kernels), "interpreted": lambda: False})
    monkeypatch.setattr(gated_linear_triton, "kernels", as_on_a_card)
    monkeypatch.setattr(gated_linear_triton, "launch", with_config)
    monkeypatch.setattr(scalar_decay_triton, "kernels", as_on_a_card)
    case = problem(device, dtype, length=70, width=40, values=70, offsets=(0, 3, 70), initial=True)
    assert max(errors(*case)) < (1e-5 if dtype is torch.float32 else 2e-3)
