"""Neighbourhood attention on the CPU beside attention under a dense mask and NATTEN's own CPU path.

    python benchmarks/neighborhood.py [--side 56] [--kernel-size 7] [--rounds 7]

One sample, 4 heads of 32 channels, float32, one thread. Every round times each form once, forward and forward +
backward, so that all see the same machine; the figure is the least CPU time. "times" is how often faster than
`scaled_dot_product_attention` with the same neighbourhoods as a boolean mask. Prints a Markdown table.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from attn_shared.profiling import machine
from core_attn.ops import neighborhood_attention
from core_attn.ops.neighborhood import reference

HEADS, WIDTH = 4, 32


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--side", type=int, default=56, help="of the square grid")
    parser.add_argument("--kernel-size", type=int, default=7)
    parser.add_argument("--rounds", type=int, default=7)
    args = parser.parse_args()
    side, size = args.side, args.kernel_size
    if size > side:
        parser.error("--kernel-size must be at most --side")
    torch.set_num_threads(1)
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, HEADS, side * side, WIDTH, requires_grad=True) for _ in range(3))
    rpb = torch.randn(HEADS, 2 * size - 1, 2 * size - 1, requires_grad=True)
    mask = reference.allowed((side, side), (size, size), (1, 1), (1, 1), (False, False))
    extra = [torch.randn(1, HEADS, 16, WIDTH) for _ in range(2)]

    def ours(**options: object) -> Callable[[], Tensor]:
        return lambda: neighborhood_attention(q, k, v, grid=(side, side), kernel_size=size, backend="torch", **options)  # type: ignore[arg-type]

    largest = side // size
    forms: dict[str, Callable[[], Tensor]] = {
        "scaled_dot_product_attention, mask": lambda: F.scaled_dot_product_attention(q, k, v, attn_mask=mask),
        "neighborhood_attention": ours(),
        f"dilation {largest}": ours(dilation=largest),
        "dilation 2": ours(dilation=min(2, largest)),
        f"stride {size} (blocks)": ours(stride=size),
        "causal on both axes": ours(causal=True),
        "with relative positional bias": ours(rpb=rpb),
        "with 16 extra keys": ours(extra_k=extra[0], extra_v=extra[1]),
    }
    try:
        from natten.functional import na2d
    except ImportError:
        print("NATTEN is not installed: no comparison with it\n")
    else:
        last = [x.detach().transpose(1, 2).unflatten(1, (side, side)).contiguous() for x in (q, k, v)]
        forms["NATTEN, na2d"] = lambda: na2d(*last, kernel_size=size, backend="flex-fna")
    forward, both = ({name: float("inf") for name in forms} for _ in range(2))
    for _ in range(args.rounds):
        for name, form in forms.items():
            with torch.no_grad():
                forward[name] = min(forward[name], seconds(form))
            if not name.startswith("NATTEN"):  # it has no backward on the CPU
                both[name] = min(both[name], seconds(lambda form=form: form().sum().backward()))  # type: ignore[misc]
    base = next(iter(forms))
    print(f"{', '.join(f'{key} {value}' for key, value in machine().items())}\n")
    print(f"| {side} x {side}, kernel {size} | forward, ms | times | forward + backward, ms | times |")
    print("|---|---|---|---|---|")
    for name in forms:
        shown = [f"{forward[name] * 1e3:.1f}", f"{forward[base] / forward[name]:.2f}"]
        known = both[name] < float("inf")
        shown += [f"{both[name] * 1e3:.1f}", f"{both[base] / both[name]:.2f}"] if known else ["none", ""]
        print(f"| {name} | {' | '.join(shown)} |")
    if "NATTEN, na2d" in forms:
        times = forward["NATTEN, na2d"] / forward["neighborhood_attention"]
        print(f"\nforward beside NATTEN's: {times:.1f} times as fast")


def seconds(function: Callable[[], object]) -> float:
    start = time.process_time()
    function()
    return time.process_time() - start


if __name__ == "__main__":
    main()
