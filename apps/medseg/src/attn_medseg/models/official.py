"""Weights of official networks under our names."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence

from torch import Tensor

from attn_shared.errors import UserError

Rename = tuple[str, str | Callable[[re.Match[str]], str]]
"""A regular expression, and what stands in its place."""


def renamed(
    weights: Mapping[str, Tensor],
    renames: Sequence[Rename],
    *,
    ours: re.Pattern[str],
    unused: re.Pattern[str],
    network: str,
) -> Iterator[tuple[str, Tensor]]:
    """Our name and the tensor of every weight that the official code uses.

    Args:
        weights: by the official names, "module." before them or not.
        renames: one after another, to what the ones before have made.
        ours: how our names begin.
        unused: official names that are left out.
        network: the official network's name.

    Raises:
        UserError: a key that is none of the network's.
    """
    for official, tensor in weights.items():
        key = official.removeprefix("module.")
        if unused.search(key):
            continue
        for pattern, replacement in renames:
            key = re.sub(pattern, replacement, key)
        if not ours.match(key):
            raise UserError(f"{official!r} is not a weight of {network}")
        yield key, tensor
