"""From `--data NAME_OR_PATH` to recordings with labels."""

from __future__ import annotations

import importlib
from pathlib import Path

from attn_eeg.data import manifest
from attn_eeg.data.cards import DATASETS
from attn_eeg.data.options import EegDataConfig
from attn_eeg.data.readers import SUFFIXES
from attn_eeg.data.recording import Corpus
from attn_shared.errors import UserError
from core_attn.naming import UnknownNameError, unknown


def load_corpus(data: str, args: EegDataConfig) -> Corpus:
    """Read a data set by its name, or recordings of one's own by a manifest or the folder that holds it.



    Raises:
        UserError: no such data set or file, or contents that are not what they should be; one sentence.
    """
    if data in DATASETS:
        found: Corpus = importlib.import_module(f"attn_eeg.data.{data}").load(DATASETS[data], args)
        return found
    path = Path(data).expanduser()
    if path.suffix.lower() in SUFFIXES and path.is_file():
        raise UserError(
            f"{path} is one recording, and training needs several with labels; name them in a CSV with the columns "
            "file, subject and label"
        )
    if path.exists() or path.suffix or len(path.parts) > 1:
        return manifest.load(manifest.find(path), args)
    try:
        raise unknown("data set", data, DATASETS)
    except UnknownNameError as error:
        raise UserError(f"{error} (or name a CSV of recordings)") from None


def check_file(path: Path) -> list[str]:
    """For `data check PATH`: what is wrong with a manifest, its recordings, or one recording."""
    return manifest.check(path)
