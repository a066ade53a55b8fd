"""Scores against scikit-learn, and against how batches and processes cut the windows."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from sklearn import metrics as sk

from attn_eeg import metrics


def sample(classes: int, count: int = 200, seed: int = 0) -> tuple[torch.Tensor, ...]:
    draw = np.random.default_rng(seed)
    truth = draw.integers(classes, size=count)
    logits = draw.normal(size=(count, classes)).round(1) + np.eye(classes)[truth]
    probability = torch.from_numpy(logits).softmax(dim=-1)
    subject = torch.from_numpy(draw.integers(5, size=count))
    return torch.arange(count), torch.from_numpy(truth), subject, probability


@pytest.mark.parametrize("classes", [2, 3, 5])
def test_equal_to_scikit_learn(classes: int) -> None:
    index, truth, subject, probability = sample(classes)
    found = metrics.unpack(metrics.pack(index, truth, subject, probability))
    assert found is not None
    figures, y, said = metrics.figures(found), truth.numpy(), probability.argmax(dim=1).numpy()
    assert figures["accuracy"] == pytest.approx(sk.accuracy_score(y, said))
    assert figures["balanced_accuracy"] == pytest.approx(sk.balanced_accuracy_score(y, said))
    assert figures["macro_f1"] == pytest.approx(sk.f1_score(y, said, average="macro"))
    assert figures["kappa"] == pytest.approx(sk.cohen_kappa_score(y, said))
    score = probability[:, 1] if classes == 2 else probability
    assert figures["auroc"] == pytest.approx(sk.roc_auc_score(y, score.numpy(), multi_class="ovr"))
    own = [sk.accuracy_score(y[subject == s], said[subject == s]) for s in range(5)]
    assert figures["subject_accuracy"] == pytest.approx(np.mean(own))
    assert figures["subject_sd"] == pytest.approx(np.std(own, ddof=1))
    assert (found.confusion() == sk.confusion_matrix(y, said)).all()
    assert set(figures) == set(metrics.FORMAT)


def test_neither_batches_nor_their_order_change_a_figure() -> None:
    parts = sample(3)
    whole = metrics.figures(metrics.unpack(metrics.pack(*parts)))  # type: ignore[arg-type]
    entries = {}
    for first in (150, 0, 50, 100):
        entries |= metrics.pack(*(part[first : first + 50] for part in parts))
    assert len(entries) == 4
    assert metrics.figures(metrics.unpack(entries)) == whole  # type: ignore[arg-type]


def test_one_class_one_subject_and_nothing() -> None:
    found = metrics.Predictions(np.arange(4), np.zeros(4, int), np.zeros(4, int), np.tile([0.9, 0.1], (4, 1)))
    figures = metrics.figures(found)
    assert figures["accuracy"] == figures["macro_f1"] == figures["balanced_accuracy"] == 1.0
    assert math.isnan(figures["auroc"])
    assert math.isnan(figures["kappa"])
    assert math.isnan(figures["subject_sd"])
    assert metrics.unpack({}) is None
