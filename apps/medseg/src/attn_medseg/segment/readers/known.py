"""The data sets that cards describe."""

from __future__ import annotations

from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np

from attn_medseg.segment.cards import ACDC, DATASETS, HIPPOCAMPUS, PH2
from attn_medseg.segment.corpus import Case, Corpus, Image
from attn_medseg.segment.readers.files import stem
from attn_shared import datasets
from attn_shared.errors import UserError

_UNDRAWN = 4  # of the scribbles of ACDC


def read_known(name: str) -> Corpus:
    """A data set by its name.

    Raises:
        UserError: it is not here, or damaged.
    """
    if name in ("synthetic", "synthetic_2d"):
        from attn_medseg.segment.synthetic import synthetic

        return synthetic(3 if name == "synthetic" else 2)
    folder = datasets.locate(DATASETS[name])
    if name == "hippocampus":
        return _hippocampus(folder / HIPPOCAMPUS)
    return _acdc(folder / ACDC) if name == "acdc" else _ph2(folder / PH2)


def _hippocampus(folder: Path) -> Corpus:
    images, labels = (
        {stem(path): path for path in sorted((folder / one).glob("*.nii.gz"))} for one in ("images", "labels")
    )
    notes = [f"{name} has a label but no image and is left out" for name in sorted(set(labels) - set(images))]
    notes += [f"{name} has an image but no label and is left out" for name in sorted(set(images) - set(labels))]
    return Corpus(
        cases=tuple(
            Case(name=name, patient=name, image=(images[name],), label=labels[name])
            for name in sorted(set(images) & set(labels))
        ),
        structures=("anterior", "posterior"),
        ndim=3,
        channels=1,
        # The patch that holds most of these small volumes whole; sizes that halve three times.
        defaults={"size": (40, 56, 40), "normalise": "zscore", "flips": (0,)},
        notes=tuple(notes),
    )


@cache
def _arrays(path: Path) -> dict[str, Any]:
    try:
        with np.load(path, allow_pickle=False) as pack:
            return {name: pack[name] for name in pack.files}
    except (OSError, EOFError, ValueError) as error:
        raise UserError(f"{path.name} is damaged: {str(error).splitlines()[0]}") from None


def _acdc(path: Path) -> Corpus:
    rows: dict[str, list[tuple[int, int]]] = {}
    for row, name in enumerate(_arrays(path)["name"].tolist()):
        volume, _, number = name.rpartition("_slice_")
        rows.setdefault(volume, []).append((int(number), row))
    cases = []
    for volume in sorted(rows):
        order = tuple(row for _, row in sorted(rows[volume]))
        cases.append(
            Case(
                name=volume,
                patient=volume.partition("_")[0],
                image=partial(_stack, path, "image", order),
                label=partial(_stack, path, "label", order),
                scribble=partial(_stack, path, "scribble", order),
                slices=2,
            )
        )
    return Corpus(
        cases=tuple(cases),
        structures=("right ventricle", "myocardium", "left ventricle"),
        ndim=2,
        channels=1,
        unlabelled=_UNDRAWN,
        unit="px",
        defaults={"size": (96, 96), "normalise": "zscore"},
        notes=("the centre 62 % of each slice, resized to 96 x 96; spacings are lost",),
        exact=False,
    )


def _stack(path: Path, name: str, rows: tuple[int, ...]) -> Image:
    """Slices as a volume of axes height, width, slice."""
    values = np.moveaxis(_arrays(path)[name][list(rows)], 0, -1)
    return Image(values=values[None].astype(np.float32) if name == "image" else values)


def _ph2(path: Path) -> Corpus:
    names = _arrays(path)["name"].tolist()
    return Corpus(
        cases=tuple(
            Case(
                name=names[row],
                patient=names[row],
                image=partial(_picture, path, row),
                label=partial(_lesion, path, row),
            )
            for row in sorted(range(len(names)), key=names.__getitem__)
        ),
        structures=("lesion",),
        ndim=2,
        channels=3,
        unit="px",
        defaults={"size": (96, 128), "normalise": "zscore", "flips": (0, 1)},
        notes=("pictures are resized to 128 x 96; patients are not known",),
        exact=False,
    )


def _picture(path: Path, row: int) -> Image:
    return Image(values=np.moveaxis(_arrays(path)["image"][row], -1, 0).astype(np.float32))


def _lesion(path: Path, row: int) -> Image:
    return Image(values=_arrays(path)["mask"][row].astype(np.uint8))
