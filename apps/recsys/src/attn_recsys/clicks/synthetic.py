"""Impressions whose clicks follow from pairs of fields in a way that differs from pair to pair."""

from __future__ import annotations

import numpy as np

from attn_recsys.clicks.table import Names, Table

ROWS, USERS, ITEMS = 12_000, 300, 200
_LEVELS = {"daytime": 6, "weekday": 7, "place": 12, "device": 5}
_WIDTH = 4


def synthetic_clicks(rows: int = ROWS, seed: int = 0) -> Table:
    """A table with planted interactions.

    Each name has a hidden vector. The log odds of a click sum, over the pairs of fields that matter, the product of the
    two hidden vectors turned by a matrix of that pair's own: one pair of names may attract in one pair of fields and
    repel in another. Popularity, a category that items belong to and a price add plain effects. Half the pairs matter.
    """
    rng = np.random.default_rng([seed, 7])
    user = rng.integers(0, USERS, rows)
    item = np.minimum(rng.zipf(1.4, rows) - 1, rng.integers(0, ITEMS, rows))
    category = rng.integers(0, 8, ITEMS)
    price = rng.lognormal(2.0, 0.7, ITEMS)
    codes = {"user": user, "item": item, "category": category[item]}
    codes |= {name: rng.integers(0, size, rows) for name, size in _LEVELS.items()}
    sizes = {"user": USERS, "item": ITEMS, "category": 8, **_LEVELS}
    vectors = {name: rng.normal(size=(size, _WIDTH)) for name, size in sizes.items()}
    odds = rng.normal(0, 0.7, ITEMS)[item] - 0.5 * (np.log(price[item]) - 2.0)
    names = list(codes)
    pairs = [(a, b) for i, a in enumerate(names) for b in names[i + 1 :]]
    for number in rng.permutation(len(pairs))[: len(pairs) // 2]:
        left, right = pairs[number]
        turn = np.linalg.qr(rng.normal(size=(_WIDTH, _WIDTH)))[0]
        odds = odds + 0.45 * ((vectors[left][codes[left]] @ turn) * vectors[right][codes[right]]).sum(axis=1)
    label = (rng.random(rows) < 1 / (1 + np.exp(-(odds - 1.2)))).astype(float)
    return Table(
        name="synthetic_clicks",
        rows=rows,
        single={
            name: Names(code=code.astype(np.int64), names=[f"{name}{i}" for i in range(sizes[name])])
            for name, code in codes.items()
        },
        numeric={"price": price[item]},
        label=label,
        user="user",
        item="item",
        item_columns=("category",),
        time=np.arange(rows, dtype=float),
        notes=["generated: clicks follow from pairs of fields, each pair in its own way"],
    )
