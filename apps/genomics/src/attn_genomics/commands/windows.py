"""A variant and its genome -> the two windows that a model compares."""

from __future__ import annotations

from typing import Protocol

import numpy as np

from attn_genomics.data.vcf import BadRecord


class Codes(Protocol):
    """Where bases come from: codes [start, end) of one record."""

    def __call__(self, start: int, end: int) -> np.ndarray: ...


def leftmost(fetch: Codes, start: int, end: int, letters: np.ndarray, far: int) -> tuple[int, int, np.ndarray]:
    """The same insertion or deletion written as far to the left as can be, at most `far` bases; else as it is.

    In a repeat, one change can be written at several places; so each has one window.
    """
    if (end > start) == (len(letters) > 0):
        return start, end, letters
    moved = letters if len(letters) else fetch(start, end)
    before = fetch(max(0, start - far), start)
    steps = 0
    while steps < len(before) and before[-1 - steps] == moved[-1 - steps % len(moved)]:
        steps += 1
    return start - steps, end - steps, np.roll(letters, steps)


def windows(fetch: Codes, length: int, start: int, end: int, letters: np.ndarray, size: int) -> tuple[np.ndarray, ...]:
    """The window of the reference and that of the alternate.

    Both begin at the same base and are `size` bases long, so that what is compared has the same number of bases: an
    insertion pushes bases out at the right end and a deletion lets bases in. The change lies in the middle, except near
    the ends of the record. Where the right end of the record is too near for that, both end with it, and bases leave
    and come in at the left. A record that has no `size` bases is read whole.

    Args:
        fetch: codes of the record.
        length: of the record.
        start, end: bases of the reference that change.
        letters: codes that stand there instead.
        size: bases of a window.

    Raises:
        BadRecord: the change is longer than half a window.
    """
    gone, come = end - start, len(letters)
    longest = max(gone, come)
    if longest > max(1, size // 2):
        raise BadRecord(f"it changes {longest:,} bases, more than half of a window of {size:,}; see --context")
    more = max(0, gone - come)
    first = max(0, min(start - (size - longest) // 2, length - size - more))
    last = min(length, first + size + more)
    if end <= first + size and start - first + come + (end < length) <= size:
        codes = fetch(first, last)
        return codes[:size], np.concatenate((codes[: start - first], letters, codes[end - first :]))[:size]
    first = max(0, length - size - more)
    codes = fetch(first, length)
    return codes[-size:], np.concatenate((codes[: start - first], letters, codes[end - first :]))[-size:]
