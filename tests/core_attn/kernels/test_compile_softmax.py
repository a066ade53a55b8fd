"""The kernels of exact attention compile for the cards, within their shared memory, without a GPU."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

pytest.importorskip("triton")

from core_attn.kernels import DTYPES, Config, Launch
from core_attn.ops.softmax import triton
from core_attn.testing.kernels import compile_kernel, launches

KERNELS = {"softmax_forward", "softmax_backward_queries", "softmax_backward_keys"}
# Bytes of registers a thread spills into local memory, where a kernel still runs well. Full float32 products of wide
# heads take far more; they are there to be exact.
STACK = {torch.float16: 500, torch.bfloat16: 500, torch.float32: 3000}


# float16 differs from bfloat16 in no size, and packed sequences in none from others: once each is enough. Float32 has
# the same block sizes on every card.
EXAMPLES = {
    (torch.float16, 80): ("packed80",),
    (torch.float16, 90): ("packed80",),
    (torch.bfloat16, 80): ("plain64", "bias256"),
    (torch.bfloat16, 90): ("plain64", "window128", "bias256"),
    (torch.float32, 80): ("plain64", "bias256"),
    (torch.float32, 90): ("window128",),
}


@pytest.mark.timeout(1200)
@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_kernel_compiles(
    dtype: torch.dtype, capability: int, one_config_each: Callable[..., list[tuple[str, Launch]]]
) -> None:
    met = set()
    for name, launch in one_config_each(triton, dtype, capability, EXAMPLES[dtype, capability]):
        compiled = compile_kernel(launch, capability)
        assert compiled.stack is None or compiled.stack <= STACK[dtype], (name, compiled)
        met.add(launch.function.__name__)
    assert met == KERNELS


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("capability", [80, 89, 90])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_size_compiles(dtype: torch.dtype, capability: int) -> None:
    for name, launch in launches(triton, dtype, capability):
        compiled = compile_kernel(launch, capability)
        assert compiled.stack is None or compiled.stack <= STACK[dtype], (name, compiled)


def test_small_cards_have_their_own_block_sizes() -> None:
    """Of the widest heads, which take most; 8.6 and 8.9 have 101,376 bytes."""
    widest = [launch for name, launch in launches(triton, torch.bfloat16, 89) if name.startswith("bias256")]
    assert {launch.function.__name__ for launch in widest} == KERNELS
    for launch in widest:
        compile_kernel(launch, 89)


def test_too_much_shared_memory_is_refused() -> None:
    """The compiler itself does not mind."""
    launch = next(launch for name, launch in launches(triton, torch.bfloat16, 80) if name.startswith("window128"))
    large = Config({"BLOCK_M": 128, "BLOCK_N": 128}, warps=8, stages=4)
    greedy = replace(launch, constants={**launch.constants, **large.blocks}, config=large)
    with pytest.raises(AssertionError, match=r"bytes of shared memory, a card of capability 8\.0 has 166912"):
        compile_kernel(greedy, 80)
