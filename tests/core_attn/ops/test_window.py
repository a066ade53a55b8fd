"""window_attention: every form against the definition, the definition against a loop, and against local-attention."""

from __future__ import annotations

import itertools
import math
import random
from typing import Any

import pytest
import torch
from local_attention import LocalAttention
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from core_attn.dispatch import BackendError, Request
from core_attn.ops import softmax_attention, window_attention
from core_attn.ops.softmax import blocked as engine
from core_attn.ops.window import OPERATOR, blocked, reference
from core_attn.testing.harness import worst


def inputs(
    queries: int, keys: int, *, batch: int = 2, heads: int = 4, key_heads: int = 2, channels: int = 8, value: int = 6
) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(queries + 100 * keys)
    shapes = ((batch, heads, queries, channels), (batch, key_heads, keys, channels), (batch, key_heads, keys, value))
    return tuple(torch.randn(s, dtype=torch.float64).requires_grad_() for s in shapes)


def outcome(backend: str, leaves: list[Tensor], q: Tensor, k: Tensor, v: Tensor, **options: Any) -> list[Tensor]:
    """Output and all gradients, for a loss that treats no two elements alike."""
    out = window_attention(q, k, v, backend=backend, **options)
    probe = torch.sin(torch.arange(out.numel(), dtype=out.dtype)).view(out.shape)
    return [out, *torch.autograd.grad(out, leaves, probe)]


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of 4 queries and 5 keys, so that few tokens already meet every kind of border."""
    monkeypatch.setattr(engine, "_block_sizes", lambda left, right, *, on_cpu: (4, 5))


# The definition itself


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("queries", "keys"), [(7, 7), (4, 9), (9, 4)])
def test_definition_is_the_sum_it_says(causal: bool, queries: int, keys: int) -> None:
    """One query at a time, one key at a time, in Python floats."""
    q, k, v = inputs(queries, keys, batch=1, heads=2, key_heads=1, channels=3, value=2)
    left, right, dilation, sinks, everywhere = 1, 2, 2, 1, 2
    options = {"window": (left, right), "dilation": dilation, "sinks": sinks, "global_tokens": everywhere}
    for backend in ("reference", "torch"):
        out = window_attention(q, k, v, causal=causal, scale=0.7, backend=backend, **options)
        for h, i in itertools.product(range(2), range(queries)):
            place = i + keys - queries
            weights = {}
            for j in range(keys):
                steps, rest = divmod(j - place, dilation)
                near = rest == 0 and -left <= steps <= right
                if (near or j < sinks or j < everywhere or 0 <= place < everywhere) and not (causal and j > place):
                    weights[j] = math.exp(0.7 * sum(q[0, h, i, d].item() * k[0, 0, j, d].item() for d in range(3)))
            for d in range(2):
                expected = sum(w * v[0, 0, j, d].item() for j, w in weights.items()) / (sum(weights.values()) or 1.0)
                assert out[0, h, i, d].item() == pytest.approx(expected, abs=1e-14), backend


@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_which_keys_are_read(backend: str) -> None:
    q, v = torch.zeros(1, 1, 8, 2), torch.eye(8)[None, None]

    def rows(**options: Any) -> list[str]:
        weights = window_attention(q, q, v, backend=backend, **options)[0, 0]
        return ["".join(".x"[int(w > 0)] for w in row) for row in weights]

    sinks = ["x.......", "xx......", "xxx.....", "x.xx....", "x..xx...", "x...xx..", "x....xx.", "x.....xx"]
    assert rows(window=2, causal=True, sinks=1) == sinks
    assert rows(window=2, causal=True, global_tokens=1) == sinks
    assert rows(window=2, dilation=3)[3:5] == ["x..x..x.", ".x..x..x"]
    assert rows(window=(2, 0), dilation=2, causal=True)[6] == "..x.x.x."
    assert rows(window=1, global_tokens=2)[:3] == ["xxxxxxxx", "xxxxxxxx", "xxx....."]
    assert rows(window=1, sinks=2)[:3] == ["xx......", "xx......", "xxx....."]


@pytest.mark.parametrize("counts", [(9, 9, 2, 0, 3), (9, 9, 2, 2, 3), (5, 9, 1, 0, 8), (20, 20, 3, 4, 0)])
def test_pairs_are_those_the_definition_allows(counts: tuple[int, ...]) -> None:
    queries, keys, left, right, sinks = counts
    keep = reference.allowed(queries, keys, window=(left, right), causal=right == 0, sinks=sinks)
    assert reference.pairs(queries, keys, left=left, right=right, sinks=sinks) == keep.sum()


# Against a package


@pytest.mark.parametrize("window", [1, 5, 16])
def test_local_attention_package(window: int) -> None:
    """`exact_windowsize` of local-attention counts the keys before the query, without itself: one more than ours."""
    q, k, v = inputs(80, 80, key_heads=4, value=8)  # whole windows: the package reads its own padding
    theirs: dict[str, Any] = {"window_size": window, "autopad": True, "use_rotary_pos_emb": False}
    for causal in (True, False):
        module = LocalAttention(causal=causal, exact_windowsize=True, **theirs)
        theirs_out = module(q, k, v)
        expected = [theirs_out, *torch.autograd.grad(theirs_out.sin().sum(), [q, k, v])]
        ours = window_attention(q, k, v, window=window + 1, causal=causal, backend="torch")
        found = [ours, *torch.autograd.grad(ours.sin().sum(), [q, k, v])]
        assert worst(found, expected) < 1e-12
        short = window_attention(q, k, v, window=window, causal=causal)
        assert (short - theirs_out).abs().max() > 1e-2


def test_local_attention_package_without_exact_windows_reads_up_to_two_windows() -> None:
    q, k, v = inputs(32, 32, key_heads=4, value=8)
    out = LocalAttention(window_size=8, causal=True, use_rotary_pos_emb=False)(q, k, v)
    block = torch.arange(32) // 8
    place = torch.arange(32)
    mask = (place[:, None] >= place) & (block[:, None] - block <= 1)
    torch.testing.assert_close(out, softmax_attention(q, k, v, mask=mask), rtol=0, atol=1e-12)


# The blocked form against the definition


def draw(seed: int) -> tuple[list[Tensor], dict[str, Any]]:
    """Leaves q, k, v (and sink_q), and options: lengths 0, 1, primes; strides; NaN under masks; no keys."""
    pick = random.Random(seed)
    torch.manual_seed(seed)
    queries = pick.choice([0, 1, 2, 3, 7, 13, 31, 40])
    keys = pick.choice([queries, queries, queries, 0, 1, 5, 17, 43])
    batch, groups, shared = pick.choice([1, 2]), pick.choice([1, 2]), pick.choice([1, 2])
    channels, value = pick.choice([(1, 3), (4, 4), (5, 2)])
    options: dict[str, Any] = {
        "window": pick.choice([1, 3, 6, (2, 0), (0, 4), (None, 2), (3, None), None]),
        "causal": pick.random() < 0.5,
        "dilation": pick.choice([1, 1, 2, 3, 50]),
        "sinks": pick.choice([0, 0, 1, 4, 60]),
        "global_tokens": pick.choice([0, 0, 2, 5]),
    }

    def tensor(heads: int, length: int, width: int) -> Tensor:
        layout = pick.choice(["plain", "heads last", "wide", "expanded"])
        if layout == "heads last":
            return torch.randn(batch, length, heads, width, dtype=torch.float64).transpose(1, 2)
        if layout == "wide":
            return torch.randn(batch, heads, length, 2 * width, dtype=torch.float64)[..., ::2]
        if layout == "expanded":
            return torch.randn(1, heads, length, width, dtype=torch.float64).expand(batch, -1, -1, -1)
        return torch.randn(batch, heads, length, width, dtype=torch.float64)

    leaves = [tensor(groups * shared, queries, channels), tensor(groups, keys, channels), tensor(groups, keys, value)]
    if options["sinks"] and not options["global_tokens"] and pick.random() < 0.7:
        leaves.append(tensor(groups * shared, queries, channels))
    if pick.random() < 0.4:
        mask = torch.rand(batch, keys) > pick.choice([0.3, 1.0])
        options["key_padding_mask"] = mask
        for i in (1, 2):
            leaves[i] = leaves[i].masked_fill(~mask[:, None, :, None], pick.choice([math.nan, math.inf, 1e30]))
    return [x.detach().requires_grad_() for x in leaves], options


@pytest.mark.parametrize("blocks", ["small", "real"])
def test_random_draws(blocks: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if blocks == "small":
        monkeypatch.setattr(engine, "_block_sizes", lambda left, right, *, on_cpu: (4, 5))
    for seed in range(200):
        leaves, options = draw(seed)
        if len(leaves) == 4:
            options["sink_q"] = leaves[3]
        expected = outcome("reference", leaves, *leaves[:3], **options)
        found = outcome("torch", leaves, *leaves[:3], **options)
        assert all(x.isfinite().all() for x in found), seed
        assert worst(found, expected) < 1e-12, (seed, options)
        low = [x.detach().float().requires_grad_() for x in leaves]
        if len(low) == 4:
            options["sink_q"] = low[3]
        assert worst(outcome("torch", low, *low[:3], **options), expected) < 1e-5, (seed, options)


def test_real_block_sizes_over_several_blocks() -> None:
    for options in (
        {"sinks": 3, "window": 200, "causal": True},
        {"dilation": 3, "window": (50, 30), "sinks": 600},
        {"global_tokens": 150, "window": 20},
        {"dilation": 2, "window": 70, "global_tokens": 5, "causal": True},
    ):
        q, k, v = inputs(700, 1100, batch=1, heads=2, key_heads=1, channels=4, value=4)
        expected = outcome("reference", [q, k, v], q, k, v, **options)
        assert worst(outcome("torch", [q, k, v], q, k, v, **options), expected) < 1e-12


@pytest.mark.parametrize("options", [{"sinks": 4}, {"dilation": 2}, {"global_tokens": 3}], ids=str)
def test_bfloat16_no_worse_than_twice_torch(options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 4, 127, 64).bfloat16().requires_grad_() for _ in range(3))
    exact = [x.detach().double().requires_grad_() for x in (q, k, v)]
    options = {"window": 40, "causal": True, **options}
    expected = outcome("reference", exact, *exact, **options)
    mask = reference.allowed(127, 127, **{**options, "window": (39, 0)})
    theirs = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    probe = torch.sin(torch.arange(theirs.numel(), dtype=theirs.dtype)).view(theirs.shape)
    theirs = [theirs, *torch.autograd.grad(theirs, [q, k, v], probe)]
    allowed = [(a.double() - b).norm().item() for a, b in zip(theirs, expected)]
    for backend in ("torch", "reference"):
        found = outcome(backend, [q, k, v], q, k, v, **options)
        errors = [(a.double() - b).norm().item() for a, b in zip(found, expected)]
        assert all(a <= 2 * b for a, b in zip(errors, allowed)), (backend, errors, allowed)


@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_rows_without_keys_are_zero_with_zero_gradients(small_blocks: None, backend: str) -> None:
    q, k, v = inputs(9, 9)
    padding = torch.ones(2, 9, dtype=torch.bool)
    padding[0, :4] = False
    padding[1] = False
    options = {"window": 2, "causal": True, "sinks": 2, "key_padding_mask": padding}
    out, dq, dk, dv = outcome(backend, [q, k, v], q, k, v, **options)
    for x in (out, dq):
        assert x[0, :, :4].abs().max() == x[1].abs().max() == 0
        assert x[0, :, 5:].abs().min() > 0
    assert dk[0, :, :4].abs().max() == dv[0, :, :4].abs().max() == dk[1].abs().max() == dv[1].abs().max() == 0


def test_causal_means_no_leak() -> None:
    q, k, v = inputs(30, 30, key_heads=4)
    for options in ({"sinks": 20}, {"global_tokens": 20}, {"dilation": 2, "sinks": 3}):
        out = window_attention(q, k, v, window=(3, 5), causal=True, **options)
        dk, dv = torch.autograd.grad(out[:, :, :10].sum(), [k, v])
        assert dk[:, :, 10:].abs().max() == dv[:, :, 10:].abs().max() == 0
        assert dv[:, :, :10].abs().min() > 0


# The blocked form as an operator of torch


def test_gradcheck(small_blocks: None) -> None:
    q, k, v = inputs(6, 7, batch=1, heads=2, key_heads=1, channels=3, value=2)
    sink_q = torch.randn_like(q).requires_grad_()

    def call(q: Tensor, k: Tensor, v: Tensor, sink_q: Tensor) -> Tensor:
        return window_attention(q, k, v, window=(2, 1), dilation=2, sinks=2, sink_q=sink_q, backend="torch")

    assert torch.autograd.gradcheck(call, (q, k, v, sink_q))


def test_opcheck() -> None:
    q, k, v = inputs(5, 7, batch=1, heads=2, key_heads=1, channels=3, value=2)
    padding = torch.rand(1, 7) > 0.3
    torch.library.opcheck(blocked._op._opoverload, (q, k, v, padding, None, 2, 1, False, 2, 1, 2, 0.5))
    low = [x.detach().float().requires_grad_() for x in (q, k, v, q)]
    torch.library.opcheck(blocked._op._opoverload, (*low[:3], None, low[3], 1, 0, True, 1, 2, 0, 0.5))


def test_compiles_and_exports() -> None:
    class Call(torch.nn.Module):
        def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return window_attention(q, k, v, window=3, causal=True, dilation=2, sinks=2, sink_q=-q)

    compiled = torch.compile(Call(), fullgraph=True, backend="aot_eager", dynamic=True)
    for length in (5, 8):
        leaves = inputs(length, length, key_heads=4, value=8)
        for ours, eager in zip(
            torch.autograd.grad(compiled(*leaves).sin().sum(), leaves),
            torch.autograd.grad(Call()(*leaves).sin().sum(), leaves),
        ):
            torch.testing.assert_close(ours, eager, rtol=0, atol=1e-12)
    dim = torch.export.Dim("L", min=2, max=4096)
    example = tuple(x.detach() for x in inputs(9, 9))
    exported = torch.export.export(Call(), example, dynamic_shapes={key: {2: dim} for key in "qkv"})
    other = tuple(x.detach() for x in inputs(300, 300))
    torch.testing.assert_close(exported.module()(*other), Call()(*other), rtol=0, atol=1e-12)


def test_second_derivative_is_refused_in_words() -> None:
    q, k, v = inputs(3, 3)
    (grad,) = torch.autograd.grad(window_attention(q, k, v, window=2, sinks=1).sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative; use backend='reference'"):
        torch.autograd.grad(grad.sum(), k)


@pytest.mark.parametrize("sink_q", [False, True])
def test_autocast(sink_q: bool) -> None:
    q, k, v = (x.detach().float() for x in inputs(9, 9))
    options = {"window": 3, "causal": True, "sinks": 2, "sink_q": -q if sink_q else None}
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = window_attention(q, k, v, **options)
    assert out.dtype is torch.bfloat16
    options["sink_q"] = -q.bfloat16() if sink_q else None
    assert torch.equal(out, window_attention(q.bfloat16(), k.bfloat16(), v.bfloat16(), **options))


# What it costs


class LargestTensor(TorchDispatchMode):
    """Remembers the number of elements of the largest tensor that any operation made."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, list | tuple) else (out,):
            if isinstance(x, Tensor):
                self.elements = max(self.elements, x.numel())
        return out


