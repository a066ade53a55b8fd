"""The long convolution beside the transforms it consists of, and beside plain autograd.

    python benchmarks/fft_conv.py [--tokens 131072] [--channels 64] [--rounds 7] [--save docs/benchmarks]

A convolution by Fourier transforms is three of them forward: of the tokens, of the kernel, and back. Its backward is
three more: of the output's gradient, and back to the gradients of tokens and kernel; the spectra of forward are kept.
They are timed alone, as `torch.fft` takes them for all channels in one call: three of the fast size nearest above
2 L - 1, whose inputs are zero-padded by the call as a convolution needs it; and six, the three of forward with the
three that autograd makes of each. "plain" is irfft(rfft(x) · rfft(kernel)) with autograd's own backward. One thread,
process CPU time, all sides in turns, the least of all rounds. Before anything is timed, outputs and gradients must
agree. Prints a Markdown table; with `--save` it goes to fft_conv.md.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from attn_shared.profiling import machine, peak_memory
from core_attn.ops import fft_conv
from core_attn.ops.fftconv.spectral import fast_size

# A run gives the seconds of forward, and of forward and backward.
Run = Callable[[], tuple[float, float]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=131_072, help="L; the kernel has as many taps")
    parser.add_argument("--channels", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=7, help="timings a side; the least counts")
    parser.add_argument("--save", type=Path, metavar="DIR", help="also write fft_conv.md there")
    args = parser.parse_args()
    if min(args.tokens, args.channels, args.rounds) < 1:
        parser.error("--tokens, --channels and --rounds must be at least 1")
    torch.set_num_threads(1)
    torch.manual_seed(0)
    length, points = args.tokens, fast_size(2 * args.tokens - 1)
    x = torch.randn(1, args.channels, length, requires_grad=True)
    kernel = (torch.randn(args.channels, length) / length**0.5).requires_grad_()
    upstream = torch.randn(1, args.channels, length)

    def plain(x: Tensor, kernel: Tensor) -> Tensor:
        spectrum = torch.fft.rfft(x, n=points) * torch.fft.rfft(kernel, n=points)
        return torch.fft.irfft(spectrum, n=points)[..., :length]

    def convolution(call: Callable[[Tensor, Tensor], Tensor]) -> Run:
        def run() -> tuple[float, float]:
            start = time.process_time()
            out = call(x, kernel)
            middle = time.process_time()
            torch.autograd.grad(out, [x, kernel], upstream)
            return middle - start, time.process_time() - start

        return run

    # What each transform is given: forward x, kernel and a spectrum; backward the gradient, padded, and two spectra.
    spectrum = torch.fft.rfft(x.detach(), n=points)

    def transforms() -> tuple[float, float]:
        with torch.no_grad():
            start = time.process_time()
            torch.fft.rfft(x, n=points)
            torch.fft.rfft(kernel, n=points)
            torch.fft.irfft(spectrum, n=points)
            middle = time.process_time()
            torch.fft.rfft(upstream, n=points)
            torch.fft.irfft(spectrum, n=points)
            torch.fft.irfft(spectrum, n=points)
            return middle - start, time.process_time() - start

    agree(x, kernel, upstream, plain)
    runs = {"fft_conv": convolution(fft_conv), "its transforms alone": transforms, "plain autograd": convolution(plain)}
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in runs}
    for _ in range(args.rounds):
        for name, run in runs.items():
            times[name].append(run())
    least = {name: [1e3 * min(column) for column in zip(*found)] for name, found in times.items()}
    ours, alone, other = least.values()
    lines = [
        f"{', '.join(f'{key} {value}' for key, value in machine().items())}",
        "",
        f"{length:,} tokens, {args.channels} channels, a kernel of {length:,} taps, transforms of {points:,} points, "
        "float32",
        "",
        "| | forward ms | forward + backward ms | extra MB |",
        "|---|---|---|---|",
    ]
    for name, (forward, both) in least.items():
        with peak_memory() as peak:
            runs[name]()
        lines.append(f"| {name} | {forward:.0f} | {both:.0f} | {peak.megabytes:.0f} |")
    lines += [
        "",
        "| ratio | |",
        "|---|---|",
        f"| fft_conv, forward / its three transforms | {ours[0] / alone[0]:.2f} |",
        f"| fft_conv, forward + backward / its six transforms | {ours[1] / alone[1]:.2f} |",
        f"| fft_conv, forward + backward / the three transforms of forward | {ours[1] / alone[0]:.2f} |",
        f"| plain autograd, forward + backward / its six transforms | {other[1] / alone[1]:.2f} |",
        f"| plain autograd / fft_conv, forward + backward | {other[1] / ours[1]:.2f} |",
    ]
    print("\n".join(lines))
    if args.save is not None:
        args.save.mkdir(parents=True, exist_ok=True)
        head = [
            "# The long convolution beside its transforms",
            "",
            f"`python benchmarks/fft_conv.py --tokens {args.tokens} --channels {args.channels} "
            f"--rounds {args.rounds}`: least process CPU time of all rounds, taken in turns, 1 thread; outputs and "
            "gradients agreed first. Forward takes three Fourier transforms, backward three more with the spectra of "
            "forward kept; the transforms alone are calls of `torch.fft` for all channels at once, padded with zeros "
            "as here. No convolution by transforms trains with fewer than six, so at their speed the third ratio "
            "cannot be below 2.",
            "",
        ]
        (args.save / "fft_conv.md").write_text("\n".join([*head, *lines]) + "\n", encoding="utf-8")
        print(f"\nsaved {args.save / 'fft_conv.md'}")


def agree(x: Tensor, kernel: Tensor, upstream: Tensor, other: Callable[[Tensor, Tensor], Tensor]) -> None:
    """Stop unless both sides give the same outputs and gradients."""
    found = []
    for call in (fft_conv, other):
        out = call(x, kernel)
        found.append([out.detach(), *torch.autograd.grad(out, [x, kernel], upstream)])
    for a, b in zip(*found, strict=True):
        error = ((a - b).abs().max() / b.abs().max()).item()
        if not error <= 1e-5:
            raise SystemExit(f"the sides differ by {error:.1e}: nothing was timed")


if __name__ == "__main__":
    main()
