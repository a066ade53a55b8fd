"""A trained forecasting network as an ONNX file: checked against PyTorch, timed, and with all it needs to be used.

The graph takes what the network takes, scaled values and calendar features, and gives the scaled `forecast`; where the
run has intervals, also their `quantiles`, calibrated. What turns a user's values into these stands in the file's
metadata as JSON (`METADATA`), so that a service needs neither PyTorch nor this package.
"""

from __future__ import annotations

import contextlib
import json
import math
import re
import textwrap
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from attn_shared import trainer
from attn_shared.errors import UserError
from attn_shared.onnx_runtime import latency, open_session, quiet, run_session
from attn_timeseries.calibration import distances
from attn_timeseries.cli import APP
from attn_timeseries.data.calendar import feature_names
from attn_timeseries.models.base import ForecastModel
from attn_timeseries.models.covariates import CovariateModel
from attn_timeseries.predict import write_atomically
from attn_timeseries.task import ForecastTask
from core_attn import dispatch

METADATA = "attn_timeseries"
"""Key of the metadata entry that holds everything beside the graph, as JSON."""
SCHEMA = 1
OPSET = 20
_BATCHES = (1, 2, 7)
# Forms of the operators that consist of ordinary tensor operations; the others are kernels that no other runtime has.
_PLAIN = frozenset({"sdpa", "gathers", "reference"})


@dataclass(frozen=True, kw_only=True)
class Exported:
    """What was written, and how it compares.

    Attributes:
        path: the file.
        lengths: shortest and longest look-back the file takes.
        fixed: why the look-back is fixed; empty where it is not.
        error: largest difference from PyTorch, as a share of the largest value (at least 1), over `checked`.
        checked: (batch, look-back) pairs compared.
        latency: "torch" and "onnxruntime" -> (p50, p99) in ms of a call with one window; empty if not timed.
        threads: of both runtimes.
    """

    path: Path
    lengths: tuple[int, int]
    fixed: str
    error: float
    checked: tuple[tuple[int, int], ...]
    latency: Mapping[str, tuple[float, float]]
    threads: int

    def __str__(self) -> str:
        low, high = self.lengths
        steps = f"look-backs of {low} to {high} steps" if low < high else f"a look-back of {low} steps: {self.fixed}"
        lines = [
            f"{self.path} ({self.path.stat().st_size / 1e6:.2f} MB), any batch, {steps}",
            f"largest difference from PyTorch {self.error:.1e}, over "
            + ", ".join(f"{batch} x {length}" for batch, length in self.checked),
        ]
        lines += [
            f"{name:12} p50 {p50:.3f} ms, p99 {p99:.3f} ms, one window a call, threads: {self.threads}"
            for name, (p50, p99) in self.latency.items()
        ]
        return "\n".join(lines)


def export_run(
    source: Path,
    output: Path,
    *,
    length: str = "auto",
    longest: int | None = None,
    tolerance: float = 1e-5,
    calls: int = 200,
) -> Exported:
    """Export the best checkpoint of a run, or a checkpoint.

    Args:
        source: run or checkpoint folder.
        output: file to write.
        length: "auto", "any" or "fixed" look-back.
        longest: longest look-back; None = four times the trained one.
        tolerance: largest difference from PyTorch, as a share of the largest value (at least 1).
        calls: calls timed; 0 = none.

    Raises:
        UserError: a package is missing, the run cannot be loaded or exported, or the result differs; then no file.
    """
    _needed()
    task, _ = trainer.load_task(APP, source)
    if not isinstance(task, ForecastTask):
        raise UserError(f"{source} is no forecasting run; only forecasting networks can be exported")
    with trainer.output_folder(output.parent):
        return export_task(task.float(), output, length=length, longest=longest, tolerance=tolerance, calls=calls)


