"""The data sets of records, the options they share, and those of their task. Imports neither torch nor numpy."""

from __future__ import annotations

import csv
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from attn_shared.app import DataCard, Kind
from attn_shared.config import OptimConfig, TrainerConfig

NAME = "records"
HEADERS = {
    "id": ("id", "stay", "stay_id", "icustay_id", "record", "record_id", "episode"),
    "patient": ("patient", "patient_id", "subject", "subject_id"),
    "time": ("time", "hours", "hour", "charttime", "timestamp", "datetime", "date"),
    "variable": ("variable", "parameter", "item", "name", "itemid", "measurement"),
    "value": ("value", "valuenum", "result"),
    "text": ("text", "note"),
}
"""Column names that are found without being named, lower case."""


@dataclass(kw_only=True)
class RecordsDataConfig:
    """How records are read, split and put on a grid.

    Attributes:
        hours: length of the period looked at, from each stay's start; later observations and notes are not seen.
        steps: steps of the regular grid over that period.
        max_points: most time points of a stay that are kept, the last ones.
        max_notes: most notes of a stay that are kept, the last ones; 0 = no notes.
        text_features: numbers that words of a note are hashed into.
        labels: file of labels beside a long table; None = `<name>_labels.csv`.
        notes: file of notes beside a long table; None = `<name>_notes.csv` if there is one.
        label_columns: columns of labels; None = every other column of the file of labels.
        id_column: the column that names a stay; None = found by its name, as the next five.
        patient_column: in the file of labels, the column that names a patient; without one, each stay is a patient.
        time_column: hours since the stay's start, or dates.
        variable_column: what was measured.
        value_column: the value: a number, or a category of few.
        text_column: the text of a note.
        val_fraction: share of the patients for validation, where the data has no split of its own.
        test_fraction: share of the patients for testing, where the data has no split of its own.
        split_seed: draws that split, apart from the run's seed.
        clip: scaled values beyond this many deviations are set to it.
        missingness: of synthetic_records: "signal" = how often a stay is measured tells of its label; "random" = the
            same patterns of measuring, dealt out by chance.
        stays: of synthetic_records: how many stays are made.
        synthetic_seed: of synthetic_records: draws the data.
    """

    hours: float = 48.0
    steps: int = 48
    max_points: int = 400
    max_notes: int = 5
    text_features: int = 128
    labels: str | None = None
    notes: str | None = None
    label_columns: list[str] | None = None
    id_column: str | None = None
    patient_column: str | None = None
    time_column: str | None = None
    variable_column: str | None = None
    value_column: str | None = None
    text_column: str | None = None
    val_fraction: float = 0.15
    test_fraction: float = 0.15
    split_seed: int = 0
    clip: float = 10.0
    missingness: Literal["signal", "random"] = "signal"
    stays: int = 3000
    synthetic_seed: int = 0

    def __post_init__(self) -> None:
        for name, least in (("steps", 1), ("max_points", 1), ("max_notes", 0), ("text_features", 1), ("stays", 50)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}, got {getattr(self, name)}")
        for name in ("hours", "clip"):
            if not 0 < getattr(self, name) < float("inf"):
                raise ValueError(f"{name} must be a positive number, got {getattr(self, name)}")
        shares = (self.val_fraction, self.test_fraction)
        if not (min(shares) >= 0 and sum(shares) < 1):
            raise ValueError(f"val_fraction and test_fraction must be 0 or more and together below 1, got {shares}")


@dataclass(kw_only=True)
class RecordsTaskConfig:
    """The task.

    Attributes:
        class_weight: "balanced" = the rarer side of each label weighs as much as the other in the loss; probabilities
            are then no longer calibrated.
        bootstrap: resamplings of the test patients for the 95 % interval of AUROC and AUPRC; 0 = none.
    """

    class_weight: Literal["none", "balanced"] = "none"
    bootstrap: int = 500

    def __post_init__(self) -> None:
        if self.bootstrap < 0:
            raise ValueError(f"bootstrap must be 0 or more, got {self.bootstrap}")


@dataclass(kw_only=True)
class RecordsPredictConfig:
    """Options of prediction from records.

    Attributes:
        notes: file of notes for a long table; None = `<name>_notes.csv` beside it, if there is one.
    """

    notes: str | None = None


def trainer_defaults() -> TrainerConfig:
    return TrainerConfig(max_epochs=12, batch_size=64, patience=3, gradient_clip=1.0)


def optim_defaults() -> OptimConfig:
    return OptimConfig(name="adam", lr=1e-3, schedule="cosine", warmup=30)


FILE_FORMATS = (
    "Records: a long CSV with columns id, time (hours or dates), variable and value, beside it NAME_labels.csv (id, a "
    "column of 0 and 1 a label; if known, patient and split) and, if there are any, NAME_notes.csv (id, time, and text "
    "or columns of numbers, an embedding); or a folder of the MIMIC-III benchmark: listfile.csv and *_timeseries.csv, "
    "with notes as JSON files in a folder `notes`."
)

DATASETS: dict[str, DataCard] = {
    card.name: card
    for card in (
        DataCard(
            name="synthetic_records",
            title="Synthetic intensive care stays: eight variables at uneven times, and notes",
            task="binary classification of stays; where data_args.missingness is signal, how often a stay is measured "
            "tells of its label",
            licence="generated by this application",
            source="attn_timeseries.records.synthetic",
            size="3,000 stays of 2,400 patients, 48 hours each",
            split="by patient, drawn with data_args.split_seed: 70 % training, 15 % validation, 15 % test",
            citation="none; made for testing models of irregular records",
            synthetic=True,
            kind=NAME,
            facts={"labels": "one; about a third of the stays are positive"},
        ),
    )
}


KIND = Kind(
    name=NAME,
    title="classify irregular records",
    task="attn_timeseries.records.task:RecordsTask",
    data_config=RecordsDataConfig,
    task_config=RecordsTaskConfig,
    predict_options=RecordsPredictConfig,
    default_model="utde",
    default_data="synthetic_records",
    file_suffixes=("", ".csv", ".tsv", ".txt"),
    trainer_defaults=trainer_defaults,
    optim_defaults=optim_defaults,
)


def is_records(path: str) -> bool:
    """Whether a file or folder of the user's own holds records. Reads one line at most; it need not exist."""
    where = Path(path).expanduser()
    if where.is_dir():
        folders = (where, where / "train", where / "test")
        return any((folder / "listfile.csv").is_file() for folder in folders) or any(where.glob("*_timeseries.csv"))
    try:
        with open(where, encoding="utf-8-sig") as file:
            line = file.readline(10_000)
    except (OSError, UnicodeDecodeError):
        return False
    for delimiter in ",;\t|":
        try:
            names = {name.strip().lower() for name in next(csv.reader([line], delimiter=delimiter), [])}
        except csv.Error:
            continue
        if all(names & set(HEADERS[part]) for part in ("id", "variable", "value")):
            return True
    return False
