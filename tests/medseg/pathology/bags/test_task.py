"""Bags through the command line: training, evaluation, prediction, cross-validation; splits and scores."""

from __future__ import annotations

import csv
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from attn_medseg.cli import main
from attn_medseg.pathology import splits
from attn_medseg.pathology.bags import baselines, metrics
from attn_medseg.pathology.bags.data import BagSet, load_bundle
from attn_medseg.pathology.bags.options import BagsDataConfig
from attn_shared.errors import UserError

QUIET = ("--trainer.progress", "false", "--trainer.accelerator", "cpu")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    runs = tmp_path_factory.mktemp("runs")
    few = (
        "--trainer.max_epochs",
        "8",
        "--trainer.batch_size",
        "8",
        "--optim.lr",
        "0.004",
        "--task_args.bootstrap",
        "50",
    )
    assert main(["train", "--model", "acmil", "--runs", str(runs), *QUIET, *few]) == 0
    (file,) = runs.glob("**/metrics.json")
    return file.parent


def test_attention_finds_what_no_pooling_does(run: Path) -> None:
    found = json.loads((run / "metrics.json").read_text(encoding="utf-8"))
    test = found["splits"]["test"]
    assert test["bags"] == 80
    assert test["accuracy"] > 0.85
    assert test["accuracy, 95% from"] <= test["accuracy"] <= test["accuracy, 95% to"]
    rows = {row["model"]: row for row in found["baselines"]}
    assert set(rows) == {"majority", "mean pooling", "max pooling", "single instances"}
    for name in ("majority", "mean pooling", "max pooling"):
        assert rows[name]["accuracy"] < 0.65
    assert {"roc.png", "attention.png"} <= {file.name for file in (run / "plots").iterdir()}


def test_eval_says_the_same(run: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["eval", str(run), "--output", str(tmp_path / "e.json")]) == 0
    again = json.loads((tmp_path / "e.json").read_text(encoding="utf-8"))["metrics"]
    saved = json.loads((run / "metrics.json").read_text(encoding="utf-8"))["splits"]["test"]
    assert again == pytest.approx(saved)


