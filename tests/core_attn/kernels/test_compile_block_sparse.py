"""The kernels of block-sparse attention compile for the cards, within their shared memory, without a GPU."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from core_attn.kernels import DTYPES
from core_attn.ops.block_sparse import triton
from core_attn.testing.kernels import compile_kernel, launches


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_kernel_compiles(dtype: torch.dtype, capability: int) -> None:
    compiled = [
        compile_kernel(launch, capability)
        for name, launch in launches(triton, dtype, capability)
        if name.startswith("64-blocks128")
    ]
    assert len(compiled) >= 4


@pytest.mark.slow
@pytest.mark.parametrize("capability", [80, 89, 90])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_size_compiles(dtype: torch.dtype, capability: int) -> None:
    for _, launch in launches(triton, dtype, capability):
        compile_kernel(launch, capability)
