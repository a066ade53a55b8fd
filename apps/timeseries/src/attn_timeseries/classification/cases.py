"""Labelled series from files: the .ts format of the UEA archive, and CSV with one row a step."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from attn_shared.errors import UserError
from attn_timeseries.classification.cards import (
    DATASETS,
    ID_NAMES,
    LABEL_NAMES,
    SPLIT_NAMES,
    TIME_NAMES,
    ClassifyDataConfig,
)

_MISSING = ("?", "", "nan", "na", "null", "none")
_SPLITS = {"train": "train", "training": "train", "val": "val", "valid": "val", "validation": "val", "test": "test"}
_DELIMITERS = {"tab": "\t", ",": ",", ";": ";", "|": "|"}


@dataclass
class Cases:
    """N series.

    Attributes:
        values: an array (steps, channels) a series, float64; a missing value is NaN.
        labels: the class of each; None where the file has no classes.
        names: what to call each: the id of a CSV, the number from 1 in a .ts file.
        channels: names of the channels; of a .ts file, which has none, their numbers from 1.
        source: the file, for messages.
        classes: all classes a .ts file declares; those that occur otherwise.
        splits: "train", "val" or "test" of each, where the file says so.
    """

    values: list[np.ndarray]
    labels: list[str] | None
    names: list[str]
    channels: list[str]
    source: str
    classes: list[str] = field(default_factory=list)
    splits: list[str] | None = None

    def __len__(self) -> int:
        return len(self.values)

    def take(self, index: Iterable[int]) -> Cases:
        """Some of them."""
        chosen = list(index)
        return Cases(
            values=[self.values[i] for i in chosen],
            labels=None if self.labels is None else [self.labels[i] for i in chosen],
            names=[self.names[i] for i in chosen],
            channels=self.channels,
            source=self.source,
            classes=self.classes,
            splits=None if self.splits is None else [self.splits[i] for i in chosen],
        )


# -- which files ------------------------------------------------------------------------------------------------------


def source_files(data: str, args: ClassifyDataConfig) -> tuple[Path, Path | None]:
    """The file of the training series, or of all, and the one of the test series where there is one.

    Raises:
        UserError: there is no such file, or a folder without one pair.
    """
    card = DATASETS.get(data)
    if card is not None:
        from attn_shared.datasets import locate

        folder = locate(card)
        return folder / card.files[0].path, folder / card.files[1].path
    path = Path(data).expanduser()
    first = _train_of(path) if path.is_dir() else path
    if not first.exists():
        raise UserError(f"there is no file {data}")
    second = Path(args.test).expanduser() if args.test is not None else sibling(first)
    if second is not None and not second.is_file():
        raise UserError(f"there is no file {second}, which --data_args.test names")
    return first, second


def _train_of(folder: Path) -> Path:
    found = sorted(file for file in folder.iterdir() if file.name.lower().endswith("_train.ts"))
    if len(found) != 1:
        names = f": {', '.join(file.name for file in found)}" if found else ""
        raise UserError(
            f"the folder {folder} holds {len(found)} files that end in _TRAIN.ts{names}; it must hold one, or name "
            f"a file"
        )
    return found[0]


def sibling(path: Path) -> Path | None:
    """The `_TEST.ts` beside a `_TRAIN.ts`."""
    if not path.name.lower().endswith("_train.ts"):
        return None
    wanted = f"{path.name[: -len('_train.ts')]}_test.ts".lower()
    return next((file for file in sorted(path.parent.iterdir()) if file.name.lower() == wanted), None)


def read_cases(path: Path, args: ClassifyDataConfig) -> Cases:
    """The series of a .ts file or a CSV.

    Raises:
        UserError: what is wrong with it, in one sentence that names the file and the line.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        raise UserError(f"{path} is no UTF-8 text") from None
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from None
    if "\0" in text:
        raise UserError(f"{path} is no text file: it holds zero bytes")
    if path.suffix.lower() == ".ts":
        return parse_ts(text, str(path))
    return parse_csv(text, str(path), args)


