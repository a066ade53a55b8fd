"""Every mechanism as the module a model would use, projections included, at growing lengths."""

from __future__ import annotations

import datetime
import json
import math
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from core_attn import api, registry
from core_attn.cli import columns
from core_attn.testing.growth import count

BASELINE = "softmax"


@dataclass(frozen=True, kw_only=True)
class Row:
    """One mechanism at one length.

    Attributes:
        name: registry name.
        length: tokens L.
        forward_ms, train_ms: median wall time of a forward without gradients, and of forward + backward.
        forward_ratio, train_ratio: those times over softmax attention's in the same run; below 1 is faster.
        peak_mb: the most memory alive at once in forward + backward, beside weights and input: counted from the
            tensors made on the CPU, measured by the allocator on a GPU.
        peak_ratio: that over softmax attention's.
        growth: slope of log train_ms over log L since the length before; NaN at the first.
    """

    name: str
    length: int
    forward_ms: float
    train_ms: float
    forward_ratio: float
    train_ratio: float
    peak_mb: float
    peak_ratio: float
    growth: float


@dataclass(frozen=True)
class Rows:
    """The rows of one run with its settings and its machine."""

    rows: tuple[Row, ...]
    settings: dict[str, Any]
    machine: dict[str, Any]


def measure(
    names: Sequence[str] = (),
    *,
    lengths: Sequence[int] = (256, 1024, 4096),
    batch: int = 1,
    heads: int = 8,
    head_dim: int = 32,
    dtype: torch.dtype | str = torch.float32,
    device: str = "cpu",
    causal: bool = False,
    rounds: int = 5,
    progress: Callable[[str], None] | None = None,
) -> Rows:
    """Time and memory of self attention by each mechanism, softmax always among them.

    At each length the mechanisms take turns, `rounds` times, so that a busy moment of the machine touches all alike.

    Args:
        names: registry names; none means all that have the pattern.
        lengths: numbers of tokens, in any order.
        batch, heads, head_dim: B, H and D; the modules have dim = H * D.
        causal: measure causal instead of noncausal self attention.
        rounds: timings of each; the median counts.
        progress: called with a line of text as the run goes on.

    Raises:
        UnknownNameError: unknown mechanism.
        ValueError: a mechanism lacks the pattern, or there is no such device.
    """
    if rounds < 1 or batch < 1:
        raise ValueError(f"rounds and batch must be positive, got {rounds} and {batch}")
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("there is no CUDA device on this machine; use --device cpu")
    pattern = "causal_self" if causal else "noncausal_self"
    chosen = [*dict.fromkeys([BASELINE, *(names or [info.name for info in api.list(pattern=pattern)])])]
    kind = api.as_dtype(dtype)
    mixers: dict[str, nn.Module] = {}
    for name in chosen:
        torch.manual_seed(0)
        mixers[name] = api.build(name, dim=heads * head_dim, heads=heads, causal=causal).to(device, kind)
    measured: dict[tuple[str, int], tuple[float, float, float]] = {}
    for length in sorted(set(lengths)):
        if progress is not None:
            progress(f"L = {length}: {', '.join(chosen)}")
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(batch, length, heads * head_dim, generator=generator).to(device, kind)
        jobs = {name: (partial(_forward, m, x), partial(_train, m, x)) for name, m in mixers.items()}
        # Counting runs everything once, which is the warm-up as well.
        peaks = {name: _peak(train, device) for name, (_, train) in jobs.items()}
        times: dict[str, list[tuple[float, float]]] = {name: [] for name in chosen}
        for _ in range(rounds):
            for name, (forward, train) in jobs.items():
                times[name].append((_timed(forward, device), _timed(train, device)))
        for name in chosen:
            forward_ms, train_ms = (1e3 * statistics.median(t) for t in zip(*times[name]))
            measured[name, length] = forward_ms, train_ms, peaks[name] / 1e6
    settings = {
        "pattern": pattern,
        "batch": batch,
        "heads": heads,
        "head_dim": head_dim,
        "dtype": str(kind).removeprefix("torch."),
        "device": device,
        "rounds": rounds,
        "lengths": sorted(set(lengths)),
    }
    return Rows(tuple(_rows(chosen, sorted(set(lengths)), measured)), settings, _machine(device))


