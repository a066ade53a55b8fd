"""Classification of series: reading, splitting, baselines, scores, and the command line from end to end."""

from __future__ import annotations

import csv
import itertools
import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.metrics import f1_score, roc_auc_score

from attn_shared.config import RunConfig
from attn_shared.errors import UserError
from attn_timeseries.classification import metrics
from attn_timeseries.classification.baselines import dtw_distances, stretched
from attn_timeseries.classification.cards import ClassifyDataConfig, ClassifyTaskConfig
from attn_timeseries.classification.cases import parse_csv, parse_ts
from attn_timeseries.classification.data import SeriesSet, filled, fit_state, held_out, read_splits
from attn_timeseries.classification.rocket import MiniRocket
from attn_timeseries.cli import main
from attn_timeseries.config import FlowformerConfig

NEEDS_DATA = pytest.mark.skipif("ATTN_DATA" not in os.environ, reason="ATTN_DATA names no folder of data sets")
HEADER = (
    "@problemName toy\n@timeStamps false\n@univariate false\n@dimensions 2\n@equalLength false\n@classLabel true a b\n"
)


def ts(path: Path, *, classes: tuple[str, ...] = ("up", "down", "flat"), each: int = 8, seed: int = 0) -> Path:
    """Noisy ramps of 6 to 12 steps in two channels: the first tells the class."""
    draw = np.random.default_rng(seed)
    lines = [f"@problemName toy\n@equalLength false\n@dimensions 2\n@classLabel true {' '.join(classes)}\n@data"]
    for i in range(each * len(classes)):
        steps, label = int(draw.integers(6, 13)), classes[i % len(classes)]
        slope = {"up": 1.0, "down": -1.0}.get(label, 0.0)
        first = slope * np.arange(steps) + 0.3 * draw.normal(size=steps)
        second = draw.normal(size=steps)
        lines.append(":".join([*(",".join(f"{v:.4f}" for v in c) for c in (first, second)), label]))
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def long_csv(path: Path, *, each: int = 8, split: bool = False) -> Path:
    rows = ["id,time,x,y,label" + (",split" if split else "")]
    draw = np.random.default_rng(3)
    for i in range(each * 2):
        for t in range(9, -1, -1):  # backwards: the times give the order
            value = (1 if i % 2 else -1) * t + 0.1 * draw.normal()
            part = f",{('train', 'test', 'val', 'train')[i // 2 % 4]}" if split else ""
            rows.append(f"s{i},{t},{value:.3f},{draw.normal():.3f},{'even' if i % 2 == 0 else 'odd'}{part}")
    path.write_text("\n".join(rows) + "\n", encoding="utf-8")
    return path


# --- .ts files ---


def test_ts_lengths_missing_values_and_comments():
    text = f"# a note\n{HEADER}@data\n% skipped\n1,2,3:4,?,6:a\n\n7:NaN:b\n"
    cases = parse_ts(text, "toy.ts")
    assert [one.shape for one in cases.values] == [(3, 2), (1, 2)]
    assert cases.labels == ["a", "b"]
    assert np.array_equal(cases.values[0], [[1, 4], [2, np.nan], [3, 6]], equal_nan=True)
    assert cases.classes == ["a", "b"]
    assert cases.names == ["1", "2"]


