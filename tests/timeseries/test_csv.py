"""Tables as they come: each malformed file is handled, with a note, or refused in one sentence with file and line."""

from __future__ import annotations

import gzip
import io
import zipfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from attn_shared.errors import UserError
from attn_timeseries.data.cards import ForecastDataConfig
from attn_timeseries.data.table import SeriesTable, check_file, read_table


def days(count: int, start: str = "2024-01-01", form: str = "%Y-%m-%d") -> list[str]:
    return list(pd.date_range(start, periods=count, freq="D").strftime(form))


def table(rows: list[str], header: str = "date,a", end: str = "\n") -> str:
    return end.join([header, *rows]) + end


def plain(count: int = 12) -> list[str]:
    return [f"{day},{i}.5" for i, day in enumerate(days(count))]


def changed(rows: list[str], row: int, text: str) -> list[str]:
    return [*rows[:row], text, *rows[row + 1 :]]


@dataclass(frozen=True)
class Case:
    """A file and what must come of it: `refused` holds parts of the sentence, otherwise `check` looks at the table."""

    name: str
    content: str | bytes
    refused: tuple[str, ...] = ()
    check: Callable[[SeriesTable], bool] | None = None
    note: str = ""
    suffix: str = ".csv"
    config: ForecastDataConfig = field(default_factory=ForecastDataConfig)


def zipped() -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        archive.writestr("sheet.xml", "x" * 100)
    return stream.getvalue()


def first(value: float) -> Callable[[SeriesTable], bool]:
    return lambda t: len(t.series) == 1 and len(t.series[0].times) == 12 and t.series[0].values[0, 0] == value


def long_format() -> list[str]:
    return [f"{day},{name},{i}" for name in ("north", "south") for i, day in enumerate(days(10))]


