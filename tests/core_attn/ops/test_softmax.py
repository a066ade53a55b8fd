"""softmax_attention: every backend against the definition, the definition against a loop and against torch."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from core_attn.dispatch import BackendError, Request
from core_attn.naming import UnknownNameError
from core_attn.ops import softmax_attention
from core_attn.ops.softmax import OPERATOR, blocked, flex, span
from core_attn.testing.harness import worst

FAST = ["torch", "sdpa"]
WINDOWS = [None, 1, 5, (3, None), (0, 2)]


def inputs(
    queries: int,
    keys: int,
    *,
    batch: int = 2,
    heads: int = 4,
    key_heads: int = 4,
    channels: int = 8,
    value: int = 8,
    dtype: torch.dtype = torch.float64,
    seed: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(seed)
    shapes = ((batch, heads, queries, channels), (batch, key_heads, keys, channels), (batch, key_heads, keys, value))
    return tuple(torch.randn(s, dtype=torch.float64).to(dtype).requires_grad_() for s in shapes)


def restrictions(batch: int, heads: int, queries: int, keys: int, which: tuple[bool, ...]) -> dict[str, Any]:
    """mask, bias, key padding, as `which` says. Some rows end up with no key at all."""
    found: dict[str, Any] = {}
    if which[0]:
        found["mask"] = torch.rand(batch, 1, queries, keys) > 0.4
    if which[1]:
        found["bias"] = torch.randn(heads, queries, keys, dtype=torch.float64, requires_grad=True)
    if which[2]:
        found["key_padding_mask"] = torch.rand(batch, keys) > 0.3
    return found


def outcome(backend: str, leaves: list[Tensor], q: Tensor, k: Tensor, v: Tensor, **options: Any) -> list[Tensor]:
    """Output and all gradients, for a loss that treats no two elements alike."""
    out = softmax_attention(q, k, v, backend=backend, **options)
    probe = torch.sin(torch.arange(out.numel(), dtype=out.dtype)).view(out.shape)
    return [out, *torch.autograd.grad(out, leaves, probe)]


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of 4 queries and 5 keys, so that few tokens already meet every kind of border."""
    monkeypatch.setattr(blocked, "_block_sizes", lambda left, right, *, on_cpu: (4, 5))


# The definition itself


def test_definition_is_the_sum_it_says() -> None:
    """One query at a time, one key at a time, in Python floats."""
    q, k, v = inputs(4, 6, batch=1, heads=2, key_heads=1, channels=3, value=2)
    bias, mask = torch.randn(2, 4, 6, dtype=torch.float64), torch.rand(4, 6) > 0.3
    out = softmax_attention(q, k, v, causal=True, window=4, bias=bias, mask=mask, scale=0.7, backend="reference")
    for h, i in itertools.product(range(2), range(4)):
        position = i + 6 - 4
        weights = {}
        for j in range(6):
            if position - 4 < j <= position and mask[i, j]:
                score = sum(q[0, h, i, d].item() * k[0, 0, j, d].item() for d in range(3)) * 0.7
                weights[j] = math.exp(score + bias[h, i, j].item())
        for d in range(2):
            expected = sum(w * v[0, 0, j, d].item() for j, w in weights.items()) / (sum(weights.values()) or 1.0)
            assert out[0, h, i, d].item() == pytest.approx(expected, abs=1e-14)


@pytest.mark.parametrize("causal", [False, True])
def test_definition_equals_torch(causal: bool) -> None:
    q, k, v = inputs(17, 17, key_heads=2)
    expected = F.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=True)
    found = softmax_attention(q, k, v, causal=causal, backend="reference")
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-13)


