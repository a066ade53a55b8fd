"""Classes for users' series: .ts or CSV in; a CSV with the probability of every class out."""

from __future__ import annotations

import csv
import dataclasses
import io
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from attn_shared.errors import UserError
from attn_shared.runs import write_atomically
from attn_timeseries.classification.cards import DATASETS, ClassifyDataConfig
from attn_timeseries.classification.cases import Cases, read_cases, source_files
from attn_timeseries.classification.data import SeriesSet, check_channels

if TYPE_CHECKING:
    from attn_timeseries.classification.task import ClassifyTask


def predict_files(task: ClassifyTask, inputs: Sequence[Path], output: Path, options: Mapping[str, Any]) -> list[Path]:
    """Classify every series of each file.

    Writes `<stem>_classes.csv` for each input: `id` (of a CSV; the number of the case from 1 in a .ts file), a column
    `p_<class>` of each class, the class `predicted`, and where the file names classes, the `true` one. An input may
    also be the name of a data set: its test file is meant.

    Raises:
        UserError: names the file; what was written before stays, and is whole.
    """
    if options:
        raise UserError(f"classification takes no option {sorted(options)[0]!r}")
    args: ClassifyDataConfig = task.config.data_args
    paths = []
    for path in inputs:
        if str(path) in DATASETS:
            path = source_files(str(path), args)[1] or path
        paths.append(path)
    stems = [path.stem for path in paths]
    for stem in stems:
        if stems.count(stem) > 1:
            raise UserError(f"two inputs are called {stem!r} and would write the same file; rename one")
    written = []
    for path in paths:
        cases = read_input(task, path)
        series = SeriesSet(cases, task.data_state, labelled=False)
        long = sum(len(values) > task.shape.length for values in cases.values)
        if long:
            note = f"{long:,} of {len(cases):,} series are longer than the {task.shape.length} steps the model sees"
            print(f"{path.name}: {note} and keep their first ones", file=sys.stderr)
        try:
            probability = torch.cat([p for _, p in task.probabilities(series)]).numpy()
        except ValueError as error:
            raise UserError(f"{path}: {error}") from None
        target = output / f"{path.stem}_classes.csv"
        write_atomically(target, table(cases, series.classes, probability))
        written.append(target)
    return written


def read_input(task: ClassifyTask, path: Path) -> Cases:
    """The series of a file, their channels those of the training series, in their order; classes are not needed."""
    if not path.is_file():
        raise UserError(f"there is no file {path}")
    state, args = task.data_state, task.config.data_args
    if path.suffix.lower() != ".ts":
        # Classes and splits are what a file to classify need not have.
        args = dataclasses.replace(
            args, columns=list(state["channels"]), delimiter=None, label_column=None, split_column=None
        )
    cases = read_cases(path, args)
    check_channels(cases, state)
    return cases


def table(cases: Cases, classes: Sequence[str], probability: np.ndarray) -> str:
    """The CSV of a file: a row a series."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    true = [] if cases.labels is None else ["true"]
    writer.writerow(["id", *(f"p_{name}" for name in classes), "predicted", *true])
    for i, (name, shares) in enumerate(zip(cases.names, probability)):
        own = [] if cases.labels is None else [cases.labels[i]]
        writer.writerow([name, *(f"{p:.6f}" for p in shares), classes[int(shares.argmax())], *own])
    return out.getvalue()