def test_ts_without_classes_and_without_dimensions():
    cases = parse_ts("@classLabel false\n@data\n1,2\n3,4,5\n", "toy.ts")
    assert cases.labels is None
    assert [len(one) for one in cases.values] == [2, 3]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "has no @data line"),
        ("1,2:a\n", "series begin before @data"),
        ("@problemName x\n@data\n1:a\n", "no @classLabel line"),
        (f"{HEADER}@data\n", "holds no series"),
        (f"{HEADER}@data\n1,2:3,4:c\n", "line 8: 'c' is none of the classes"),
        (f"{HEADER}@data\n1,2:3,4\n", "'3,4' is none of the classes"),
        (f"{HEADER}@data\n1,2:3:a\n", "channels of different lengths"),
        (f"{HEADER}@data\n1,x:3,4:a\n", "line 8, channel 1: 'x' is no number"),
        (f"{HEADER}@data\n1,inf:3,4:a\n", "a value is infinite"),
        (f"{HEADER}@data\n1,2:a\n", "1 channels, where the others have 2"),
        (f"{HEADER}@data\n:a\n", "a series without values"),
        (f"{HEADER}@data\na\n", "a series without values"),
        (f"{HEADER}@data\n(0,1),(1,2):3,4:a\n", "series with time stamps are not read"),
        ("@timeStamps true\n@data\n", "series with time stamps are not read"),
        ("@classLabel true\n@data\n", "must be followed by the names of the classes"),
        ("@classLabel true a a\n@data\n", "names a class twice"),
        ("@classLabel maybe\n@data\n", "must be followed by true or false"),
        ("@targetLabel true\n@data\n", "for regression"),
        ("@dimensions two\n@data\n", "must be followed by a whole number"),
        ("@dimensions 0\n@data\n", "must be followed by a whole number"),
        ("@equalLength true\n@seriesLength 3\n@classLabel true a b\n@data\n1,2:a\n", "2 steps, where the header says"),
        ("@equalLength true\n@classLabel true a b\n@data\n1,2:a\n1,2,3:b\n", "3 steps, where the header says"),
        ("@univariate true\n@classLabel true a b\n@data\n1,2:3,4:a\n", "2 channels, where the others have 1"),
    ],
)
def test_malformed_ts_is_one_sentence(text, message):
    with pytest.raises(UserError, match=r"toy\.ts") as caught:
        parse_ts(text, "toy.ts")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@NEEDS_DATA
@pytest.mark.data
def test_the_archive_files_are_read_whole():
    splits = read_splits("japanese_vowels", ClassifyDataConfig(), seed=0)
    assert splits.val is not None
    assert splits.test is not None
    assert (len(splits.train), len(splits.val), len(splits.test)) == (216, 54, 370)
    assert {splits.val.labels.count(label) for label in splits.test.classes} == {6}
    lengths = [len(one) for part in (splits.train, splits.val, splits.test) for one in part.values]
    assert (min(lengths), max(lengths)) == (7, 29)
    assert splits.train.values[0].shape[1] == 12
    assert fit_state("japanese_vowels", splits, ClassifyDataConfig())["ragged"]


# --- CSV ---


def test_csv_order_classes_and_splits(tmp_path):
    cases = parse_csv(
        long_csv(tmp_path / "a.csv", split=True).read_text(encoding="utf-8"), "a.csv", ClassifyDataConfig()
    )
    assert cases.channels == ["x", "y"]
    assert cases.classes == ["even", "odd"]
    assert cases.values[1][:, 0].round().tolist() == list(range(10))
    assert cases.splits is not None
    assert set(cases.splits) == {"train", "val", "test"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is empty"),
        ("id,x,label\n", "no column of numbers"),
        ("time,x,label\n1,2,a\n", "no column that names the series"),
        ("id,x,x,label\n1,2,3,a\n", "two columns have the same name"),
        ("id,x,label\n1,2\n", "line 2: 2 fields, where the header has 3"),
        ("id,name,label\n1,b,a\n", "no column of numbers"),
        ("id,x,label\n1,2,a\n1,3,b\n", "several classes: 'a', 'b'"),
        ("id,x,label\n1,2,\n", "has no class"),
        ("id,x,label,split\n1,2,a,first\n", "the split must be train, val or test"),
        ("id,time,x,label\n1,5,2,a\n1,5,3,a\n", "a time occurs twice"),
        ("id,time,x,label\n1,later,2,a\n", "times must be numbers or ISO dates"),
        ("id,time,x,label\n1,,2,a\n", "a row has no time"),
        ('id,x,label\n1,"2,a\n', "line"),
    ],
)
def test_malformed_csv_is_one_sentence(text, message):
    with pytest.raises(UserError, match=r"own\.csv") as caught:
        parse_csv(text, "own.csv", ClassifyDataConfig())
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


# --- gaps, splits, statistics ---


def test_gaps_are_bridged_and_empty_channels_get_the_mean():
    nan = np.nan
    values = np.array([[nan, nan], [1.0, nan], [nan, nan], [4.0, nan], [nan, nan]])
    values[:, 0] = [nan, 1, nan, 4, nan]
    assert filled(values, np.array([0.0, 7.0])).T.tolist() == [[1, 1, 2.5, 4, 4], [7] * 5]