@pytest.mark.parametrize(
    ("window", "causal", "expected"),
    [
        (3, True, [[1, 0, 0, 0], [1, 1, 0, 0], [1, 1, 1, 0], [0, 1, 1, 1]]),
        (2, False, [[1, 1, 0, 0], [1, 1, 1, 0], [0, 1, 1, 1], [0, 0, 1, 1]]),
        ((2, 0), False, [[1, 0, 0, 0], [1, 1, 0, 0], [1, 1, 1, 0], [0, 1, 1, 1]]),
        ((0, None), False, [[1, 1, 1, 1], [0, 1, 1, 1], [0, 0, 1, 1], [0, 0, 0, 1]]),
        ((None, 1), False, [[1, 1, 0, 0], [1, 1, 1, 0], [1, 1, 1, 1], [1, 1, 1, 1]]),
        ((1, 3), True, [[1, 0, 0, 0], [1, 1, 0, 0], [0, 1, 1, 0], [0, 0, 1, 1]]),
        (None, True, [[1, 0, 0, 0], [1, 1, 0, 0], [1, 1, 1, 0], [1, 1, 1, 1]]),
    ],
    ids=str,
)
@pytest.mark.parametrize("backend", ["reference", *FAST])
def test_which_keys_a_window_reads(window: Any, causal: bool, expected: list[list[int]], backend: str) -> None:
    q, v = torch.zeros(1, 1, 4, 2), torch.eye(4)[None, None]
    weights = softmax_attention(q, q, v, window=window, causal=causal, backend=backend)[0, 0]
    assert (weights > 0).int().tolist() == expected


@pytest.mark.parametrize("backend", ["reference", *FAST])
def test_causal_is_aligned_lower_right(backend: str) -> None:
    v = torch.eye(4)[None, None]
    few = softmax_attention(torch.zeros(1, 1, 2, 2), torch.zeros(1, 1, 4, 2), v, causal=True, backend=backend)
    assert (few[0, 0] > 0).int().tolist() == [[1, 1, 1, 0], [1, 1, 1, 1]]
    one = softmax_attention(torch.zeros(1, 1, 1, 2), torch.zeros(1, 1, 4, 2), v, causal=True, backend=backend)
    assert (one[0, 0] > 0).int().tolist() == [[1, 1, 1, 1]]
    many = softmax_attention(torch.zeros(1, 1, 6, 2), torch.zeros(1, 1, 4, 2), v, causal=True, backend=backend)
    assert many[0, 0, :2].tolist() == [[0.0] * 4] * 2
    assert (many[0, 0, 2:] > 0).int().tolist() == torch.ones(4, 4).tril().int().tolist()


# Every backend against the definition


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("length", [1, 2, 3, 63, 65, 127])
@pytest.mark.parametrize("key_heads", [4, 2, 1])
def test_lengths_and_grouped_heads(backend: str, length: int, key_heads: int) -> None:
    for causal, window in itertools.product([False, True], [None, 9]):
        q, k, v = inputs(length, length, key_heads=key_heads, value=5)
        options = {"causal": causal, "window": window}
        expected = outcome("reference", [q, k, v], q, k, v, **options)
        assert worst(outcome(backend, [q, k, v], q, k, v, **options), expected) < 1e-12
        low = [x.detach().float().requires_grad_() for x in (q, k, v)]
        assert worst(outcome(backend, low, *low, **options), expected) < 1e-5


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("which", [*itertools.product([False, True], repeat=3)], ids=str)
@pytest.mark.parametrize(("queries", "keys"), [(13, 13), (7, 18), (18, 7)])
def test_restrictions_together(
    small_blocks: None, backend: str, which: tuple[bool, ...], queries: int, keys: int
) -> None:
    for causal, window in itertools.product([False, True], WINDOWS):
        q, k, v = inputs(queries, keys, key_heads=2)
        options = {"causal": causal, "window": window, **restrictions(2, 4, queries, keys, which)}
        leaves = [q, k, v] + ([options["bias"]] if which[1] else [])
        expected = outcome("reference", leaves, q, k, v, **options)
        found = outcome(backend, leaves, q, k, v, **options)
        assert worst(found, expected) < 1e-12, (causal, window)


def test_real_block_sizes_over_several_blocks() -> None:
    for options in ({}, {"causal": True}, {"causal": True, "window": 200}, {"window": (30, 600)}):
        q, k, v = inputs(300, 1100, batch=1, heads=2, key_heads=2, channels=4, value=4)
        expected = outcome("reference", [q, k, v], q, k, v, **options)
        assert worst(outcome("torch", [q, k, v], q, k, v, **options), expected) < 1e-12


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize(
    "shape", [(1, 1, 1, 6), (2, 1, 1, 6), (1, 4, 5, 1), (5, 6), (6,), (4, 1, 6), (2, 4, 5, 6)], ids=str
)
def test_gradient_of_a_broadcast_bias(small_blocks: None, backend: str, shape: tuple[int, ...]) -> None:
    q, k, v = inputs(5, 6, key_heads=2)
    bias = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    expected = outcome("reference", [q, k, v, bias], q, k, v, bias=bias)
    assert worst(outcome(backend, [q, k, v, bias], q, k, v, bias=bias), expected) < 1e-12


