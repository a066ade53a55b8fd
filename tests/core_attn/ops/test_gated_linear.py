"""Gated linear attention: every form is the recurrence, whatever the gates, in values and gradients."""

from __future__ import annotations

import random
import threading
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from core_attn.dispatch import Request
from core_attn.ops import gated_linear_attention, gated_linear_step
from core_attn.ops.gated_linear import OPERATOR, chunked
from core_attn.testing import growth

LIMIT = {torch.float64: 1e-12, torch.float32: 1e-5}


@pytest.fixture(scope="module")
def naive() -> Callable[..., tuple[Tensor, Tensor]]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from fla.ops.gla.naive import naive_recurrent_gla
    return naive_recurrent_gla


def gates(kind: str, *shape: int, generator: torch.Generator | None = None) -> Tensor:
    """Log-gates in float64: as the paper's layers make them, moderate, strong, or of all sizes beside each other."""
    noise = torch.randn(*shape, generator=generator, dtype=torch.float64)
    if kind == "usual":
        return F.logsigmoid(noise) / 16
    if kind == "moderate":
        return F.logsigmoid(noise)
    if kind == "strong":
        return -30 * torch.rand(*shape, generator=generator, dtype=torch.float64)
    if kind == "none":
        return torch.zeros(shape, dtype=torch.float64)
    return -(noise * 3).exp().clamp(max=1000.0)


def inputs(
    length: int, kind: str = "usual", *, batch: int = 2, heads: int = 2, width: int = 5, values: int = 3, seed: int = 0
) -> list[Tensor]:
    """q, k, v, log-gates and an initial state, float64, of which gradients are taken."""
    g = torch.Generator().manual_seed(seed)
    q, k = (torch.randn(batch, heads, length, width, generator=g, dtype=torch.float64) for _ in range(2))
    v = torch.randn(batch, heads, length, values, generator=g, dtype=torch.float64)
    state = torch.randn(batch, heads, width, values, generator=g, dtype=torch.float64)
    return [x.requires_grad_() for x in (q, k, v, gates(kind, *q.shape, generator=g), state)]


def call(leaves: list[Tensor], **options: Any) -> tuple[Tensor, Tensor]:
    q, k, v, g, *state = leaves
    options = {"initial_state": state[0] if state else None, **options}
    out, final = gated_linear_attention(q, k, v, log_gate=g, return_state=True, **options)
    return out, final


def with_gradients(leaves: list[Tensor], **options: Any) -> list[Tensor]:
    out, state = call(leaves, **options)
    loss = (out * wave(out)).sum() + (state * wave(state).flip(-1)).sum()
    found = torch.autograd.grad(loss, leaves, allow_unused=True)
    return [out.detach(), state.detach(), *(torch.zeros_like(x) if d is None else d for x, d in zip(leaves, found))]


def wave(x: Tensor) -> Tensor:
    """An upstream gradient that is the same number in every dtype."""
    return ((7 * torch.arange(x.numel()) % 17 - 8) / 8).to(x.dtype).view(x.shape)


def error(a: Tensor, b: Tensor) -> float:
    """Largest difference, relative to the largest element where that is above 1."""
    return float(((a - b).abs().max() / b.abs().max().clamp(min=1.0)).detach()) if a.numel() else 0.0


def cast(leaves: list[Tensor], dtype: torch.dtype) -> list[Tensor]:
    return [x.detach().to(dtype).requires_grad_() for x in leaves]


@pytest.mark.parametrize("backend", ["torch", "recurrent"])
@pytest.mark.parametrize("kind", ["usual", "moderate", "strong", "all", "none"])
@pytest.mark.parametrize("length", [1, 2, 3, 7, 63, 64, 65, 130])
def test_forms_are_the_definition(length: int, kind: str, backend: str) -> None:
    leaves = inputs(length, kind)
    right = with_gradients(leaves, backend="reference")
    for dtype, limit in LIMIT.items():
        # The definition of the rounded inputs, so that only the computation is compared.
        given = cast(leaves, dtype)
        expected = right if dtype is torch.float64 else with_gradients(cast(given, torch.float64), backend="reference")
        for a, b in zip(with_gradients(given, backend=backend), expected, strict=True):
            assert a.dtype is dtype
            assert error(a, b) < limit


