"""The linear Titans memory: every form is the recurrence, whatever the gates, in values and gradients."""

from __future__ import annotations

import json
import random
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional as F

from core_attn.dispatch import Request
from core_attn.ops import delta_rule, titans_memory, titans_step
from core_attn.ops.titans import OPERATOR, TitansState, chunked
from core_attn.testing import growth

GOLDEN = Path(__file__).parents[2] / "golden"
LIMIT = {torch.float64: 1e-12, torch.float32: 1e-5}


@pytest.fixture(scope="module")
def fla() -> Callable[..., Any]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from fla.ops.titans.naive import chunk_titans_linear_ref
    return chunk_titans_linear_ref


def gates(kind: str, *shape: int, generator: torch.Generator) -> Tensor:
    """Logarithms in float64: as the layers make them, moderate, strong, or of all sizes beside each other."""
    noise = torch.randn(*shape, generator=generator, dtype=torch.float64)
    if kind == "usual":
        return F.logsigmoid(noise + 3)
    if kind == "moderate":
        return F.logsigmoid(noise)
    if kind == "strong":
        return -30 * torch.rand(*shape, generator=generator, dtype=torch.float64)
    return -(noise * 3).exp().clamp(max=1000.0)


def inputs(
    length: int, kind: str = "usual", *, batch: int = 2, heads: int = 2, width: int = 5, values: int = 3, seed: int = 0
) -> list[Tensor]:
    """q, k of norm 1, v, steps, memory, momentum and, unless kind is "none", two gates; float64 with gradients.

    Steps are short enough for the momentum that the memory does not grow without bound.
    """
    g = torch.Generator().manual_seed(seed)
    q, k = (torch.randn(batch, heads, length, width, generator=g, dtype=torch.float64) for _ in range(2))
    v = torch.randn(batch, heads, length, values, generator=g, dtype=torch.float64)
    rate = torch.rand(batch, heads, length, generator=g, dtype=torch.float64) * (
        0.05 if kind in ("usual", "all") else 0.5
    )
    memory, surprise = (torch.randn(batch, heads, width, values, generator=g, dtype=torch.float64) for _ in range(2))
    found = [q, F.normalize(k, dim=-1), v, rate, memory, surprise]
    if kind != "none":
        found += [gates(kind, batch, heads, length, generator=g) for _ in range(2)]
    return [x.requires_grad_() for x in found]


def call(leaves: list[Tensor], **options: Any) -> tuple[Tensor, TitansState]:
    q, k, v, rate, memory, surprise, *g = leaves
    options = {"initial_state": TitansState(memory, surprise), **options}
    if g:
        options = {"log_momentum": g[0], "log_decay": g[1], **options}
    found = titans_memory(q, k, v, rate=rate, return_state=True, **options)
    assert isinstance(found, tuple)
    return found


def loss(out: Tensor, state: TitansState) -> Tensor:
    total = (out * wave(out)).sum() + (state.memory * wave(state.memory).flip(-1)).sum()
    total = total + (state.surprise * wave(state.surprise).flip(-2)).sum()
    return total if state.anchor is None else total + (state.anchor * wave(state.anchor)).sum()


def with_gradients(leaves: list[Tensor], **options: Any) -> list[Tensor]:
    out, state = call(leaves, **options)
    found = torch.autograd.grad(loss(out, state), leaves, allow_unused=True)
    finals = [x.detach() for x in (out, state.memory, state.surprise)]
    return [*finals, *(torch.zeros_like(x) if d is None else d for x, d in zip(leaves, found))]


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def wave(x: Tensor) -> Tensor:
    """Gradients of the loss that every type can hold exactly."""
    return torch.arange(x.numel(), dtype=torch.float64).cos().bfloat16().to(x.dtype).view(x.shape)


def error(a: Tensor, b: Tensor) -> float:
    """Largest difference, relative to the largest element where that is above 1."""
    return float((a - b).detach().abs().max() / b.detach().abs().max().clamp(min=1.0)) if a.numel() else 0.0


