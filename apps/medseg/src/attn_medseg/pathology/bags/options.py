"""The options of classifying bags of instances. Imports neither torch nor numpy."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(kw_only=True)
class BagsDataConfig:
    """How bags are read, standardised and split.

    Attributes:
        label: column of the label in a table; empty = label.
        patient: column of the patient, whose bags splits keep together; empty = case_id, patient or patient_id where
            there is one, else each bag is a patient of its own.
        features: folder of the feature files; empty = the folder of the table.
        normalise: "zscore" = features by mean and deviation over the training instances, each bag weighing alike;
            "none"; "auto" = zscore of tables, none of feature files, as is usual for encoded slides.
        instances: of a bag at most so many in training, drawn anew each epoch; 0 = all. Evaluation reads all.
        split: "random" = patients drawn, each class alike; "given" = the data's own parts; "auto" = given where there
            are any, else drawn, or folds where `folds` is given.
        folds: patients are dealt out to so many parts, each class alike, and `fold` is the test part; 0 = no folds.
        fold: of `folds`; None = the run's seed modulo folds, so that `--seeds 10` goes through ten, and the next ten
            seeds deal anew.
        val: share of the training patients held out for validation, which chooses the best epoch; 0 = the last epoch.
        test: share of the patients held out for test; 1 = everything, such as to evaluate a folder.
        shuffle: seed of what is drawn once: splits and folds.
    """

    label: str = ""
    patient: str = ""
    features: str = ""
    normalise: Literal["auto", "zscore", "none"] = "auto"
    instances: int = 0
    split: Literal["auto", "random", "given"] = "auto"
    folds: int = 0
    fold: int | None = None
    val: float = 0.15
    test: float = 0.2
    shuffle: int = 0


@dataclass(kw_only=True)
class BagsTaskConfig:
    """How bags are scored.

    Attributes:
        class_weights: the loss counts all classes the same however rare they are.
        bootstrap: resamples of patients for 95 % intervals; 0 = none.
    """

    class_weights: bool = False
    bootstrap: int = 1000


@dataclass(kw_only=True)
class BagsPredictOptions:
    """What is written for bags.

    Attributes:
        attention: a table for each bag, with the attention on each of its instances.
    """

    attention: bool = True
