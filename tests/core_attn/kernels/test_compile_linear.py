"""The kernels of linear attention, gated or with scalar decay, compile for the cards, within their shared memory."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType

import pytest
import torch

pytest.importorskip("triton")

from core_attn.kernels import DTYPES, Launch
from core_attn.ops.gated_linear import triton as gated
from core_attn.ops.scalar_decay import triton as scalar
from core_attn.testing.kernels import compile_kernel, launches

COMMON = {"states_forward", "states_backward", "output_forward", "values_backward", "keys_backward"}
KERNELS = {gated: COMMON | {"weights_forward", "weights_backward", "inside_backward"}, scalar: COMMON}
# Bytes of registers a thread spills into local memory, where a kernel still runs well.
STACK = 300
# float16 differs from bfloat16 in the products with states alone; each size and each card is met with one of them.
EXAMPLES = {
    (torch.float16, 80): ("packed64",),
    (torch.float16, 90): ("plain128", "fixed128"),
    (torch.bfloat16, 80): ("plain256", "fixed256"),
    (torch.bfloat16, 90): ("packed64", "single"),
    (torch.float32, 80): ("packed64",),
    (torch.float32, 90): ("plain256", "fixed256"),
}


@pytest.mark.timeout(1200)
@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("module", [gated, scalar], ids=["gated", "scalar"])
def test_every_kernel_compiles(
    module: ModuleType, dtype: torch.dtype, capability: int, one_config_each: Callable[..., list[tuple[str, Launch]]]
) -> None:
    met = set()
    for name, launch in one_config_each(module, dtype, capability, EXAMPLES[dtype, capability]):
        compiled = compile_kernel(launch, capability)
        assert compiled.stack is None or compiled.stack <= STACK, (name, compiled)
        met.add(launch.function.__name__)
    assert met == KERNELS[module]


@pytest.mark.slow
@pytest.mark.parametrize("capability", [80, 89, 90])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("module", [gated, scalar], ids=["gated", "scalar"])
def test_every_size_compiles(module: ModuleType, dtype: torch.dtype, capability: int) -> None:
    for _, launch in launches(module, dtype, capability):
        compile_kernel(launch, capability)
