"""Amazon Beauty as clicks: a row's past is what its reviewer had before, and nothing of later rows."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest

from attn_recsys.clicks.beauty import earlier, read_beauty
from attn_recsys.clicks.data import load_table, prepare
from attn_recsys.clicks.options import ClicksDataConfig
from attn_recsys.clicks.table import Names, Table
from attn_shared.errors import UserError

LINES = "1 5 7 6 9\n2 7 5 9 8\n3 6 10\n4 9 8 5 6 7\n"
ATTRIBUTES = '{"5": [1, 2], "6": [2], "7": [3, 1, 4], "8": [4], "9": [2, 5], "10": [5]}'


def small(folder: Path) -> Table:
    (folder / "Beauty.txt").write_text(LINES)
    (folder / "Beauty_item2attributes.json").write_text(ATTRIBUTES)
    return read_beauty(folder)


def attributes_of(item: str) -> set[str]:
    return {f"attribute {number}" for number in json.loads(ATTRIBUTES)[item]}


def past_of(table: Table, row: int) -> list[str]:
    assert table.past is not None
    return [table.past.names[c] for c in table.past.code[table.past.start[row] : table.past.start[row + 1]]]


def test_rows(tmp_path: Path) -> None:
    table = small(tmp_path)
    user, item = table.single["user"], table.single["item"]
    lines = {words[0]: words[1:] for words in (line.split() for line in LINES.splitlines())}
    found: dict[str, list[str]] = {}
    for row in range(table.rows):
        name = user.names[user.code[row]]
        assert past_of(table, row) == found.get(name, [])
        found.setdefault(name, []).append(item.names[item.code[row]])
        several = table.many["attributes"]
        have = {several.names[c] for c in several.code[several.start[row] : several.start[row + 1]]}
        assert have == attributes_of(found[name][-1])
    assert found == lines


def test_earlier_of_users_without_rows() -> None:
    past = earlier(np.array([2, 2, 2, 7, 9, 9]), Names(code=np.array([4, 3, 4, 0, 1, 2]), names=list("abcde")))
    assert np.diff(past.start).tolist() == [0, 1, 2, 0, 0, 1]
    assert past.code.tolist() == [4, 4, 3, 1]


def test_batches(tmp_path: Path) -> None:
    """The last click of a user is test, the one before validation; a drawn item brings its attributes, not a past."""
    prepared = prepare(small(tmp_path), ClicksDataConfig(split="leave_one_out"))
    assert prepared.test is not None
    assert prepared.val is not None
    assert len(prepared.test) == len(prepared.val) == 6  # three users with three clicks or more, one drawn row each
    encoder = prepared.encoder
    names = {f["name"]: ["", "unknown", *f["names"]] for f in encoder.state["fields"]}
    last = {"1": ["5", "7", "6", "9"], "2": ["7", "5", "9", "8"], "4": ["9", "8", "5", "6", "7"]}
    column = encoder.single.index("user")
    for cut, part in ((2, prepared.val), (1, prepared.test)):
        batch = {name: value.numpy() for name, value in part.__getitems__(range(len(part))).items()}
        for r in range(len(part)):
            items = last[names["user"][batch["names"][r, column]]]
            assert [names["item"][i] for i in batch["past.item"][r] if i] == items[:-cut]
            target = names["item"][batch["names"][r, encoder.single.index("item")]]
            assert (target == items[-cut]) == bool(batch["label"][r])
            if target != "unknown":
                assert {names["attributes"][a] for a in batch["many.attributes"][r] if a} == attributes_of(target)
            for i, have in zip(batch["past.item"][r], batch["past.attributes"][r], strict=True):
                if i > 1:
                    assert {names["attributes"][a] for a in have if a} == attributes_of(names["item"][i])


def test_a_drawn_split_is_refused() -> None:
    with pytest.raises(UserError, match="leave_one_out"):
        load_table("amazon_beauty", ClicksDataConfig())


@pytest.mark.data
def test_the_real_set() -> None:
    if not (Path(os.environ.get("ATTN_DATA", "data")) / "recsys" / "amazon_beauty").is_dir():
        pytest.skip("Amazon Beauty is not under ATTN_DATA")
    table = load_table("amazon_beauty", ClicksDataConfig(split="leave_one_out"))
    assert table.rows == 198_502
    assert (len(table.single["user"].names), len(table.single["item"].names)) == (22_363, 12_101)
    assert len(table.many["attributes"].names) == 637
    assert table.past is not None
    assert int(np.diff(table.past.start).max()) == 203
