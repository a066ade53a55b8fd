"""Classes of ratings on a scale from 1 to some number."""

from __future__ import annotations

import math

from attn_shared.errors import UserError


def classes_of(label: str, levels: int, scale: int) -> list[str]:
    """Names of the classes: two, "low" and "high", or one a step of the scale.

    Raises:
        UserError: another number of levels.
    """
    if levels not in (2, scale):
        raise UserError(f"data_args.levels is {levels}; ratings of 1 to {scale} make 2 classes or {scale}")
    return [f"low {label}", f"high {label}"] if levels == 2 else [f"{label} {step}" for step in range(1, scale + 1)]


def grade(rating: float, levels: int, scale: int, source: str) -> int:
    """The class of a rating: high from the middle of the scale on (5 of 9, 3 of 5), or the whole steps it reached.

    Raises:
        UserError: a rating that is not on the scale.
    """
    if not (math.isfinite(rating) and 1 <= rating <= scale):
        raise UserError(f"{source}: a rating of {rating:g} is not between 1 and {scale}")
    return int(rating >= (scale + 1) / 2) if levels == 2 else int(rating) - 1
