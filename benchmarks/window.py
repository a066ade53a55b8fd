"""Window attention beside what people use on a CPU, and decoding with a rolling cache.

    python benchmarks/window.py [speed] [memory] [longlora] [decode]

speed: causal window 256, forward and backward, B1 H8 D64: ours, `scaled_dot_product_attention` with a boolean mask, and
the package local-attention; and ours with sinks, dilation and global tokens. memory: ours at growing lengths, each in a
process of its own. longlora: shifted groups beside SDPA with the same mask. decode: 100,000 tokens through the rolling
cache of streaming attention. Sides alternate in one run on one thread; process CPU time, the least of all rounds.
Before anything is timed, both sides must give the same outputs and gradients. Prints Markdown tables.
"""

from __future__ import annotations

import argparse
import multiprocessing
import resource
import time
from collections.abc import Callable, Sequence
from functools import partial

import torch
from local_attention import LocalAttention
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

import core_attn
from attn_shared.profiling import machine, peak_memory
from core_attn.ops import window_attention

WINDOW = 256
LENGTH = 8192
Call = Callable[[Tensor, Tensor, Tensor], Tensor]


def main() -> None:
    parts = {"speed": speed, "memory": memory, "longlora": longlora, "decode": decode}
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"{', '.join(parts)}; all by default")
    parser.add_argument("--rounds", type=int, default=5, help="timed calls a side")
    parser.add_argument("--tokens", type=int, default=100_000, help="tokens to decode")
    args = parser.parse_args()
    for name in args.parts:
        if name not in parts:
            parser.error(f"there is no part {name!r}; there are {', '.join(parts)}")
    torch.set_num_threads(1)
    print(f"{', '.join(f'{key} {value}' for key, value in machine().items())}\n")
    for name in args.parts or parts:
        parts[name](args)


def inputs(length: int) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 8, length, 64, requires_grad=True) for _ in range(3))
    return q, k, v


def step(call: Call, leaves: Sequence[Tensor], upstream: Tensor) -> tuple[float, float, list[Tensor]]:
    """Seconds of forward, of forward and backward, and what came out."""
    start = time.process_time()
    out = call(*leaves)
    middle = time.process_time()
    gradients = torch.autograd.grad(out, list(leaves), upstream)
    return middle - start, time.process_time() - start, [out.detach(), *gradients]


def compare(calls: dict[str, Call], same: Sequence[str], rounds: int, slow: Sequence[str] = ()) -> None:
    """Time the calls in turn; those in `same` must agree with the first, those in `slow` run twice only."""
    leaves = inputs(LENGTH)
    upstream = torch.randn(1, 8, LENGTH, 64)
    first, *_ = calls
    right = step(calls[first], leaves, upstream)[2]
    for name in same:
        for a, b in zip(step(calls[name], leaves, upstream)[2], right, strict=True):
            error = ((a - b).abs().max() / b.abs().max()).item()
            if not error <= 1e-5:
                raise SystemExit(f"{name} differs by {error:.1e}: nothing was timed")
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in calls}
    for turn in range(rounds):
        for name, call in calls.items():
            if turn < 2 or name not in slow:
                times[name].append(step(call, leaves, upstream)[:2])
    least = {name: [min(column) * 1e3 for column in zip(*found)] for name, found in times.items()}
    print("| | forward ms | forward + backward ms | times ours | extra MB |")
    print("|---|---|---|---|---|")
    for name, (forward, both) in least.items():
        with peak_memory() as peak:
            step(calls[name], leaves, upstream)
        print(f"| {name} | {forward:.0f} | {both:.0f} | {both / least[first][1]:.1f} | {peak.megabytes:.0f} |")
    print()


def band(length: int) -> Tensor:
    place = torch.arange(length)
    return (place[:, None] >= place) & (place[:, None] - place < WINDOW)


