"""Rows beside every model: knowing nothing of a patient, and Cox's model of the genes."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from attn_medseg.pathology.survival.data import PatientSet
from attn_medseg.pathology.survival.estimates import cox, kaplan_meier
from attn_medseg.pathology.survival.metrics import Scored


def predictions(train: PatientSet, test: PatientSet) -> dict[str, tuple[str, Scored]]:
    """Name of a baseline -> what it is, and what it says of the test patients."""
    ends = np.asarray(train.state["edges"])[1:]
    curve = kaplan_meier(train.time, train.event)(ends)
    count = len(test)
    found = {
        "Kaplan-Meier": (
            "the same curve for everyone, that of the training patients",
            _scored(test, np.zeros(count), np.tile(curve, (count, 1))),
        )
    }
    if train.genes.shape[1]:
        own, other = train.genes.astype(np.float64), test.genes.astype(np.float64)
        model = cox(own, train.time, train.event)
        found["Cox, genes"] = (
            "Cox's model of the genes, penalty chosen on training patients",
            _scored(test, model.risk(other), model.survival(other, ends)),
        )
    return found


def _scored(test: PatientSet, risk: NDArray[np.float64], survival: NDArray[np.float64]) -> Scored:
    count = len(test)
    return Scored(np.arange(count), test.time, test.event, risk, np.full(count, np.nan), survival)
