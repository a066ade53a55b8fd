"""Packed sequences of the recurrent operators: each is computed as if it were alone."""

from __future__ import annotations

import functools
import random
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from core_attn import ops
from core_attn.dispatch import Request
from core_attn.ops.gated_linear import OPERATOR as GATED
from core_attn.ops.scalar_decay import OPERATOR as SCALAR

LENGTHS = [70, 1, 0, 64, 3]
FORMS = {"gated": ("gated_linear_attention", "log_gate"), "scalar": ("scalar_decay_attention", "log_decay")}
FORMS["fixed"] = FORMS["scalar"]


def problem(form: str, dtype: torch.dtype = torch.float64, initial: bool = True) -> list[Tensor]:
    """q, k, v, gates and initial states."""
    torch.manual_seed(0)
    total = sum(LENGTHS)
    q, k = (torch.randn(1, 2, total, 4, dtype=dtype) for _ in range(2))
    v = torch.randn(1, 2, total, 3, dtype=dtype)
    shape = {"gated": (1, 2, total, 4), "scalar": (1, 2, total), "fixed": (2,)}[form]
    leaves = [q, k, v, -3 * torch.rand(shape, dtype=dtype) ** 2]
    return leaves + [torch.randn(len(LENGTHS), 2, 4, 3, dtype=dtype)] * initial


def offsets(dtype: torch.dtype = torch.int32, lengths: Sequence[int] = LENGTHS) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).to(dtype)


def attention(form: str) -> tuple[Callable[..., Any], str]:
    name, gate = FORMS[form]
    return getattr(ops, name), gate


def packed(form: str, leaves: list[Tensor], **options: Any) -> tuple[Tensor, Tensor]:
    function, gate = attention(form)
    options = {"cu_seqlens": offsets(), **options}
    initial = leaves[4] if len(leaves) > 4 else None
    out, state = function(*leaves[:3], **{gate: leaves[3]}, initial_state=initial, return_state=True, **options)
    return out, state


def alone(form: str, leaves: list[Tensor], lengths: Sequence[int] = LENGTHS) -> tuple[Tensor, Tensor]:
    function, gate = attention(form)
    outs, states, start = [], [], 0
    for n, length in enumerate(lengths):
        q, k, v = (x[:, :, start : start + length] for x in leaves[:3])
        g = leaves[3] if leaves[3].dim() == 1 else leaves[3][:, :, start : start + length]
        initial = leaves[4][n : n + 1] if len(leaves) > 4 else None
        out, state = function(q, k, v, **{gate: g}, initial_state=initial, return_state=True, backend="reference")
        outs.append(out)
        states.append(state)
        start += length
    return torch.cat(outs, dim=2), torch.cat(states)


def with_gradients(run: Callable[..., tuple[Tensor, Tensor]], leaves: list[Tensor]) -> list[Tensor]:
    leaves = [x.detach().requires_grad_() for x in leaves]
    out, state = run(leaves)
    # The same numbers in every dtype; and every leaf is used, also where there are no tokens.
    probes = [torch.arange(x.numel()).double().cos().bfloat16().view(x.shape) for x in (out, state)]
    loss = sum((x.double() * probe).sum() for x, probe in zip((out, state), probes))
    return [out, state, *torch.autograd.grad(loss + sum(0.0 * x.double().sum() for x in leaves), leaves)]


@pytest.mark.parametrize("initial", [True, False])
@pytest.mark.parametrize("backend", ["torch", "recurrent", "reference"])
@pytest.mark.parametrize("form", FORMS)
def test_each_sequence_as_if_alone(form: str, backend: str, initial: bool) -> None:
    leaves = problem(form, initial=initial)
    found = with_gradients(lambda x: packed(form, x, backend=backend), leaves)
    expected = with_gradients(lambda x: alone(form, x), leaves)
    for a, b in zip(found, expected, strict=True):
        assert a.shape == b.shape
        assert (a - b).abs().max() < 1e-12
    assert found[1].shape == (len(LENGTHS), 2, 4, 3)


