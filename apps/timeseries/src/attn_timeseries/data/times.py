"""Times: from text to timestamps, and from timestamps to a regular step."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable

import numpy as np
import pandas as pd

from attn_shared.errors import UserError

TIME_NAMES = (
    "date",
    "time",
    "datetime",
    "timestamp",
    "ds",
    "day",
    "week",
    "month",
    "year",
    "period",
    "hour",
    "column 1",
)

_DATES = [
    *("%Y-%m-%d", "%Y/%m/%d", "%Y.%m.%d", "%d/%m/%Y", "%m/%d/%Y", "%d.%m.%Y", "%d-%m-%Y", "%m-%d-%Y", "%d/%m/%y"),
    *("%m/%d/%y", "%d.%m.%y", "%d %b %Y", "%b %d %Y", "%d-%b-%Y", "%b %Y", "%b-%Y", "%Y-%m", "%m/%Y"),
]
_CLOCKS = ["", " %H:%M", " %H:%M:%S", " %H:%M:%S.%f", " %I:%M %p", " %I:%M:%S %p"]
_DIGITS = {4: "%Y", 6: "%Y%m", 8: "%Y%m%d"}
_OFFSET = re.compile(r":\d{2}(?:\.\d+)?\s*(?P<offset>Z|UTC|[+-]\d{2}:?\d{2})$")
_CLOCK_ONLY = re.compile(r"\d{1,2}:\d{2}(:\d{2}(\.\d+)?)?$")
_SAMPLE = 500
_MANY = 5000


def is_clock(text: pd.Series) -> bool:
    """Whether a column holds times of day without a date."""
    return bool(text.dropna().astype(str).str.strip().str.match(_CLOCK_ONLY).all())


def _parse(text: pd.Series, form: str) -> pd.Series:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pd.to_datetime(text, format=form, errors="coerce")


def _regularity(times: pd.Series) -> tuple[bool, float]:
    """How much a reading of the times looks like a series: in order, and the share of the commonest step."""
    steps = np.diff(times.dropna().to_numpy().astype("datetime64[us]").astype(np.int64))
    if not len(steps):
        return False, 0.0
    _, counts = np.unique(steps, return_counts=True)
    return bool((steps >= 0).all()), counts.max() / len(steps)


def parse_times(raw: pd.Series, *, digits: bool = True) -> tuple[pd.Series, list[str]]:
    """Timestamps of a column, NaT where a cell is no time; and notes on how they were read.

    Args:
        raw: text, numbers, or timestamps (Parquet).
        digits: whether bare numbers (2020, 202001, 20200131, seconds since 1970) may be times.
    """
    if pd.api.types.is_datetime64_any_dtype(raw):
        return raw.dt.as_unit("us"), []
    if pd.api.types.is_float_dtype(raw):
        raw = raw.astype("Int64") if (raw.dropna() % 1 == 0).all() else raw
    if len(raw) > _MANY:
        # A long table repeats its times in every series: each is read once.
        codes, distinct = pd.factorize(raw)
        if len(distinct) < len(raw) // 2:
            read, how = parse_times(pd.Series(distinct), digits=digits)
            return pd.Series(read.array.take(codes, allow_fill=True), index=raw.index), how
    text = raw.astype("str").str.strip()
    text = text.where(raw.notna().to_numpy(), None)
    known = text.dropna()
    if not len(known):
        return pd.Series(pd.NaT, index=raw.index, dtype="datetime64[us]"), []
    sample = known.iloc[:: max(1, len(known) // _SAMPLE)]
    if sample.str.fullmatch(r"\d+(\.0+)?").mean() > 0.9:
        return (_parse_digits(text), []) if digits else (pd.Series(pd.NaT, index=raw.index), [])

    zoned = known.str.extract(_OFFSET)["offset"].notna()
    if zoned.any():
        return _parse_zoned(text, zoned)
    tidy = text.str.replace(r"^(\d{4}-\d{1,2}-\d{1,2})T", r"\1 ", regex=True)
    short = tidy[sample.index]
    best: list[tuple[float, str]] = []
    forms = ["ISO8601", *(date + clock for date in _DATES for clock in _CLOCKS)]
    for form in forms:
        good = _parse(short, form).notna().mean()
        if good > 0.5:
            best.append((good, form))
            if good == 1 and form == "ISO8601":
                break
    if not best:
        return pd.Series(pd.NaT, index=raw.index, dtype="datetime64[us]"), []
    readings = [(form, _parse(tidy, form)) for _, form in best]
    most = max(times.notna().sum() for _, times in readings)
    readings = [(form, times) for form, times in readings if times.notna().sum() == most]
    notes: list[str] = []
    if len(readings) > 1:
        readings.sort(key=lambda reading: _regularity(reading[1]), reverse=True)
    form, times = readings[0]
    if "%d/%m" in form or "%m/%d/" in form or "%d-%m" in form or "%m-%d-" in form:
        notes.append("times read as " + ("day first" if form.index("%d") < form.index("%m") else "month first"))
    return times.astype("datetime64[us]"), notes


def _parse_digits(text: pd.Series) -> pd.Series:
    number = text.str.replace(r"\.0+$", "", regex=True)
    width = int(number.dropna().str.len().mode().iloc[0])
    if width in _DIGITS:
        times = _parse(number.where(number.str.len() == width), _DIGITS[width])
    elif width in (9, 10, 13):
        seconds = pd.to_numeric(number, errors="coerce") / (1000 if width == 13 else 1)
        times = pd.to_datetime(seconds, unit="s", errors="coerce")
    else:
        return pd.Series(pd.NaT, index=text.index, dtype="datetime64[us]")
    return times.astype("datetime64[us]")


def _parse_zoned(text: pd.Series, zoned: pd.Series) -> tuple[pd.Series, list[str]]:
    """Times with UTC offsets: kept in their zone where it is one, in UTC where there are several."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        times = pd.to_datetime(
            text.str.replace(r"\s*UTC$", "Z", regex=True), format="ISO8601", utc=True, errors="coerce"
        )
    times = times.astype("datetime64[us, UTC]")
    bare = zoned.index[~zoned]
    if len(bare):
        # A cell without an offset is another moment in every zone: treated as no time, and told so by the caller.
        return times.mask(times.index.isin(bare)), ["some times have a UTC offset and some have none"]
    offsets = text.dropna().str.extract(_OFFSET)["offset"].replace({"Z": "+00:00", "UTC": "+00:00"}).unique()
    if len(offsets) > 1:
        return times, [f"times have {len(offsets)} UTC offsets; converted to UTC"]
    return times.dt.tz_convert(_fixed(offsets[0])), []


