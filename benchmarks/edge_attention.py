"""Propagation over a knowledge graph's edges, beside a row gathered and scattered for every edge: time and memory.

    python benchmarks/edge_attention.py [--nodes 130000] [--edges 3500000] [--width 64] [--layers 3] [--repeats 3]

The graph is as large as the one of KGAT's Last-FM, its nodes drawn at random. A layer is x <- sum over the edges of
weight · x[tail]; the weights are a softmax over each node's edges and take no gradient, as in KGAT. "train" is all
layers forward and backward, "eval" forward. Both sides must give the same outputs and gradients to 1e-5 of their
largest value before anything is timed. Calls alternate in one run on one thread; CPU time, median. Memory is what is
allocated above the inputs at the highest moment, for the graph and for one of a quarter of its edges. Prints Markdown.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor

from attn_shared.profiling import machine
from core_attn.ops import edge_softmax, edge_sum, sort_edges
from core_attn.ops.edge import Edges
from core_attn.testing import growth

Layer = Callable[[Tensor, Tensor, Edges], Tensor]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nodes", type=int, default=130_000)
    parser.add_argument("--edges", type=int, default=3_500_000)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--layers", type=int, default=3)
    parser.add_argument("--repeats", type=int, default=3, help="timed calls a side")
    args = parser.parse_args()
    torch.set_num_threads(1)
    print(f"{', '.join(f'{key} {value}' for key, value in machine().items())}\n")
    print(f"{args.nodes:,} nodes, {args.edges:,} edges, width {args.width}, {args.layers} layers\n")
    whole, part = (problem(args.nodes, count, args.width) for count in (args.edges, args.edges // 4))
    sides: dict[str, Layer] = {"gather and scatter": gather_scatter, "sparse products": edge_sum}
    runs = {
        (name, training): propagation(layer, *whole, args.layers, training)
        for name, layer in sides.items()
        for training in (True, False)
    }
    for training in (True, False):
        ours, theirs = runs["sparse products", training](), runs["gather and scatter", training]()
        worst = max(float((a - b).abs().max() / b.abs().max()) for a, b in zip(ours, theirs, strict=True))
        if not worst <= 1e-5:
            raise SystemExit(f"the results differ by {worst:.1e}: nothing was timed")
    seconds: dict[tuple[str, bool], list[float]] = {key: [] for key in runs}
    for _ in range(args.repeats):
        for key, run in runs.items():
            start = time.process_time()
            run()
            seconds[key].append(time.process_time() - start)
    print("| side | mode | CPU s | times faster | MB | MB, a quarter of the edges |")
    print("|---|---|---|---|---|---|")
    for (name, training), times in seconds.items():
        middle, slow = statistics.median(times), statistics.median(seconds["gather and scatter", training])
        memory = [
            growth.count(propagation(sides[name], *given, args.layers, training)).peak_bytes / 1e6
            for given in (whole, part)
        ]
        mode = "train" if training else "eval"
        print(
            f"| {name} | {mode} | {middle:.3f} | {slow / middle:.1f} | {memory[0]:.0f} | {memory[1]:.0f} |", flush=True
        )


def problem(nodes: int, count: int, width: int) -> tuple[Tensor, Tensor, Edges]:
    """Weights, vectors and edges."""
    g = torch.Generator().manual_seed(0)
    head = torch.randint(nodes, (count,), generator=g).sort().values
    edges = sort_edges(head, torch.randint(nodes, (count,), generator=g), heads=nodes)
    return edge_softmax(torch.randn(count, generator=g), edges), torch.randn(nodes, width, generator=g), edges


def gather_scatter(weights: Tensor, x: Tensor, edges: Edges) -> Tensor:
    """A row for every edge, as message passing without sparse products does it."""
    return torch.zeros_like(x).index_add(0, edges.head, x[edges.tail] * weights.unsqueeze(1))


def propagation(
    layer: Layer, weights: Tensor, x: Tensor, edges: Edges, layers: int, training: bool
) -> Callable[[], list[Tensor]]:
    x = x.detach().requires_grad_(training)
    upstream = x.detach().roll(1, 0)

    def run() -> list[Tensor]:
        with torch.set_grad_enabled(training):
            out = x
            for _ in range(layers):
                out = layer(weights, out, edges)
        return [out.detach(), *(torch.autograd.grad(out, x, upstream) if training else ())]

    return run


if __name__ == "__main__":
    main()
