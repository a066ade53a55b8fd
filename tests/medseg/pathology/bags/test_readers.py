"""Bags from tables, folders of feature files and MATLAB files: what is read, and what is refused in one sentence."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy import io, sparse

from attn_medseg.cli import kind_of_file
from attn_medseg.pathology import features
from attn_medseg.pathology.bags.check import check_file
from attn_medseg.pathology.bags.options import BagsDataConfig
from attn_medseg.pathology.bags.readers import load_corpus, read_path
from attn_shared.errors import UserError

TABLE = """bag,patient,label,instance,a,b
s1,p1,no,tile 1,0.5,1
s1,p1,no,tile 2,-1,2
s2,p1,yes,tile 1,3,4
s3,p2,no,tile 1,5,6
"""


def written(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def test_a_table_of_instances(tmp_path: Path) -> None:
    file = written(tmp_path / "bags.csv", TABLE)
    assert kind_of_file(str(file)) == "bags"
    corpus = read_path(file, BagsDataConfig())
    assert corpus.classes == ("no", "yes")
    assert [(bag.name, bag.patient, bag.label) for bag in corpus.bags] == [
        ("s1", "p1", 0),
        ("s2", "p1", 1),
        ("s3", "p2", 0),
    ]
    assert corpus.bags[0].names == ("tile 1", "tile 2")
    np.testing.assert_array_equal(corpus.bags[0].read().features, [[0.5, 1], [-1, 2]])


def test_labels_that_are_numbers_are_ordered_by_number(tmp_path: Path) -> None:
    file = written(tmp_path / "b.tsv", "bag_id\tlabel\tf\n" + "".join(f"b{i}\t{i}\t1.5\n" for i in (10, 2, 1)))
    assert read_path(file, BagsDataConfig()).classes == ("1", "2", "10")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("x,y\n1,2\n", "no column called bag"),
        ("bag,label\ns1,1\n", "no columns of features"),
        ("bag,label,f\ns1,1,x\n", "b.csv:2: f is 'x', not a finite number"),
        ("bag,label,f\ns1,1,inf\n", "not a finite number"),
        ("bag,label,f\ns1,1,1\ns1,0,1\n", "b.csv:3: s1 has several values of label"),
        ("bag,label,f\ns1,1,1\n,0,1\n", "b.csv:3: no bag"),
        ("bag,label,part,f\ns1,1,dev,1\n", "it may be train, val or test"),
    ],
)
def test_bad_tables_are_one_sentence(tmp_path: Path, text: str, says: str) -> None:
    with pytest.raises(UserError, match=says) as caught:
        read_path(written(tmp_path / "b.csv", text), BagsDataConfig())
    assert "\n" not in str(caught.value)
    assert check_file(tmp_path / "b.csv") == [str(caught.value)]


def slides(folder: Path) -> None:
    """Five slides of three cases in the formats of CLAM's users; one has no file, one file no line."""
    (folder / "pt_files").mkdir(parents=True)
    rng = np.random.default_rng(0)
    values = {name: rng.standard_normal((4, 3)).astype(np.float32) for name in "abcdx"}
    np.save(folder / "a.npy", values["a"])
    np.savez(folder / "b.npz", features=values["b"], coords=np.arange(8).reshape(4, 2))
    torch.save(torch.from_numpy(values["c"]), folder / "pt_files" / "c.pt")
    torch.save({"features": torch.from_numpy(values["d"])}, folder / "pt_files" / "d.pt")
    np.save(folder / "x.npy", values["x"])
    written(
        folder / "labels.csv",
        "case_id,slide_id,label\np1,a.svs,tumor\np1,b,normal\np2,c.svs,tumor\np3,d,normal\np4,e,normal\n",
    )


def test_a_folder_of_slides(tmp_path: Path) -> None:
    slides(tmp_path)
    assert kind_of_file(str(tmp_path)) == "bags"
    corpus = load_corpus(str(tmp_path), BagsDataConfig())
    assert [bag.name for bag in corpus.bags] == ["a", "b", "c", "d"]
    assert [bag.patient for bag in corpus.bags] == ["p1", "p1", "p2", "p3"]
    assert corpus.classes == ("normal", "tumor")
    assert [bag.read().features.shape for bag in corpus.bags] == [(4, 3)] * 4
    coords = corpus.bags[1].read().coords
    assert coords is not None
    assert coords[3].tolist() == [6, 7]
    assert check_file(tmp_path) == [
        "1 slides have a line but no feature file: e; left out",
        "1 feature files have no line: x; left out",
    ]
    with pytest.raises(UserError, match="has no column 'grade'"):
        load_corpus(str(tmp_path), BagsDataConfig(label="grade"))
    with pytest.raises(UserError, match="has no feature file of any slide"):
        load_corpus(str(tmp_path / "labels.csv"), BagsDataConfig(features=str(make(tmp_path / "empty"))))


