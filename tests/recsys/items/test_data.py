"""Splits, negatives and masks: nothing of validation and test reaches training, and nothing known is ranked."""

from __future__ import annotations

import dataclasses
import json
from itertools import pairwise

import numpy as np
import pytest
import torch

from attn_recsys.items.baselines import popular
from attn_recsys.items.corpus import Corpus, Interactions
from attn_recsys.items.data import Pairs, draws, prepare, restored
from attn_recsys.items.graph import with_inverse
from attn_recsys.items.options import ItemsDataConfig, ItemsTaskConfig
from attn_recsys.items.splits import TEST, TRAIN, VAL, shares, split
from attn_shared.errors import UserError

TASK = ItemsTaskConfig()


def recbole_counts(total: int, ratios: list[float]) -> list[int]:
    """Counts of a user's interactions as RecBole's ratio split documents them, written out one by one."""
    counts = [int(ratio * total) for ratio in ratios]
    counts[0] = total - sum(counts[1:])
    for i in range(1, len(ratios)):
        if counts[0] <= 1:
            break
        if 0 < ratios[-i] * total < 1:
            counts[-i] += 1
            counts[0] -= 1
    return counts


def test_shares_are_recboles() -> None:
    totals = np.arange(1, 300)
    for val, test in ((0.1, 0.1), (0.1, 0.2), (0.2, 0.2), (0.0, 0.25)):
        vals, tests = shares(totals, val, test)
        for total, v, t in zip(totals, vals, tests):
            assert recbole_counts(int(total), [1 - val - test, val, test])[1:] == [v, t], total


def test_ratio(corpus: Corpus) -> None:
    data = corpus.interactions
    part, _ = split(data, ItemsDataConfig(val=0.1, test=0.2))
    vals, tests = shares(np.bincount(data.user, minlength=40), 0.1, 0.2)
    assert np.array_equal(np.bincount(data.user[part == TEST], minlength=40), tests)
    assert np.array_equal(np.bincount(data.user[part == VAL], minlength=40), vals)
    again, _ = split(data, ItemsDataConfig(val=0.1, test=0.2))
    other, _ = split(data, ItemsDataConfig(val=0.1, test=0.2, shuffle=1))
    assert np.array_equal(part, again)
    assert not np.array_equal(part, other)


def test_leave_one_out_and_time(corpus: Corpus) -> None:
    data = corpus.interactions
    assert data.time is not None
    part, _ = split(data, ItemsDataConfig(split="leave_one_out"))
    for user in range(40):
        mine = data.user == user
        order = part[mine][np.argsort(data.time[mine])]
        ends = [VAL, TEST][3 - min(3, len(order)) :]
        assert order.tolist() == [TRAIN] * (len(order) - len(ends)) + ends
    part, _ = split(data, ItemsDataConfig(split="time"))
    spans = [data.time[part == which] for which in (TRAIN, VAL, TEST)]
    assert all(a.max() < b.min() for a, b in pairwise(spans))
    assert len(spans[2]) == pytest.approx(0.2 * len(part), abs=1)
    tied = dataclasses.replace(data, time=np.floor(data.time / 60))
    part, _ = split(tied, ItemsDataConfig(split="time"))
    for moment in np.unique(tied.time):
        assert len(np.unique(part[tied.time == moment])) == 1
    with pytest.raises(UserError, match="needs times"):
        split(dataclasses.replace(data, time=None), ItemsDataConfig(split="time"))
    with pytest.raises(UserError, match="no split of its own"):
        split(data, ItemsDataConfig(split="given"))
    with pytest.raises(UserError, match="below 1 together"):
        split(data, ItemsDataConfig(val=0.5, test=0.5))


def test_others_against_brute_force() -> None:
    rng = np.random.default_rng(0)
    table = rng.random((30, 17)) < rng.random((30, 1))
    table[3], table[4] = True, False
    pairs = Pairs(*np.nonzero(table), 30, 17)
    for owner in range(30):
        free = np.flatnonzero(~table[owner])
        assert np.array_equal(pairs.others(np.full(len(free), owner), np.arange(len(free))), free)
        assert np.array_equal(pairs.of(owner), np.flatnonzero(table[owner]))
    padded = pairs.padded(np.array([4, 3, 0]))
    assert (padded[0] == -1).all()
    assert padded[1].tolist() == list(range(17))