def test_200_draws() -> None:
    """Random shapes, strides, gate strengths and types: finite, and equal to the definition."""
    draw = random.Random(0)
    for turn in range(200):
        length = draw.choice([0, 1, 2, 5, 16, 31, 64, 65, 97, 127, 129])
        sizes = {
            "batch": draw.choice([0, 1, 3]) if turn % 9 == 0 else draw.choice([1, 2]),
            "heads": draw.choice([1, 3]),
        }
        kind = draw.choice(["usual", "moderate", "strong", "all", "none"])
        width, values = draw.choice([1, 4, 7, 16]), draw.choice([1, 4, 9])
        leaves = inputs(length, kind, width=width, values=values, seed=turn, **sizes)[: draw.choice([4, 5])]
        if draw.random() < 0.3:  # gates that close at some places
            leaves[3] = leaves[3].detach().where(inputs(length, seed=turn + 1, width=width, **sizes)[0] < 1, -1e4)
            leaves[3].requires_grad_()
        dtype = draw.choice([torch.float64, torch.float32, torch.bfloat16])
        given = cast(leaves, dtype)
        if draw.random() < 0.4:  # strides of a projection split into heads
            given = [x.detach().transpose(1, 2).contiguous().transpose(1, 2).requires_grad_() for x in given]
        options = {"scale": draw.choice([None, 0.3])}
        right = with_gradients(cast(given, torch.float64), backend="reference", **options)
        found = with_gradients(given, backend="torch", **options)
        assert found[0].dtype is dtype
        assert found[1].dtype is (torch.float64 if dtype is torch.float64 else torch.float32)
        for a, b in zip(found, right, strict=True):
            assert a.isfinite().all(), (turn, kind, dtype)
            # bfloat16 results are rounded once: to 8 bits.
            assert error(a.double(), b) < LIMIT.get(dtype, 5e-3), (turn, kind, dtype)


@pytest.mark.parametrize("kind", ["usual", "moderate", "strong"])
@pytest.mark.parametrize("backend", ["torch", "recurrent", "reference"])
def test_agrees_with_flash_linear_attention(naive: Any, backend: str, kind: str, monkeypatch: Any) -> None:
    """Its own reference works in float32; with `float` made to keep float64 it is the same in all digits."""
    for dtype, limit in LIMIT.items():
        leaves = cast(inputs(97, kind)[:4], dtype)
        with monkeypatch.context() as patch:
            if dtype is torch.float64:
                patch.setattr(Tensor, "float", Tensor.double)
            out, state = naive(*(x.transpose(1, 2) for x in leaves), output_final_state=True)
        out = out.transpose(1, 2)
        loss = (out * wave(out)).sum() + (state * wave(state).flip(-1)).sum()
        right = [out, state, *torch.autograd.grad(loss, leaves)]
        for a, b in zip(with_gradients(leaves, backend=backend), right, strict=True):
            assert error(a, b) < limit
    leaves = cast(inputs(33, kind), torch.float32)
    theirs = naive(*(x.transpose(1, 2) for x in leaves[:4]), initial_state=leaves[4], output_final_state=True)
    for a, b in zip(call(leaves, backend=backend), (theirs[0].transpose(1, 2), theirs[1]), strict=True):
        assert error(a, b) < 1e-5


def test_parallel_form() -> None:
    """All weights at once, from differences of the running sums of the log-gates; no state."""
    q, k, v, g, _ = inputs(40, "moderate")
    b = g.cumsum(2)
    falls = (b[:, :, :, None] - b[:, :, None]).masked_fill(~torch.ones(40, 40).tril().bool()[..., None], float("-inf"))
    weights = torch.einsum("bhid,bhjd,bhijd->bhij", q, k, falls.exp())
    assert error(gated_linear_attention(q, k, v, log_gate=g, scale=0.5), 0.5 * weights @ v) < 1e-12