def make(folder: Path) -> Path:
    folder.mkdir()
    return folder


def test_a_table_elsewhere_with_a_folder_of_features(tmp_path: Path) -> None:
    slides(tmp_path / "features")
    table = written(tmp_path / "cohort.csv", "slide_id,age,label\na,50,1\nc,60,0\n")
    corpus = load_corpus(str(table), BagsDataConfig(features=str(tmp_path / "features")))
    assert [bag.name for bag in corpus.bags] == ["a", "c"]
    assert corpus.classes == ("0", "1")


class Trap:
    """Writes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return (Path.touch, (self.path,))


def test_code_in_files_is_never_run(tmp_path: Path) -> None:
    sprung = tmp_path / "sprung"
    torch.save({"features": torch.ones(2, 2), "x": Trap(sprung)}, tmp_path / "a.pt")
    np.save(tmp_path / "b.npy", np.array([Trap(sprung)], dtype=object), allow_pickle=True)
    np.savez(tmp_path / "c.npz", features=np.array([Trap(sprung)], dtype=object))
    (tmp_path / "d.pt").write_bytes(pickle.dumps(Trap(sprung)))
    for name in ("a.pt", "b.npy", "c.npz", "d.pt"):
        with pytest.raises(UserError, match=f"^{name} cannot be read") as caught:
            features.read(tmp_path / name)
        assert "\n" not in str(caught.value)
    assert not sprung.exists()


@pytest.mark.parametrize(
    ("values", "says"),
    [
        (np.ones(3), "not numbers of shape"),
        (np.ones((0, 3)), "holds no instances"),
        (np.array([[1.0, np.nan], [1, 1]]), "no finite numbers, in 1 of 2 instances"),
        (np.array([["a"]]), "not numbers of shape"),
    ],
)
def test_bad_features_are_one_sentence(tmp_path: Path, values: Any, says: str) -> None:
    np.save(tmp_path / "a.npy", values)
    with pytest.raises(UserError, match=says):
        features.read(tmp_path / "a.npy")


def test_a_leading_axis_of_one_is_taken_off(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", features=np.ones((1, 4, 3)), coords=np.ones((1, 4, 2)))
    found = features.read(tmp_path / "a.npz")
    assert found.features.shape == (4, 3)
    assert found.coords is not None
    assert found.coords.shape == (4, 2)


def test_truncated_files_and_ambiguous_ones(tmp_path: Path) -> None:
    np.savez(tmp_path / "two.npz", one=np.ones((2, 2)), other=np.ones((2, 2)))
    with pytest.raises(UserError, match="no array called features; it has: one, other"):
        features.read(tmp_path / "two.npz")
    torch.save(torch.ones(50, 50), tmp_path / "a.pt")
    np.save(tmp_path / "b.npy", np.ones((50, 50)))
    for name in ("a.pt", "b.npy", "two.npz"):
        whole = (tmp_path / name).read_bytes()
        (tmp_path / name).write_bytes(whole[: len(whole) // 2])
        with pytest.raises(UserError, match=f"^{name} cannot be read"):
            features.read(tmp_path / name)


def test_matlab_files(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    values = rng.standard_normal((5, 3))
    pack = {"bag_ids": np.array([[1, 1, 2, 2, 3]]), "labels": sparse.csc_matrix([[1, 1, -1, -1, 1]])}
    io.savemat(tmp_path / "m.mat", {**pack, "features": sparse.csc_matrix(values)})
    corpus = read_path(tmp_path / "m.mat", BagsDataConfig())
    assert [bag.label for bag in corpus.bags] == [1, 0, 1]
    np.testing.assert_allclose(corpus.bags[1].read().features, values[2:4], rtol=1e-6)
    io.savemat(tmp_path / "bad.mat", pack)
    with pytest.raises(UserError, match="has no features"):
        read_path(tmp_path / "bad.mat", BagsDataConfig())
    (tmp_path / "none.mat").write_bytes(b"nothing of the kind")
    with pytest.raises(UserError, match=r"none.mat cannot be read"):
        read_path(tmp_path / "none.mat", BagsDataConfig())


@pytest.mark.data
@pytest.mark.parametrize(("name", "bags", "positive", "width"), [("musk1", 92, 47, 166), ("tiger", 200, 100, 230)])
def test_the_classic_sets(name: str, bags: int, positive: int, width: int) -> None:
    try:
        corpus = load_corpus(name, BagsDataConfig())
    except UserError as error:
        pytest.skip(str(error))
    assert len(corpus.bags) == bags
    assert sum(bag.label for bag in corpus.bags) == positive
    assert corpus.bags[0].read().features.shape[1] == width