OK = first(0.5)
WIDE = table(
    [",".join([day, *["1"] * 10_000]) for day in days(12)], ",".join(["date", *(f"v{i}" for i in range(10_000))])
)
CASES = [
    # -- handled ------------------------------------------------------------------------------------------------------
    Case("comma", table(plain()), check=OK),
    Case(
        "semicolon and decimal comma",
        table([r.replace(",", ";").replace(".", ",") for r in plain()], "date;a"),
        check=OK,
        note="decimal comma",
    ),
    Case("tab", table([r.replace(",", "\t") for r in plain()], "date\ta"), check=OK, note="tab"),
    Case("bar", table([r.replace(",", "|") for r in plain()], "date|a"), check=OK),
    Case("byte order mark", b"\xef\xbb\xbf" + table(plain()).encode(), check=OK),
    Case(
        "Latin-1",
        table(plain(), "date,Temp\u00e9rature").encode("latin-1"),
        check=lambda t: t.columns == ["Temp\u00e9rature"],
        note="Latin-1",
    ),
    Case("UTF-16", table(plain()).encode("utf-16"), check=OK, note="UTF-16"),
    Case("Windows line ends", table(plain(), end="\r\n"), check=OK),
    Case("old Macintosh line ends", table(plain(), end="\r"), check=OK),
    Case("blank lines", table(["", *plain(), "", ""]), check=OK),
    Case("rows of separators only", table([*plain(), ",", ","]), check=OK, note="empty rows"),
    Case(
        "line end in quotes",
        table([f'{r},"a\nb"' for r in plain()], "date,a,note"),
        check=OK,
        config=ForecastDataConfig(columns=["a"]),
    ),
    Case("rows out of order", table(plain()[::-1]), check=OK, note="out of order"),
    Case("rows repeated", table([*plain(), plain()[3], plain()[7]]), check=OK, note="2 rows repeated"),
    Case(
        "missing rows",
        table(plain()[:8] + plain()[10:]),
        check=lambda t: len(t.series[0].times) == 12 and np.isnan(t.series[0].values[8:10]).all(),
        note="2 steps have no row",
    ),
    Case(
        "missing cells of many spellings",
        table(changed(changed(changed(plain(), 4, "2024-01-05,"), 6, "2024-01-07,NA"), 9, "2024-01-10,?")),
        check=lambda t: list(np.flatnonzero(np.isnan(t.series[0].values[:, 0]))) == [4, 6, 9],
        note="3 values missing, longest run 1",
    ),
    Case(
        "column that begins late",
        table([f"{r},{'' if i < 3 else i}" for i, r in enumerate(plain())], "date,a,b"),
        check=lambda t: len(t.series[0].times) == 9,
        note="first 3 steps left out",
    ),
    Case("constant series", table([f"{day},7" for day in days(12)]), check=first(7.0), note="constant"),
    Case(
        "day first",
        table([f"{d},{i}" for i, d in enumerate(days(40, "2024-01-01", "%d/%m/%Y"))]),
        check=lambda t: t.frequency == "D" and len(t.series[0].times) == 40,
        note="day first",
    ),
    Case(
        "month first",
        table([f"{d},{i}" for i, d in enumerate(days(40, "2024-01-01", "%m/%d/%Y"))]),
        check=lambda t: t.frequency == "D" and len(t.series[0].times) == 40,
        note="month first",
    ),
    Case(
        "ambiguous days",
        table([f"{d},{i}" for i, d in enumerate(days(12, "2024-03-01", "%d.%m.%Y"))]),
        check=lambda t: t.frequency == "D" and str(t.series[0].times[0])[:10] == "2024-03-01",
    ),
    Case("times as numbers", table([f"{d},{i}" for i, d in enumerate(days(12, form="%Y%m%d"))]), check=first(0.0)),
    Case(
        "mixed time zones",
        table(
            [f"2024-01-01T{h:02d}:00:00+0{h % 2}:00,{h}" for h in range(0, 12, 2)]
            + [f"2024-01-01T{h + 1:02d}:00:00+01:00,{h}" for h in range(12, 22, 2)]
        ),
        check=lambda t: t.frequency == "2h" and str(t.series[0].times.tz) == "UTC",
        note="UTC offsets; converted to UTC",
    ),
    Case(
        "one time zone",
        table([f"2024-01-01T{h:02d}:00:00-05:00,{h}" for h in range(12)]),
        check=lambda t: t.series[0].times[3].utcoffset() == pd.Timedelta(hours=-5) and t.frequency == "h",
    ),
    Case(
        "several series",
        table(long_format(), "date,place,a"),
        check=lambda t: [s.name for s in t.series] == ["north", "south"] and t.id_column == "place",
        note="series named by column 'place'",
    ),
    Case(
        "several series with numbers for names",
        table([r.replace("north", "007").replace("south", "008") for r in long_format()], "date,id,a"),
        check=lambda t: [s.name for s in t.series] == ["007", "008"],
    ),
    Case(
        "column that only numbers the rows",
        table([f"{i},{r}" for i, r in enumerate(plain())], ",date,a"),
        check=lambda t: t.columns == ["a"],
        note="numbers the rows",
    ),
    Case(
        "months",
        table([f"{y}-{m:02d}-01,{m}" for y in (2020, 2021) for m in range(1, 13)]),
        check=lambda t: t.frequency == "MS" and len(t.series[0].times) == 24,
    ),
    Case(
        "business days",
        table([f"{d},1.5" for d in days(40) if pd.Timestamp(d).day_of_week < 5]),
        check=lambda t: t.frequency == "B" and not np.isnan(t.series[0].values).any(),
    ),
    Case("CSV called Parquet", table(plain()), check=OK, note="suffix says Parquet", suffix=".parquet"),
    Case(
        "10,000 columns, two chosen",
        table(
            [",".join([d, *["1"] * 10_000]) for d in days(12)], ",".join(["date", *(f"v{i}" for i in range(10_000))])
        ),
        check=lambda t: t.columns == ["v7", "v9000"],
        config=ForecastDataConfig(columns=["v7", "v9000"]),
    ),
    # -- refused ------------------------------------------------------------------------------------------------------
    Case(
        "10,000 columns",
        table(
            [",".join([d, *["1"] * 10_000]) for d in days(12)], ",".join(["date", *(f"v{i}" for i in range(10_000))])
        ),
        refused=("10,001 columns", "--data_args.columns"),
    ),
    Case("empty file", "", refused=("t.csv is empty",)),
    Case("white space only", " \n\n  \n", refused=("t.csv is empty but for white space",)),
    Case("header only", "date,a\n", refused=("t.csv holds a header but no rows",)),
    Case("one row", table(plain(1)), refused=("t.csv has only one row", "three")),
    Case("no header", "\n".join(plain()), refused=("t.csv:1:", "add a header line")),
    Case("one column", "a\n1\n2\n3\n", refused=("t.csv:1: only one column",)),
    Case("separated by spaces", "date a\n2024-01-01 1\n2024-01-02 2\n", refused=("t.csv:1: only one column",)),
    Case("binary", bytes(range(256)) * 20, refused=("t.csv:1: a zero byte",)),
    Case("binary without zero bytes", bytes(range(128, 256)) * 20, refused=("t.csv is binary",)),
    Case("spreadsheet", zipped(), refused=("t.csv is a spreadsheet or a ZIP archive",)),
    Case("compressed", gzip.compress(table(plain()).encode()), refused=("t.csv is compressed",)),
    Case(
        "junk called Parquet", b"\x93NUM" + bytes(40), refused=("t.parquet is not a Parquet file",), suffix=".parquet"
    ),
    Case("damaged Parquet", b"PAR1" + bytes(40), refused=("t.parquet is damaged",), suffix=".parquet"),
    Case(
        "no times", table([f"{i},{i}" for i in range(9)], "x,a"), refused=("t.csv: no column holds times", "'x', 'a'")
    ),
    Case(
        "two columns of times",
        table([f"{a},{b},1" for a, b in zip(days(9), days(9, "2025-01-01"))], "begin,end,a"),
        refused=("'begin', 'end'", "--data_args.time_column"),
    ),
    Case("a missing time", table(changed(plain(), 5, ",5.5")), refused=("t.csv:7: the time is missing",)),
    Case("a wrong time", table(changed(plain(), 5, "2024-13-45,5.5")), refused=("t.csv:7: '2024-13-45'", "not a time")),
    Case(
        "a time without its zone",
        table([f"2024-01-01T{h:02d}:00:00{'' if h == 4 else 'Z'},{h}" for h in range(12)]),
        refused=("t.csv:6: ", "some times have a UTC offset and some have none"),
    ),
    Case(
        "date and time in two columns",
        table([f"2024-01-01,{h:02d}:00,{h}" for h in range(12)], "date,time,a"),
        refused=("date and time stand in two columns",),
    ),
    Case(
        "text in numbers", table(changed(plain(), 8, "2024-01-09,12 kW")), refused=("t.csv:10: '12 kW' in column 'a'",)
    ),
    Case(
        "text among numbers with decimal comma",
        table(changed([r.replace(",", ";").replace(".", ",") for r in plain()], 8, "2024-01-09;x"), "date;a"),
        refused=("t.csv:10: 'x' in column 'a' is not a number",),
    ),
    Case(
        "text in numbers after a quoted line end",
        table(changed([f'{r},"x\ny"' for r in plain()], 8, "2024-01-09,oops,z"), "date,a,note"),
        refused=("t.csv:18: 'oops' in column 'a'",),
        config=ForecastDataConfig(columns=["a"]),
    ),
    Case("thousands separators", table(changed(plain(), 3, '2024-01-04,"1,234.5"')), refused=("t.csv:5: '1,234.5'",)),
    Case("an infinite value", table(changed(plain(), 3, "2024-01-04,inf")), refused=("t.csv:5:", "infinite")),
    Case("a huge value", table(changed(plain(), 3, "2024-01-04,1e200")), refused=("t.csv:5:", "too large")),
    Case(
        "a column of text",
        table([f"{r},red,{c}" for r, c in zip(plain(), "aabbccddeeff")], "date,a,b,c"),
        refused=("column 'b' holds text", "--data_args.columns"),
    ),
    Case(
        "an empty column", table([f"{r}," for r in plain()], "date,a,b"), refused=("column 'b' holds no number at all",)
    ),
    Case("no value column", table([f"{d},x" for d in days(9)], "date,name"), refused=("no column of numbers",)),
    Case("a row too wide", table(changed(plain(), 6, "2024-01-07,6.5,9")), refused=("t.csv:8: 3 fields", "has 2")),
    Case("a row cut short", table(plain()) + "2024-01-13", refused=("t.csv:14: 1 fields",)),
    Case("lines above the header", "Station 7\n" + table(plain()), refused=("t.csv:2: 2 fields", "above the header")),
    Case("an open quote", table(changed(plain(), 6, '2024-01-07,"6.5')), refused=("t.csv:8:", "not closed")),
    Case(
        "equal names", table([f"{r},1" for r in plain()], "date,a,a"), refused=("t.csv:1: two columns are called 'a'",)
    ),
    Case(
        "a time twice with other values",
        table([*plain(), "2024-01-04,99"]),
        refused=("t.csv:14: the time 2024-01-04", "first at t.csv:5"),
    ),
    Case(
        "irregular steps",
        table(changed(plain(), 5, "2024-01-06 03:17,5.5")),
        refused=("t.csv:7: the time 2024-01-06 03:17:00", "not on the grid"),
    ),
    Case("a stray year", table(["1924-01-01,1", *plain()]), refused=("t.csv:3:", "fewer than one step in twenty")),
    Case(
        "a long run of missing values",
        table([f"{d},{'' if 10 <= i < 60 else i}" for i, d in enumerate(days(90))]),
        refused=("t.csv:12: column 'a' has no value for 50 steps", "max_gap is 24"),
    ),
    Case(
        "a gap where none is allowed",
        table(plain()[:8] + plain()[10:]),
        refused=("t.csv:9: column 'a' has no value at 2024-01-09",),
        config=ForecastDataConfig(missing="error"),
    ),
    Case(
        "a column that is not there",
        table(plain()),
        refused=("unknown column 'b'",),
        config=ForecastDataConfig(columns=["b"]),
    ),
    Case(
        "a frequency that is none",
        table(plain()),
        refused=("frequency 'often'",),
        config=ForecastDataConfig(frequency="often"),
    ),
    Case(
        "another frequency",
        table(plain()),
        refused=("t.csv:3:", "not on the grid"),
        config=ForecastDataConfig(frequency="2D"),
    ),
    Case(
        "a series without a name",
        table(changed(long_format(), 4, "2024-01-05,,4"), "date,place,a"),
        refused=("t.csv:6: the name of the series is missing",),
        config=ForecastDataConfig(id_column="place"),
    ),
]


