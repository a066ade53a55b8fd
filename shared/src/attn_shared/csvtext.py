"""From the bytes of a file to a frame of cells, each with the line it stands on.

Nothing is guessed in silence: what was found (encoding, separator, decimal comma) is in the notes, and what cannot be
read is refused in one sentence with file and line. Needs pandas, which apps that read tables depend on.
"""

from __future__ import annotations

import csv
import io
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from attn_shared.errors import UserError

MAX_BYTES = 2 << 30
DELIMITERS = {",": ",", ";": ";", "tab": "\t", "\t": "\t", "|": "|"}
MISSING = ["", "NA", "N/A", "#N/A", "n/a", "na", "NaN", "nan", "NAN", "null", "NULL", "Null", "None", "none", "-", "?"]
_DATE_LIKE = re.compile(r"\d{1,4}[-/.]\d{1,2}[-/.]\d{1,4}")
_DECIMAL_COMMA = re.compile(r'(?:^|[;\t|])"?[+-]?\d+,\d+"?(?:[;\t|\r]|$)', re.MULTILINE)


@dataclass(kw_only=True)
class Cells:
    """A file as read: every column still raw.

    Attributes:
        source: name of the file, as messages give it.
        frame: one column a column of the file; text where it is not all numbers.
        lines: line of the file each row starts on; None for Parquet.
        notes: how the file is written: encoding, separator, what was left out.
        decimal: the decimal sign; text that stands among numbers still has it.
    """

    source: str
    frame: pd.DataFrame
    lines: np.ndarray | None
    notes: list[str]
    decimal: str = "."

    def numbers(self, text: pd.Series) -> pd.Series:
        """Text as numbers, NaN where it is none."""
        if self.decimal == ",":
            text = text.astype("str").str.replace(",", ".", regex=False)
        return pd.to_numeric(text, errors="coerce")

    def where(self, row: int) -> str:
        """`file:line` of a row, or `file, row n` where a file has no lines."""
        if self.lines is None:
            return f"{self.source}, row {row + 1}"
        return f"{self.source}:{self.lines[row]}"


def read_text(path: Path, notes: list[str]) -> str:
    """The file as text. Raises UserError for what is no text, or empty."""
    size = path.stat().st_size
    if size == 0:
        raise UserError(f"{path.name} is empty")
    if size > MAX_BYTES:
        raise UserError(f"{path.name} holds {size / 2**30:.1f} GiB, more than 2; write it as Parquet or in parts")
    data = path.read_bytes()
    if data[:4] == b"PK\x03\x04":
        raise UserError(f"{path.name} is a spreadsheet or a ZIP archive, not CSV; export it as CSV")
    if data[:2] == b"\x1f\x8b":
        raise UserError(f"{path.name} is compressed; unpack it first")
    if data[:2] in (b"\xff\xfe", b"\xfe\xff"):
        try:
            text = data.decode("utf-16")
        except UnicodeDecodeError:
            raise UserError(f"{path.name} is not text: it starts like UTF-16 but does not go on so") from None
        notes.append("encoding: UTF-16")
    else:
        if b"\0" in data:
            line = data[: data.index(b"\0")].count(b"\n") + 1
            raise UserError(f"{path.name}:{line}: a zero byte; the file is binary or damaged, not CSV")
        try:
            text = data.decode("utf-8-sig")
        except UnicodeDecodeError:
            text = data.decode("latin-1")
            strange = sum((ord(c) < 32 and c not in "\t\r\n") or 127 <= ord(c) < 160 for c in text[:4096])
            if strange > 0.02 * min(len(text), 4096):
                raise UserError(f"{path.name} is binary, not CSV text") from None
            notes.append("encoding: Latin-1")
    if "\n" not in text:
        text = text.replace("\r", "\n")
    if not text.strip():
        raise UserError(f"{path.name} is empty but for white space")
    return text


