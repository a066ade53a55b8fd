"""Rows beside every model: chance, popularity, and item-kNN with its neighbourhood chosen on validation."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.sparse import csr_array

from attn_recsys.items import metrics
from attn_recsys.items.data import Pairs, UserSet
from attn_recsys.items.options import ItemsTaskConfig

Scorer = Callable[[np.ndarray], np.ndarray]
NEIGHBOURS = (5, 10, 20, 50, 100, 200, 400)
_BLOCK = 256


@dataclass(frozen=True)
class Baseline:
    """A rule that ranks items, fitted on training alone (its options on validation).

    Attributes:
        scores: users (B,) -> (B, I) float32.
        note: what it is, and what was chosen.
    """

    name: str
    scores: Scorer
    note: str


def baselines(train: Pairs, val: UserSet | None, task: ItemsTaskConfig) -> list[Baseline]:
    """All three, the best guess last."""
    return [chance(train), popularity(train), item_knn(train, val, task)]


def chance(train: Pairs, seed: int = 0) -> Baseline:
    """Random scores."""

    def scores(users: np.ndarray) -> np.ndarray:
        return np.stack([np.random.default_rng([seed, int(u)]).random(train.size, np.float32) for u in users])

    return Baseline("random", scores, "random order")


def popularity(train: Pairs) -> Baseline:
    """Users who had an item in training; equal counts in random order."""
    counts = popular(train)

    def scores(users: np.ndarray) -> np.ndarray:
        return np.repeat(counts[None], len(users), axis=0)

    return Baseline("popularity", scores, "how many users had it in training")


def popular(train: Pairs) -> np.ndarray:
    """(I,) users who had an item in training, plus less than one half to break ties at random."""
    counts = np.bincount(train.number, minlength=train.size)
    return (counts + 0.5 * np.random.default_rng(0).random(train.size)).astype(np.float32)


def item_knn(train: Pairs, val: UserSet | None, task: ItemsTaskConfig) -> Baseline:
    """Sum of the cosines between an item and those the user had, each item keeping its nearest neighbours.

    The number of neighbours is the one with the best validation score; without validation, 100.
    """
    # Among items without any common user, the popular ones come first.
    rest = popular(train) / (1e6 * max(1.0, float(popular(train).max())))
    matrix = train.matrix()
    if val is None:
        chosen = 100
    else:
        widest = neighbours(train, max(NEIGHBOURS))
        results = {}
        for count in NEIGHBOURS:
            if count < 2 * train.size or count == NEIGHBOURS[0]:
                users = evaluate(_knn_scores(matrix, keep(widest, count), rest), val, task)
                results[count] = float(np.mean(users.figures[metrics.primary(task.k, sampled=bool(task.sampled))]))
        chosen = max(results, key=lambda count: results[count])
    nearest = neighbours(train, chosen)
    note = f"cosine, {chosen} neighbours" + (", chosen on validation" if val is not None else "")
    return Baseline("item-kNN", _knn_scores(matrix, nearest, rest), note)


def _knn_scores(matrix: csr_array, nearest: csr_array, rest: np.ndarray) -> Scorer:
    def scores(users: np.ndarray) -> np.ndarray:
        return np.asarray((matrix[users] @ nearest.T).todense(), np.float32) + rest

    return scores


def neighbours(train: Pairs, count: int, block: int = 512) -> csr_array:
    """(I, I) cosines between items' users; each row keeps its `count` largest, itself left out."""
    matrix = train.matrix().tocsc()
    norm = np.sqrt(np.bincount(train.number, minlength=train.size))
    scaled = (matrix.multiply(1 / np.maximum(1, norm)[None, :])).tocsc()
    turned = scaled.T.tocsr()
    data, indices, lengths = [], [], []
    for first in range(0, train.size, block):
        similar = (turned[first : first + block] @ scaled).tocsr()
        for row in range(similar.shape[0]):
            span = slice(similar.indptr[row], similar.indptr[row + 1])
            value, place = similar.data[span], similar.indices[span]
            other = place != first + row
            value, place = value[other], place[other]
            if len(value) > count:
                # Equal cosines: the lower item number, so that nothing depends on how they were stored.
                best = np.lexsort((place, -value))[:count]
                value, place = value[best], place[best]
            data.append(value)
            indices.append(place)
            lengths.append(len(value))
    start = np.concatenate([[0], np.cumsum(lengths)])
    return csr_array((np.concatenate(data), np.concatenate(indices), start), shape=(train.size, train.size))


def keep(nearest: csr_array, count: int) -> csr_array:
    """Each row's `count` largest entries."""
    row = np.repeat(np.arange(nearest.shape[0]), np.diff(nearest.indptr))
    order = np.lexsort((nearest.indices, -nearest.data, row))
    place = np.arange(len(row)) - nearest.indptr[row]
    chosen = order[place < count]
    return csr_array((nearest.data[chosen], (row[chosen], nearest.indices[chosen])), shape=nearest.shape)


def evaluate(scores: Scorer, users: UserSet, task: ItemsTaskConfig) -> metrics.Users:
    """The figures of a rule for all users of a split."""
    state: dict = {}
    train_users = users.wanted.owners
    counts = np.bincount(users.train.number, minlength=users.wanted.size)
    surprise = metrics.surprise(counts, train_users)
    for first in range(0, len(users), _BLOCK):
        batch = users.__getitems__(range(first, min(first + _BLOCK, len(users))))
        block = metrics.rank(
            scores(batch["user"].numpy()),
            batch["wanted"].numpy(),
            batch["seen"].numpy(),
            task.k,
            surprise,
            batch["candidates"].numpy() if "candidates" in batch else None,
        )
        metrics.add(
            state, metrics.pack(batch["index"], batch["activity"], batch["wanted"], block, users.wanted.size, task.k)
        )
    found = metrics.unpack(state, task.k, sampled=bool(task.sampled))
    assert found is not None
    return found


def rows(found: Sequence[tuple[Baseline, metrics.Users]], task: ItemsTaskConfig) -> list[dict[str, str | float]]:
    """Rows of a table."""
    return [
        {
            "model": one.name,
            "note": one.note,
            **metrics.figures(users, task.k, groups=task.groups, intervals=True),
        }
        for one, users in found
    ]