def check_file(path: Path, args: ClassifyDataConfig | None = None) -> list[str]:
    """What keeps a file or a folder from being read as labelled series, a sentence each; empty when nothing does."""
    args = args or ClassifyDataConfig()
    files = (path,) if path.is_file() and path.suffix.lower() != ".ts" else source_files(str(path), args)
    problems = []
    for file in files:
        if file is not None:
            try:
                read_cases(file, args)
            except UserError as error:
                problems.append(str(error))
    return problems


# -- .ts --------------------------------------------------------------------------------------------------------------


@dataclass
class _Header:
    """What the lines before @data say; None = nothing."""

    labelled: bool | None = None
    classes: list[str] = field(default_factory=list)
    channels: int | None = None
    length: int | None = None
    equal: bool | None = None


def parse_ts(text: str, source: str) -> Cases:
    """The series in the text of a .ts file.

    A case is a line: channels apart by ":", values by ",", the class last. "?" and NaN are missing values. Series may
    differ in length, the channels of one series may not.

    Raises:
        UserError: what does not fit the format, with the number of the line.
    """
    lines = text.splitlines()
    header, first = _read_header(lines, source)
    values: list[np.ndarray] = []
    labels: list[str] = []
    for number, line in enumerate(lines[first:], first + 1):
        line = line.strip()
        if not line or line.startswith(("#", "%")):
            continue
        where = f"{source}, line {number}"
        parts = line.split(":")
        if header.labelled:
            label = parts.pop().strip()
            if label not in header.classes:
                raise UserError(
                    f"{where}: {label[:40]!r} is none of the classes that @classLabel declares: "
                    f"{', '.join(header.classes)}"
                )
            labels.append(label)
        values.append(_channels(parts, where))
        shape = values[-1].shape
        wanted = header.channels or values[0].shape[1]
        if shape[1] != wanted:
            raise UserError(f"{where}: {shape[1]} channels, where the others have {wanted}")
        if header.equal and shape[0] != (header.length or len(values[0])):
            raise UserError(
                f"{where}: {shape[0]} steps, where the header says that all series have "
                f"{header.length or len(values[0])}"
            )
    if not values:
        raise UserError(f"{source} holds no series after @data")
    return Cases(
        values=values,
        labels=labels if header.labelled else None,
        names=[str(i + 1) for i in range(len(values))],
        channels=[str(i + 1) for i in range(values[0].shape[1])],
        source=source,
        classes=header.classes,
    )


def _read_header(lines: Sequence[str], source: str) -> tuple[_Header, int]:
    """The header and the index of the first line after @data."""
    header = _Header()
    for number, line in enumerate(lines, 1):
        line = line.strip()
        if not line or line.startswith(("#", "%")):
            continue
        where = f"{source}, line {number}"
        if not line.startswith("@"):
            raise UserError(f"{where}: series begin before @data; a .ts file has a header that ends with @data")
        word, *rest = line.split()
        name = word.lower()
        if name == "@data":
            if header.labelled is None:
                raise UserError(f"{source}: the header has no @classLabel line")
            return header, number
        if name in ("@timestamps", "@univariate", "@equallength", "@classlabel", "@targetlabel", "@missing"):
            if not rest or rest[0].lower() not in ("true", "false"):
                raise UserError(f"{where}: {word} must be followed by true or false")
            yes = rest[0].lower() == "true"
            if name == "@timestamps" and yes:
                raise UserError(f"{where}: series with time stamps are not read; write the values alone")
            if name == "@targetlabel" and yes:
                raise UserError(f"{where}: @targetLabel is for regression; classification needs @classLabel")
            if name == "@univariate" and yes:
                header.channels = 1
            if name == "@equallength":
                header.equal = yes
            if name == "@classlabel":
                header.labelled, header.classes = yes, rest[1:]
                if yes and not header.classes:
                    raise UserError(f"{where}: @classLabel true must be followed by the names of the classes")
                if len(set(header.classes)) < len(header.classes):
                    raise UserError(f"{where}: @classLabel names a class twice")
        elif name in ("@dimensions", "@dimension", "@serieslength"):
            if len(rest) != 1 or not rest[0].isdecimal() or int(rest[0]) < 1:
                raise UserError(f"{where}: {word} must be followed by a whole number above 0")
            if name == "@serieslength":
                header.length = int(rest[0])
            else:
                header.channels = int(rest[0])
    raise UserError(f"{source} has no @data line, so it is no .ts file")


