"""The C++ kernel of softmax_attention: against the definition where it can be built, and what happens where not.

It is compiled once, into a folder of this test session, so that nothing else in the suite changes with it.
"""

from __future__ import annotations

import itertools
import os
import random
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from core_attn.dispatch import BackendError, Request
from core_attn.ops import softmax_attention
from core_attn.ops.softmax import OPERATOR, cpu

DTYPES = [torch.float32, torch.bfloat16]
LONG = Request((1, 8, 4096, 64), (1, 8, 4096, 64), (1, 8, 4096, 64))


def forget() -> None:
    """As in a new process, but for the operators registered with torch."""
    cpu._failures.clear()
    for cached in (cpu._kernel, cpu._load, cpu._cpu_flags, cpu._exported, cpu._key):
        cached.cache_clear()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Where the kernel of this session is, built or not."""
    with pytest.MonkeyPatch.context() as patch:
        path = tmp_path_factory.mktemp("extensions")
        patch.setenv("TORCH_EXTENSIONS_DIR", str(path))
        forget()
        yield path
        forget()


@pytest.fixture(scope="module")
def kernel(folder: Path) -> None:
    reason = cpu.unavailable()
    if reason is not None:
        pytest.skip(reason)
    cpu.build()


@pytest.fixture
def elsewhere(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A cache without a kernel."""
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    forget()
    yield tmp_path
    monkeypatch.undo()
    forget()


def able(dtype: torch.dtype) -> None:
    reason = cpu.why_not(LONG._replace(dtype=dtype))
    if reason is not None:
        pytest.skip(reason)


def inputs(
    queries: int,
    keys: int,
    *,
    batch: int = 1,
    heads: int = 2,
    key_heads: int = 2,
    channels: int = 16,
    value: int = 16,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> list[Tensor]:
    torch.manual_seed(seed)
    shapes = ((batch, heads, queries, channels), (batch, key_heads, keys, channels), (batch, key_heads, keys, value))
    return [torch.randn(s).to(dtype).requires_grad_() for s in shapes]


def outcome(backend: str, tensors: list[Tensor], **options: Any) -> list[Tensor]:
    """Output and gradients, for a loss that treats no two elements alike."""
    out = softmax_attention(*tensors, backend=backend, **options)
    probe = torch.sin(torch.arange(out.numel(), dtype=torch.float64)).view(out.shape).to(out.dtype)
    return [out, *torch.autograd.grad(out, tensors, probe)]


def definition(tensors: list[Tensor], **options: Any) -> list[Tensor]:
    return outcome("reference", [x.detach().double().requires_grad_() for x in tensors], **options)


def worst(found: list[Tensor], expected: list[Tensor]) -> float:
    """Largest error of anything, relative to the largest element of the same tensor where that is above 1."""
    assert all(torch.isfinite(x).all() for x in found)
    return max(
        ((a.double() - b).abs().max() / b.abs().max().clamp(min=1)).item() for a, b in zip(found, expected, strict=True)
    )


def check(tensors: list[Tensor], **options: Any) -> None:
    found, expected = outcome("cpu", tensors, **options), definition(tensors, **options)
    if tensors[0].dtype is torch.float32:
        assert worst(found, expected) < 1e-5
        return
    # bfloat16: rounding may cost what it costs the blocked form, which rounds only inputs and outputs, and then the
    # weights' own rounding to 8 bits, in gradients even where they cancel: inputs, and so gradients, are of size 1.
    blocked = outcome("torch", tensors, **options)
    assert all(torch.isfinite(x).all() for x in found)
    for a, b, exact in zip(found, blocked, expected, strict=True):
        allowed = 3 * (b.double() - exact).norm() + 0.004 * exact.norm().clamp(min=exact.numel() ** 0.5)
        assert (a.double() - exact).norm() <= allowed


# Against the definition


@pytest.mark.usefixtures("kernel")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [(1, 1), (1, 300), (64, 128), (65, 129), (127, 63), (300, 1), (333, 555)], ids=str)
def test_lengths_and_windows(dtype: torch.dtype, size: tuple[int, int]) -> None:
    able(dtype)
    windows = [None, 1, 40, (70, 3), (0, None), (None, 130)]
    for causal, window in itertools.product([False, True], windows):
        check(inputs(*size, dtype=dtype), causal=causal, window=window)