def cast(leaves: list[Tensor], dtype: torch.dtype) -> list[Tensor]:
    return [x.detach().to(dtype).requires_grad_() for x in leaves]


def test_the_definition_is_gradient_descent_with_momentum_and_forgetting() -> None:
    """The paper's eq. 10, 13 and 14 with the gradient of eq. 12 taken by autograd."""
    leaves = [x.detach() for x in inputs(9, "moderate")]
    q, k, v, rate, memory, surprise, log_momentum, log_decay = leaves
    for chunk in (1, 4):
        m, s, outs = memory, surprise, []
        for t in range(9):
            if t % chunk == 0:
                w = m.clone().requires_grad_()
            surprise_now = (torch.einsum("bhd,bhde->bhe", k[:, :, t], w) - v[:, :, t]).square().sum()
            (gradient,) = torch.autograd.grad(surprise_now, w)
            s = log_momentum[:, :, t, None, None].exp() * s - rate[:, :, t, None, None] * gradient
            alpha = 1 - log_decay[:, :, t, None, None].exp()
            m = (1 - alpha) * m + s
            outs.append(torch.einsum("bhd,bhde->bhe", q[:, :, t], m))
        out, state = call(leaves, backend="reference", chunk=chunk, scale=1.0)
        assert error(out, torch.stack(outs, dim=2)) < 1e-14
        assert error(state.memory, m) < 1e-14
        assert error(state.surprise, s) < 1e-14


@pytest.mark.parametrize("backend", ["torch", "recurrent"])
@pytest.mark.parametrize("kind", ["none", "usual", "moderate", "strong", "all"])
@pytest.mark.parametrize("length", [1, 2, 7, 63, 64, 65, 130])
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


@pytest.mark.parametrize("backend", ["torch", "recurrent"])
@pytest.mark.parametrize("kind", ["none", "moderate"])
@pytest.mark.parametrize("chunk", [2, 3, 16, 33, 64, 65, 100, 101, 128, 1000])
def test_chunks_of_gradients_are_the_definition(chunk: int, kind: str, backend: str) -> None:
    """Shorter and longer than the pieces that are computed at once, dividing the length or not."""
    for length in (65, 128, 230):
        leaves = inputs(length, kind)
        with torch.no_grad():
            leaves[3] *= 0.1
        right = with_gradients(leaves, backend="reference", chunk=chunk)
        for a, b in zip(with_gradients(leaves, backend=backend, chunk=chunk), right, strict=True):
            assert error(a, b) < 1e-12
        out = titans_memory(*leaves[:3], rate=leaves[3], chunk=chunk, backend=backend)
        assert error(out, titans_memory(*leaves[:3], rate=leaves[3], chunk=chunk, backend="reference")) < 1e-12