def _fixed(offset: str) -> str:
    hours, minutes = offset[:3], offset[-2:]
    return "UTC" if (hours, minutes) in (("+00", "00"), ("-00", "00")) else f"{hours}:{minutes}"


def check_frequency(alias: str) -> str:
    """A frequency as pandas writes it. Raises UserError for what is none."""
    modern = {"H": "h", "T": "min", "M": "ME", "Q": "QE", "A": "YE", "Y": "YE", "S": "s"}
    alias = re.sub(r"^(\d*)([A-Z])$", lambda m: m[1] + modern.get(m[2], m[2]), alias.strip())
    try:
        return str(pd.tseries.frequencies.to_offset(alias).freqstr)
    except (ValueError, AttributeError):
        raise UserError(f'frequency {alias!r} is none; write it like "h", "15min", "D", "W-SUN", "MS"') from None


def infer_frequency(times: pd.DatetimeIndex, where: Callable[[int], str]) -> str:
    """The step of sorted, distinct times, as a pandas alias.

    Args:
        times: at least three.
        where: file and line of the i-th time, for messages.

    Raises:
        UserError: no step fits; names the first time that stands off the grid.
    """
    stamps = times.as_unit("us").asi8
    steps, counts = np.unique(np.diff(stamps), return_counts=True)
    step = int(steps[counts.argmax()])
    day = 86_400_000_000
    days = step / day
    for low, high, begin, end in ((28, 31, "MS", "ME"), (89, 92, "QS", "QE"), (365, 366, "YS", "YE")):
        if low <= days <= high:
            month = times[0].strftime("%b").upper()
            for alias in (begin, end):
                anchored = alias if alias in ("MS", "ME") else f"{alias}-{month}"
                offset = pd.tseries.frequencies.to_offset(anchored)
                if all(offset.is_on_offset(t) for t in times) and len(set(stamps % day)) == 1:
                    return str(offset.freqstr)
    if (
        step == day
        and len(times) > 5
        and (times.day_of_week < 5).all()
        and times[-1] - times[0] >= pd.Timedelta(days=7)
    ):
        return "B"
    phases, counts = np.unique(stamps % step, return_counts=True)
    off = np.flatnonzero(stamps % step != phases[counts.argmax()])
    if len(off):
        name = pd.Timedelta(step, unit="us")
        raise UserError(
            f"{where(int(off[0]))}: the time {times[off[0]]} is not on the grid of the commonest step, {name}; "
            f"{len(off)} of {len(times)} times are not: resample the file to a regular step"
        )
    if step == 7 * day:
        return "W-" + times[0].strftime("%a").upper()
    if step % day == 0:
        return "D" if step == day else f"{step // day}D"
    return str(pd.tseries.frequencies.to_offset(pd.Timedelta(step, unit="us")).freqstr)


def on_grid(times: pd.DatetimeIndex, frequency: str, where: Callable[[int], str]) -> pd.DatetimeIndex:
    """All steps from the first to the last time. Raises UserError where a time is off the grid, or most are missing."""
    limit = 20 * len(times) + 1000
    offset = pd.tseries.frequencies.to_offset(frequency)
    span = times[-1] - times[0]
    if isinstance(offset, pd.offsets.Tick):
        shortest = pd.Timedelta(offset)
    else:
        unit = frequency.lstrip("0123456789")[:1]
        shortest = pd.Timedelta(days={"W": 7, "M": 28, "Q": 89, "Y": 365}.get(unit, 1) * offset.n)
    if span / shortest > limit:
        jump = int(np.diff(times.asi8).argmax())
        raise UserError(
            f"{where(jump + 1)}: from {times[jump]} to {times[jump + 1]} without a row at a step of {frequency}: "
            f"fewer than one step in twenty is there; check the times or name --data_args.frequency"
        )
    grid = pd.date_range(times[0], times[-1], freq=frequency)
    off = np.flatnonzero(~times.isin(grid))
    if len(off):
        raise UserError(
            f"{where(int(off[0]))}: the time {times[off[0]]} is not on the grid of frequency {frequency} that starts "
            f"at {times[0]}"
        )
    return grid
