"""Recommendations: for known users, cold users, users with a history, and what is left out."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from attn_recsys.cli import APP, main
from attn_recsys.items.recommend import Recommender, fold_in, read_users
from attn_recsys.items.task import ItemsTask
from attn_shared import trainer
from attn_shared.errors import UserError


@pytest.fixture(scope="module")
def recommender(bprmf: Path) -> Recommender:
    task, _ = trainer.load_task(APP, bprmf)
    assert isinstance(task, ItemsTask)
    return Recommender(task)


@pytest.fixture(scope="module")
def kgat(train: Callable[..., Path]) -> Path:
    return train("--model", "kgat", "--data", "synthetic", "--trainer.batch_size", "512", "--trainer.max_epochs", "2")


def test_known_users(recommender: Recommender) -> None:
    known = recommender.known
    found = recommender.recommend(["user 003", "user 010"], k=7)
    assert [one.rank for one in found] == [*range(1, 8), *range(1, 8)]
    for name in ("user 003", "user 010"):
        mine = [one for one in found if one.user == name]
        had = {known.items[item] for item in known.everything.of(known.users.index(name))}
        assert all(one.by == "model" for one in mine)
        assert not had & {one.item for one in mine}
        assert [one.score for one in mine] == sorted((one.score for one in mine), reverse=True)
    task = recommender.task
    users, items = (vectors.detach() for vectors in task.network.embeddings())
    number = known.items.index(found[0].item)
    assert found[0].score == pytest.approx(float(users[3] @ items[number]), rel=1e-5)


def test_what_is_hidden(recommender: Recommender) -> None:
    known = recommender.known
    user = 3
    name, every = known.users[user], len(known.items)
    train = {known.items[item] for item in known.train.of(user)}
    held = {known.items[item] for item in known.everything.of(user)} - train
    assert held
    items = {
        hide: {one.item for one in recommender.recommend([name], k=every, hide=hide)}
        for hide in ("all", "train", "none")
    }
    assert items["train"] - items["all"] == held
    assert items["none"] - items["train"] == train
    also = recommender.recommend([name], k=every, history={name: [recommender.recommend([name], k=1)[0].item]})
    assert len(also) == len(items["all"]) - 1


def test_items_that_nobody_had(recommender: Recommender, kgat: Path) -> None:
    """BPR-MF knows nothing of them; KGAT ranks those that stand in the graph."""
    known = recommender.known
    cold = {known.items[i] for i in np.setdiff1d(np.arange(len(known.items)), known.train.number)}
    assert len(cold) >= 10
    found = recommender.recommend(["user 001"], k=len(known.items), hide="none")
    assert not cold & {one.item for one in found}
    assert any("cannot be ranked by bprmf" in note for note in recommender.notes)
    task, _ = trainer.load_task(APP, kgat)
    assert isinstance(task, ItemsTask)
    assert cold <= {one.item for one in Recommender(task).recommend(["user 001"], k=len(known.items), hide="none")}


def test_reasons_lead_through_the_graph(kgat: Path) -> None:
    task, _ = trainer.load_task(APP, kgat)
    assert isinstance(task, ItemsTask)
    known = task.known
    found = Recommender(task).recommend(["user 001"], k=5, paths=2)
    assert any(one.reasons for one in found)
    graph = known.graph
    assert graph is not None
    edges = {
        (graph.entities[h], graph.relations[r], graph.entities[t])
        for h, r, t in zip(graph.head, graph.relation, graph.tail)
    }
    for u, i in zip(known.train.owner, known.train.number):
        edges |= {(known.users[u], "had", known.items[i]), (known.items[i], "had by", known.users[u])}
    for one in found:
        for text, weight in one.reasons:
            assert 0 < weight <= 1
            words = text.replace("]-> ", "\n").replace(" -[", "\n").split("\n")
            assert words[0] == "user 001"
            assert words[-1] == one.item
            steps = zip(words[0::2], words[1::2], words[2::2])
            assert all(step in edges for step in steps)


def test_cold_users(recommender: Recommender) -> None:
    recommender.notes.clear()
    known = recommender.known
    counts = np.bincount(known.train.number, minlength=len(known.items))
    found = recommender.recommend(["nobody"], k=5)
    assert [one.score for one in found] == sorted(counts.tolist(), reverse=True)[:5]
    assert all(one.by == "popularity" for one in found)
    assert any("nobody was not in training and has no history" in note for note in recommender.notes)
    found = recommender.recommend(["nobody"], k=5, history={"nobody": ["no such item"]})
    assert all(one.by == "popularity" for one in found)
    assert any("unknown to the model (no such item)" in note for note in recommender.notes)
    found = recommender.recommend(["nobody"], k=5, history={"nobody": [found[0].item]})
    assert all(one.by == "history" for one in found)


def test_histories_are_worth_more_than_popularity(recommender: Recommender) -> None:
    """Trained users under new names, by their training items alone: better than popular items, for their test items."""
    known = recommender.known
    names = known.users[:150]
    history = {f"new {name}": [known.items[i] for i in known.train.of(u)] for u, name in enumerate(names)}
    wanted = [set(known.everything.of(u)) - set(known.train.of(u)) for u in range(150)]
    hits = {}
    for way, given in (("history", history), ("popularity", None)):
        found = recommender.recommend(list(history), k=20, history=given)
        assert {one.by for one in found} == {way}
        lists: dict[str, set[int]] = {}
        for one in found:
            lists.setdefault(one.user, set()).add(known.items.index(one.item))
        hits[way] = sum(len(lists[name] & mine) for name, mine in zip(history, wanted))
    assert hits["history"] > 1.2 * hits["popularity"]


def test_fold_in_is_the_minimum() -> None:
    torch.manual_seed(0)
    had, others, users = (torch.randn(n, 6, dtype=torch.float64) for n in (4, 50, 30))
    vector = fold_in(had, others, users).requires_grad_()
    mean = users.mean(dim=0)
    fit = torch.nn.functional.softplus((others @ vector)[None] - (had @ vector)[:, None]).mean(dim=1).sum()
    loss = fit + (vector - mean).square().sum() / (2 * (users - mean).square().mean())
    (gradient,) = torch.autograd.grad(loss, vector)
    assert gradient.abs().max() < 1e-5


def test_a_user_who_has_everything(train: Callable[..., Path], tmp_path: Path) -> None:
    rows = [("all", f"i{i}") for i in range(12)] + [
        (f"u{u}", f"i{(u * 5 + i) % 12}") for u in range(20) for i in range(4)
    ]
    (tmp_path / "own.csv").write_text("user,item\n" + "".join(f"{u},{i}\n" for u, i in rows))
    run = train("--data", str(tmp_path / "own.csv"), "--model", "bprmf")
    task, _ = trainer.load_task(APP, run)
    assert isinstance(task, ItemsTask)
    recommender = Recommender(task)
    assert recommender.recommend(["all"], k=3) == []
    assert any("user all had the other items already: nothing is left" in note for note in recommender.notes)
    assert len(recommender.recommend(["u1"], k=50)) == 12 - 4


def test_command(bprmf: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["recommend", str(bprmf), "--users", "user 001,user 002", "--k", "2"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["user", "rank", "item", "score", "by", "why"]
    assert len(lines) == 2 + 4
    users = tmp_path / "users.csv"
    users.write_text("user,age\nuser 005,1\nuser 005,1\nuser 006,2\n")
    (tmp_path / "history.csv").write_text("user,item\nnew,item 001\nnew,item 004\n")
    for name in ("o.csv", "o.json"):
        argv = ["--users", str(users), "--output", str(tmp_path / name), "--k", "3", "--hide", "train"]
        assert main(["recommend", str(bprmf), *argv]) == 0
    rows = list(csv.DictReader((tmp_path / "o.csv").open()))
    assert [row["user"] for row in rows] == ["user 005"] * 3 + ["user 006"] * 3
    assert [row["item"] for row in json.loads((tmp_path / "o.json").read_text(encoding="utf-8"))] == [
        row["item"] for row in rows
    ]
    assert main(["recommend", str(bprmf), "--history", str(tmp_path / "history.csv"), "--k", "1"]) == 0
    assert "history" in capsys.readouterr().out


def test_predict(bprmf: Path, tmp_path: Path) -> None:
    (tmp_path / "who.txt").write_text("user 001\nuser 002\n")
    assert main(["predict", str(bprmf), str(tmp_path / "who.txt"), "--output", str(tmp_path / "out"), "--k", "4"]) == 0
    rows = list(csv.DictReader((tmp_path / "out" / "who_recommendations.csv").open()))
    assert len(rows) == 8


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ([], "name the users"),
        (["--users", "a", "--k", "0"], "--k must be 1 or more"),
        (["--users", "a", "--output", "x.txt"], "ends in .csv or .json"),
        (["--users", "a", "--history", "nowhere.csv"], "there is no file nowhere.csv"),
        (["--users", "a", "--hide", "some"], "hide"),
        (["--user", "a"], "user"),
        (["--users", ","], "name the users"),
    ],
)
def test_refused(bprmf: Path, options: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["recommend", str(bprmf), *options]) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1


def test_users_of_files(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("user\n7\n07\n7\n")
    assert read_users(tmp_path / "a.txt") == ["7", "07"]
    (tmp_path / "b.csv").write_text("x;user_id\n1;07\n1;8\n")
    assert read_users(tmp_path / "b.csv") == ["07", "8"]
    (tmp_path / "c.csv").write_text("x;y\n1;07\n")
    with pytest.raises(UserError, match="no column of users"):
        read_users(tmp_path / "c.csv")
    (tmp_path / "d.txt").write_text("user\n")
    with pytest.raises(UserError, match="names no user"):
        read_users(tmp_path / "d.txt")
