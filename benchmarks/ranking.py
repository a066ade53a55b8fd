"""Serving Hiformer: time of a request with hundreds of candidates, of its full, low-rank and pruned forms.

    python benchmarks/ranking.py [--candidates 500] [--fields 50] [--dim 16] [--rank 16] [--calls 1000] [--layers 1]

A request is encoded already: numbers of names, `candidates` x `fields` of them, drawn from `names` a field. Forms:

- full: full composite projections, every token of every layer computed
- full, pruned: the last layer computes only what the task token reads; the same result
- low rank: projections of rank `rank`, every token computed
- low rank, pruned: what `recsys export` writes by default

Each form runs in PyTorch and, as `recsys export` writes it, in ONNX Runtime, on one thread. Pruned and whole forms have
the same weights and must agree to 1e-5 before anything is timed; so must the two runtimes. Calls of all forms alternate
in one run. CPU time is that of the process, which other work on the machine does not lengthen by waiting; wall time is
what a caller sees on this machine as busy as it is. Prints Markdown.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from attn_recsys.clicks.export import to_onnx
from attn_recsys.clicks.options import ClicksDataConfig, ClicksTaskConfig
from attn_recsys.clicks.task import ClicksTask
from attn_recsys.config import HiformerConfig
from attn_shared.config import RunConfig
from attn_shared.onnx_runtime import open_session, run_session
from attn_shared.profiling import machine


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--candidates", type=int, default=500)
    parser.add_argument("--fields", type=int, default=50)
    parser.add_argument("--names", type=int, default=1000, help="names a field")
    parser.add_argument("--dim", type=int, default=16)
    parser.add_argument("--heads", type=int, default=2)
    parser.add_argument("--layers", type=int, default=1)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--calls", type=int, default=1000, help="timed calls of the pruned low-rank form")
    parser.add_argument("--slow_calls", type=int, default=100, help="timed calls of each other form")
    args = parser.parse_args()
    torch.set_num_threads(1)
    print(f"{', '.join(f'{key} {value}' for key, value in machine().items())}\n")
    print(
        f"{args.candidates} candidates x {args.fields} fields, width {args.dim}, heads {args.heads}, "
        f"layers {args.layers}, rank {args.rank}, one thread\n"
    )
    calls = forms(args)
    fast = {name for name in calls if name.startswith("low rank, pruned")}
    taken: dict[str, list[tuple[float, float]]] = {name: [] for name in calls}
    with torch.inference_mode():
        for number in range(-5, args.calls):
            for name, call in calls.items():
                if name in fast or number < args.slow_calls:
                    wall, cpu = time.perf_counter(), time.process_time()
                    call()
                    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
                    if number >= 0:
                        taken[name].append((1e3 * wall, 1e3 * cpu))
    print("| form | calls | CPU ms p50 | CPU ms p99 | wall ms p50 | wall ms p99 |")
    print("|---|---|---|---|---|---|")
    for name, times in taken.items():
        wall, cpu = np.array(times).T
        cells = [f"{value:.2f}" for one in (cpu, wall) for value in np.percentile(one, [50, 99])]
        print(f"| {name} | {len(times):,} | {' | '.join(cells)} |")


def task_of(args: argparse.Namespace, **options: Any) -> ClicksTask:
    """A Hiformer on made-up fields."""
    names = [f"n{i}" for i in range(args.names)]
    state = {
        "fields": [{"name": f"field{i}", "many": False, "names": names} for i in range(args.fields)],
        "numeric": [],
        "item": None,
        "user": None,
        "behaviour": [],
        "attributes": {},
        "max_length": 1,
    }
    config = HiformerConfig(embed_dim=args.dim, heads=args.heads, layers=args.layers, dropout=0.0, **options)
    torch.manual_seed(0)
    run = RunConfig(
        app="recsys", model="hiformer", model_args=config, data="made up", data_args=ClicksDataConfig(), kind="clicks"
    )
    run.task_args = ClicksTaskConfig()
    return ClicksTask(run, state).eval()


def forms(args: argparse.Namespace) -> dict[str, Callable[[], object]]:
    """Name -> one call; refuses to time what does not agree."""
    generator = torch.Generator().manual_seed(1)
    numbers = torch.randint(2, 2 + args.names, (args.candidates, args.fields), generator=generator)
    inputs = {"names": numbers}
    batch = {"names": numbers, "numbers": torch.zeros(args.candidates, 0)}
    made: dict[str, Callable[[], object]] = {}
    for name, rank in (("full", 0), ("low rank", args.rank)):
        whole, pruned = task_of(args, rank=rank, pruned=False), task_of(args, rank=rank, pruned=True)
        pruned.load_state_dict(whole.state_dict())
        for form, task in ((name, whole), (f"{name}, pruned", pruned)):
            session = open_session(to_onnx(task))
            made[f"{form}, PyTorch"] = torch_call(task, batch)
            made[f"{form}, ONNX Runtime"] = onnx_call(session, inputs)
            with torch.no_grad():
                agree(whole.forward_batch(batch), task.forward_batch(batch))
                agree(task.forward_batch(batch), torch.from_numpy(run_session(session, inputs)[0]))
    return made


def torch_call(task: ClicksTask, batch: dict[str, Tensor]) -> Callable[[], object]:
    return lambda: task.forward_batch(batch)


def onnx_call(session: Any, inputs: dict[str, Tensor]) -> Callable[[], object]:
    return lambda: run_session(session, inputs)


def agree(a: Tensor, b: Tensor) -> None:
    worst = float((a - b).abs().max() / a.abs().max().clamp(min=1.0))
    if not worst <= 1e-5:
        raise SystemExit(f"the results differ by {worst:.1e}: nothing was timed")


if __name__ == "__main__":
    main()