def test_held_out_takes_of_every_class_and_follows_the_seed(tmp_path):
    cases = parse_ts(ts(tmp_path / "a.ts", each=10).read_text(encoding="utf-8"), "a.ts")
    rest, part = held_out(cases, 0.2, 5)
    assert part is not None
    assert [part.labels.count(label) for label in cases.classes] == [2, 2, 2]
    assert sorted(map(int, rest.names + part.names)) == list(range(1, 31))
    assert held_out(cases, 0.2, 5)[1].names == part.names
    assert held_out(cases, 0.2, 6)[1].names != part.names


def test_altering_the_test_file_changes_nothing_else(tmp_path):
    """Neither statistics nor a training or validation batch."""
    ts(tmp_path / "a_TRAIN.ts")
    found = []
    for seed in (1, 2):
        ts(tmp_path / "a_TEST.ts", seed=seed, each=seed + 1)
        splits = read_splits(str(tmp_path), ClassifyDataConfig(), seed=0)
        state = fit_state(str(tmp_path), splits, ClassifyDataConfig())
        found.append((state, SeriesSet(splits.train, state).x, SeriesSet(splits.val, state).x))
    assert found[0][0] == found[1][0]
    assert torch.equal(found[0][1], found[1][1])
    assert torch.equal(found[0][2], found[1][2])


def test_statistics_are_of_the_training_series(tmp_path):
    ts(tmp_path / "a_TRAIN.ts")
    ts(tmp_path / "a_TEST.ts", seed=4)
    splits = read_splits(str(tmp_path / "a_TRAIN.ts"), ClassifyDataConfig(), seed=0)
    state = fit_state("a", splits, ClassifyDataConfig())
    rows = np.concatenate(SeriesSet(splits.train, state).series())
    assert np.allclose(rows.mean(axis=0), 0, atol=1e-6)
    assert np.allclose(rows.std(axis=0), 1, atol=1e-5)


# --- scores and baselines ---


def test_scores_equal_scikit_learns():
    draw = np.random.default_rng(0)
    truth, p = draw.integers(0, 4, 60), draw.dirichlet(np.ones(4), 60)
    found = metrics.figures(metrics.Predictions(np.arange(60), truth, p), ["a", "b", "c", "d"])
    assert found["macro_f1"] == pytest.approx(f1_score(truth, p.argmax(axis=1), average="macro"), abs=1e-12)
    assert found["auroc"] == pytest.approx(roc_auc_score(truth, p, multi_class="ovr"), abs=1e-12)
    assert found["log_loss"] == pytest.approx(-np.log(p[np.arange(60), truth]).mean(), abs=1e-12)
    assert found["recall c"] == pytest.approx((p.argmax(axis=1) == 2)[truth == 2].mean())


def test_dtw_against_the_plain_recursion():
    draw = np.random.default_rng(0)

    def plain(a, b):
        table = np.full((len(a) + 1, len(b) + 1), np.inf)
        table[0, 0] = 0
        for i in range(len(a)):
            for j in range(len(b)):
                cost = ((a[i] - b[j]) ** 2).sum()
                table[i + 1, j + 1] = cost + min(table[i, j], table[i, j + 1], table[i + 1, j])
        return table[-1, -1]

    for steps in (1, 2, 5, 9):
        one, lengths = draw.normal(size=(steps, 3)), np.array([1, 2, 4, 7, 11])
        others = [draw.normal(size=(n, 3)) for n in lengths]
        padded = np.full((5, 11, 3), 1e6)
        for i, other in enumerate(others):
            padded[i, : len(other)] = other
        found = dtw_distances(one, padded, lengths)
        assert np.allclose(found, [plain(one, other) for other in others], rtol=1e-6)


def test_stretched_keeps_the_ends():
    assert stretched(np.array([[0.0], [1.0], [4.0]]), 5)[:, 0].tolist() == [0, 0.5, 1, 2.5, 4]


