"""Probabilities for users' records: the formats of training in, a CSV of probabilities out."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from attn_shared.errors import UserError
from attn_timeseries.predict import write_atomically
from attn_timeseries.records.corpus import Corpus, load_corpus
from attn_timeseries.records.data import RecordSet, check_fit

if TYPE_CHECKING:
    from attn_timeseries.records.task import RecordsTask


def predict_files(task: RecordsTask, inputs: Sequence[Path], output: Path, options: Mapping[str, Any]) -> list[Path]:
    """Classify the stays of each input, a long table or a folder of the benchmark; labels are not needed.

    Writes `<stem>_predictions.csv`: `id`, and for each label its probability in `p_<label>`.

    Raises:
        UserError: names the file; what was written before stays, and is whole.
    """
    notes = options.get("notes")
    if notes and len(inputs) > 1:
        raise UserError("--notes names the notes of one file; give one input, or put the notes beside each of them")
    stems = [path.name if path.is_dir() else path.stem for path in inputs]
    for stem in stems:
        if stems.count(stem) > 1:
            raise UserError(f"two inputs are called {stem!r} and would write the same predictions; rename one")
    try:
        output.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        raise UserError(f"{output} is a file; name a folder with --output") from None
    written = []
    for path, stem in zip(inputs, stems):
        frame = predict(task, path, notes)
        target = output / f"{stem}_predictions.csv"
        write_atomically(target, partial(_write, frame))
        written.append(target)
    return written


def _write(frame: pd.DataFrame, file: Path) -> None:
    frame.to_csv(file, index=False, float_format="%.6f", lineterminator="\n")


def predict(task: RecordsTask, path: Path, notes: str | None = None) -> pd.DataFrame:
    """Columns `id` and `p_<label>`, a row a stay in the order of the file."""
    from attn_timeseries.records.task import known_variables, say

    args = dataclasses.replace(task.config.data_args, labels=None, notes=notes, label_columns=None)
    if path.name not in ("synthetic_records",) and not path.exists():
        raise UserError(f"there is no file {path}")
    corpus = unlabelled(load_corpus(str(path), args, labelled=False, **known_variables(task.data_state)))
    check_fit(corpus, task.data_state)
    strange = [name for name in corpus.variables if name not in task.data_state["variables"]]
    if strange:
        corpus.found.append(f"the model does not know {', '.join(map(repr, strange[:5]))}, which is ignored")
    say(corpus.found, path.name)
    held = RecordSet(corpus.stays, corpus.aligned(task.data_state["variables"]), task.data_state)
    probability = task.predictions(held).probability
    columns = {f"p_{label}": probability[:, k] for k, label in enumerate(task.data_state["labels"])}
    return pd.DataFrame({"id": held.names, **columns})


def unlabelled(corpus: Corpus) -> Corpus:
    """Without labels, which prediction does not look at."""
    stays = [dataclasses.replace(stay, label=stay.label[:0]) for stay in corpus.stays]
    return dataclasses.replace(corpus, labels=[], stays=stays)
