"""A small model trained on the synthetic data, shared by the tests of what comes after training."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from attn_eeg.cli import main

SMALL = ["--model_args.depth", "1", "--model_args.embed_dim", "16", "--model_args.heads", "2"]
SHORT = ["--preset", "none", "--trainer.max_epochs", "6", "--trainer.accelerator", "cpu", "--trainer.progress", "false"]


@pytest.fixture(scope="session")
def train(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Run `eeg train` with a small network; the run folder."""

    def run(*argv: str, small: bool = True) -> Path:
        runs = tmp_path_factory.mktemp("runs")
        assert main(["train", "--runs", str(runs), *(SMALL if small else []), *SHORT, *argv]) == 0
        (report,) = runs.glob("**/report.html")
        return report.parent

    return run


@pytest.fixture(scope="session")
def trained(train: Callable[..., Path]) -> Path:
    """A run of RBTransformer on the synthetic data."""
    return train("--optim.lr", "0.003", "--trainer.max_epochs", "15", "--trainer.batch_size", "16")


@pytest.fixture(scope="session")
def eegmat() -> Path:
    """The folder of EEGMAT; tests that ask for it are skipped where it is not."""
    root = Path(os.environ.get("ATTN_DATA", "data")) / "eeg" / "eegmat_128hz"
    if not root.is_dir():
        pytest.skip("EEGMAT is not under ATTN_DATA")
    return root


@pytest.fixture
def write_edf() -> Callable[..., Path]:
    """Write microvolts (C, T) as an EDF file."""

    def write(path: Path, data: np.ndarray, names: list[str], rate: float = 128.0) -> Path:
        import edfio

        signals = [
            edfio.EdfSignal(row.astype(np.float64), sampling_frequency=rate, label=name, physical_dimension="uV")
            for row, name in zip(data, names)
        ]
        edfio.Edf(signals).write(path)
        return path

    return write