def test_minirocket_against_plain_convolutions():
    draw = np.random.default_rng(0)
    series = [draw.normal(size=(n, 3)) for n in (30, 17, 6)]
    transform = MiniRocket(336, seed=1).fit(series)
    found = transform(series)
    column = 0
    for group in transform.groups:
        weights = np.full(9, -1.0)
        weights[list(list(itertools.combinations(range(9), 3))[group.kernel])] = 2.0
        for bias in group.biases:
            for n, one in enumerate(series):
                values, inside = [], []
                for t in range(len(one)):
                    places = t + group.dilation * (np.arange(9) - 4)
                    real = (places >= 0) & (places < len(one))
                    values.append(sum(weights[real] @ one[places[real], c] for c in group.channels))
                    inside.append(real.all())
                chosen = np.array(values)[inside] if not group.padded and any(inside) else np.array(values)
                # float32 against float64: an output that equals its bias may lie on either side.
                least, most = (chosen > bias + 1e-4).mean(), (chosen > bias - 1e-4).mean()
                assert least - 1e-6 <= found[n, column] <= most + 1e-6
            column += 1
    assert column == found.shape[1] == 336


# --- the task ---


def test_noise_is_for_training_alone_and_leaves_padding(tmp_path):
    from attn_timeseries.classification.task import ClassifyTask
    from attn_timeseries.cli import APP

    def task(noise: float) -> ClassifyTask:
        torch.manual_seed(0)
        model = FlowformerConfig(d_model=8, d_ff=8, n_heads=2, dropout=0.0)
        return ClassifyTask(
            RunConfig(
                app=APP.name,
                model="flowformer",
                model_args=model,
                data="toy",
                data_args=ClassifyDataConfig(),
                task_args=ClassifyTaskConfig(noise=noise, padding="official"),
            ),
            state,
        )

    ts(tmp_path / "a_TRAIN.ts")
    ts(tmp_path / "a_TEST.ts", seed=4)
    splits = read_splits(str(tmp_path), ClassifyDataConfig(), seed=0)
    state = fit_state("toy", splits, ClassifyDataConfig())
    batch = SeriesSet(splits.train, state).__getitems__(range(4))
    quiet, noisy = task(0.0), task(0.5)
    assert torch.equal(quiet.forward_batch(batch), noisy.forward_batch(batch))
    assert quiet.training_loss(batch) == quiet.training_loss(batch)
    assert noisy.training_loss(batch) != noisy.training_loss(batch)
    seen: list[torch.Tensor] = []
    noisy.network.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    noisy.training_loss(batch)
    assert (seen[0][~batch["mask"]] == 0).all()
    assert (seen[0][batch["mask"]] != batch["x"][batch["mask"]]).all()


# --- the command line ---

SHORT = [
    *("--model_args.d_model", "16", "--model_args.d_ff", "16", "--model_args.n_heads", "2"),
    *("--model_args.e_layers", "1", "--trainer.max_epochs", "16", "--trainer.accelerator", "cpu"),
    *("--trainer.progress", "false", "--trainer.batch_size", "8", "--optim.lr", "0.01"),
]


def test_train_eval_predict_ts(tmp_path, capsys):
    ts(tmp_path / "toy_TRAIN.ts", each=16)
    ts(tmp_path / "toy_TEST.ts", seed=1)
    assert main(["train", "--data", str(tmp_path), "--runs", str(tmp_path / "runs"), *SHORT]) == 0
    run = Path(capsys.readouterr().out.strip().splitlines()[-1])
    results = json.loads((run / "metrics.json").read_text(encoding="utf-8"))
    test = results["splits"]["test"]
    assert results["model"] == "flowformer"
    assert test["accuracy"] >= 0.8
    assert "the test file is for the test alone" in results["protocol"]
    assert {row["model"] for row in results["baselines"]} == {"majority", "1-nn euclidean", "1-nn dtw", "minirocket"}
    assert {path.stem for path in (run / "plots").glob("*.png")} >= {"confusion", "recall"}
    assert (run / "report.html").stat().st_size > 10_000

    assert main(["eval", str(run)]) == 0
    assert f"{test['log_loss']:.4f}"[:5] in capsys.readouterr().out

    # Another file under the statistics of training is a test set as a whole.
    other = ts(tmp_path / "other.ts", seed=7, each=3)
    assert main(["eval", str(run), "--data", str(other), "--output", str(tmp_path / "e.json")]) == 0
    assert json.loads((tmp_path / "e.json").read_text(encoding="utf-8"))["metrics"]["series"] == 9
    capsys.readouterr()

    assert main(["predict", str(run), str(other), "--output", str(tmp_path / "out")]) == 0
    rows = list(csv.DictReader((tmp_path / "out" / "other_classes.csv").open()))
    assert list(rows[0]) == ["id", "p_up", "p_down", "p_flat", "predicted", "true"]
    assert len(rows) == 9
    assert all(abs(sum(float(row[f"p_{c}"]) for c in ("up", "down", "flat")) - 1) < 1e-5 for row in rows)

    # Unlabelled, longer than the model's steps, and bad ones: a sentence each, nothing written.
    (tmp_path / "free.ts").write_text("@classLabel false\n@data\n" + ",".join(["1"] * 40) + ":" + ",".join(["2"] * 40))
    assert main(["predict", str(run), str(tmp_path / "free.ts"), "--output", str(tmp_path / "out")]) == 0
    assert "longer than the" in capsys.readouterr().err
    assert "true" not in (tmp_path / "out" / "free_classes.csv").read_text(encoding="utf-8").splitlines()[0]
    (tmp_path / "bad.ts").write_text("@classLabel false\n@data\n1,2\n")
    assert main(["predict", str(run), str(tmp_path / "bad.ts"), "--output", str(tmp_path / "none")]) == 2
    assert "has 1 channels and the model was trained on 2" in capsys.readouterr().err
    assert not (tmp_path / "none" / "bad_classes.csv").exists()


