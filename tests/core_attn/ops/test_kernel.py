"""Kernelised attention against the matrix of products: chunks, recurrence, steps; Agent attention against its maps."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from core_attn import ops
from core_attn.dispatch import BackendError
from core_attn.ops.agent import agent_map
from core_attn.ops.kernel import kernel_map
from core_attn.ops.kernel.chunked import _backward_op, _op
from core_attn.testing import growth

LENGTHS = (0, 1, 2, 3, 13, 63, 64, 65, 97, 128, 130)


def _dense(q: Tensor, k: Tensor, v: Tensor, causal: bool, normalize: bool, eps: float, real: Tensor | None) -> Tensor:
    """The definition, a query and a key at a time."""
    out = torch.zeros(*q.shape[:3], v.shape[3], dtype=q.dtype)
    for b in range(q.shape[0]):
        for h in range(q.shape[1]):
            for i in range(q.shape[2]):
                numerator, denominator = torch.zeros(v.shape[3], dtype=q.dtype), q.new_zeros(())
                for j in range(k.shape[2]):
                    if (not causal or j <= i + k.shape[2] - q.shape[2]) and (real is None or real[b, j]):
                        weight = q[b, h, i] @ k[b, h, j]
                        numerator, denominator = numerator + weight * v[b, h, j], denominator + weight
                out[b, h, i] = numerator / (denominator + eps) if normalize else numerator
    return out


@pytest.mark.parametrize("backend", ["torch", "recurrent", "reference"])
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize(("causal", "keys"), [(False, 7), (True, 7), (False, 9), (True, 9), (True, 4)])
def test_definition(backend: str, normalize: bool, causal: bool, keys: int) -> None:
    torch.manual_seed(0)
    q, k = torch.rand(2, 2, 7, 3, dtype=torch.float64), torch.rand(2, 2, keys, 3, dtype=torch.float64)
    v = torch.randn(2, 2, keys, 5, dtype=torch.float64)
    real = torch.rand(2, keys) < 0.7
    options: dict[str, Any] = {"causal": causal, "normalize": normalize, "eps": 1e-9}
    if backend == "recurrent" and (not causal or keys != 7):
        with pytest.raises(BackendError):
            ops.kernel_attention(q, k, v, **options, backend=backend)
        return
    for mask in (None, real):
        got = ops.kernel_attention(q, k, v, **options, key_padding_mask=mask, backend=backend)
        assert _difference(got, _dense(q, k, v, causal, normalize, 1e-9, mask)) < 1e-12
        if backend == "reference":
            assert _difference(kernel_map(q, k, **options, key_padding_mask=mask) @ v, got) < 1e-14


def _draw(rng: random.Random) -> tuple[list[Tensor], dict[str, Any]]:
    batch, heads = rng.choice([1, 2, 3]), rng.choice([1, 2])
    length, causal, normalize = rng.choice(LENGTHS), rng.random() < 0.7, rng.random() < 0.6
    keys = length if rng.random() < 0.6 else rng.choice(LENGTHS)
    features, width = rng.choice([1, 3, 8, 20]), rng.choice([1, 4, 7, 24])
    dtype = rng.choice([torch.float64, torch.float64, torch.float32, torch.bfloat16])

    def make(n: int, d: int, signed: bool) -> Tensor:
        x = torch.randn(batch, n, heads, d, dtype=torch.float64).transpose(1, 2)
        x = x if rng.random() < 0.5 else x.contiguous()
        # Far from 0: a query whose features are all tiny has a derivative without bound.
        x = x if signed else F.softplus(x * rng.choice([0.3, 1.0, 5.0])) + 0.1
        return x.to(dtype)

    tensors = [make(length, features, not normalize), make(keys, features, not normalize), make(keys, width, True)]
    options: dict[str, Any] = {"causal": causal, "normalize": normalize}
    if rng.random() < 0.4:
        mask = torch.rand(batch, keys) < rng.choice([0.0, 0.5, 0.9])
        options["key_padding_mask"] = mask
        tensors[1] = torch.where(mask[:, None, :, None], tensors[1], rng.choice([float("nan"), 1e6]))
        tensors[2] = torch.where(mask[:, None, :, None], tensors[2], float("nan"))
    if rng.random() < 0.3:
        options["initial_state"] = torch.rand(batch, heads, features, width + normalize, dtype=torch.float64)
    return tensors, options


def test_200_random_draws_against_the_reference() -> None:
    rng = random.Random(0)
    torch.manual_seed(0)
    backends = {"torch": 0, "recurrent": 0}
    for _ in range(200):
        tensors, options = _draw(rng)
        dtype = tensors[0].dtype
        recurrent = options["causal"] and tensors[0].shape[2] == tensors[1].shape[2] <= 13
        backend = "recurrent" if recurrent and rng.random() < 0.5 else "torch"
        backends[backend] += 1
        right = _with_gradients([x.double() for x in tensors], options, "reference")
        got = _with_gradients(tensors, options, backend)
        allowed = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2}[dtype]
        for a, b in zip(got, right, strict=True):
            assert a.isfinite().all()
            assert _difference(a, b) <= allowed * max(1.0, b.abs().max().item() if b.numel() else 1.0)
        assert got[0].dtype == dtype
        assert got[1].dtype == (torch.float64 if dtype is torch.float64 else torch.float32)
    assert min(backends.values()) > 20


def _with_gradients(tensors: list[Tensor], options: dict[str, Any], backend: str) -> list[Tensor]:
    leaves = [x.detach().clone().requires_grad_() for x in tensors]
    options = dict(options)
    if "initial_state" in options:
        options["initial_state"] = options["initial_state"].clone().requires_grad_()
        leaves.append(options["initial_state"])
    q, k, v = leaves[:3]
    out, state = ops.kernel_attention(q, k, v, **options, return_state=True, backend=backend)
    weights = [torch.cos(torch.arange(x.numel(), dtype=torch.float64)).view_as(x) for x in (out, state)]
    loss = (out * weights[0]).sum() + 0.01 * (state * weights[1]).sum()
    # The loop over no tokens at all reads no queries.
    gradients = torch.autograd.grad(loss, leaves, allow_unused=q.shape[2] == 0)
    return [out.detach(), state.detach(), *(torch.zeros_like(x) if g is None else g for x, g in zip(leaves, gradients))]


def test_chunks_steps_and_recurrence_are_one() -> None:
    torch.manual_seed(0)
    for dtype, allowed in ((torch.float64, 1e-12), (torch.float32, 1e-5)):
        q, k = (torch.rand(2, 3, 150, 8, dtype=dtype) for _ in range(2))
        v = torch.randn(2, 3, 150, 6, dtype=dtype)
        for normalize in (True, False):
            whole = ops.kernel_attention(q, k, v, causal=True, normalize=normalize, return_state=True)
            loop = ops.kernel_attention(
                q, k, v, causal=True, normalize=normalize, return_state=True, backend="recurrent"
            )
            state, outs = torch.zeros(2, 3, 8, 6 + normalize), []
            for piece in zip(*(x.split([1, 1, 70, 2, 76], dim=2) for x in (q, k, v))):
                out, state = ops.kernel_step(*piece, state, normalize=normalize)
                outs.append(out)
            for got in (loop, (torch.cat(outs, dim=2), state)):
                for a, b in zip(got, whole):
                    assert _difference(a, b) <= allowed * max(1.0, b.abs().max().item())


def test_long_sequences_stay_exact_in_float32() -> None:
    torch.manual_seed(0)
    q, k = (torch.rand(1, 1, 65536, 4) for _ in range(2))
    v = torch.randn(1, 1, 65536, 4)
    leaves = [x.requires_grad_() for x in (q, k, v)]
    out = ops.kernel_attention(*leaves, causal=True)
    gradients = torch.autograd.grad(out.square().sum(), leaves)
    exact = [x.detach().double().requires_grad_() for x in leaves]
    right = ops.kernel_attention(*exact, causal=True)
    assert _difference(out, right) < 1e-5
    for a, b in zip(gradients, torch.autograd.grad(right.square().sum(), exact)):
        assert _difference(a, b) <= 1e-5 * max(1.0, b.abs().max().item())


def test_memory_of_training_is_linear() -> None:
    peaks = []
    for length in (1024, 2048, 4096):
        q, k, v = (torch.rand(1, 2, length, 8, requires_grad=True) for _ in range(3))

        def train(q: Tensor = q, k: Tensor = k, v: Tensor = v) -> None:
            out = ops.kernel_attention(q, k, v, causal=True)
            out.sum().backward()  # type: ignore[union-attr]

        peaks.append(growth.count(train).peak_bytes)
    assert growth.exponent(peaks) < 1.05


@pytest.mark.parametrize("length", [5, 130])
def test_operators_under_compile(length: int) -> None:
    torch.manual_seed(0)
    q, k = (torch.rand(2, length, 3, requires_grad=True) for _ in range(2))
    v, initial = torch.randn(2, length, 4, requires_grad=True), torch.randn(2, 3, 4, requires_grad=True)
    torch.library.opcheck(_op, (q, k, v, initial))
    given = (torch.randn(2, length, 4), torch.randn(2, 3, 4), q.detach(), k.detach(), v.detach(), initial.detach())
    torch.library.opcheck(_backward_op, given, test_utils=("test_schema", "test_faketensor"))
    (g,) = torch.autograd.grad(_op(q, k, v, initial)[0].square().sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="second derivative"):
        g.sum().backward()


def test_autocast_and_defaults() -> None:
    q, k, v = (torch.rand(1, 2, 20, 4) for _ in range(3))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = ops.kernel_attention(q, k, v, causal=True)
    assert got.dtype is torch.bfloat16
    assert _difference(got, ops.kernel_attention(q, k, v, causal=True)) < 2e-2


def test_bad_input_is_one_sentence() -> None:
    q, v = torch.rand(1, 2, 5, 4), torch.rand(1, 2, 5, 3)
    for call in (
        lambda: ops.kernel_attention(q[0], q, v),
        lambda: ops.kernel_attention(q, q[..., :3], v),
        lambda: ops.kernel_attention(q, q[:, :1], v[:, :1]),
        lambda: ops.kernel_attention(q, q, v.double()),
        lambda: ops.kernel_attention(q, q, v, initial_state=torch.zeros(1, 2, 4, 3)),
        lambda: ops.kernel_attention(q, q, v, key_padding_mask=torch.ones(1, 5)),
        lambda: ops.kernel_attention(q, q, v, backend="recurrent"),
        lambda: ops.kernel_attention(q, q, v, backend="none"),
        lambda: ops.agent_attention(q, q, v, agents=q[:, :, :0]),
        lambda: ops.agent_attention(q, q, v, agents=q[:, :1]),
    ):
        with pytest.raises(ValueError, match=r"^[^\n]{10,400}$"):
            call()


def test_agent_attention_200_random_draws() -> None:
    rng = random.Random(1)
    torch.manual_seed(1)
    for _ in range(200):
        batch, heads, n = rng.choice([1, 2]), rng.choice([1, 3]), rng.choice([1, 2, 9])
        length, keys, width = rng.choice(LENGTHS), rng.choice(LENGTHS[1:]), rng.choice([1, 5, 8])
        dtype = rng.choice([torch.float64, torch.float32, torch.bfloat16])
        tensors = [torch.randn(batch, heads, m, width).to(dtype) for m in (length, keys, keys, n)]
        options: dict[str, Any] = {}
        if rng.random() < 0.5:
            options = {"query_bias": torch.randn(heads, length, n), "key_bias": torch.randn(heads, n, keys)}
        if rng.random() < 0.5:
            mask = torch.rand(batch, keys) < rng.choice([0.0, 0.6])
            options["key_padding_mask"] = mask
            for i in (1, 2):
                tensors[i] = torch.where(mask[:, None, :, None], tensors[i], float("nan"))
        results = []
        for backend, of in (("torch", dtype), ("reference", torch.float64)):
            leaves = [x.detach().to(of).clone().requires_grad_() for x in tensors]
            q, k, v, agents = leaves
            out = ops.agent_attention(q, k, v, agents=agents, **options, backend=backend)
            weight = torch.cos(torch.arange(out.numel(), dtype=torch.float64)).view_as(out)
            results.append([out, *torch.autograd.grad((out * weight).sum(), leaves)])
        allowed = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2}[dtype]
        for a, b in zip(*results, strict=True):
            assert a.isfinite().all()
            assert _difference(a, b) <= allowed * max(1.0, b.abs().max().item() if b.numel() else 1.0)
        if "key_padding_mask" in options and not options["key_padding_mask"].any():
            assert not results[0][0].count_nonzero()


def test_agents_read_the_keys_and_queries_the_agents() -> None:
    torch.manual_seed(0)
    q, k, agents = (torch.randn(1, 1, n, 4, dtype=torch.float64) for n in (5, 7, 2))
    first = torch.stack([torch.softmax(a @ k[0, 0].mT / 2, -1) for a in agents[0, 0]])
    second = torch.stack([torch.softmax(x @ agents[0, 0].mT / 2, -1) for x in q[0, 0]])
    assert _difference(agent_map(q, k, agents, scale=0.5)[0, 0], second @ first) < 1e-14


def _difference(a: Tensor, b: Tensor) -> float:
    assert a.shape == b.shape
    return (a.detach().double() - b.detach().double()).abs().max().item() if a.numel() else 0.0
