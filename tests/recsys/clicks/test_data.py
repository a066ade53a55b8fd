"""Splits, drawn rows and encodings of clicks: nothing of validation and test reaches training."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from attn_recsys.clicks.data import ClicksSet, padded, prepare, repeated
from attn_recsys.clicks.encode import FIRST, PADDING, UNKNOWN, Encoder
from attn_recsys.clicks.options import ClicksDataConfig
from attn_recsys.clicks.splits import TEST, TRAIN, VAL, follows, split, with_negatives
from attn_recsys.clicks.synthetic import synthetic_clicks
from attn_recsys.clicks.table import Table, lists_of, names_of
from attn_shared.errors import UserError


def clicks(rows: int = 600, users: int = 30, items: int = 25, seed: int = 0) -> Table:
    """Clicks alone: users, items with a category that follows, lists of tags that follow, an hour."""
    rng = np.random.default_rng(seed)
    item = rng.integers(0, items, rows)
    return Table(
        name="clicks",
        rows=rows,
        single={
            "user": names_of([f"u{i}" for i in rng.integers(0, users, rows)]),
            "item": names_of([f"i{i}" for i in item]),
            "category": names_of([f"c{i % 4}" for i in item]),
            "hour": names_of([f"h{i}" for i in rng.integers(0, 5, rows)]),
        },
        many={"tags": lists_of([[f"t{i % 3}", f"t{i % 5 + 3}"] for i in item])},
        numeric={"price": np.where(rng.random(rows) < 0.1, np.nan, item + rng.normal(size=rows))},
        user="user",
        item="item",
        item_columns=("category", "tags"),
        time=rng.permutation(rows).astype(float),
    )


def words(table: Table, column: str) -> list[str | None]:
    made = table.single[column]
    return [made.names[code] if code >= 0 else None for code in made.code]


# -- splits -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["random", "user", "time"])
def test_split_has_its_shares_and_follows_from_shuffle(kind: str) -> None:
    table = clicks()
    args = ClicksDataConfig(split=kind, val=0.1, test=0.2)  # type: ignore[arg-type]
    part = split(table, args)
    np.testing.assert_array_equal(part, split(table, args))
    share = np.bincount(part, minlength=3) / table.rows
    np.testing.assert_allclose(share, [0.7, 0.1, 0.2], atol=0.001 if kind != "user" else 0.08)
    if kind == "time":
        assert table.time is not None
        assert table.time[part == TRAIN].max() < table.time[part == VAL].min() < table.time[part == TEST].min()
    else:
        assert (part != split(table, replace(args, shuffle=1))).any()
    if kind == "user":
        users = np.array(words(table, "user"))
        assert not set(users[part == TRAIN]) & set(users[part != TRAIN])
        assert not set(users[part == VAL]) & set(users[part == TEST])


def test_leave_one_out_keeps_what_was_shown_with_the_click_that_followed() -> None:
    user = ["a"] * 7 + ["b"] * 3
    table = Table(
        name="t",
        rows=10,
        single={"user": names_of(user)},
        label=np.array([1, 0, 1, 0, 1, 0, 0, 1, 0, 1.0]),
        user="user",
    )
    part = split(table, ClicksDataConfig(split="leave_one_out"))
    # a: click | shown, click (validation) | shown, click, shown, shown (test); b has two clicks only.
    assert part.tolist() == [TRAIN, VAL, VAL, TEST, TEST, TEST, TEST, TRAIN, TRAIN, TRAIN]
    early = replace(table, time=np.array([9, 8, 7, 6, 5, 4, 3, 0, 0, 0.0]))
    part = split(early, ClicksDataConfig(split="leave_one_out"))
    assert part.tolist()[:7] == [TEST, TEST, VAL, VAL, TRAIN, TRAIN, TRAIN]


def test_splits_refuse_what_they_cannot() -> None:
    bare = Table(name="t", rows=4, single={"x": names_of(["a", "b", "a", "b"])}, label=np.array([0, 1, 0, 1.0]))
    for kind, message in (("user", "needs users"), ("time", "needs times"), ("given", "no split of its own")):
        with pytest.raises(UserError, match=message):
            split(bare, ClicksDataConfig(split=kind))  # type: ignore[arg-type]
    with pytest.raises(UserError, match="below 1 together"):
        split(bare, ClicksDataConfig(val=0.5, test=0.5))
    with pytest.raises(UserError, match="no row for training"):
        split(replace(bare, part=np.full(4, TEST, np.int8)), ClicksDataConfig(split="given"))


# -- drawn rows -------------------------------------------------------------------------------------------------------


def test_drawn_items_are_not_the_users_and_bring_their_attributes() -> None:
    table = clicks()
    part = split(table, ClicksDataConfig())
    full, parts, notes = with_negatives(table, part, ClicksDataConfig(negatives=3))
    assert not notes
    assert full.label is not None
    assert full.rows == 4 * table.rows
    np.testing.assert_array_equal(full.label.reshape(-1, 4), np.tile([1.0, 0, 0, 0], (table.rows, 1)))
    np.testing.assert_array_equal(parts.reshape(-1, 4), np.repeat(part[:, None], 4, axis=1))
    user, item, category = words(full, "user"), words(full, "item"), words(full, "category")
    had: dict[tuple[str | None, int], set] = {}
    for number in (TRAIN, VAL, TEST):
        for u, i, p in zip(words(table, "user"), words(table, "item"), part):
            if p <= number:
                had.setdefault((u, number), set()).add(i)
    for row in range(full.rows):
        if full.label[row] == 0:
            assert item[row] not in had[user[row], int(parts[row])]
        number = int(str(item[row])[1:])
        assert category[row] == f"c{number % 4}"
        tags = full.many["tags"]
        mine = [tags.names[c] for c in tags.code[tags.start[row] : tags.start[row + 1]]]
        assert mine == [f"t{number % 3}", f"t{number % 5 + 3}"]
    # What is no item's keeps the click's own.
    np.testing.assert_array_equal(full.single["hour"].code.reshape(-1, 4).std(axis=1), 0.0)


def test_training_rows_do_not_know_of_later_clicks() -> None:
    """Changing validation and test clicks changes no training row, vocabulary, mean or deviation."""
    table = clicks()
    args = ClicksDataConfig(negatives=2, split="time")
    part = split(table, args)
    rng = np.random.default_rng(9)
    later = part != TRAIN
    item = table.single["item"]
    code = item.code.copy()
    code[later] = rng.integers(0, len(item.names), int(later.sum()))
    price = np.where(later, 1e6, table.numeric["price"])
    changed = replace(
        table, single={**table.single, "item": replace(item, code=code)}, numeric={"price": price}, item_columns=()
    )
    a, b = prepare(replace(table, item_columns=()), args), prepare(changed, args)
    assert a.state["fields"] == b.state["fields"]
    assert a.state["numeric"] == b.state["numeric"]
    np.testing.assert_array_equal(a.train.names, b.train.names)
    np.testing.assert_array_equal(a.train.numbers, b.train.numbers)
    np.testing.assert_array_equal(a.train.activity, b.train.activity)
    # Test clicks may be drawn as training rows: had they been spared, training would know them.
    clicked = {(u, i) for u, i, p in zip(words(table, "user"), words(table, "item"), part) if p == TEST}
    trained = {(u, i) for u, i, p in zip(words(table, "user"), words(table, "item"), part) if p == TRAIN}
    full = a.table
    shown = {(u, i) for u, i, p in zip(words(full, "user"), words(full, "item"), a.part) if p == TRAIN}
    assert (shown - trained) & clicked


def test_each_epoch_draws_anew() -> None:
    """Others in each epoch and seed, the same ones again, never the user's own, with what follows from the item."""
    table, args = clicks(), ClicksDataConfig(negatives=2)
    made = prepare(table, args)
    train, encoder, full = made.train, made.encoder, made.table
    assert full.label is not None
    rows = np.flatnonzero(made.part == TRAIN)
    drawn = np.flatnonzero(full.label[rows] == 0)
    index = list(range(len(train)))
    fixed = train.__getitems__(index)
    np.testing.assert_array_equal(fixed["names"], train.names)
    train.set_epoch(0, 3)
    third = train.__getitems__(index)
    train.set_epoch(0, 4)
    fourth = train.__getitems__(index)
    train.set_epoch(1, 4)
    other = train.__getitems__(index)
    train.set_epoch(0, 3)
    # Whatever the batches are.
    for again in (index[::-1], index[5:17]):
        np.testing.assert_array_equal(train.__getitems__(again)["names"], third["names"][again])
    item = encoder.single.index("item")
    for a, b in ((fixed, third), (third, fourth), (fourth, other)):
        assert 0.8 < float((a["names"][drawn, item] != b["names"][drawn, item]).float().mean()) < 1
    clicked = np.setdiff1d(index, drawn)
    brings = {encoder.single.index("item"), encoder.single.index("category")}
    for batch in (third, fourth, other):
        for name in ("label", "numbers", "user", "activity"):
            assert torch.equal(batch[name], fixed[name])
        assert torch.equal(batch["names"][clicked], fixed["names"][clicked])
        assert torch.equal(batch["many.tags"][clicked], fixed["many.tags"][clicked])
        for column in set(range(len(encoder.single))) - brings:
            assert torch.equal(batch["names"][:, column], fixed["names"][:, column])
    words_of = [field["names"] for field in encoder.state["fields"]]
    tags = words_of[[field["name"] for field in encoder.state["fields"]].index("tags")]
    had = {(u, i) for u, i, p in zip(words(table, "user"), words(table, "item"), split(table, args)) if p == TRAIN}
    user, category = encoder.single.index("user"), encoder.single.index("category")
    for names, many in zip(third["names"][drawn].tolist(), third["many.tags"][drawn].tolist()):
        found = words_of[item][names[item] - FIRST]
        assert (words_of[user][names[user] - FIRST], found) not in had
        number = int(found[1:])
        assert words_of[category][names[category] - FIRST] == f"c{number % 4}"
        assert {tags[code - FIRST] for code in many if code} == {f"t{number % 3}", f"t{number % 5 + 3}"}