@pytest.mark.parametrize("options", [{}, {"causal": True}, {"causal": True, "window": 40}], ids=str)
def test_bfloat16_no_worse_than_twice_torch(options: dict[str, Any]) -> None:
    q, k, v = inputs(127, 127, key_heads=2, channels=64, value=64, dtype=torch.bfloat16)
    exact = [x.detach().double().requires_grad_() for x in (q, k, v)]
    expected = outcome("reference", exact, *exact, **options)
    errors = {}
    for backend in (*FAST, "reference"):
        errors[backend] = [
            (a.double() - b).norm().item() for a, b in zip(outcome(backend, [q, k, v], q, k, v, **options), expected)
        ]
    for backend in ("torch", "reference"):
        assert all(a <= 2 * b for a, b in zip(errors[backend], errors["sdpa"])), errors


@pytest.mark.parametrize("backend", FAST)
def test_bias_is_not_rounded_to_half_precision(backend: str) -> None:
    q, k, v = inputs(9, 9, dtype=torch.bfloat16)
    bias = 8 + torch.randn(4, 9, 9) / 50  # bfloat16 has steps of 1/16 there
    exact = [x.detach().double() for x in (q, k, v)]
    expected = softmax_attention(*exact, bias=bias, backend="reference")
    found = softmax_attention(q, k, v, bias=bias, backend=backend)
    assert (found.double() - expected).abs().max() < 0.01


@pytest.mark.parametrize("backend", ["reference", *FAST])
def test_large_scores_do_not_overflow(backend: str) -> None:
    q, k, v = inputs(65, 65, dtype=torch.float32)
    found = outcome(backend, [q, k, v], q, k, v, scale=1e4)
    expected = outcome("reference", [q, k, v], q, k, v, scale=1e4)
    assert all(torch.isfinite(x).all() for x in found)
    torch.testing.assert_close(found[0], expected[0], rtol=0, atol=1e-4)


# Rows and tensors without anything in them


@pytest.mark.parametrize("backend", ["reference", *FAST])
def test_rows_without_keys_are_zero_with_zero_gradients(small_blocks: None, backend: str) -> None:
    q, k, v = inputs(9, 9)
    mask = torch.ones(9, 9, dtype=torch.bool)
    mask[3] = False
    padding = torch.ones(2, 9, dtype=torch.bool)
    padding[1] = False
    bias = torch.zeros(9, 9, dtype=torch.float64)
    bias[5] = -torch.inf
    bias.requires_grad_()
    options = {"mask": mask, "key_padding_mask": padding, "bias": bias}
    out, dq, dk, dv, dbias = outcome(backend, [q, k, v, bias], q, k, v, **options)
    for x in (out, dq):
        assert x[0, :, [3, 5]].abs().max() == 0
        assert x[0, :, [0, 8]].abs().min() > 0
        assert x[1].abs().max() == 0
    assert dk[1].abs().max() == dv[1].abs().max() == 0
    assert all(torch.isfinite(x).all() for x in (out, dq, dk, dv, dbias))
    assert dbias[3].abs().max() == 0


@pytest.mark.parametrize("backend", ["reference", *FAST])
@pytest.mark.parametrize("poison", [float("nan"), float("inf"), 1e30])
@pytest.mark.parametrize("causal", [False, True])
def test_what_lies_under_the_padding_never_matters(backend: str, poison: float, causal: bool) -> None:
    q, k, v = inputs(11, 11)
    padding = torch.arange(11) < torch.tensor([[11], [6]])
    expected = outcome(backend, [q, k, v], q, k, v, key_padding_mask=padding, causal=causal)
    with torch.no_grad():
        k[1, :, 6:], v[1, :, 6:] = poison, poison
    found = outcome(backend, [q, k, v], q, k, v, key_padding_mask=padding, causal=causal)
    assert all(torch.equal(a, b) for a, b in zip(found, expected))
    assert found[2][1, :, 6:].abs().max() == found[3][1, :, 6:].abs().max() == 0