def sniff_delimiter(text: str, name: str) -> str:
    """The separator under which most of the first lines have as many fields as the header."""
    head = io.StringIO(text[: 1 << 16], newline="")
    lines = [line for _, line in zip(range(100), head) if line.strip()]
    best, score = "", (0.0, 0.0, 0)
    for delimiter in (",", ";", "\t", "|"):
        try:
            widths = [len(row) for row in csv.reader(lines, delimiter=delimiter)]
        except csv.Error:
            continue
        usual = max(set(widths), key=widths.count)
        if usual > 1:
            # Agreement with the header counts first; without any (a title above it), that among the lines.
            candidate = (widths.count(widths[0]) / len(widths) if widths[0] > 1 else 0.0, widths.count(usual), usual)
            if candidate > score:
                best, score = delimiter, candidate
    if not best:
        raise UserError(f"{name}:1: only one column found; separate columns by comma, semicolon, tab or |")
    return best


def scan(text: str, delimiter: str, name: str) -> tuple[list[str], np.ndarray]:
    """Column names, and the line each row starts on. Refuses rows of another width than the header, and open quotes."""
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    header: list[str] | None = None
    header_line = 1
    lines: list[int] = []
    start = 1
    try:
        for row in reader:
            if row and not (len(row) == 1 and not row[0].strip()):
                if header is None:
                    header, header_line = [cell.strip() for cell in row], start
                elif len(row) != len(header):
                    raise UserError(
                        f"{name}:{start}: {len(row)} fields where the header (line {header_line}) has {len(header)}; "
                        "fix or quote the line, or remove what stands above the header"
                    )
                else:
                    lines.append(start)
            start = reader.line_num + 1
    except csv.Error as error:
        raise UserError(f"{name}:{start}: a quoted field is not closed or goes wrong ({error})") from None
    assert header is not None
    _check_header(header, header_line, name)
    if not lines:
        raise UserError(f"{name} holds a header but no rows")
    return header, np.asarray(lines)


def _check_header(header: list[str], line: int, name: str) -> None:
    def number(cell: str) -> bool:
        try:
            float(cell.replace(",", "."))
        except ValueError:
            return False
        return True

    dates = [cell for cell in header if _DATE_LIKE.match(cell)]
    values = all(number(cell) or cell in dates or cell in MISSING for cell in header)
    if values and (dates or any("." in cell for cell in header)):
        raise UserError(f"{name}:{line}: the first line holds values, not column names; add a header line")
    seen: set[str] = set()
    for cell in header:
        if cell and cell in seen:
            raise UserError(f"{name}:{line}: two columns are called {cell!r}; give each its own name")
        seen.add(cell)


