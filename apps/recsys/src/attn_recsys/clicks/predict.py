"""Probabilities for users' tables: the table in, the table with a column more out."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from attn_recsys.clicks.data import ClicksSet
from attn_recsys.clicks.metrics import sigmoid
from attn_recsys.clicks.readers import read_rows
from attn_shared.errors import UserError
from attn_shared.runs import write_atomically

if TYPE_CHECKING:
    from attn_recsys.clicks.task import ClicksTask

COLUMN = "p_click"


def predict_files(task: ClicksTask, inputs: Sequence[Path], output: Path) -> list[Path]:
    """`<stem>_clicks.csv` for each table: its own columns as they are and `p_click`.

    Raises:
        UserError: a table that cannot be read or lacks a column; the ones before it have been written.
    """
    stems = [path.stem for path in inputs]
    for stem in stems:
        if stems.count(stem) > 1:
            raise UserError(f"two inputs are called {stem!r} and would write the same file; rename one")
    written = []
    for path in inputs:
        table, frame = read_rows(path, task.data_state, task.config.data_args)
        if COLUMN in frame:
            raise UserError(f"{path.name} has a column {COLUMN!r} already; rename it")
        encoded = task.encoder.encode(table)
        none = np.zeros(table.rows)
        rows = ClicksSet(
            encoded,
            np.arange(table.rows),
            label=none,
            user=none.astype(np.int64),
            activity=none.astype(np.int64),
            item=table.item,
        )
        frame[COLUMN] = sigmoid(log_odds(task, rows))
        target = output / f"{path.stem}_clicks.csv"
        write_atomically(target, frame.to_csv(index=False, float_format="%.6g"))
        written.append(target)
        for name, share in task.encoder.unknown(encoded).items():
            if share:
                print(
                    f"{path.name}: {share:.1%} of the rows have a name of {name} that training did not have",
                    file=sys.stderr,
                )
    return written


@torch.no_grad()
def log_odds(task: ClicksTask, rows: ClicksSet) -> np.ndarray:
    """(N,) float64."""
    task.eval()
    device = next(task.network.parameters()).device
    size = task.config.trainer.eval_batch_size
    found = []
    for first in range(0, len(rows), size):
        batch = rows.__getitems__(range(first, min(first + size, len(rows))))
        found.append(task.forward_batch({name: value.to(device) for name, value in batch.items()}).double().cpu())
    return torch.cat(found).numpy()