def run_both_ways(length: int, dilation: int, shared: int, readers: int) -> None:
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 1, length, 8) for _ in range(3))
    options = (None, None, 99, 0 if not readers else 99, not readers, dilation, shared, readers, 0.3)
    out, lse = blocked._forward(q, k, v, *options)
    blocked._backward(out, out, lse, q, k, v, *options)


@pytest.mark.parametrize("options", [(1, 4, 0), (4, 4, 0), (1, 8, 8)], ids=str)
def test_time_and_memory_are_linear(options: tuple[int, int, int]) -> None:
    largest, flops = [], []
    for length in (4096, 8192):
        with LargestTensor() as seen, FlopCounterMode(display=False) as counter:
            run_both_ways(length, *options)
        largest.append(seen.elements)
        flops.append(counter.get_total_flops())
    assert largest[1] <= max(2 * largest[0], 128 * 512)
    assert largest[1] <= 8192 * 16
    assert flops[1] == pytest.approx(2 * flops[0], rel=0.05)
    # 7 products of a query with a key, 8 channels, 2 operations each; at the borders blocks read a little more.
    _, shared, readers = options
    pairs = 8192 * ((199 if readers else 100) + shared + readers)
    assert flops[1] <= 1.35 * 7 * 2 * 8 * pairs