def test_predict_writes_bags_and_attention_and_names_bad_files(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rng = np.random.default_rng(1)
    values = {name: rng.standard_normal((6, 16)).astype(np.float32) for name in ("one", "two")}
    np.savez(tmp_path / "one.npz", features=values["one"], coords=np.arange(12).reshape(6, 2))
    torch.save(torch.from_numpy(values["two"]), tmp_path / "two.pt")
    np.save(tmp_path / "narrow.npy", values["one"][:, :4])
    (tmp_path / "broken.npy").write_bytes(b"nothing")
    np.save(tmp_path / "nan.npy", np.full((2, 16), np.nan, np.float32))
    lines = ["bag," + ",".join(f"f{i}" for i in range(16))]
    lines += ["three," + ",".join(map(str, row)) for row in values["one"]]
    lines += ["four," + ",".join(map(str, row)) for row in values["two"]]
    (tmp_path / "table.csv").write_text("\n".join(lines), encoding="utf-8")
    names = ["one.npz", "two.pt", "narrow.npy", "broken.npy", "nan.npy", "table.csv"]
    output = tmp_path / "out"
    assert main(["predict", str(run), *(str(tmp_path / n) for n in names), "--output", str(output)]) == 2
    said = capsys.readouterr().err
    assert "3 of 6 files could not be read" in said
    assert "narrow has 4 features, where the training bags have 16" in said
    for bad in ("broken.npy", "nan.npy"):
        assert f"left out: {bad}" in said
    with (output / "bags.csv").open(encoding="utf-8") as file:
        rows = {row["bag"]: row for row in csv.DictReader(file)}
    assert set(rows) == {"one", "two", "three", "four"}
    for row in rows.values():
        assert float(row["probability_negative"]) + float(row["probability_positive"]) == pytest.approx(1, abs=1e-5)
    for file_bag, table_bag in (("one", "three"), ("two", "four")):
        same = [float(rows[one]["probability_positive"]) for one in (file_bag, table_bag)]
        assert same[0] == pytest.approx(same[1], abs=1e-5)
    with (output / "attention" / "one.csv").open(encoding="utf-8") as file:
        table = list(csv.DictReader(file))
    assert len(table) == 6
    assert [row["x"] for row in table] == ["0", "2", "4", "6", "8", "10"]
    assert sum(float(row["attention"]) for row in table) == pytest.approx(1, abs=1e-4)
    for row in table:
        branches = [float(row[f"branch_{i}"]) for i in range(1, 6)]
        assert np.mean(branches) == pytest.approx(float(row["attention"]), abs=1e-5)


def test_crossval_is_one_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [
        "crossval",
        "--model",
        "acmil,abmil",
        "--data_args.folds",
        "2",
        "--repeats",
        "2",
        *QUIET,
        "--trainer.batch_size",
        "16",
    ]
    words += ["--trainer.max_epochs", "1", "--task_args.bootstrap", "20", "--output", str(tmp_path / "cv")]
    assert main(words) == 0
    assert "| acmil | 0." in capsys.readouterr().out
    found = json.loads((tmp_path / "cv" / "crossval.json").read_text(encoding="utf-8"))
    assert len(found["figures"]["acmil"]["accuracy"]["repeats"]) == 2
    with (tmp_path / "cv" / "predictions.csv").open(encoding="utf-8") as file:
        rows = [row for row in csv.DictReader(file) if row["model"] == "acmil"]
    for repeat in "01":
        own = [row for row in rows if row["repeat"] == repeat]
        assert len(own) == len({row["bag"] for row in own}) == 300
        hits = [(float(row["probability_1"]) > 0.5) == (row["label"] == "1") for row in own]
        assert np.mean(hits) == pytest.approx(found["figures"]["acmil"]["accuracy"]["repeats"][int(repeat)])
    for words, says in (
        (["crossval", "--data", "synthetic"], "is to segment"),
        (["crossval", "--data_args.fold", "1", "--data_args.folds", "3"], "leave --data_args.fold out"),
        (["crossval", "--repeats", "0"], "whole number from 1 on"),
    ):
        assert main(words) == 2
        assert says in capsys.readouterr().err


# -- splits -----------------------------------------------------------------------------------------------------------


def test_folds_are_stratified_and_whole() -> None:
    classes = {f"p{i}": int(i < 47) for i in range(92)}
    dealt = splits.deal(classes, 10, 3)
    for fold in range(10):
        own = [patient for patient, number in dealt.items() if number == fold]
        assert len(own) in (9, 10)
        assert sum(classes[patient] for patient in own) in (4, 5)
    assert dealt == splits.deal(dict(reversed(classes.items())), 10, 3)
    assert dealt != splits.deal(classes, 10, 4)
    with pytest.raises(UserError, match="cannot be dealt out"):
        splits.deal({"a": 0}, 2, 0)


def test_parts_hold_every_patient_once() -> None:
    classes = {f"p{i}": int(i % 4 == 0) for i in range(100)}
    tested: list[str] = []
    for fold in range(5):
        parts, how = splits.parts(classes, folds=5, fold=fold, val=0.2, test=0.5, shuffle=0)
        assert set(parts) == set(classes)
        tested += [patient for patient, part in parts.items() if part == "test"]
        held = [patient for patient, part in parts.items() if part == "val"]
        assert len(held) == 16
        assert sum(classes[patient] for patient in held) == 4
        assert f"fold {fold} of 5" in how
    assert sorted(tested) == sorted(classes)
    assert set(splits.parts(classes, folds=0, fold=0, val=0.1, test=1, shuffle=0)[0].values()) == {"test"}


def test_seeds_go_through_the_folds() -> None:
    assert [splits.turn(3, None, 5, seed) for seed in range(7)] == [
        (0, 5), (1, 5), (2, 5), (0, 6), (1, 6), (2, 6), (0, 7),
    ]  # fmt: skip
    assert splits.turn(3, 1, 5, 99) == (1, 5)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"folds": 1}, "2 or more"),
        ({"fold": 0}, "needs --data_args.folds"),
        ({"folds": 3, "fold": 3}, "is 0 to 2"),
        ({"val": 1.5}, "share from 0 to 1"),
        ({"val": 0.5, "test": 0.5}, "nothing for training"),
        ({"instances": -1}, "instances must be"),
        ({"split": "given", "folds": 0}, "name no parts"),
    ],
)
def test_bad_options_are_one_sentence(tmp_path: Path, options: dict, says: str) -> None:
    (tmp_path / "b.csv").write_text("bag,label,f\n" + "".join(f"b{i},{i % 2},1\n" for i in range(9)), encoding="utf-8")
    with pytest.raises(UserError, match=says):
        load_bundle(str(tmp_path / "b.csv"), BagsDataConfig(**options))


