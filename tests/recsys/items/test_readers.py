"""What is read is what the file says, and what cannot be read is refused in one sentence."""

from __future__ import annotations

import gzip
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from attn_recsys.cli import kind_of_file, main
from attn_recsys.items.corpus import Corpus
from attn_recsys.items.data import load_corpus
from attn_recsys.items.options import ItemsDataConfig
from attn_recsys.items.readers import load_path
from attn_shared.errors import UserError

CSV = """user_id,item,timestamp,rating
007,a,2024-01-03,5
7,b,2024-01-01,1
007,a,2024-01-01,4
007,b,2024-01-02,3
x y,c,2024-01-05,2
,c,2024-01-05,2
"""


def pairs(corpus: Corpus) -> list[tuple[str, str]]:
    data = corpus.interactions
    return [(data.users[u], data.items[i]) for u, i in zip(data.user, data.item)]


def write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def test_csv(tmp_path: Path) -> None:
    corpus = load_path(write(tmp_path / "t.csv", CSV), ItemsDataConfig())
    # In the order of time, "007" another user than "7", the earlier of the repeated pair kept.
    assert pairs(corpus) == [("7", "b"), ("007", "a"), ("007", "b"), ("x y", "c")]
    data = corpus.interactions
    assert data.rating is not None
    assert data.time is not None
    assert data.rating.tolist() == [1, 4, 3, 2]
    assert np.diff(data.time).tolist() == [0, 86400, 3 * 86400]
    assert any("1 repeated pairs" in note for note in corpus.notes)
    assert any("1 rows without user or item" in note for note in corpus.notes)
    assert corpus.graph is None


def test_parquet_and_named_columns(tmp_path: Path) -> None:
    frame = pd.DataFrame({"who": [1, 2, 2], "what": ["a", "b", "a"], "n": [1.0, 2.0, 3.0]})
    frame.to_parquet(tmp_path / "t.parquet")
    args = ItemsDataConfig(user_column="who", item_column="what")
    assert pairs(load_path(tmp_path / "t.parquet", args)) == [("1", "a"), ("2", "b"), ("2", "a")]
    with pytest.raises(
        UserError, match=r"no column that is known to hold the users; name it with --data_args\.user_col"
    ):
        load_path(tmp_path / "t.parquet", ItemsDataConfig())
    with pytest.raises(UserError, match="no column 'whom'; its columns are who, what, n"):
        load_path(tmp_path / "t.parquet", ItemsDataConfig(user_column="whom"))


def test_labels_ratings_and_least_numbers(tmp_path: Path) -> None:
    text = "user\titem\tlabel\n" + "".join(f"u{u}\ti{i}\t{int(i <= u)}\n" for u in range(4) for i in range(4))
    corpus = load_path(write(tmp_path / "t.tsv", text), ItemsDataConfig(min_user=2, min_item=2))
    # Of the triangle, u0 (one item) falls out, then i3 (one user) and so on until nothing changes.
    assert set(pairs(corpus)) == {
        ("u1", "i0"),
        ("u1", "i1"),
        *((u, i) for u in ("u2", "u3") for i in ("i0", "i1", "i2")),
    }
    assert any("6 rows with label 0" in note for note in corpus.notes)
    with pytest.raises(UserError, match="no interaction is left where"):
        load_path(tmp_path / "t.tsv", ItemsDataConfig(min_user=9))
    with pytest.raises(UserError, match="min_rating needs ratings"):
        load_path(tmp_path / "t.tsv", ItemsDataConfig(min_rating=3))
    rated = load_path(write(tmp_path / "r.csv", CSV), ItemsDataConfig(min_rating=3))
    assert pairs(rated) == [("007", "a"), ("007", "b")]


def test_graph_links_and_cold_items(tmp_path: Path) -> None:
    file = write(tmp_path / "t.csv", "user,item\nu,a\nu,b\nv,a\n")
    graph = write(tmp_path / "kg.csv", "head,relation,tail\nm1,r,m2\nm1,r,m2\nm2,r,m1\nm1,q,m2\nm9,r,m1\nm9,r,m9\n")
    links = write(tmp_path / "l.csv", "item,entity\na,m1\ncold,m9\n")
    corpus = load_path(file, ItemsDataConfig(graph=str(graph), links=str(links)))
    found = corpus.graph
    assert found is not None
    assert corpus.interactions.items == ["a", "b", "cold"]
    assert found.entities == ["a", "b", "cold", "m2"]
    named = {
        (found.entities[h], found.relations[r], found.entities[t])
        for h, r, t in zip(found.head, found.relation, found.tail)
    }
    # The cycle, both relations between the same two nodes and the loop stay; the repeated triple counts once.
    assert named == {("a", "r", "m2"), ("m2", "r", "a"), ("a", "q", "m2"), ("cold", "r", "a"), ("cold", "r", "cold")}
    assert len(found.head) == 5
    notes = " ".join(corpus.notes)
    assert "1 triples of the graph stood there more than once" in notes
    assert "items known from the graph's links only, as nobody had them: 1" in notes
    assert "1 of 3 items are not in the graph" in notes
    with pytest.raises(UserError, match=r"there is no --data_args\.graph"):
        load_path(file, ItemsDataConfig(links=str(links)))
    with pytest.raises(UserError, match=r"there is no file nowhere\.csv, which --data_args\.graph names"):
        load_path(file, ItemsDataConfig(graph="nowhere.csv"))
    with pytest.raises(UserError, match="has no column 'head'"):
        load_path(file, ItemsDataConfig(graph=str(file)))