def test_csv_of_ones_own(tmp_path, capsys):
    own = long_csv(tmp_path / "own.csv", each=10)
    argv = ["train", "--model", "transformer", "--data", str(own), "--runs", str(tmp_path / "runs"), *SHORT]
    assert main([*argv, "--task_args.readout", "mean"]) == 0
    run = Path(capsys.readouterr().out.strip().splitlines()[-1])
    results = json.loads((run / "metrics.json").read_text(encoding="utf-8"))
    assert results["mixer"] == "softmax"
    assert results["splits"]["test"]["series"] == 4
    assert main(["predict", str(run), str(own), "--output", str(tmp_path / "out")]) == 0
    rows = list(csv.DictReader((tmp_path / "out" / "own_classes.csv").open()))
    assert [row["id"] for row in rows] == [f"s{i}" for i in range(20)]
    assert main(["data", "check", str(own)]) == 0
    capsys.readouterr()


def test_errors_are_a_sentence(tmp_path, capsys):
    own = ts(tmp_path / "own.ts")
    (tmp_path / "empty").mkdir()
    single = tmp_path / "single.ts"
    single.write_text("@classLabel true a b\n@data\n1,2:a\n3,4:a\n")
    ragged_mixer = ["--mixer", "auto_correlation"]
    for argv, part in (
        (["--data", str(own), "--model", "dlinear"], "dlinear is no model to classify whole series"),
        (["--data", str(tmp_path / "none.ts")], "there is no file"),
        (["--data", str(single)], "all series are of one class"),
        (["--data", str(own), "--data_args.val_fraction", "1.5"], "val_fraction must be at least 0 and below 1"),
        (["--data", str(own), "--data_args.test", str(tmp_path / "x.ts")], "which --data_args.test names"),
        (["--data", str(own), *ragged_mixer], "--task_args.padding official"),
        (["--data", str(own), "--data_args.seq_len", "9"], "--data_args.seq_len"),
    ):
        assert main(["train", "--runs", str(tmp_path / "runs"), *argv]) == 2, argv
        error = capsys.readouterr().err
        assert part in error, error
        assert len(error.strip().splitlines()) == 1


@pytest.mark.slow
@NEEDS_DATA
@pytest.mark.data
@pytest.mark.timeout(1200)
def test_japanese_vowels(tmp_path, capsys, monkeypatch):
    """With nothing but the preset, as published: 98.9 %. The test file chooses nothing."""
    monkeypatch.chdir(tmp_path)
    assert main(["train", "--data", "japanese_vowels", "--trainer.threads", "1"]) == 0
    run = Path(capsys.readouterr().out.split()[-1])
    test = json.loads((run / "metrics.json").read_text(encoding="utf-8"))["splits"]["test"]
    assert test["series"] == 370
    assert test["accuracy"] >= 0.98
