"""Records as they were read: stays of patients, each with observations at its own times, notes and labels."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from attn_shared.errors import UserError
from attn_timeseries.records.cards import DATASETS, RecordsDataConfig


@dataclass(kw_only=True)
class Stay:
    """One record to classify.

    Attributes:
        name: unique in its corpus.
        patient: who it is of; a patient's stays stay together when the data is split.
        hours: (N,) times with an observation, ascending, from the stay's start.
        values: (N, V), NaN where a variable was not observed.
        note_hours: (M,) times of notes, ascending.
        notes: (M,) texts, or (M, E) embeddings.
        label: (K,) 0, 1, or NaN where it is not known.
        split: "train", "val", "test", or "" where the data does not say.
    """

    name: str
    patient: str
    hours: np.ndarray
    values: np.ndarray
    note_hours: np.ndarray
    notes: np.ndarray
    label: np.ndarray
    split: str = ""


@dataclass(kw_only=True)
class Corpus:
    """All stays of a file, folder or data set.

    Attributes:
        source: its name, as messages give it.
        variables: V names; a category of a variable is "variable=category".
        categorical: variables whose values are categories.
        labels: K names; empty where there are none.
        stays: in the order of the data.
        embedding: E where notes are embeddings, 0 where they are text.
        found: what was found and left out, for the report.
    """

    source: str
    variables: list[str]
    categorical: list[str] = field(default_factory=list)
    labels: list[str]
    stays: list[Stay]
    embedding: int = 0
    found: list[str] = field(default_factory=list)

    def aligned(self, variables: Sequence[str]) -> np.ndarray:
        """For each of `variables`, its column here, or -1."""
        place = {name: i for i, name in enumerate(self.variables)}
        return np.array([place.get(name, -1) for name in variables], dtype=np.int64)


def load_corpus(
    data: str,
    args: RecordsDataConfig,
    *,
    categorical: Collection[str] = (),
    numeric: Collection[str] = (),
    labelled: bool = True,
) -> Corpus:
    """The records of a data set, a folder or a file.

    Args:
        categorical: variables known to be categories.
        numeric: variables known to be numbers.
        labelled: labels must be there.

    Raises:
        UserError: in one sentence, what is wrong and where.
    """
    if data in DATASETS:
        from attn_timeseries.records.synthetic import make

        return make(args)
    path = Path(data).expanduser()
    if not path.exists():
        raise UserError(f"there is no file {data}")
    if path.is_dir():
        from attn_timeseries.records.benchmark import read_folder

        return read_folder(path, args, labelled=labelled)
    from attn_timeseries.records.tables import read_tables

    return read_tables(path, args, categorical=categorical, numeric=numeric, labelled=labelled)


def assemble(
    names: Sequence[str], stay: np.ndarray, hours: np.ndarray, variable: np.ndarray, value: np.ndarray, count: int
) -> list[tuple[np.ndarray, np.ndarray]]:
    """Observations in any order as (hours, values) of each stay. Of one variable at one time the last counts.

    Args:
        names: of the stays.
        stay, hours, variable, value: (R,) number of the stay, time, number of the variable, and value of each.
        count: V.
    """
    order = np.lexsort((np.arange(len(stay)), hours, stay))
    stay, hours, variable, value = stay[order], hours[order], variable[order], value[order]
    new = np.ones(len(stay), dtype=bool)
    new[1:] = (stay[1:] != stay[:-1]) | (hours[1:] != hours[:-1])
    row = np.cumsum(new) - 1
    values = np.full((int(new.sum()), count), np.nan, dtype=np.float32)
    values[row, variable] = value
    times, owner = hours[new], stay[new]
    cuts = np.searchsorted(owner, np.arange(len(names) + 1))
    return [(times[a:b], values[a:b]) for a, b in pairwise(cuts)]


def check_file(path: Path, args: RecordsDataConfig | None = None) -> list[str]:
    """What is wrong with a file or folder of records, one sentence each; empty when nothing is."""
    from attn_timeseries.records.data import prepare

    args = args or RecordsDataConfig()
    try:
        prepare(args, load_corpus(str(path), args))
    except UserError as error:
        return [str(error)]
    return []


def unique_names(kind: str, names: Sequence[str], where: Callable[[int], str]) -> dict[str, int]:
    """Name -> place. Raises UserError for a name that comes twice."""
    place: dict[str, int] = {}
    for i, name in enumerate(names):
        if name in place:
            raise UserError(f"{where(i)}: the {kind} {name!r} comes a second time")
        place[name] = i
    return place


def no_notes(embedding: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Times and notes of a stay without notes."""
    empty: Any = np.zeros((0, embedding), np.float32) if embedding else np.zeros(0, dtype=object)
    return np.zeros(0), empty