def _rows(
    names: Iterable[str], lengths: Sequence[int], measured: dict[tuple[str, int], tuple[float, float, float]]
) -> Iterable[Row]:
    for name in names:
        before = None
        for length in lengths:
            forward, train, peak = measured[name, length]
            base = measured[BASELINE, length]
            growth = math.nan
            if before is not None:
                growth = math.log(train / measured[name, before][1]) / math.log(length / before)
            yield Row(
                name=registry.short_name(name),
                length=length,
                forward_ms=forward,
                train_ms=train,
                forward_ratio=forward / base[0],
                train_ratio=train / base[1],
                peak_mb=peak,
                peak_ratio=peak / base[2],
                growth=growth,
            )
            before = length


def heading(rows: Rows) -> str:
    """One line: what was measured, on what, when."""
    s, m = rows.settings, rows.machine
    return (
        f"{s['pattern'].replace('_', ' ')} attention, batch {s['batch']}, {s['heads']} heads of {s['head_dim']}, "
        f"{s['dtype']}, median of {s['rounds']}; "
        f"{m['device']}, {m['threads']} thread(s), torch {m['torch']}, {m['date']}"
    )


HEAD = ["mechanism", "L", "forward ms", "x softmax", "train ms", "x softmax", "peak MB", "x softmax", "growth"]


def table(rows: Rows) -> str:
    """Plain text; "x softmax" is the ratio to softmax attention in the same run, "growth" the exponent of train ms."""
    return columns(HEAD, [_cells(row) for row in rows.rows])


def save(rows: Rows, folder: Path) -> list[Path]:
    """Write mechanisms.md and mechanisms.json under `folder`; each appears whole or not at all."""
    lines = ["# Mechanisms beside softmax attention", "", heading(rows) + ".", ""]
    lines += [
        "Modules as a model uses them, projections included. `x softmax` is the ratio to softmax attention in the same "
        "run (below 1: faster, smaller); train is forward and backward; growth is the exponent of train ms in L since "
        "the row above.",
        "",
    ]
    lines += ["| " + " | ".join(line) + " |" for line in [HEAD, ["---"] * len(HEAD), *[_cells(r) for r in rows.rows]]]
    facts = {"settings": rows.settings, "machine": rows.machine, "rows": [_plain(r) for r in rows.rows]}
    return write(folder, "mechanisms", lines, facts)


def write(folder: Path, stem: str, lines: Sequence[str], facts: dict[str, Any]) -> list[Path]:
    """Write `lines` to <stem>.md and `facts` to <stem>.json; each appears whole or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    written = [folder / f"{stem}.md", folder / f"{stem}.json"]
    for path, text in zip(written, ["\n".join(lines) + "\n", json.dumps(facts, indent=2) + "\n"]):
        partial_file = path.with_name(path.name + ".part")
        partial_file.write_text(text, encoding="utf-8")
        os.replace(partial_file, path)
    return written


def _cells(row: Row) -> list[str]:
    growth = "" if math.isnan(row.growth) else f"{row.growth:.2f}"
    return [
        row.name,
        str(row.length),
        f"{row.forward_ms:.2f}",
        f"{row.forward_ratio:.2f}",
        f"{row.train_ms:.2f}",
        f"{row.train_ratio:.2f}",
        f"{row.peak_mb:.1f}",
        f"{row.peak_ratio:.2f}",
        growth,
    ]


def _plain(row: Row) -> dict[str, Any]:
    return {k: None if isinstance(v, float) and math.isnan(v) else v for k, v in asdict(row).items()}


def _forward(mixer: nn.Module, x: Tensor) -> None:
    mixer.eval()
    with torch.no_grad():
        mixer(x)


def _train(mixer: nn.Module, x: Tensor) -> None:
    mixer.train()
    mixer.zero_grad(set_to_none=True)
    mixer(x.detach().requires_grad_()).sum().backward()


def _timed(job: Callable[[], None], device: str) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    job()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def _peak(job: Callable[[], None], device: str) -> float:
    if device != "cuda":
        return count(job).peak_bytes
    job()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    job()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def _machine(device: str) -> dict[str, Any]:
    return {
        "device": torch.cuda.get_device_name() if device == "cuda" else _cpu_name(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "date": datetime.date.today().isoformat(),
    }


def _cpu_name() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            return next(line.partition(":")[2].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