def read_cells(
    path: Path, *, delimiter: str | None, text_columns: set[str], only: list[str] | None, max_columns: int
) -> Cells:
    """Read a CSV or Parquet file, whatever its suffix says.

    Args:
        delimiter: "," ";" "tab" "|"; None = found.
        text_columns: columns left as text even where they look like numbers (times, names of series).
        only: columns to keep, beside `text_columns`, where a file has more than `max_columns`.
        max_columns: most columns kept, times and names of series not counted.
    """
    path = Path(path)
    if path.is_dir():
        raise UserError(f"{path} is a folder; name a CSV or Parquet file")
    try:
        with path.open("rb") as file:
            magic = file.read(4)
    except FileNotFoundError:
        raise UserError(f"{path} does not exist") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None
    notes: list[str] = []
    if magic == b"PAR1":
        return _read_parquet(path, only, text_columns, max_columns, notes)
    if path.suffix.lower() in (".parquet", ".pq"):
        if magic[:4].isascii() and magic.strip():
            notes.append("read as CSV although its suffix says Parquet")
        else:
            raise UserError(f"{path.name} is not a Parquet file (its first bytes say otherwise)")

    text = read_text(path, notes)
    if delimiter is None:
        separator = sniff_delimiter(text, path.name)
    elif delimiter in DELIMITERS:
        separator = DELIMITERS[delimiter]
    else:
        raise UserError(f'delimiter {delimiter!r} is none of "," ";" "tab" "|"')
    if separator != ",":
        notes.append("separator: " + {"\t": "tab"}.get(separator, separator))
    header, lines = scan(text, separator, path.name)
    if delimiter is not None and len(header) == 1:
        raise UserError(
            f"{path.name}:1: only one column when separated by {delimiter!r}; leave --data_args.delimiter out"
        )
    names = [cell or f"column {i + 1}" for i, cell in enumerate(header)]
    keep = _keep(names, only, text_columns, max_columns, path.name)
    decimal = "."
    if separator != "," and _DECIMAL_COMMA.search(text):
        decimal = ","
        notes.append("decimal comma")
    try:
        frame = pd.read_csv(
            io.StringIO(text),
            sep=separator,
            decimal=decimal,
            header=0,
            names=names,
            index_col=False,
            usecols=keep,
            dtype={name: "str" for name in keep if name in text_columns},
            keep_default_na=False,
            na_values={name: [""] if name in text_columns else MISSING for name in keep},
            skipinitialspace=True,
            low_memory=False,
        )
    except (pd.errors.ParserError, ValueError) as error:
        raise UserError(f"{path.name} cannot be read as CSV: {str(error).strip().splitlines()[0]}") from None
    if len(frame) != len(lines):
        raise UserError(f"{path.name} cannot be read as CSV: stray quotes or line ends (rows do not match lines)")
    blank = frame.isna().all(axis=1).to_numpy()
    if blank.any():
        notes.append(f"{blank.sum()} empty rows left out")
        frame, lines = frame[~blank].reset_index(drop=True), lines[~blank]
    if not len(frame):
        raise UserError(f"{path.name} holds a header but no rows")
    unnamed = [n for n, cell in zip(names, header) if not cell and n in frame]
    for name in unnamed:
        column = frame[name]
        if column.isna().all():
            frame = frame.drop(columns=name)
        elif (pd.to_numeric(column, errors="coerce").to_numpy() == np.arange(len(column))).all():
            frame = frame.drop(columns=name)
            notes.append("a column without a name that only numbers the rows left out")
    return Cells(source=path.name, frame=frame, lines=lines, notes=notes, decimal=decimal)


def _keep(names: list[str], only: list[str] | None, text: set[str], max_columns: int, source: str) -> list[str]:
    """Columns to read: all, or in a very wide file those asked for and those that can be times or names of series."""
    if len(names) <= max_columns + 2:
        return names
    keep = [] if only is None else [name for name in names if name in text or name in only]
    if not keep or len(keep) > max_columns + 2:
        raise UserError(
            f"{source} has {len(names):,} columns, more than {max_columns:,}; choose some with "
            "--data_args.columns '[a, b]', or write one series below the other with an id column"
        )
    return keep


def _read_parquet(path: Path, only: list[str] | None, text: set[str], max_columns: int, notes: list[str]) -> Cells:
    import pyarrow
    from pyarrow import parquet

    try:
        frame = parquet.ParquetFile(path).read().to_pandas()
    except (pyarrow.ArrowException, OSError, ValueError):
        raise UserError(f"{path.name} is damaged: it starts like Parquet but cannot be read") from None
    if not isinstance(frame.index, pd.RangeIndex):
        frame = frame.reset_index()
    frame.columns = [str(name) for name in frame.columns]
    if len(set(frame.columns)) != len(frame.columns):
        raise UserError(f"{path.name} has two columns of one name; give each its own name")
    if not len(frame):
        raise UserError(f"{path.name} holds no rows")
    frame = frame[_keep(list(frame.columns), only, text, max_columns, path.name)]
    return Cells(source=path.name, frame=frame, lines=None, notes=notes)
