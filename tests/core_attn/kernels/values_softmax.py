"""Values of the kernels of exact and windowed attention: against the float64 definition, outputs and gradients."""

from __future__ import annotations

import random
from collections.abc import Iterable
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from core_attn.kernels import interpreted
from core_attn.ops import softmax_attention, softmax_attention_varlen
from core_attn.ops.softmax import reference
from core_attn.ops.softmax.triton import _backward_op, _op

pytestmark = pytest.mark.gpu

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
# What half precision could break beyond the arithmetic, which does not depend on lengths and windows.
HALF = {"plain-prime", "grouped", "head-80-values-8", "window-both-sides", "several", "padding", "bias"}
# Tiles are 16 x 16 in the interpreter, larger on a card: there the same cases come with longer sequences too.
LONGER = 1 if interpreted() else 9


def inputs(
    device: str,
    queries: int,
    keys: int,
    *,
    batch: int = 1,
    heads: int = 2,
    key_heads: int = 2,
    channels: int = 16,
    values: int = 16,
    dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor, Tensor]:
    shapes = ((batch, heads, queries, channels), (batch, key_heads, keys, channels), (batch, key_heads, keys, values))
    return tuple(torch.randn(s, dtype=torch.float64).to(dtype).to(device).requires_grad_() for s in shapes)


def outcome(function: Any, leaves: tuple[Tensor, ...], probe: Tensor | None = None, **options: Any) -> list[Tensor]:
    """Output and all gradients, for a loss that treats no two elements alike."""
    out = function(*leaves, **options)
    if probe is None:
        probe = torch.sin(torch.arange(out.numel(), dtype=torch.float64)).view(out.shape)
    return [out, *torch.autograd.grad(out, leaves, probe.to(out))]


def exact(tensors: tuple[Tensor, ...], **options: Any) -> list[Tensor]:
    """The same from the definition, in float64 on the CPU."""
    leaves = tuple(x.detach().double().cpu().requires_grad_() for x in tensors)
    options = {n: x.cpu() if isinstance(x, Tensor) else x for n, x in options.items()}
    options = {n: x.double() if isinstance(x, Tensor) and x.is_floating_point() else x for n, x in options.items()}
    return outcome(softmax_attention, leaves, backend="reference", **options)


def errors(found: list[Tensor], expected: list[Tensor]) -> list[float]:
    """Largest error of each, relative to its largest element where that is above 1."""
    assert [x.shape for x in found] == [x.shape for x in expected]
    return [
        ((a.double().cpu() - b).abs().max() / b.abs().max().clamp(min=1)).item() if b.numel() else 0.0
        for a, b in zip(found, expected)
    ]


def worth(cases: Iterable[str]) -> list[Any]:
    """Cases with dtypes: all in float32, on a card in the others too; the interpreter is too slow for that."""
    return [
        pytest.param(case, dtype, id=f"{case}-{str(dtype)[6:]}")
        for case in cases
        for dtype in DTYPES
        if dtype is torch.float32 or case in HALF or not interpreted()
    ]


def bound(dtype: torch.dtype) -> float:
    return {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.2e-2}[dtype]


CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "plain-prime": ({"queries": 37, "keys": 53}, {}),
    "causal": ({"queries": 37, "keys": 37}, {"causal": True}),
    "causal-more-keys": ({"queries": 19, "keys": 41}, {"causal": True}),
    "causal-fewer-keys": ({"queries": 41, "keys": 19}, {"causal": True}),
    "one-token": ({"queries": 1, "keys": 1}, {"causal": True}),
    "one-query": ({"queries": 1, "keys": 40, "heads": 4, "key_heads": 1}, {"causal": True}),
    "grouped": ({"queries": 33, "keys": 33, "heads": 6, "key_heads": 2}, {"causal": True}),
    "head-24": ({"queries": 20, "keys": 20, "channels": 24, "values": 24}, {}),
    "head-80-values-8": ({"queries": 20, "keys": 20, "channels": 80, "values": 8}, {"causal": True}),
    "head-5-values-40": ({"queries": 20, "keys": 20, "channels": 5, "values": 40}, {"scale": 0.3}),
    "window-both-sides": ({"queries": 70, "keys": 70}, {"window": (9, 3)}),
    "window-causal": ({"queries": 71, "keys": 71}, {"window": 21, "causal": True}),
    "window-of-one": ({"queries": 33, "keys": 33}, {"window": 1}),
    "window-left-open": ({"queries": 40, "keys": 50}, {"window": (None, 2)}),
    "window-right-open": ({"queries": 50, "keys": 40}, {"window": (2, None)}),
    "window-grouped-more-keys": ({"queries": 35, "keys": 67, "heads": 4}, {"window": (18, 0), "causal": True}),
    "window-beyond-everything": ({"queries": 20, "keys": 20}, {"window": (10**12, 10**12)}),
}


