"""Time and memory of the mechanisms as the sequence grows: forward and backward at L = 512 ... 16,384.

    python benchmarks/growth.py [--longest 16384] [--repeats 5]

One sample, 4 heads of 16 channels, one thread; CPU time, median, and the most bytes of tensors alive at once. The
fitted exponent is the slope of the log-log line over all lengths; the last line names that of L log L itself. The last
column is what a figure per L log L at the longest is, relative to that at the shortest: 1 for exactly L log L, less for
slower growth. Prints a Markdown table.
"""

from __future__ import annotations

import argparse
import math
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from attn_shared.profiling import machine, peak_memory
from core_attn import ops

HEADS, WIDTH = 4, 16
MECHANISMS: dict[str, Callable[[Tensor, Tensor, Tensor], Any]] = {
    "prob_sparse": lambda q, k, v: ops.prob_sparse_attention(q, k, v),
    "prob_sparse, causal": lambda q, k, v: ops.prob_sparse_attention(q, k, v, causal=True),
    "auto_correlation, delays of the batch": lambda q, k, v: ops.auto_correlation(q, k, v, batch_delays=True),
    "auto_correlation, own delays": lambda q, k, v: ops.auto_correlation(q, k, v),
    "flow": lambda q, k, v: ops.flow_attention(q, k, v),
    "flow, causal": lambda q, k, v: ops.flow_attention(q, k, v, causal=True),
    "softmax": lambda q, k, v: ops.softmax_attention(q, k, v),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--longest", type=int, default=16384)
    parser.add_argument("--repeats", type=int, default=5, help="timed calls")
    args = parser.parse_args()
    if args.longest < 1024:
        parser.error("--longest must be at least 1024, to fit an exponent")
    lengths = [n for n in (512 * 2**i for i in range(20)) if n <= args.longest]
    torch.set_num_threads(1)
    print(f"{', '.join(f'{key} {value}' for key, value in machine().items())}\n")
    print(f"| mechanism | figure | {' | '.join(f'{n:,}' for n in lengths)} | exponent | per L log L |")
    print(f"|---|---|{'---|' * (len(lengths) + 2)}")
    for name, mechanism in MECHANISMS.items():
        measured = [measure(mechanism, length, args.repeats) for length in lengths]
        for what, figures in zip(("ms", "MB"), zip(*measured, strict=True), strict=True):
            shown = " | ".join(f"{f:.3g}" if f < 1000 else f"{f:,.0f}" for f in figures)
            ends = [f / (n * math.log(n)) for f, n in ((figures[0], lengths[0]), (figures[-1], lengths[-1]))]
            print(
                f"| {name} | {what} | {shown} | {slope(lengths, figures):.2f} | {ends[1] / ends[0]:.2f} |", flush=True
            )
    itself = slope(lengths, [n * math.log(n) for n in lengths])
    print(f"\nL log L has exponent {itself:.2f} between {lengths[0]:,} and {lengths[-1]:,}.")


def measure(mechanism: Callable[[Tensor, Tensor, Tensor], Any], length: int, repeats: int) -> tuple[float, float]:
    """Milliseconds and megabytes of forward and backward."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, HEADS, length, WIDTH, requires_grad=True) for _ in range(3))
    upstream = torch.randn(1, HEADS, length, WIDTH)

    def run() -> None:
        torch.autograd.grad(mechanism(q, k, v), (q, k, v), upstream)

    run()
    times = []
    for _ in range(repeats):
        start = time.process_time()
        run()
        times.append(time.process_time() - start)
    with peak_memory() as peak:
        run()
    return statistics.median(times) * 1e3, peak.megabytes


def slope(lengths: list[int], figures: Any) -> float:
    """Least squares of log figure over log length."""
    x, y = [math.log(n) for n in lengths], [math.log(f) for f in figures]
    mean_x, mean_y = statistics.fmean(x), statistics.fmean(y)
    above = sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True))
    return above / sum((a - mean_x) ** 2 for a in x)


if __name__ == "__main__":
    main()
