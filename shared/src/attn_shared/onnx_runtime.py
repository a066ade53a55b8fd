"""Running and timing a model exported as ONNX beside PyTorch. Needs the extra `onnx`."""

from __future__ import annotations

import contextlib
import io
import logging
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor


def open_session(content: bytes) -> Any:
    """An ONNX Runtime session with as many threads as PyTorch has."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.inter_op_num_threads = 1
    return onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])


def run_session(session: Any, inputs: Mapping[str, Tensor]) -> list[np.ndarray]:
    """All outputs. Inputs that a network never reads may be missing in the graph; they are left out."""
    wanted = {value.name for value in session.get_inputs()}
    result: list[np.ndarray] = session.run(None, {name: v.numpy() for name, v in inputs.items() if name in wanted})
    return result


def latency(
    served: Callable[[Mapping[str, Tensor]], Any], session: Any, inputs: Mapping[str, Tensor], calls: int
) -> dict[str, tuple[float, float]]:
    """p50 and p99 of a call in ms, by "torch" and "onnxruntime", taken in turns, so that both meet the same machine."""
    runs: dict[str, Callable[[], Any]] = {
        "torch": lambda: served(inputs),
        "onnxruntime": lambda: run_session(session, inputs),
    }
    times: dict[str, list[float]] = {name: [] for name in runs}
    with torch.inference_mode():
        for call in range(-max(5, calls // 10), calls):
            for name, run in runs.items():
                start = time.perf_counter()
                run()
                if call >= 0:
                    times[name].append(1e3 * (time.perf_counter() - start))
    return {name: percentiles(taken) for name, taken in times.items()}


def percentiles(times: Sequence[float]) -> tuple[float, float]:
    """p50 and p99."""
    p50, p99 = np.percentile(times, [50, 99])
    return float(p50), float(p99)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without the exporter's progress and its notes on packages that are not there."""
    off = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        sink = io.StringIO()
        with warnings.catch_warnings(), contextlib.redirect_stdout(sink), contextlib.redirect_stderr(sink):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(off)
