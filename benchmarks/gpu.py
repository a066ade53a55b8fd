"""Speed of the Triton kernels on this machine's card, beside SDPA and FlexAttention: writes docs/benchmarks/gpu.md.

Needs torch, Triton and a CUDA device: `make bench-gpu`, or `python benchmarks/gpu.py --quick` for a short run.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from core_attn import ops
from core_attn.dispatch import BackendError

PAGE = Path(__file__).resolve().parent.parent / "docs" / "benchmarks" / "gpu.md"
HEADS, CHANNELS = 16, 64


class Row(NamedTuple):
    problem: str
    backend: str
    forward: float
    both: float
    memory: float


class Problem(NamedTuple):
    """Forms of one function of `inputs`: q, k and v of shape (1, HEADS, length, CHANNELS), and perhaps log-gates."""

    name: str
    inputs: list[Tensor]
    forms: dict[str, Callable[..., Tensor]]


def tokens(length: int, device: str) -> list[Tensor]:
    """q, k and v."""
    return [torch.randn(1, HEADS, length, CHANNELS, device=device, dtype=torch.bfloat16) for _ in range(3)]


def problems(lengths: Sequence[int], side: int, device: str = "cuda") -> Iterator[Problem]:
    """All that is measured, at each of `lengths`, or with a plane of side x side or the middle one of `lengths`."""
    for length in lengths:
        yield from exact(length, device)
        yield from recurrent(length, device)
    around = {
        name: lambda q, k, v, name=name: ops.neighborhood_attention(
            q, k, v, grid=(side, side), kernel_size=7, backend=name
        )
        for name in ("triton", "auto")
    }
    yield Problem(f"neighbourhood {side} x {side}, kernel 7", tokens(side * side, device), around)
    length = lengths[len(lengths) // 2]
    generator = torch.Generator().manual_seed(0)
    blocks = (torch.rand(length // 64, length // 64, generator=generator) < 0.1) | torch.eye(
        length // 64, dtype=torch.bool
    )
    blocks = blocks.to(device)
    mask = blocks.repeat_interleave(64, 0).repeat_interleave(64, 1)
    sparse = {
        "triton": lambda q, k, v: ops.block_sparse_attention(q, k, v, blocks=blocks, block_size=64, backend="triton"),
        "auto": lambda q, k, v: ops.block_sparse_attention(q, k, v, blocks=blocks, block_size=64),
        "sdpa, mask": lambda q, k, v: ops.softmax_attention(q, k, v, mask=mask, backend="sdpa"),
    }
    yield Problem(f"block-sparse, 10 % of blocks of 64, L = {length}", tokens(length, device), sparse)


def exact(length: int, device: str) -> Iterator[Problem]:
    """Softmax attention, whole and in a window."""

    def forms(*backends: str, **options: Any) -> dict[str, Callable[..., Tensor]]:
        return {
            name: lambda q, k, v, name=name: ops.softmax_attention(q, k, v, backend=name, **options)
            for name in backends
        }

    yield Problem(f"causal, L = {length}", tokens(length, device), forms("triton", "sdpa", "flash_attn", causal=True))
    window = ("triton", "flash_attn", "torch", *(("sdpa", "flex") if length <= 8192 else ()))
    yield Problem(
        f"causal window of 256, L = {length}", tokens(length, device), forms(*window, causal=True, window=256)
    )


def recurrent(length: int, device: str) -> Iterator[Problem]:
    """Linear attention whose state decays, one sequence or eight of unequal length packed into as many tokens."""
    gates = F.logsigmoid(torch.randn(1, HEADS, length, CHANNELS, device=device)) / 16
    ends = [length * n * n // 64 for n in range(9)]
    for packed in (False, True):
        offsets = torch.tensor(ends, dtype=torch.int32) if packed else None
        name = f", 8 packed sequences, L = {length}" if packed else f", L = {length}"
        gated = {
            b: lambda q, k, v, g, b=b, offsets=offsets: ops.gated_linear_attention(
                q, k, v, log_gate=g, cu_seqlens=offsets, backend=b
            )
            for b in ("triton", "torch")
        }
        yield Problem(f"gated linear{name}", [*tokens(length, device), gates], gated)
        scalar = {
            b: lambda q, k, v, g, b=b, offsets=offsets: ops.scalar_decay_attention(
                q, k, v, log_decay=g, cu_seqlens=offsets, backend=b
            )
            for b in ("triton", "torch")
        }
        yield Problem(f"scalar decay{name}", [*tokens(length, device), gates[..., 0]], scalar)


def with_gradients(function: Callable[..., Tensor], inputs: list[Tensor]) -> tuple[Tensor, ...]:
    """Gradients of all inputs."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    out = function(*leaves)
    return torch.autograd.grad(out, leaves, torch.ones_like(out))


def measure(problem: Problem, backend: str) -> Row:
    """Median milliseconds of the forward and of forward and backward, and the memory the latter adds in MB."""
    from triton.testing import do_bench

    function = problem.forms[backend]
    with_gradients(function, problem.inputs)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    with_gradients(function, problem.inputs)
    memory = (torch.cuda.max_memory_allocated() - before) / 2**20
    with torch.no_grad():
        forward = do_bench(lambda: function(*problem.inputs), return_mode="median")
    both = do_bench(lambda: with_gradients(function, problem.inputs), return_mode="median")
    return Row(problem.name, backend, forward, both, memory)


def page(rows: list[Row], refused: list[str]) -> str:
    import triton

    card = torch.cuda.get_device_name()
    lines = [
        f"# Kernels on {card}",
        "",
        f"One sequence, {HEADS} heads of {CHANNELS}, bfloat16; torch {torch.__version__}, Triton {triton.__version__}. "
        "Milliseconds are medians; memory is what forward and backward add at their peak. Written by `make bench-gpu`.",
        "",
        "| problem | backend | forward ms | forward + backward ms | MB |",
        "|---|---|---:|---:|---:|",
        *(f"| {r.problem} | {r.backend} | {r.forward:.3f} | {r.both:.3f} | {r.memory:.0f} |" for r in rows),
    ]
    if refused:
        lines += ["", "Did not run here:", "", *(f"- {line}" for line in refused)]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--quick", action="store_true", help="short sequences only, one minute")
    parser.add_argument("--out", type=Path, default=PAGE, help="where to write the table")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("no CUDA device: this measures kernels on a card")
    torch.manual_seed(0)
    rows, refused = [], []
    for problem in problems((2048,), 64) if options.quick else problems((2048, 8192, 32768), 128):
        for backend in problem.forms:
            try:
                rows.append(measure(problem, backend))
            except (BackendError, torch.cuda.OutOfMemoryError) as error:
                refused.append(f"{problem.name}, {backend}: {str(error).splitlines()[0]}")
                continue
            print(f"{problem.name} | {backend} | {rows[-1].forward:.3f} ms | {rows[-1].both:.3f} ms", flush=True)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(page(rows, refused), encoding="utf-8")
    print(f"written: {options.out}")


if __name__ == "__main__":
    main()
