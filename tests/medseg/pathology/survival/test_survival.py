"""Survival through the command line; tables, scores and estimates against their definitions."""

from __future__ import annotations

import csv
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from attn_medseg.cli import check_file, kind_of_file, main
from attn_medseg.pathology.survival import estimates, metrics
from attn_medseg.pathology.survival.data import PatientSet, fit, interval_of, load_bundle, parts_of
from attn_medseg.pathology.survival.options import SurvivalDataConfig
from attn_medseg.pathology.survival.readers import load_corpus, read_path
from attn_shared.errors import UserError

QUIET = ("--trainer.progress", "false", "--trainer.accelerator", "cpu")


@pytest.fixture(scope="module")
def cohort(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sixty cases as MCAT's tables have them; one has two slides, one no feature file."""
    folder = tmp_path_factory.mktemp("cohort")
    (folder / "pt_files").mkdir()
    rng = np.random.default_rng(0)
    names = ["A_rnaseq", "A_cnv", "B_rnaseq", "B_mut", "C_rnaseq", "D_rnaseq"]
    lines = [",".join(["", "case_id", "slide_id", "site", "age", "survival_months", "censorship", "train", *names])]
    for i in range(60):
        genes = rng.standard_normal(len(names))
        time, censored = rng.exponential(20 * np.exp(-genes[0])) + 0.1, int(rng.random() < 0.3)
        for slide in (f"s{i}", f"s{i}b") if i == 7 else (f"s{i}",):
            cells = [len(lines) - 1, f"c{i}", f"{slide}.svs", "X", 60, f"{time:.4f}", censored, 1.0]
            lines.append(",".join(map(str, [*cells, *(f"{one:.5f}" for one in genes)])))
            if i != 9:
                torch.save(
                    torch.from_numpy(rng.standard_normal((5, 4)).astype(np.float32)),
                    folder / "pt_files" / f"{slide}.pt",
                )
    (folder / "cohort.csv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    (folder / "signatures.csv").write_text("First,Second\nA,B\nC,A\n,Z\n", encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def run(cohort: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    runs = tmp_path_factory.mktemp("runs")
    words = ["train", "--data", str(cohort), "--runs", str(runs), "--model_args.width", "16", *QUIET]
    assert main([*words, "--trainer.max_epochs", "2", "--task_args.bootstrap", "20"]) == 0
    (file,) = runs.glob("**/metrics.json")
    return file.parent


def test_train_on_a_folder(run: Path) -> None:
    found = json.loads((run / "metrics.json").read_text(encoding="utf-8"))
    assert found["model"] == "motcat"
    test = found["splits"]["test"]
    assert test["patients"] == 12
    assert 0 <= test["c_index, 95% from"] <= test["c_index"] <= test["c_index, 95% to"] <= 1
    rows = {row["model"]: row for row in found["baselines"]}
    assert rows["Kaplan-Meier"]["c_index"] == 0.5
    assert rows["Cox, genes"]["c_index"] > 0.5
    assert {"survival.png", "coattention.png"} <= {file.name for file in (run / "plots").iterdir()}


def test_predict_and_bad_patients(run: Path, cohort: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "out"
    assert main(["predict", str(run), str(cohort), "--output", str(output)]) == 2
    assert "c9 has no feature file" in capsys.readouterr().err
    with (output / "risks.csv").open(encoding="utf-8") as file:
        rows = {row["case_id"]: row for row in csv.DictReader(file)}
    assert len(rows) == 59
    with (output / "survival.csv").open(encoding="utf-8") as file:
        curve = [float(row["survival"]) for row in csv.DictReader(file) if row["case_id"] == "c3"]
    assert curve[0] == 1
    assert len(curve) == 5
    assert curve == sorted(curve, reverse=True)
    assert float(rows["c3"]["risk"]) == pytest.approx(-sum(curve[1:]), abs=1e-4)
    with (output / "attention" / "c7.csv").open(encoding="utf-8") as file:
        table = list(csv.DictReader(file))
    assert len(table) == 10  # both slides
    assert set(table[0]) == {"patch", "First", "Second"}
    # Without times, and the features elsewhere.
    with (cohort / "cohort.csv").open(encoding="utf-8") as file:
        kept = [
            {k: v for k, v in row.items() if k not in ("", "survival_months", "censorship")}
            for row in csv.DictReader(file)
        ]
    with (tmp_path / "new.csv").open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, kept[0])
        writer.writeheader()
        writer.writerows(kept[:5])
    words = ["predict", str(run), str(tmp_path / "new.csv"), "--features", str(cohort), "--attention", "false"]
    assert main([*words, "--output", str(tmp_path / "again")]) == 0
    with (tmp_path / "again" / "risks.csv").open(encoding="utf-8") as file:
        again = {row["case_id"]: row["risk"] for row in csv.DictReader(file)}
    assert {name: float(risk) for name, risk in again.items()} == pytest.approx(
        {name: float(rows[name]["risk"]) for name in again}, abs=1e-5
    )


def test_genes_alone_slides_alone_and_what_is_missing(
    cohort: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    few = [*QUIET, "--runs", str(tmp_path), "--trainer.max_epochs", "1", "--task_args.bootstrap", "0"]
    table = tmp_path / "genes.csv"
    table.write_text((cohort / "cohort.csv").read_text(encoding="utf-8"), encoding="utf-8")
    assert main(["train", "--model", "snn", "--data", str(table), "--kind", "survival", *few]) == 0
    capsys.readouterr()
    assert main(["train", "--model", "motcat", "--data", str(table), *few]) == 2
    assert "--model snn reads genes alone" in capsys.readouterr().err
    assert main(["train", "--model", "abmil", "--data", str(cohort), "--model_args.channels", "8", *few]) == 0
    assert main(["train", "--model", "acmil", "--data", str(cohort), *few]) == 2


def test_crossval(cohort: Path, tmp_path: Path) -> None:
    words = ["crossval", "--model", "snn,abmil", "--data", str(cohort), "--data_args.folds", "2", *QUIET]
    words += ["--trainer.max_epochs", "1", "--task_args.bootstrap", "20", "--output", str(tmp_path)]
    assert main(words) == 0
    found = json.loads((tmp_path / "crossval.json").read_text(encoding="utf-8"))["figures"]
    assert set(found) == {"snn", "abmil", "Kaplan-Meier", "Cox, genes"}
    with (tmp_path / "predictions.csv").open(encoding="utf-8") as file:
        rows = [row for row in csv.DictReader(file) if row["model"] == "snn"]
    assert len(rows) == 59
    each = []
    for fold in "01":
        own = [row for row in rows if row["fold"] == fold]
        time, risk = (np.array([float(row[name]) for row in own]) for name in ("time", "risk"))
        each.append(metrics.c_index(time, np.array([row["event"] == "1" for row in own]), risk))
    assert found["snn"]["c_index"]["mean"] == pytest.approx(np.mean(each), abs=1e-3)


# -- data -------------------------------------------------------------------------------------------------------------


def test_a_table_of_mcat(cohort: Path) -> None:
    assert kind_of_file(str(cohort)) == kind_of_file(str(cohort / "cohort.csv")) == "survival"
    corpus = load_corpus(str(cohort), SurvivalDataConfig())
    assert len(corpus.patients) == 60
    assert corpus.groups == {
        "First": ("A_cnv", "A_rnaseq", "C_rnaseq"),
        "Second": ("A_cnv", "A_rnaseq", "B_mut", "B_rnaseq"),
    }
    assert [len(corpus.patients[i].slides) for i in (0, 7, 9)] == [1, 2, 0]
    assert corpus.patients[7].patches().shape == (10, 4)
    assert any("1 slides have a line but no feature file: s9" in note for note in corpus.notes)
    problems = check_file(cohort)
    assert any("s9" in problem for problem in problems)
    bundle = load_bundle(str(cohort), SurvivalDataConfig(), needs=("genes", "slides"))
    assert "1 patients without a feature file left out" in bundle.facts["notes"]


def test_times_are_cut_by_training_patients_alone() -> None:
    args = SurvivalDataConfig(folds=5, fold=1, slides=False)
    corpus = load_corpus("synthetic_survival", args)
    parts, _ = parts_of(corpus.patients, args, 0)
    train = [one for one in corpus.patients if parts[one.name] == "train"]
    state = fit(corpus, train, args)
    time = np.array([one.time for one in train])
    event = np.array([one.event for one in train])
    counts = np.bincount(interval_of(time[event], state), minlength=4)
    assert counts.max() - counts.min() <= 2
    np.testing.assert_allclose(state["edges"][1:-1], np.quantile(time[event], [0.25, 0.5, 0.75]))
    late = interval_of(np.array([0.0, 1e9]), state)
    assert late.tolist() == [0, 3]
    bundle = load_bundle("synthetic_survival", args)
    assert bundle.state["edges"] == state["edges"]
    assert isinstance(bundle.train, PatientSet)
    assert np.abs(bundle.train.genes.mean(axis=0)).max() < 1e-5


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (("c3,", ","), "no case_id"),
        (("s7b.svs,X,60,", "s7b.svs,X,60,1"), "several times or states"),
        (("survival_months", "months"), "needs a column"),
    ],
)
def test_bad_tables_are_one_sentence(cohort: Path, tmp_path: Path, change: tuple[str, str], says: str) -> None:
    text = (cohort / "cohort.csv").read_text(encoding="utf-8").replace(*change, 1)
    (tmp_path / "t.csv").write_text(text, encoding="utf-8")
    with pytest.raises(UserError, match=says) as caught:
        read_path(tmp_path / "t.csv", SurvivalDataConfig())
    assert "\n" not in str(caught.value)


def test_published_splits(cohort: Path, tmp_path: Path) -> None:
    lines = ["train,val", *(f"c{i},{f'c{i + 40}' if i < 20 else ''}" for i in range(40))]
    file = tmp_path / "splits_0.csv"
    file.write_text("\n".join(lines), encoding="utf-8")
    args = SurvivalDataConfig(splits=str(file), val=0)
    bundle = load_bundle(str(cohort), args)
    assert isinstance(bundle.test, PatientSet)
    assert {one.name for one in bundle.test.patients} == {f"c{i}" for i in range(40, 60)}
    assert bundle.val is None
    file.write_text("train,val\nc1,c1\n", encoding="utf-8")
    with pytest.raises(UserError, match="c1 in two parts"):
        load_bundle(str(cohort), args)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"intervals": 1}, "intervals must be"),
        ({"intervals": 500}, "too few"),
        ({"instances": -1}, "instances must be"),
        ({"folds": 1}, "2 or more"),
    ],
)
def test_bad_options_are_one_sentence(options: dict[str, Any], says: str) -> None:
    with pytest.raises(UserError, match=says):
        load_bundle("synthetic_survival", SurvivalDataConfig(**options))


