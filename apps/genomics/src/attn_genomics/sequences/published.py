"""Figures of papers under the protocol of GUE: chosen on dev, MCC on test."""

from __future__ import annotations

from typing import Any

_FIGURE = "DNABERT-2 (Zhou et al., ICLR 2024), figure of the official repository"
_DNABERT2 = {
    "gue_tf_0": 72.0,
    "gue_tf_1": 76.1,
    "gue_tf_2": 66.5,
    "gue_tf_3": 58.5,
    "gue_tf_4": 77.4,
    "gue_mouse_0": 56.8,
    "gue_mouse_2": 79.3,
    "gue_mouse_3": 66.5,
    "gue_mouse_4": 52.7,
    "gue_prom_core_all": 69.4,
    "gue_prom_core_notata": 68.0,
    "gue_prom_core_tata": 74.2,
    "gue_prom_300_tata": 71.6,
}
_BEST = {
    "gue_tf_4": 77.4,
    "gue_mouse_0": 64.2,
    "gue_mouse_2": 81.3,
    "gue_mouse_3": 73.5,
    "gue_prom_core_tata": 78.2,
    "gue_prom_300_tata": 79.4,
}
"""Of all models in that figure, DNABERT-2 and Nucleotide Transformer among them."""


def published(data: str) -> list[dict[str, Any]]:
    """Rows for the table of a data set; none where no paper has one."""
    rows = [
        {"model": name, "source": _FIGURE, "mcc": round(table[data] / 100, 4)}
        for name, table in (("DNABERT-2", _DNABERT2), ("best of its comparison", _BEST))
        if data in table
    ]
    return rows if len(rows) < 2 or rows[0]["mcc"] != rows[1]["mcc"] else rows[:1]
