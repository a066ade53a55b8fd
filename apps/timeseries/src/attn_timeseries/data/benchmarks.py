"""Where training, validation and test begin and end: the papers' borders, and fractions for files of one's own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from attn_shared.errors import UserError
from attn_timeseries.data.cards import ForecastDataConfig

if TYPE_CHECKING:
    from attn_timeseries.data.table import Series

ETTH_BORDERS = (12 * 720, 16 * 720, 20 * 720)


@dataclass(frozen=True)
class Borders:
    """Rows at which a series' parts end: training [0, train), validation [train, val), test [val, test).

    Look-backs of the validation and test windows may reach `seq_len` rows back over their border; targets never do.
    """

    train: int
    val: int
    test: int

    def targets(self, split: str) -> tuple[int, int]:
        """First and last (exclusive) row that may be a target of the split."""
        return {"train": (0, self.train), "val": (self.train, self.val), "test": (self.val, self.test)}[split]

    def starts(self, split: str, seq_len: int, pred_len: int) -> range:
        """First rows of the look-backs of all windows of the split."""
        first, last = self.targets(split)
        return range(max(first - seq_len, 0), max(last - pred_len - seq_len + 1, 0))


def split_rule(config: ForecastDataConfig, data: str) -> str:
    """ "etth", "ratio" or "time"."""
    if config.split == "auto":
        return "etth" if data.lower().startswith("etth") else "ratio"
    return config.split


def borders(rows: int, rule: str, config: ForecastDataConfig) -> Borders:
    """Borders of a series of `rows` rows. Fractions are rounded as the Autoformer release does."""
    if rule == "etth":
        if rows < ETTH_BORDERS[-1]:
            raise UserError(f"split 'etth' needs {ETTH_BORDERS[-1]:,} rows, the series has {rows:,}; use split 'ratio'")
        return Borders(*ETTH_BORDERS)
    train = int(rows * config.train_fraction)
    if rule == "history":  # what a backtest has at an origin: training and validation, and the test lies ahead
        return Borders(train, rows, rows)
    return Borders(train, rows - int(rows * config.test_fraction), rows)


def all_borders(series: Sequence[Series], rule: str, config: ForecastDataConfig) -> list[Borders]:
    """Borders of each series. By rule "time" they lie at the same two times in all: at the fractions of all times."""
    if "time" not in (rule, config.split) or rule == "etth" or len(series) == 1:
        return [borders(len(one.times), rule, config) for one in series]
    stamps = np.unique(np.concatenate([one.times.asi8 for one in series]))
    whole = borders(len(stamps), rule, config)
    # A part without rows begins behind the last time.
    edges = np.append(stamps, stamps[-1] + 1)[[whole.train, whole.val]]
    places = [np.searchsorted(one.times.asi8, edges) for one in series]
    return [Borders(int(train), int(val), len(one.times)) for one, (train, val) in zip(series, places)]
