"""Bags from data sets, tables, folders of feature files, and single feature files."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from attn_medseg.pathology import features, tables
from attn_medseg.pathology.bags import cards
from attn_medseg.pathology.bags.corpus import Bag, Corpus
from attn_medseg.pathology.bags.options import BagsDataConfig
from attn_medseg.pathology.splits import part_of
from attn_shared import datasets
from attn_shared.errors import UserError

_MOST_NAMES = 4
_MOST_COLUMNS = 100_000
_UNKNOWN = -1


def load_corpus(data: str, args: BagsDataConfig, *, classes: Sequence[str] = ()) -> Corpus:
    """The bags of a data set, a table or a folder.

    Args:
        data: name of a data set, or path.
        args: the options.
        classes: of a trained model, whose numbers labels then have; empty = as found.

    Raises:
        UserError: it cannot be read, or holds no bags.
    """
    if data == "synthetic_bags":
        from attn_medseg.pathology.bags.synthetic import synthetic

        return _renumbered(synthetic(), classes)
    if data in cards.DATASETS:
        card = cards.DATASETS[data]
        return _renumbered(read_mat(datasets.locate(card) / card.files[0].path), classes)
    return _renumbered(read_path(Path(data).expanduser(), args), classes)


def read_path(path: Path, args: BagsDataConfig) -> Corpus:
    """The bags of a file or folder of the user's own; labels may be missing."""
    suffix = path.suffix.lower()
    if path.is_dir():
        found = tables.tables_in(path)
        return read_slides(found[0], args) if found else read_features(sorted(features.listing(path).values()))
    if suffix == ".mat":
        return read_mat(path)
    if suffix in features.SUFFIXES:
        return read_features([path])
    if suffix not in (".csv", ".tsv"):
        known = ", ".join(cards.FILE_SUFFIXES)
        raise UserError(f"{path.name} holds no bags: it is no table and no file of features ({known})")
    columns = tables.header(path)
    wide = [one for one in columns if one not in (*tables.NAMES, *tables.PATIENTS, tables.LABEL, "instance", "part")]
    # A list of slides has no features of its own, or words beside them.
    if args.features or (tables.first(("slide_id", "slide"), columns) and (not wide or features.listing(path.parent))):
        return read_slides(path, args)
    return read_table(path, args)


# -- tables -----------------------------------------------------------------------------------------------------------


def read_table(path: Path, args: BagsDataConfig) -> Corpus:
    """A CSV or TSV with a line for each instance: bag, label, features.

    Raises:
        UserError: it is none, or a bag has several labels or patients; with file and line.
    """
    from attn_shared.csvtext import read_cells

    columns = tables.header(path)
    name = tables.first(tables.NAMES, columns)
    if name is None:
        raise UserError(f"{path.name} has no column called {' or '.join(tables.NAMES)}, which name the bag of a line")
    label, patient = _columns(columns, args, path)
    others = {one for one in ("instance", "part") if one in columns}
    text = {name, *others, *(one for one in (label, patient) if one)}
    cells = read_cells(path, delimiter=None, text_columns=text, only=None, max_columns=_MOST_COLUMNS)
    wide = [one for one in cells.frame.columns if one not in text]
    if not wide:
        raise UserError(f"{path.name} has no columns of features beside {', '.join(sorted(text))}")
    values = np.empty((len(cells.frame), len(wide)), np.float32)
    for place, one in enumerate(wide):
        column = cells.frame[one]
        numbers = column if column.dtype.kind in "biuf" else cells.numbers(column)
        values[:, place] = numbers.to_numpy(np.float32, na_value=np.nan)
        bad = np.flatnonzero(~np.isfinite(values[:, place]))
        if len(bad):
            raise UserError(f"{cells.where(int(bad[0]))}: {one} is {column.iloc[bad[0]]!r}, not a finite number")
    rows: dict[str, list[int]] = {}
    told = {one: cells.frame[one].fillna("").astype(str).str.strip().tolist() for one in text}
    for row, bag in enumerate(told[name]):
        if not bag:
            raise UserError(f"{cells.where(row)}: no {name}")
        rows.setdefault(bag, []).append(row)

    def constant(column: str, bag: str) -> str:
        found = {told[column][row]: row for row in reversed(rows[bag])}
        if len(found) > 1:
            raise UserError(f"{cells.where(max(found.values()))}: {bag} has several values of {column}")
        return next(iter(found))

    labels = {bag: constant(label, bag) if label else "" for bag in rows}
    classes = _classes(labels.values())
    bags = [
        Bag(
            name=bag,
            patient=(constant(patient, bag) if patient else "") or bag,
            label=classes.index(labels[bag]) if labels[bag] else _UNKNOWN,
            instances=values[own],
            part=part_of(constant("part", bag), path) if "part" in others else "",
            names=tuple(told["instance"][row] for row in own) if "instance" in others else (),
        )
        for bag, own in rows.items()
    ]
    return Corpus(bags=tuple(bags), classes=classes, normalise="zscore", notes=tuple(cells.notes))