@pytest.mark.usefixtures("kernel")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sizes", [(1, 1), (3, 5), (64, 64), (80, 33), (128, 128), (256, 256)], ids=str)
@pytest.mark.parametrize("key_heads", [6, 3, 1])
def test_head_sizes_and_grouped_heads(dtype: torch.dtype, sizes: tuple[int, int], key_heads: int) -> None:
    able(dtype)
    channels, value = sizes
    check(
        inputs(90, 140, batch=2, heads=6, key_heads=key_heads, channels=channels, value=value, dtype=dtype),
        causal=True,
    )


@pytest.mark.usefixtures("kernel")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("window", [None, 200])
def test_several_rounds_of_tiles(dtype: torch.dtype, window: int | None) -> None:
    """Longer than what is kept at hand at once, forward (1,024 keys) and backward (1,024 queries)."""
    able(dtype)
    check(inputs(1300, 1500, heads=1, key_heads=1, channels=32, value=32, dtype=dtype), causal=True, window=window)


@pytest.mark.usefixtures("kernel")
@pytest.mark.parametrize("dtype", DTYPES)
def test_error_no_more_than_twice_that_of_torch(dtype: torch.dtype) -> None:
    able(dtype)
    for options in ({}, {"causal": True}):
        tensors = inputs(512, 512, heads=4, key_heads=4, channels=64, value=64, dtype=dtype)
        expected = definition(tensors, **options)
        found, torchs = outcome("cpu", tensors, **options), outcome("sdpa", tensors, **options)
        for a, b, exact in zip(found, torchs, expected, strict=True):
            assert (a.double() - exact).norm() <= 2 * (b.double() - exact).norm()
            assert (a.double() - exact).abs().max() <= 2 * (b.double() - exact).abs().max()