def export_task(
    task: ForecastTask,
    output: Path,
    *,
    length: str = "auto",
    longest: int | None = None,
    tolerance: float = 1e-5,
    calls: int = 200,
) -> Exported:
    """As `export_run`, of a task in memory; its network takes other look-backs afterwards where the file does."""
    network, trained = task.eval().network, task.shape.seq_len
    longest = longest or 4 * trained
    if longest < trained:
        raise UserError(f"--longest is {longest} and the model was trained on look-backs of {trained} steps")
    lengths, fixed, program = (trained, trained), "as asked for", None
    if length != "fixed":
        program, fixed = _open(task, network, longest)
    if program is not None:
        assert isinstance(network, ForecastModel)
        lengths = (network.shortest, longest)
    elif length == "any":
        raise UserError(f"{task.config.model} cannot be exported for any look-back: {fixed}")
    else:
        try:
            program = _export(task, None)
        except _Unable as error:
            mixer = f" with {task.config.mixer}" if task.config.mixer else ""
            raise UserError(f"{task.config.model}{mixer} cannot be written as ONNX: {error}") from None
    _describe(program, task, lengths)
    content: bytes = program.model_proto.SerializeToString()
    session = open_session(content)
    checked = tuple((batch, steps) for steps in sorted({*lengths, trained, _odd(lengths)}) for batch in _BATCHES)
    largest = max(_difference(task, session, batch, steps) for batch, steps in checked)
    if not largest <= tolerance:
        raise UserError(
            f"the exported {task.config.model} differs from PyTorch by {largest:.1e}, more than {tolerance:.1e}; "
            "nothing was written"
        )
    write_atomically(output, lambda file: _write(file, content))
    return Exported(
        path=output,
        lengths=lengths,
        fixed=fixed,
        error=largest,
        checked=checked,
        latency=latency(_Served(task), session, example_inputs(task, 1, task.shape.seq_len), calls) if calls else {},
        threads=torch.get_num_threads(),
    )


def _write(file: Path, content: bytes) -> None:
    file.write_bytes(content)


def _open(task: ForecastTask, network: nn.Module, longest: int) -> tuple[Any, str]:
    """The program for any look-back up to `longest` and "", or None and why there is none."""
    if not isinstance(network, ForecastModel):
        return None, f"what stands around {task.config.model} has weights for each of its {task.shape.seq_len} steps"
    try:
        network.allow_lengths(longest)
    except ValueError as error:
        return None, str(error)
    with contextlib.suppress(_Unable):
        program = _export(task, (network.shortest, longest))
        if _dynamic(program):
            return program, ""
    return None, f"the attention of {task.config.model} sizes its work by the look-back"


class _Unable(Exception):
    """PyTorch's exporter refuses; the message is one sentence."""


def _needed() -> None:
    missing = []
    for name in ("onnx", "onnxscript", "onnxruntime"):
        try:
            __import__(name)
        except ImportError:
            missing.append(name)
    if missing:
        raise UserError(
            f"export needs {' and '.join(missing)}, not installed here; pip install 'attn-timeseries[onnx]' adds them"
        )


def example_inputs(task: ForecastTask, batch: int, length: int, *, seed: int = 0) -> dict[str, Tensor]:
    """Random inputs of the right shapes, by the names of the network's arguments."""
    shape, generator = task.shape, torch.Generator().manual_seed(seed)
    dtype = next((p.dtype for p in task.network.parameters()), torch.float32)

    def marks(steps: int) -> Tensor:
        return torch.rand(batch, steps, shape.marks, generator=generator, dtype=dtype) - 0.5

    inputs = {
        "x": torch.randn(batch, length, shape.channels, generator=generator, dtype=dtype).cumsum(1) / length**0.5,
        "x_mark": marks(length),
        "y_mark": marks(shape.label_len + shape.pred_len),
    }
    for module in task.network.modules():
        if isinstance(module, CovariateModel):
            for role, size in vars(module.covariates).items():
                rows = {"s": (), "p": (length,), "k": (length + shape.pred_len,)}[role[0]]
                if isinstance(size, tuple) and size:
                    columns = [torch.randint(n, (batch, *rows), generator=generator) for n in size]
                    inputs[role] = torch.stack(columns, dim=-1)
                elif size:
                    inputs[role] = torch.randn(batch, *rows, size, generator=generator, dtype=dtype)
    return inputs


class _Served(nn.Module):
    """What the file computes: the forecast, and where there are intervals their quantiles, calibrated.

    The inputs come by name in one dictionary, whose order is that of the graph's inputs. Adaptive calibration follows a
    stream, which a graph cannot: its factors are those that it starts from, of the validation split.
    """

    task: tuple[ForecastTask]  # in a tuple, so that it is no submodule: only the network is exported

    def __init__(self, task: ForecastTask) -> None:
        super().__init__()
        self.network = task.network
        self.task = (task,)
        self.outputs = ["forecast", "quantiles"] if task.intervals_ready else ["forecast"]
        self.factors = None
        if task.calibration is not None and task.calibration.ready:
            dtype = next((p.dtype for p in task.network.parameters()), torch.float32)
            self.factors = task.calibration.conformal().to(dtype)

    def forward(self, inputs: dict[str, Tensor]) -> tuple[Tensor, ...]:
        (task,) = self.task
        output = self.network(**inputs)
        if len(self.outputs) == 1:
            return (task._centre(output),)
        quantiles = task.quantiles(output)
        if self.factors is not None:
            quantiles = _widen(quantiles, self.factors)
        return task._centre(output), quantiles


