"""Linear attention with scalar decay: every form is the recurrence, whatever the decays, in values and gradients."""

from __future__ import annotations

import random
import warnings
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from core_attn.dispatch import Request
from core_attn.ops import scalar_decay_attention, scalar_decay_step
from core_attn.ops.scalar_decay import OPERATOR, chunked
from core_attn.testing import growth

LIMIT = {torch.float64: 1e-12, torch.float32: 1e-5}
KINDS = ["weak", "moderate", "strong", "all", "none"]


@pytest.fixture(scope="module")
def naive() -> SimpleNamespace:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from fla.ops.retention.naive import naive_retention
        from fla.ops.simple_gla.naive import (
            naive_chunk_simple_gla,
            naive_parallel_simple_gla,
            naive_recurrent_simple_gla,
        )
    return SimpleNamespace(
        retention=naive_retention,
        recurrent=naive_recurrent_simple_gla,
        parallel=naive_parallel_simple_gla,
        chunk=naive_chunk_simple_gla,
    )


def decays(kind: str, *shape: int, generator: torch.Generator | None = None) -> Tensor:
    """Log-decays in float64: weak as retention's, moderate, strong, of all sizes beside each other, or none."""
    noise = torch.randn(*shape, generator=generator, dtype=torch.float64)
    if kind == "weak":
        return F.logsigmoid(noise) / 16
    if kind == "moderate":
        return F.logsigmoid(noise)
    if kind == "strong":
        return -30 * torch.rand(*shape, generator=generator, dtype=torch.float64)
    if kind == "none":
        return torch.zeros(shape, dtype=torch.float64)
    return -(noise * 3).exp().clamp(max=1000.0)


def inputs(
    length: int,
    kind: str = "weak",
    *,
    fixed: bool = False,
    batch: int = 2,
    heads: int = 2,
    groups: int | None = None,
    width: int = 5,
    values: int = 3,
    seed: int = 0,
) -> list[Tensor]:
    """q, k, v, log-decays and an initial state, float64, of which gradients are taken."""
    g = torch.Generator().manual_seed(seed)
    shape = (batch, heads if groups is None else groups, length, width)
    q, k = (torch.randn(*shape, generator=g, dtype=torch.float64) for _ in range(2))
    v = torch.randn(batch, heads, length, values, generator=g, dtype=torch.float64)
    state = torch.randn(batch, heads, width, values, generator=g, dtype=torch.float64)
    decay = decays(kind, *((heads,) if fixed else (batch, heads, length)), generator=g)
    return [x.requires_grad_() for x in (q, k, v, decay, state)]


def call(leaves: list[Tensor], **options: Any) -> tuple[Tensor, Tensor]:
    q, k, v, g, *state = leaves
    options = {"initial_state": state[0] if state else None, **options}
    out, final = scalar_decay_attention(q, k, v, log_decay=g, return_state=True, **options)
    return out, final


def with_gradients(leaves: list[Tensor], **options: Any) -> list[Tensor]:
    out, state = call(leaves, **options)
    loss = (out * wave(out)).sum() + (state * wave(state).flip(-1)).sum()
    found = torch.autograd.grad(loss, leaves, allow_unused=True)
    return [out.detach(), state.detach(), *(torch.zeros_like(x) if d is None else d for x, d in zip(leaves, found))]


def wave(x: Tensor) -> Tensor:
    """Weights of a loss, the same numbers in every dtype."""
    return torch.arange(x.numel(), dtype=torch.float64).cos().bfloat16().to(x.dtype).view(x.shape)


def error(a: Tensor, b: Tensor) -> float:
    """Largest difference, relative to the largest element where that is above 1."""
    return float((a - b).detach().abs().max() / b.detach().abs().max().clamp(min=1.0)) if a.numel() else 0.0


def cast(leaves: list[Tensor], dtype: torch.dtype) -> list[Tensor]:
    return [x.detach().to(dtype).requires_grad_() for x in leaves]


