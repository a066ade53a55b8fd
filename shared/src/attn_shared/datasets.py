"""Finding, checking and fetching data sets by their cards, and the text of `data list | fetch | check`.

Imports no torch: these commands answer at once.
"""

from __future__ import annotations

import inspect
import os
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from attn_shared.app import App, DataCard, DataFile, load
from attn_shared.download import download, readable, sha256
from attn_shared.errors import UserError

_MOST_NAMES = 4  # files that a sentence lists


def data_root() -> Path:
    """The data folder: $ATTN_DATA, by default `data` in the current directory."""
    return Path(os.environ.get("ATTN_DATA") or "data").expanduser()


def folder(card: DataCard) -> Path:
    """Where the card's files lie, whether they are there or not."""
    return data_root() / card.subdir


def locate(card: DataCard) -> Path:
    """The folder that holds all files of the card, their sizes checked.

    Raises:
        UserError: a file is missing or has another size; the message says what to download, from where, and where to
            put it.
    """
    if missing := _missing(card):
        raise UserError(_not_there(card, missing))
    for file in card.files:
        if (problem := _wrong_size(card, file)) is not None:
            raise UserError(f"{problem}; move it away and get it anew: {how_to_get(card, [file])}")
    return folder(card)


def verify(card: DataCard) -> list[str]:
    """What is wrong with the card's files, a sentence each; empty when every byte is right.

    Sizes and SHA-256 are compared where the card knows them.
    """
    if not card.files and state_of(card) == "by hand":
        return [f"its files are not known here by checksum, so nothing can be verified: {card.manual}"]
    problems = [_not_there(card, missing)] if (missing := _missing(card)) else []
    for file in card.files:
        path = folder(card) / file.path
        if not path.is_file():
            continue
        if (size := _wrong_size(card, file)) is not None:
            problems.append(size)
        elif file.sha256 is not None and (found := _hash(path)) != file.sha256.lower():
            problems.append(f"{path} differs from the original: SHA-256 {found}, expected {file.sha256.lower()}")
    return problems


def fetch(card: DataCard) -> Path:
    """Download what is missing and verify it; the folder the files lie in.

    Files that are there are kept when they are right and never overwritten when they are not.

    Raises:
        UserError: a file that is there differs from the original, cannot be had, or must be got by hand.
    """
    if not card.files:
        return folder(card)
    by_hand = []
    for file in card.files:
        path = folder(card) / file.path
        if path.is_file():
            wrong = _wrong_size(card, file)
            if wrong is None and file.sha256 is not None and _hash(path) != file.sha256.lower():
                wrong = f"{path} differs from the original (its SHA-256 is another)"
            if wrong is not None:
                raise UserError(f"{wrong}; move it away and fetch again")
        elif file.url is None:
            by_hand.append(file)
        else:
            try:
                download(file.url, path, checksum=file.sha256, size=file.bytes)
            except UserError as error:
                raise UserError(f"{error}. By hand: {how_to_get(card, [file])}") from None
    if by_hand:
        raise UserError(f"data set {card.name!r} must be got by hand: {how_to_get(card, by_hand)}")
    return folder(card)


def how_to_get(card: DataCard, files: Sequence[DataFile]) -> str:
    """One sentence: what to download, from where, and where to put it."""
    steps = []
    urls = [file for file in files if file.url]
    if urls:
        steps += [f"download {file.url} to {folder(card) / file.path}" for file in urls]
    rest = [file for file in files if not file.url]
    if rest:
        names = ", ".join(str(folder(card) / file.path) for file in rest[:_MOST_NAMES])
        names += f" and {len(rest) - _MOST_NAMES} more files like these" if len(rest) > _MOST_NAMES else ""
        steps.append(f"{card.manual or f'get it from {card.source}'}, so that there is {names}")
    sentence = "; ".join(steps)
    if urls:
        sentence += f" (`data fetch {card.name}` does this)"
    if "ATTN_DATA" not in os.environ:
        sentence += ", or name the folder that holds your data in ATTN_DATA"
    return sentence


def state_of(card: DataCard) -> str:
    """One word or two for the list: whether the data can be used now."""
    if card.synthetic:
        return "synthetic"
    if card.embedded or not card.files:
        return "by hand" if card.manual and not card.embedded else "built in"
    here = sum((folder(card) / file.path).is_file() for file in card.files)
    if here == len(card.files):
        return "here" if all(_wrong_size(card, file) is None for file in card.files) else "damaged"
    if here:
        return f"{here}/{len(card.files)} files"
    return "can be fetched" if all(file.url for file in card.files) else "by hand"


