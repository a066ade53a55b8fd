"""The optional CPU kernel of softmax attention beside PyTorch: exact attention, and a causal window of 256 keys.

    python benchmarks/cpu_kernel.py [--rounds 5] [--save docs/benchmarks/cpu_kernel.md]

One thread, B1 H8 D64. Both sides get the same tensors and run by turns, round by round; the figure is the least CPU
time of the process. Errors are the largest absolute differences from float64 over the output and the three gradients,
each divided by that of PyTorch's `scaled_dot_product_attention` (SDPA) on the same tensors: the largest such ratio is
shown. Compiles the kernel first, where that has not been done.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from attn_shared.profiling import machine
from core_attn.ops import softmax_attention
from core_attn.ops.softmax import cpu

HEADS, CHANNELS, WINDOW = 8, 64, 256
LENGTHS = (1024, 2048, 4096)
WINDOWED_LENGTH = 8192
ERROR_LENGTH = 1024  # the definition in float64 writes L x L scores


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5, help="timed calls a side")
    parser.add_argument("--save", type=Path, metavar="FILE", help="write the tables there too")
    args = parser.parse_args()
    torch.set_num_threads(1)
    cpu.build()
    lines = [
        "# The optional CPU kernel",
        "",
        ", ".join(f"{key} {value}" for key, value in machine().items()),
        "",
        f"Exact attention, B1 H{HEADS} D{CHANNELS}, 1 thread: ms and times faster than SDPA.",
        "",
        "| dtype | L | causal | forward: SDPA | kernel | faster | forward + backward: SDPA | kernel | faster | "
        "error / SDPA's |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for dtype in (torch.float32, torch.bfloat16):
        for causal in (False, True):
            ratio = error_ratio(dtype, causal)
            for length in LENGTHS:
                lines.append(exact(dtype, length, causal, ratio, args.rounds))
                print(lines[-1], flush=True)
    lines += [
        "",
        f"Causal window of {WINDOW} keys at L = {WINDOWED_LENGTH}: ms, and times faster than SDPA with a boolean mask.",
        "",
        "| dtype | | SDPA, masked | blocked PyTorch | kernel | kernel / blocked | kernel / SDPA |",
        "|---|---|---|---|---|---|---|",
    ]
    for dtype in (torch.float32, torch.bfloat16):
        for row in windowed(dtype, max(2, args.rounds // 2)):
            lines.append(row)
            print(lines[-1], flush=True)
    text = "\n".join(lines) + "\n"
    print("\n" + text)
    if args.save is not None:
        args.save.write_text(text)


def tensors(length: int, dtype: torch.dtype) -> tuple[list[Tensor], Tensor]:
    torch.manual_seed(0)
    shape = (1, HEADS, length, CHANNELS)
    return [torch.randn(shape).to(dtype).requires_grad_() for _ in range(3)], torch.randn(shape).to(dtype)


def forward(inputs: Sequence[Tensor], **options: Any) -> Callable[[], object]:
    detached = [x.detach() for x in inputs]
    return lambda: softmax_attention(*detached, **options)


def both(inputs: Sequence[Tensor], upstream: Tensor, **options: Any) -> Callable[[], list[Tensor]]:
    def run() -> list[Tensor]:
        out = softmax_attention(*inputs, **options)
        return [out, *torch.autograd.grad(out, inputs, upstream)]

    return run


def least(sides: Sequence[Callable[[], object]], rounds: int) -> list[float]:
    """Least CPU time of each side in ms; sides run by turns."""
    best = [float("inf")] * len(sides)
    for turn in range(rounds + 1):
        for i, side in enumerate(sides):
            start = time.process_time()
            side()
            if turn:  # the first calls warm up
                best[i] = min(best[i], (time.process_time() - start) * 1e3)
    return best


def error_ratio(dtype: torch.dtype, causal: bool) -> float:
    inputs, upstream = tensors(ERROR_LENGTH, dtype)
    doubles = [x.detach().double().requires_grad_() for x in inputs]
    expected = both(doubles, upstream.double(), causal=causal, backend="reference")()
    errors = [
        [(a.double() - b).abs().max().item() for a, b in zip(side(), expected)]
        for side in (both(inputs, upstream, causal=causal, backend=name) for name in ("cpu", "sdpa"))
    ]
    return max(a / b for a, b in zip(*errors))


def exact(dtype: torch.dtype, length: int, causal: bool, error: float, rounds: int) -> str:
    inputs, upstream = tensors(length, dtype)
    names = ("sdpa", "cpu")
    one, ours = least([forward(inputs, causal=causal, backend=name) for name in names], rounds)
    whole, ours_whole = least([both(inputs, upstream, causal=causal, backend=name) for name in names], rounds)
    return (
        f"| {str(dtype).removeprefix('torch.')} | {length} | {'yes' if causal else 'no'} | {one:.1f} | {ours:.1f} | "
        f"{one / ours:.2f} | {whole:.1f} | {ours_whole:.1f} | {whole / ours_whole:.2f} | {error:.2f} |"
    )


def windowed(dtype: torch.dtype, rounds: int) -> list[str]:
    inputs, upstream = tensors(WINDOWED_LENGTH, dtype)
    options = {"causal": True, "window": WINDOW}
    rows = []
    for name, make in (
        ("forward", lambda backend: forward(inputs, backend=backend, **options)),
        ("forward + backward", lambda backend: both(inputs, upstream, backend=backend, **options)),
    ):
        masked, blocked, ours = least([make(backend) for backend in ("sdpa", "torch", "cpu")], rounds)
        rows.append(
            f"| {str(dtype).removeprefix('torch.')} | {name} | {masked:.0f} | {blocked:.1f} | {ours:.1f} | "
            f"{blocked / ours:.2f} | {masked / ours:.1f} |"
        )
    return rows


if __name__ == "__main__":
    main()