def write(case: Case, folder: Path) -> Path:
    path = folder / f"t{case.suffix}"
    path.write_bytes(case.content if isinstance(case.content, bytes) else case.content.encode())
    return path


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name.replace(" ", "-"))
def test_case(case: Case, tmp_path: Path) -> None:
    path = write(case, tmp_path)
    if case.refused:
        with pytest.raises(UserError) as caught:
            read_table(path, case.config)
        message = str(caught.value)
        assert path.name in message or "frequency" in message
        assert "\n" not in message
        for part in case.refused:
            assert part in message, message
        return
    read = read_table(path, case.config)
    assert case.check is not None
    assert case.check(read), read
    assert case.note in " | ".join([*read.form, *read.notes]), read


def test_there_are_enough_cases() -> None:
    malformed = [case for case in CASES if case.refused or case.note]
    assert len({case.name for case in CASES}) == len(CASES)
    assert len(malformed) >= 30


def test_parquet_says_the_same_as_csv(tmp_path: Path) -> None:
    frame = pd.DataFrame({"when": pd.date_range("2024-01-01", periods=30, freq="h"), "a": np.arange(30.0), "b": 1.5})
    frame.to_parquet(tmp_path / "x.parquet")
    frame.to_csv(tmp_path / "x.csv", index=False)
    ours = [read_table(tmp_path / name, ForecastDataConfig()) for name in ("x.parquet", "x.csv")]
    assert ours[0].columns == ours[1].columns == ["a", "b"]
    assert ours[0].frequency == ours[1].frequency == "h"
    np.testing.assert_array_equal(ours[0].series[0].values, ours[1].series[0].values)
    assert (ours[0].series[0].times == ours[1].series[0].times).all()