@pytest.mark.parametrize("backend", ["auto", "reference", *FAST])
@pytest.mark.parametrize("sizes", [(0, 4, 3, 5), (2, 4, 0, 5), (2, 4, 3, 0), (2, 0, 3, 5)], ids=str)
@pytest.mark.parametrize("causal", [False, True])
def test_empty_tensors(backend: str, sizes: tuple[int, ...], causal: bool) -> None:
    batch, heads, queries, keys = sizes
    q, k, v = inputs(queries, keys, batch=batch, heads=heads, key_heads=heads, value=6)
    out, *grads = outcome(backend, [q, k, v], q, k, v, causal=causal, key_padding_mask=torch.ones(batch, keys) > 0)
    assert out.shape == (batch, heads, queries, 6)
    assert all(g.abs().sum() == 0 for g in (out, *grads))


@pytest.mark.parametrize("backend", FAST)
def test_strides(backend: str) -> None:
    q, k, v = inputs(9, 9, key_heads=2)
    expected = outcome("reference", [q, k, v], q, k, v, causal=True)
    for lay in (
        lambda x: x.detach().transpose(1, 2).contiguous().transpose(1, 2),
        lambda x: x.detach().transpose(2, 3).contiguous().transpose(2, 3),
        lambda x: x.detach().repeat_interleave(2, dim=-1)[..., ::2],
    ):
        other = [lay(x).requires_grad_() for x in (q, k, v)]
        assert worst(outcome(backend, other, *other, causal=True), expected) < 1e-12
    wide = q.detach()[:, :, :1].expand(-1, -1, 9, -1)
    assert (
        worst([softmax_attention(wide, k, v, backend=backend)], [softmax_attention(wide, k, v, backend="reference")])
        < 1e-12
    )


# The blocked form as an operator of torch


