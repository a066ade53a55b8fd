"""Every problem that `benchmarks/gpu.py` measures runs, by Triton and with gradients, at a small size."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module")
def benchmark_of_gpu() -> ModuleType:
    spec = importlib.util.spec_from_file_location("gpu", Path(__file__).parents[3] / "benchmarks" / "gpu.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_problems(benchmark_of_gpu: ModuleType, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(benchmark_of_gpu, "HEADS", 1)
    monkeypatch.setattr(benchmark_of_gpu, "CHANNELS", 16)
    met = []
    for problem in benchmark_of_gpu.problems((64,), 7, device):
        gradients = benchmark_of_gpu.with_gradients(problem.forms["triton"], problem.inputs)
        assert [x.shape for x in gradients] == [x.shape for x in problem.inputs]
        assert all(x.isfinite().all() for x in gradients)
        met.append(problem.name)
    assert len(set(met)) == 8
    rows = [benchmark_of_gpu.Row(name, "triton", 1.0, 2.0, 3.0) for name in met]
    monkeypatch.setattr(benchmark_of_gpu.torch.cuda, "get_device_name", lambda: "a card")
    assert benchmark_of_gpu.page(rows, []).count("| triton |") == 8
