from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

TOY = Path(__file__).parent / "toy"


class Toy:
    """The toy application, in this process or in one of its own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @property
    def app(self) -> Any:
        from toyapp.app import APP

        return APP

    def main(self, *argv: Any) -> int:
        from toyapp.app import main

        return main([str(word) for word in argv])

    def config(self, *argv: Any) -> Any:
        from attn_shared import options

        return options.resolve(self.app, options.split([str(word) for word in (*argv, "--runs", self.folder / "runs")]))

    def train(self, *argv: Any, resume: Path | None = None) -> Path:
        """Train in this process; the run folder."""
        from attn_shared import trainer

        config = self.config(*argv) if resume is None else trainer.resume_config(self.app, resume)
        return trainer.train(self.app, config, resume=resume)

    def process(self, *argv: Any, launcher: tuple[str, ...] = (), **env: str) -> subprocess.CompletedProcess[str]:
        """`python -m toyapp …` in the test's folder."""
        path = os.pathsep.join([str(TOY), *filter(None, [os.environ.get("PYTHONPATH")])])
        return subprocess.run(
            [sys.executable, *launcher, "-m", "toyapp", *map(str, argv)],
            cwd=self.folder,
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path, **env},
            capture_output=True,
            encoding="utf-8",
            timeout=120,
        )


@pytest.fixture
def toy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Toy:
    monkeypatch.syspath_prepend(str(TOY))
    monkeypatch.chdir(tmp_path)
    return Toy(tmp_path)


@pytest.fixture(scope="session")
def toy_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of the toy application; tests copy what they change."""
    folder = tmp_path_factory.mktemp("toy")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(TOY))
        return Toy(folder).train("--data_args.samples", 150)
