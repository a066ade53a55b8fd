"""RAT's operator: every form is the definition, in values and gradients; states; refusals."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from core_attn.ops import rat_attention, rat_step
from core_attn.ops.rat import RatState, chunked, rat_start
from core_attn.testing import growth

LIMIT = {torch.float64: 1e-12, torch.float32: 1e-5}
FORMS = ["torch", "recurrent"]


def inputs(
    length: int, *, strength: float = 1.0, batch: int = 2, heads: int = 2, width: int = 5, seed: int = 0
) -> list[Tensor]:
    """q, k, v and log-gates, float64 with gradients."""
    g = torch.Generator().manual_seed(seed)
    shape = (batch, heads, length, width)
    found = [torch.randn(shape, generator=g, dtype=torch.float64) for _ in range(3)]
    found.append(-strength * torch.rand(shape, generator=g, dtype=torch.float64))
    return [x.requires_grad_() for x in found]


def started(width: int, ends: int, seen: int, *, batch: int = 2, heads: int = 2) -> RatState:
    g = torch.Generator().manual_seed(7)
    last = [torch.randn(batch, heads, width, generator=g, dtype=torch.float64) for _ in range(2)]
    past = [torch.randn(batch, heads, ends, width, generator=g, dtype=torch.float64) for _ in range(2)]
    return RatState(*(x.requires_grad_() for x in (*last, *past)), seen)


def wave(x: Tensor) -> Tensor:
    """Gradients of the loss that every type can hold exactly."""
    return torch.arange(x.numel(), dtype=torch.float64).cos().bfloat16().to(x.dtype).view(x.shape)


def with_gradients(leaves: list[Tensor], **options: Any) -> list[Tensor]:
    *qkv, log_gate = leaves
    state = options.get("initial_state")
    if state is None:
        outs = [rat_attention(*qkv, log_gate=log_gate, **options)]
    else:
        leaves = [*leaves, *state[:4]]
        out, after = rat_attention(*qkv, log_gate=log_gate, return_state=True, **options)
        outs = [out, *after[:4]]
    loss = sum((x * wave(x)).sum() for x in outs)
    found = torch.autograd.grad(loss, leaves, allow_unused=True)
    return [*(x.detach() for x in outs), *(torch.zeros_like(x) if d is None else d for x, d in zip(leaves, found))]


def cast(leaves: Any, dtype: torch.dtype) -> Any:
    if isinstance(leaves, RatState):
        return RatState(*cast(leaves[:4], dtype), leaves.seen)
    return [x.detach().to(dtype).requires_grad_() for x in leaves]


def error(a: Tensor, b: Tensor) -> float:
    """Largest difference, relative to the largest element where that is above 1."""
    a, b = a.detach().double(), b.detach().double()
    return float((a - b).abs().max() / b.abs().max().clamp(min=1.0)) if a.numel() else 0.0


def test_the_reference_is_a_loop_over_tokens_and_chunks() -> None:
    q, k, v, log_gate = (x.detach()[0, 0] for x in inputs(11, width=3))
    gate, size = log_gate.exp(), 4
    right, ends = [], []
    for t in range(11):
        if t % size == 0:
            key = value = torch.zeros(3, dtype=torch.float64)
        key = gate[t] * key + (1 - gate[t]) * k[t]
        value = gate[t] * value + (1 - gate[t]) * v[t]
        read = [*ends, (key, value)]
        weights = torch.stack([0.5 * q[t] @ a for a, _ in read]).softmax(0)
        right.append(sum(w * b for w, (_, b) in zip(weights, read)))
        if t % size == size - 1:
            ends.append((key, value))
    leaves = [x.detach()[:1, :1] for x in inputs(11, width=3)]
    out = rat_attention(*leaves[:3], log_gate=leaves[3], chunk_size=size, scale=0.5, backend="reference")
    assert error(out[0, 0], torch.stack(right)) < 1e-14


def test_chunks_of_one_token_are_softmax_attention() -> None:
    """With gates of 0 nothing but the token itself is in its summary."""
    q, k, v, _ = (x.detach() for x in inputs(30))
    right = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    for backend in (*FORMS, "reference"):
        out = rat_attention(q, k, v, log_gate=torch.full_like(k, -torch.inf), chunk_size=1, backend=backend)
        assert error(out, right) < 1e-12


@pytest.mark.parametrize("backend", FORMS)
@pytest.mark.parametrize("dtype", LIMIT, ids=str)
@pytest.mark.parametrize("length", [0, 1, 2, 15, 16, 17, 67, 130])
def test_forms_are_the_definition(length: int, dtype: torch.dtype, backend: str) -> None:
    for size, base in ((1, None), (3, 100.0), (16, 10000.0), (200, None)):
        given = cast(inputs(length), dtype)
        options = {"chunk_size": size, "rotary_base": base}
        right = with_gradients(cast(given, torch.float64), backend="reference", **options)
        for a, b in zip(with_gradients(given, backend=backend, **options), right, strict=True):
            assert a.dtype is dtype
            assert error(a, b) < LIMIT[dtype]


@pytest.mark.parametrize("backend", [*FORMS, "reference"])
@pytest.mark.parametrize("seen", [0, 3, 8, 9, 15])
@pytest.mark.parametrize("length", [0, 1, 5, 29])
def test_states_and_their_gradients(length: int, seen: int, backend: str) -> None:
    """From a state in, at the end of and behind a chunk; gradients of all that it holds; against the whole sequence."""
    leaves, state = inputs(length), started(5, seen // 4, seen)
    options = {"chunk_size": 4, "rotary_base": 50.0}
    right = with_gradients(leaves, initial_state=state, backend="reference", **options)
    for a, b in zip(with_gradients(leaves, initial_state=state, backend=backend, **options), right, strict=True):
        assert error(a, b) < 1e-12
    whole = [x.detach() for x in inputs(seen + length)]
    out, _ = rat_attention(*whole[:3], log_gate=whole[3], return_state=True, backend=backend, **options)
    after = rat_start(whole[0])
    outs = []
    for piece in zip(*(x.split([seen, length], dim=2) for x in whole)):
        some, after = rat_attention(
            *piece[:3], log_gate=piece[3], initial_state=after, return_state=True, backend=backend, **options
        )
        outs.append(some)
    assert error(torch.cat(outs, dim=2), out) < 1e-12
    assert after.seen == seen + length
    assert after.keys.shape[2] == (seen + length) // 4


def test_steps_take_states_and_leave_them_as_they_were() -> None:
    q, k, v, log_gate = (x.detach() for x in inputs(21))
    right = rat_attention(q, k, v, log_gate=log_gate, chunk_size=4)
    state, outs = rat_start(q), []
    for t in range(21):
        before = [x.clone() for x in state[:4]]
        given = [x[:, :, t : t + 1] for x in (q, k, v)]
        out, after = rat_step(*given, log_gate=log_gate[:, :, t : t + 1], state=state, chunk_size=4)
        assert all(torch.equal(a, b) for a, b in zip(before, state[:4]))
        again = rat_step(
            *(x[1:] for x in given),
            log_gate=log_gate[1:, :, t : t + 1],
            state=state.select(torch.tensor([1])),
            chunk_size=4,
        )
        assert error(again[0], out[1:]) < 1e-14
        outs.append(out)
        state = after
    assert error(torch.cat(outs, dim=2), right) < 1e-12


def test_blocks_are_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    leaves = inputs(150)
    right = with_gradients(leaves, backend="reference", chunk_size=7)
    for name, value in (("_FEWEST", 1000), ("_FEWEST", 1), ("_FEWEST", 10)):
        monkeypatch.setattr(chunked, name, value)
        for a, b in zip(with_gradients(leaves, backend="torch", chunk_size=7), right, strict=True):
            assert error(a, b) < 1e-12


def test_200_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    """Random shapes, strides, strengths, padding, states and types: finite, and equal to the definition."""
    draw = random.Random(0)
    for turn in range(200):
        monkeypatch.setattr(chunked, "_FEWEST", draw.choice([1, 5, 64]))
        length = draw.choice([0, 1, 2, 5, 16, 31, 48, 65, 97])
        sizes = {
            "batch": draw.choice([0, 1, 3]) if turn % 9 == 0 else draw.choice([1, 2]),
            "heads": draw.choice([1, 3]),
        }
        strength, width = draw.choice([0.0, 0.1, 1.0, 30.0, 1000.0]), draw.choice([1, 4, 7, 16])
        dtype = draw.choice([torch.float64, torch.float32, torch.bfloat16])
        given = cast(inputs(length, strength=strength, width=width, seed=turn, **sizes), dtype)
        if draw.random() < 0.4:  # strides of a projection split into heads
            given = [x.detach().transpose(1, 2).contiguous().transpose(1, 2).requires_grad_() for x in given]
        size = draw.choice([1, 2, 5, 16, 40, 200])
        options: dict[str, Any] = {
            "chunk_size": size,
            "scale": draw.choice([None, 0.3, 3.0]),
            "rotary_base": draw.choice([None, 10.0, 10000.0]),
        }
        exact = cast(given, torch.float64)
        kind = draw.choice(["plain", "padding", "state"])
        if kind == "padding":
            real = torch.rand(sizes["batch"], length, generator=torch.Generator().manual_seed(turn)) < 0.6
            real[:, : length // 2] &= draw.random() < 0.7
            options["key_padding_mask"] = real
            with torch.no_grad():  # nothing under the mask is read
                for x in given[:3]:
                    x.masked_fill_(~real[:, None, :, None], torch.nan if x is not given[0] else 1.0)
                exact[0].masked_fill_(~real[:, None, :, None], 1.0)
                given[3].masked_fill_(~real[:, None, :, None], -1.0)
                exact[3].masked_fill_(~real[:, None, :, None], -1.0)
        right_options = dict(options)
        if kind == "state":
            seen = draw.choice([0, 1, 7, 16, 33])
            state = started(width, seen // size, seen, **sizes)
            dtype_of_state = torch.float64 if dtype is torch.float64 else torch.float32
            options["initial_state"] = cast(state, dtype_of_state)
            right_options["initial_state"] = cast(options["initial_state"], torch.float64)
        right = with_gradients(exact, backend="reference", **right_options)
        found = with_gradients(given, backend="torch", **options)
        assert found[0].dtype is dtype
        for a, b in zip(found, right, strict=True):
            assert a.isfinite().all(), (turn, kind, dtype)
            # bfloat16 results are rounded once: to 8 bits.
            assert error(a, b) < LIMIT.get(dtype, 5e-3), (turn, kind, dtype)


def test_strong_gates_and_65536_tokens() -> None:
    g = torch.Generator().manual_seed(0)
    for strength in (0.01, 30.0):
        leaves = [torch.randn(1, 1, 65_536, 4, generator=g) for _ in range(3)]
        leaves.append(-strength * torch.rand(1, 1, 65_536, 4, generator=g))
        leaves = [x.requires_grad_() for x in leaves]
        found = with_gradients(leaves, chunk_size=64, rotary_base=10000.0)
        assert all(x.isfinite().all() for x in found)
        with torch.no_grad():
            exact = cast([x.double() for x in leaves], torch.float64)
            right = rat_attention(*exact[:3], log_gate=exact[3], chunk_size=64, rotary_base=10000.0)
        assert error(found[0], right) < 1e-5


def test_large_scores_do_not_overflow() -> None:
    leaves = [(100 * x if i < 2 else x).detach().requires_grad_() for i, x in enumerate(inputs(60))]
    right = with_gradients(leaves, backend="reference", chunk_size=4)
    for a, b in zip(with_gradients(leaves, backend="torch", chunk_size=4), right, strict=True):
        assert a.isfinite().all()
        assert error(a, b) < 1e-10  # differences of scores of ten thousands


def test_bfloat16_is_as_exact_as_sdpa() -> None:
    given = cast(inputs(512, batch=1, width=32), torch.bfloat16)
    exact = cast(given, torch.float64)
    right = rat_attention(*exact[:3], log_gate=exact[3], backend="reference")
    worst = error(rat_attention(*given[:3], log_gate=given[3]), right)
    sdpa = F.scaled_dot_product_attention(*given[:3], is_causal=True)
    assert worst <= 2 * error(sdpa, F.scaled_dot_product_attention(*exact[:3], is_causal=True))


def test_causal() -> None:
    leaves = [x.detach() for x in inputs(40)]
    later = [x.clone() for x in leaves]
    for x in later:
        x[:, :, 25:] = -5.0
    for backend in (*FORMS, "reference"):
        a, b = (rat_attention(*x[:3], log_gate=x[3], chunk_size=7, backend=backend)[:, :, :25] for x in (leaves, later))
        assert error(a, b) < 1e-14


def test_gradients_by_finite_differences() -> None:
    leaves, state = inputs(6, batch=1, heads=1, width=2), started(2, 1, 4, batch=1, heads=1)

    def call(*t: Tensor) -> Tensor:
        *qkv, log_gate = t[:4]
        given = RatState(*t[4:], 4)
        return rat_attention(*qkv, log_gate=log_gate, chunk_size=3, rotary_base=9.0, initial_state=given)

    torch.autograd.gradcheck(call, (*leaves, *state[:4]))
    (first,) = torch.autograd.grad(call(*leaves, *state[:4]).sum(), leaves[0], create_graph=True)
    with pytest.raises(RuntimeError, match="backend='reference'"):
        first.sum().backward()


def test_operator_rules() -> None:
    q, k, v, g = inputs(21)
    start = started(5, 2, 11)
    torch.library.opcheck(chunked._scan_op._opoverload, (k, v, g, start.key, start.value, 4, 3))
    torch.library.opcheck(chunked._scan_op._opoverload, (k, v, g, start.key, start.value, 4, 0))
    real = torch.tensor([[True, False], [False, True]])
    for some in (None, real):
        torch.library.opcheck(chunked._attend_op._opoverload, (q, k, v, start.keys, start.values, some, 0.5, 8, 0))


def test_compiles_and_autocasts() -> None:
    leaves = cast(inputs(37), torch.float32)
    right = with_gradients(leaves)
    compiled: Any = torch.compile(
        lambda q, k, v, g: rat_attention(q, k, v, log_gate=g), backend="aot_eager", fullgraph=True, dynamic=False
    )
    out = compiled(*leaves)
    for a, b in zip([out, *torch.autograd.grad((out * wave(out)).sum(), leaves)], right, strict=True):
        assert error(a, b) < 1e-6
    with torch.autocast("cpu", torch.bfloat16):
        low = rat_attention(*leaves[:3], log_gate=leaves[3])
    assert low.dtype is torch.bfloat16
    assert error(low, right[0]) < 0.05


def test_memory_is_linear() -> None:
    counts = []
    for length in (2048, 16_384):
        leaves = cast(inputs(length, batch=1, heads=1, width=8), torch.float32)
        counts.append(growth.count(lambda leaves=leaves: with_gradients(leaves)))
    assert counts[1].peak_bytes / counts[0].peak_bytes < 9
    assert counts[1].work / counts[0].work > 16


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"q": torch.randn(2, 5, 4)}, r"shape \(B, H, L, D\)"),
        ({"v": torch.randn(2, 2, 5, 3)}, "of one shape"),
        ({"q": torch.randn(2, 2, 4, 4)}, "of one shape"),
        ({"k": torch.randn(2, 2, 5, 4).double()}, "one floating dtype"),
        ({"log_gate": torch.zeros(2, 2, 5)}, r"log_gate must be floating point of shape \(B, H, L, D\)"),
        ({"log_gate": torch.zeros(2, 2, 5, 4, dtype=torch.long)}, "log_gate must be floating point"),
        ({"log_gate": torch.full((2, 2, 5, 4), 0.5)}, "at most 0"),
        ({"chunk_size": 0}, "chunk_size must be at least 1"),
        ({"rotary_base": 0.0}, "rotary_base must be positive"),
        ({"key_padding_mask": torch.ones(2, 4, dtype=torch.bool)}, "key_padding_mask"),
        ({"key_padding_mask": torch.ones(2, 5, dtype=torch.bool), "return_state": True}, "not both"),
        ({"initial_state": torch.zeros(2, 2, 4)}, "must be a RatState"),
        ({"initial_state": rat_start(torch.randn(2, 3, 5, 4))}, "a state of 0 tokens in chunks of 16"),
        ({"initial_state": rat_start(torch.randn(2, 2, 5, 4))._replace(seen=16)}, "a state of 16 tokens"),
        ({"backend": "fast"}, "backend"),
    ],
)
def test_errors(change: dict[str, Any], says: str) -> None:
    arguments = {name: torch.randn(2, 2, 5, 4) for name in ("q", "k", "v")} | {"log_gate": -torch.rand(2, 2, 5, 4)}
    rat_attention(**arguments)
    with pytest.raises(ValueError, match=says) as caught:
        rat_attention(**{**arguments, **change})
    assert "\n" not in str(caught.value)