def test_rows_may_be_drawn_once() -> None:
    made = prepare(clicks(), ClicksDataConfig(negatives=2, redraw=False))
    anew = prepare(clicks(), ClicksDataConfig(negatives=2))
    assert type(made.train) is ClicksSet
    np.testing.assert_array_equal(made.train.names, anew.train.names)
    assert "anew in each epoch" in anew.protocol
    assert "anew in each epoch" not in made.protocol


def test_drawn_rows_stand_behind_their_own_users() -> None:
    """Also where users are missing, and so users of their own, or have every item."""
    items = [f"i{i}" for i in range(6)]
    table = Table(
        name="t",
        rows=12,
        single={
            "user": names_of([None, "all", *["few", None], *["all"] * 5, "few", "some", None]),
            "item": names_of(["i3", "i0", "i0", "i1", *items[1:], "i2", "i4", "i5"]),
        },
        user="user",
        item="item",
        part=np.zeros(12, np.int8),
    )
    made = prepare(table, ClicksDataConfig(negatives=4, split="given"))
    assert len(made.train) == 12 + 4 * 6
    names = made.encoder.state["fields"][made.encoder.single.index("item")]["names"]
    seen: dict[int, set[str]] = {}
    for epoch in range(30):
        made.train.set_epoch(0, epoch)
        batch = made.train.__getitems__(range(len(made.train)))
        click = torch.cumsum(batch["label"], 0).long() - 1
        column = batch["names"][:, made.encoder.single.index("item")]
        for row in torch.nonzero(batch["label"] == 0).flatten().tolist():
            seen.setdefault(int(click[row]), set()).add(names[int(column[row]) - FIRST])
    own = {0: {"i3"}, 2: {"i0", "i2"}, 3: {"i1"}, 9: {"i0", "i2"}, 10: {"i4"}, 11: {"i5"}}
    assert seen == {click: set(items) - had for click, had in own.items()}