@pytest.mark.parametrize("chunk", [1, 3, 100, 1000])
def test_ranges_of_pieces_are_the_whole(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Many pieces at once, and one at a time."""
    leaves = inputs(300, "moderate")
    with torch.no_grad():
        leaves[3] *= 0.1
    right = with_gradients(leaves, backend="reference", chunk=chunk)
    for elements in (1, 3 * 64 * 4 * 5, 1 << 20):
        monkeypatch.setattr(chunked, "_AT_ONCE", elements)
        for a, b in zip(with_gradients(leaves, backend="torch", chunk=chunk), right, strict=True):
            assert error(a, b) < 1e-12


def test_200_draws() -> None:
    """Random shapes, strides, steps, gates, chunks, padding and types: finite, and equal to the definition."""
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
        dtype = draw.choice([torch.float64, torch.float32, torch.bfloat16])
        chunk = draw.choice([1, 1, 1, 4, 50, 70])
        if chunk > 1:  # what all tokens of a chunk write adds up
            leaves[3] = (leaves[3] / chunk).detach().requires_grad_()
        given = cast(leaves, dtype)
        options: dict[str, Any] = {"scale": draw.choice([None, 0.3]), "chunk": chunk}
        if draw.random() < 0.3:  # padding, with whatever under it
            gone = torch.rand(leaves[0].shape[0], length) < 0.3
            options["key_padding_mask"] = ~gone
            for i in (1, 2, 3, *range(6, len(given))):
                m = gone[:, None] if given[i].dim() == 3 else gone[:, None, :, None]
                given[i] = given[i].detach().masked_fill(m, torch.nan).requires_grad_()
        if draw.random() < 0.4:  # strides of a projection split into heads
            given = [x.detach().transpose(1, 2).contiguous().transpose(1, 2).requires_grad_() for x in given]
        right = with_gradients(cast(given, torch.float64), backend="reference", **options)
        found = with_gradients(given, backend="torch", **options)
        assert found[0].dtype is dtype
        assert found[1].dtype is found[2].dtype is (torch.float64 if dtype is torch.float64 else torch.float32)
        for a, b in zip(found, right, strict=True):
            assert a.isfinite().all(), (turn, kind, dtype)
            # bfloat16 results are rounded once: to 8 bits.
            assert error(a.double(), b) < LIMIT.get(dtype, 5e-3), (turn, kind, dtype, chunk)


@pytest.mark.parametrize("kind", ["usual", "moderate"])
@pytest.mark.parametrize("backend", ["torch", "recurrent", "reference"])
@pytest.mark.parametrize("chunk", [1, 4, 16])
def test_agrees_with_flash_linear_attention(
    fla: Any, chunk: int, backend: str, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its recurrence and its chunks, in the limit where its layer norms do nothing but to subtract the mean.

    It learns values less keys behind a layer norm with weights w, and adds a layer norm to the outputs. With an epsilon
    far above all variances and w its root, a norm is the identity on what has mean 0, as everything has here; its
    steps then carry a factor w·D, and its outputs a factor 2.
    """
    for dtype, limit in LIMIT.items():
        leaves = inputs(48, kind, values=5)
        with torch.no_grad():
            leaves[3] *= 0.1
            leaves[2] -= leaves[2].mean(-1, keepdim=True)
            leaves[4] -= leaves[4].mean(-1, keepdim=True)
            leaves[5].zero_()  # it has no momentum to begin with
        q, k, v, rate, memory, _, log_momentum, log_decay = leaves = cast(leaves, dtype)
        epsilon = 1e30 if dtype is torch.float64 else 1e14
        w = torch.full((2, 5), epsilon**0.5, dtype=dtype)
        given = {"q": q, "k": k, "v": v + k}
        more = {"theta": rate / (5 * epsilon**0.5), "eta": log_momentum.exp(), "alpha": -torch.expm1(log_decay)}
        given = {name: x.transpose(1, 2) for name, x in given.items()}
        more = {name: x.transpose(1, 2).unsqueeze(-1) for name, x in more.items()}
        mine = with_gradients(leaves, backend=backend, chunk=chunk, scale=1.0)
        for parallel in (False, True):
            with monkeypatch.context() as patch:
                if dtype is torch.float64:
                    patch.setattr(torch, "float32", torch.float64)
                with default_dtype(dtype):
                    out, final = fla(
                        **given,
                        **more,
                        w=w,
                        b=torch.zeros_like(w),
                        eps=epsilon,
                        chunk_size=chunk,
                        initial_state=memory,
                        output_final_state=True,
                        use_chunk=parallel,
                    )
            out = out.transpose(1, 2) / 2
            assert error(mine[0], out) < limit
            assert error(mine[1], final) < limit


@pytest.mark.parametrize("backend", ["torch", "recurrent", "reference"])
@pytest.mark.parametrize("case", ["chunk_1", "chunk_4", "chunk_7"])
@pytest.mark.parametrize("dtype", LIMIT, ids=str)
def test_agrees_with_the_neural_memory_of_titans_pytorch(dtype: torch.dtype, case: str, backend: str) -> None:
    """Of depth 1: the same memory by autograd of the loss and associative scans; the .json says how it was run."""
    golden = {
        name.removeprefix(case + "."): x.to(dtype)
        for name, x in load_file(GOLDEN / "core_titans.safetensors").items()
        if name.startswith(case + ".")
    }
    chunk = json.loads((GOLDEN / "core_titans.json").read_text(encoding="utf-8"))["cases"][case]["chunk"]
    weights = {
        name.removeprefix("weight."): x.requires_grad_() for name, x in golden.items() if name.startswith("weight.")
    }
    x = golden["x"].requires_grad_()
    batch, width = x.shape[0], x.shape[2]

    def linear(name: str) -> Tensor:
        return F.linear(x, weights[f"{name}.weight"], weights.get(f"{name}.bias")).unsqueeze(1)

    memory = weights["memory"].expand(batch, 1, width, width)
    out, state = titans_memory(
        linear("q"),
        linear("k"),
        linear("v"),
        rate=torch.sigmoid(linear("rate")).squeeze(-1) / width,
        log_momentum=F.logsigmoid(linear("momentum")).squeeze(-1),
        log_decay=F.logsigmoid(-linear("decay")).squeeze(-1),
        chunk=chunk,
        scale=1.0,
        initial_state=TitansState(memory, torch.zeros_like(memory)),
        return_state=True,
        backend=backend,
    )
    out = out.squeeze(1)
    gradients = torch.autograd.grad(
        (out * torch.arange(out.numel(), dtype=dtype).cos().view(out.shape)).sum(), [x, *weights.values()]
    )
    pairs = [
        (out, golden["output"]),
        (state.memory.view(batch, width, width), golden["memory.end"]),
        (state.surprise.view(batch, width, width), golden["surprise.end"].view(batch, width, width)),
    ]
    pairs += zip(gradients, [golden["grad.x"], *(golden[f"grad.weight.{name}"] for name in weights)], strict=True)
    for a, b in pairs:
        assert error(a, b) < LIMIT[dtype]


@pytest.mark.parametrize("backend", ["torch", "recurrent"])
def test_without_momentum_and_forgetting_it_is_the_delta_rule(backend: str) -> None:
    leaves = inputs(90, "none")
    right = delta_rule(*leaves[:3], beta=2 * leaves[3], initial_state=leaves[4], return_state=True, backend="reference")
    out, state = call(leaves, backend=backend)
    assert error(out, right[0]) < 1e-13
    assert error(state.memory, right[1]) < 1e-13


@pytest.mark.parametrize("chunk", [1, 4, 64, 70, 100])
@pytest.mark.parametrize("pieces", [[1] * 140, [140], [64, 1, 75], [3, 66, 1, 70]], ids=len)
def test_steps_are_the_whole(pieces: list[int], chunk: int) -> None:
    """A state knows where in a chunk of gradients it is."""
    for dtype, limit in LIMIT.items():
        leaves = inputs(140, "moderate")
        with torch.no_grad():
            leaves[3] *= 0.1
        leaves = cast(leaves, dtype)
        right = with_gradients(leaves, chunk=chunk)
        q, k, v, rate, memory, surprise, log_momentum, log_decay = leaves
        state, outs = TitansState(memory, surprise), []
        for part in zip(*(x.split(pieces, dim=2) for x in (q, k, v, rate, log_momentum, log_decay)), strict=True):
            out, state = titans_step(
                *part[:3], rate=part[3], log_momentum=part[4], log_decay=part[5], state=state, chunk=chunk
            )
            outs.append(out)
        assert state.seen == 140 % chunk
        assert (state.anchor is None) == (chunk == 1)
        whole = torch.cat(outs, dim=2)
        found = [whole, state.memory, state.surprise, *torch.autograd.grad(loss(whole, state), leaves)]
        for a, b in zip(found, right, strict=True):
            assert error(a, b) < limit


def test_steps_without_gradients_take_the_recurrence_and_keep_the_state_given() -> None:
    leaves = [x.detach() for x in inputs(3)]
    q, k, v, rate, memory, surprise, log_momentum, log_decay = leaves
    state = TitansState(memory, surprise)
    kept = [memory.clone(), surprise.clone()]
    out, after = titans_step(q, k, v, rate=rate, log_momentum=log_momentum, log_decay=log_decay, state=state)
    right = call(leaves, backend="reference")
    assert error(out, right[0]) < 1e-14
    assert error(after.memory, right[1].memory) < 1e-14
    assert torch.equal(memory, kept[0])
    assert torch.equal(surprise, kept[1])
    begun = titans_step(q, k, v, rate=rate, state=None)[0]
    assert torch.equal(begun, titans_memory(q, k, v, rate=rate))
    few, many = ((1, 2, n, 8) for n in (1, 100))
    assert OPERATOR.choose(Request(few, few, few)).name == "recurrent"
    assert OPERATOR.choose(Request(few, few, few, requires_grad=True)).name == "torch"
    assert OPERATOR.choose(Request(many, many, many)).name == "torch"
    rows = torch.tensor([1, 0, 1])
    chosen = TitansState(memory, surprise, memory, 1).select(rows)
    assert torch.equal(chosen.memory, memory[rows])
    assert torch.equal(chosen.surprise, surprise[rows])
    assert chosen.anchor is not None
    assert chosen.seen == 1


@pytest.mark.parametrize("backend", ["torch", "recurrent", "reference"])
@pytest.mark.parametrize("kind", ["none", "moderate"])
def test_padding_neither_decays_nor_writes_nor_moves(kind: str, backend: str) -> None:
    """With gradients of every token, a padded sequence is the one without the padded tokens."""
    leaves = inputs(90, kind)
    gone = torch.zeros(2, 90, dtype=torch.bool)
    gone[:, 5:9] = gone[:, 40:80] = gone[:, 88:] = True
    out, state = call(leaves, key_padding_mask=~gone, backend=backend)
    along = [x[:, :, ~gone[0]] if i in (0, 1, 2, 3, 6, 7) else x for i, x in enumerate(leaves)]
    right, end = call(along, backend="reference")
    assert error(out[:, :, ~gone[0]], right) < 1e-13
    assert error(state.memory, end.memory) < 1e-13
    assert error(state.surprise, end.surprise) < 1e-13
    everything = torch.zeros(2, 90, dtype=torch.bool)
    state = call(leaves, key_padding_mask=everything, backend=backend)[1]
    assert error(state.memory, leaves[4]) < 1e-15


def test_gates_of_zero_stop_memory_and_momentum() -> None:
    """Logarithms of minus infinity. The memory before is still what the token's gradient is taken at."""
    leaves = inputs(90, "moderate")
    with torch.no_grad():
        for i in (6, 7):
            leaves[i][:, :, 0] = leaves[i][:, :, 37] = leaves[i][:, :, 64] = -torch.inf
    found = with_gradients(leaves, backend="torch")
    assert all(x.isfinite().all() for x in found)
    for a, b in zip(found, with_gradients(leaves, backend="recurrent"), strict=True):
        assert b.isfinite().all()
        assert error(a, b) < 1e-12
    assert found[3 + 4].any()
    assert not found[3 + 5].any()


@pytest.mark.parametrize("chunk", [1, 16, 256])
@pytest.mark.parametrize("kind", ["usual", "strong", "all"])
def test_65536_tokens(kind: str, chunk: int) -> None:
    """Finite and right at the end of a long sequence, whose sums of logarithms reach a million."""
    length = 65_536
    leaves = inputs(length, kind, batch=1, heads=1, width=8, values=8)
    with torch.no_grad():
        leaves[3] /= chunk
    leaves = cast(leaves, torch.float32)
    found = with_gradients(leaves, backend="torch", chunk=chunk)
    assert all(x.isfinite().all() for x in found)
    # In float64 the same, and at the end also the definition, from the state that float64 has there.
    right = with_gradients(cast(leaves, torch.float64), backend="torch", chunk=chunk)
    for a, b in zip(found, right, strict=True):
        assert error(a.double(), b) < 1e-5
    parts = [x.detach().double() for x in leaves]
    along = (0, 1, 2, 3, 6, 7)
    first = [x[:, :, :-256] if i in along else x for i, x in enumerate(parts)]
    last = [x[:, :, -256:] if i in along else x for i, x in enumerate(parts)]
    state = call(first, chunk=chunk)[1]
    out, state = call(last, chunk=chunk, initial_state=state, backend="reference")
    assert error(found[0][:, :, -256:].double(), out) < 1e-5
    assert error(found[1].double(), state.memory) < 1e-5
    assert error(found[2].double(), state.surprise) < 1e-5


def test_bfloat16_keeps_its_state_in_float32() -> None:
    """Small steps towards one value: in bfloat16 a memory of 0.5 could not grow by 1/1024."""
    ones = torch.ones(1, 1, 8192, 1, dtype=torch.bfloat16)
    rate = torch.full((1, 1, 8192), 2.0**-11, dtype=torch.bfloat16)
    for backend in ("torch", "recurrent"):
        found = titans_memory(ones, ones, ones, rate=rate, scale=1.0, return_state=True, backend=backend)
        assert isinstance(found, tuple)
        out, state = found
        assert out.dtype is torch.bfloat16
        assert state.memory.dtype is torch.float32
        assert abs(state.memory.item() - (1 - (1 - 2.0**-10) ** 8192)) < 1e-5


@pytest.mark.parametrize("backend", ["torch", "recurrent", "reference"])
def test_no_tokens(backend: str) -> None:
    leaves = inputs(0)
    out, memory, surprise, *gradients = with_gradients(leaves, backend=backend)
    assert out.shape == (2, 2, 0, 3)
    assert torch.equal(memory, leaves[4])
    assert torch.equal(surprise, leaves[5])
    assert torch.equal(gradients[4], wave(memory).flip(-1))


@pytest.mark.parametrize("chunk", [1, 2, 6])
@pytest.mark.parametrize("kind", ["none", "usual", "strong"])
def test_finite_differences(kind: str, chunk: int) -> None:
    leaves = inputs(6, kind, batch=1, heads=1, width=3, values=2)
    with torch.no_grad():
        leaves[3] += 1e-3
        for gate in leaves[6:]:
            gate -= 1e-3

    def flat(backend: str) -> Callable[..., tuple[Tensor, ...]]:
        def function(*x: Tensor) -> tuple[Tensor, ...]:
            out, state = call(list(x), backend=backend, chunk=chunk)
            return out, state.memory, state.surprise

        return function

    assert torch.autograd.gradcheck(flat("torch"), leaves)
    if chunk == 1:
        with pytest.raises(RuntimeError, match="no second derivative"):
            torch.autograd.gradgradcheck(flat("torch"), leaves)
        assert torch.autograd.gradgradcheck(flat("reference"), leaves)


def test_operator_is_well_formed() -> None:
    """Schema, fake tensors and autograd registration, as torch.compile and torch.export rely on them."""
    q, k, v, rate, memory, surprise, log_momentum, log_decay = cast(inputs(70), torch.float32)
    op = chunked._op._opoverload
    mask = torch.rand(2, 70) < 0.7
    torch.library.opcheck(op, (q, k, v, rate, log_momentum, log_decay, mask, memory, surprise, None, 1, 0.5))
    torch.library.opcheck(op, (q, k, v, rate, None, None, None, None, None, None, 3, 0.5))
    torch.library.opcheck(op, (q, k, v, rate, None, log_decay, None, memory, None, memory, 100, 0.5))
    frozen = [x.detach().bfloat16() for x in (q, k, v, rate)]
    torch.library.opcheck(op, (*frozen, None, None, None, None, None, None, 1, 0.5))


@pytest.mark.parametrize("chunk", [1, 66])
def test_compiles_and_autocasts(chunk: int) -> None:
    leaves = cast(inputs(140), torch.float32)
    with torch.no_grad():
        leaves[3] /= chunk
    compiled = torch.compile(lambda *x: call(list(x), chunk=chunk), backend="aot_eager", fullgraph=True)
    right = with_gradients(leaves, chunk=chunk)
    out, state = compiled(*leaves)
    found = [out, state.memory, state.surprise, *torch.autograd.grad(loss(out, state), leaves)]
    for a, b in zip(found, right, strict=True):
        assert error(a, b) < 1e-6
    with torch.autocast("cpu", torch.bfloat16):
        low, state = call(leaves, chunk=chunk)
    assert low.dtype is torch.bfloat16
    assert state.memory.dtype is torch.float32
    assert error(low.float(), right[0]) < 0.05


@pytest.mark.parametrize("chunk", [1, 256])
def test_growth(chunk: int) -> None:
    counts = []
    for length in (512, 16_384):
        leaves = cast(inputs(length, "strong", batch=1, heads=1, width=8, values=8), torch.float32)
        counts.append(growth.count(lambda leaves=leaves: call(leaves, chunk=chunk)[0].sum().backward()))
    assert counts[1].work / counts[0].work < 33
    assert counts[1].peak_bytes / counts[0].peak_bytes < 33


STATE = TitansState(torch.zeros(2, 2, 4, 3), torch.zeros(2, 2, 4, 3))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"q": torch.randn(2, 2, 5)}, r"shape \(B, H, L, D\)"),
        ({"k": torch.randn(2, 1, 5, 4), "v": torch.randn(2, 1, 5, 3)}, "as many heads and tokens"),
        ({"q": torch.randn(2, 2, 4, 4)}, "as many heads and tokens"),
        ({"v": torch.randn(2, 2, 6, 3)}, "do not fit"),
        ({"rate": torch.zeros(2, 2, 5, 1)}, r"rate must be floating point of shape \(B, H, L\)"),
        ({"rate": torch.zeros(2, 2, 5, dtype=torch.long)}, "rate must be floating point"),
        ({"rate": torch.full((2, 2, 5), -0.5)}, "rate must be at least 0"),
        ({"log_decay": torch.zeros(2, 5)}, r"log_decay must be floating point of shape \(B, H, L\)"),
        ({"log_decay": torch.full((2, 2, 5), 0.5)}, "log_decay must be at most 0"),
        ({"log_momentum": torch.full((2, 2, 5), 0.5)}, "log_momentum must be at most 0"),
        ({"chunk": 0}, "chunk must be at least 1"),
        ({"key_padding_mask": torch.ones(2, 4, dtype=torch.bool)}, r"shape \(B, M\) = \(2, 5\)"),
        (
            {"initial_state": STATE._replace(memory=torch.zeros(2, 2, 3, 4))},
            r"memory must have shape .* \(2, 2, 4, 3\)",
        ),
        ({"initial_state": STATE._replace(surprise=torch.zeros(2, 4, 3))}, "surprise must have shape"),
        ({"initial_state": STATE._replace(seen=3), "chunk": 4}, "seen 3 tokens of a chunk and no anchor"),
        ({"initial_state": STATE._replace(seen=3, anchor=STATE.memory)}, "does not fit chunks of 1"),
        ({"backend": "fast"}, "backend"),
    ],
)
def test_errors(change: dict[str, Any], says: str) -> None:
    arguments = {"q": torch.randn(2, 2, 5, 4), "k": torch.randn(2, 2, 5, 4), "v": torch.randn(2, 2, 5, 3)}
    arguments = {**arguments, "rate": torch.ones(2, 2, 5), **change}
    with pytest.raises(ValueError, match=says):
        titans_memory(**arguments)
