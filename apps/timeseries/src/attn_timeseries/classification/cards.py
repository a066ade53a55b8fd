"""The data sets of classification and the options all of them share. Imports neither torch nor numpy."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from attn_shared.app import DataCard, DataFile, Kind
from attn_shared.config import OptimConfig, TrainerConfig

NAME = "classify"


@dataclass(kw_only=True)
class ClassifyDataConfig:
    """How labelled series are read and split.

    Attributes:
        test: file of the test series; None = the `_TEST.ts` beside a `_TRAIN.ts`, else a share of the one file.
        val_fraction: share of the training series, of every class, held out to choose the epoch; 0 = none. The test
            series choose nothing.
        test_fraction: share of the series, of every class, for the test, where there is one file and it names no
            splits.
        max_len: steps a model sees; longer series keep their first ones. None = the longest training series.
        scale: "standard" = subtract each channel's mean over the training series and divide by its deviation; "none".
        columns: channels of a CSV, in order; None = every column of numbers.
        id_column: the column of a CSV that names the series; None = found by its name.
        time_column: the column of a CSV that orders the rows of a series; None = found by its name, else their order.
        label_column: the column of a CSV that names the class; None = found by its name.
        split_column: the column of a CSV that says train, val or test; None = found by its name, if there is one.
        delimiter: "," ";" "tab" or "|" of a CSV; None = found.
    """

    test: str | None = None
    val_fraction: float = 0.2
    test_fraction: float = 0.25
    max_len: int | None = None
    scale: Literal["standard", "none"] = "standard"
    columns: list[str] | None = None
    id_column: str | None = None
    time_column: str | None = None
    label_column: str | None = None
    split_column: str | None = None
    delimiter: str | None = None

    def __post_init__(self) -> None:
        for name in ("val_fraction", "test_fraction"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 0 and below 1, got {getattr(self, name):g}")
        if self.max_len is not None and self.max_len < 1:
            raise ValueError(f"max_len must be at least 1 step, got {self.max_len}")


@dataclass(kw_only=True)
class ClassifyTaskConfig:
    """How an encoder of tokens becomes a classifier of series.

    Attributes:
        positions: "learnable" = a vector a step, trained, as the published scripts have it; "fixed" = sines.
        padding: what attention sees behind the end of a series that is shorter than the longest. "mask" = nothing.
            "official" = tokens of zeros with positions, as in the official code, which hides them only from the output
            layer: a mechanism then mixes them into the series, so the outcome depends on how far series were padded.
        readout: what the output layer reads: "flatten" = the tokens of all steps side by side, as in the official code;
            "mean" = their mean over the steps that are there.
        label_smoothing: share of the target spread over all classes.
        noise: standard deviation of normal noise added to the scaled training series, anew each time; 0 = none.
    """

    positions: Literal["learnable", "fixed"] = "learnable"
    padding: Literal["mask", "official"] = "mask"
    readout: Literal["flatten", "mean"] = "flatten"
    label_smoothing: float = 0.0
    noise: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.label_smoothing < 1:
            raise ValueError(f"label_smoothing must be at least 0 and below 1, got {self.label_smoothing:g}")
        if not 0 <= self.noise < float("inf"):
            raise ValueError(f"noise must be 0 or more, got {self.noise:g}")


FILE_FORMATS = (
    "Labelled series to classify: a .ts file of the UEA archive, a pair NAME_TRAIN.ts and NAME_TEST.ts or the folder "
    "that holds it, or a CSV with one row a step: a column that names the series (id), one that names its class "
    "(label or class), columns of numbers, and where wanted a time and a split (train, val, test)."
)
FILE_SUFFIXES = (".ts",)
ID_NAMES = ("id", "case", "case_id", "series", "series_id", "sample", "sample_id", "unique_id")
LABEL_NAMES = ("label", "class", "class_label", "classlabel")
TIME_NAMES = ("time", "t", "step", "timestamp", "date", "datetime", "index", "timepoint")
SPLIT_NAMES = ("split", "fold", "part", "subset")


def is_labelled(path: Path) -> bool:
    """Whether a file of the user's own, or a folder, holds labelled series, by its name and the header of a CSV."""
    if path.suffix.lower() in FILE_SUFFIXES:
        return True
    if path.is_dir():
        return any(file.suffix.lower() in FILE_SUFFIXES for file in path.iterdir())
    if path.suffix.lower() not in (".csv", ".tsv", ".txt") or not path.is_file():
        return False
    with path.open(encoding="utf-8-sig", errors="replace") as file:
        head = file.readline(10_000)
    names = {name.strip().strip('"').lower() for mark in ",;\t|" for name in head.split(mark)}
    return not names.isdisjoint(ID_NAMES) and not names.isdisjoint(LABEL_NAMES)