# -- scores -----------------------------------------------------------------------------------------------------------


def test_c_index_by_its_definition() -> None:
    rng = np.random.default_rng(0)
    for _ in range(100):
        count = int(rng.integers(2, 14))
        time, risk = rng.integers(1, 6, count).astype(float), rng.integers(0, 4, count).astype(float)
        event = rng.random(count) < 0.6
        right: list[float] = []
        for i in range(count):
            for j in range(count):
                outlived = time[j] > time[i] or (time[j] == time[i] and not event[j])
                if i != j and event[i] and outlived:
                    right.append(1.0 if risk[i] > risk[j] else 0.5 if risk[i] == risk[j] else 0.0)
        found = metrics.c_index(time, event, risk)
        assert math.isnan(found) if not right else found == pytest.approx(np.mean(right))


def test_resampled_c_index_is_that_of_the_resample() -> None:
    """Weights of pairs give what the resampled patients themselves give."""
    rng = np.random.default_rng(0)
    time, risk, event = rng.exponential(1, 30), rng.standard_normal(30), rng.random(30) < 0.6
    drawn = rng.integers(0, 30, 30)
    times = np.bincount(drawn, minlength=30).astype(float)
    comparable, right = metrics.pairs(time, event, risk)
    assert times @ right @ times / (times @ comparable @ times) == pytest.approx(
        metrics.c_index(time[drawn], event[drawn], risk[drawn])
    )


