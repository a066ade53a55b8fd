"""Names of parts and sound files in folders."""

from __future__ import annotations

import os
from pathlib import Path

from attn_speech.audio import SUFFIXES
from attn_speech.data.corpus import Part

PARTS: tuple[Part, ...] = ("train", "val", "test")
_NAMES: dict[str, Part] = {
    "train": "train", "tr": "train", "training": "train",
    "val": "val", "cv": "val", "valid": "val", "validation": "val", "dev": "val",
    "test": "test", "tt": "test", "testing": "test", "eval": "test",
}  # fmt: skip


def part_of(name: str) -> Part | None:
    """The part that a folder or a table's cell names: "train", "tr", "train-clean-100", "dev-other", …; else None."""
    return _NAMES.get(name.strip().lower().replace("_", "-").partition("-")[0])


def sound_files(folder: Path) -> list[Path]:
    """All sound files below a folder, in order of their names; hidden ones left out."""
    found = []
    for place, folders, files in os.walk(folder, followlinks=True):
        folders[:] = [name for name in folders if not name.startswith(".")]
        found += [Path(place, name) for name in files if _is_sound(name)]
    return sorted(found)


def subfolders(folder: Path) -> list[Path]:
    """Folders in a folder, in order; hidden ones left out."""
    return sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))


def _is_sound(name: str) -> bool:
    return name.lower().endswith(SUFFIXES) and not name.startswith(".")
