"""Several inputs of a command, one at a time: a bad one is named, and the others are done all the same."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

from attn_shared.errors import UserError

T = TypeVar("T")


def one_by_one(
    inputs: Sequence[T], work: Callable[[T], Iterable[Path]], name: Callable[[T], str]
) -> tuple[list[Path], dict[str, str]]:
    """Do the work of every input, and say on stderr at once what is left out.

    Args:
        inputs: whose names differ.
        work: writes what belongs to an input, and gives the files written.
        name: of an input, for the user.

    Returns:
        The files written, and name -> reason of the inputs of which a `UserError` came, for `refuse`.
    """
    written: list[Path] = []
    failed: dict[str, str] = {}
    for one in inputs:
        try:
            written += work(one)
        except UserError as error:
            failed[name(one)] = str(error)
            if len(inputs) > 1:
                print(f"left out: {error}", file=sys.stderr)
    return written, failed


def refuse(failed: Mapping[str, str], total: int, *, what: str, done: str, others: str = "") -> None:
    """Say what `one_by_one` could not do.

    Args:
        failed: name -> reason.
        total: how many inputs there were.
        what: the inputs, "files".
        done: what was to be done with them, "separated".
        others: said of the inputs that were done, where only one failed: "the other files were done (output)".

    Raises:
        UserError: if any failed: the reason of one, else the names of all.
    """
    if len(failed) == 1:
        raise UserError(next(iter(failed.values())) + (f"; {others}" if others else ""))
    if failed:
        names = ", ".join(failed)
        raise UserError(f"{len(failed)} of {total} {what} could not be {done}, for the reasons above: {names}")
