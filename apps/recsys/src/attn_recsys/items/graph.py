"""Knowledge graphs: names to numbers, items first; duplicates, links and inverse triples."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd

from attn_recsys.items.corpus import KnowledgeGraph

INVERSE = "inverse of "


def build_graph(
    items: Sequence[str],
    head: Sequence[str],
    relation: Sequence[str],
    tail: Sequence[str],
    links: Mapping[str, str] | None = None,
) -> tuple[KnowledgeGraph, list[str]]:
    """The graph over named triples, its first entities the items in their order.

    Args:
        items: names of the items, by number.
        head, relation, tail: names, a triple an entry.
        links: item -> its name in the graph; None = the same name.

    Returns:
        The graph, each triple once, and what was found: duplicates, items without entity.
    """
    notes: list[str] = []
    place = {name: i for i, name in enumerate(items)}
    number: dict[str, int] = {}
    if links is None:
        number.update(place)
    else:
        shared = 0
        for item, entity in links.items():
            if item in place:
                shared += entity in number
                number.setdefault(entity, place[item])
        if shared:
            notes.append(f"{shared:,} items have no place of their own in the graph: another item has the same entity")
    entities = list(items)
    taken = set(items) if links is not None else set()
    both = pd.unique(np.concatenate([np.asarray(head, object), np.asarray(tail, object)]))
    seen = sum(name in number for name in both)
    for name in both:
        if name not in number:
            number[name] = len(entities)
            entities.append(f"{name} (entity)" if name in taken else str(name))
    kinds, relations = pd.factorize(np.asarray(relation, object), sort=True)
    triples = np.stack(
        [
            np.array([number[name] for name in head], np.int64),
            kinds.astype(np.int64),
            np.array([number[name] for name in tail], np.int64),
        ],
        axis=1,
    )
    once = distinct(triples)
    if len(once) < len(triples):
        notes.append(f"{len(triples) - len(once):,} triples of the graph stood there more than once and count once")
    loops = int((once[:, 0] == once[:, 2]).sum())
    if loops:
        notes.append(f"triples from an entity to itself: {loops:,}")
    if len(items) > seen:
        notes.append(f"{len(items) - seen:,} of {len(items):,} items are not in the graph")
    graph = KnowledgeGraph(
        entities=entities,
        relations=[str(name) for name in relations],
        head=once[:, 0].copy(),
        relation=once[:, 1].copy(),
        tail=once[:, 2].copy(),
    )
    return graph, notes


def distinct(rows: np.ndarray) -> np.ndarray:
    """(N, C) rows, each once, where it stood first."""
    if not len(rows):
        return rows
    _, first = np.unique(rows, axis=0, return_index=True)
    return rows[np.sort(first)]


def with_inverse(graph: KnowledgeGraph) -> KnowledgeGraph:
    """The graph and each triple backwards, under a relation of its own."""
    count = len(graph.relations)
    return KnowledgeGraph(
        entities=graph.entities,
        relations=[*graph.relations, *(f"{INVERSE}{name}" for name in graph.relations)],
        head=np.concatenate([graph.head, graph.tail]),
        relation=np.concatenate([graph.relation, graph.relation + count]),
        tail=np.concatenate([graph.tail, graph.head]),
    )
