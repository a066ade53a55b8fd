"""Rules beside the models, against dense arithmetic, and what the synthetic data is worth."""

from __future__ import annotations

import numpy as np
import pytest

from attn_recsys.items.baselines import baselines, evaluate, item_knn, keep, neighbours, popular
from attn_recsys.items.corpus import Corpus
from attn_recsys.items.data import Pairs, load_corpus, prepare
from attn_recsys.items.options import ItemsDataConfig, ItemsTaskConfig

TASK = ItemsTaskConfig()


def test_neighbours_against_dense_cosines(corpus: Corpus) -> None:
    train = prepare(corpus, ItemsDataConfig(), TASK).train
    table = np.asarray(train.matrix().todense(), np.float64)
    norm = np.maximum(1, np.linalg.norm(table, axis=0))
    dense = table.T @ table / norm[:, None] / norm[None]
    np.fill_diagonal(dense, 0)
    every = neighbours(train, 25, block=7)
    assert np.allclose(every.todense(), dense, atol=1e-6)
    few = np.asarray(neighbours(train, 5, block=9).todense())
    for row in range(25):
        kept = few[row] > 0
        assert kept.sum() == 5
        assert few[row][kept].min() >= dense[row][~kept & (np.arange(25) != row)].max() - 1e-6
    assert np.allclose(keep(every, 5).todense(), few)


def test_popularity_counts_training_only(corpus: Corpus) -> None:
    made = prepare(corpus, ItemsDataConfig(), TASK)
    counts = np.bincount(made.train.number, minlength=25)
    assert np.array_equal(np.floor(popular(made.train)), counts)


def test_planted_tastes_and_a_graph_that_matters() -> None:
    """Chance < popularity < item-kNN < two steps through the graph, all from training alone."""
    made = prepare(load_corpus("synthetic", ItemsDataConfig()), ItemsDataConfig(), TASK)
    assert made.graph is not None
    assert made.test_set is not None
    graph, names = made.graph, made.graph.relations
    made_by, of_school = names.index("made by"), names.index("of school")
    maker = {int(h): int(t) for h, r, t in zip(graph.head, graph.relation, graph.tail) if r == made_by}
    school = {int(h): int(t) for h, r, t in zip(graph.head, graph.relation, graph.tail) if r == of_school}
    of_item = np.unique([school[maker[item]] for item in range(len(made.items))], return_inverse=True)[1]
    member = (of_item[:, None] == np.arange(12)).astype(np.float32)
    liked, rest = np.asarray(made.train.matrix().todense()) @ member, popular(made.train) / 1000
    through = evaluate(lambda users: (liked[users] @ member.T + rest).astype(np.float32), made.test_set, TASK)
    figures = [
        float(evaluate(one.scores, made.test_set, TASK).figures["ndcg@10"].mean())
        for one in baselines(made.train, made.val_set, TASK)
    ]
    figures.append(float(through.figures["ndcg@10"].mean()))
    assert figures == sorted(figures)
    assert figures[3] > 1.25 * figures[2] > 1.5 * figures[1] > 3 * figures[0]


def test_neighbourhood_is_chosen_on_validation_alone() -> None:
    made = prepare(load_corpus("synthetic", ItemsDataConfig()), ItemsDataConfig(), TASK)
    assert "chosen on validation" in item_knn(made.train, made.val_set, TASK).note
    assert item_knn(made.train, None, TASK).note == "cosine, 100 neighbours"


def test_an_item_and_a_user_without_anything() -> None:
    train = Pairs(np.array([0, 0, 1]), np.array([0, 1, 1]), 3, 4)
    scores = item_knn(train, None, TASK).scores(np.array([0, 2]))
    assert np.isfinite(scores).all()
    # Nothing speaks for any item: the popular one comes first.
    assert scores[1].argmax() == 1
    assert scores[1].max() == pytest.approx(0, abs=1e-5)