def _channels(parts: Sequence[str], where: str) -> np.ndarray:
    """(steps, channels) of the channels of a case."""
    columns = []
    for place, part in enumerate(parts, 1):
        if "(" in part:
            raise UserError(f"{where}: series with time stamps are not read; write the values alone")
        try:
            column = np.array(part.split(","), dtype=np.float64)
        except ValueError:
            column = np.array([_number(word, f"{where}, channel {place}") for word in part.split(",")])
        if np.isinf(column).any():
            raise UserError(f"{where}, channel {place}: a value is infinite")
        columns.append(column)
    lengths = {len(column) for column in columns}
    if not columns or (lengths == {1} and not any(part.strip() for part in parts)):
        raise UserError(f"{where}: a series without values")
    if len(lengths) > 1:
        raise UserError(f"{where}: channels of different lengths ({', '.join(map(str, sorted(lengths)))} steps)")
    return np.stack(columns, axis=1)


def _number(word: str, where: str) -> float:
    word = word.strip()
    if word.lower() in _MISSING:
        return math.nan
    try:
        return float(word)
    except ValueError:
        raise UserError(f"{where}: {word[:40]!r} is no number") from None


# -- CSV --------------------------------------------------------------------------------------------------------------


def csv_columns(header: Sequence[str], args: ClassifyDataConfig) -> dict[str, str | None]:
    """The columns of ids, labels, times and splits among those of a CSV: as named, else by the usual names."""
    lower = {name.strip().lower(): name for name in reversed(header)}
    wanted = {
        "id": (args.id_column, ID_NAMES),
        "label": (args.label_column, LABEL_NAMES),
        "time": (args.time_column, TIME_NAMES),
        "split": (args.split_column, SPLIT_NAMES),
    }
    return {
        part: given or next((lower[name] for name in usual if name in lower), None)
        for part, (given, usual) in wanted.items()
    }


def parse_csv(text: str, source: str, args: ClassifyDataConfig) -> Cases:
    """The series in the text of a CSV with one row a step.

    Raises:
        UserError: what does not fit, with the number of the line.
    """
    rows = list(_csv_rows(text, source, args))
    if not rows:
        raise UserError(f"{source} is empty")
    (_, header), *body = rows
    header = [name.strip() for name in header]
    if len(set(header)) < len(header):
        raise UserError(f"{source}: two columns have the same name")
    found = csv_columns(header, args)
    for part, name in found.items():
        if name is not None and name not in header:
            raise UserError(f"{source} has no column {name!r} for the {part}; its columns: {', '.join(header)}")
    if found["id"] is None:
        raise UserError(
            f"{source} has no column that names the series ({', '.join(ID_NAMES[:4])} …); name it with "
            f"--data_args.id_column"
        )
    for number, row in body:
        if len(row) != len(header):
            raise UserError(f"{source}, line {number}: {len(row)} fields, where the header has {len(header)}")
    place = {name: i for i, name in enumerate(header)}
    used = {name for name in found.values() if name is not None}
    channels = _channel_names(header, used, place, body, source, args)
    groups: dict[str, list[tuple[int, list[str]]]] = {}
    for number, row in body:
        groups.setdefault(row[place[found["id"]]].strip(), []).append((number, row))
    if not groups:
        raise UserError(f"{source} has a header and no rows")
    cases = Cases(values=[], labels=None if found["label"] is None else [], names=[], channels=channels, source=source)
    cases.splits = None if found["split"] is None else []
    for name, group in groups.items():
        where = f"{source}, series {name!r}"
        if found["time"] is not None:
            group = _in_time(group, place[found["time"]], where)
        cases.names.append(name)
        cases.values.append(
            np.array(
                [[_cell(row[place[c]], f"{source}, line {n}, column {c!r}") for c in channels] for n, row in group]
            )
        )
        if cases.labels is not None:
            cases.labels.append(_only(group, place[found["label"] or ""], where, "classes"))
        if cases.splits is not None:
            said = _only(group, place[found["split"] or ""], where, "splits")
            if said.lower() not in _SPLITS:
                raise UserError(f"{where}: the split must be train, val or test, got {said!r}")
            cases.splits.append(_SPLITS[said.lower()])
    cases.classes = sorted(set(cases.labels or []), key=_natural)
    return cases


