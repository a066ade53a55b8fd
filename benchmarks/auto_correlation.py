"""Auto-Correlation beside the official module: time and memory of training (forward and backward) and evaluation.

    python benchmarks/auto_correlation.py [--official CHECKOUT] [--repeats 7]

CHECKOUT is github.com/thuml/Autoformer (51c7d416). Both sides take the same tensors in the layout (B, L, H, D) that
the models' projections give and must give the same outputs and gradients to 1e-6 of their largest value before
anything is timed. Calls of both sides alternate in one run on one thread; CPU time, median. Prints a Markdown table.
"""

from __future__ import annotations

import argparse
import importlib.util
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from attn_shared.profiling import machine, peak_memory
from core_attn import ops

# (B, L, H, D, c): the batch, heads and widths of forecasting models, c = 1 and the 3 of some of the paper's scripts.
SIZES = (
    (32, 48, 8, 16, 1),
    (32, 48, 8, 64, 1),
    (32, 96, 8, 16, 1),
    (32, 96, 8, 64, 1),
    (32, 96, 8, 64, 3),
    (32, 144, 8, 64, 3),
    (32, 192, 8, 16, 1),
    (32, 192, 8, 64, 1),
    (32, 336, 8, 16, 1),
    (32, 336, 8, 64, 1),
    (32, 720, 8, 16, 1),
    (32, 720, 8, 64, 1),
)
Attention = Callable[[Tensor, Tensor, Tensor], Tensor]
Run = Callable[[], Sequence[Tensor]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--official", type=Path, metavar="CHECKOUT", help="without it only ours is timed")
    parser.add_argument("--repeats", type=int, default=7, help="timed calls a side")
    args = parser.parse_args()
    torch.set_num_threads(1)
    official = official_module(args.official) if args.official else None
    print(f"{', '.join(f'{key} {value}' for key, value in machine().items())}\n")
    print(
        "| B, L, H, D, c | mode | official ms | here ms | times faster | official MB | here MB | largest difference |"
    )
    print("|---|---|---|---|---|---|---|---|")
    for size in SIZES:
        for training in (True, False):
            print(row(size, training, official, args.repeats), flush=True)


def row(size: tuple[int, int, int, int, int], training: bool, official: Any, repeats: int) -> str:
    batch, length, heads, width, factor = size
    torch.manual_seed(0)
    shape = (batch, length, heads, width)
    q, k, v = (torch.randn(shape, requires_grad=training) for _ in range(3))
    upstream = torch.randn(shape)

    def ours(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return ops.auto_correlation(q, k, v, factor=factor, batch_delays=training).transpose(1, 2)

    sides = [whole(ours, (q, k, v), upstream, training)]
    difference = float("nan")
    if official is not None:
        module = official(factor=factor).train(training)
        sides.insert(0, whole(lambda q, k, v: module(q, k, v, None)[0], (q, k, v), upstream, training))
        difference = max(relative(b, a) for a, b in zip(sides[0](), sides[1](), strict=True))
        if not difference <= 1e-6:
            raise SystemExit(f"{size}: the official result and ours differ by {difference:.1e}: nothing was timed")
    seconds: list[list[float]] = [[] for _ in sides]
    for turn in range(repeats + 1):
        for run, times in zip(sides, seconds, strict=True):
            start = time.process_time()
            run()
            if turn:  # the first call warms up
                times.append(time.process_time() - start)
    peaks = []
    for run in sides:
        with peak_memory() as peak:
            run()
        peaks.append(f"{peak.megabytes:.1f}")
    figures = [statistics.median(times) * 1e3 for times in seconds]
    ratio = f"{figures[0] / figures[1]:.1f}" if official is not None else ""
    if official is None:
        figures.insert(0, float("nan"))
        peaks.insert(0, "")
    cells = (
        ", ".join(map(str, size)),
        "train" if training else "eval",
        *(f"{f:.1f}" for f in figures),
        ratio,
        *peaks,
        f"{difference:.0e}",
    )
    return f"| {' | '.join(cells)} |"


def whole(attention: Attention, inputs: tuple[Tensor, ...], upstream: Tensor, training: bool) -> Run:
    """Evaluation is the output; training the output and the gradients of q, k, v."""

    def run() -> Sequence[Tensor]:
        if not training:
            with torch.no_grad():
                return (attention(*inputs),)
        out = attention(*inputs)
        return (out.detach(), *torch.autograd.grad(out, inputs, upstream))

    return run


def relative(got: Tensor, right: Tensor) -> float:
    return ((got - right).abs().max() / right.abs().max()).item()


def official_module(checkout: Path) -> Any:
    file = checkout / "layers" / "AutoCorrelation.py"
    spec = importlib.util.spec_from_file_location("official_auto_correlation", file)
    if spec is None or spec.loader is None or not file.is_file():
        raise SystemExit(f"{file} is not there; give a checkout of github.com/thuml/Autoformer")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.AutoCorrelation


if __name__ == "__main__":
    main()