@pytest.mark.parametrize("pieces", [[1] * 70, [70], [64, 1, 5], [3, 66, 1]], ids=len)
@pytest.mark.parametrize("kind", ["usual", "strong"])
def test_steps_are_the_whole(pieces: list[int], kind: str) -> None:
    for dtype, limit in LIMIT.items():
        leaves = cast(inputs(70, kind), dtype)
        right = with_gradients(leaves)
        q, k, v, g, state = leaves
        outs = []
        for part in zip(*(x.split(pieces, dim=2) for x in (q, k, v, g)), strict=True):
            out, state = gated_linear_step(*part[:3], log_gate=part[3], state=state)
            outs.append(out)
        whole = torch.cat(outs, dim=2)
        loss = (whole * wave(whole)).sum() + (state * wave(state).flip(-1)).sum()
        for a, b in zip([whole, state, *torch.autograd.grad(loss, leaves)], right, strict=True):
            assert error(a, b) < limit


def test_steps_without_gradients_take_the_recurrence_and_keep_the_state_given() -> None:
    q, k, v, g, state = (x.detach() for x in inputs(3))
    kept = state.clone()
    a = gated_linear_step(q, k, v, log_gate=g, state=state)
    b = gated_linear_attention(q, k, v, log_gate=g, initial_state=state, return_state=True, backend="reference")
    assert all(error(x, y) < 1e-14 for x, y in zip(a, b))
    assert torch.equal(state, kept)
    few, many = ((1, 2, n, 8) for n in (1, 100))
    assert OPERATOR.choose(Request(few, few, few)).name == "recurrent"
    assert OPERATOR.choose(Request(few, few, few, requires_grad=True)).name == "torch"
    assert OPERATOR.choose(Request(many, many, many)).name == "torch"


def test_closed_gates_forget_everything() -> None:
    """A log-gate of minus infinity is a gate of 0: what was before the token does not exist for it."""
    q, k, v, g, state = inputs(90, "moderate")
    with torch.no_grad():
        g[:, :, 37] = -float("inf")
        g[:, :, 64] = -float("inf")
    found = with_gradients([q, k, v, g, state], backend="torch")
    assert all(x.isfinite().all() for x in found)
    part = [x.detach()[:, :, 64:] for x in (q, k, v, g)]
    part[3][:, :, 0] = 0.0
    alone, final = call(part, backend="reference")
    assert error(found[0][:, :, 64:], alone) < 1e-12
    assert error(found[1], final) < 1e-12
    assert found[2 + 3][:, :, 64].abs().max() < 1e-12


@pytest.mark.parametrize("kind", ["usual", "moderate", "strong", "all"])
def test_65536_tokens(kind: str) -> None:
    """Finite and right at the end of a long sequence, whose sums of log-gates reach a million."""
    length = 65_536
    leaves = cast(inputs(length, kind, batch=1, heads=1, width=8, values=8)[:4], torch.float32)
    found = with_gradients(leaves, backend="torch")
    assert all(x.isfinite().all() for x in found)
    # In float64 the same, and at the end also the definition, from the state that float64 has there.
    right = with_gradients(cast(leaves, torch.float64), backend="torch")
    for a, b in zip(found, right, strict=True):
        assert error(a.double(), b) < 1e-5
    double = [x.detach().double() for x in leaves]
    state = call([x[:, :, :-100] for x in double])[1]
    tail = call([*(x[:, :, -100:] for x in double), state], backend="reference")
    assert error(found[0][:, :, -100:].double(), tail[0]) < 1e-5
    assert error(found[1].double(), tail[1]) < 1e-5