def test_brier_without_censoring_is_the_mean_square() -> None:
    rng = np.random.default_rng(0)
    time = rng.uniform(0.5, 9.5, 40)
    survival = np.sort(rng.random((40, 2)), axis=1)[:, ::-1]
    found = metrics.Scored(np.arange(40), time, np.ones(40, bool), np.zeros(40), np.zeros(40), survival)
    state = {"horizon": 9.0, "edges": [0.0, 5.0, 10.0], "censoring": [[], []]}
    grid = np.linspace(0, 9, 61)[1:]
    total = 0.0
    for one, (first, last) in zip(time, survival):
        for when in grid:
            said = first ** (when / 5) if when <= 5 else first * (last / first) ** ((when - 5) / 5)
            total += (said - (one > when)) ** 2
    assert metrics.brier(found, state).mean() == pytest.approx(total / (40 * 60))


def test_kaplan_meier_by_hand() -> None:
    curve = estimates.kaplan_meier(np.array([1.0, 2, 2, 3, 4]), np.array([1, 1, 0, 0, 1], bool))
    np.testing.assert_allclose(curve(np.array([0.5, 1, 1.9, 2, 3.5, 4])), [1, 0.8, 0.8, 0.6, 0.6, 0])
    np.testing.assert_allclose(curve.before(np.array([1.0, 2, 4])), [1, 0.8, 0.6])


def test_cox_is_the_maximum_of_its_likelihood() -> None:
    """Partial likelihood pair by pair, its gradient by differences, and the penalised optimum of one feature."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((40, 1))
    time, event = rng.integers(1, 12, 40).astype(float), rng.random(40) < 0.7

    def plain(risk: np.ndarray) -> float:
        return sum(risk[i] - math.log(np.exp(risk[time >= time[i]]).sum()) for i in range(40) if event[i])

    risk = 0.5 * x[:, 0]
    value, gradient = estimates.partial_likelihood(risk, time, event)
    assert value == pytest.approx(plain(risk))
    for i in range(0, 40, 7):
        step = np.zeros(40)
        step[i] = 1e-5
        assert gradient[i] == pytest.approx((plain(risk + step) - plain(risk - step)) / 2e-5, abs=1e-6)
    found = estimates.cox(x, time, event, penalty=0.1)
    z = (x[:, 0] - x.mean()) / x.std()
    tried = np.linspace(-2, 2, 4001)
    best = min(tried, key=lambda w: -plain(w * z) / 40 + 0.05 * w * w)
    assert found.weight[0] == pytest.approx(best, abs=1e-3)
    curve = found.survival(x.mean(keepdims=True).reshape(1, 1), np.array([0.0, 5, 11]))[0]
    assert curve[0] == 1
    assert (np.diff(curve) < 0).all()
