"""Amazon Beauty as clicks: each product of a reviewer with what he had before it."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from attn_recsys.clicks.table import Lists, Names, Table, gather
from attn_recsys.items import readers
from attn_recsys.items.options import ItemsDataConfig


def read_beauty(folder: Path) -> Table:
    """Every review a click: reviewer, product, the product's attributes, and the reviewer's earlier products."""
    corpus = readers.read_beauty(folder, ItemsDataConfig())
    data, graph = corpus.interactions, corpus.graph
    assert graph is not None
    order = np.argsort(data.user, kind="stable")  # a reviewer's products stay in the order of the file
    user, item = data.user[order], data.item[order]
    by_item = np.argsort(graph.head, kind="stable")
    edges = np.concatenate([[0], np.cumsum(np.bincount(graph.head, minlength=len(data.items)))]).astype(np.int64)
    start, place = gather(edges, item)
    first = len(data.items)  # entities behind the products are attributes
    return Table(
        name="amazon_beauty",
        rows=len(user),
        single={"user": Names(code=user, names=data.users), "item": Names(code=item, names=data.items)},
        many={"attributes": Lists(start=start, code=graph.tail[by_item][place] - first, names=graph.entities[first:])},
        past=earlier(user, Names(code=item, names=data.items)),
        user="user",
        item="item",
        item_columns=("attributes",),
        negatives=1,
        notes=list(corpus.notes),
    )


def earlier(user: np.ndarray, item: Names) -> Lists:
    """What a row's user had in the rows before it, where the rows of a user stand together."""
    row = np.arange(len(user))
    first = np.searchsorted(user, user, side="left")
    before = row - first
    start = np.concatenate([[0], np.cumsum(before)]).astype(np.int64)
    place = np.arange(start[-1]) + np.repeat(first - start[:-1], before)
    return Lists(start=start, code=item.code[place], names=item.names)