_UEA = "A. Bagnall et al., The UEA multivariate time series classification archive, 2018"
_SPLIT = "the archive's train and test files; a part of every class of the training file is held out for validation"


def _uea(
    folder: str, *, name: str, title: str, task: str, size: str, citation: str, facts: dict[str, str], files: object
) -> DataCard:
    base = "https://raw.githubusercontent.com/aeon-toolkit/aeon/a101ddc/aeon/datasets/data"
    return DataCard(
        name=name,
        title=title,
        task=task,
        licence="none stated for the data (the repository is BSD-3-Clause)",
        source="github.com/aeon-toolkit/aeon, aeon/datasets/data; UEA archive, timeseriesclassification.com",
        size=size,
        split=_SPLIT,
        citation=f"{citation}; {_UEA}",
        subdir="timeseries/uea",
        files=tuple(
            DataFile(
                path=f"{folder}/{folder}_{part}.ts",
                sha256=digest,
                bytes=count,
                url=f"{base}/{folder}/{folder}_{part}.ts",
            )
            for part, digest, count in files  # type: ignore[attr-defined]
        ),
        manual=f"take the two .ts files of {folder} from github.com/aeon-toolkit/aeon (aeon/datasets/data)",
        facts=facts,
        kind=NAME,
    )


DATASETS: dict[str, DataCard] = {
    card.name: card
    for card in (
        _uea(
            "JapaneseVowels",
            name="japanese_vowels",
            title="Japanese vowels: which of nine men is speaking",
            task="classification, 9 classes",
            size="270 + 370 series of 7 to 29 steps x 12, 1.1 MB",
            citation="M. Kudo, J. Toyama, M. Shimbo, Multidimensional curve classification using passing-through "
            "regions, Pattern Recognition Letters 20, 1999",
            facts={"channels": "12 cepstrum coefficients", "lengths": "7 to 29 steps", "missing": "none"},
            files=(
                ("TRAIN", "68a430eabd919cc77f40b1f5f3bc0dcafacc1486bca9260785aeb7d262cc78cd", 487971),
                ("TEST", "b3d41d6a0ca3bcad3afb9ca7d4365382aa51341e2e58bae2a574babdda5b9462", 649132),
            ),
        ),
        _uea(
            "BasicMotions",
            name="basic_motions",
            title="Basic motions: four activities, told by a watch",
            task="classification, 4 classes",
            size="40 + 40 series of 100 steps x 6, 0.5 MB",
            citation="a student project named in the files",
            facts={"channels": "accelerometer and gyroscope, three axes each", "step": "0.1 s", "missing": "none"},
            files=(
                ("TRAIN", "8dc43cc6306cb679c888c01e26f91772ac4441a916da43bac8b79734a538b9d6", 227790),
                ("TEST", "79213102bc6fca1a398ad98ce1185dff0208fa3d1465e687f48288946b0ff8dc", 227713),
            ),
        ),
    )
}


def trainer_defaults() -> TrainerConfig:
    """Small sets, many passes."""
    return TrainerConfig(max_epochs=60, batch_size=16, patience=None)


def optim_defaults() -> OptimConfig:
    return OptimConfig(lr=0.001, schedule="cosine")


KIND = Kind(
    name=NAME,
    title="classify whole series",
    task="attn_timeseries.classification.task:ClassifyTask",
    data_config=ClassifyDataConfig,
    task_config=ClassifyTaskConfig,
    default_model="flowformer",
    default_data="japanese_vowels",
    trainer_defaults=trainer_defaults,
    optim_defaults=optim_defaults,
)
