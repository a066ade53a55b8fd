"""Figures against scikit-learn and against their definitions written out."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from sklearn.metrics import ndcg_score, roc_auc_score

from attn_recsys.items import metrics
from attn_shared.errors import UserError

KS = (3, 10)


def ragged(rows: list[list[int]]) -> np.ndarray:
    width = max(1, *map(len, rows))
    return np.array([row + [-1] * (width - len(row)) for row in rows])


def problem(users: int = 60, items: int = 40, seed: int = 0) -> tuple[np.ndarray, list[list[int]], list[list[int]]]:
    """Scores, wanted and seen items of each user."""
    rng = np.random.default_rng(seed)
    wanted, seen = [], []
    for _ in range(users):
        order = rng.permutation(items)
        first, second = rng.integers(1, 12), rng.integers(0, 15)
        wanted.append(sorted(order[:first].tolist()))
        seen.append(sorted(order[first : first + second].tolist()))
    return rng.normal(size=(users, items)).astype(np.float32), wanted, seen


def test_against_scikit_learn() -> None:
    scores, wanted, seen = problem()
    block = metrics.rank(scores.copy(), ragged(wanted), ragged(seen), KS, np.zeros(40))
    found = dict(zip(metrics.names(KS), block.rows.T))
    for row in range(len(scores)):
        left = np.setdiff1d(np.arange(40), seen[row])
        truth = np.isin(left, wanted[row]).astype(int)
        mine = scores[row, left]
        for k in KS:
            assert found[f"ndcg@{k}"][row] == pytest.approx(ndcg_score([truth], [mine], k=k), abs=1e-12)
        assert found["auc"][row] == pytest.approx(roc_auc_score(truth, mine), abs=1e-12)


def test_against_definitions() -> None:
    scores, wanted, seen = problem(seed=1)
    surprise = np.random.default_rng(5).random(40)
    block = metrics.rank(scores.copy(), ragged(wanted), ragged(seen), KS, surprise)
    found = dict(zip(metrics.names(KS), block.rows.T))
    for row in range(len(scores)):
        order = [i for i in np.argsort(-scores[row]) if i not in seen[row]]
        hits = [i in wanted[row] for i in order]
        assert found["mrr"][row] == pytest.approx(1 / (1 + hits.index(True)))
        assert block.top[row].tolist() == order[: max(KS)]
        for k in KS:
            first = hits[:k]
            dcg = sum(1 / math.log2(2 + place) for place, hit in enumerate(first) if hit)
            # The official code's: the hits of the longest list moved to its front, cut after k.
            own = sum(1 / math.log2(2 + place) for place in range(min(k, sum(hits[: max(KS)]))))
            assert found[f"recall@{k}"][row] == pytest.approx(sum(first) / len(wanted[row]))
            assert found[f"precision@{k}"][row] == pytest.approx(sum(first) / k)
            assert found[f"hit@{k}"][row] == float(any(first))
            assert found[f"ndcg_kgat@{k}"][row] == pytest.approx(dcg / own if own else 0.0)
            assert found[f"novelty@{k}"][row] == pytest.approx(np.mean([surprise[i] for i in order[:k]]))


def test_the_papers_ndcg_forgives_what_is_not_found() -> None:
    """One of five wanted items in front: found first is perfect to the paper's figure, not to the true one."""
    scores = -np.arange(20, dtype=np.float32)[None]
    block = metrics.rank(scores, np.array([[0, 16, 17, 18, 19]]), np.array([[-1]]), (10,), np.zeros(20))
    found = dict(zip(metrics.names((10,)), block.rows[0]))
    assert found["ndcg_kgat@10"] == 1.0
    assert found["ndcg@10"] == pytest.approx(1 / sum(1 / math.log2(2 + place) for place in range(5)))


