"""The options of survival. Imports neither torch nor numpy."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(kw_only=True)
class SurvivalDataConfig:
    """How patients are read and split, and time is cut.

    Attributes:
        features: folder of the slides' feature files; empty = the folder of the table.
        slides: patients without feature files are left out, for every model; false = genes alone.
        signatures: CSV whose columns are groups of genes; empty = signatures.csv beside the table, else genes are
            grouped by the kind of measurement (_mut, _cnv, _rnaseq).
        intervals: of time, with as many events of training patients in each.
        instances: patches of a patient at most in training, drawn anew each epoch; 0 = all. Evaluation reads all.
        splits: CSV of case_ids in columns train and val (and test), as MCAT's; what it calls val is then the test part
            where it has no test.
        folds: patients are dealt out to so many parts, with as many events in each; `fold` is the test part; 0 = none.
        fold: of `folds`; None = the run's seed modulo folds.
        val: share of the training patients held out for validation, which chooses the best epoch; 0 = the last epoch.
        test: share of the patients held out for test; 1 = everything.
        shuffle: seed of what is drawn once: splits and folds.
    """

    features: str = ""
    slides: bool = True
    signatures: str = ""
    intervals: int = 4
    instances: int = 4096
    splits: str = ""
    folds: int = 0
    fold: int | None = None
    val: float = 0.15
    test: float = 0.2
    shuffle: int = 0


@dataclass(kw_only=True)
class SurvivalTaskConfig:
    """How survival is learnt and scored.

    Attributes:
        alpha: how much less censored patients weigh in the loss; 0 in the official commands, 0.4 in the official
            function's signature.
        bootstrap: resamples of patients for 95 % intervals; 0 = none.
    """

    alpha: float = 0.0
    bootstrap: int = 1000


@dataclass(kw_only=True)
class SurvivalPredictOptions:
    """What is written for patients.

    Attributes:
        features: folder of the slides' feature files; empty = the folder of the table.
        attention: a table for each patient, with the share of each patch in what each group of genes reads.
    """

    features: str = ""
    attention: bool = True