@pytest.mark.usefixtures("kernel")
@pytest.mark.parametrize("dtype", DTYPES)
def test_two_hundred_draws(dtype: torch.dtype) -> None:
    able(dtype)
    draw = random.Random(20)
    for seed in range(100):
        key_heads = draw.choice([1, 2, 3])
        queries, keys = (draw.choice([1, 2, 31, 64, 97, 128, 130, 257]) for _ in range(2))
        batch, channels = draw.choice([1, 2]), draw.choice([1, 7, 8, 20, 32, 64, 65])
        tensors = inputs(
            queries,
            keys,
            batch=batch,
            heads=key_heads * draw.choice([1, 2]),
            key_heads=key_heads,
            channels=channels,
            value=draw.choice([channels, 5, 40]),
            dtype=dtype,
            seed=seed,
        )
        layout = draw.choice(["plain", "transposed", "channels apart", "every other row"])
        if layout == "transposed":
            tensors = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in tensors]
        elif layout == "channels apart":
            tensors = [x.mT.contiguous().mT for x in tensors]
        elif layout == "every other row":
            tensors = [x.repeat_interleave(2, dim=2)[:, :, ::2] for x in tensors]
        tensors = [x.detach().requires_grad_() for x in tensors]
        options: dict[str, Any] = {"causal": draw.random() < 0.5}
        if draw.random() < 0.6:
            options["window"] = draw.choice([1, 17, 100, (0, 0), (5, 200), (None, 3), (64, None)])
        if draw.random() < 0.3:
            options["scale"] = draw.choice([0.0, -1.0, 3.0, 0.01]) * channels**-0.5
        if draw.random() < 0.5:
            padding = torch.rand(batch, keys) > draw.choice([0.0, 0.4, 1.0])
            padding[-1, keys // 2 :] = False
            options["key_padding_mask"] = padding
            with torch.no_grad():
                for x in tensors[1:]:
                    x.masked_fill_(~padding[:, None, :, None], draw.choice([float("nan"), float("inf"), 3.0]))
            expected = definition([tensors[0], *(x.nan_to_num(0, 0, 0) for x in tensors[1:])], **options)
        else:
            expected = definition(tensors, **options)
        found = outcome("cpu", tensors, **options)
        limit = 1e-5 if dtype is torch.float32 else 0.05
        assert worst(found, expected) < limit, (seed, options, layout)
        empty = expected[0].abs().amax(-1) == 0
        assert found[0][empty].abs().sum() == 0
        assert found[1][empty].abs().sum() == 0


@pytest.mark.usefixtures("kernel")
@pytest.mark.parametrize("dtype", DTYPES)
def test_scores_too_large_for_a_fixed_base(dtype: torch.dtype) -> None:
    """Beyond what needs no running maximum; rows whose maximum grows from block to block among them."""
    able(dtype)
    q, k, v = inputs(150, 700, channels=32, dtype=dtype)
    with torch.no_grad():
        k *= torch.linspace(0.1, 12.0, 700)[:, None]
        k[:, :, :64] *= 20
    for options in ({}, {"causal": True}, {"window": (300, 5)}, {"scale": -2.0}):
        if dtype is torch.float32:  # scores of thousands have errors of 1e-4 in any float32
            expected = definition([q, k, v], **options)
            torchs = worst(outcome("torch", [q, k, v], **options), expected)
            assert worst(outcome("cpu", [q, k, v], **options), expected) <= max(1e-5, 2 * torchs)
        else:
            check([q, k, v], **options)
    huge = outcome("cpu", [q, k, v], scale=1e4)
    assert all(torch.isfinite(x).all() for x in huge)


@pytest.mark.usefixtures("kernel")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("options", [{"causal": True}, {"causal": True, "window": 100}], ids=str)
def test_no_leak_from_the_future(dtype: torch.dtype, options: dict[str, Any]) -> None:
    able(dtype)
    q, k, v = inputs(200, 260, dtype=dtype)
    before = softmax_attention(q, k, v, backend="cpu", **options)
    with torch.no_grad():
        k[:, :, 161:] += 10
        v[:, :, 161:] -= 10
    after = softmax_attention(q, k, v, backend="cpu", **options)
    assert torch.equal(before[:, :, :101], after[:, :, :101])  # query 100 stands at key 160
    assert (before[:, :, 101] != after[:, :, 101]).any()
    grads = torch.autograd.grad(after[:, :, :101].float().sum(), (k, v))
    assert all(g[:, :, 161:].abs().max() == 0 for g in grads)


@pytest.mark.usefixtures("kernel")
@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_without_keys_are_zero_with_zero_gradients(dtype: torch.dtype) -> None:
    able(dtype)
    tensors = inputs(140, 90, batch=2, dtype=dtype)
    padding = torch.ones(2, 90, dtype=torch.bool)
    padding[1] = False
    out, dq, dk, dv = outcome("cpu", tensors, causal=True, key_padding_mask=padding)
    for x in (out, dq):
        assert x[0, :, :50].abs().max() == 0  # 50 queries stand before the first key
        assert x[0, :, 51:].abs().amax(-1).min() > 0
        assert x[1].abs().max() == 0
    assert dk[1].abs().max() == dv[1].abs().max() == 0


@pytest.mark.usefixtures("kernel")
def test_nan_of_a_real_token_is_not_hidden() -> None:
    q, k, v = inputs(80, 80)
    with torch.no_grad():
        q[0, 0, 3, 0] = float("nan")
        v[0, 1, 5, 1] = float("nan")
    out = softmax_attention(q, k, v, backend="cpu")
    assert out[0, 0, 3].isnan().all()
    assert not out[0, 0, [2, 4]].isnan().any()
    assert out[0, 1, :, 1].isnan().all()
    assert not out[0, 1, :, [0, 2]].isnan().any()


@pytest.mark.usefixtures("kernel")
@pytest.mark.parametrize("dtype", DTYPES)
def test_threads_change_nothing(dtype: torch.dtype) -> None:
    able(dtype)
    tensors = inputs(300, 300, batch=2, heads=6, key_heads=2, dtype=dtype)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = outcome("cpu", tensors, causal=True)
        torch.set_num_threads(3)
        together = outcome("cpu", tensors, causal=True)
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip(alone, together, strict=True))


@pytest.mark.usefixtures("kernel")
@pytest.mark.parametrize("limit", ["AVX512_CORE_BF16", "AVX512_CORE"])
def test_without_a_tile_unit(limit: str) -> None:
    """float32 is multiplied as it is then; bfloat16 runs or is refused in words. In a process with oneDNN held back."""
    code = """
import torch
from core_attn.dispatch import BackendError
from core_attn.ops import softmax_attention

torch.manual_seed(0)
for options in ({}, {"causal": True, "window": 150}, {"scale": 1.0}):
    tensors = [torch.randn(1, heads, 300, 40, requires_grad=True) for heads in (4, 2, 2)]
    exact = [x.detach().double().requires_grad_() for x in tensors]
    found = softmax_attention(*tensors, backend="cpu", **options)
    expected = softmax_attention(*exact, backend="reference", **options)
    found = [found, *torch.autograd.grad(found.square().sum(), tensors)]
    expected = [expected, *torch.autograd.grad(expected.square().sum(), exact)]
    for a, b in zip(found, expected):
        assert (a - b).abs().max() < 1e-5 * max(1, b.abs().max()), (options, (a - b).abs().max())
try:
    half = softmax_attention(*(x.bfloat16() for x in tensors), backend="cpu")
    assert (half - softmax_attention(*tensors)).abs().max() < 0.05
except BackendError as error:
    print("refused:", error)
print("done")
"""
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        encoding="utf-8",
        env={**os.environ, "ONEDNN_MAX_CPU_ISA": limit},
    )
    assert "done" in done.stdout, done.stderr
    assert ("refused" in done.stdout) == (limit == "AVX512_CORE" or "avx512_bf16" not in cpu._cpu_flags())