# Which backend runs, and what is refused


def test_a_plain_window_runs_what_softmax_attention_runs() -> None:
    q, k, v = inputs(9, 9, key_heads=4, value=8)
    for backend in ("auto", "sdpa", "torch", "reference"):
        ours = window_attention(q, k, v, window=3, causal=True, backend=backend)
        assert torch.equal(ours, softmax_attention(q, k, v, window=3, causal=True, backend=backend))
    request = Request((2, 8, 4096, 64), (2, 8, 4096, 64), (2, 8, 4096, 64), causal=True, window=(255, 0))
    chosen = {c.backend: c for c in OPERATOR.explain(request)}
    assert "mask all but 256" in chosen["sdpa"].reason
    more = {c.backend: c for c in OPERATOR.explain(request._replace(options={"sinks": 4}))}
    assert more["torch"].chosen
    assert more["sdpa"].reason == "it computes windows without dilation, sinks and global tokens only"
    assert "definition" in more["reference"].reason


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"window": 0}, "window must be at least 1"),
        ({"window": (1, -1)}, "each >= 0 or None"),
        ({"window": 2, "dilation": 0}, "dilation must be at least 1, got 0"),
        ({"window": 2, "sinks": -1}, "at least 0, got -1 and 0"),
        ({"window": 2, "global_tokens": -2}, "at least 0, got 0 and -2"),
        ({"window": 2, "sinks": 1, "sink_q": torch.zeros(1)}, "must have the shape"),
        ({"window": 2, "sinks": 1, "global_tokens": 1, "sink_q": torch.zeros(1)}, "it must be None"),
        ({"window": 2, "key_padding_mask": torch.ones(2, 4)}, "must be boolean"),
    ],
    ids=str,
)
def test_bad_input_is_refused_in_one_sentence(options: dict[str, Any], message: str) -> None:
    q = torch.zeros(2, 2, 4, 3)
    with pytest.raises(ValueError, match=message) as error:
        window_attention(q, q, q, **options)
    assert "\n" not in str(error.value)


def test_a_backend_that_cannot_is_refused() -> None:
    q = torch.zeros(2, 2, 4, 3)
    with pytest.raises(BackendError, match="without dilation, sinks and global tokens only; these would run: torch"):
        window_attention(q, q, q, window=2, sinks=1, backend="sdpa")
