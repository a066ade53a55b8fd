"""Rows beside every language model: equal chances, shares of the bases, Markov models."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch

from attn_genomics.data.fasta import turned
from attn_genomics.genome import markov, metrics
from attn_genomics.genome.markov import Part
from attn_shared.task import DataBundle

Objective = Literal["next", "masked"]
_READ = 256
_STRETCH = 16_000_000


@dataclass(frozen=True)
class Baseline:
    """A simple model's probabilities of the test bases that count, and what was chosen."""

    name: str
    probability: np.ndarray
    note: str


def rows(bundle: DataBundle, objective: Objective) -> list[dict[str, Any]]:
    """Rows of a table."""
    if bundle.test is None:
        return []
    part = read(bundle.test)
    found = []
    for one in fitted(bundle, objective):
        scores = scored(part, one.probability)
        found.append({"model": one.name, "note": one.note, **metrics.figures(scores, intervals=True)})
    return found


def scored(part: Part, probability: np.ndarray) -> metrics.Scores:
    """What a model's evaluation gathers, of these probabilities."""
    table = np.full((*part.tokens.shape, 4), 0.0)
    scored = part.scored & (part.tokens < 4)
    table[scored] = np.log2(probability)
    state: dict[str, torch.Tensor] = {}
    for first in range(0, len(table), _READ):
        rows = slice(first, first + _READ)
        batch = {
            "tokens": torch.from_numpy(part.tokens[rows].astype(np.int64)),
            "scored": torch.from_numpy(scored[rows]),
            "index": torch.arange(first, min(first + _READ, len(table))),
        }
        metrics.join(state, metrics.pack(batch, torch.from_numpy(table[rows])))
    made = metrics.unpack(state)
    assert made is not None
    return made


_FITTED: dict[bytes, list[Baseline]] = {}  # of the data seen last: a comparison asks once a run


def fitted(bundle: DataBundle, objective: Objective) -> list[Baseline]:
    """All of them, counted on training; what is chosen is chosen on validation."""
    train: Any = bundle.train
    if train is None or bundle.test is None:
        return []
    test = read(bundle.test)
    val = None if bundle.val is None else read(bundle.val)
    digest = hashlib.blake2b(repr((objective, train.spans)).encode())
    for part in (test, val):
        if part is not None:
            digest.update(part.tokens.tobytes())
            digest.update(part.scored.tobytes())
    for codes in stretches(train):
        digest.update(codes.tobytes())
    key = digest.digest()
    if key not in _FITTED:
        _FITTED.clear()
        _FITTED[key] = _fit(train, val, test, objective)
    return _FITTED[key]


def _fit(train: Any, val: Part | None, test: Part, objective: Objective) -> list[Baseline]:
    # An order with far more contexts than bases tells nothing that the one below does not.
    bases = sum(end - start for _, start, end in train.spans)
    largest = min(markov.ORDERS, max(1, int(np.log(max(bases, 4)) / np.log(4)) + 1))
    counts = markov.count(stretches(train), largest)
    share = (counts.tables[0][0] + 0.5) / (counts.tables[0][0] + 0.5).sum()
    count = len(test.places)
    found = [
        Baseline("equal chances", np.full((count, 4), 0.25), "2 bits"),
        Baseline("shares of the bases", np.tile(share, (count, 1)), "Markov model of order 0"),
    ]
    if val is None or not len(val.places):
        return found
    one = markov.fixed(counts, val)
    found.append(
        Baseline("Markov model", one.probabilities(test.codes)[test.places], f"order {one.order}, chosen on validation")
    )
    both = markov.count((turned(codes) for codes in stretches(train)), into=counts.copy())
    ways = (markov.choose(counts, val), markov.choose(both, val, strands=True))
    best = min(ways, key=lambda way: way[1])[0]
    strands = "both strands" if best.strands else "one strand"
    found.append(
        Baseline(
            "interpolated Markov model",
            best.probabilities(test.codes)[test.places],
            f"orders 0 to {best.order}, {strands} counted, chosen on validation; reads the bases before",
        )
    )
    if objective == "masked":
        two = markov.TwoSided.fit(ways[1][0], val)
        found.append(
            Baseline(
                "interpolated Markov models of both sides",
                two.probabilities(test.codes)[test.places],
                f"orders 0 to {two.model.order} of what stands before and behind, weighed on validation",
            )
        )
    return found


def stretches(train: Any) -> Iterator[np.ndarray]:
    """The training part, as it stands in the genome, in pieces that end where the part or a long piece ends."""
    for name, start, end in train.spans:
        for first in range(start, end, _STRETCH):
            # What is cut here loses a few contexts in sixteen million.
            yield train.genome.fetch(name, first, min(end, first + _STRETCH))


def read(dataset: Any) -> Part:
    """Windows of validation or test as arrays."""
    tokens, asked = [], []
    for first in range(0, len(dataset), _READ):
        batch = dataset.__getitems__(list(range(first, min(first + _READ, len(dataset)))))
        tokens.append(batch["tokens"].numpy().astype(np.uint8))
        asked.append(batch["scored"].numpy())
    return Part(np.concatenate(tokens), np.concatenate(asked))