# As an operator of torch


@pytest.mark.usefixtures("kernel")
def test_operator_rules() -> None:
    q, k, v = inputs(40, 50, heads=4)
    padding = torch.rand(1, 50) > 0.3
    torch.library.opcheck(cpu._op, (q, k, v, None, None, None, 0.25))
    torch.library.opcheck(cpu._op, (q, k, v, padding, 10, 0, 0.25))
    bare = [x.detach() for x in (q, k, v)]
    out, lse = cpu._op(*bare, padding, 10, 0, 0.25)
    torch.library.opcheck(cpu._backward_op, (torch.ones_like(out), out, lse, *bare, padding, 10, 0, 0.25))


@pytest.mark.usefixtures("kernel")
def test_no_second_derivative() -> None:
    q, k, v = inputs(40, 40)
    (first,) = torch.autograd.grad(softmax_attention(q, k, v, backend="cpu").sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative; use backend='reference'"):
        torch.autograd.grad(first.sum(), q)


@pytest.mark.usefixtures("kernel")
@pytest.mark.parametrize("options", [{}, {"causal": True}, {"window": (20, 5)}], ids=str)
def test_counted_operations(options: dict[str, Any]) -> None:
    q, k, v = inputs(50, 70, channels=8, value=12)
    pairs = softmax_attention(q, k, torch.ones(1, 2, 70, 1), backend="reference", scale=0.0, **options).shape[2] * 70
    if options:
        eye = torch.eye(70).expand(1, 2, 70, 70)
        pairs = int((softmax_attention(q, k, eye, backend="reference", scale=0.0, **options)[0, 0] > 0).sum())
    with FlopCounterMode(display=False) as forward:
        out = softmax_attention(q, k, v, backend="cpu", **options)
    with FlopCounterMode(display=False) as backward:
        out.sum().backward()
    assert forward.get_total_flops() == 2 * 2 * pairs * (8 + 12)
    assert backward.get_total_flops() == 2 * 2 * pairs * (3 * 8 + 2 * 12)


# When it runs, and what is said where it does not


@pytest.mark.usefixtures("kernel")
def test_auto_takes_it_once_it_is_built() -> None:
    assert OPERATOR.choose(LONG).name == "cpu"
    assert OPERATOR.choose(LONG._replace(causal=True, window=(255, 0))).name == "cpu"
    few = LONG._replace(query=(1, 8, 1, 64))
    assert OPERATOR.choose(few).name != "cpu"
    assert "so few" in str(cpu.pass_over(few))
    assert "graph" in str(cpu.pass_over(LONG._replace(compiling=True)))


@pytest.mark.usefixtures("kernel")
def test_a_new_process_finds_it_in_the_cache(folder: Path) -> None:
    code = (
        "import os; os.environ['CXX'] = 'no-such-compiler'\n"
        "import torch; from core_attn.ops import softmax_attention\n"
        "q = torch.randn(1, 1, 64, 8)\n"
        "print(softmax_attention(q, q, q, backend='cpu').shape)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, encoding="utf-8")
    assert "[1, 1, 64, 8]" in done.stdout, done.stderr


@pytest.mark.usefixtures("kernel")
@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"device": "cuda"}, "it runs on the CPU, these tensors are on cuda"),
        ({"dtype": torch.float64}, "it has float32 and bfloat16, not float64"),
        ({"dtype": torch.float16}, "it has float32 and bfloat16, not float16"),
        ({"mask": True, "dropout": 0.1}, "it has no mask and no dropout"),
        ({"bias": True}, "it has no bias"),
        ({"key": (1, 8, 0, 64)}, "it takes no empty tensors"),
    ],
    ids=str,
)
def test_what_it_cannot_do(changed: dict[str, Any], reason: str) -> None:
    assert cpu.why_not(LONG._replace(**changed)) == reason


