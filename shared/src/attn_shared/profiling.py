"""What a model costs: parameters, operations, speed and memory, measured and never estimated.

Memory on the CPU is read from PyTorch's own allocator, event by event, so that it is exact to the byte and does not
depend on what else the process holds; on a GPU it is `torch.cuda.max_memory_allocated`. Timings of several models are
taken in turns, round by round, so that a noisy machine is noisy for all of them alike.
"""

from __future__ import annotations

import math
import os
import platform
import random
import statistics
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.fabric.utilities import move_data_to_device
from lightning.fabric.utilities.apply_func import apply_to_collection
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop

from attn_shared.config import RunConfig
from attn_shared.task import DataBundle, Task

# The profiler's library announces each start and stop on stderr otherwise; it reads this at its first use.
os.environ.setdefault("KINETO_LOG_LEVEL", "99")

MIB = 2**20

DEFINITIONS = {
    "parameters": "Trainable and frozen parameters, shared ones once.",
    "flops": (
        "Operations of one sample's forward pass in evaluation, a multiply and an add counting two: matrix products, "
        "convolutions, fused attention and Fourier transforms. Element-wise work, softmax, norms, sorting and "
        "gathering are not counted."
    ),
    "train_samples_per_s": "Forward and backward of a real training batch, median of several, without the optimiser.",
    "latency_ms": "Forward of one sample in evaluation, median.",
    "eval_samples_per_s": "Forward of a real evaluation batch, median of several.",
    "peak_memory_mb": (
        "Most memory tensors held at once during a training step, in MiB: parameters, gradients, the batch, "
        "activations and workspaces; without the optimiser's state."
    ),
}


@dataclass(frozen=True, kw_only=True)
class Cost:
    """What one model costs on one machine; `DEFINITIONS` says what each figure means.

    Attributes:
        parameters: number of parameters.
        flops: floating-point operations of one sample's forward pass.
        train_samples_per_s: None where there is nothing to train.
        latency_ms: batch of one, median.
        eval_samples_per_s: at the evaluation batch size.
        peak_memory_mb: MiB, of a training step (of a forward pass where there is nothing to train).
        batch_size, eval_batch_size: samples in the batches measured.
        device, threads: where it was measured.
        uncounted: custom operators met whose operations `flops` lacks.
    """

    parameters: int
    flops: int
    train_samples_per_s: float | None
    latency_ms: float
    eval_samples_per_s: float
    peak_memory_mb: float
    batch_size: int
    eval_batch_size: int
    device: str
    threads: int
    uncounted: tuple[str, ...] = ()


class Peak:
    """Result of `peak_memory`, filled when its block ends: `bytes` above what was held at the start."""

    bytes: int = 0

    @property
    def megabytes(self) -> float:
        return self.bytes / MIB


@contextmanager
def peak_memory(device: torch.device | str = "cpu") -> Iterator[Peak]:
    """Measure the most memory that tensors made inside the block held at once.

    Not nestable on the CPU, and not inside another `torch.profiler` session: PyTorch allows one at a time.
    """
    device = torch.device(device)
    peak = Peak()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        yield peak
        torch.cuda.synchronize(device)
        peak.bytes = torch.cuda.max_memory_allocated(device) - before
        return
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        yield peak
    events = profiler.profiler.kineto_results.events()  # type: ignore[union-attr]
    changes = sorted((e.start_ns(), i, e.nbytes()) for i, e in enumerate(events) if e.name() == "[memory]")
    held = 0
    for _, _, change in changes:
        held += change
        peak.bytes = max(peak.bytes, held)


def count_flops(forward: Callable[[], Any]) -> tuple[int, tuple[str, ...]]:
    """Operations of one call (see `DEFINITIONS["flops"]`), and the custom operators it met that have no formula."""
    counter = FlopCounterMode(display=False, custom_mapping=_FLOP_FORMULAS)
    seen = _OperatorNames()
    with seen, counter:
        forward()
    counted = {str(op) for op in counter.get_flop_counts().get("Global", {})}
    unknown = {n for n in seen.names if not n.startswith(("aten.", "prim.", "prims.", "profiler."))} - counted
    return counter.get_total_flops(), tuple(sorted(unknown))