def test_nothing_of_val_and_test_is_in_training(corpus: Corpus) -> None:
    data, args = corpus.interactions, ItemsDataConfig()
    made = prepare(corpus, args, TASK)
    part, _ = split(data, args)
    for which, pairs in ((TRAIN, made.train), (VAL, made.val), (TEST, made.test)):
        rows = set(zip(data.user[part == which].tolist(), data.item[part == which].tolist()))
        assert set(zip(pairs.owner.tolist(), pairs.number.tolist())) == rows
    held = set(zip(made.val.owner, made.val.number)) | set(zip(made.test.owner, made.test.number))
    kept = restored(json.loads(json.dumps(made.state)))
    graph = kept.tensors()
    assert not held & set(zip(graph.user.tolist(), graph.item.tolist()))
    # The model sees training pairs and triples between entities, and no triple is about a user.
    assert graph.head.max() < kept.shape.entities
    assert graph.tail.max() < kept.shape.entities
    seen = set()
    for epoch in range(3):
        made.train_set.set_epoch(0, epoch)
        batch = made.train_set.__getitems__(range(len(made.train_set)))
        seen |= set(zip(batch["user"].tolist(), batch["positive"].tolist()))
    assert not held & seen


def test_other_test_items_change_nothing_in_training(corpus: Corpus) -> None:
    """Exchange every validation and test item: batches, negatives, graph and popularity stay as they are."""
    args = ItemsDataConfig()
    data = corpus.interactions
    part, _ = split(data, args)
    made = prepare(corpus, args, TASK)
    rng = np.random.default_rng(1)
    item = data.item.copy()
    for user in range(1, 40):
        held = np.flatnonzero((data.user == user) & (part != TRAIN))
        free = np.setdiff1d(np.arange(25), data.item[(data.user == user) & (part == TRAIN)])
        item[held] = rng.choice(free, len(held), replace=False)
    assert not np.array_equal(item, data.item)
    changed = dataclasses.replace(corpus, interactions=dataclasses.replace(data, item=item))
    other = prepare(changed, args, TASK)
    for epoch in (0, 5):
        for one in (made, other):
            one.train_set.set_epoch(7, epoch)
        first, second = (one.train_set.__getitems__(range(len(one.train_set))) for one in (made, other))
        assert all(torch.equal(first[name], second[name]) for name in first)
    assert made.state["train"] == other.state["train"]
    assert made.state["graph"] == other.state["graph"]
    assert np.array_equal(popular(made.train), popular(other.train))


def test_masks(corpus: Corpus) -> None:
    made = prepare(corpus, ItemsDataConfig(), TASK)
    for users, hidden in ((made.val_set, [made.train]), (made.test_set, [made.train, made.val])):
        assert users is not None
        batch = users.__getitems__(range(len(users)))
        for row, user in enumerate(batch["user"].tolist()):
            seen, wanted = (set(batch[name][row].tolist()) - {-1} for name in ("seen", "wanted"))
            assert seen == set().union(*(set(pairs.of(user).tolist()) for pairs in hidden))
            assert wanted
            assert not seen & wanted
            assert batch["activity"][row] == len(made.train.of(user))


def test_negatives(corpus: Corpus) -> None:
    made = prepare(corpus, ItemsDataConfig(), ItemsTaskConfig(negatives=3))
    train = made.train_set
    counts = np.zeros((40, 25))
    for epoch in range(60):
        train.set_epoch(0, epoch)
        batch = train.__getitems__(range(len(train)))
        assert batch["negative"].shape == (len(train), 3)
        np.add.at(counts, (batch["user"].numpy()[:, None], batch["negative"].numpy()), 1)
    had = np.asarray(made.train.matrix().todense()) > 0
    assert (counts[had] == 0).all()
    for user in range(40):
        free = counts[user][~had[user]]
        expected = free.mean()
        # Chi-square of a uniform draw: its mean is the number of cells less one.
        assert ((free - expected) ** 2 / expected).sum() < 3 * len(free)
        assert (free > 0).all()