def test_bags_of_a_patient_stay_together_and_statistics_are_of_training(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    lines = [f"b{i},p{i // 3},{(i // 3) % 2},{100 * i + rng.random()}" for i in range(60)]
    (tmp_path / "b.csv").write_text("\n".join(["bag,patient,label,f", *lines]), encoding="utf-8")
    bundle = load_bundle(str(tmp_path / "b.csv"), BagsDataConfig())
    sets = [part for part in (bundle.train, bundle.val, bundle.test) if isinstance(part, BagSet)]
    patients = [{bag.patient for bag in part.bags} for part in sets]
    assert len(sets) == 3
    assert sum(map(len, patients)) == len(set.union(*patients))
    values = np.concatenate([bag.read().features for bag in sets[0].bags])
    assert bundle.state["mean"][0] == pytest.approx(values.mean(), rel=1e-5)
    assert bundle.state["scale"][0] == pytest.approx(values.std(), rel=1e-4)
    train = np.concatenate([sets[0].pieces(i) for i in range(len(sets[0]))])
    assert abs(train.mean()) < 1e-4


def test_drawn_instances_follow_from_seed_epoch_and_index() -> None:
    bundle = load_bundle("synthetic_bags", BagsDataConfig(instances=5))
    train, test = bundle.train, bundle.test
    assert isinstance(train, BagSet)
    assert isinstance(test, BagSet)
    train.set_epoch(0, 1)
    one = train.__getitems__([4, 7])
    assert one["x"].shape == (2, 5, 16)
    train.set_epoch(0, 2)
    assert not torch.equal(one["x"], train.__getitems__([4, 7])["x"])
    train.set_epoch(0, 1)
    assert torch.equal(one["x"][1], train.__getitems__([7])["x"][0])
    assert test.__getitems__([0])["x"].shape[1] == len(test.bags[0].read().features)


# -- scores -----------------------------------------------------------------------------------------------------------


def test_auroc_counts_pairs() -> None:
    rng = np.random.default_rng(0)
    for _ in range(50):
        size = int(rng.integers(2, 15))
        label, score = rng.random(size) < 0.5, rng.integers(0, 4, size).astype(float)
        pairs = [(p > n) + 0.5 * (p == n) for p in score[label] for n in score[~label]]
        if pairs:
            assert metrics.auroc(label, score) == pytest.approx(np.mean(pairs))
        else:
            assert math.isnan(metrics.auroc(label, score))


def test_scores_against_torchmetrics() -> None:
    classification = pytest.importorskip("torchmetrics.functional.classification")
    for classes in (2, 4):
        g = torch.Generator().manual_seed(classes)
        chance = torch.randn(60, classes, generator=g, dtype=torch.float64).softmax(-1)
        label = torch.randint(classes, (60,), generator=g)
        rows = {key: value for i in range(60) for key, value in metrics.pack(i, i, int(label[i]), chance[i]).items()}
        scored = metrics.unpack(dict(reversed(rows.items())))
        assert scored is not None
        found = metrics.scores(scored)
        many = {"num_classes": classes}
        assert found["accuracy"] == pytest.approx(
            classification.multiclass_accuracy(chance, label, average="micro", **many).item()
        )
        assert found["balanced_accuracy"] == pytest.approx(
            classification.multiclass_accuracy(chance, label, average="macro", **many).item()
        )
        if classes == 2:
            area = classification.binary_auroc(chance[:, 1], label)
            f1 = classification.binary_f1_score(chance[:, 1], label)
        else:
            area = classification.multiclass_auroc(chance, label, **many)
            f1 = classification.multiclass_f1_score(chance, label, average="macro", **many)
        assert found["auroc"] == pytest.approx(area.item(), abs=1e-6)
        assert found["f1"] == pytest.approx(f1.item(), abs=1e-6)
        assert found["loss"] == pytest.approx(torch.nn.functional.nll_loss(chance.log(), label).item())


def test_intervals_resample_patients() -> None:
    """Ten copies of a patient's bag say no more than one."""
    rng = np.random.default_rng(0)
    right = rng.random(40) < 0.7

    def width(copies: int) -> float:
        group = np.repeat(np.arange(40), copies)
        hits = np.repeat(right, copies)
        low, high = metrics.intervals(lambda rows: {"share": float(hits[rows].mean())}, group, 500)["share"]
        return high - low

    assert width(10) == pytest.approx(width(1), rel=1e-9)
    assert 0.2 < width(1) < 0.35


def test_baselines_are_logistic_regression() -> None:
    """Against a solution of another library's, where it is there."""
    linear = pytest.importorskip("sklearn.linear_model")
    rng = np.random.default_rng(0)
    x = rng.standard_normal((80, 5))
    label = (x[:, 0] + rng.standard_normal(80) > 0).astype(np.int64)
    mean, scale = x.mean(0), x.std(0)
    other = linear.LogisticRegression(C=2.0, tol=1e-10).fit((x - mean) / scale, label)  # one vector of weights, not two
    own = baselines._Logistic(x.astype(np.float64), label, 2)(x)
    np.testing.assert_allclose(own[:, 1], other.predict_proba((x - mean) / scale)[:, 1], atol=1e-4)
