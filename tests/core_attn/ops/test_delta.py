"""The delta rule: every form is the recurrence, whatever the decay, in values and gradients."""

from __future__ import annotations

import random
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from core_attn.dispatch import Request
from core_attn.ops import delta_rule, delta_rule_step
from core_attn.ops.delta import OPERATOR, chunked
from core_attn.testing import growth

LIMIT = {torch.float64: 1e-12, torch.float32: 1e-5}


@pytest.fixture(scope="module")
def fla() -> dict[str, Callable[..., Any]]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from fla.ops.delta_rule.naive import delta_rule_chunkwise, delta_rule_recurrence
        from fla.ops.gated_delta_rule.naive import naive_chunk_gated_delta_rule, naive_recurrent_gated_delta_rule
    return {
        "recurrent": delta_rule_recurrence,
        "chunk": delta_rule_chunkwise,
        "gated recurrent": naive_recurrent_gated_delta_rule,
        "gated chunk": naive_chunk_gated_delta_rule,
    }


def decays(kind: str, *shape: int, generator: torch.Generator | None = None) -> Tensor:
    """Log-decays in float64: as the layers make them, moderate, strong, or of all sizes beside each other."""
    noise = torch.randn(*shape, generator=generator, dtype=torch.float64)
    if kind == "usual":
        return F.logsigmoid(noise) / 16
    if kind == "moderate":
        return F.logsigmoid(noise)
    if kind == "strong":
        return -30 * torch.rand(*shape, generator=generator, dtype=torch.float64)
    return -(noise * 3).exp().clamp(max=1000.0)


def inputs(
    length: int, kind: str = "usual", *, batch: int = 2, heads: int = 2, width: int = 5, values: int = 3, seed: int = 0
) -> list[Tensor]:
    """q, k of norm 1, v, strengths, an initial state and, unless kind is "none", log-decays; float64 with gradients."""
    g = torch.Generator().manual_seed(seed)
    q, k = (torch.randn(batch, heads, length, width, generator=g, dtype=torch.float64) for _ in range(2))
    v = torch.randn(batch, heads, length, values, generator=g, dtype=torch.float64)
    beta = torch.rand(batch, heads, length, generator=g, dtype=torch.float64)
    state = torch.randn(batch, heads, width, values, generator=g, dtype=torch.float64)
    found = [q, F.normalize(k, dim=-1), v, beta, state]
    if kind != "none":
        found.append(decays(kind, batch, heads, length, generator=g))
    return [x.requires_grad_() for x in found]


def call(leaves: list[Tensor], **options: Any) -> tuple[Tensor, Tensor]:
    q, k, v, beta, state, *g = leaves
    options = {"initial_state": state, "log_decay": g[0] if g else None, **options}
    out, final = delta_rule(q, k, v, beta=beta, return_state=True, **options)
    return out, final


def with_gradients(leaves: list[Tensor], **options: Any) -> list[Tensor]:
    out, state = call(leaves, **options)
    loss = (out * wave(out)).sum() + (state * wave(state).flip(-1)).sum()
    found = torch.autograd.grad(loss, leaves, allow_unused=True)
    return [out.detach(), state.detach(), *(torch.zeros_like(x) if d is None else d for x, d in zip(leaves, found))]


def wave(x: Tensor) -> Tensor:
    """Gradients of the loss that every type can hold exactly."""
    return torch.arange(x.numel(), dtype=torch.float64).cos().bfloat16().to(x.dtype).view(x.shape)


def error(a: Tensor, b: Tensor) -> float:
    """Largest difference, relative to the largest element where that is above 1."""
    return float((a - b).detach().abs().max() / b.abs().max().clamp(min=1.0)) if a.numel() else 0.0


def cast(leaves: list[Tensor], dtype: torch.dtype) -> list[Tensor]:
    return [x.detach().to(dtype).requires_grad_() for x in leaves]


@pytest.mark.parametrize("backend", ["torch", "recurrent"])
@pytest.mark.parametrize("kind", ["none", "usual", "moderate", "strong", "all"])
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


