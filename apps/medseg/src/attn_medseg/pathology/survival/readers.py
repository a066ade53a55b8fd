"""Patients from tables in the form of MCAT and MOTCat, with the feature files of their slides."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from attn_medseg.pathology import features, tables
from attn_medseg.pathology.splits import part_of
from attn_medseg.pathology.survival.corpus import Corpus, Patient
from attn_medseg.pathology.survival.options import SurvivalDataConfig
from attn_shared.errors import UserError

if TYPE_CHECKING:
    from attn_shared.csvtext import Cells

ENDS = ("_rnaseq", "_mut", "_cnv")
_SLIDES = ("slide_id", "slide")
_OTHERS = ("site", "age", "is_female", "oncotree_code", "train", "label", "part", "disc_label", "Unnamed: 0")
_SIGNATURES = "signatures.csv"
_MOST_NAMES = 4
_MOST_COLUMNS = 200_000


def load_corpus(data: str, args: SurvivalDataConfig) -> Corpus:
    """The patients of a data set, a table, or a folder that holds one.

    Raises:
        UserError: it cannot be read, or holds no patients.
    """
    if data == "synthetic_survival":
        from attn_medseg.pathology.survival.synthetic import synthetic

        return synthetic()
    return read_path(Path(data).expanduser(), args)


def read_path(path: Path, args: SurvivalDataConfig, *, known: bool = True) -> Corpus:
    """The patients of a table, or of a folder with one.

    Args:
        known: whether times must be told, as for training.

    Raises:
        UserError: it is no such table; with file and line where a line is wrong.
    """
    from attn_shared.csvtext import read_cells

    if path.is_dir():
        inside = [one for one in tables.tables_in(path) if tables.kind_of_table(one) == tables.SURVIVAL]
        if not inside:
            raise UserError(f"{path} holds no table with {' or '.join(tables.TIMES)} and {' or '.join(tables.STATES)}")
        path = inside[0]
    if not path.is_file():
        raise UserError(f"there is no file {path}")
    columns = tables.header(path)
    name = tables.first((*tables.PATIENTS, *_SLIDES), columns)
    time, state = tables.first(tables.TIMES, columns), tables.first(tables.STATES, columns)
    slide = tables.first(_SLIDES, columns)
    if name is None:
        raise UserError(f"{path.name} has no column called {' or '.join(tables.PATIENTS)}, which name the patients")
    if known and (time is None or state is None):
        raise UserError(
            f"{path.name} needs a column {' or '.join(tables.TIMES)} and a column {' or '.join(tables.STATES)}"
        )
    text = {name, *(one for one in (slide, "part") if one in columns)}
    cells = read_cells(path, delimiter=None, text_columns=text, only=None, max_columns=_MOST_COLUMNS)
    frame = cells.frame
    genes = [one for one in frame.columns if one.endswith(ENDS)]
    if not genes:
        taken = {*text, time, state, *_OTHERS, *tables.PATIENTS, *_SLIDES, *tables.TIMES, *tables.STATES}
        genes = [one for one in frame.columns if one not in taken and frame[one].dtype.kind in "biuf"]
    values = np.full((len(frame), len(genes)), math.nan)
    for place, one in enumerate(genes):
        column = frame[one] if frame[one].dtype.kind in "biuf" else cells.numbers(frame[one])
        values[:, place] = column.to_numpy(float, na_value=math.nan)
    values[~np.isfinite(values)] = math.nan
    files, missing = _files(path, args) if slide else {}, []
    rows: dict[str, list[int]] = {}
    names = frame[name].fillna("").astype(str).str.strip().tolist()
    for row, one in enumerate(names):
        if not one:
            raise UserError(f"{cells.where(row)}: no {name}")
        rows.setdefault(one, []).append(row)
    patients = []
    for one, own in rows.items():
        when, event = math.nan, False
        if time is not None and state is not None:
            told = {tuple(_number(cells, row, column, known) for column in (time, state)) for row in own}
            finite = {pair for pair in told if not math.isnan(sum(pair))}
            if len(finite) > 1:
                raise UserError(f"{cells.where(own[-1])}: {one} has several times or states in its lines")
            if finite:
                when, code = next(iter(finite))
                if when < 0 or code not in (0, 1):
                    raise UserError(f"{cells.where(own[0])}: {time} is {when:g} and {state} {code:g}; it takes 0 or 1")
                event = code == (0 if state == "censorship" else 1)
        slides = []
        for row in own if slide else ():
            label = features.name_of(str(frame[slide].iloc[row]).strip())
            if label in files:
                slides.append(files[label])
            elif label and label != "nan":
                missing.append(label)
        patients.append(
            Patient(
                name=one,
                time=when,
                event=event,
                genes=values[own[0]],
                slides=tuple(slides),
                part=part_of(frame["part"].iloc[own[0]], path) if "part" in columns else "",
            )
        )
    notes = list(cells.notes)
    if files and missing:
        some = ", ".join(missing[:_MOST_NAMES]) + (", …" if len(missing) > _MOST_NAMES else "")
        notes.append(f"{len(missing)} slides have a line but no feature file: {some}; left out")
    gaps = int(np.isnan(values).sum())
    if gaps:
        notes.append(f"{gaps} values of genes are missing; the mean of training stands for them")
    return Corpus(patients=tuple(patients), genes=tuple(genes), groups=_groups(path, args, genes), notes=tuple(notes))


def _number(cells: Cells, row: int, column: str, known: bool) -> float:
    value = cells.frame[column].iloc[row]
    try:
        found = float(value)
    except (TypeError, ValueError):
        found = math.nan
    if math.isnan(found) and known:
        raise UserError(f"{cells.where(row)}: {column} is {value!r}, not a number")
    return found


def _files(path: Path, args: SurvivalDataConfig) -> dict[str, Path]:
    """Name of a slide -> its feature file."""
    if not args.slides:
        return {}
    folder = Path(args.features).expanduser() if args.features else path.parent
    if not folder.is_dir():
        raise UserError(f"there is no folder {folder}; --data_args.features names the folder of the feature files")
    return features.listing(folder)


def _groups(path: Path, args: SurvivalDataConfig, genes: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """Groups of columns, by a file of signatures where there is one."""
    file = Path(args.signatures).expanduser() if args.signatures else path.parent / _SIGNATURES
    if not file.is_file():
        if args.signatures:
            raise UserError(f"there is no file {file}")
        found = {end[1:]: tuple(one for one in genes if one.endswith(end)) for end in ENDS}
        found = {name: own for name, own in found.items() if own}
        return found or ({"genes": tuple(genes)} if genes else {})
    import csv

    with file.open(encoding="utf-8-sig", newline="") as lines:
        table = list(csv.reader(lines))
    there = set(genes)
    groups = {}
    for place, name in enumerate(table[0] if table else ()):
        own = {row[place].strip() for row in table[1:] if len(row) > place and row[place].strip()}
        columns = sorted(gene + end for gene in own for end in ("", *ENDS) if gene + end in there)
        if columns:
            groups[name.strip()] = tuple(columns)
    if not groups and genes:
        raise UserError(f"{file.name} names no gene that is a column of {path.name}")
    return groups
