"""Published figures of RBTransformer, all of a protocol that leaks.

Source: "A Brain Wave Encodes a Thousand Tokens" (S19), results tables and the official repository: accuracy, mean over
five random folds of overlapping windows of all subjects together, last epoch. Windows of one trial, 77 % of whose
samples are shared, lie in training and test, so these figures say nothing about a new subject or a new trial.
"""

from __future__ import annotations

from typing import Any

PROTOCOL = "random 5-fold over overlapping windows: leaks"

# (data set, label) -> number of classes -> accuracy.
_ACCURACY: dict[tuple[str, str], dict[int, float]] = {
    ("deap", "valence"): {2: 0.9984, 9: 0.9987},
    ("deap", "arousal"): {2: 0.9983, 9: 0.9984},
    ("deap", "dominance"): {2: 0.9982, 9: 0.9987},
    ("dreamer", "valence"): {2: 0.9961, 5: 0.9954},
    ("dreamer", "arousal"): {2: 0.9974, 5: 0.9955},
    ("dreamer", "dominance"): {2: 0.9979, 5: 0.9960},
    ("seed", "emotion"): {3: 0.9951},
}


def published(data: str, label: str, classes: int, split: str) -> list[dict[str, Any]]:
    """Rows for the table beside a model: `model`, `source`, `accuracy`.

    Args:
        data: name of the data set.
        label: which of its labels is predicted.
        classes: how many classes there are.
        split: of the run; only "random" is what the figures were made with, so that others get no row.
    """
    accuracy = _ACCURACY.get((data, label), {}).get(classes)
    if accuracy is None or split != "random":
        return []
    return [{"model": "rbtransformer", "source": f"S19, {PROTOCOL}", "accuracy": accuracy}]