def test_pieces_of_chunks_are_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """Many chunks at once, and one at a time."""
    leaves = inputs(300, "moderate")
    right = with_gradients(leaves, backend="reference")
    for elements in (1, 3 * 64 * 4 * 5, 1 << 20):
        monkeypatch.setattr(chunked, "_AT_ONCE", elements)
        for a, b in zip(with_gradients(leaves, backend="torch"), right, strict=True):
            assert error(a, b) < 1e-12


def test_200_draws() -> None:
    """Random shapes, strides, strengths, decays and types: finite, and equal to the definition."""
    draw = random.Random(0)
    for turn in range(200):
        length = draw.choice([0, 1, 2, 5, 16, 31, 64, 65, 97, 127, 129])
        sizes = {
            "batch": draw.choice([0, 1, 3]) if turn % 9 == 0 else draw.choice([1, 2]),
            "heads": draw.choice([1, 3]),
        }
        kind = draw.choice(["none", "usual", "moderate", "strong", "all"])
        width, values = draw.choice([1, 4, 7, 16]), draw.choice([1, 4, 9])
        leaves = inputs(length, kind, width=width, values=values, seed=turn, **sizes)
        if draw.random() < 0.3:  # strengths up to 2, which turn what is stored around
            leaves[3] = (2 * leaves[3]).detach().requires_grad_()
        if draw.random() < 0.3:  # padding
            gone = torch.rand(leaves[3].shape) < 0.3
            for i in (1, 2, 3, *range(5, len(leaves))):
                m = gone if leaves[i].dim() == 3 else gone[..., None]
                leaves[i] = leaves[i].detach().masked_fill(m, 0.0).requires_grad_()
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


