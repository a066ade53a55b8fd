"""Speed of the Triton kernels on this machine's card, beside SDPA and FlexAttention: writes docs/benchmarks/gpu.md.

Needs torch, Triton and a CUDA device: `make bench-gpu`, or `python benchmarks/gpu.py --quick` for a short run.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

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


def problems(quick: bool) -> Iterator[tuple[str, int, dict[str, Callable[..., Tensor]]]]:
    """Name, number of tokens, and forms of the same function of q, k, v of shape (1, HEADS, tokens, CHANNELS)."""

    def exact(length: int, backends: tuple[str, ...], **options: Any) -> dict[str, Callable[..., Tensor]]:
        return {
            name: lambda q, k, v, name=name: ops.softmax_attention(q, k, v, backend=name, **options)
            for name in backends
        }

    for length in (2048,) if quick else (2048, 8192, 32768):
        yield f"causal, L = {length}", length, exact(length, ("triton", "sdpa", "flash_attn"), causal=True)
        window = exact(length, ("triton", "flash_attn", "torch"), causal=True, window=256)
        if length <= 8192:
            window |= exact(length, ("sdpa", "flex"), causal=True, window=256)
        yield f"causal window of 256, L = {length}", length, window
    side = 64 if quick else 128
    around = {
        name: lambda q, k, v, name=name: ops.neighborhood_attention(
            q, k, v, grid=(side, side), kernel_size=7, backend=name
        )
        for name in ("triton", "auto")
    }
    yield f"neighbourhood {side} x {side}, kernel 7", side * side, around
    length = 2048 if quick else 8192
    generator = torch.Generator().manual_seed(0)
    blocks = (torch.rand(length // 64, length // 64, generator=generator) < 0.1).cuda() | torch.eye(
        length // 64, dtype=torch.bool, device="cuda"
    )
    mask = blocks.repeat_interleave(64, 0).repeat_interleave(64, 1)
    sparse = {
        "triton": lambda q, k, v: ops.block_sparse_attention(q, k, v, blocks=blocks, block_size=64, backend="triton"),
        "auto": lambda q, k, v: ops.block_sparse_attention(q, k, v, blocks=blocks, block_size=64),
        "sdpa, mask": lambda q, k, v: ops.softmax_attention(q, k, v, mask=mask, backend="sdpa"),
    }
    yield f"block-sparse, 10 % of blocks of 64, L = {length}", length, sparse


def measure(problem: str, length: int, name: str, function: Callable[..., Tensor]) -> Row:
    """Median milliseconds of the forward and of forward and backward, and the memory the latter adds in MB."""
    from triton.testing import do_bench

    q, k, v = (torch.randn(1, HEADS, length, CHANNELS, device="cuda", dtype=torch.bfloat16) for _ in range(3))
    gradient = torch.randn_like(q)

    def both() -> None:
        leaves = [x.detach().requires_grad_() for x in (q, k, v)]
        torch.autograd.grad(function(*leaves), leaves, gradient)

    both()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    both()
    memory = (torch.cuda.max_memory_allocated() - before) / 2**20
    with torch.no_grad():
        forward = do_bench(lambda: function(q, k, v), return_mode="median")
    return Row(problem, name, forward, do_bench(both, return_mode="median"), memory)


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
    for problem, length, forms in problems(options.quick):
        for name, function in forms.items():
            try:
                rows.append(measure(problem, length, name, function))
            except (BackendError, torch.cuda.OutOfMemoryError) as error:
                refused.append(f"{problem}, {name}: {str(error).splitlines()[0]}")
                continue
            print(f"{problem} | {name} | {rows[-1].forward:.3f} ms | {rows[-1].both:.3f} ms", flush=True)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(page(rows, refused), encoding="utf-8")
    print(f"written: {options.out}")


if __name__ == "__main__":
    main()