def test_bfloat16_keeps_its_state_in_float32() -> None:
    """10,000 tokens that are all the same: with a bfloat16 state the sum would stop at 256."""
    ones = torch.ones(1, 1, 10_000, 1, dtype=torch.bfloat16)
    for backend in ("torch", "recurrent"):
        out, state = gated_linear_attention(
            ones, ones, ones, log_gate=torch.zeros_like(ones), scale=1.0, return_state=True, backend=backend
        )
        assert out.dtype is torch.bfloat16
        assert state.dtype is torch.float32
        assert state.item() == 10_000.0
        assert out[0, 0, -1].item() == 9984.0  # the bfloat16 next to 10,000


def test_gates_may_be_finer_than_the_rest() -> None:
    leaves = inputs(100)[:4]
    low = [*(x.detach().bfloat16().requires_grad_() for x in leaves[:3]), leaves[3].detach().float().requires_grad_()]
    found = with_gradients(low)
    right = with_gradients(cast(low, torch.float64), backend="reference")
    assert [x.dtype for x in found[2:]] == [torch.bfloat16] * 3 + [torch.float32]
    for a, b in zip(found, right, strict=True):
        assert error(a.double(), b) < 5e-3


@pytest.mark.parametrize("backend", ["torch", "recurrent", "reference"])
def test_no_tokens(backend: str) -> None:
    leaves = inputs(0)
    out, state, *gradients = with_gradients(leaves, backend=backend)
    assert out.shape == (2, 2, 0, 3)
    assert torch.equal(state, leaves[4])
    assert torch.equal(gradients[4], wave(state).flip(-1))
    assert not call(leaves[:4], backend=backend)[1].any()


@pytest.mark.parametrize("kind", ["usual", "strong"])
def test_memory_kept_between_calls_is_nobody_elses(kind: str) -> None:
    """Other calls in between, other sizes, threads, inference mode: the same results to the last bit, of no memory."""
    given = [cast(inputs(length, kind, seed=length), torch.float32) for length in (150, 70, 1000)]
    right = [with_gradients(leaves) for leaves in given]
    outs = [call(leaves) for leaves in given]
    with torch.inference_mode():
        frozen = [call(leaves) for leaves in given]
    for (out, state), alone, expected, leaves in zip(outs, frozen, right, given, strict=True):
        assert torch.equal(alone[0], expected[0])
        loss = (out * wave(out)).sum() + (state * wave(state).flip(-1)).sum()
        for _ in range(2):  # backward twice, behind other calls
            found = [out, state, *torch.autograd.grad(loss, leaves, retain_graph=True)]
            assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    with ThreadPoolExecutor(4) as pool:
        turns = [turn % 3 for turn in range(24)]
        for turn, found in zip(turns, pool.map(lambda turn: with_gradients(given[turn]), turns)):
            assert all(torch.equal(a, b) for a, b in zip(found, right[turn], strict=True))


def test_a_call_in_the_middle_of_another_has_memory_of_its_own() -> None:
    x = torch.empty(1)
    with chunked._room(x, torch.float32) as outer:
        kept = outer("read", 8)
        with chunked._room(x, torch.float32) as inner:
            assert inner is not outer
            assert inner("read", 8).data_ptr() != kept.data_ptr()
    with chunked._room(x, torch.float32) as again, chunked._room(x, torch.float64) as other:
        assert again is outer
        assert other is not outer
        assert again("read", 4).data_ptr() == kept.data_ptr()
    with pytest.raises(KeyError), chunked._room(x, torch.float32):
        raise KeyError
    with chunked._room(x, torch.float32) as new:
        assert new is not outer