def test_a_user_with_every_item_gets_no_drawn_rows() -> None:
    items = [f"i{i}" for i in range(6)]
    table = Table(
        name="t",
        rows=8,
        single={"user": names_of(["all"] * 6 + ["few"] * 2), "item": names_of([*items, "i0", "i1"])},
        user="user",
        item="item",
        part=np.zeros(8, np.int8),
    )
    full, _, notes = with_negatives(table, np.zeros(8, np.int8), ClicksDataConfig(negatives=2))
    assert full.rows == 8 + 4
    assert notes == ["6 clicks of users who have every item got no drawn rows"]
    with pytest.raises(UserError, match="must be 0"):
        with_negatives(replace(table, label=np.ones(8)), np.zeros(8, np.int8), ClicksDataConfig(negatives=2))
    with pytest.raises(UserError, match="needs users and items"):
        with_negatives(replace(table, item=None), np.zeros(8, np.int8), ClicksDataConfig(negatives=2))
    with pytest.raises(UserError, match="every row is a click"):
        prepare(table, ClicksDataConfig())


def test_earlier_items_are_not_drawn() -> None:
    table = clicks(rows=100, users=4)
    past = lists_of([["i1", "i2"]] * 100)
    full, _, _ = with_negatives(replace(table, past=past), np.zeros(100, np.int8), ClicksDataConfig(negatives=5))
    assert full.label is not None
    assert not {"i1", "i2"} & {i for i, y in zip(words(full, "item"), full.label) if y == 0}


# -- encoding ---------------------------------------------------------------------------------------------------------


