"""Recordings of one's own: a CSV that names files, subjects and labels."""

from __future__ import annotations

import csv
import math
from pathlib import Path

from attn_eeg.data.channels import electrode
from attn_eeg.data.options import EegDataConfig
from attn_eeg.data.readers import SUFFIXES, read_file
from attn_eeg.data.recording import Corpus, Recording
from attn_shared.errors import UserError

NAME = "recordings.csv"
_NEEDED, _KNOWN = ("file", "subject"), ("file", "subject", "session", "trial", "start", "stop")
_MOST_CLASSES = 50


def find(path: Path) -> Path:
    """The manifest that `path` is or holds.

    Raises:
        UserError: there is none.
    """
    if path.is_dir():
        if not (path / NAME).is_file():
            raise UserError(
                f"{path} holds no {NAME}; write one with the columns file, subject and label, a row a recording"
            )
        return path / NAME
    return path


def load(path: Path, args: EegDataConfig) -> Corpus:
    """Read every recording that the manifest names.

    Raises:
        UserError: a column or a file is missing, a value cannot be, or there are not two classes; names the line.
    """
    rows, label = _rows(path, args.label)
    names = sorted({row[label] for _, row in rows}, key=_natural)
    if not 2 <= len(names) <= _MOST_CLASSES:
        raise UserError(
            f"{path}: column {label!r} has {len(names)} different values, and a class each can be made of 2 to "
            f"{_MOST_CLASSES}"
        )
    recordings, whole = [], {}
    for number, (line, row) in enumerate(rows, start=1):
        where = f"{path}:{line}"
        file = path.parent / row["file"]
        if file not in whole:
            try:
                whole[file] = read_file(file, channels=args.channels, rate=args.rate)
            except UserError as error:
                raise UserError(f"{where}: {error}") from None
        part = whole[file]
        start, stop = _seconds(row, "start", 0.0, where), _seconds(row, "stop", math.inf, where)
        first, last = round(start * part.sfreq), min(part.data.shape[1], round(min(stop, 1e9) * part.sfreq))
        if last <= first:
            raise UserError(
                f"{where}: {start:g} to {stop:g} s holds nothing of {file.name}, which lasts "
                f"{part.data.shape[1] / part.sfreq:g} s"
            )
        recordings.append(
            Recording(
                subject=row["subject"],
                session=row.get("session") or "1",
                trial=row.get("trial") or str(number),
                data=part.data[:, first:last],
                sfreq=part.sfreq,
                channels=list(part.channels),
                label=names.index(row[label]),
                source=str(file),
                notes=list(part.notes),
            )
        )
    return Corpus(
        name=path.parent.name if path.name == NAME else path.stem, classes=names, recordings=recordings, label=label
    )


def check(path: Path) -> list[str]:
    """What is wrong with a manifest and its files, or with one recording, a sentence each."""
    if path.suffix.lower() != ".csv" and path.is_file():
        return read_file(path, rate=128.0).notes if path.suffix.lower() == ".arff" else read_file(path).notes
    path = find(path)
    rows, label = _rows(path, "")
    problems: list[str] = []
    subjects: dict[str, set[str]] = {}
    electrodes: dict[str, set[str]] = {}
    for line, row in rows:
        subjects.setdefault(row["subject"], set()).add(row[label])
        try:
            part = read_file(path.parent / row["file"])
        except UserError as error:
            problems.append(f"{path.name}:{line}: {error}")
            continue
        electrodes[row["file"]] = {electrode(name) for name in part.channels}
        problems += [f"{row['file']}: {note}" for note in dict.fromkeys(part.notes)]
    if len(subjects) < 2:
        problems.append("all recordings are of one subject: a split by subject needs at least two")
    elif all(len(labels) == 1 for labels in subjects.values()):
        problems.append(
            "no subject has more than one label: what tells subjects apart will look like what tells labels apart"
        )
    shared = set.intersection(*electrodes.values()) if electrodes else set()
    if len({frozenset(e) for e in electrodes.values()}) > 1:
        problems.append(f"recordings differ in their electrodes; {len(shared)} are in all of them")
    return problems


def _rows(path: Path, label: str) -> tuple[list[tuple[int, dict[str, str]]], str]:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise UserError(f"{path}: no such file or folder") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read as UTF-8 text: {error}") from None
    head = text.split("\n", 1)[0]
    reader = csv.DictReader(text.splitlines(), delimiter=max(",;\t", key=head.count))
    columns = [name.strip() for name in reader.fieldnames or []]
    reader.fieldnames = columns
    others = [name for name in columns if name and name not in _KNOWN]
    label = label or ("label" if "label" in columns else others[0] if len(others) == 1 else "label")
    lacking = [name for name in (*_NEEDED, label) if name not in columns]
    if lacking:
        raise UserError(
            f"{path} lacks the column{'s' if len(lacking) > 1 else ''} {', '.join(lacking)}; it has "
            f"{', '.join(columns) or 'none'}"
        )
    rows = []
    for line, row in enumerate(reader, start=2):
        clean = {
            name: (value or "").strip()
            for name, value in row.items()
            if name is not None and not isinstance(value, list)
        }
        if not any(clean.values()):
            continue
        empty = [name for name in (*_NEEDED, label) if not clean.get(name)]
        if empty:
            raise UserError(f"{path}:{line}: column {empty[0]} is empty")
        if Path(clean["file"]).suffix.lower() not in SUFFIXES:
            raise UserError(f"{path}:{line}: {clean['file']} is none of {', '.join(SUFFIXES)}")
        rows.append((line, clean))
    if not rows:
        raise UserError(f"{path} names no recording")
    return rows, label


def _seconds(row: dict[str, str], column: str, default: float, where: str) -> float:
    text = row.get(column, "")
    if not text:
        return default
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not value >= 0:
        raise UserError(f"{where}: {column} is {text!r}; give seconds from the recording's start")
    return value


def _natural(text: str) -> tuple[int, float, str]:
    try:
        return 0, float(text), text
    except ValueError:
        return 1, 0.0, text