def test_memory_kept_between_calls_is_small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the sizes: about 4 MB, for strong gates three times as much."""
    monkeypatch.setattr(chunked, "_thread", threading.local())
    for kind, limit in {"usual": 5e6, "strong": 13e6}.items():
        for length in (64, 5000):
            for width in (8, 64, 256):
                with_gradients(cast(inputs(length, kind, batch=1, width=width, values=width), torch.float32))
        with chunked._room(torch.empty(1), torch.float32) as room:
            assert 0 < sum(x.untyped_storage().nbytes() for x in room.held.values()) < limit


@pytest.mark.parametrize("kind", ["usual", "strong"])
def test_finite_differences(kind: str) -> None:
    leaves = inputs(6, kind, batch=1, heads=1, width=3, values=2)
    with torch.no_grad():
        leaves[3] -= 1e-3
    assert torch.autograd.gradcheck(lambda *x: call(list(x), backend="torch"), leaves)
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.gradgradcheck(lambda *x: call(list(x), backend="torch"), leaves)
    assert torch.autograd.gradgradcheck(lambda *x: call(list(x), backend="reference"), leaves)


def test_operator_is_well_formed() -> None:
    """Schema, fake tensors and autograd registration, as torch.compile and torch.export rely on them."""
    leaves = cast(inputs(70), torch.float32)
    torch.library.opcheck(chunked._op._opoverload, (*leaves, 0.5))
    torch.library.opcheck(chunked._op._opoverload, (*leaves[:4], None, 0.5))
    frozen = [x.detach().bfloat16() for x in leaves]
    torch.library.opcheck(chunked._op._opoverload, (*frozen, 0.5))


def test_compiles_and_autocasts() -> None:
    leaves = cast(inputs(70), torch.float32)
    compiled = torch.compile(lambda *x: call(list(x)), backend="aot_eager", fullgraph=True)
    right = with_gradients(leaves)
    out, state = compiled(*leaves)
    loss = (out * wave(out)).sum() + (state * wave(state).flip(-1)).sum()
    for a, b in zip([out, state, *torch.autograd.grad(loss, leaves)], right, strict=True):
        assert error(a, b) < 1e-6
    with torch.autocast("cpu", torch.bfloat16):
        low, state = call(leaves)
    assert low.dtype is torch.bfloat16
    assert state.dtype is torch.float32
    assert error(low.float(), right[0]) < 0.05


@pytest.mark.parametrize("kind", ["usual", "strong"])
def test_growth(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    counts = []
    for length in (512, 16_384):
        monkeypatch.setattr(chunked, "_thread", threading.local())  # with nothing kept from calls before
        leaves = cast(inputs(length, kind, batch=1, heads=1, width=8, values=8), torch.float32)
        counts.append(growth.count(lambda leaves=leaves: call(leaves)[0].sum().backward()))
    assert counts[1].work / counts[0].work < 33
    assert counts[1].peak_bytes / counts[0].peak_bytes < 33


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"q": torch.randn(2, 2, 5)}, r"shape \(B, H, L, D\)"),
        ({"k": torch.randn(2, 1, 5, 4), "v": torch.randn(2, 1, 5, 3)}, "as many heads and tokens"),
        ({"q": torch.randn(2, 2, 4, 4)}, "as many heads and tokens"),
        ({"v": torch.randn(2, 2, 6, 3)}, "do not fit"),
        ({"log_gate": torch.zeros(2, 2, 5, 3)}, "of the shape of k"),
        ({"log_gate": torch.zeros(2, 2, 5, 4, dtype=torch.long)}, "must be floating point"),
        ({"log_gate": torch.full((2, 2, 5, 4), 0.5)}, "at most 0"),
        ({"initial_state": torch.zeros(2, 2, 3, 4)}, r"\(B, H, D, Dv\) = \(2, 2, 4, 3\)"),
        ({"backend": "fast"}, "backend"),
    ],
)
def test_errors(change: dict[str, Any], says: str) -> None:
    arguments = {"q": torch.randn(2, 2, 5, 4), "k": torch.randn(2, 2, 5, 4), "v": torch.randn(2, 2, 5, 3)}
    arguments = {**arguments, "log_gate": torch.zeros(2, 2, 5, 4), **change}
    with pytest.raises(ValueError, match=says):
        gated_linear_attention(**arguments)