def test_equal_scores_and_few_candidates() -> None:
    scores = np.zeros((2, 6), np.float32)
    block = metrics.rank(scores, np.array([[2, 3], [1, -1]]), np.array([[-1] * 5, [0, 2, 3, 4, 5]]), (4,), np.ones(6))
    found = dict(zip(metrics.names((4,)), block.rows.T))
    assert found["auc"][0] == 0.5
    assert found["mrr"][0] == pytest.approx(1 / 3.5)
    # The second user has one candidate left, which is wanted: found, nothing to be below it, three places empty.
    assert found["recall@4"][1] == found["ndcg@4"][1] == found["mrr"][1] == 1.0
    assert math.isnan(found["auc"][1])
    assert block.top[1].tolist() == [1, -1, -1, -1]
    assert found["novelty@4"][1] == 1.0


def test_items_no_candidate_even_with_the_best_score() -> None:
    scores = np.array([[9.0, 8.0, 1.0, -np.inf]], np.float32)
    block = metrics.rank(scores, np.array([[3]]), np.array([[0, 1]]), (2,), np.zeros(4))
    assert block.top.tolist() == [[2, 3]]
    with pytest.raises(UserError, match="no longer numbers"):
        metrics.rank(np.array([[np.nan, 1.0]]), np.array([[0]]), np.array([[-1]]), (1,), np.zeros(2))


def test_sampled_against_full() -> None:
    """With every other item as candidate, sampling is no sampling."""
    scores, wanted, seen = problem(seed=2)
    candidates = ragged([sorted(set(range(40)) - set(w) - set(s)) for w, s in zip(wanted, seen)])
    full = metrics.rank(scores.copy(), ragged(wanted), ragged(seen), KS, np.zeros(40))
    drawn = metrics.rank(scores.copy(), ragged(wanted), ragged(seen), KS, np.zeros(40), candidates)
    assert np.allclose(full.rows, drawn.rows)
    assert np.array_equal(full.top, drawn.top)
    assert all(name.startswith("sampled_") for name in metrics.names(KS, sampled=True))
    assert metrics.primary(KS, sampled=True) == "sampled_ndcg@3"


def test_batches_change_nothing() -> None:
    scores, wanted, seen = problem(seed=3)
    results = []
    for size in (7, 60):
        state: dict[str, torch.Tensor] = {}
        for first in reversed(range(0, 60, size)):
            part = slice(first, first + size)
            found, hidden = ragged(wanted[part]), ragged(seen[part])
            block = metrics.rank(scores[part].copy(), found, hidden, KS, np.ones(40))
            index = torch.arange(60)[part]
            metrics.add(state, metrics.pack(index, index % 9, torch.from_numpy(found), block, 40, KS))
        users = metrics.unpack(state, KS)
        assert users is not None
        results.append(metrics.figures(users, KS, groups=4, intervals=True))
    assert results[0] == results[1]
    figures = results[0]
    top = metrics.rank(scores.copy(), ragged(wanted), ragged(seen), KS, np.ones(40)).top
    assert figures["coverage@3"] == len(np.unique(top[:, :3])) / 40
    assert figures["ndcg@3, 95% from"] < figures["ndcg@3"] < figures["ndcg@3, 95% to"]
    assert sum(name.startswith("recall@10, users of") for name in figures) == 4


def test_groups_keep_equal_users_together() -> None:
    activity = np.array([1] * 50 + [2] * 10 + [5] * 20 + [9] * 20)
    groups = metrics.activity_groups(activity, 4)
    assert np.array_equal(sum(chosen.astype(int) for _, chosen in groups), np.ones(100))
    for _, chosen in groups:
        assert not set(activity[chosen]) & set(activity[~chosen])
    assert groups[0][0] == "users of 1 items"
    assert metrics.activity_groups(np.ones(5), 4) == []
    assert metrics.activity_groups(activity, 1) == []


def test_bootstrap() -> None:
    """The width of the interval is that of a normal mean; a missing value drops out of its own column only."""
    rng = np.random.default_rng(0)
    values = np.stack([rng.normal(size=400), np.full(400, 2.0)], axis=1)
    values[::2, 1] = np.nan
    low, high = metrics.bootstrap(values)
    assert (high - low)[0] == pytest.approx(2 * 1.96 * values[:, 0].std() / 20, rel=0.1)
    assert low[1] == high[1] == 2.0


def test_surprise() -> None:
    assert metrics.surprise(np.array([0, 1, 3]), 3).tolist() == [2.0, 1.0, 0.0]
