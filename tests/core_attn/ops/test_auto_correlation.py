"""Auto-Correlation: the fast form is its definition, with all gradients, at every kind of length."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from core_attn import ops
from core_attn.dispatch import BackendError
from core_attn.naming import UnknownNameError
from core_attn.ops.autocorrelation import fft
from core_attn.ops.autocorrelation.reference import auto_correlation_map, mean_correlation, number_of_delays
from core_attn.testing import growth

LENGTHS = [(1, 1), (2, 2), (3, 3), (24, 24), (97, 97), (17, 9), (13, 30), (257, 257), (300, 128)]


def _inputs(
    length: int, keys: int, batch: int = 3, heads: int = 2, width: int = 4, value_width: int = 5
) -> list[Tensor]:
    generator = torch.Generator().manual_seed(length + keys)
    sizes = ((length, width), (keys, width), (keys, value_width))
    return [
        torch.randn(batch, heads, n, d, generator=generator, dtype=torch.float64).requires_grad_() for n, d in sizes
    ]


def _off(a: Tensor, b: Tensor) -> float:
    return float((a - b).detach().abs().max())


@pytest.mark.parametrize("backend", ["torch", "gathers"])
@pytest.mark.parametrize("batch_delays", [False, True])
@pytest.mark.parametrize("factor", [0.5, 1.0, 3.0])
@pytest.mark.parametrize(("length", "keys"), LENGTHS)
def test_other_forms_are_the_definition(
    length: int, keys: int, factor: float, batch_delays: bool, backend: str
) -> None:
    qkv = _inputs(length, keys)
    fast, slow = (
        ops.auto_correlation(*qkv, factor=factor, batch_delays=batch_delays, backend=b) for b in (backend, "reference")
    )
    assert fast.shape == (3, 2, length, 5)
    assert _off(fast, slow) < 1e-11
    upstream = torch.randn_like(slow)
    for a, b in zip(torch.autograd.grad(fast, qkv, upstream), torch.autograd.grad(slow, qkv, upstream), strict=True):
        assert _off(a, b) < 1e-10


@pytest.mark.parametrize("length", [24, 97, 300])
def test_products_and_transforms_give_one_correlation(length: int, monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, _ = _inputs(length, length)
    right = mean_correlation(q, k)
    merged = [x.transpose(1, 2).flatten(2) for x in (q, k)]
    for limit in (0, 10_000):
        monkeypatch.setattr(fft, "_GRAM_LENGTH", limit)
        for elements in (1, 1 << 20):
            monkeypatch.setattr(fft, "_FFT_ELEMENTS", elements)
            assert _off(fft.circular_correlation(*merged) / merged[0].shape[-1], right) < 1e-11


def test_the_largest_correlation_finds_the_shift() -> None:
    generator = torch.Generator().manual_seed(0)
    k = torch.randn(2, 1, 60, 3, generator=generator)
    q = torch.roll(k, 7, dims=2)
    v = torch.randn(2, 1, 60, 3, generator=generator)
    # floor(0.3 ln 60) = 1: a single delay with weight one, so the output is the values that far ahead.
    assert torch.equal(ops.auto_correlation(q, k, v, factor=0.3), torch.roll(v, -7, dims=2))


def test_number_of_delays() -> None:
    assert [number_of_delays(n, 1.0) for n in (1, 2, 3, 96, 336)] == [1, 1, 1, 4, 5]
    assert number_of_delays(96, 3.0) == math.floor(3 * math.log(96)) == 13
    assert number_of_delays(5, 100.0) == 5


@pytest.mark.parametrize("batch_delays", [False, True])
@pytest.mark.parametrize(("length", "keys"), [(12, 12), (12, 7), (7, 12)])
def test_map(length: int, keys: int, batch_delays: bool) -> None:
    q, k, v = _inputs(length, keys)
    weights = auto_correlation_map(q, k, factor=2.0, batch_delays=batch_delays)
    assert weights.shape == (3, 2, length, keys)
    assert _off(weights @ v, ops.auto_correlation(q, k, v, factor=2.0, batch_delays=batch_delays)) < 1e-12


def test_batch_delays_are_those_of_the_mean_and_weights_those_of_each() -> None:
    q, k, v = _inputs(40, 40, batch=4)
    together = ops.auto_correlation(q, k, v, batch_delays=True)
    weights = auto_correlation_map(q, k, batch_delays=True)[:, 0, 0]
    assert len({tuple(row.nonzero().flatten().tolist()) for row in weights}) == 1
    assert _off(weights[0], weights[1]) > 1e-3
    assert _off(together, ops.auto_correlation(q, k, v)) > 1e-2


def test_derivatives_of_any_order() -> None:
    qkv = _inputs(5, 5, batch=2, heads=1, width=2, value_width=2)

    def function(*x: Tensor) -> Tensor:
        return ops.auto_correlation(*x, factor=2.0)

    assert torch.autograd.gradcheck(function, qkv)
    assert torch.autograd.gradgradcheck(function, qkv)


def test_half_precision_is_computed_in_single() -> None:
    q, k, v = (x.detach().bfloat16() for x in _inputs(50, 50))
    exact = ops.auto_correlation(q.float(), k.float(), v.float())
    half = ops.auto_correlation(q, k, v)
    assert half.dtype == torch.bfloat16
    assert torch.equal(half, exact.bfloat16())


@pytest.mark.parametrize("training", [False, True])
def test_no_larger_than_the_values(training: bool) -> None:
    """The official form keeps k rolled copies for backward; here everything alive together stays within a few."""
    q, k, v = (torch.randn(4, 2, 512, 16).requires_grad_(training) for _ in range(3))

    def run() -> None:
        out = ops.auto_correlation(q, k, v, factor=3.0, batch_delays=training)
        if training:
            torch.autograd.grad(out.sum(), (q, k, v))

    assert growth.count(run).peak_bytes < (10 if training else 8) * v.numel() * v.element_size()


def test_growth() -> None:
    counts = []
    for length in (512, 1024, 2048, 4096, 8192, 16384):
        q, k, v = (torch.randn(1, 2, length, 8).requires_grad_() for _ in range(3))
        counts.append(
            growth.count(lambda q=q, k=k, v=v: ops.auto_correlation(q, k, v, batch_delays=True).sum().backward())
        )
    # From 512 to 16,384 L log L grows 49.8 times; L^1.2 would 64 times.
    assert counts[-1].work / counts[0].work < 60
    assert counts[-1].peak_bytes / counts[0].peak_bytes < 60


def test_errors() -> None:
    q, k, v = (torch.randn(2, 2, 5, 4) for _ in range(3))
    with pytest.raises(ValueError, match=r"shape \(B, H, L, D\)"):
        ops.auto_correlation(q[0], k[0], v[0])
    with pytest.raises(ValueError, match="one width"):
        ops.auto_correlation(q[..., :3], k, v)
    with pytest.raises(ValueError, match="factor must be positive"):
        ops.auto_correlation(q, k, v, factor=0)
    with pytest.raises((BackendError, UnknownNameError), match="backend"):
        ops.auto_correlation(q, k, v, backend="triton")