@pytest.mark.parametrize("backend", ["torch", "recurrent"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("fixed", [False, True], ids=["each token", "fixed"])
def test_forms_are_the_definition(fixed: bool, kind: str, backend: str) -> None:
    for length in (1, 2, 3, 7, 63, 64, 65, 130):
        leaves = inputs(length, kind, fixed=fixed, groups=length % 2 + 1)
        right = with_gradients(leaves, backend="reference")
        for dtype, limit in LIMIT.items():
            # The definition of the rounded inputs, so that only the computation is compared.
            given = cast(leaves, dtype)
            expected = (
                right if dtype is torch.float64 else with_gradients(cast(given, torch.float64), backend="reference")
            )
            for a, b in zip(with_gradients(given, backend=backend), expected, strict=True):
                assert a.dtype is dtype
                assert error(a, b) < limit, length


@pytest.mark.parametrize("sizes", [(1, 1), (3, 1), (1, 3), (2, 6), (1, 20), (20, 1)], ids=str)
@pytest.mark.parametrize("fixed", [False, True], ids=["each token", "fixed"])
def test_many_segments(sizes: tuple[int, int], fixed: bool) -> None:
    """Segments of many chunks, with batches and heads taken one by one or several at once; weak and strong decays."""
    batch, heads = sizes
    for length in (1024, 1100, 2050) if batch * heads < 4 else (64, 100):
        for groups in {1, heads}:
            kind = "all" if length % 1024 else "weak"
            leaves = inputs(length, kind, fixed=fixed, batch=batch, heads=heads, groups=groups, width=3, values=2)
            found, right = with_gradients(leaves, backend="torch"), with_gradients(leaves, backend="recurrent")
            for a, b in zip(found, right, strict=True):
                assert error(a, b) < 1e-12


def test_200_draws() -> None:
    """Random shapes, strides, strengths and types: finite, and equal to the definition."""
    draw = random.Random(0)
    for turn in range(200):
        length = draw.choice([0, 1, 2, 5, 16, 31, 64, 65, 97, 127, 129])
        batch = draw.choice([0, 1, 3]) if turn % 9 == 0 else draw.choice([1, 2])
        groups = draw.choice([1, 2])
        sizes = {"batch": batch, "heads": groups * draw.choice([1, 3]), "groups": groups}
        kind, fixed = draw.choice(KINDS), draw.random() < 0.4
        width, values = draw.choice([1, 4, 7, 16]), draw.choice([1, 4, 9])
        leaves = inputs(length, kind, fixed=fixed, width=width, values=values, seed=turn, **sizes)[
            : draw.choice([4, 5])
        ]
        if draw.random() < 0.3:  # decays that forget everything at some places
            leaves[3] = leaves[3].detach().masked_fill(torch.rand(leaves[3].shape) < 0.1, -1e4).requires_grad_()
        dtype = draw.choice([torch.float64, torch.float32, torch.bfloat16])
        given = cast(leaves, dtype)
        if draw.random() < 0.4:  # strides of a projection split into heads
            given[:3] = [x.detach().transpose(1, 2).contiguous().transpose(1, 2).requires_grad_() for x in given[:3]]
        options = {"scale": draw.choice([None, 0.3])}
        right = with_gradients(cast(given, torch.float64), backend="reference", **options)
        found = with_gradients(given, backend="torch", **options)
        assert found[0].dtype is dtype
        assert found[1].dtype is (torch.float64 if dtype is torch.float64 else torch.float32)
        for a, b in zip(found, right, strict=True):
            assert a.isfinite().all(), (turn, kind, dtype)
            # bfloat16 results are rounded once: to 8 bits.
            assert error(a.double(), b) < LIMIT.get(dtype, 5e-3), (turn, kind, dtype)


@pytest.mark.parametrize("kind", ["weak", "moderate", "strong"])
@pytest.mark.parametrize("backend", ["torch", "recurrent", "reference"])
def test_agrees_with_flash_linear_attention(naive: Any, backend: str, kind: str, monkeypatch: Any) -> None:
    """Its own references work in float32; with `float` made to keep float64 they are the same in all digits."""
    for dtype, limit in LIMIT.items():
        leaves = cast(inputs(97, kind)[:4], dtype)
        with monkeypatch.context() as patch:
            if dtype is torch.float64:
                patch.setattr(Tensor, "float", Tensor.double)
            out, state = naive.recurrent(*(x.transpose(1, 2) for x in leaves), output_final_state=True)
        out = out.transpose(1, 2)
        loss = (out * wave(out)).sum() + (state * wave(state).flip(-1)).sum()
        right = [out, state, *torch.autograd.grad(loss, leaves)]
        for a, b in zip(with_gradients(leaves, backend=backend), right, strict=True):
            assert error(a, b) < limit
    leaves = cast(inputs(97, kind), torch.float32)
    ours = call(leaves, backend=backend)
    sequence_first = [x.detach().transpose(1, 2) for x in leaves[:4]]
    theirs = naive.recurrent(*sequence_first, initial_state=leaves[4].detach(), output_final_state=True)
    assert error(ours[0], theirs[0].transpose(1, 2)) < 1e-5
    assert error(ours[1], theirs[1]) < 1e-5
    if kind != "strong":  # theirs take differences of large float32 sums
        theirs = naive.chunk(*sequence_first, initial_state=leaves[4].detach(), output_final_state=True)
        assert error(ours[0], theirs[0].transpose(1, 2)) < 1e-5
        assert error(ours[1], theirs[1]) < 1e-5
        assert error(call(leaves[:4], backend=backend)[0], naive.parallel(*sequence_first)[0].transpose(1, 2)) < 1e-5


@pytest.mark.parametrize("backend", ["torch", "recurrent", "reference"])
def test_agrees_with_the_reference_of_retention(naive: Any, backend: str, monkeypatch: Any) -> None:
    decay = torch.log1p(-(2.0 ** (-5 - torch.arange(4, dtype=torch.float64))))
    for dtype, limit in LIMIT.items():
        leaves = cast(inputs(150, heads=4)[:3], dtype)
        with monkeypatch.context() as patch:
            if dtype is torch.float64:
                patch.setattr(Tensor, "float", Tensor.double)
                patch.setattr(torch, "float", torch.double)
            right = naive.retention(*leaves)
        assert right.dtype is dtype
        found = scalar_decay_attention(*leaves, log_decay=decay.to(dtype), backend=backend)
        pairs = [(found, right)]
        pairs += zip(*(torch.autograd.grad((x * wave(x)).sum(), leaves) for x in (found, right)), strict=True)
        for a, b in pairs:
            assert error(a, b) < limit


def test_parallel_form() -> None:
    """All weights at once, from differences of the running sums of the log-decays; no state."""
    q, k, v, g, _ = inputs(140, "moderate")
    b = g.cumsum(2)
    falls = (b[:, :, :, None] - b[:, :, None]).masked_fill(~torch.ones(140, 140).tril().bool(), float("-inf"))
    right = 0.5 * (q @ k.mT * falls.exp()) @ v
    assert error(scalar_decay_attention(q, k, v, log_decay=g, scale=0.5), right) < 1e-12


@pytest.mark.parametrize("pieces", [[1] * 70, [70], [64, 1, 5], [3, 66, 1]], ids=len)
@pytest.mark.parametrize("kind", ["weak", "strong"])
def test_steps_are_the_whole(pieces: list[int], kind: str) -> None:
    for dtype, limit in LIMIT.items():
        leaves = cast(inputs(70, kind), dtype)
        right = with_gradients(leaves)
        q, k, v, g, state = leaves
        outs = []
        for part in zip(*(x.split(pieces, dim=2) for x in (q, k, v, g)), strict=True):
            out, state = scalar_decay_step(*part[:3], log_decay=part[3], state=state)
            outs.append(out)
        whole = torch.cat(outs, dim=2)
        loss = (whole * wave(whole)).sum() + (state * wave(state).flip(-1)).sum()
        for a, b in zip([whole, state, *torch.autograd.grad(loss, leaves)], right, strict=True):
            assert error(a, b) < limit


def test_steps_without_gradients_take_the_recurrence_and_keep_the_state_given() -> None:
    q, k, v, g, state = (x.detach() for x in inputs(3))
    kept = state.clone()
    a = scalar_decay_step(q, k, v, log_decay=g, state=state)
    b = scalar_decay_attention(q, k, v, log_decay=g, initial_state=state, return_state=True, backend="reference")
    assert all(error(x, y) < 1e-14 for x, y in zip(a, b))
    assert torch.equal(state, kept)
    few, many = ((1, 2, n, 8) for n in (1, 100))
    assert OPERATOR.choose(Request(few, few, few)).name == "recurrent"
    assert OPERATOR.choose(Request(few, few, few, requires_grad=True)).name == "torch"
    assert OPERATOR.choose(Request(many, many, many)).name == "torch"


def test_shared_queries_and_keys_are_the_repeated() -> None:
    leaves = inputs(200, heads=6, groups=2)
    repeated = [*(x.detach().repeat_interleave(3, dim=1).requires_grad_() for x in leaves[:2]), *leaves[2:]]
    found, right = with_gradients(leaves), with_gradients(repeated)
    for i in (2, 3):
        right[i] = right[i].unflatten(1, (2, 3)).sum(2)
    for a, b in zip(found, right, strict=True):
        assert error(a, b) < 1e-12


def test_infinite_decays_forget_everything() -> None:
    """A log-decay of minus infinity is a factor of 0: what was before the token does not exist for it."""
    q, k, v, g, state = inputs(90, "moderate")
    with torch.no_grad():
        g[:, :, 0] = -float("inf")
        g[:, :, 64] = -float("inf")
    found = with_gradients([q, k, v, g, state], backend="torch")
    assert all(x.isfinite().all() for x in found)
    part = [x.detach()[:, :, 64:] for x in (q, k, v, g)]
    part[3][:, :, 0] = 0.0
    alone, final = call(part, backend="reference")
    assert error(found[0][:, :, 64:], alone) < 1e-12
    assert error(found[1], final) < 1e-12
    assert found[2 + 3][:, :, 64].abs().max() < 1e-12
    assert not found[2 + 4].any()


@pytest.mark.parametrize("kind", ["weak", "moderate", "strong", "all"])
def test_65536_tokens(kind: str) -> None:
    """Finite and right at the end of a long sequence, whose sums of log-decays reach a million."""
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


@pytest.mark.parametrize("kind", ["weak", "strong"])
def test_65536_tokens_in_bfloat16(kind: str) -> None:
    """Finite, and the definition of the rounded inputs up to one rounding of each result; the state in float32."""
    low = cast(inputs(65_536, kind, batch=1, heads=1, width=8, values=8)[:4], torch.bfloat16)
    found = with_gradients(low, backend="torch")
    assert found[1].dtype is torch.float32
    for a, b in zip(found, with_gradients(cast(low, torch.float64), backend="torch"), strict=True):
        assert a.isfinite().all()
        assert error(a.double(), b) < 5e-3


def test_single_strong_decays_among_weak_ones() -> None:
    """Their gradients are nearly nothing, and stay so beside the large ones of all others."""
    leaves = inputs(200, "weak", width=32, values=32)
    strong = torch.rand(leaves[3].shape) < 0.02
    leaves[3] = leaves[3].detach().masked_fill(strong, -30.0).requires_grad_()
    given = cast(leaves, torch.float32)
    right = with_gradients(cast(given, torch.float64), backend="reference")
    for a, b in zip(with_gradients(given, backend="torch"), right, strict=True):
        assert error(a.double(), b) < 1e-5
    of_decay = with_gradients(given, backend="torch")[5]
    assert of_decay.abs().max() > 10
    assert of_decay[strong].abs().max() < 1e-3


def test_bfloat16_keeps_its_state_in_float32() -> None:
    """10,000 tokens that are all the same: with a bfloat16 state the sum would stop at 256."""
    ones = torch.ones(1, 1, 10_000, 1, dtype=torch.bfloat16)
    for backend in ("torch", "recurrent"):
        out, state = scalar_decay_attention(
            ones, ones, ones, log_decay=torch.zeros(1), scale=1.0, return_state=True, backend=backend
        )
        assert out.dtype is torch.bfloat16
        assert state.dtype is torch.float32
        assert state.item() == 10_000.0
        assert out[0, 0, -1].item() == 9984.0  # the bfloat16 next to 10,000


@pytest.mark.parametrize("fixed", [False, True], ids=["each token", "fixed"])
def test_decays_may_be_finer_than_the_rest(fixed: bool) -> None:
    leaves = inputs(100, fixed=fixed)[:4]
    low = [*(x.detach().bfloat16().requires_grad_() for x in leaves[:3]), leaves[3].detach().float().requires_grad_()]
    found = with_gradients(low)
    right = with_gradients(cast(low, torch.float64), backend="reference")
    assert [x.dtype for x in found[2:]] == [torch.bfloat16] * 3 + [torch.float32]
    for a, b in zip(found, right, strict=True):
        assert error(a.double(), b) < 5e-3


@pytest.mark.parametrize("fixed", [False, True], ids=["each token", "fixed"])
@pytest.mark.parametrize("backend", ["torch", "recurrent", "reference"])
def test_no_tokens(backend: str, fixed: bool) -> None:
    leaves = inputs(0, fixed=fixed)
    out, state, *gradients = with_gradients(leaves, backend=backend)
    assert out.shape == (2, 2, 0, 3)
    assert torch.equal(state, leaves[4])
    assert torch.equal(gradients[4], wave(state).flip(-1))
    assert not call(leaves[:4], backend=backend)[1].any()


@pytest.mark.parametrize("kind", ["weak", "strong"])
@pytest.mark.parametrize("fixed", [False, True], ids=["each token", "fixed"])
def test_finite_differences(fixed: bool, kind: str) -> None:
    leaves = inputs(4, kind, fixed=fixed, batch=1, groups=1, width=2, values=1)
    with torch.no_grad():
        leaves[3] -= 1e-3
    assert torch.autograd.gradcheck(lambda *x: call(list(x), backend="torch"), leaves)
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.gradgradcheck(lambda *x: call(list(x), backend="torch"), leaves)
    assert torch.autograd.gradgradcheck(lambda *x: call(list(x), backend="reference"), leaves)


def test_only_the_state_is_wanted() -> None:
    leaves = inputs(70)
    found, right = (
        torch.autograd.grad(call(leaves, backend=b)[1].square().sum(), leaves[1:]) for b in ("torch", "reference")
    )
    for a, b in zip(found, right, strict=True):
        assert error(a, b) < 1e-12


def test_operator_is_well_formed() -> None:
    """Schema, fake tensors and autograd registration, as torch.compile and torch.export rely on them."""
    for fixed in (False, True):
        leaves = cast(inputs(70, fixed=fixed, groups=1), torch.float32)
        torch.library.opcheck(chunked._op._opoverload, (*leaves, 0.5))
        torch.library.opcheck(chunked._op._opoverload, (*leaves[:3], leaves[3].detach(), None, 0.5))
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


@pytest.mark.parametrize("fixed", [False, True], ids=["each token", "fixed"])
def test_growth(fixed: bool) -> None:
    counts = []
    for length in (1024, 16_384):
        leaves = cast(inputs(length, "weak", fixed=fixed, batch=1, heads=1, width=8, values=8), torch.float32)
        counts.append(growth.count(lambda leaves=leaves: call(leaves)[0].sum().backward()))
    assert counts[1].work / counts[0].work < 17
    assert counts[1].peak_bytes / counts[0].peak_bytes < 17


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"q": torch.randn(2, 2, 5)}, r"one shape \(B, G, L, D\)"),
        ({"q": torch.randn(2, 2, 4, 4)}, r"one shape \(B, G, L, D\)"),
        ({"v": torch.randn(2, 2, 6, 3)}, r"v must have shape \(B, H, L, Dv\)"),
        ({"v": torch.randn(2, 3, 5, 3)}, "the 2 heads of q and k must divide the 3 heads of v"),
        ({"v": torch.randn(2, 2, 5, 3).double()}, "one floating dtype"),
        ({"log_decay": torch.zeros(2, 2, 5, 4)}, r"\(H,\) or \(B, H, L\)"),
        ({"log_decay": torch.zeros(3)}, r"\(H,\) or \(B, H, L\)"),
        ({"log_decay": torch.zeros(2, 2, 5, dtype=torch.long)}, "must be floating point"),
        ({"log_decay": torch.full((2,), 0.5)}, "at most 0"),
        ({"initial_state": torch.zeros(2, 2, 3, 4)}, r"\(B, H, D, Dv\) = \(2, 2, 4, 3\)"),
        ({"backend": "fast"}, "backend"),
    ],
)
def test_errors(change: dict[str, Any], says: str) -> None:
    arguments = {"q": torch.randn(2, 2, 5, 4), "k": torch.randn(2, 2, 5, 4), "v": torch.randn(2, 2, 5, 3)}
    arguments = {**arguments, "log_decay": torch.zeros(2, 2, 5), **change}
    with pytest.raises(ValueError, match=says):
        scalar_decay_attention(**arguments)