def test_encoding() -> None:
    table = Table(
        name="t",
        rows=5,
        single={"item": names_of(["a", "b", "a", "new", None]), "brand": names_of(["x", "y", "x", "z", None])},
        many={"tags": lists_of([["p", "q"], [], ["q"], ["new", "p"], []])},
        numeric={"price": np.array([1.0, 3.0, np.nan, 100.0, 2.0])},
        past=lists_of([[], ["a"], ["a", "b", "b"], ["new", "a"], ["b"]]),
        item="item",
        item_columns=("brand", "tags"),
    )
    encoder = Encoder.fit(table, np.array([0, 1, 2]), max_length=2)
    assert [f.size for f in encoder.shape.fields] == [FIRST + 2, FIRST + 2, FIRST + 2]
    found = encoder.encode(table)
    a, b = FIRST, FIRST + 1
    assert found.names[:, 0].tolist() == [a, b, a, UNKNOWN, PADDING]
    assert found.names[:, 1].tolist() == [a, b, a, UNKNOWN, PADDING]
    # Means and deviations of rows 0 and 1; a missing number is the mean.
    np.testing.assert_allclose(found.numbers[:, 0], [-1, 1, 0, 98, 0])
    rows = ClicksSet(
        found, np.arange(5), label=np.zeros(5), user=np.arange(5), activity=np.zeros(5, np.int64), item="item"
    )
    batch = rows.__getitems__([2, 0, 3])
    assert batch["past.item"].tolist() == [[b, b], [0, 0], [UNKNOWN, a]]
    assert batch["past.brand"].tolist() == [[b, b], [0, 0], [UNKNOWN, a]]
    q, p = (
        encoder.state["fields"][2]["names"].index("q") + FIRST,
        encoder.state["fields"][2]["names"].index("p") + FIRST,
    )
    assert batch["many.tags"].tolist() == [[q, 0], [p, q], [p, 0]]  # the unknown tag is left out
    assert batch["past.tags"][0].tolist() == [[0, 0], [0, 0]]  # b has no tags
    assert batch["past.tags"][2].tolist() == [[0, 0], [p, q]]
    # Other tables are read with the same vocabulary, whatever order their names have.
    other = encoder.encode(table.take(np.array([3, 1])))
    assert other.names[:, 0].tolist() == [UNKNOWN, b]
    with pytest.raises(UserError, match="lacks what the model was trained with: brand"):
        encoder.encode(replace(table, single={"item": table.single["item"]}))
    rare = Encoder.fit(replace(table, past=None), np.array([0, 1, 2]), min_count=2)
    assert rare.encode(table).names[:, 0].tolist() == [FIRST, UNKNOWN, FIRST, UNKNOWN, PADDING]


def test_padding() -> None:
    start, number = np.array([0, 2, 2, 5]), np.array([7, 8, 1, 2, 3])
    assert padded(start, number, np.array([2, 0, 1])).tolist() == [[1, 2, 3], [7, 8, 0], [0, 0, 0]]
    assert padded(start, number, np.array([2, 0]), front=True).tolist() == [[1, 2, 3], [0, 7, 8]]
    assert padded(start, number, np.array([1])).tolist() == [[0]]


def test_what_follows_from_the_item() -> None:
    table = clicks()
    item = table.single["item"]
    assert follows(item, table.single["category"])
    assert follows(item, table.many["tags"])
    assert not follows(item, table.single["hour"])
    assert not follows(item, names_of(["one"] * table.rows))


# -- reports ----------------------------------------------------------------------------------------------------------


def test_repeated_rows_are_reported() -> None:
    base = synthetic_clicks(200)
    rows = np.concatenate([np.arange(200), np.arange(20)])
    part = np.array([TRAIN] * 200 + [TEST] * 20, np.int8)
    notes = repeated(base.take(rows), part)
    assert any("20 rows repeat another one" in note for note in notes)
    assert any(note.startswith("LEAK: 20 of 20 test rows equal a training row") for note in notes)


def test_a_column_that_tells_the_label_is_reported() -> None:
    base = synthetic_clicks(2000)
    assert base.label is not None
    told = replace(base, numeric={"minutes watched": base.label * 3 + np.random.default_rng(0).random(2000)})
    notes = prepare(told, ClicksDataConfig()).facts.values()
    assert any(str(note).startswith("LEAK? column minutes watched alone tells the label") for note in notes)
    assert not any("LEAK?" in str(note) for note in prepare(base, ClicksDataConfig()).facts.values())


def test_a_checkpoints_state_reproduces_its_data() -> None:
    args = ClicksDataConfig(negatives=2)
    first = prepare(clicks(), args)
    again = prepare(clicks(), args, first.state)
    assert first.test is not None
    assert again.test is not None
    np.testing.assert_array_equal(first.test.names, again.test.names)
    np.testing.assert_array_equal(first.test.numbers, again.test.numbers)
    np.testing.assert_array_equal(first.test.label, again.test.label)