def _csv_rows(text: str, source: str, args: ClassifyDataConfig) -> Iterable[tuple[int, list[str]]]:
    if args.delimiter is not None and args.delimiter not in _DELIMITERS:
        raise UserError(f"data_args.delimiter must be one of {', '.join(_DELIMITERS)}, got {args.delimiter!r}")
    head = text.split("\n", 1)[0]
    mark = _DELIMITERS[args.delimiter] if args.delimiter else max(",;\t|", key=head.count)
    reader = csv.reader(io.StringIO(text), delimiter=mark, strict=True)
    try:
        for row in reader:
            if any(word.strip() for word in row):
                yield reader.line_num, row
    except csv.Error as error:
        raise UserError(f"{source}, line {reader.line_num}: {error}") from None


def _channel_names(
    header: Sequence[str],
    used: set[str],
    place: dict[str, int],
    body: Sequence[tuple[int, list[str]]],
    source: str,
    args: ClassifyDataConfig,
) -> list[str]:
    if args.columns is not None:
        missing = [name for name in args.columns if name not in header]
        if missing:
            raise UserError(f"{source} has no column {missing[0]!r}; its columns: {', '.join(header)}")
        return list(args.columns)
    channels = [
        name
        for name in header
        if name not in used and all(_is_number(row[place[name]]) for _, row in body[:100]) and body
    ]
    if not channels:
        raise UserError(f"{source} has no column of numbers beside {', '.join(sorted(used))}")
    return channels


def _is_number(word: str) -> bool:
    word = word.strip()
    if word.lower() in _MISSING:
        return True
    try:
        float(word)
    except ValueError:
        return False
    return True


def _cell(word: str, where: str) -> float:
    value = _number(word, where)
    if math.isinf(value):
        raise UserError(f"{where}: a value is infinite")
    return value


def _only(group: Sequence[tuple[int, list[str]]], place: int, where: str, what: str) -> str:
    found = list(dict.fromkeys(row[place].strip() for _, row in group))
    if len(found) > 1:
        raise UserError(f"{where} has several {what}: {', '.join(map(repr, found[:4]))}")
    if not found[0] and what == "classes":
        raise UserError(f"{where} has no class")
    return found[0]


def _in_time(group: list[tuple[int, list[str]]], place: int, where: str) -> list[tuple[int, list[str]]]:
    """The rows of a series in the order of their times, which are numbers or ISO dates."""
    words = [row[place].strip() for _, row in group]
    keys: list[float] | list[np.datetime64]
    try:
        keys = [float(word) for word in words]
        if not all(math.isfinite(key) for key in keys):
            raise UserError(f"{where}: a row has no time")
    except ValueError:
        try:
            keys = [np.datetime64(word.replace(" ", "T")) for word in words]
        except ValueError:
            raise UserError(f"{where}: times must be numbers or ISO dates, got {words[0]!r}") from None
        if any(np.isnat(key) for key in keys):
            raise UserError(f"{where}: a row has no time") from None
    if len(set(keys)) < len(keys):
        raise UserError(f"{where}: a time occurs twice")
    return [group[i] for i in sorted(range(len(group)), key=lambda i: keys[i])]


def _natural(label: str) -> tuple[int, float, str]:
    """Numbers in their order, then words in theirs."""
    try:
        return (0, float(label), label)
    except ValueError:
        return (1, 0.0, label)