def test_negatives_follow_from_seed_epoch_and_index(corpus: Corpus) -> None:
    train = prepare(corpus, ItemsDataConfig(), TASK).train_set
    train.set_epoch(4, 2)
    whole = train.__getitems__(range(len(train)))
    order = np.random.default_rng(0).permutation(len(train))
    mixed = train.__getitems__(order.tolist())
    assert all(torch.equal(whole[name][torch.from_numpy(order)], mixed[name]) for name in whole)
    assert torch.equal(train[5]["negative"], whole["negative"][5])
    train.set_epoch(4, 3)
    assert not torch.equal(train.__getitems__(range(len(train)))["negative"], whole["negative"])
    chance = draws(1, 0, np.arange(20_000), 2)
    assert abs(chance.mean() - 0.5) < 0.01
    assert abs(np.corrcoef(chance.T)[0, 1]) < 0.03
    assert abs(np.corrcoef(chance[:-1, 0], chance[1:, 0])[0, 1]) < 0.03


def test_users_with_every_item_or_none(corpus: Corpus) -> None:
    """User 0 has all 25 items in training here; user 1 has none there."""
    data = corpus.interactions
    part = np.where(data.user == 1, TEST, TRAIN).astype(np.int8)
    part[(data.user > 1) & (np.arange(len(part)) % 4 == 0)] = TEST
    given = dataclasses.replace(corpus, interactions=dataclasses.replace(data, part=part))
    made = prepare(given, ItemsDataConfig(split="given", val=0.0), TASK)
    batch = made.train_set.__getitems__(range(len(made.train_set)))
    assert 0 not in batch["user"].tolist()
    notes = " ".join(str(value) for value in made.facts.values())
    assert "25 training interactions belong to users who have every item" in notes
    assert "1 users of test have no training interaction" in notes
    assert made.test_set is not None
    assert 1 not in made.test_set.users
    assert made.val_set is None


def test_state_round_trip(corpus: Corpus) -> None:
    made = prepare(corpus, ItemsDataConfig(), TASK)
    kept = restored(json.loads(json.dumps(made.state)))
    assert np.array_equal(kept.train.owner, made.train.owner)
    assert np.array_equal(kept.train.number, made.train.number)
    assert kept.graph is not None
    assert made.graph is not None
    for name in ("head", "relation", "tail"):
        assert np.array_equal(getattr(kept.graph, name), getattr(made.graph, name))
    assert kept.graph.entities == made.graph.entities
    assert len(kept.everything) == len(corpus.interactions.user)
    again = prepare(corpus, ItemsDataConfig(), TASK, state=made.state)
    assert np.array_equal(again.test.number, made.test.number)


def test_other_data_under_the_numbers_of_training(corpus: Corpus) -> None:
    made = prepare(corpus, ItemsDataConfig(), TASK)
    user, item = int(made.train.owner[3]), int(made.train.number[3])
    new = Interactions(
        users=["stranger", "u5", f"u{user}"],
        items=["i3", "never", f"i{item}"],
        user=np.array([0, 1, 1, 2, 2, 2]),
        item=np.array([0, 0, 1, 2, 0, 1]),
        part=np.array([2, 2, 2, 2, 0, 0], np.int8),
    )
    args = ItemsDataConfig(split="given", val=0.0)
    other = prepare(Corpus(name="new", interactions=new), args, TASK, state=made.state)
    known = set(made.train.of(5).tolist())
    expected = [] if 3 in known else [(5, 3)]
    assert list(zip(other.test.owner.tolist(), other.test.number.tolist())) == expected
    assert other.users == made.users
    notes = " ".join(str(value) for value in other.facts.values())
    assert "the model was trained with them" in notes
    assert "users or items that training did not have" in notes


def test_inverse(corpus: Corpus) -> None:
    assert corpus.graph is not None
    both = with_inverse(corpus.graph)
    count = len(corpus.graph.head)
    assert len(both.head) == 2 * count
    assert np.array_equal(both.head[count:], corpus.graph.tail)
    assert both.relations == ["kind", "next", "inverse of kind", "inverse of next"]
    plain = prepare(corpus, ItemsDataConfig(inverse=False), TASK)
    assert plain.graph is not None
    assert len(plain.graph.relations) == 2


def test_sampled_candidates(corpus: Corpus) -> None:
    made = prepare(corpus, ItemsDataConfig(), ItemsTaskConfig(sampled=30))
    assert "SAMPLED" in made.protocol
    assert made.test_set is not None
    batch = made.test_set.__getitems__(range(len(made.test_set)))
    everything = made.train.joined(made.val).joined(made.test)
    for row, user in enumerate(batch["user"].tolist()):
        drawn = batch["candidates"][row]
        drawn = drawn[drawn >= 0].tolist()
        assert len(set(drawn)) == len(drawn) == 25 - len(everything.of(user))
        assert not set(drawn) & set(everything.of(user).tolist())
