"""Published figures stand only beside runs of their own, leaking, protocol."""

from __future__ import annotations

import pytest

from attn_eeg.published import published


@pytest.mark.parametrize(
    ("data", "label", "classes", "accuracy"),
    [("deap", "valence", 2, 0.9984), ("deap", "dominance", 9, 0.9987), ("dreamer", "arousal", 5, 0.9955)],
)
def test_figures_are_marked_as_leaking(data, label, classes, accuracy):
    (row,) = published(data, label, classes, "random")
    assert row["accuracy"] == accuracy
    assert "leaks" in row["source"]


def test_no_figure_where_the_protocol_or_the_task_is_another():
    assert published("deap", "valence", 2, "subject") == []
    assert published("deap", "valence", 5, "random") == []
    assert published("eegmat", "task", 2, "random") == []
