"""From files to a corpus: one function that reads an image, and a reader for each layout of folders."""

from __future__ import annotations

from pathlib import Path

from attn_medseg.segment.cards import DATASETS
from attn_medseg.segment.corpus import Corpus
from attn_medseg.segment.options import SegmentDataConfig
from attn_shared.errors import UserError


def load_corpus(data: str, args: SegmentDataConfig) -> Corpus:
    """A data set by its name, or one's own by its folder.

    Raises:
        UserError: no such data set or folder, or contents that are not what they should be; one sentence.
    """
    if data in DATASETS:
        from attn_medseg.segment.readers.known import read_known

        return read_known(data)
    path = Path(data).expanduser()
    if not path.exists():
        raise UserError(f"there is no folder {data}")
    from attn_medseg.segment.readers.folders import read_folder

    return read_folder(path, args)