def test_recbole(tmp_path: Path) -> None:
    write(tmp_path / "x.inter", "user_id:token\titem_id:token\ttimestamp:float\n1\t10\t5.0\n2\t10\t4.0\n2\t11\t4.5\n")
    write(tmp_path / "x.link", "item_id:token\tentity_id:token\n10\tm.1\n")
    with gzip.open(tmp_path / "x.kg.gz", "wt") as file:
        file.write("head_id:token\trelation_id:token\ttail_id:token\nm.1\tr\tm.2\n")
    for path in (tmp_path, tmp_path / "x.inter"):
        corpus = load_path(path, ItemsDataConfig())
        assert pairs(corpus) == [("2", "10"), ("2", "11"), ("1", "10")]
        assert corpus.graph is not None
        assert corpus.graph.entities == ["10", "11", "m.2"]
        assert (corpus.graph.head.tolist(), corpus.graph.tail.tolist()) == ([0], [2])


def test_kgat_format(tmp_path: Path) -> None:
    write(tmp_path / "train.txt", "0 0 1 1\n2 1 \n")
    write(tmp_path / "test.txt", "0 1 2\n1 0\n")
    write(tmp_path / "kg_final.txt", "0 0 5\n5 1 2\n0 0 5\n")
    write(tmp_path / "user_list.txt", "org_id remap_id\nann 0\nbob 1\ncat 2\n")
    corpus = load_path(tmp_path, ItemsDataConfig())
    data, graph = corpus.interactions, corpus.graph
    assert data.part is not None
    assert graph is not None
    rows = {(data.users[u], int(i), int(p)) for u, i, p in zip(data.user, data.item, data.part)}
    # (0, 1) stands in both files: it is training, or the test would be known.
    assert rows == {("ann", 0, 0), ("ann", 1, 0), ("cat", 1, 0), ("ann", 2, 2), ("bob", 0, 2)}
    assert len(data.items) == 3
    assert len(graph.entities) == 6
    assert graph.head.tolist() == [0, 5]
    assert any("count as training" in note for note in corpus.notes)
    write(tmp_path / "kg_final.txt", "0 0\n")
    with pytest.raises(UserError, match=r"kg_final\.txt:1: 3 whole numbers"):
        load_path(tmp_path, ItemsDataConfig())
    write(tmp_path / "train.txt", "0 0\n1 x\n")
    with pytest.raises(UserError, match=r"train\.txt:2: whole numbers"):
        load_path(tmp_path, ItemsDataConfig())


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "is empty"),
        ("user,item\n", "no rows"),
        ("user,item,time\na,b,yesterday\n", "t.csv:2: 'yesterday' in column 'time' is no time"),
        ("user,item,time\na,b,1\na,c,\n", "t.csv:3: no time in column 'time'"),
        ("user,item,rating\na,b,good\n", "t.csv:2: 'good' in column 'rating' is no number"),
        ("user,item,label\na,b,0\n", "no interaction is left after cleaning"),
    ],
)
def test_refused(tmp_path: Path, text: str, said: str) -> None:
    with pytest.raises(UserError, match=said):
        load_path(write(tmp_path / "t.csv", text), ItemsDataConfig())


def test_check_and_kind(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = write(tmp_path / "t.csv", CSV)
    assert kind_of_file(str(file)) == "items"
    assert kind_of_file(str(write(tmp_path / "c.csv", "user,item,click\na,b,1\n"))) == "clicks"
    assert kind_of_file("nowhere.csv") == "items"
    assert main(["data", "check", str(file)]) == 0
    said = capsys.readouterr().out
    assert "3 users, 3 items, 4 interactions" in said
    assert "1 repeated pairs" in said
    assert main(["data", "check", str(write(tmp_path / "e.csv", "a,b\n1,2\n"))]) == 2


def test_synthetic_is_always_the_same() -> None:
    first, again = (load_corpus("synthetic", ItemsDataConfig()) for _ in range(2))
    assert np.array_equal(first.interactions.item, again.interactions.item)
    assert first.graph is not None
    data = first.interactions
    assert len(np.unique(data.user * 1000 + data.item)) == len(data.user)
    counts = np.bincount(data.item, minlength=len(data.items))
    cold = np.flatnonzero(counts == 0)
    assert len(cold) >= 10
    assert np.isin(cold, first.graph.head).all()


@pytest.mark.data
def test_real_data(recsys_data: Path) -> None:
    """Counts as published."""
    counts = {}
    for name in ("lastfm_hetrec", "ml100k_kg", "amazon_beauty_items"):
        corpus = load_corpus(name, ItemsDataConfig())
        data, graph = corpus.interactions, corpus.graph
        assert graph is not None
        assert graph.entities[: len(data.items)] == data.items
        counts[name] = (len(data.users), len(data.items), len(data.user), len(graph.head), len(graph.relations))
    assert counts["lastfm_hetrec"] == (1872, 3846, 21173, 15518, 60)
    assert counts["ml100k_kg"] == (943, 1682, 100000, 91631, 24)
    assert counts["amazon_beauty_items"][:3] == (22363, 12101, 198502)
