"""Interactions and a knowledge graph, as every reader gives them and every model takes them.

Numbers: users 0…U-1; items 0…I-1; entities 0…E-1, of which the first I are the items; relations 0…R-1.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np


@dataclass(frozen=True, kw_only=True)
class Interactions:
    """Who had what, each pair once.

    Attributes:
        users, items: names, by number.
        user, item: (N,) int64, in the order of the file (of time, where there are times).
        time: (N,) float64 seconds, or None.
        rating: (N,) float64, or None.
        part: (N,) int8, 0 training, 1 validation, 2 test, where the data set has files of its own; else None.
    """

    users: list[str]
    items: list[str]
    user: np.ndarray
    item: np.ndarray
    time: np.ndarray | None = None
    rating: np.ndarray | None = None
    part: np.ndarray | None = None


@dataclass(frozen=True, kw_only=True)
class KnowledgeGraph:
    """Triples, each once. The first entities are the items, whether the graph knows them or not.

    Attributes:
        entities, relations: names, by number.
        head, relation, tail: (T,) int64.
    """

    entities: list[str]
    relations: list[str]
    head: np.ndarray
    relation: np.ndarray
    tail: np.ndarray


@dataclass(frozen=True, kw_only=True)
class Corpus:
    """A data set as read.

    Attributes:
        name: for messages and reports.
        interactions, graph: what it holds; graph is None where there is none.
        notes: what was found and done: duplicates, items without entity, rows left out.
    """

    name: str
    interactions: Interactions
    graph: KnowledgeGraph | None = None
    notes: list[str] = field(default_factory=list)
