"""`medseg data check PATH`: what is wrong with an image, a folder or a data set of the user's own, a sentence each."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from attn_medseg.segment.corpus import Corpus
from attn_medseg.segment.options import SegmentDataConfig
from attn_shared.errors import UserError

_MOST = 20
_NEAR = 1e-2  # millimetres by which an image and its mask may lie apart


def check_file(path: Path, args: SegmentDataConfig | None = None) -> list[str]:
    """Problems of an image, or of every case of a folder; empty when there is none.

    Args:
        args: the options of the data; None = the defaults.
    """
    from attn_medseg.segment.readers.files import is_image, read_image

    path = Path(path)
    try:
        if path.suffix.lower() != ".json" and (path.is_file() or is_image(path)):
            read_image(path)
            return []
        return check_folder(path, args or SegmentDataConfig())
    except UserError as error:
        return [str(error)]


def check_folder(path: Path, args: SegmentDataConfig) -> list[str]:
    """Every image and every mask is read; sizes, places, structures that no mask holds, and the split."""
    from attn_medseg.segment.data import build, check_options
    from attn_medseg.segment.readers import load_corpus

    check_options(args)
    corpus = load_corpus(str(path), args)
    problems = [note for note in corpus.notes if "left out" in note or "Info.cfg" in note]
    problems += _cases(corpus)
    if not problems:
        build(corpus, args, str(path))
    return problems[:_MOST] + ([f"and {len(problems) - _MOST} more problems"] if len(problems) > _MOST else [])


def _cases(corpus: Corpus) -> list[str]:
    from attn_medseg.segment.data import load_image, load_label
    from attn_medseg.segment.readers.files import IGNORE, read_header

    problems = []
    seen: set[int] = set()
    for case in corpus.cases:
        try:
            image = load_image(case)
            if case.label is None:
                continue
            label = load_label(case, corpus)
        except UserError as error:
            problems.append(str(error))
            continue
        if image.values.shape[1:] != label.shape:
            problems.append(f"{case.name}: image and label are of different sizes")
        if isinstance(case.label, Path) and image.affine is not None:
            other = read_header(case.label).affine
            if other is not None and np.abs(other - image.affine).max() > _NEAR:
                problems.append(f"{case.name}: image and label lie in different places (their affines differ)")
        if not ((label > 0) & (label < IGNORE)).any():
            problems.append(f"{case.name}: its label is empty")
        seen |= set(np.unique(label).tolist())
    problems += [
        f"no case holds the structure {name!r}" for one, name in enumerate(corpus.structures) if one + 1 not in seen
    ]
    return problems