def measure_cost(task: Task, bundle: DataBundle, config: RunConfig, *, seconds: float = 2.0) -> Cost:
    """Measure one model; takes about `seconds`, longer where single steps are long.

    Weights, buffers, gradients, modes and random states are afterwards as before, and the task on its old device.
    """
    return measure_costs([(task, bundle, config)], seconds=seconds)[0]


def measure_costs(entries: Sequence[tuple[Task, DataBundle, RunConfig]], *, seconds: float = 2.0) -> list[Cost]:
    """Measure several models on equal terms: their timings are taken in turns. `seconds` is the time a model."""
    with _random_state_kept():
        meters: list[_Meter] = []
        try:
            for entry in entries:
                meters.append(_Meter(*entry))
                meters[-1].measure_work()
            started = time.perf_counter()
            rounds = 0
            while rounds < 5 or (rounds < 30 and time.perf_counter() - started < seconds * len(meters)):
                for meter in meters:
                    meter.measure_times()
                rounds += 1
            return [meter.cost() for meter in meters]
        finally:
            for meter in meters:
                meter.restore()


class _Meter:
    """Measures one task and puts it back as it was."""

    LATENCIES_A_ROUND = 5

    def __init__(self, task: Task, bundle: DataBundle, config: RunConfig) -> None:
        self.task = task
        self.parameters = list({id(p): p for p in task.model.parameters()}.values())
        self.home = next(iter([*task.parameters(), *task.buffers()]), torch.empty(0)).device
        self.modes = [(module, module.training) for module in task.modules()]
        self.buffers = [
            (module, name, buffer, buffer.detach().clone())
            for module in task.modules()
            for name, buffer in module._buffers.items()
            if buffer is not None
        ]
        self.gradients = [(p, p.grad) for p in task.parameters()]
        for p, _ in self.gradients:
            p.grad = None
        wants_gpu = config.trainer.accelerator in ("gpu", "cuda", "auto") and torch.cuda.is_available()
        self.device = torch.device("cuda") if wants_gpu else torch.device("cpu")
        task.to(self.device)
        self.precision = config.trainer.precision
        self.train_batch = self._batch(bundle, config.trainer.batch_size)
        self.eval_batch = self._batch(bundle, config.trainer.eval_batch_size)
        self.one = self._batch(bundle, 1)
        self.trainable = any(p.requires_grad for p in self.parameters)
        self.train_times: list[float] = []
        self.eval_times: list[float] = []
        self.latencies: list[float] = []

    def _batch(self, bundle: DataBundle, size: int) -> Any:
        batch = move_data_to_device(self.task.example_batch(bundle, size), self.device)
        if self.precision == "64-true":
            batch = apply_to_collection(batch, Tensor, lambda t: t.double() if t.is_floating_point() else t)
        return batch

    def _autocast(self) -> AbstractContextManager[Any]:
        dtypes = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}
        if self.precision not in dtypes:
            return nullcontext()
        return torch.autocast(self.device.type, dtype=dtypes[self.precision])

    def _train_step(self) -> None:
        if not self.trainable:
            with torch.no_grad(), self._autocast():
                self.task.training_loss(self.train_batch)
            return
        with torch.enable_grad():
            with self._autocast():
                loss = self.task.training_loss(self.train_batch)
            loss.backward()
        # Released inside the step, so that the next one starts from the same memory.
        for p in self.parameters:
            p.grad = None

    def _forward(self, batch: Any) -> None:
        with torch.no_grad(), self._autocast():
            self.task.forward_batch(batch)

    def _seconds(self, call: Callable[[], None]) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        started = time.perf_counter()
        call()
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter() - started

    def measure_work(self) -> None:
        """Operations and memory, which no noise touches; each first pass also warms up."""
        self.task.eval()
        self._forward(self.one)
        total, self.uncounted = count_flops(lambda: self._forward(self.one))
        self.flops = total // samples_of(self.one)
        self._forward(self.eval_batch)
        self.task.train()
        self._train_step()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with peak_memory(self.device) as peak:
                self._train_step()
        held: list[Tensor] = [*self.parameters, *(b for _, _, b, _ in self.buffers)]
        apply_to_collection(self.train_batch, Tensor, held.append)
        self.peak_bytes = peak.bytes + sum(t.numel() * t.element_size() for t in held)

    def measure_times(self) -> None:
        self.task.train()
        self.train_times.append(self._seconds(self._train_step))
        self.task.eval()
        self.eval_times.append(self._seconds(lambda: self._forward(self.eval_batch)))
        for _ in range(self.LATENCIES_A_ROUND):
            self.latencies.append(self._seconds(lambda: self._forward(self.one)))

    def cost(self) -> Cost:
        train, evaluation = samples_of(self.train_batch), samples_of(self.eval_batch)
        return Cost(
            parameters=sum(p.numel() for p in self.parameters),
            flops=self.flops,
            train_samples_per_s=train / statistics.median(self.train_times) if self.trainable else None,
            latency_ms=1000 * statistics.median(self.latencies),
            eval_samples_per_s=evaluation / statistics.median(self.eval_times),
            peak_memory_mb=self.peak_bytes / MIB,
            batch_size=train,
            eval_batch_size=evaluation,
            device=torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else "cpu",
            threads=torch.get_num_threads(),
            uncounted=self.uncounted,
        )

    def restore(self) -> None:
        self.task.to(self.home)
        for module, name, buffer, value in self.buffers:
            if not torch.equal(buffer, value):
                with torch.no_grad():
                    buffer.copy_(value)
            module._buffers[name] = buffer
        for module, training in self.modes:
            module.training = training
        for p, gradient in self.gradients:
            p.grad = gradient


