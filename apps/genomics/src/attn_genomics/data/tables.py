"""Tables of sequences or of coordinates: CSV and TSV, packed or not."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pandas as pd

from attn_genomics.data.fasta import AMINO_ACIDS, NUCLEOTIDES, Sequences, is_gzip, open_bytes
from attn_genomics.data.places import STRANDS, Places
from attn_genomics.tokens import encode
from attn_shared.csvtext import Cells, read_cells
from attn_shared.errors import UserError

_MOST_COLUMNS = 1000
ROLES = {
    "sequence": ("sequence", "seq", "dna", "dnasequence", "sequences"),
    "label": ("label", "labels", "class", "target", "y"),
    "split": ("split", "part", "partition", "set", "subset"),
    "chrom": ("chrom", "chr", "chromosome", "region", "seqname", "seqnames", "contig"),
    "start": ("start", "chromstart", "begin"),
    "end": ("end", "chromend", "stop"),
    "strand": ("strand",),
    "name": ("id", "name", "index"),
}
"""Role of a column -> the names, in lower case and without _ and blanks, by which it is found."""
_PLACE = ("chrom", "start", "end")
PARTS = {"train": 0, "training": 0, "val": 1, "valid": 1, "validation": 1, "dev": 1, "test": 2, "testing": 2}


@dataclass(kw_only=True)
class Table:
    """What a table holds: sequences or places.

    Attributes:
        source: name of the file.
        sequences: of every row; None where the table has coordinates.
        places: of every row, where the table has coordinates.
        label: (N,) text; None where there is none.
        part: (N,) 0, 1, 2; None where the table does not say it.
        name: (N,) text; None where there is no such column.
        line: (N,) of the file.
        notes: how it was read.
    """

    source: str
    sequences: Sequences | None
    places: Places | None
    label: np.ndarray | None
    part: np.ndarray | None
    name: np.ndarray | None
    line: np.ndarray
    notes: list[str] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.line)


def read_table(
    path: Path,
    *,
    columns: Mapping[str, str | None] | None = None,
    delimiter: str | None = None,
) -> Table:
    """A table with a column of sequences, or with columns of coordinates (from 0, the end excluded).

    Args:
        columns: role -> name of the column, for the roles "sequence", "label" and "split"; None or missing = found.
        delimiter: "," ";" "tab" "|"; None = found.

    Raises:
        UserError: no such table, with file and line.
    """
    cells = _cells(path, delimiter)
    frame, notes = cells.frame.reset_index(drop=True), list(cells.notes)
    found = _roles(cells, frame, columns or {}, notes)
    line = np.arange(2, len(frame) + 2) if cells.lines is None else np.asarray(cells.lines)
    sequences = _sequences(cells, frame[found["sequence"]]) if "sequence" in found else None
    places = None if sequences is not None else _places(cells, frame, found, line)
    return Table(
        source=path.name,
        sequences=sequences,
        places=places,
        label=_labels(cells, frame[found["label"]]) if "label" in found else None,
        part=_split(cells, frame[found["split"]], bool((columns or {}).get("split")), notes)
        if "split" in found
        else None,
        name=frame[found["name"]].fillna("").to_numpy(str) if "name" in found else None,
        line=line,
        notes=[f"{path.name}: {note}" for note in notes],
    )


def _cells(path: Path, delimiter: str | None) -> Cells:
    """Every cell as text, so that nothing is changed by being taken for a number."""
    with open_bytes(path):
        pass
    if not is_gzip(path):
        return _read(path, delimiter)
    with tempfile.TemporaryDirectory() as folder:
        plain = Path(folder) / path.name.removesuffix(".gz")
        try:
            with open_bytes(path) as packed, plain.open("wb") as file:
                shutil.copyfileobj(packed, file)
        except (EOFError, OSError, ValueError) as error:
            raise UserError(f"{path.name} is damaged or cut off: it cannot be unpacked ({error})") from None
        return _read(plain, delimiter)


class _Any(set[str]):
    """All columns."""

    def __contains__(self, name: object) -> bool:
        return True


def _read(path: Path, delimiter: str | None) -> Cells:
    return read_cells(path, delimiter=delimiter, text_columns=_Any(), only=None, max_columns=_MOST_COLUMNS)


def _plain(name: str) -> str:
    return "".join(letter for letter in name.lower() if letter not in "_ -.#")


def _roles(cells: Cells, frame: pd.DataFrame, columns: Mapping[str, str | None], notes: list[str]) -> dict[str, str]:
    names = [str(name) for name in frame.columns]
    listed = ", ".join(names[:12]) + (", …" if len(names) > 12 else "")
    found: dict[str, str] = {}
    for role, wanted in columns.items():
        if wanted is not None:
            if wanted not in names:
                raise UserError(f"{cells.source} has no column {wanted!r}; its columns are {listed}")
            found[role] = wanted
    for role, known in ROLES.items():
        free = [name for name in names if name not in found.values()]
        named = [name for one in known for name in free if _plain(name) == one]
        if role not in found and named:
            found[role] = named[0]
    if "sequence" in found or all(role in found for role in _PLACE):
        return found
    if any(_looks_like_dna(name) for name in names):
        raise UserError(
            f"{cells.source}:1: the first line holds a sequence, not names; add a line such as sequence,label"
        )
    for name in names:
        if name not in found.values() and _is_dna(frame[name]):
            notes.append(f"sequences are taken from column {name!r}")
            return found | {"sequence": name}
    partly = [role for role in _PLACE if role in found]
    if partly:
        missing = next(role for role in _PLACE if role not in found)
        raise UserError(f"{cells.source} has columns {listed}: for coordinates there is none of {missing}")
    raise UserError(
        f"{cells.source} has no column of sequences and none of coordinates; its columns are {listed} (name one by "
        "--data_args.sequence_column)"
    )


def _is_dna(column: pd.Series) -> bool:
    head = column.dropna().head(100).astype(str)
    return bool(len(head)) and all(map(_looks_like_dna, head))


def _looks_like_dna(text: str) -> bool:
    """The letters of ambiguous bases would make words of it, such as `start`."""
    return len(text) > 4 and not text.upper().strip("ACGTUN")


def _sequences(cells: Cells, column: pd.Series) -> Sequences:
    if column.isna().any():
        raise UserError(f"{cells.where(int(column.isna().to_numpy().argmax()))}: no sequence")
    return Sequences([sequence(text.encode("utf-8", "replace"), cells.where(row)) for row, text in enumerate(column)])


def sequence(text: bytes, where: str) -> np.ndarray:
    """One sequence's letters -> uint8 codes.

    Args:
        where: of it, for messages.

    Raises:
        UserError: empty, or a letter that is no nucleotide's.
    """
    raw = text.strip()
    strange = raw.translate(None, NUCLEOTIDES)
    if strange:
        kind = "; these are proteins, not DNA" if strange[:1] in AMINO_ACIDS else ""
        raise UserError(f"{where}: {strange[:1].decode('latin-1')!r} is no nucleotide{kind}")
    if not raw:
        raise UserError(f"{where}: no sequence")
    return encode(raw)


def _labels(cells: Cells, column: pd.Series) -> np.ndarray:
    """Text; whole numbers without a decimal point, so that "1" and "1.0" are one class."""
    if column.isna().any():
        raise UserError(f"{cells.where(int(column.isna().to_numpy().argmax()))}: no label")
    text = column.astype(str).str.strip()
    number = pd.to_numeric(text, errors="coerce")
    if number.notna().all():
        if (number % 1 != 0).any():
            row = int((number % 1 != 0).to_numpy().argmax())
            raise UserError(f"{cells.where(row)}: label {text[row]} is no class but a measured number")
        return number.astype(np.int64).astype(str).to_numpy(str)
    return text.to_numpy(str)


def _split(cells: Cells, column: pd.Series, named: bool, notes: list[str]) -> np.ndarray | None:
    text = column.fillna("").astype(str).str.strip().str.lower()
    part = text.map(PARTS)
    if part.notna().all():
        return part.to_numpy(np.int64)
    row = int(part.isna().to_numpy().argmax())
    if named:
        raise UserError(f"{cells.where(row)}: {column[row]!r} is none of train, dev (or val) and test")
    notes.append(f"column {column.name!r} is not taken for a split: {column[row]!r} is none of train, dev and test")
    return None


def _places(cells: Cells, frame: pd.DataFrame, found: Mapping[str, str], line: np.ndarray) -> Places:
    def whole(role: str) -> np.ndarray:
        number = pd.to_numeric(frame[found[role]], errors="coerce")
        bad = (number.isna() | (number % 1 != 0)).to_numpy()
        if bad.any():
            row = int(bad.argmax())
            raise UserError(f"{cells.where(row)}: {role} {frame[found[role]][row]!r} is no whole number")
        return number.to_numpy(np.int64)

    chrom = frame[found["chrom"]]
    if chrom.isna().any():
        raise UserError(f"{cells.where(int(chrom.isna().to_numpy().argmax()))}: no name of a chromosome")
    start, end = whole("start"), whole("end")
    for bad, text in ((start < 0, "start lies before the record"), (end <= start, "end is not behind start")):
        if bad.any():
            raise UserError(f"{cells.where(int(bad.argmax()))}: {text} (coordinates count from 0, the end excluded)")
    strand: np.ndarray = np.zeros(len(frame), np.int8)
    if "strand" in found:
        written = frame[found["strand"]].fillna(".").astype(str).str.strip()
        way = written.map(STRANDS)
        if way.isna().any():
            row = int(way.isna().to_numpy().argmax())
            raise UserError(f"{cells.where(row)}: strand {written[row]!r} is none of + - .")
        strand = way.to_numpy(np.int8)
    return Places(
        source=cells.source,
        chrom=chrom.astype(str).str.strip().to_numpy(object),
        start=start,
        end=end,
        strand=strand,
        name=np.full(len(frame), "", object),
        line=line,
    )
