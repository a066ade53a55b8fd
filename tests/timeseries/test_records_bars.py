"""What missingness is worth: UTDE against the same network that cannot see it."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from attn_shared import options, trainer
from attn_shared.options import Parsed
from attn_timeseries.cli import APP

SEEDS = (0, 1)


def auroc(folder: Path, model: str, missingness: str, seed: int) -> float:
    given = {
        "model": model,
        "data": "synthetic_records",
        "data_args.missingness": missingness,
        "data_args.test_fraction": "0.4",
        "task_args.bootstrap": "0",
        "trainer.progress": "false",
        "seed": str(seed),
        "runs": str(folder),
    }
    run = trainer.train(APP, options.resolve(APP, Parsed(options=list(given.items()))))
    return float(json.loads((run / "metrics.json").read_text(encoding="utf-8"))["splits"]["test"]["auroc"])


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_missingness_helps_where_it_tells_something_and_not_where_it_does_not(tmp_path: Path) -> None:
    gain = {}
    for kind in ("signal", "random"):
        pairs = [[auroc(tmp_path, model, kind, seed) for model in ("utde", "utde_blind")] for seed in SEEDS]
        gain[kind] = np.mean([seen - blind for seen, blind in pairs])
    assert gain["signal"] >= 0.03, gain
    assert abs(gain["random"]) <= 0.02, gain