def read_slides(path: Path, args: BagsDataConfig) -> Corpus:
    """A CSV of slide_id and label (and case_id), with a feature file for each slide.

    Raises:
        UserError: no column of slides, a slide twice, or no feature file at all.
    """
    from attn_shared.csvtext import read_cells

    columns = tables.header(path)
    name = tables.first(tables.NAMES, columns)
    if name is None:
        raise UserError(f"{path.name} has no column called {' or '.join(tables.NAMES)}, which name the slides")
    label, patient = _columns(columns, args, path)
    cells = read_cells(path, delimiter=None, text_columns=set(columns), only=None, max_columns=_MOST_COLUMNS)
    folder = Path(args.features).expanduser() if args.features else path.parent
    if not folder.is_dir():
        raise UserError(f"there is no folder {folder}; --data_args.features names the folder of the feature files")
    files = features.listing(folder)
    frame = cells.frame.fillna("").astype(str)
    slides = [features.name_of(one.strip()) for one in frame[name]]
    for row, slide in enumerate(slides):
        if slide in slides[:row]:
            raise UserError(f"{cells.where(row)}: the slide {slide} is named twice")
    labels = [one.strip() for one in frame[label]] if label else [""] * len(slides)
    classes = _classes(labels)
    bags = [
        Bag(
            name=slide,
            patient=(frame[patient].iloc[row].strip() if patient else "") or slide,
            label=classes.index(labels[row]) if labels[row] else _UNKNOWN,
            instances=files[slide],
            part=part_of(frame["part"].iloc[row], path) if "part" in columns else "",
        )
        for row, slide in enumerate(slides)
        if slide in files
    ]
    if not bags:
        raise UserError(
            f"{folder} has no feature file of any slide in {path.name}; they are called like the slides, such as "
            f"{slides[0]}.npy, or --data_args.features names their folder"
        )
    notes = list(cells.notes)
    notes += _listed([one for one in slides if one not in files], "slides have a line but no feature file", "left out")
    notes += _listed(sorted(set(files) - set(slides)), "feature files have no line", "left out")
    return Corpus(bags=tuple(bags), classes=classes, normalise="none", notes=tuple(notes))


def read_features(paths: Sequence[Path]) -> Corpus:
    """Feature files without a table: bags without labels."""
    bags = [Bag(name=features.name_of(p.stem), patient=p.stem, label=_UNKNOWN, instances=p) for p in paths]
    return Corpus(bags=tuple(bags), classes=(), normalise="none")


def read_mat(path: Path) -> Corpus:
    """A MATLAB file of bag_ids, labels and features, as the classic sets are kept.

    Raises:
        UserError: it cannot be read, or holds something else.
    """
    from scipy import io, sparse

    try:
        loaded = io.loadmat(path, variable_names=("bag_ids", "labels", "features"))
    except Exception as error:  # scipy raises whatever a damaged file leads to
        raise UserError(f"{path.name} cannot be read as a MATLAB file: {str(error).splitlines()[0]}") from None

    def dense(name: str) -> NDArray[np.float64]:
        if name not in loaded:
            raise UserError(f"{path.name} has no {name}; a set of bags has bag_ids, labels and features")
        value = loaded[name]
        return np.asarray(value.toarray() if sparse.issparse(value) else value, dtype=np.float64)

    ids, labels = dense("bag_ids").ravel(), dense("labels").ravel()
    values = features.checked(dense("features"), path.name)
    if not len(ids) == len(labels) == len(values):
        raise UserError(f"{path.name}: {len(ids)} bag_ids, {len(labels)} labels and {len(values)} rows of features")
    bags = []
    for number in dict.fromkeys(ids.tolist()):
        own = ids == number
        bags.append(
            Bag(
                name=f"{path.stem}_{int(number):03d}",
                patient=f"{int(number)}",
                label=int((labels[own] > 0).any()),
                instances=values[own],
            )
        )
    return Corpus(bags=tuple(bags), classes=("negative", "positive"), normalise="zscore")


# -- labels -----------------------------------------------------------------------------------------------------------


def _columns(columns: list[str], args: BagsDataConfig, path: Path) -> tuple[str | None, str | None]:
    """Columns of label and patient."""
    for option, given in (("label", args.label), ("patient", args.patient)):
        if given and given not in columns:
            raise UserError(f"{path.name} has no column {given!r}, which --data_args.{option} names")
    label = args.label or (tables.LABEL if tables.LABEL in columns else None)
    return label, args.patient or tables.first(tables.PATIENTS, columns)


def _classes(labels: Iterable[str]) -> tuple[str, ...]:
    """Names of the classes in order: by number where they are numbers, else by name."""
    found = sorted({one for one in labels if one})
    try:
        return tuple(sorted(found, key=float))
    except ValueError:
        return tuple(found)


def _listed(names: Sequence[str], what: str, done: str) -> list[str]:
    if not names:
        return []
    some = ", ".join(names[:_MOST_NAMES]) + (", …" if len(names) > _MOST_NAMES else "")
    return [f"{len(names)} {what}: {some}; {done}"]


def _renumbered(corpus: Corpus, classes: Sequence[str]) -> Corpus:
    """Labels as numbers of the given classes.

    Raises:
        UserError: a label that is none of them.
    """
    if not classes or tuple(classes) == corpus.classes:
        return corpus
    strange = [one for one in corpus.classes if one not in classes]
    if strange:
        raise UserError(f"the label {strange[0]!r} is none of the model's classes: {', '.join(classes)}")
    numbers: Mapping[int, int] = {old: list(classes).index(name) for old, name in enumerate(corpus.classes)}
    bags = tuple(dataclasses.replace(bag, label=numbers.get(bag.label, _UNKNOWN)) for bag in corpus.bags)
    return dataclasses.replace(corpus, bags=bags, classes=tuple(classes))
