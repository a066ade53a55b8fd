"""Files that are written line by line and appear whole or not at all."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from attn_genomics.genome.cards import FILE_SUFFIXES as FASTA
from attn_genomics.sequences.cards import FILE_SUFFIXES as TABLES
from attn_shared.errors import UserError


def is_fasta(path: Path) -> bool:
    """Whether a file's name says that it is FASTA."""
    return path.name.lower().endswith(FASTA)


def is_bed(path: Path) -> bool:
    """Whether a file's name says that it is BED."""
    return path.name.lower().endswith((".bed", ".bed.gz"))


def stem(path: Path) -> str:
    """The name without what says its kind, `.gz` included."""
    suffix = max((s for s in (*FASTA, *TABLES) if path.name.lower().endswith(s)), key=len, default=path.suffix)
    return path.name[: len(path.name) - len(suffix)] or path.name


def check_inputs(inputs: Sequence[Path], kinds: str) -> None:
    """Refuse inputs that would write the same file, folders, and what has no name of a known kind."""
    stems = [stem(path) for path in inputs]
    for path, name in zip(inputs, stems):
        if path.is_dir():
            raise UserError(f"{path} is a folder; name files: {kinds}")
        if stems.count(name) > 1:
            raise UserError(f"two inputs are called {name!r} and would write the same file; rename one")


@contextmanager
def written(path: Path) -> Iterator[IO[str]]:
    """A text file to write; it takes its name when everything is in it, and is gone where an error came before."""
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with part.open("w", encoding="utf-8", newline="\n") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}") from None
    finally:
        with suppress(OSError):
            part.unlink()


class Pace:
    """How fast bases were read, told once."""

    def __init__(self) -> None:
        self.bases, self.began = 0, time.monotonic()

    def __str__(self) -> str:
        seconds = max(time.monotonic() - self.began, 1e-9)
        return f"{self.bases:,} bases in {seconds:.1f} s ({self.bases / seconds:,.0f} bases/s)"