def assert_everything_else_works(reason: str) -> None:
    """auto runs another backend, asking by name is an error of one sentence, explain says why."""
    q, k, v = inputs(64, 64)
    expected = softmax_attention(q, k, v, backend="reference")
    torch.testing.assert_close(softmax_attention(q, k, v), expected, rtol=0, atol=1e-5)
    with pytest.raises(BackendError, match=reason) as caught:
        softmax_attention(q, k, v, backend="cpu")
    assert "these would run: sdpa" in str(caught.value)
    assert "\n" not in str(caught.value)
    line = next(c for c in OPERATOR.explain(LONG) if c.backend == "cpu")
    assert not line.runs
    assert not line.chosen
    assert reason in line.reason


def explain() -> str:
    """What the command line says about a long call, in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-c", "from core_attn.cli import main; main(['explain', 'softmax', '--length', '4096'])"],
        capture_output=True,
        encoding="utf-8",
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_without_a_compiler(elsewhere: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if cpu.unavailable() is not None:
        pytest.skip("another reason comes first")
    monkeypatch.setenv("CXX", "no-such-compiler")
    reason = "its kernel is compiled on first use, and the C++ compiler no-such-compiler is not installed"
    assert_everything_else_works("no-such-compiler is not installed")
    assert reason in " ".join(explain().split())
    assert not list(elsewhere.iterdir())


def test_without_torchs_headers(elsewhere: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if cpu.unavailable() is not None:
        pytest.skip("another reason comes first")
    found = cpu._torch()
    real = cpu._exported()
    monkeypatch.setattr(cpu, "_torch", lambda: elsewhere)
    monkeypatch.setattr(cpu, "_exported", lambda: real)
    assert found != elsewhere
    assert_everything_else_works("torch's headers are not installed")


def test_without_the_instructions(elsewhere: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu.sys, "platform", "linux")
    monkeypatch.setattr(cpu.platform, "machine", lambda: "x86_64")
    monkeypatch.setattr(cpu, "_cpu_flags", lambda: frozenset({"avx2", "fma", "avx512f", "avx512bw"}))
    assert_everything_else_works("it needs a CPU with AVX-512, this one lacks avx512dq, avx512vl")


def test_without_bfloat16_instructions(elsewhere: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if cpu.unavailable() is not None:
        pytest.skip("another reason comes first")
    monkeypatch.setattr(cpu, "_cpu_flags", lambda: frozenset(cpu._INSTRUCTIONS))
    assert cpu.why_not(LONG) is None
    assert "AVX512_BF16" in str(cpu.why_not(LONG._replace(dtype=torch.bfloat16)))
    assert "-mavx512bf16" not in cpu._flags()


def test_without_the_matmul(elsewhere: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if cpu.unavailable() is not None:
        pytest.skip("another reason comes first")
    monkeypatch.setattr(cpu, "_EXPORTS", ("no_such_symbol",))
    cpu._exported.cache_clear()
    assert_everything_else_works("does not export the small-tile matmul")


def test_on_another_system(elsewhere: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu.platform, "machine", lambda: "aarch64")
    assert_everything_else_works("it needs Linux on x86-64")


def test_a_compiler_that_fails(elsewhere: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One attempt, one sentence; after it "auto" and explain know, and nothing half made is left behind."""
    if cpu.unavailable() is not None:
        pytest.skip("another reason comes first")
    compiler = elsewhere / "broken"
    compiler.write_text("#!/bin/sh\necho 'cpu.cpp:1: fatal error: no such luck' >&2\nexit 1\n")
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    q, k, v = inputs(64, 64)
    with pytest.raises(BackendError, match="no such luck"):
        softmax_attention(q, k, v, backend="cpu")
    assert_everything_else_works("no such luck")
    assert not any(path.is_file() for path in elsewhere.rglob("*") if path != compiler)


def test_auto_never_compiles(elsewhere: Path) -> None:
    if cpu.unavailable() is not None:
        pytest.skip("another reason comes first")
    q, k, v = inputs(64, 64)
    softmax_attention(q, k, v)
    line = next(c for c in OPERATOR.explain(LONG) if c.backend == "cpu")
    assert line.runs
    assert not line.chosen
    assert "has not been compiled on this machine yet" in line.reason
    assert not list(elsewhere.iterdir())


def test_a_damaged_library_is_said(elsewhere: Path) -> None:
    if cpu.unavailable() is not None:
        pytest.skip("another reason comes first")
    library = cpu._library()
    library.parent.mkdir(parents=True)
    library.write_text("not a library")
    assert_everything_else_works("its compiled kernel cannot be loaded")