def test_parquet_with_times_in_the_index(tmp_path: Path) -> None:
    index = pd.date_range("2024-01-01", periods=10, freq="D", name="when")
    pd.DataFrame({"a": np.arange(10.0)}, index=index).to_parquet(tmp_path / "x.parquet")
    assert read_table(tmp_path / "x.parquet", ForecastDataConfig()).time_column == "when"


def test_parquet_names_the_row(tmp_path: Path) -> None:
    frame = pd.DataFrame({"when": pd.date_range("2024-01-01", periods=10), "a": ["1"] * 6 + ["x"] + ["2"] * 3})
    frame.to_parquet(tmp_path / "x.parquet")
    with pytest.raises(UserError, match=r"x\.parquet, row 7: 'x' in column 'a' is not a number"):
        read_table(tmp_path / "x.parquet", ForecastDataConfig())


def test_missing_file_and_folder(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="does not exist"):
        read_table(tmp_path / "none.csv", ForecastDataConfig())
    with pytest.raises(UserError, match="is a folder"):
        read_table(tmp_path, ForecastDataConfig())


@pytest.mark.parametrize("number", ["1.234,50", "1 234,5", "1'234.5", "12\u00a0345"])
def test_marks_between_thousands_are_named(tmp_path: Path, number: str) -> None:
    path = tmp_path / "excel.csv"
    path.write_text("\n".join(["date;a", *(f"{day};{number}" for day in days(12))]))
    with pytest.raises(UserError, match="'a' have marks between thousands"):
        read_table(path, ForecastDataConfig())
    path.write_text("\n".join(["date;a", *(f"{day};{i},5" for i, day in enumerate(days(12))), f"2024-01-13;{number}"]))
    with pytest.raises(UserError, match=r"excel\.csv:14: .* is not a number; write numbers without marks between"):
        read_table(path, ForecastDataConfig())


def test_the_hour_that_comes_twice_needs_an_offset(tmp_path: Path) -> None:
    hours = pd.date_range("2024-10-26 12:00", periods=24, freq="h", tz="Europe/Berlin").strftime("%Y-%m-%d %H:%M")
    path = tmp_path / "clock.csv"
    path.write_text("\n".join(["time,a", *(f"{hour},{i}" for i, hour in enumerate(hours))]))
    with pytest.raises(UserError, match="if the clock was put back, write times with their offset"):
        read_table(path, ForecastDataConfig())


def test_check_file_reports_without_raising(tmp_path: Path) -> None:
    good, gaps, bad = (tmp_path / name for name in ("good.csv", "gaps.csv", "bad.csv"))
    good.write_text(table(plain()))
    gaps.write_text(table(plain()[:8] + plain()[10:]))
    bad.write_text(table(changed(plain(), 8, "2024-01-09,12 kW")))
    assert check_file(good) == []
    assert any("2 steps have no row" in note for note in check_file(gaps))
    assert check_file(bad) == ["bad.csv:10: '12 kW' in column 'a' is not a number"]
