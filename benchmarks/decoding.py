"""What one more token costs after 1,000 … 1,000,000 tokens: time and state, beside softmax with a full cache.

    python benchmarks/decoding.py [NAME ...] [--tokens 1000000] [--piece 2000] [--save docs/benchmarks]

Operators alone (B1 H2 D16) and every mechanism that declares a state of constant size, as a module with its projections
(C = 32, 2 heads), float32, one thread. The context is read by the same `step` that decodes, in pieces of `--piece`
tokens; `--piece 1` reads every token alone. Softmax's cache is filled with random keys and values instead, as reading
a context of that length would take hours. A figure is the mean time of a token over a window of single steps, the least
of all rounds, in processor time; the windows of all lengths of context take turns. Prints a Markdown table; with
`--save` it goes to decoding.md, and every figure to decoding.csv.
"""

from __future__ import annotations

import argparse
import copy
import csv
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import core_attn
from attn_shared.profiling import machine
from core_attn import ops
from core_attn.mechanisms.softmax.cached import FullCache
from core_attn.ops.flow import FlowState, flow_attention_step
from core_attn.testing.harness import state_bytes

HEADS, WIDTH = 2, 16
DIM = HEADS * WIDTH
# A window of steps is as many as fit this many seconds, at least three.
SECONDS = 0.3


@dataclass(frozen=True)
class Subject:
    """Something that decodes.

    Attributes:
        kind: "operator" or "module".
        start: makes the state before the first token.
        draw: makes the inputs of so many tokens.
        step: inputs and state -> outputs and the state behind them.
        fill: brings a state to so many tokens at once, where reading them would cost too much.
    """

    kind: str
    name: str
    start: Callable[[], Any]
    draw: Callable[[int], Any]
    step: Callable[[Any, Any], tuple[Tensor, Any]]
    fill: Callable[[Any, int], None] | None = None


@dataclass(frozen=True)
class Figure:
    """Of one subject after so many tokens: microseconds a token, and bytes of its state."""

    tokens: int
    microseconds: float
    state: int


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help="operators or mechanisms; all by default")
    parser.add_argument("--tokens", type=int, default=1_000_000, help="the longest context")
    parser.add_argument("--piece", type=int, default=2000, help="tokens read at once on the way there")
    parser.add_argument("--window", type=int, default=500, help="steps of one timing, at most")
    parser.add_argument("--rounds", type=int, default=5, help="timings a length of context; the least counts")
    parser.add_argument("--save", type=Path, metavar="DIR", help="also write decoding.md and decoding.csv there")
    args = parser.parse_args()
    if args.tokens < 1000 or min(args.piece, args.window, args.rounds) < 1:
        parser.error("--tokens must be at least 1000; --piece, --window and --rounds at least 1")
    torch.set_num_threads(1)
    torch.manual_seed(0)
    lengths = [10**i for i in range(3, int(math.log10(args.tokens)) + 1)]
    subjects = [s for s in everything() if not args.names or s.name in args.names or s.name == "softmax"]
    absent = set(args.names) - {s.name for s in subjects}
    if absent:
        parser.error(f"nothing that decodes in a constant state is called {', '.join(sorted(absent))}")
    lines = [
        f"{', '.join(f'{key} {value}' for key, value in machine().items())}",
        "",
        f"| | | {' | '.join(f'µs a token after {n:,}' for n in lengths)} | last / first | bytes of the state |",
        f"|---|---|{'---|' * (len(lengths) + 2)}",
    ]
    print("\n".join(lines), flush=True)
    table = []
    for subject in subjects:
        with torch.inference_mode():
            figures = measured(subject, lengths, args.piece, args.window, args.rounds)
        table += [(subject, figure) for figure in figures]
        lines.append(row(subject, figures))
        print(lines[-1], flush=True)
    if args.save is not None:
        save(args, lines, table)


def row(subject: Subject, figures: list[Figure]) -> str:
    sizes = [f"{figure.state:,}" for figure in figures]
    cells = [
        subject.name,
        subject.kind,
        *(f"{figure.microseconds:,.0f}" for figure in figures),
        f"{figures[-1].microseconds / figures[0].microseconds:.2f}",
        sizes[0] if len(set(sizes)) == 1 else " … ".join(sizes),
    ]
    return f"| {' | '.join(cells)} |"


