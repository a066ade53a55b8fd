"""A trained click model as an ONNX file: checked against PyTorch, timed, and with all it needs to be used.

The graph takes what the model takes, numbers of names and standardised numbers, for any number of rows, and gives
`odds` (log odds) and `probability`. Vocabularies and scalers stand in the file's metadata as JSON (`METADATA`), so that
a service needs neither PyTorch nor this package; `attn_recsys.clicks.serving` is one that needs ONNX Runtime alone.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from attn_recsys.cli import APP
from attn_recsys.clicks.serving import METADATA, SCHEMA
from attn_recsys.clicks.task import ClicksTask
from attn_shared import trainer
from attn_shared.errors import UserError
from attn_shared.onnx_runtime import latency, open_session, quiet, run_session
from attn_shared.runs import write_atomically
from core_attn import dispatch

OPSET = 20
_BATCHES = (1, 2, 7, 500)
# Forms of the operators that consist of ordinary tensor operations; the others are kernels that no other runtime has.
_PLAIN = frozenset({"sdpa", "gathers", "reference"})


@dataclass(frozen=True, kw_only=True)
class Exported:
    """What was written, and how it compares.

    Attributes:
        path: the file.
        error: largest difference of log odds from PyTorch's, as a share of the largest (at least 1), over `_BATCHES`.
        latency: "torch" and "onnxruntime" -> (p50, p99) in ms of a call; empty if not timed.
        candidates: rows a call.
        threads: of both runtimes.
    """

    path: Path
    error: float
    latency: Mapping[str, tuple[float, float]]
    candidates: int
    threads: int

    def __str__(self) -> str:
        lines = [
            f"{self.path} ({self.path.stat().st_size / 1e6:.2f} MB), any number of rows",
            f"largest difference from PyTorch {self.error:.1e}, over {', '.join(map(str, _BATCHES))} rows",
        ]
        lines += [
            f"{name:12} p50 {p50:.3f} ms, p99 {p99:.3f} ms, {self.candidates} rows a call, threads: {self.threads}"
            for name, (p50, p99) in self.latency.items()
        ]
        return "\n".join(lines)


def export_run(
    source: Path, output: Path, *, tolerance: float = 1e-5, calls: int = 200, candidates: int = 500
) -> Exported:
    """Export the best checkpoint of a run, or a checkpoint.

    Args:
        source: run or checkpoint folder.
        output: file to write.
        tolerance: largest difference from PyTorch, as a share of the largest log odds (at least 1).
        calls: calls timed; 0 = none.
        candidates: rows a timed call.

    Raises:
        UserError: a package is missing, the run cannot be loaded or exported, or the result differs; then no file.
    """
    _needed()
    if trainer.saved_kind(APP, source).name != "clicks":
        raise UserError(f"{source} is a model that ranks items; export takes one that predicts clicks")
    task, _ = trainer.load_task(APP, source)
    assert isinstance(task, ClicksTask)
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot write to {output.parent}: {error.strerror or error}") from None
    task = task.float().cpu().eval()
    content = to_onnx(task)
    session = open_session(content)
    largest = max(difference(task, session, rows) for rows in _BATCHES)
    if not largest <= tolerance:
        raise UserError(
            f"the exported {task.config.model} differs from PyTorch by {largest:.1e}, more than {tolerance:.1e}; "
            "nothing was written"
        )
    write_atomically(output, content)
    return Exported(
        path=output,
        error=largest,
        latency=latency(Served(task).eval(), session, example_inputs(task, candidates), calls) if calls else {},
        candidates=candidates,
        threads=torch.get_num_threads(),
    )


def _needed() -> None:
    missing = []
    for name in ("onnx", "onnxscript", "onnxruntime"):
        try:
            __import__(name)
        except ImportError:
            missing.append(name)
    if missing:
        raise UserError(
            f"export needs {' and '.join(missing)}, not installed here; pip install 'attn-recsys[onnx]' adds them"
        )


class Served(nn.Module):
    """What the file computes. The inputs come by name in one dictionary, whose order is that of the graph's inputs."""

    def __init__(self, task: ClicksTask) -> None:
        super().__init__()
        self.network = task.network

    def forward(self, inputs: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        batch = dict(inputs)
        rows = next(iter(inputs.values())).shape[0]
        if "names" not in batch:
            batch["names"] = torch.zeros((rows, 0), dtype=torch.int64)
        if "numbers" not in batch:
            batch["numbers"] = torch.zeros((rows, 0))
        odds = self.network(batch)
        return odds, torch.sigmoid(odds)


def example_inputs(task: ClicksTask, rows: int, *, seed: int = 0, width: int | None = None) -> dict[str, Tensor]:
    """Random inputs of the right shapes; lists of `width` names at most, drawn where it is not given."""
    generator = torch.Generator().manual_seed(seed)
    shape = task.encoder.shape
    width = width or int(torch.randint(1, 9, (), generator=generator))
    sizes = {field.name: field.size for field in shape.fields}

    def drawn(size: int, *dims: int) -> Tensor:
        return torch.randint(0, size, (rows, *dims), generator=generator)

    def ragged(size: int, *, front: bool, last: int | None = None) -> Tensor:
        counts = torch.randint(0, width + 1, (rows, 1), generator=generator)
        column = torch.arange(width)
        there = column >= width - counts if front else column < counts
        if last is None:
            return drawn(size, width).clamp(min=1) * there
        return drawn(size, width, last).clamp(min=1) * there.unsqueeze(-1)

    inputs: dict[str, Tensor] = {}
    if task.encoder.single:
        inputs["names"] = torch.stack([drawn(sizes[name]) for name in task.encoder.single], dim=1)
    if shape.numeric:
        inputs["numbers"] = torch.randn(rows, len(shape.numeric), generator=generator)
    inputs |= {f"many.{name}": ragged(sizes[name], front=False) for name in task.encoder.lists}
    for name in shape.behaviour:
        last = task.encoder.attribute_width(name)
        inputs[f"past.{name}"] = ragged(sizes[name], front=True, last=last)
    return inputs


def to_onnx(task: ClicksTask) -> bytes:
    """The file's content.

    Raises:
        UserError: PyTorch's exporter refuses the model.
    """
    inputs = example_inputs(task, 3, width=5)
    rows = torch.export.Dim("rows", min=1)
    dims: dict[str, dict[int, Any]] = {name: {0: rows} for name in inputs}
    past = torch.export.Dim("past", min=1)
    for number, name in enumerate(inputs):
        if name.startswith("many."):
            dims[name][1] = torch.export.Dim(f"width{number}", min=1)
        elif name.startswith("past."):
            dims[name][1] = past
    kernels = {b.name for operator in dispatch.operators().values() for b in operator.backends} - _PLAIN
    try:
        with quiet(), dispatch.without(*kernels), torch.no_grad():
            program = torch.onnx.export(
                Served(task).eval(),
                kwargs={"inputs": inputs},
                dynamo=True,
                input_names=list(inputs),
                output_names=["odds", "probability"],
                dynamic_shapes={"inputs": dims},
                opset_version=OPSET,
                verbose=False,
            )
    except Exception as error:
        lines = [line.strip() for line in str(error.__cause__ or error).splitlines() if line.strip()]
        reason = lines[0] if lines else type(error).__name__
        raise UserError(f"{task.config.model} cannot be written as ONNX: {reason}") from error
    assert program is not None
    for node in program.model.graph.all_nodes():
        node.metadata_props.clear()  # stack traces, with the paths of this machine
    facts = {
        "schema": SCHEMA,
        "model": task.config.model,
        "mixer": task.config.mixer,
        "data": Path(task.config.data).name,
        "separator": task.config.data_args.separator,
        **{name: task.data_state[name] for name in ("fields", "numeric", "item", "user", "behaviour", "attributes")},
        "max_length": task.data_state["max_length"],
        "versions": trainer.versions(APP),
    }
    program.model.metadata_props[METADATA] = json.dumps(facts, ensure_ascii=False)
    content: bytes = program.model_proto.SerializeToString()
    return content


def difference(task: ClicksTask, session: Any, rows: int) -> float:
    """Largest difference of log odds, as a share of the largest (at least 1)."""
    inputs = example_inputs(task, rows, seed=rows)
    with torch.no_grad():
        ours = Served(task)(inputs)[0]
    theirs = run_session(session, inputs)[0]
    if theirs.shape != tuple(ours.shape):
        return float("inf")
    return float(np.abs(ours.numpy() - theirs).max() / max(1.0, float(ours.abs().max())))