def list_data(app: App) -> str:
    """The text of `data list`: every data set, whether it is here, and how one's own files must look."""
    rows = [["NAME", *(["KIND"] if app.several else []), "STATE", "SIZE", "TITLE"]]
    for card in app.datasets.values():
        kind = [app.kind(card.name).name] if app.several else []
        rows.append([card.name, *kind, state_of(card), card.size, card.title])
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]) - 1)]
    lines = [f"Data sets of {app.name}, looked up under {_root()} (set ATTN_DATA to change)", ""]
    lines += ["  ".join([*(cell.ljust(width) for cell, width in zip(row, widths)), row[-1]]).rstrip() for row in rows]
    lines += ["", f"`{app.name} data fetch NAME` downloads and verifies, `{app.name} data check NAME` verifies."]
    if app.file_formats:
        lines += ["", "Files of your own", textwrap.fill(" ".join(app.file_formats.split()), 100)]
    return "\n".join(lines)


def describe(card: DataCard) -> str:
    """Everything a user must know before using a data set."""
    facts = {
        "Task": card.task,
        "State": state_of(card),
        "Folder": str(folder(card)) if card.files else "",
        "Size": card.size,
        "Licence": card.licence,
        "Source": card.source,
        "Splits": card.split,
        "Citation": card.citation,
        **card.facts,
    }
    width = max(len(name) for name in facts)
    lines = [f"{card.name}: {card.title}"]
    for name, text in facts.items():
        if text:
            indent = " " * (width + 4)
            body = textwrap.fill(" ".join(str(text).split()), 110, initial_indent=indent, subsequent_indent=indent)
            lines.append(f"  {name.ljust(width)}  {body.strip()}")
    return "\n".join(lines)


def check(app: App, name_or_path: str, args: Any = None) -> list[str]:
    """What is wrong with a data set or with a file of the user's own, a sentence each; empty when nothing is.

    Args:
        args: options of a file, the dataclass of its kind's `data_args`; None = the defaults.

    Raises:
        UserError: neither a data set of the app nor a file.
    """
    if name_or_path in app.datasets:
        if args is not None:
            raise UserError(f"{name_or_path} is a data set; options are for files of one's own")
        return verify(app.datasets[name_or_path])
    path = Path(name_or_path).expanduser()
    looks_like_file = path.suffix.lower() in app.file_suffixes or len(path.parts) > 1
    if not path.exists():
        if looks_like_file:
            raise UserError(f"there is no file {name_or_path}")
        return verify(app.dataset(name_or_path))  # an error that names the nearest data sets
    if not app.check_file:
        raise UserError(f"{app.name} takes no files of one's own; its data sets: {', '.join(app.datasets)}")
    try:
        checker = load(app.check_file)
        if args is None:
            problems: list[str] = checker(path)
        elif len(inspect.signature(checker).parameters) > 1:
            problems = checker(path, args)
        else:
            raise UserError(f"`{app.name} data check` takes no options of files")
    except UserError as error:
        return [str(error)]
    return problems


def _missing(card: DataCard) -> list[DataFile]:
    return [file for file in card.files if not (folder(card) / file.path).is_file()]


def _not_there(card: DataCard, missing: Sequence[DataFile]) -> str:
    if len(missing) == len(card.files):
        return f"data set {card.name!r} is not under {_root()}: {how_to_get(card, missing)}"
    some = "a file" if len(missing) == 1 else f"{len(missing)} of {len(card.files)} files"
    verb = "is" if len(missing) == 1 else "are"
    return f"{some} of data set {card.name!r} {verb} not under {_root()}: {how_to_get(card, missing)}"


def _wrong_size(card: DataCard, file: DataFile) -> str | None:
    path = folder(card) / file.path
    size = path.stat().st_size
    if file.bytes is None or size == file.bytes:
        return None
    return f"{path} has {size:,} bytes where the original has {file.bytes:,}"


def _hash(path: Path) -> str:
    size = path.stat().st_size
    if size > 500_000_000:
        print(f"{path.name}: checking {readable(size)}", file=sys.stderr)
    return sha256(path)


def _root() -> str:
    return str(data_root().resolve())
