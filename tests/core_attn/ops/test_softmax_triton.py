"""The Triton backend where there is no card: who may use it, what it would launch, how block sizes are chosen."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch

from core_attn import kernels
from core_attn.dispatch import BackendError, Request
from core_attn.kernels import Config
from core_attn.ops import softmax_attention
from core_attn.ops.softmax import OPERATOR, triton

CARD = {"dtype": torch.bfloat16, "device": "cuda"}


def request(length: int = 4096, channels: int = 64, **facts: Any) -> Request:
    shape = (1, 8, length, channels)
    return Request(shape, shape, shape, **{**CARD, **facts})


def test_on_the_cpu_it_says_what_it_needs() -> None:
    pytest.importorskip("triton")
    q = torch.randn(1, 2, 5, 8)
    with pytest.raises(BackendError, match=r"needs a CUDA device, or TRITON_INTERPRET=1.*these tensors are on cpu"):
        softmax_attention(q, q, q, backend="triton")


@pytest.mark.parametrize(
    ("facts", "reason"),
    [
        ({"dtype": torch.float64}, "float16, bfloat16 or float32, not float64"),
        ({"channels": 320}, "largest head size is 256, these have 320"),
        ({"length": 0}, "no empty tensors"),
        ({"dropout": 0.1}, "no dropout"),
        ({"bias": True, "bias_requires_grad": True}, "no gradient of the bias"),
        ({"device": "mps"}, "needs a CUDA device"),
    ],
    ids=str,
)
def test_what_it_cannot_do(facts: dict[str, Any], reason: str) -> None:
    pytest.importorskip("triton")
    assert reason in str(triton.why_not(request(**facts)))


def test_without_triton_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "_installed", lambda: False)
    assert triton.why_not(request()) == "the package triton is not installed"


def test_everything_else_works_without_triton() -> None:
    code = """
import sys
sys.modules["triton"] = None  # any import of it fails
import torch, core_attn.dispatch, core_attn.ops
core_attn.dispatch.operators()
q = torch.randn(1, 2, 5, 8)
core_attn.ops.softmax_attention(q, q, q, causal=True, window=2)
try:
    core_attn.ops.softmax_attention(q, q, q, backend="triton")
except core_attn.dispatch.BackendError as error:
    sys.exit("the package triton is not installed" not in str(error))
sys.exit("no error")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, encoding="utf-8", check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("facts", "chosen"),
    [
        ({}, "sdpa"),
        ({"causal": True}, "sdpa"),
        ({"causal": True, "window": (255, 0)}, "triton"),
        ({"key_padding": True}, "triton"),
        ({"bias": True, "key_padding": True}, "triton"),
        ({"bias": True, "bias_requires_grad": True}, "sdpa"),
    ],
    ids=str,
)
def test_which_backend_a_card_gets(facts: dict[str, Any], chosen: str) -> None:
    """Without flash-attn, whose absence is this machine's."""
    pytest.importorskip("triton")
    assert OPERATOR.choose(request(**facts)).name == chosen


def test_causal_with_more_keys_than_queries_is_for_triton() -> None:
    pytest.importorskip("triton")
    long = Request((1, 8, 128, 64), (1, 8, 4096, 64), (1, 8, 4096, 64), causal=True, **CARD)
    assert OPERATOR.choose(long).name == "triton"


@pytest.mark.parametrize("capability", sorted(kernels.SHARED_MEMORY))
@pytest.mark.parametrize("dtype", kernels.DTYPES, ids=str)
def test_every_head_size_has_block_sizes(dtype: torch.dtype, capability: int) -> None:
    for kernel in ("forward", "queries", "keys"):
        for widest in range(1, triton.LARGEST_HEAD + 1):
            assert triton.configs(kernel, dtype, widest, capability)


@pytest.fixture
def timed(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[str]]:
    """choose(times): run `_choose` twice on configs that take these times; which config ran, by name."""

    def choose(*times: float, measurable: bool = True) -> list[str]:
        monkeypatch.setattr(kernels, "_chosen", {})
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
        measured = iter(times)
        monkeypatch.setattr(kernels, "_milliseconds", lambda run: next(measured))
        configs = [Config({"BLOCK_M": n}) for n in range(len(times))]
        return [
            str(kernels._choose(lambda config: None, configs, ("key",), measurable).blocks["BLOCK_M"]) for _ in "12"
        ]

    return choose


def test_the_fastest_block_sizes_are_measured_once(
    timed: Callable[..., list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert timed(3.0, 1.0, 2.0) == ["1", "1"]
    assert timed(3.0, 1.0, measurable=False) == ["0", "0"]
    assert timed(3.0) == ["0", "0"]
    monkeypatch.setenv("CORE_ATTN_AUTOTUNE", "0")
    assert timed(3.0, 1.0) == ["0", "0"]


def test_recording_knows_its_cards() -> None:
    with pytest.raises(ValueError, match=r"capability must be one of \[80, 89, 90\], got 75"), kernels.recording(75):
        pass
