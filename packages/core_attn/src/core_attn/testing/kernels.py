"""Triton kernels without a GPU: every launch of a backend compiled for a card, with what it asks of that card.

A backend module (`core_attn.ops.<operator>.triton`) lists its kernels as example calls:

    def examples(dtype: torch.dtype) -> Iterator[tuple[str, Callable[[], object]]]

yields a name and a call that launches kernels on tensors of the meta device, forward or backward.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from core_attn.kernels import SHARED_MEMORY, Launch, recording

_TYPES = {
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.float32: "fp32",
    torch.bool: "i1",
    torch.uint8: "u8",
    torch.int32: "i32",
    torch.int64: "i64",
}


@dataclass(frozen=True)
class Compiled:
    """What a compiled kernel asks of a card.

    Attributes:
        shared: bytes of shared memory a block of threads takes.
        registers: registers a thread takes; None where the tool that tells is missing.
        stack: bytes of local memory a thread takes, spilled registers above all; None likewise.
    """

    shared: int
    registers: int | None
    stack: int | None


def launches(module: ModuleType, dtype: torch.dtype, capability: int) -> Iterator[tuple[str, Launch]]:
    """Every launch of `module.examples(dtype)`, named; each config once, equal launches once."""
    seen = set()
    for name, call in module.examples(dtype):
        with recording(capability) as noted:
            call()
        if not noted:
            raise AssertionError(f"the example {name!r} of {module.__name__} launched no kernel")
        for launch in noted:
            signature, constants, attributes = _signature(launch)
            same = (launch.function, str(signature), str(constants), str(attributes), launch.config.warps)
            if (*same, launch.config.stages) not in seen:
                seen.add((*same, launch.config.stages))
                blocks = "x".join(str(n) for n in launch.config.blocks.values())
                yield (
                    f"{name}-{launch.function.__name__}-{blocks}-w{launch.config.warps}s{launch.config.stages}",
                    launch,
                )


def compile_kernel(launch: Launch, capability: int) -> Compiled:
    """Compile one launch to machine code for a card of this capability; no GPU is needed.

    Raises:
        AssertionError: it takes more shared memory than the card has, which the compiler does not mind.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    signature, constants, attributes = _signature(launch)
    source = ASTSource(launch.function, signature, constants, attributes)
    options = {"num_warps": launch.config.warps, "num_stages": launch.config.stages}
    kernel = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    shared, limit = int(kernel.metadata.shared), SHARED_MEMORY[capability]
    if shared > limit:
        raise AssertionError(
            f"{launch.function.__name__} with {launch.config} takes {shared} bytes of shared memory, "
            f"a card of capability {capability / 10} has {limit}"
        )
    return Compiled(shared, *_resources(kernel.asm["cubin"]))


def _signature(launch: Launch) -> tuple[dict[str, str], dict[str, Any], dict[tuple[int], list[list[Any]]]]:
    """Types, constants and alignments, specialised as Triton does at run time."""
    signature, constants, attributes = {}, {}, {}
    for position, name in enumerate(launch.function.arg_names):
        value = launch.arguments.get(name)
        if name in launch.constants:
            signature[name], constants[name] = "constexpr", launch.constants[name]
        elif isinstance(value, Tensor):
            signature[name] = "*" + _TYPES[value.dtype]
            # The meta device's addresses are zero; what the offset into the storage leaves is the alignment.
            if value.storage_offset() * value.element_size() % 16 == 0:
                attributes[position,] = [["tt.divisibility", 16]]
        elif isinstance(value, bool):
            signature[name] = "i1"
        elif isinstance(value, int) and value == 1:
            signature[name], constants[name] = "constexpr", 1
        elif isinstance(value, int):
            signature[name] = "i32" if -(2**31) <= value < 2**31 else "i64"
            if value % 16 == 0:
                attributes[position,] = [["tt.divisibility", 16]]
        elif isinstance(value, float):
            signature[name] = "fp32"
        else:
            raise TypeError(f"argument {name} of {launch.function.__name__} is {value!r}: tensors and numbers only")
    return signature, constants, attributes


def _resources(cubin: bytes) -> tuple[int | None, int | None]:
    """Registers and stack of a kernel, by the tool that comes with Triton."""
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    if not tool.is_file():
        return None, None
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        told = subprocess.run([tool, "-res-usage", file.name], capture_output=True, encoding="utf-8", check=False)
    found = re.search(r"REG:(\d+) STACK:(\d+)", told.stdout + told.stderr)
    return (int(found[1]), int(found[2])) if found else (None, None)