def samples_of(batch: Any) -> int:
    """Samples in a batch: the first extent of its first tensor.

    Raises:
        ValueError: no tensor in it.
    """
    if isinstance(batch, Tensor):
        return batch.shape[0]
    items = batch.values() if isinstance(batch, dict) else batch if isinstance(batch, list | tuple) else ()
    for item in items:
        try:
            return samples_of(item)
        except ValueError:
            continue
    raise ValueError(f"a batch of type {type(batch).__name__} holds no tensor")


@contextmanager
def _random_state_kept() -> Iterator[None]:
    python, array = random.getstate(), np.random.get_state()  # noqa: NPY002
    with torch.random.fork_rng():
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(array)  # noqa: NPY002


class _OperatorNames(torch.utils._python_dispatch.TorchDispatchMode):
    """Notes the name of every operator that runs."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.add(str(getattr(func, "overloadpacket", func)))
        return func(*args, **(kwargs or {}))


def _transform_flops(input_shape: Sequence[int], dims: Sequence[int], *_: Any, length: int | None, real: bool) -> int:
    """5 n log2 n for a complex transform of n points (Cooley and Tukey's count), half of it for a real one."""
    points = 1
    for d in dims:
        points *= input_shape[d]
    if length is not None:  # the inverse of a real transform takes half the spectrum
        points = points // input_shape[dims[-1]] * length
    total = math.prod(input_shape) // max(1, math.prod(input_shape[d] for d in dims))
    return round((2.5 if real else 5) * total * points * math.log2(max(points, 2)))


def _c2c(x: Any, dims: Any, *_: Any, **__: Any) -> int:
    return _transform_flops(x, dims, length=None, real=False)


def _r2c(x: Any, dims: Any, *_: Any, **__: Any) -> int:
    return _transform_flops(x, dims, length=None, real=True)


def _c2r(x: Any, dims: Any, normalization: Any, last: int, **_: Any) -> int:
    return _transform_flops(x, dims, length=last, real=True)


def _sdpa_cpu(q: Any, k: Any, v: Any, *_: Any, **__: Any) -> int:
    return sdpa_flop(q, k, v)


_FLOP_FORMULAS: dict[Any, Any] = {
    torch.ops.aten._fft_c2c: _c2c,
    torch.ops.aten._fft_r2c: _r2c,
    torch.ops.aten._fft_c2r: _c2r,
    # PyTorch's own table lacks the CPU form of its fused attention.
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _sdpa_cpu,
}


def machine() -> dict[str, str]:
    """The machine, versions and date that stand under every table and report."""
    versions = {}
    for name in ("attn-core", "core-attn", "attn-shared", "torch", "lightning", "numpy"):
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    facts = {
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "processor": _processor(),
        "cores": str(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()),
        "threads": str(torch.get_num_threads()),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
    }
    if torch.cuda.is_available():
        facts["gpu"] = torch.cuda.get_device_name()
    return {**facts, **versions}


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
