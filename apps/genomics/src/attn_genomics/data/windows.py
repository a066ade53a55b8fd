"""Pieces of genomes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

from attn_genomics.data.fasta import Genome
from attn_genomics.tokens import N

Span = tuple[str, int, int]
"""Record, first place, place behind the last."""


def cut(genome: Genome, name: str, start: int, end: int) -> np.ndarray:
    """uint8 codes of places `start` to `end` (excluded); N where they are outside the record."""
    inside = max(start, 0), min(end, genome.lengths[name])
    codes = np.full(end - start, N, np.uint8)
    if inside[0] < inside[1]:
        codes[inside[0] - start : inside[1] - start] = genome.fetch(name, *inside)
    return codes


def centred(start: int, end: int, length: int) -> tuple[int, int]:
    """`length` bases around the middle of `start` to `end`; 0 = these themselves."""
    if not length:
        return start, end
    first = (start + end - length) // 2
    return first, first + length


def merge(spans: Iterable[Span]) -> list[Span]:
    """The union of spans, each record's in order; touching ones are joined."""
    joined: list[Span] = []
    for name, start, end in sorted(spans):
        if joined and joined[-1][0] == name and start <= joined[-1][2]:
            joined[-1] = (name, joined[-1][1], max(end, joined[-1][2]))
        else:
            joined.append((name, start, end))
    return joined


def intersect(one: Sequence[Span], other: Sequence[Span]) -> list[Span]:
    """What is in both; each a result of `merge`."""
    by_name: dict[str, list[tuple[int, int]]] = {}
    for name, start, end in other:
        by_name.setdefault(name, []).append((start, end))
    found = []
    for name, start, end in one:
        for left, right in by_name.get(name, ()):
            if max(start, left) < min(end, right):
                found.append((name, max(start, left), min(end, right)))
    return found


def gaps(spans: Sequence[Span], lengths: dict[str, int]) -> list[Span]:
    """What no span covers, over all records; `spans` is a result of `merge`."""
    covered: dict[str, list[tuple[int, int]]] = {}
    for name, start, end in spans:
        covered.setdefault(name, []).append((start, end))
    free = []
    for name, length in lengths.items():
        at = 0
        for start, end in covered.get(name, ()):
            if start > at:
                free.append((name, at, min(start, length)))
            at = max(at, end)
        if at < length:
            free.append((name, at, length))
    return free


def total(spans: Iterable[Span]) -> int:
    """Bases of spans."""
    return sum(end - start for _, start, end in spans)