def save(args: argparse.Namespace, lines: list[str], table: list[tuple[Subject, Figure]]) -> None:
    args.save.mkdir(parents=True, exist_ok=True)
    pieces = "token by token" if args.piece == 1 else f"in pieces of {args.piece:,} tokens"
    text = [
        "# Decoding after up to a million tokens",
        "",
        f"`python benchmarks/decoding.py --tokens {args.tokens} --piece {args.piece}`: one more token after a context "
        f"of so many. Operators alone (B1 H{HEADS} D{WIDTH}), and mechanisms as modules with their projections "
        f"(C = {DIM}), float32. The context was read by the same step {pieces}; the cache of softmax was filled with "
        f"random keys and values. Mean processor time of a token over windows of up to {args.window} single steps, the "
        f"least of {args.rounds} rounds taken in turns.",
        "",
        *lines,
    ]
    (args.save / "decoding.md").write_text("\n".join(text) + "\n", encoding="utf-8")
    with (args.save / "decoding.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["kind", "name", "context_tokens", "microseconds_a_token", "state_bytes"])
        for subject, f in table:
            writer.writerow([subject.kind, subject.name, f.tokens, f"{f.microseconds:.2f}", f.state])
    print(f"\nsaved {args.save / 'decoding.md'}, {args.save / 'decoding.csv'}")


def measured(subject: Subject, lengths: list[int], piece: int, window: int, rounds: int) -> list[Figure]:
    states = [*read(subject, lengths, piece)]
    sizes = [remembered(state) for state in states]
    token = subject.draw(1)
    least = [math.inf] * len(states)
    for _ in range(rounds):
        for i, state in enumerate(states):
            seconds, states[i] = one_window(subject, token, state, window)
            least[i] = min(least[i], seconds)
    return [Figure(n, 1e6 * s, size) for n, s, size in zip(lengths, least, sizes, strict=True)]


def read(subject: Subject, lengths: list[int], piece: int) -> Iterator[Any]:
    """The state after each length of context."""
    if subject.fill is not None:
        for length in lengths:
            state = subject.start()
            subject.fill(state, length)
            yield state
        return
    state, seen = subject.start(), 0
    for length in lengths:
        while seen < length:
            count = min(piece, length - seen)
            out, state = subject.step(subject.draw(count), state)
            seen += count
        if not out.isfinite().all():
            raise SystemExit(f"{subject.name} gives something that is not finite after {seen:,} tokens")
        yield copy.deepcopy(state)  # caches change in place


def one_window(subject: Subject, token: Any, state: Any, window: int) -> tuple[float, Any]:
    """Mean seconds of a step; the first, which finds nothing in the processor's caches, only says how many fit."""
    start = time.process_time()
    _, state = subject.step(token, state)
    steps = max(3, min(window, int(SECONDS / max(1e-6, time.process_time() - start))))
    start = time.process_time()
    for _ in range(steps):
        _, state = subject.step(token, state)
    return (time.process_time() - start) / steps, state


def remembered(state: Any) -> int:
    """Bytes; of a cache that grows without the free room behind its tokens."""
    if type(state) is FullCache:
        return state.keys.nbytes + state.values.nbytes
    return state_bytes(state)


# --- what decodes ---------------------------------------------------------------------------------------------------


def everything() -> Iterator[Subject]:
    for name, more in STEPS.items():
        yield operator_subject(name, more)
    yield Subject(
        "operator",
        "kernel_attention",
        lambda: torch.zeros(1, HEADS, WIDTH, WIDTH + 1),
        lambda count: (*torch.rand(2, 1, HEADS, count, WIDTH).unbind(), torch.randn(1, HEADS, count, WIDTH)),
        lambda x, s: ops.kernel_step(*x, s),
    )
    yield Subject("operator", "flow_attention", flow_start, heads_tokens, lambda x, s: flow_attention_step(*x, s))
    for info in core_attn.list(pattern="causal_self", decodes=True, constant_state=True):
        yield module_subject(info.name)
    yield module_subject("softmax", fill=filled)


def heads_tokens(count: int) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = torch.randn(3, 1, HEADS, count, WIDTH).unbind()
    return q, torch.nn.functional.normalize(k, dim=-1), v


def flow_start() -> FlowState:
    return FlowState.empty(1, HEADS, WIDTH, WIDTH)


# The step of each operator and the gates that it takes beside q, k, v: name -> (step, gates of so many tokens).
STEPS: dict[str, tuple[str, Callable[[int], dict[str, Tensor]]]] = {
    "gated_linear_attention": (
        "gated_linear_step",
        lambda n: {"log_gate": -0.1 * torch.rand(1, HEADS, n, WIDTH)},
    ),
    "scalar_decay_attention": ("scalar_decay_step", lambda n: {"log_decay": -0.1 * torch.rand(1, HEADS, n)}),
    "delta_rule": ("delta_rule_step", lambda n: {"beta": torch.rand(1, HEADS, n)}),
}


def operator_subject(name: str, more: tuple[str, Callable[[int], dict[str, Tensor]]]) -> Subject:
    function, gates = getattr(ops, more[0]), more[1]

    def step(inputs: Any, state: Tensor) -> tuple[Tensor, Tensor]:
        tokens, given = inputs
        out, after = function(*tokens, **given, state=state)
        return out, after

    return Subject(
        "operator",
        name,
        lambda: torch.zeros(1, HEADS, WIDTH, WIDTH),
        lambda count: (heads_tokens(count), gates(count)),
        step,
    )


def module_subject(name: str, fill: Callable[[Any, int], None] | None = None) -> Subject:
    mixer: Any = core_attn.build(name, dim=DIM, heads=HEADS, causal=True).eval()
    return Subject("module", name, partial(mixer.init_state, 1), lambda n: torch.randn(1, n, DIM), mixer.step, fill)


def filled(cache: FullCache, tokens: int) -> None:
    cache.append(*torch.randn(2, 1, HEADS, tokens, WIDTH).unbind())


if __name__ == "__main__":
    main()