def _widen(quantiles: Tensor, factors: Tensor) -> Tensor:
    """`calibration.widen` without the cumulative maximum, which ONNX lacks."""
    below, above = (list((side * factors).unbind(-1)) for side in distances(quantiles))
    for wider in range(len(below) - 2, -1, -1):
        below[wider] = torch.maximum(below[wider], below[wider + 1])
        above[wider] = torch.maximum(above[wider], above[wider + 1])
    middle = quantiles[..., len(below)]
    ends = [middle - side for side in below], [middle + side for side in reversed(above)]
    return torch.stack([*ends[0], middle, *ends[1]], dim=-1)


def _export(task: ForecastTask, lengths: tuple[int, int] | None) -> Any:
    """The ONNX program with any batch size; with `lengths`, asked to take look-backs between the two."""
    served, inputs = _Served(task).eval(), example_inputs(task, 3, task.shape.seq_len)
    batch = torch.export.Dim("batch", min=1)
    dims: dict[str, dict[int, Any]] = {name: {0: batch} for name in inputs}
    if lengths is not None:
        steps = torch.export.Dim("length", min=lengths[0], max=lengths[1])
        for name in ("x", "x_mark"):
            dims[name][1] = steps
    kernels = {b.name for operator in dispatch.operators().values() for b in operator.backends} - _PLAIN
    try:
        with quiet(), dispatch.without(*kernels), torch.no_grad():
            program = torch.onnx.export(
                served,
                kwargs={"inputs": inputs},
                dynamo=True,
                input_names=list(inputs),
                output_names=served.outputs,
                dynamic_shapes={"inputs": dims},
                opset_version=OPSET,
                verbose=False,
            )
    except Exception as error:
        raise _Unable(_reason(str(error.__cause__ or error))) from error
    assert program is not None
    for node in program.model.graph.all_nodes():
        node.metadata_props.clear()  # stack traces, with the paths of this machine
    return program


def _reason(message: str) -> str:
    """Why the exporter refuses, in a few words of a message that may be pages long."""
    operator = re.search(r"translat\w+ node .*?torch\.ops\.([\w.]+?)(?:\.default)?\]", message, re.DOTALL)
    if operator:
        return f"its operation {operator.group(1)} has no counterpart there"
    if "data-dependent" in message or "data pointer" in message:
        return "its work depends on the values that it is given"
    lines = [line.strip() for line in message.splitlines() if line.strip()]
    return textwrap.shorten(lines[0], 160, placeholder=" …") if lines else "PyTorch's exporter gives no reason"


def _dynamic(program: Any) -> bool:
    """Whether the look-back stayed open: a model may fix it in silence by computing with its number."""
    return any(not isinstance(value.shape[1], int) for value in program.model.graph.inputs if value.name == "x")


def _describe(program: Any, task: ForecastTask, lengths: tuple[int, int]) -> None:
    """Write the metadata into the program."""
    state, shape = task.data_state, task.shape
    facts = {
        "schema": SCHEMA,
        "model": task.config.model,
        "mixer": task.config.mixer,
        "data": Path(task.config.data).name,
        "columns": state["columns"],
        "frequency": state["frequency"],
        "calendar": state["calendar"],
        "calendar_features": list(feature_names(state["calendar"])),
        "look_back": {"trained": shape.seq_len, "shortest": lengths[0], "longest": lengths[1]},
        "label_len": shape.label_len,
        "pred_len": shape.pred_len,
        "scaler": state["scaler"],
        "covariates": state.get("covariates"),
        "quantiles": list(task.options.levels) if task.intervals_ready else None,
        "calibrated": task.calibration is not None and task.calibration.ready,
        "versions": trainer.versions(APP),
    }
    program.model.metadata_props[METADATA] = json.dumps(facts, ensure_ascii=False)


def _odd(lengths: tuple[int, int]) -> int:
    """A look-back between the two that divides nothing."""
    return (sum(lengths) // 2) | 1 if lengths[0] < lengths[1] else lengths[0]


def _difference(task: ForecastTask, session: Any, batch: int, length: int) -> float:
    inputs = example_inputs(task, batch, length, seed=batch * length)
    with torch.no_grad():
        ours = _Served(task)(inputs)
    off = 0.0
    for mine, theirs in zip(ours, run_session(session, inputs), strict=True):
        if theirs.shape != tuple(mine.shape):
            return math.inf
        off = max(off, float(np.abs(mine.numpy() - theirs).max() / max(1.0, float(mine.abs().max()))))
    return off
