"""Volumes and pictures of bright balls in noise, as MONAI makes them for its own tests."""

from __future__ import annotations

from functools import cache, partial
from typing import Any

import numpy as np

from attn_medseg.segment.corpus import Case, Corpus, Image, Part

STRUCTURES = ("dim", "medium", "bright")
SIZE = {2: 64, 3: 32}
COUNTS: dict[int, dict[Part, int]] = {
    2: {"train": 80, "val": 16, "test": 24},
    3: {"train": 40, "val": 8, "test": 12},
}
_SPACING = {3: (1.0, 1.0, 2.0)}
_NOISE = 0.25


def synthetic(ndim: int) -> Corpus:
    """Volumes (3) or pictures (2), each a patient of its own."""
    cases = []
    for part, count in COUNTS[ndim].items():
        for number in range(count):
            name = f"{part}_{number:03d}"
            seed = 10_000 * ndim + 1000 * tuple(COUNTS[ndim]).index(part) + number
            image, label = (partial(_part, ndim, seed, one) for one in (0, 1))
            cases.append(Case(name=name, patient=name, image=image, label=label, part=part))
    return Corpus(
        cases=tuple(sorted(cases, key=lambda case: case.name)),
        structures=STRUCTURES,
        ndim=ndim,
        channels=1,
        unit="mm" if ndim == 3 else "px",
        defaults={"size": (SIZE[ndim],) * ndim, "normalise": "zscore", "flips": tuple(range(ndim))},
        notes=("synthetic: balls of three brightnesses in noise",),
        exact=ndim == 3,
    )


@cache
def _drawn(ndim: int, seed: int) -> tuple[Image, Image]:
    from monai.data import create_test_image_2d, create_test_image_3d

    size = SIZE[ndim]
    options: dict[str, Any] = {
        "num_objs": 8,
        "rad_max": size // 5,
        "rad_min": size // 10,
        "noise_max": _NOISE,
        "num_seg_classes": len(STRUCTURES),
        "random_state": np.random.RandomState(seed),
    }
    if ndim == 3:
        image, label = create_test_image_3d(size, size, size, **options)
    else:
        image, label = create_test_image_2d(size, size, **options)
    affine = np.diag([*_SPACING[3], 1.0]) if ndim == 3 else None
    return Image(values=image[None].astype(np.float32), affine=affine), Image(
        values=label.astype(np.uint8), affine=affine
    )


def _part(ndim: int, seed: int, which: int) -> Image:
    return _drawn(ndim, seed)[which]
