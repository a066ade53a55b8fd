"""Launching Triton kernels: where they can run, which block sizes they take, and a record of launches to compile.

Nothing here imports Triton before it is used: the package works without it. A backend in Triton is a pair of modules
beside its operator: `triton_kernels.py`, which imports Triton and holds the kernels, and `triton.py`, which imports the
former when it first runs, and calls every kernel through `launch`. So the launches of a call can be recorded from
tensors on the meta device and compiled for cards that are not there (`core_attn.testing.kernels`).
"""

from __future__ import annotations

import contextlib
import contextvars
import functools
import importlib.util
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from core_attn.dispatch import Request

# What a block of threads may ask of shared memory, in bytes, by compute capability (CUDA C++ programming guide, table
# of technical specifications). Cards not named here get the block sizes of the smallest, 8.6 and 8.9.
SHARED_MEMORY = {80: 166_912, 89: 101_376, 90: 232_448}
# Found out once, here: torch.compile can neither look for a package nor call a cached function without a warning.
_INSTALLED = importlib.util.find_spec("triton") is not None
DTYPES = (torch.float16, torch.bfloat16, torch.float32)


@dataclass(frozen=True)
class Config:
    """One way to cut a kernel's work: `blocks` are its constexpr block sizes by name.

    `warps` and `stages` are Triton's num_warps (of 32 threads) and num_stages (depth of the software pipeline).
    """

    blocks: Mapping[str, int]
    warps: int = 4
    stages: int = 2


@dataclass(frozen=True)
class Launch:
    """One recorded launch: all that compiling the kernel takes.

    Attributes:
        function: the kernel, a `triton.JITFunction`.
        arguments: what it was called with, tensors and numbers, by name.
        constants: its constexpr arguments by name, block sizes included.
        config: the block sizes, warps and stages.
    """

    function: Any
    arguments: Mapping[str, Any]
    constants: Mapping[str, Any]
    config: Config


@dataclass
class _Recording:
    capability: int
    launches: list[Launch] = field(default_factory=list)


_recording: contextvars.ContextVar[_Recording | None] = contextvars.ContextVar("core_attn_recording", default=None)
_chosen: dict[tuple[Any, ...], Config] = {}


def interpreted() -> bool:
    """Whether Triton runs kernels in its interpreter, on the CPU: TRITON_INTERPRET=1, set before it is imported."""
    return os.environ.get("TRITON_INTERPRET", "") in ("1", "true", "True", "on")


def _installed() -> bool:
    return _INSTALLED


def why_not(request: Request) -> str | None:
    """Why no Triton kernel can run for `request`, in words; None where one can."""
    if not _installed():
        return "the package triton is not installed"
    if request.dtype not in DTYPES:
        return f"it needs float16, bfloat16 or float32, not {str(request.dtype).removeprefix('torch.')}"
    if request.device == "cpu" and interpreted():
        return None
    if request.device != "cuda":
        return (
            f"it needs a CUDA device, or TRITON_INTERPRET=1 to try it on the CPU; these tensors are on {request.device}"
        )
    if torch.version.hip is None and torch.cuda.is_available() and torch.cuda.get_device_capability() < (8, 0):
        return "it needs a card of compute capability 8.0 (Ampere) or newer"
    return None


def capability(device: torch.device) -> int:
    """The compute capability to choose block sizes for: 80, 89 or 90.

    Data centre cards newer than 9.0 count as 90, every other as 89, whose shared memory is the smallest.
    """
    recording = _recording.get()
    if recording is not None:
        return recording.capability
    if device.type != "cuda" or torch.version.hip is not None:
        return 89
    major, minor = torch.cuda.get_device_capability(device)
    found = 10 * major + minor
    return found if found in (80, 90) else 90 if major == 10 else 89


def upcast(dtype: torch.dtype) -> bool:
    """Whether kernels must make operands of `tl.dot` float32: the interpreter multiplies bfloat16 as bit patterns."""
    return interpreted() and dtype is torch.bfloat16


def padded(channels: int) -> int:
    """The power of two to which a kernel widens a head size; `tl.dot` takes no fewer than 16."""
    return max(16, 1 << (channels - 1).bit_length())


def launch(
    function: Any,
    grid: Callable[[Mapping[str, int]], tuple[int, ...]],
    arguments: Mapping[str, Any],
    constants: Mapping[str, Any],
    configs: Sequence[Config],
    *,
    key: tuple[Any, ...] = (),
) -> None:
    """Run a kernel over `grid`, with the fastest of `configs`.

    Args:
        function: the kernel, decorated with `triton.jit`.
        grid: from the block sizes to the number of programs along up to three axes.
        arguments: tensors and numbers by name. Everything written must be written whole, never added to, since
            choosing runs the kernel several times.
        constants: constexpr arguments by name, without the block sizes.
        configs: the block sizes to choose from; the first is taken where nothing is measured: in the interpreter,
            while a CUDA graph is captured, with CORE_ATTN_AUTOTUNE=0.
        key: what, beside the kernel, its dtype, constants and device, decides which config is fastest; round lengths.
    """
    recording = _recording.get()
    if recording is not None:
        recording.launches += [Launch(function, dict(arguments), {**constants, **c.blocks}, c) for c in configs]
        return
    tensor = next(x for x in arguments.values() if isinstance(x, Tensor))
    where = torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()

    def run(config: Config) -> None:
        function[grid(config.blocks)](
            **arguments, **constants, **config.blocks, num_warps=config.warps, num_stages=config.stages
        )

    with where:
        run(
            _choose(run, configs, (id(function), tensor.dtype, tensor.device, *constants.items(), *key), tensor.is_cuda)
        )


def _choose(run: Callable[[Config], None], configs: Sequence[Config], key: tuple[Any, ...], measurable: bool) -> Config:
    """The config that ran fastest for `key`; measured at most once a key, and never where it cannot be."""
    known = _chosen.get(key)
    if known is not None:
        return known
    if len(configs) == 1 or not measurable or os.environ.get("CORE_ATTN_AUTOTUNE") == "0":
        return configs[0]
    if torch.cuda.is_current_stream_capturing():
        return configs[0]
    times = [_milliseconds(functools.partial(run, config)) for config in configs]
    _chosen[key] = configs[times.index(min(times))]
    return _chosen[key]


def _milliseconds(run: Callable[[], None]) -> float:
    from triton.testing import do_bench

    return float(do_bench(run, warmup=5, rep=30))


@contextlib.contextmanager
def recording(capability: int) -> Iterator[list[Launch]]:
    """While open, kernels are not run but noted down, as a card of this capability (80, 89, 90) would run them.

    Every config is noted. Backends are then called with tensors on the meta device.
    """
    if capability not in SHARED_MEMORY:
        raise ValueError(f"capability must be one of {sorted(SHARED_MEMORY)}, got {capability}")
    note = _Recording(capability)
    token = _recording.set(note)
    try:
        yield note.launches
    finally:
        _recording.reset(token)
