"""What the commands share in reading their command lines. Imports neither torch nor numpy."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from attn_shared.errors import UserError

STRANDS = ("forward", "reverse", "both")


def run_folder(text: str) -> Path:
    """The run that a command line names; whether it is whole is seen when it is loaded."""
    path = Path(text).expanduser()
    if not path.exists() and not any(path.with_name(path.name + end).exists() for end in (".new", ".old")):
        raise UserError(f"there is no run or checkpoint at {text}; `train` and `pretrain` print the folder they made")
    return path


def existing_file(text: str) -> Path:
    """A file that a command line names."""
    path = Path(text).expanduser()
    if not path.is_file():
        raise UserError(f"{text} is a folder; name a file" if path.is_dir() else f"there is no file {text}")
    return path


def whole(text: str | None, name: str, *, least: int) -> int | None:
    """An option that is a whole number from `least` on, None where it is not given."""
    if text is None:
        return None
    try:
        value = int(text)
    except ValueError:
        value = least - 1
    if value < least:
        raise UserError(f"--{name} takes a whole number from {least} on, got {text}")
    return value


def one_of(text: str | None, name: str, known: Sequence[str]) -> str | None:
    """An option that is one of several words, None where it is not given."""
    if text is not None and text not in known:
        raise UserError(f"--{name} takes {', '.join(known)}, got {text}")
    return text
