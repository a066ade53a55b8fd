"""Sequences whose class is in the grammar of motifs, not in their number."""

from __future__ import annotations

import numpy as np

from attn_genomics.data.fasta import turned
from attn_genomics.tokens import encode

ROWS, LENGTH = 4000, 120
FIRST, SECOND = "TGACGCAA", "GATTACCG"
NEAR = (8, 13)
"""Bases between the motifs of class 1, the end excluded."""
_FAR = ((1, 5), (18, 40))


def synthetic(rows: int = ROWS, seed: int = 0) -> tuple[list[np.ndarray], np.ndarray]:
    """Sequences and their classes.

    Every sequence holds both motifs once, each on either strand as often in both classes. In class 1 the first stands
    before the second, `NEAR` bases apart, on the same strand; seen from the other strand this is the same. In class 0
    the order, the distance or the strands are other ones.
    """
    rng = np.random.default_rng([seed, 71])
    label = np.arange(rows) % 2
    rng.shuffle(label)
    return [_sequence(rng, bool(one)) for one in label], label.astype(np.int64)


def _sequence(rng: np.random.Generator, positive: bool) -> np.ndarray:
    codes = rng.integers(0, 4, LENGTH).astype(np.uint8)
    motifs = [encode(FIRST), encode(SECOND)]
    gap = int(rng.integers(*NEAR))
    if not positive:
        fault = rng.integers(3)
        if fault == 0:
            motifs.reverse()
        elif fault == 1:
            gap = int(rng.integers(*_FAR[rng.integers(2)]))
        else:
            which = int(rng.integers(2))
            motifs[which] = turned(motifs[which])
    piece = np.concatenate([motifs[0], rng.integers(0, 4, gap).astype(np.uint8), motifs[1]])
    if rng.random() < 0.5:
        piece = turned(piece)
    at = int(rng.integers(0, LENGTH - len(piece) + 1))
    codes[at : at + len(piece)] = piece
    return codes
