"""Long convolution: the form by Fourier transforms is the definition, in values and gradients."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from core_attn.ops import fft_conv
from core_attn.ops.fftconv import spectral
from core_attn.testing import growth

LIMIT = {torch.float64: 1e-12, torch.float32: 1e-5}
NAMES = ("x", "kernel", "skip", "reverse_kernel")


def inputs(
    length: int,
    taps: int,
    *,
    batch: int = 2,
    channels: int = 3,
    skip: bool = True,
    reverse: bool = True,
    dtype: torch.dtype = torch.float64,
    seed: int = 0,
) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(seed)
    shapes = {"x": (batch, channels, length), "kernel": (channels, taps)}
    shapes |= {"skip": (channels,)} if skip else {}
    shapes |= {"reverse_kernel": (channels, taps)} if reverse else {}
    return {k: torch.randn(s, generator=g, dtype=torch.float64).to(dtype).requires_grad_() for k, s in shapes.items()}


def with_gradients(leaves: dict[str, Tensor], backend: str) -> list[Tensor]:
    out = fft_conv(**leaves, backend=backend)
    # Weights that every type holds exactly.
    weight = torch.arange(out.numel(), dtype=torch.float64).cos().bfloat16().to(out.dtype).view(out.shape)
    found = torch.autograd.grad((out * weight).sum(), list(leaves.values()))
    return [out.detach(), *found]


def exact(leaves: dict[str, Tensor]) -> list[Tensor]:
    """The definition of the rounded inputs in float64, so that only the computation is compared."""
    return with_gradients({k: v.detach().double().requires_grad_() for k, v in leaves.items()}, "reference")


def error(a: Tensor, b: Tensor) -> float:
    """Largest difference, relative to the largest element where that is above 1."""
    a, b = a.detach().double(), b.detach().double()
    return float((a - b).abs().max() / b.abs().max().clamp(min=1.0)) if a.numel() else 0.0


def test_the_reference_is_a_sum_over_taps() -> None:
    leaves = {k: v.detach() for k, v in inputs(7, 4).items()}
    x, kernel, skip, reverse = (leaves[k] for k in NAMES)
    right = skip[None, :, None] * x
    for t in range(7):
        for j in range(4):
            if t - j >= 0:
                right[:, :, t] += kernel[:, j] * x[:, :, t - j]
            if t + j < 7:
                right[:, :, t] += reverse[:, j] * x[:, :, t + j]
    assert error(fft_conv(**leaves, backend="reference"), right) < 1e-14


@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_agrees_with_conv1d(backend: str) -> None:
    leaves = inputs(50, 50, reverse=False, skip=False)
    x, kernel = leaves.values()
    right = F.conv1d(F.pad(x, (49, 0)), kernel.flip(1)[:, None], groups=3)
    assert error(fft_conv(x, kernel, backend=backend), right) < 1e-12


@pytest.mark.parametrize("dtype", LIMIT, ids=str)
@pytest.mark.parametrize("length", [0, 1, 2, 3, 64, 97, 128, 251])
def test_forms_are_the_definition(length: int, dtype: torch.dtype) -> None:
    for taps in (1, 2, 64, 300):
        leaves = inputs(length, taps, dtype=dtype)
        for a, b in zip(with_gradients(leaves, "torch"), exact(leaves), strict=True):
            assert a.dtype is dtype
            assert error(a, b) < LIMIT[dtype]


def test_groups_of_channels_are_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """All channels at once, in groups of two and the last alone, and one at a time."""
    leaves = inputs(33, 33, channels=5)
    right = exact(leaves)
    for elements in (1 << 22, 2 * 2 * 72, 1):
        monkeypatch.setattr(spectral, "_AT_ONCE", elements)
        for a, b in zip(with_gradients(leaves, "torch"), right, strict=True):
            assert error(a, b) < 1e-12


def test_200_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    """Random shapes, strides, options, groups and types: finite, and equal to the definition."""
    draw = random.Random(0)
    for turn in range(200):
        monkeypatch.setattr(spectral, "_AT_ONCE", draw.choice([1, 500, 1 << 22]))
        leaves = inputs(
            draw.choice([0, 1, 2, 3, 5, 16, 31, 64, 65, 97, 128]),
            draw.choice([1, 2, 3, 7, 64, 97, 200]),
            batch=draw.choice([0, 1, 2, 3]) if turn % 9 == 0 else draw.choice([1, 2]),
            channels=draw.choice([1, 2, 5, 8]),
            skip=draw.random() < 0.5,
            reverse=draw.random() < 0.4,
            dtype=draw.choice([torch.float64, torch.float32, torch.bfloat16]),
            seed=turn,
        )
        if draw.random() < 0.4:  # channels last, as projections make them, and every second tap
            x = leaves["x"].detach()
            leaves["x"] = x.transpose(1, 2).contiguous().transpose(1, 2).requires_grad_()
            kernel = leaves["kernel"].detach()
            leaves["kernel"] = torch.stack([kernel, kernel + 1], dim=-1).flatten(1)[:, ::2].requires_grad_()
        for a, b in zip(with_gradients(leaves, "torch"), exact(leaves), strict=True):
            assert a.dtype is leaves["x"].dtype
            assert a.isfinite().all(), turn
            # bfloat16 results are rounded to 8 bits; the tap that skip is added to in between.
            assert error(a, b) < LIMIT.get(a.dtype, 1e-2), turn


def test_bfloat16_sums_are_float32() -> None:
    """The error of 16-bit inputs is the rounding of the output alone, however many taps."""
    leaves = inputs(4096, 4096, batch=1, channels=2, skip=False, reverse=False, dtype=torch.bfloat16)
    right = fft_conv(*[v.detach().double() for v in leaves.values()])
    out = fft_conv(**leaves)
    assert out.dtype is torch.bfloat16
    assert ((out - right).abs() <= right.abs() * 2.0**-8 + 1e-3).all()


def test_16_bit_tokens_may_meet_a_kernel_of_32_bits() -> None:
    leaves = inputs(40, 40)
    leaves = {k: v.detach().to(torch.bfloat16 if k == "x" else torch.float32) for k, v in leaves.items()}
    right = fft_conv(**{k: v.double() for k, v in leaves.items()}, backend="reference")
    for backend in ("torch", "reference"):
        out = fft_conv(**leaves, backend=backend)
        assert out.dtype is torch.bfloat16
        assert error(out, right) < 5e-3


def test_causal_without_a_reverse_kernel() -> None:
    """What comes later changes nothing beyond the rounding of the transforms, of which it is a part."""
    leaves = {k: v.detach() for k, v in inputs(40, 40, reverse=False).items()}
    later = leaves["x"].clone()
    later[..., 25:] = 100.0
    for backend, limit in (("torch", 1e-12), ("reference", 0.0)):
        a, b = (fft_conv(**{**leaves, "x": x}, backend=backend)[..., :25] for x in (leaves["x"], later))
        assert (a - b).abs().max() <= 100 * limit


def test_gradients_by_finite_differences() -> None:
    leaves = inputs(6, 9, batch=1, channels=2)
    torch.autograd.gradcheck(lambda *t: fft_conv(**dict(zip(NAMES, t))), tuple(leaves.values()))
    torch.autograd.gradgradcheck(
        lambda *t: fft_conv(**dict(zip(NAMES, t)), backend="reference"), tuple(leaves.values())
    )


def test_second_derivatives_are_refused() -> None:
    leaves = inputs(6, 6)
    out = fft_conv(**leaves)
    (first,) = torch.autograd.grad(out.sum(), leaves["x"], create_graph=True)
    with pytest.raises(RuntimeError, match="backend='reference'"):
        first.sum().backward()


def test_no_spectra_are_kept_without_gradients() -> None:
    x, kernel = (v.detach() for v in inputs(30, 30, skip=False, reverse=False).values())
    assert len(spectral._op(x, kernel, None, False)[1]) == 0
    assert len(spectral._op(x, kernel, None, True)[1]) == 2


def test_operator_rules() -> None:
    for reverse in (False, True):
        x, kernel, *more = inputs(21, 21, skip=False, reverse=reverse).values()
        torch.library.opcheck(spectral._op._opoverload, (x, kernel, more[0] if more else None, True))
        frozen = [t.detach().bfloat16() for t in (x, kernel)]
        torch.library.opcheck(spectral._op._opoverload, (*frozen, None, False))


def test_compiles_and_autocasts() -> None:
    leaves = inputs(37, 37, dtype=torch.float32)
    right = with_gradients(leaves, "torch")
    compiled: Any = torch.compile(
        lambda *t: fft_conv(**dict(zip(NAMES, t))), backend="aot_eager", fullgraph=True, dynamic=False
    )
    out = compiled(*leaves.values())
    weight = torch.arange(out.numel(), dtype=torch.float64).cos().bfloat16().to(out.dtype).view(out.shape)
    found = torch.autograd.grad((out * weight).sum(), list(leaves.values()))
    for a, b in zip([out, *found], right, strict=True):
        assert error(a, b) < 1e-6
    with torch.autocast("cpu", torch.bfloat16):
        assert error(fft_conv(**leaves), right[0]) < 1e-6


def test_growth() -> None:
    counts = []
    for length in (1024, 32_768):
        leaves = inputs(length, length, batch=1, channels=1, reverse=False, dtype=torch.float32)
        counts.append(growth.count(lambda leaves=leaves: fft_conv(**leaves).sum().backward()))
    assert counts[1].peak_bytes / counts[0].peak_bytes < 33


@pytest.mark.parametrize("least", [1, 2, 7, 11, 13, 127, 1021, 262_143, 262_145])
def test_sizes_of_transforms(least: int) -> None:
    def smooth(n: int) -> bool:
        for p in (2, 3, 5):
            while n % p == 0:
                n //= p
        return n == 1

    assert spectral.fast_size(least) == next(n for n in range(least, 2 * least + 1) if smooth(n))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"x": torch.randn(3, 5)}, r"x \(B, C, L\) and kernel \(C, K\)"),
        ({"kernel": torch.randn(4, 5)}, r"x \(B, C, L\) and kernel \(C, K\)"),
        ({"kernel": torch.randn(3, 0)}, "K >= 1"),
        ({"kernel": torch.randn(3)}, r"kernel \(C, K\)"),
        ({"skip": torch.randn(2)}, r"skip must have shape \(C,\) = \(3,\)"),
        ({"reverse_kernel": torch.randn(3, 4)}, r"shape of kernel, \(3, 5\)"),
        ({"x": torch.ones(2, 3, 5, dtype=torch.long)}, "floating point, got x of torch.int64"),
        ({"kernel": torch.randn(3, 5, dtype=torch.cfloat)}, "got kernel of torch.complex64"),
        ({"skip": torch.ones(3, dtype=torch.bool)}, "got skip of torch.bool"),
        ({"backend": "fast"}, "backend"),
    ],
)
def test_errors(change: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says) as caught:
        fft_conv(**{"x": torch.randn(2, 3, 5), "kernel": torch.randn(3, 5), **change})
    assert "\n" not in str(caught.value)