@pytest.mark.parametrize("form", FORMS)
def test_other_dtypes(form: str) -> None:
    """Offsets of int64; bfloat16 with states of float32."""
    leaves = [x.bfloat16() for x in problem(form)]
    out, state = packed(form, leaves, cu_seqlens=offsets(torch.int64))
    expected = alone(form, [x.double() for x in leaves])
    assert (out.dtype, state.dtype) == (torch.bfloat16, torch.float32)
    assert (out - expected[0]).abs().max() / expected[0].abs().max() < 5e-3
    assert torch.allclose(state.double(), expected[1], atol=1e-4)


@pytest.mark.parametrize("form", ["gated", "scalar"])
@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"cu_seqlens": torch.tensor([0, 5])}, "rise from 0 to the 138 packed rows"),
        ({"cu_seqlens": torch.tensor([0, 90, 40, 138])}, "never fall"),
        ({"cu_seqlens": torch.tensor([0.0, 138.0])}, "int32 or int64"),
        ({"cu_seqlens": torch.tensor([0, 138])}, r"initial_state must have shape \(N, H, D, Dv\) = \(1, 2, 4, 3\)"),
    ],
)
def test_errors(form: str, change: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        packed(form, problem(form), **change)


def test_packed_sequences_lie_in_one_batch_entry() -> None:
    x = torch.randn(2, 1, 4, 3)
    with pytest.raises(ValueError, match="one batch entry, got 2"):
        ops.gated_linear_attention(x, x, x, log_gate=-x.abs(), cu_seqlens=torch.tensor([0, 4]))


@pytest.mark.parametrize("operator", [GATED, SCALAR], ids=lambda o: o.name)
def test_triton_says_why_it_does_not_run(operator: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    triton = operator.backends[0]
    assert triton.name == "triton"

    def request(tokens: int, channels: int, **change: Any) -> Request:
        shape = (1, 2, tokens, channels)
        return Request(shape, shape, shape, **change)

    assert "needs a CUDA device" in triton.why_not(request(100, 64))
    assert "not float64" in triton.why_not(request(100, 64, dtype=torch.float64, device="cuda"))
    assert "from 1 to 256, got 300" in triton.why_not(request(100, 300, device="cuda"))
    assert "no empty tensors" in triton.why_not(request(0, 64, device="cuda"))
    assert operator.choose(request(100, 64, device="cuda")).name == "triton"
    # A step of decoding is a few small products.
    assert operator.choose(request(1, 64, device="cuda")).name == "recurrent"


def test_200_draws() -> None:
    """Sequences of random lengths, some empty, gates of any strength, any dtype, on every path of the CPU."""
    draw = random.Random(0)
    for turn in range(200):
        torch.manual_seed(turn)
        form = draw.choice([*FORMS])
        dtype = draw.choice([torch.float64, torch.float32, torch.bfloat16])
        lengths = [draw.choice([0, 1, 2, 5, 17, 64, 67]) for _ in range(draw.randint(1, 4))]
        heads, width, values, total = draw.choice([1, 3]), draw.choice([1, 4, 9]), draw.choice([1, 6]), sum(lengths)
        q, k = (torch.randn(1, heads, total, width, dtype=torch.float64) for _ in range(2))
        v = torch.randn(1, heads, total, values, dtype=torch.float64)
        shape = {"gated": q.shape, "scalar": v.shape[:3], "fixed": (heads,)}[form]
        strength = draw.choice([0.0, 0.01, 1.0, 30.0, 1000.0])
        leaves = [q, k, v, -strength * torch.rand(shape, dtype=torch.float64)]
        if draw.random() < 0.5:
            leaves.append(torch.randn(len(lengths), heads, width, values, dtype=torch.float64))
        leaves = [x.to(dtype) for x in leaves]
        if draw.random() < 0.4:  # strides of a projection split into heads
            leaves[:3] = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in leaves[:3]]
        expected = with_gradients(lambda x, f=form, n=lengths: alone(f, x, n), [x.double() for x in leaves])
        limit = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 5e-3}[dtype]
        for backend in ("torch", "recurrent", "reference", "auto"):
            run = functools.partial(packed, form, cu_seqlens=offsets(lengths=lengths), backend=backend)
            for a, b in zip(with_gradients(run, leaves), expected, strict=True):
                assert a.isfinite().all(), (turn, form, backend, dtype)
                error = (a.double() - b).abs().amax() / b.abs().amax().clamp(min=1.0) if b.numel() else torch.zeros(())
                assert error < limit, (turn, form, backend, dtype, strength)