def speed(args: argparse.Namespace) -> None:
    print(f"Causal window {WINDOW}, L = {LENGTH}, B1 H8 D64, float32, forward and backward\n")
    mask = band(LENGTH)
    # Its `exact_windowsize` counts the keys before the query only; without, it reads up to two windows.
    theirs = {"causal": True, "autopad": True, "use_rotary_pos_emb": False}
    exact = LocalAttention(window_size=WINDOW - 1, exact_windowsize=True, **theirs)
    calls: dict[str, Call] = {
        "ours, torch": partial(window_attention, window=WINDOW, causal=True, backend="torch"),
        "ours, auto": partial(window_attention, window=WINDOW, causal=True),
        "SDPA, boolean mask": partial(scaled_dot_product_attention, attn_mask=mask),
        "local-attention, exact": exact,
        "local-attention": LocalAttention(window_size=WINDOW, **theirs),
    }
    compare(calls, list(calls)[1:4], args.rounds, slow=["SDPA, boolean mask"])
    print("Ours with more than a band\n")
    ours = partial(window_attention, window=WINDOW, causal=True, backend="torch")
    compare(
        {
            "window": ours,
            "4 sinks": partial(ours, sinks=4),
            "dilation 8": partial(ours, dilation=8),
            "16 global tokens, not causal": partial(ours, window=WINDOW // 2, causal=False, global_tokens=16),
        },
        [],
        args.rounds,
    )


def memory(args: argparse.Namespace) -> None:
    print(
        f"Causal window {WINDOW}, B1 H8 D64, float32: peak beyond inputs and output's gradient, forward and backward\n"
    )
    print("| L | MB | MB of q, k, v |")
    print("|---|---|---|")
    for length in (8192, 16384, 32768, 65536):
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            megabytes = pool.apply(peak_of_process, (length,))
        print(f"| {length} | {megabytes:.0f} | {3 * 8 * 64 * 4 * length / 1e6:.0f} |", flush=True)
    print()


def peak_of_process(length: int) -> float:
    """Growth of this process's largest resident size during one step, after a short step has loaded all code."""
    torch.set_num_threads(1)
    call = partial(window_attention, window=WINDOW, causal=True, backend="torch")
    small = inputs(512)
    step(call, small, torch.randn(1, 8, 512, 64))
    leaves, upstream = inputs(length), torch.randn(1, 8, length, 64)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    step(call, leaves, upstream)
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 / 1e6


def longlora(args: argparse.Namespace) -> None:
    for size in (LENGTH // 4, 256):
        print(f"LongLoRA's shifted groups of {size}, causal, L = {LENGTH}, H8 D64, float32\n")
        mixer = core_attn.build("longlora", dim=512, heads=8, causal=True, group_size=size)
        # One mask for each half of the heads: a mask a head would cost SDPA gigabytes.
        masks = mixer.allowed(LENGTH)[:: mixer.heads // 2].clone()

        def masked(q: Tensor, k: Tensor, v: Tensor, masks: Tensor = masks) -> Tensor:
            halves = zip(*(x.chunk(2, dim=1) for x in (q, k, v)), masks)
            return torch.cat([scaled_dot_product_attention(*own, attn_mask=mask) for *own, mask in halves], dim=1)

        compare(
            {
                "ours": partial(mixer.attend, key_padding_mask=None, aux=None),
                "SDPA, boolean mask": masked,
            },
            ["SDPA, boolean mask"],
            args.rounds,
            slow=["SDPA, boolean mask"],
        )


def decode(args: argparse.Namespace) -> None:
    print(f"{args.tokens} tokens through the rolling cache: 4 sinks, window {WINDOW}, C = 256, 8 heads, float32\n")
    mixer = core_attn.build("streaming", dim=256, heads=8, causal=True, window=WINDOW, sinks=4).eval()
    state = mixer.init_state(1)
    token = torch.randn(1, 1, 256)
    parts = 10
    print("| tokens so far | µs a token | bytes of the cache | MB resident |")
    print("|---|---|---|---|")
    with torch.no_grad():
        for _ in range(parts):
            start = time.process_time()
            for _ in range(args.tokens // parts):
                mixer.step(token, state)
            spent = (time.process_time() - start) / (args.tokens // parts) * 1e6
            resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6
            print(f"| {state.seen} | {spent:.0f} | {state.nbytes} | {resident:.0f} |", flush=True)
    print()


if __name__ == "__main__":
    main()
