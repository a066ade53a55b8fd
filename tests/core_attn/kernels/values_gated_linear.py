"""Gated linear attention by Triton against the definition in float64: outputs, states and gradients."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from core_attn import kernels
from core_attn.ops import gated_linear_attention
from core_attn.ops.gated_linear import triton as gated_linear_triton

pytestmark = pytest.mark.gpu

# In the interpreter chunks have 32 tokens and tiles 16 channels, so that these meet every kind of border.
CASES: dict[str, dict[str, Any]] = {
    "one token": {"length": 1},
    "a sub-chunk": {"length": 16, "batch": 2},
    "a whole chunk": {"length": 32, "kind": "strong"},
    "several chunks, heads, tiles": {"length": 45, "heads": 2, "width": 20, "initial": True},
    "strong gates": {"length": 70, "kind": "strong", "initial": True},
    "gates of all sizes": {"length": 40, "kind": "all"},
    "open gates": {"length": 40, "kind": "none", "initial": True},
    "packed": {"length": 57, "offsets": (0, 5, 5, 38, 39, 57), "initial": True},
    "packed, strong gates": {"length": 38, "offsets": (0, 33, 38), "kind": "strong", "heads": 2},
}


def gates(kind: str, *shape: int) -> Tensor:
    noise = torch.randn(*shape, dtype=torch.float64)
    if kind == "usual":
        return F.logsigmoid(noise) / 16
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
    width: int = 5,
    values: int = 19,
    initial: bool = False,
    offsets: tuple[int, ...] | None = None,
    gate_dtype: torch.dtype = torch.float32,
) -> tuple[list[Tensor], dict[str, Any]]:
    torch.manual_seed(0)
    q, k = (torch.randn(batch, heads, length, width, dtype=torch.float64).to(device, dtype) for _ in range(2))
    v = torch.randn(batch, heads, length, values, dtype=torch.float64).to(device, dtype)
    leaves = [q, k, v, gates(kind, *q.shape).to(device, gate_dtype)]
    if initial:
        leaves.append(torch.randn(len(offsets) - 1 if offsets else batch, heads, width, values, device=device))
    cu_seqlens = torch.tensor(offsets, dtype=torch.int32, device=device) if offsets else None
    return leaves, {"cu_seqlens": cu_seqlens}


def attention(backend: str, leaves: list[Tensor], options: dict[str, Any]) -> tuple[Tensor, Tensor]:
    q, k, v, g, *state = leaves
    out, final = gated_linear_attention(
        q, k, v, log_gate=g, initial_state=state[0] if state else None, return_state=True, backend=backend, **options
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


@pytest.mark.parametrize("kind", ["usual", "strong"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision(dtype: torch.dtype, kind: str, device: str) -> None:
    """Queries, keys and weights are rounded to the dtype once for each product: a few of its roundings."""
    case = problem(device, dtype, length=45, kind=kind, initial=True)
    assert max(errors(*case)) < 2 * torch.finfo(dtype).eps


def test_gates_may_be_of_the_same_dtype(device: str) -> None:
    leaves, options = problem(device, torch.bfloat16, length=20, gate_dtype=torch.bfloat16)
    assert [x.dtype for x in outcome("triton", leaves, options)[2:]] == [torch.bfloat16] * 4
    assert max(errors(leaves, options)) < 2 * torch.finfo(torch.bfloat16).eps


def test_states_beyond_the_range_of_float16(device: str) -> None:
    """The sum of all keys and values is 122,880; what is read of it, and of its gradient, fits."""
    ones = torch.ones(1, 1, 30, 1, device=device, dtype=torch.float16)
    q, k, v = ones / 64, ones * 64, ones * 64
    out, final = gated_linear_attention(
        *(torch.cat([x] * 2, dim=2) for x in (q, k, v)),
        log_gate=torch.zeros(1, 1, 60, 1, device=device),
        scale=1 / 64,
        return_state=True,
        backend="triton",
    )
    assert final.item() == 60 * 64 * 64
    assert torch.allclose(out.flatten().float(), torch.arange(1, 61, device=device).float(), rtol=1e-3)


def test_closed_gates_forget_everything(device: str) -> None:
    """A log-gate of minus infinity is a gate of 0, within a sub-chunk, between them and between chunks."""
    leaves, options = problem(device, torch.float32, length=50, initial=True)
    for place in (0, 7, 20, 32, 45):
        leaves[3][:, :, place] = -float("inf")
    found = outcome("triton", leaves, options)
    closed = [x.double() for x in leaves]
    closed[3] = closed[3].clamp(min=-1e4)
    for a, b in zip(found, outcome("reference", closed, options)):
        assert a.isfinite().all()
        assert torch.allclose(a.double(), b, atol=1e-5)
    assert not found[-1].any()


def test_strides(device: str) -> None:
    """Heads beside channels, as a projection leaves them, and an axis of channels that is not contiguous."""
    torch.manual_seed(0)
    q = torch.randn(1, 20, 2, 6, device=device).transpose(1, 2)
    k = torch.randn(1, 2, 6, 20, device=device).mT
    v = torch.randn(1, 20, 2, 12, device=device)[..., ::2].transpose(1, 2)
    g = -torch.rand(1, 20, 2, 6, device=device).transpose(1, 2)
    assert max(errors([q, k, v, g], {})) < 1e-5


def test_the_operator_keeps_the_rules_of_torch_library(device: str) -> None:
    from core_attn.ops.gated_linear import triton

    leaves, _ = problem(device, torch.float32, length=18, initial=True)
    torch.library.opcheck(triton._op._opoverload, (*[x.requires_grad_() for x in leaves], None, 18, 0.5))
    packed, options = problem(device, torch.float32, length=18, offsets=(0, 7, 18))
    torch.library.opcheck(
        triton._op._opoverload, (*[x.requires_grad_() for x in packed], None, options["cu_seqlens"], 11, 0.5)
    )
    q = leaves[0].detach().requires_grad_()
    out = triton.run(q, *leaves[1:3], log_gate=leaves[3], scale=1.0, initial_state=None)[0]
    (dq,) = torch.autograd.grad(out.sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        dq.sum().backward()


def test_compiled(device: str) -> None:
    """One graph; of packed sequences torch.compile breaks it where the host looks at their lengths."""
    for offsets in (None, (0, 7, 18)):
        case = problem(device, torch.float32, length=18, offsets=offsets, initial=True)
        compiled = torch.compile(attention, backend="aot_eager", fullgraph=offsets is None)
        for a, b in zip(outcome("triton", *case, compiled), outcome("triton", *case), strict=True):
            assert torch.equal(a, b)


def test_gradients_of_one_of_both(device: str) -> None:
    """Outputs or final states that nothing is made of have gradients of zero."""
    leaves, options = problem(device, torch.float32, length=18)
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
    case = problem(device, dtype, length=70, width=40, values=70, offsets=(0, 3, 70), initial=True)
    assert max(errors(*case)) < (1e-5 if dtype is torch.float32 else 2e-3)
