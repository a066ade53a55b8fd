"""Runs every values_*.py beside this file in Triton's interpreter, in a process of its own.

The interpreter replaces the kernels' class when Triton is imported, so that one process cannot both interpret and
compile. `make test-gpu` runs the same files on a card.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

FILES = sorted(Path(__file__).parent.glob("values_*.py"))
pytest.importorskip("triton")


@pytest.mark.timeout(1200)
def test_values_in_the_interpreter() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *map(str, FILES), "-q", "-p", "no:cacheprovider"],
        env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        cwd=FILES[0].parents[3],
        capture_output=True,
        encoding="utf-8",
        check=False,
    )
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
