"""A genome with what real ones have: genes on both strands, promoters, repeats, gaps."""

from __future__ import annotations

import numpy as np

from attn_genomics.data.fasta import turned
from attn_genomics.tokens import N, encode

LENGTHS = {"one": 130_000, "two": 90_000, "three": 50_000, "four": 30_000}
_STOPS = ("TAA", "TAG", "TGA")
_BOXES = ("TTGACA", "TATAAT")
_BETWEEN = 17
"""Bases between the boxes of a promoter, and 7 behind the second the gene begins."""


def synthetic_genome(seed: int = 0) -> dict[str, np.ndarray]:
    """Records: name -> uint8 codes.

    Between genes, bases follow the two before them; genes are codons drawn by one skewed usage.
    """
    rng = np.random.default_rng([seed, 72])
    codons = [a + b + c for a in "ACGT" for b in "ACGT" for c in "ACGT"]
    codons = [codon for codon in codons if codon not in _STOPS]
    usage = rng.dirichlet(np.full(len(codons), 0.35))
    table = np.stack([encode(codon) for codon in codons])
    chain = rng.dirichlet(np.full(4, 4.0), size=16)
    repeats = [_chain(rng, chain, size) for size in (300, 700, 1200)]
    return {name: _record(rng, length, table, usage, chain, repeats) for name, length in LENGTHS.items()}


def _chain(rng: np.random.Generator, chain: np.ndarray, length: int) -> np.ndarray:
    """Bases each drawn by the two before it."""
    limits = np.cumsum(chain, axis=1)[:, :3].tolist()
    codes, before = [], int(rng.integers(16))
    for draw in rng.random(length).tolist():
        low, middle, high = limits[before]
        code = int(draw >= low) + int(draw >= middle) + int(draw >= high)
        codes.append(code)
        before = before % 4 * 4 + code
    return np.array(codes, np.uint8)


def _gene(rng: np.random.Generator, table: np.ndarray, usage: np.ndarray) -> np.ndarray:
    inner = table[rng.choice(len(table), size=int(rng.integers(80, 400)), p=usage)].ravel()
    return np.concatenate([encode("ATG"), inner, encode(_STOPS[rng.integers(3)])])


def _record(
    rng: np.random.Generator,
    length: int,
    table: np.ndarray,
    usage: np.ndarray,
    chain: np.ndarray,
    repeats: list[np.ndarray],
) -> np.ndarray:
    pieces: list[np.ndarray] = []
    done = 0
    while done < length:
        piece = _chain(rng, chain, int(rng.integers(60, 500)))
        kind = rng.random()
        if kind < 0.7:
            parts = [_gene(rng, table, usage)]
            if rng.random() < 0.8:
                boxes = [encode(_BOXES[0]), _chain(rng, chain, _BETWEEN), encode(_BOXES[1]), _chain(rng, chain, 7)]
                parts = boxes + parts
            unit = np.concatenate(parts)
        elif kind < 0.95:
            unit = repeats[rng.integers(len(repeats))].copy()
            changed = rng.random(len(unit)) < 0.05
            unit[changed] = (unit[changed] + rng.integers(1, 4, int(changed.sum()))) % 4
        else:
            unit = np.full(int(rng.integers(20, 200)), N, np.uint8)
        if rng.random() < 0.5:
            unit = turned(unit)
        pieces += [piece, unit]
        done += len(piece) + len(unit)
    return np.concatenate(pieces)[:length].astype(np.uint8)
