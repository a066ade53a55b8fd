"""From series to windows: filling without a look ahead, scaling on training rows, and whole batches at a time.

Legend: T rows of all series one below the other, C columns, F calendar features, B windows of a batch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from attn_shared.errors import UserError
from attn_timeseries.data.benchmarks import all_borders
from attn_timeseries.data.calendar import calendar_features
from attn_timeseries.data.cards import ForecastDataConfig
from attn_timeseries.data.covariates import CovariateCoder
from attn_timeseries.data.table import Series

SPLITS = ("train", "val", "test")
COVARIATES = ("past", "past_cat", "known", "known_cat", "static", "static_cat")


def fill_forward(values: np.ndarray) -> np.ndarray:
    """The last observed value of each column carried over its gaps; needs an observed first row."""
    known = ~np.isnan(values)
    last = np.maximum.accumulate(np.where(known, np.arange(len(values))[:, None], 0), axis=0)
    return np.take_along_axis(values, last, axis=0)


def fill_between(values: np.ndarray) -> np.ndarray:
    """Gaps filled by a straight line over time; after the last observed value, that value."""
    filled = values.copy()
    rows = np.arange(len(values))
    for c in np.flatnonzero(np.isnan(values).any(axis=0)):
        known = ~np.isnan(values[:, c])
        filled[:, c] = np.interp(rows, rows[known], values[known, c])
    return filled


def next_observed(values: np.ndarray) -> np.ndarray:
    """Row of the next observed value at or after each row, T where there is none; int64 (T, C)."""
    count = len(values)
    rows = np.where(np.isnan(values), count, np.arange(count)[:, None])
    return np.minimum.accumulate(rows[::-1], axis=0)[::-1]


@dataclass(frozen=True, kw_only=True)
class Scaler:
    """Mean and population deviation of each column over training rows, one row a group.

    `groups` maps the name of a series to its row; a global scaler has the one group "".
    """

    groups: dict[str, int]
    mean: np.ndarray
    std: np.ndarray

    @classmethod
    def fit(cls, parts: Sequence[tuple[str, np.ndarray]], config: ForecastDataConfig) -> Scaler:
        """From (series name, observed training rows with NaN in gaps). A constant column gets deviation 1."""
        per_series = config.scaler == "series"
        names = [name for name, _ in parts] if per_series else [""]
        sets = [rows for _, rows in parts] if per_series else [np.concatenate([rows for _, rows in parts])]
        if config.scale == "none":
            width = sets[0].shape[1]
            return cls(groups=dict(zip(names, range(len(names)))), mean=np.zeros((len(names), width)),
                       std=np.ones((len(names), width)))  # fmt: skip
        if per_series:  # a series may lie behind the training border as a whole
            kept = [(name, rows) for name, rows in zip(names, sets) if len(rows)]
            names, sets = [name for name, _ in kept], [rows for _, rows in kept]
        for name, rows in zip(names, sets):
            if np.isnan(rows).all(axis=0).any():
                where = f" of series {name!r}" if name else ""
                raise UserError(f"a column{where} has no observed value in the training rows; raise train_fraction")
        mean = np.stack([np.nanmean(rows, axis=0) for rows in sets])
        std = np.stack([np.nanstd(rows, axis=0) for rows in sets])
        # Rounding leaves a constant column a deviation of 1e-17 times its size: as good as none.
        std = np.where(std > 1e-12 * np.maximum(np.abs(mean), 1e-30), std, 1.0)
        return cls(groups=dict(zip(names, range(len(names)))), mean=mean, std=std)

    def row(self, series: str) -> int:
        if "" in self.groups:
            return self.groups[""]
        if series not in self.groups:
            raise UserError(
                f"series {series!r} was not in training and the scaler is one a series; train with "
                "--data_args.scaler global to forecast new series"
            )
        return self.groups[series]

    def scale(self, values: np.ndarray, series: str) -> np.ndarray:
        r = self.row(series)
        return (values - self.mean[r]) / self.std[r]

    def state(self) -> dict[str, Any]:
        return {"groups": self.groups, "mean": self.mean.tolist(), "std": self.std.tolist()}

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> Scaler:
        return cls(
            groups=dict(state["groups"]),
            mean=np.asarray(state["mean"], dtype=np.float64),
            std=np.asarray(state["std"], dtype=np.float64),
        )


class Windows(Dataset[dict[str, Tensor]]):
    """All windows of one split; never across series, never cut off.

    An item or a batch is a dict: `x` (B, seq_len, C), `x_mark` (B, seq_len, F), `y` (B, label_len + pred_len, C), its
    first label_len rows the end of the look-back, `y_mark` likewise, `index` (B,) the window's number, `group` (B,) its
    row in the scaler, `series` (B,) which series it is of. Where the data has gaps, `observed` (B, pred_len, C) is
    False for filled targets. Covariates, where there are any (`COVARIATES`): `past` (B, seq_len, P), `known`
    (B, seq_len + pred_len, K), `static` (B, S), float32; `past_cat`, `known_cat`, `static_cat` likewise, int64 indices
    of their vocabularies.

    A gap is filled by a straight line, but a look-back that ends inside a gap sees the last observed value carried on:
    the line would lead to a value of the future.
    """

    def __init__(
        self,
        parts: Sequence[tuple[Series, range, int, int]],
        scaler: Scaler,
        config: ForecastDataConfig,
        calendar: str,
        covariates: CovariateCoder | None = None,
    ) -> None:
        """From (series, starts of its windows, first row used, end of the rows of the split)."""
        self.seq_len, self.label_len, self.pred_len = config.seq_len, config.label_len, config.pred_len
        values, carried, marks, following, observed, starts, groups, names = [], [], [], [], [], [], [], []
        gaps = any(np.isnan(series.values[low:high]).any() for series, _, low, high in parts)
        offset = 0
        self.times = []
        coded: dict[str, list[np.ndarray]] = {}
        for number, (series, windows, low, high) in enumerate(parts):
            # Rows before `low` serve only to start a gap's line, rows from `high` on are never touched.
            known = series.values[:high]
            group = scaler.row(series.name)
            values.append(scaler.scale(fill_between(known)[low:], series.name).astype(np.float32))
            marks.append(calendar_features(series.times[low:high], calendar).astype(np.float32))
            if gaps:
                carried.append(scaler.scale(fill_forward(known)[low:], series.name).astype(np.float32))
                following.append(next_observed(known)[low:] - low + offset)
                observed.append(~np.isnan(known[low:]))
            starts.append(np.asarray(windows, dtype=np.int64) - low + offset)
            groups.append(np.full(len(windows), group))
            names.append(np.full(len(windows), number))
            self.times.append(series.times[low:high])
            offset += high - low
            if covariates is not None and series.covariates is not None:
                for role, table in covariates.encode(series.covariates).items():
                    coded.setdefault(role, []).append(table[None] if role.startswith("static") else table[low:high])
        self.series = [series.name for series, *_ in parts]
        self.values = torch.from_numpy(np.concatenate(values))
        self.marks = torch.from_numpy(np.concatenate(marks))
        self.carried = torch.from_numpy(np.concatenate(carried)) if gaps else None
        self.following = torch.from_numpy(np.concatenate(following)) if gaps else None
        self.observed = torch.from_numpy(np.concatenate(observed)) if gaps else None
        self.starts = torch.from_numpy(np.concatenate(starts))
        self.groups = torch.from_numpy(np.concatenate(groups))
        self.numbers = torch.from_numpy(np.concatenate(names))
        # Parts of one series, such as days, are one stream: that of their first part.
        first = [self.series.index(name) for name in self.series]
        self.streams = torch.tensor(first, dtype=torch.int64)[self.numbers]
        self.covariates = {role: torch.from_numpy(np.concatenate(tables)) for role, tables in coded.items()}
        self._firsts = np.cumsum([0, *(len(times) for times in self.times)])

    def __len__(self) -> int:
        return len(self.starts)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {name: value[0] for name, value in self.__getitems__([index]).items()}

    def __getitems__(self, indices: Sequence[int]) -> dict[str, Tensor]:
        """A whole batch at once: one gather a tensor."""
        index = torch.as_tensor(indices, dtype=torch.int64)
        start = self.starts[index]
        x, x_mark = self._rows(self.values, start, self.seq_len), self._rows(self.marks, start, self.seq_len)
        target = start + self.seq_len
        y_length = self.label_len + self.pred_len
        y_mark = self._rows(self.marks, target - self.label_len, y_length)
        batch: dict[str, Tensor] = {}
        if self.following is not None and self.carried is not None and self.observed is not None:
            beyond = self._rows(self.following, start, self.seq_len) >= target[:, None, None]
            x = torch.where(beyond, self._rows(self.carried, start, self.seq_len), x)
            batch["observed"] = self._rows(self.observed, target, self.pred_len)
        for role, table in self.covariates.items():
            if role.startswith("static"):
                batch[role] = table[self.numbers[index]]
            else:
                length = self.seq_len + (self.pred_len if role.startswith("known") else 0)
                batch[role] = self._rows(table, start, length)
        future = self._rows(self.values, target, self.pred_len)
        y = torch.cat([x[:, self.seq_len - self.label_len :], future], dim=1)
        return {
            "x": x,
            "x_mark": x_mark,
            "y": y,
            "y_mark": y_mark,
            "index": index,
            "group": self.groups[index],
            "series": self.streams[index],
            **batch,
        }

    @staticmethod
    def _rows(table: Tensor, start: Tensor, length: int) -> Tensor:
        """(B, length, ·): `length` rows of a contiguous (T, ·) table from `start` on, one copy a window."""
        count, width = table.shape
        blocks = table.as_strided((count - length + 1, length * width), (width, 1))
        return blocks.index_select(0, start).view(len(start), length, width)

    def window_times(self, index: int) -> tuple[str, Any]:
        """Name of the series and times (seq_len + pred_len) of a window."""
        number = int(self.numbers[index])
        first = int(self.starts[index]) - int(self._firsts[number])
        return self.series[number], self.times[number][first : first + self.seq_len + self.pred_len]


def make_windows(
    series: Sequence[Series],
    rule: str,
    config: ForecastDataConfig,
    scaler: Scaler,
    calendar: str,
    covariates: CovariateCoder | None = None,
) -> dict[str, Windows | None]:
    """The windows of every split; None where no series is long enough for one."""
    result: dict[str, Windows | None] = {}
    limits = all_borders(series, rule, config)
    for split in SPLITS:
        parts = []
        for one, cut in zip(series, limits):
            windows = cut.starts(split, config.seq_len, config.pred_len)
            if len(windows):
                parts.append((one, windows, windows[0], cut.targets(split)[1]))
        result[split] = Windows(parts, scaler, config, calendar, covariates) if parts else None
    return result


def train_rows(series: Sequence[Series], rule: str, config: ForecastDataConfig) -> list[tuple[str, np.ndarray]]:
    """The rows of each series before its training border, NaN in gaps: all that statistics may see."""
    return [(one.name, one.values[: cut.train]) for one, cut in zip(series, all_borders(series, rule, config))]


def without_windows(series: Sequence[Series], rule: str, config: ForecastDataConfig) -> dict[str, int]:
    """Split -> how many series are too short for a window of it; splits without any such series are left out."""
    limits = all_borders(series, rule, config)
    counts = {split: sum(not cut.starts(split, config.seq_len, config.pred_len) for cut in limits) for split in SPLITS}
    return {split: count for split, count in counts.items() if count}


def check_lengths(series: Sequence[Series], rule: str, config: ForecastDataConfig, source: str) -> None:
    """Refuse options that fit no window, with the arithmetic in the message."""
    for name in ("seq_len", "pred_len"):
        if getattr(config, name) < 1:
            raise UserError(f"data_args.{name} is {getattr(config, name)}; it must be at least 1")
    if not 0 <= config.label_len <= config.seq_len:
        raise UserError(
            f"data_args.label_len is {config.label_len}; it must lie between 0 and seq_len, {config.seq_len}"
        )
    if not (
        0 < config.train_fraction < 1
        and 0 < config.test_fraction < 1
        and config.train_fraction + config.test_fraction < 1 + 1e-9
    ):
        raise UserError("data_args.train_fraction and test_fraction must be between 0 and 1 and sum up to 1 at most")
    limits = all_borders(series, rule, config)
    longest, cut = max(zip(series, limits), key=lambda pair: pair[1].train)
    rows = len(longest.times)
    window = config.seq_len + config.pred_len
    if cut.train < window:
        what = f"longest series {longest.name!r}" if longest.name else "series"
        share = f"{cut.train / rows:.0%} of its {rows:,} rows are {cut.train:,}" if rule != "etth" else ""
        raise UserError(
            f"{source}: the {what} is too short: a window takes seq_len {config.seq_len} + pred_len {config.pred_len} "
            f"= {window} training rows, and {share}; take shorter windows or more rows"
        )
    for split in ("val", "test"):
        parts = [one.targets(split) for one in limits]
        first, last = max(parts, key=lambda part: part[1] - part[0])
        if last == first and (split == "val" or rule == "history"):
            continue
        if last - first < config.pred_len:
            part = "validation" if split == "val" else "test"
            raise UserError(
                f"{source}: the {part} part has {last - first:,} of {rows:,} rows and one forecast takes pred_len "
                f"{config.pred_len}; shorten pred_len, add rows, or change the fractions"
            )