@pytest.mark.parametrize("backend", ["torch", "recurrent", "reference"])
def test_agrees_with_flash_linear_attention(fla: Any, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its own references work in float32; with `float` made to keep float64 they are the same in all digits."""
    for dtype, limit in LIMIT.items():
        leaves = cast(inputs(96, "none"), dtype)
        with monkeypatch.context() as patch:
            if dtype is torch.float64:
                patch.setattr(Tensor, "float", Tensor.double)
            out, state = fla["recurrent"](*leaves[:4], initial_state=leaves[4])
        loss = (out * wave(out)).sum() + (state * wave(state).flip(-1)).sum()
        right = [out, state, *torch.autograd.grad(loss, leaves)]
        for a, b in zip(with_gradients(leaves, backend=backend), right, strict=True):
            assert error(a, b) < limit
    q, k, v, beta, _ = leaves
    chunk = fla["chunk"](q, k, v, beta)
    for a, b in zip(delta_rule(q, k, v, beta=beta, return_state=True, backend=backend), chunk, strict=True):
        assert error(a, b) < 1e-5


@pytest.mark.parametrize("kind", ["usual", "moderate", "strong"])
@pytest.mark.parametrize("backend", ["torch", "recurrent", "reference"])
def test_agrees_with_flash_linear_attention_with_decay(
    fla: Any, backend: str, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for dtype, limit in LIMIT.items():
        leaves = cast(inputs(97, kind), dtype)
        q, k, v, beta, state, g = leaves
        given = {name: x.transpose(1, 2) for name, x in {"q": q, "k": k, "v": v, "beta": beta, "g": g}.items()}
        for form in ("gated recurrent", "gated chunk"):
            with monkeypatch.context() as patch:
                if dtype is torch.float64:
                    patch.setattr(torch, "float32", torch.float64)
                out, final = fla[form](**given, initial_state=state, output_final_state=True)
            out = out.transpose(1, 2)
            if form == "gated chunk":  # as precise as quotients of its factors are
                assert error(call(leaves, backend=backend)[0], out) < 1e-5
                continue
            loss = (out * wave(out)).sum() + (final * wave(final).flip(-1)).sum()
            right = [out, final, *torch.autograd.grad(loss, leaves)]
            for a, b in zip(with_gradients(leaves, backend=backend), right, strict=True):
                assert error(a, b) < limit


def test_replaces_what_is_stored_under_the_key() -> None:
    """Orthonormal keys with strength 1: the last value written under a key is what is read there."""
    keys = torch.eye(4, dtype=torch.float64)[torch.tensor([0, 1, 2, 0, 1, 3])][None, None]
    v = torch.randn(1, 1, 6, 3, dtype=torch.float64)
    one = torch.ones(1, 1, 6, dtype=torch.float64)
    out, state = delta_rule(keys, keys, v, beta=one, scale=1.0, return_state=True, backend="torch")
    assert error(out, v) < 1e-14
    assert error(state[0, 0], v[0, 0, [3, 4, 2, 5]]) < 1e-14


@pytest.mark.parametrize("pieces", [[1] * 70, [70], [64, 1, 5], [3, 66, 1]], ids=len)
@pytest.mark.parametrize("kind", ["none", "usual", "strong"])
def test_steps_are_the_whole(pieces: list[int], kind: str) -> None:
    for dtype, limit in LIMIT.items():
        leaves = cast(inputs(70, kind), dtype)
        right = with_gradients(leaves)
        q, k, v, beta, state, *g = leaves
        outs = []
        for part in zip(*(x.split(pieces, dim=2) for x in (q, k, v, beta, *g)), strict=True):
            out, state = delta_rule_step(
                *part[:3], beta=part[3], state=state, log_decay=part[4] if kind != "none" else None
            )
            outs.append(out)
        whole = torch.cat(outs, dim=2)
        loss = (whole * wave(whole)).sum() + (state * wave(state).flip(-1)).sum()
        for a, b in zip([whole, state, *torch.autograd.grad(loss, leaves)], right, strict=True):
            assert error(a, b) < limit


def test_steps_without_gradients_take_the_recurrence_and_keep_the_state_given() -> None:
    leaves = [x.detach() for x in inputs(3)]
    q, k, v, beta, state, g = leaves
    kept = state.clone()
    a = delta_rule_step(q, k, v, beta=beta, state=state, log_decay=g)
    assert all(error(x, y) < 1e-14 for x, y in zip(a, call(leaves, backend="reference")))
    assert torch.equal(state, kept)
    few, many = ((1, 2, n, 8) for n in (1, 100))
    assert OPERATOR.choose(Request(few, few, few)).name == "recurrent"
    assert OPERATOR.choose(Request(few, few, few, requires_grad=True)).name == "torch"
    assert OPERATOR.choose(Request(many, many, many)).name == "torch"


def test_a_decay_to_nothing_forgets_everything() -> None:
    """A log-decay of minus infinity: what was before the token does not exist for it."""
    leaves = inputs(90, "moderate")
    with torch.no_grad():
        leaves[5][:, :, 0] = leaves[5][:, :, 37] = leaves[5][:, :, 64] = -float("inf")
    found = with_gradients(leaves, backend="torch")
    assert all(x.isfinite().all() for x in found)
    part = [x.detach()[:, :, 64:] for x in leaves[:4]]
    rest = [x.detach() for x in (torch.zeros_like(leaves[4]), leaves[5][:, :, 64:].clone())]
    rest[1][:, :, 0] = 0.0
    alone, final = call([*part, *rest], backend="reference")
    assert error(found[0][:, :, 64:], alone) < 1e-12
    assert error(found[1], final) < 1e-12
    assert not found[2 + 4].any()


@pytest.mark.parametrize("kind", ["none", "usual", "moderate", "strong", "all"])
def test_65536_tokens(kind: str) -> None:
    """Finite and right at the end of a long sequence, whose sums of log-decays reach a million."""
    length = 65_536
    leaves = cast(inputs(length, kind, batch=1, heads=1, width=8, values=8), torch.float32)
    found = with_gradients(leaves, backend="torch")
    assert all(x.isfinite().all() for x in found)
    # In float64 the same, and at the end also the definition, from the state that float64 has there.
    right = with_gradients(cast(leaves, torch.float64), backend="torch")
    for a, b in zip(found, right, strict=True):
        assert error(a.double(), b) < 1e-5
    q, k, v, beta, state, *g = (x.detach().double() for x in leaves)
    along = [q, k, v, beta, *g]
    first, last = ([x[:, :, part] for x in along] for part in (slice(None, -100), slice(-100, None)))
    state = call([*first[:4], state, *first[4:]])[1]
    tail = call([*last[:4], state, *last[4:]], backend="reference")
    assert error(found[0][:, :, -100:].double(), tail[0]) < 1e-5
    assert error(found[1].double(), tail[1]) < 1e-5


def test_bfloat16_keeps_its_state_in_float32() -> None:
    """Small strengths towards one value: in bfloat16 a state of 0.5 could not grow by 1/1024."""
    ones = torch.ones(1, 1, 8192, 1, dtype=torch.bfloat16)
    beta = torch.full((1, 1, 8192), 2.0**-10, dtype=torch.bfloat16)
    for backend in ("torch", "recurrent"):
        out, state = delta_rule(ones, ones, ones, beta=beta, scale=1.0, return_state=True, backend=backend)
        assert out.dtype is torch.bfloat16
        assert state.dtype is torch.float32
        assert abs(state.item() - (1 - (1 - 2.0**-10) ** 8192)) < 1e-5


@pytest.mark.parametrize("backend", ["torch", "recurrent", "reference"])
def test_no_tokens(backend: str) -> None:
    leaves = inputs(0)
    out, state, *gradients = with_gradients(leaves, backend=backend)
    assert out.shape == (2, 2, 0, 3)
    assert torch.equal(state, leaves[4])
    assert torch.equal(gradients[4], wave(state).flip(-1))


@pytest.mark.parametrize("kind", ["none", "usual", "strong"])
def test_finite_differences(kind: str) -> None:
    leaves = inputs(6, kind, batch=1, heads=1, width=3, values=2)
    if kind != "none":
        with torch.no_grad():
            leaves[5] -= 1e-3
    assert torch.autograd.gradcheck(lambda *x: call(list(x), backend="torch"), leaves)
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.gradgradcheck(lambda *x: call(list(x), backend="torch"), leaves)
    assert torch.autograd.gradgradcheck(lambda *x: call(list(x), backend="reference"), leaves)


def test_operator_is_well_formed() -> None:
    """Schema, fake tensors and autograd registration, as torch.compile and torch.export rely on them."""
    leaves = cast(inputs(70), torch.float32)
    q, k, v, beta, state, g = leaves
    torch.library.opcheck(chunked._op._opoverload, (q, k, v, beta, g, state, 0.5))
    torch.library.opcheck(chunked._op._opoverload, (q, k, v, beta, None, None, 0.5))
    frozen = [x.detach().bfloat16() for x in (q, k, v, beta, g, state)]
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


@pytest.mark.parametrize("kind", ["none", "strong"])
def test_growth(kind: str) -> None:
    counts = []
    for length in (512, 16_384):
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
        ({"beta": torch.zeros(2, 2, 5, 1)}, r"beta must be floating point of shape \(B, H, L\)"),
        ({"beta": torch.zeros(2, 2, 5, dtype=torch.long)}, "beta must be floating point"),
        ({"log_decay": torch.zeros(2, 5)}, r"log_decay must be floating point of shape \(B, H, L\)"),
        ({"log_decay": torch.full((2, 2, 5), 0.5)}, "at most 0"),
        ({"initial_state": torch.zeros(2, 2, 3, 4)}, r"\(B, H, D, Dv\) = \(2, 2, 4, 3\)"),
        ({"backend": "fast"}, "backend"),
    ],
)
def test_errors(change: dict[str, Any], says: str) -> None:
    arguments = {"q": torch.randn(2, 2, 5, 4), "k": torch.randn(2, 2, 5, 4), "v": torch.randn(2, 2, 5, 3)}
    arguments = {**arguments, "beta": torch.ones(2, 2, 5), **change}
    with pytest.raises(ValueError, match=says):
        delta_rule(**arguments)