def test_gradcheck(small_blocks: None) -> None:
    q, k, v = inputs(5, 7, batch=1, heads=2, key_heads=1, channels=3, value=2)
    bias = torch.randn(2, 5, 7, dtype=torch.float64, requires_grad=True)

    def call(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
        return softmax_attention(q, k, v, bias=bias, window=(2, 1), backend="torch")

    assert torch.autograd.gradcheck(call, (q, k, v, bias))


def test_opcheck() -> None:
    q, k, v = inputs(5, 7, batch=1, heads=2, key_heads=1, channels=3, value=2)
    bias = torch.randn(1, 2, 5, 7, dtype=torch.float64, requires_grad=True)
    mask = torch.rand(1, 1, 5, 7) > 0.3
    torch.library.opcheck(blocked._op._opoverload, (q, k, v, bias, [mask], None, 2, 0, 0.5, 0.0))
    torch.library.opcheck(
        blocked._op._opoverload, (q.float(), k.float(), v.float(), None, [], torch.tensor(3), None, None, 0.5, 0.3)
    )


@pytest.mark.parametrize("backend", ["auto", *FAST])
def test_compiles_into_one_graph(backend: str) -> None:
    def call(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
        return softmax_attention(q, k, v, bias=bias, causal=True, window=3, backend=backend)

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager", dynamic=True)
    for length in (5, 8):
        leaves = [*inputs(length, length), torch.randn(length, length, dtype=torch.float64, requires_grad=True)]
        for ours, eager in zip(
            torch.autograd.grad(compiled(*leaves).sin().sum(), leaves),
            torch.autograd.grad(call(*leaves).sin().sum(), leaves),
        ):
            torch.testing.assert_close(ours, eager, rtol=0, atol=1e-12)


@pytest.mark.parametrize("backend", ["auto", *FAST])
@pytest.mark.parametrize("cross", [False, True])
def test_exports_for_any_length(backend: str, cross: bool) -> None:
    class Call(torch.nn.Module):
        def forward(self, q: Tensor, k: Tensor, v: Tensor, padding: Tensor) -> Tensor:
            return softmax_attention(q, k, v, causal=True, window=300, key_padding_mask=padding, backend=backend)

    def example(queries: int, keys: int) -> tuple[Tensor, ...]:
        return *(x.detach() for x in inputs(queries, keys)), torch.arange(keys) < torch.tensor([[keys], [keys - 2]])

    queries = torch.export.Dim("L", min=2, max=4096)
    keys = torch.export.Dim("M", min=2, max=4096) if cross else queries
    shapes = {"q": {2: queries}, "k": {2: keys}, "v": {2: keys}, "padding": {1: keys}}
    exported = torch.export.export(Call(), example(9, 13 if cross else 9), dynamic_shapes=shapes)
    for case in (example(5, 11 if cross else 5), example(700, 900 if cross else 700)):
        torch.testing.assert_close(exported.module()(*case), Call()(*case), rtol=0, atol=1e-12)


def test_second_derivative_of_the_blocked_form_is_refused_in_words() -> None:
    q, k, v = inputs(3, 3)
    (grad,) = torch.autograd.grad(softmax_attention(q, k, v, backend="torch").sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative; use backend='reference'"):
        torch.autograd.grad(grad.sum(), k)
    assert torch.autograd.gradgradcheck(
        lambda *x: softmax_attention(*x, backend="reference"),
        inputs(2, 3, batch=1, heads=1, key_heads=1, channels=2, value=2),
    )


class LargestTensor(TorchDispatchMode):
    """Remembers the number of elements of the largest tensor that any operation made."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, list | tuple) else (out,):
            if isinstance(x, Tensor):
                self.elements = max(self.elements, x.numel())
        return out


def run_both_ways(length: int, left: int | None) -> None:
    q, k, v = (x.detach() for x in inputs(length, length, batch=1, heads=1, key_heads=1, dtype=torch.float32))
    options = (None, [], None, left, 0, 0.3, 0.0)
    out, lse = blocked._forward(q, k, v, *options)
    blocked._backward(out, out, lse, False, q, k, v, *options)


@pytest.mark.parametrize("left", [None, 100])
def test_no_tensor_of_the_blocked_form_grows_with_the_square(left: int | None) -> None:
    largest = []
    for length in (4096, 8192):
        with LargestTensor() as seen:
            run_both_ways(length, left)
        largest.append(seen.elements)
    assert largest[0] <= 128 * 512  # one block of scores
    assert largest[1] <= 2 * largest[0]
    assert largest[1] < 8192 * 16


def test_a_window_costs_what_it_reads() -> None:
    counts = {}
    for length, left in ((2048, 255), (4096, 255), (4096, None)):
        with FlopCounterMode(display=False) as counter:
            run_both_ways(length, left)
        counts[length, left] = counter.get_total_flops()
    # 7 products of a query with a key, 8 channels, 2 operations each; at the borders blocks read a little more.
    assert counts[4096, 255] <= 1.35 * 7 * 2 * 8 * 256 * 4096
    assert counts[4096, 255] == pytest.approx(2 * counts[2048, 255], rel=0.05)
    assert counts[4096, None] <= 1.15 * 7 * 2 * 8 * 4096 * 4096 / 2  # half of all pairs when causal


# Dropout


@pytest.mark.parametrize("backend", ["reference", *FAST])
def test_dropout_keeps_the_mean_and_drops_the_share(backend: str) -> None:
    torch.manual_seed(0)
    q, v = torch.zeros(1, 1, 2000, 4), torch.eye(10)[None, None]
    weights = softmax_attention(q, torch.zeros(1, 1, 10, 4), v, dropout=0.3, backend=backend)
    kept = weights[weights != 0]
    torch.testing.assert_close(kept, torch.full_like(kept, 0.1 / 0.7))
    assert kept.numel() / weights.numel() == pytest.approx(0.7, abs=0.02)


def test_dropout_of_the_blocked_form_is_the_same_in_backward(small_blocks: None) -> None:
    q, k, v = inputs(9, 11, key_heads=2)
    seed = torch.tensor(5)

    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return blocked._op(q, k, v, None, [], seed, None, 0, 0.4, 0.5)[0]

    assert torch.autograd.gradcheck(call, (q, k, v), fast_mode=True)
    torch.manual_seed(1)
    first = softmax_attention(q, k, v, dropout=0.5, backend="torch")
    second = softmax_attention(q, k, v, dropout=0.5, backend="torch")
    torch.manual_seed(1)
    assert torch.equal(softmax_attention(q, k, v, dropout=0.5, backend="torch"), first)
    assert not torch.equal(first, second)


@pytest.mark.parametrize("backend", ["reference", *FAST])
def test_autocast(backend: str) -> None:
    q, k, v = inputs(9, 9, dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = softmax_attention(q, k, v, causal=True, backend=backend)
    assert out.dtype is torch.bfloat16
    expected = softmax_attention(q.bfloat16(), k.bfloat16(), v.bfloat16(), causal=True, backend=backend)
    assert torch.equal(out, expected)


# Which backend runs


def chosen(queries: int, keys: int | None = None, *, value: int = 64, **facts: Any) -> str:
    keys = keys or queries
    request = Request((2, 8, queries, 64), (2, 8, keys, 64), (2, 8, keys, value), **facts)
    return next(c.backend for c in OPERATOR.explain(request) if c.chosen)


def test_what_auto_takes_on_the_cpu() -> None:
    for facts in ({}, {"causal": True}, {"requires_grad": True}, {"key_padding": True}, {"mask": True}, {"bias": True}):
        assert chosen(96, **facts) == "sdpa"
        assert chosen(96, dtype=torch.bfloat16, **facts) == "sdpa"
    assert chosen(4096, causal=True) == "sdpa"
    assert chosen(4096, causal=True, window=(255, 0)) == "torch"
    assert chosen(4096, window=(None, 3)) == "sdpa"
    assert chosen(300, causal=True, window=(255, 0)) == "sdpa"
    assert chosen(1, 4096, causal=True, window=(255, 0)) == "sdpa"
    assert chosen(2048, causal=True, key_padding=True) == "torch"
    assert chosen(1024, bias=True, bias_requires_grad=True, requires_grad=True) == "torch"
    assert chosen(1024, dropout=0.1, requires_grad=True) == "torch"
    assert chosen(1024, value=32) == "sdpa"
    assert chosen(0, 5) == "sdpa"


def test_reasons_in_words() -> None:
    request = Request((2, 8, 4096, 64), (2, 2, 4096, 64), (2, 2, 4096, 64), requires_grad=True, window=(255, 0))
    said = {c.backend: c for c in OPERATOR.explain(request)}
    assert not said["flash_attn"].runs
    assert "NVIDIA GPU" in said["flash_attn"].reason
    assert said["sdpa"].runs
    assert "mask all but 256" in said["sdpa"].reason
    assert said["torch"].chosen
    assert not said["flex"].runs
    assert said["flex"].reason == "it has no backward on the CPU"
    assert "definition" in said["reference"].reason


@pytest.mark.parametrize(
    ("facts", "reason"),
    [
        ({"dtype": torch.float32}, "float16 or bfloat16, not float32"),
        ({"mask": True, "key_padding": True}, "takes no mask and no key_padding"),
        ({"bias": True}, "takes no bias"),
        ({"value": (1, 2, 9, 32)}, "same head size"),
        ({"query": (1, 2, 0, 64)}, "empty"),
        ({}, "flash-attn cannot be imported"),
    ],
    ids=str,
)
def test_why_flash_attn_does_not_run(facts: dict[str, Any], reason: str) -> None:
    try:
        import flash_attn  # noqa: F401
    except ImportError:
        pass
    else:
        if not facts:
            pytest.skip("flash-attn is installed")
    shape = (1, 2, 9, 64)
    request = Request(
        **{"query": shape, "key": shape, "value": shape, "dtype": torch.float16, "device": "cuda", **facts}
    )
    said = {c.backend: c for c in OPERATOR.explain(request)}["flash_attn"]
    assert not said.runs
    assert reason in said.reason


@pytest.mark.parametrize(
    ("dtype", "options", "reason"),
    [
        (torch.float32, {}, "no backward on the CPU"),
        (torch.float64, {}, "no float64 on the CPU"),
        (torch.float32, {"dropout": 0.1}, "no dropout"),
    ],
)
def test_flex_on_the_cpu_is_refused_with_the_reason(dtype: torch.dtype, options: dict[str, Any], reason: str) -> None:
    q, k, v = inputs(5, 5, dtype=dtype)
    if dtype is torch.float64:
        q, k, v = q.detach(), k.detach(), v.detach()
    with pytest.raises(
        BackendError, match=f"'flex' of softmax_attention cannot run here: it has {reason}.*sdpa, torch"
    ):
        softmax_attention(q, k, v, backend="flex", **options)


def test_flex_needs_a_compiler_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = (t.detach() for t in inputs(5, 5, dtype=torch.float32))
    monkeypatch.setenv("CXX", "no-such-compiler")
    monkeypatch.setattr(flex, "_build_tool_missing", flex._build_tool_missing.__wrapped__)
    with pytest.raises(BackendError, match="C\\+\\+ compiler, and no-such-compiler is not installed"):
        softmax_attention(q, k, v, backend="flex")


@pytest.mark.skipif(flex._build_tool_missing() is not None, reason="no C++ compiler for the CPU kernel")
def test_flex_runs_forward_where_it_is_asked_for() -> None:
    q, k, v = inputs(65, 70, key_heads=2, dtype=torch.float32)
    mask, padding = torch.rand(2, 1, 65, 70) > 0.3, torch.rand(2, 70) > 0.3
    mask[0, 0, 3] = False
    options = {"causal": True, "window": 40, "mask": mask, "key_padding_mask": padding, "bias": torch.randn(4, 65, 70)}
    with torch.no_grad():
        expected = softmax_attention(q, k, v, backend="reference", **options)
        assert expected[0, :, 3].abs().max() == 0
        found = softmax_attention(q, k, v, backend="flex", **options)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


# Errors


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"q": torch.zeros(4, 3, 8)}, r"must have shape \(B, H, L, D\)"),
        ({"k": torch.zeros(2, 4, 5, 7)}, "do not fit"),
        ({"v": torch.zeros(2, 4, 6, 8)}, "do not fit"),
        ({"k": torch.zeros(2, 3, 5, 8), "v": torch.zeros(2, 3, 5, 8)}, "3 heads of k and v must divide the 4 heads"),
        ({"v": torch.zeros(2, 4, 5, 8, dtype=torch.float64)}, "one floating dtype"),
        ({"mask": torch.zeros(3, 5)}, "mask must be boolean"),
        ({"mask": torch.zeros(3, 4) > 0}, r"mask of shape \(3, 4\) does not broadcast to .* \(2, 4, 3, 5\)"),
        ({"bias": torch.zeros(3, 5) > 0}, "bias must be floating point"),
        ({"bias": torch.zeros(1, 2, 4, 3, 5)}, "does not broadcast"),
        ({"key_padding_mask": torch.zeros(2, 5)}, "key_padding_mask must be boolean"),
        ({"key_padding_mask": torch.zeros(2, 4) > 0}, r"must have shape \(B, M\) = \(2, 5\)"),
        ({"window": 0}, "window must be at least 1"),
        ({"window": (1, -1)}, "each >= 0 or None"),
        ({"dropout": 1.0}, r"dropout must lie in \[0, 1\)"),
    ],
    ids=lambda x: next(iter(x)) if isinstance(x, dict) else "",
)
def test_what_does_not_fit_is_refused_in_a_sentence(changes: dict[str, Any], message: str) -> None:
    given = {"q": torch.zeros(2, 4, 3, 8), "k": torch.zeros(2, 4, 5, 8), "v": torch.zeros(2, 4, 5, 8), **changes}
    with pytest.raises(ValueError, match=message):
        softmax_attention(**given)


def test_unknown_backend() -> None:
    q = torch.zeros(1, 1, 2, 4)
    with pytest.raises(UnknownNameError, match="did you mean 'flash_attn'"):
        softmax_attention(q, q, q, backend="flash-attn")


def test_span() -> None:
    assert span(None) is None
    assert span(None, causal=True) is None
    assert span((None, 4), causal=True) is None
    assert span(3) == (2, 2)
    assert span(3, causal=True) == (2, 0)
    assert span((1, None)) == (1, None)