@pytest.mark.parametrize(("case", "dtype"), worth(CASES))
def test_equals_the_definition(device: str, case: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    sizes, options = CASES[case]
    for factor in {1, LONGER}:
        longer = {n: factor * x if n in ("queries", "keys") and x > 1 else x for n, x in sizes.items()}
        q, k, v = inputs(device, **longer, dtype=dtype)
        found = outcome(softmax_attention, (q, k, v), backend="triton", **options)
        assert max(errors(found, exact((q, k, v), **options))) < bound(dtype)
        assert found[0].dtype is dtype


@pytest.mark.parametrize(("which", "dtype"), worth(["padding", "mask", "bias", "bias-row", "bias-padding-mask"]))
def test_masks_and_bias(device: str, which: str, dtype: torch.dtype) -> None:
    torch.manual_seed(1)
    batch, heads, queries, keys = 2, 2, 37, 45
    q, k, v = inputs(device, queries, keys, batch=batch, heads=heads, key_heads=1, dtype=dtype)
    options: dict[str, Any] = {"causal": True}
    if "padding" in which:
        options["key_padding_mask"] = torch.rand(batch, keys, device=device) > 0.4
        options["key_padding_mask"][1] = False  # nothing to read for a whole sample
    if "mask" in which:
        options["mask"] = torch.rand(heads, queries, keys, device=device) > 0.4
    if which == "bias-row":
        options["bias"] = torch.randn(batch, 1, 1, keys, device=device).to(dtype)
    elif "bias" in which:
        options["bias"] = torch.randn(heads, queries, keys, device=device).to(dtype)
        options["bias"][0, 5] = float("-inf")
    found = outcome(softmax_attention, (q, k, v), backend="triton", **options)
    assert max(errors(found, exact((q, k, v), **options))) < bound(dtype)
    if "padding" in which:
        assert all((x[1] == 0).all() for x in found)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_low_precision_is_no_worse_than_twice_sdpa(device: str, dtype: torch.dtype) -> None:
    torch.manual_seed(2)
    heads = 1 if interpreted() else 4
    length = 96 * LONGER
    q, k, v = inputs(device, length, length, heads=heads, key_heads=heads, channels=64, values=64, dtype=dtype)
    probe = torch.randn(q.shape, dtype=torch.float64).to(dtype).double()
    mine = outcome(softmax_attention, (q, k, v), probe, causal=True, backend="triton")
    sdpa = outcome(F.scaled_dot_product_attention, (q, k, v), probe, is_causal=True)
    leaves = tuple(x.detach().double().cpu().requires_grad_() for x in (q, k, v))
    expected = outcome(softmax_attention, leaves, probe, causal=True, backend="reference")
    for a, b in zip(errors(mine, expected), errors(sdpa, expected)):
        assert a <= 2 * b


def test_rows_without_keys_are_zero_with_zero_gradients(device: str) -> None:
    torch.manual_seed(3)
    q, k, v = inputs(device, 40, 17)
    out, dq, dk, dv = outcome(softmax_attention, (q, k, v), causal=True, backend="triton")
    assert (out[:, :, :23] == 0).all()
    assert (dq[:, :, :23] == 0).all()
    assert out[:, :, 23:].abs().amax(-1).min() > 0
    assert all(x.isfinite().all() for x in (dk, dv))
    hidden = torch.zeros(1, 17, dtype=torch.bool, device=device)
    k.data.fill_(float("nan"))
    for x in outcome(softmax_attention, (q, k, v), key_padding_mask=hidden, backend="triton"):
        assert (x == 0).all()


def test_large_scores_do_not_overflow(device: str) -> None:
    torch.manual_seed(4)
    q, k, v = inputs(device, 35, 35)
    q.data *= 100.0
    k.data *= 100.0
    found = outcome(softmax_attention, (q, k, v), causal=True, backend="triton")
    found_again = exact((q, k, v), causal=True)
    assert all(x.isfinite().all() for x in found)
    # Scores of some 1e4 carry float32's own error of 1e-3 into the weights.
    assert errors(found[:1], found_again[:1])[0] < 1e-2


def test_strides(device: str) -> None:
    """Heads inside of positions, a slice of a larger tensor, channels that do not lie side by side."""
    torch.manual_seed(5)
    packed = torch.randn(2, 20, 3, 2, 16, device=device)  # (B, L, q|k|v, H, D)
    leaves = tuple(x.transpose(1, 2).requires_grad_() for x in packed.unbind(2))
    expected = exact(leaves, causal=True)
    assert max(errors(outcome(softmax_attention, leaves, causal=True, backend="triton"), expected)) < 1e-5
    turned = tuple(x.detach().transpose(2, 3).contiguous().transpose(2, 3).requires_grad_() for x in leaves)
    assert turned[0].stride(-1) != 1
    assert max(errors(outcome(softmax_attention, turned, causal=True, backend="triton"), expected)) < 1e-5


LENGTHS = {
    "several": ([5, 33, 1, 16, 20], [5, 33, 1, 16, 20]),
    "other-keys": ([17, 3, 40], [9, 35, 40]),
    "empty-ones": ([0, 12, 7, 0, 20], [4, 0, 7, 0, 33]),
}


@pytest.mark.parametrize(("which", "dtype"), worth(LENGTHS))
@pytest.mark.parametrize("options", [{"causal": True}, {"window": (6, 2)}], ids=str)
def test_packed_sequences(device: str, which: str, options: dict[str, Any], dtype: torch.dtype) -> None:
    torch.manual_seed(6)
    offsets_q, offsets_k = (torch.tensor([0, *n]).cumsum(0).to(torch.int32) for n in LENGTHS[which])
    q = torch.randn(int(offsets_q[-1]), 2, 16).to(dtype).to(device).requires_grad_()
    k, v = (torch.randn(int(offsets_k[-1]), 1, n).to(dtype).to(device).requires_grad_() for n in (16, 24))
    offsets = {"offsets_q": offsets_q.to(device), "offsets_k": offsets_k.to(device)}
    found = outcome(softmax_attention_varlen, (q, k, v), backend="triton", **offsets, **options)
    probe = torch.sin(torch.arange(found[0].numel(), dtype=torch.float64)).view(found[0].shape)
    expected = [torch.zeros(x.shape, dtype=torch.float64) for x in found]
    for (a, b), (c, d) in zip(pairwise(offsets_q.tolist()), pairwise(offsets_k.tolist())):
        one = (q[a:b], k[c:d], v[c:d])
        leaves = tuple(x.detach().double().cpu().transpose(0, 1)[None].requires_grad_() for x in one)
        part = outcome(softmax_attention, leaves, probe[a:b].transpose(0, 1)[None], backend="reference", **options)
        for whole, x, rows in zip(expected, part, (slice(a, b), slice(a, b), slice(c, d), slice(c, d))):
            whole[rows] = x[0].transpose(0, 1)
    assert max(errors(found, expected)) < bound(dtype)


def test_random_draws(device: str) -> None:
    draw = random.Random(0)
    for seed in range(14 if interpreted() else 200):
        torch.manual_seed(seed)
        queries, keys = (draw.choice([1, 2, 7, 16, 17, 31, 32, 47]) * draw.choice([1, LONGER]) for _ in range(2))
        key_heads, group = draw.choice([(1, 1), (1, 3), (2, 2)])
        q, k, v = inputs(
            device,
            queries,
            keys,
            batch=draw.choice([1, 2]),
            heads=key_heads * group,
            key_heads=key_heads,
            channels=draw.choice([1, 8, 16, 20]),
            values=draw.choice([3, 16, 33]),
        )
        options: dict[str, Any] = {
            "causal": draw.random() < 0.5,
            "window": draw.choice([None, 1, 4, 19, (3, 0), (None, 5), (17, None)]),
        }
        if draw.random() < 0.4:
            options["key_padding_mask"] = torch.rand(q.shape[0], keys, device=device) > draw.choice([0.2, 0.9])
            hidden = ~options["key_padding_mask"][:, None, :, None]
            k.data.masked_fill_(hidden, float("nan"))
            v.data.masked_fill_(hidden, float("nan"))
        if draw.random() < 0.4:
            options["bias"] = torch.randn(1, key_heads * group, queries, keys, device=device)
        found = outcome(softmax_attention, (q, k, v), backend="triton", **options)
        expected = exact((q, k, v), **options)
        assert max(errors(found, expected)) < 1e-5, (seed, q.shape, k.shape, v.shape, options)


def test_what_torch_asks_of_an_operator(device: str) -> None:
    """Schema, fake tensors, autograd registration, and tracing with dynamic shapes."""
    torch.manual_seed(7)
    q, k, v = inputs(device, 9, 11)
    keep = torch.rand(1, 1, 1, 11, device=device) > 0.2
    torch.library.opcheck(_op, (q, k, v, None, keep, None, None, 9, 11, 3, 0, 0.5))
    dout, lse = torch.randn(1, 2, 9, 16, device=device), torch.randn(1, 2, 9, device=device)
    tests = ("test_schema", "test_faketensor")
    plain = tuple(x.detach() for x in (q, k, v))
    torch.library.opcheck(
        _backward_op, (dout, dout, lse, *plain, None, keep, None, None, 9, 11, 3, 0, 0.5), test_utils=tests
    )


def test_the_log_sum_exp_is_that_of_the_scores(device: str) -> None:
    torch.manual_seed(8)
    q, k, v = inputs(device, 21, 40)
    lse = _op(q, k, v, None, None, None, None, 21, 40, None, 0, 0.25)[1]
    scores = reference.scores(
        q.double(), k.double(), causal=True, mask=None, bias=None, key_padding_mask=None, window=None, scale=0.25
    )
    assert (lse - scores.logsumexp(-1)).abs().max() < 1e-5
