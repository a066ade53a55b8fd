"""Synthetic interactions with planted tastes and a knowledge graph that matters; always called synthetic.

Items have a maker, makers belong to a school, and users like schools: two steps through the graph tell what a user
likes, while each user shows few interactions and each item has few users. A relation without meaning (colour) and a
cycle between makers stand in the graph, too. Some items are in the graph only.
"""

from __future__ import annotations

import numpy as np

from attn_recsys.items.corpus import Corpus, Interactions
from attn_recsys.items.graph import build_graph

USERS, ITEMS, COLD, MAKERS, SCHOOLS, TAGS, COLOURS = 400, 300, 10, 60, 12, 20, 8
_SEED = 20_26


def synthetic() -> Corpus:
    """Always the same data."""
    rng = np.random.default_rng(_SEED)
    total = ITEMS + COLD
    school = np.arange(MAKERS) % SCHOOLS
    maker = rng.integers(0, MAKERS, total)
    tag = rng.integers(0, TAGS, total)
    quality = rng.normal(0.0, 0.5, total)
    by_school = rng.normal(0.0, 2.5, (USERS, SCHOOLS))
    by_tag = rng.normal(0.0, 0.7, (USERS, TAGS))
    liking = by_school[:, school[maker]] + by_tag[:, tag] + quality
    liking[:, ITEMS:] = -np.inf  # nobody had them yet
    active = np.clip(np.round(np.exp(rng.normal(2.2, 0.5, USERS))), 4, 40).astype(int)
    noise = rng.gumbel(size=liking.shape)
    order = np.argsort(-(liking + noise), axis=1)
    user = np.repeat(np.arange(USERS), active)
    item = np.concatenate([order[u, :n] for u, n in enumerate(active)])
    when = rng.permutation(len(user))
    rank = np.argsort(when, kind="stable")
    names = [f"item {i:03d}" for i in range(total)]
    triples = [
        *((names[i], "made by", f"maker {maker[i]:02d}") for i in range(total)),
        *((names[i], "tagged", f"tag {tag[i]:02d}") for i in range(total)),
        *((names[i], "has colour", f"colour {c}") for i, c in enumerate(rng.integers(0, COLOURS, total))),
        *((f"maker {m:02d}", "of school", f"school {school[m]:02d}") for m in range(MAKERS)),
        *((f"maker {m:02d}", "taught", f"maker {(m + SCHOOLS) % MAKERS:02d}") for m in range(MAKERS)),
    ]
    head, relation, tail = (list(column) for column in zip(*triples))
    graph, notes = build_graph(names, head, relation, tail)
    interactions = Interactions(
        users=[f"user {u:03d}" for u in range(USERS)],
        items=names,
        user=user[rank].astype(np.int64),
        item=item[rank].astype(np.int64),
        time=np.arange(len(user), dtype=float),
    )
    return Corpus(name="synthetic", interactions=interactions, graph=graph, notes=notes)
