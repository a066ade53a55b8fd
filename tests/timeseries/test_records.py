"""Irregular records: reading, splitting, the grid, scores, the task from training to prediction."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from sklearn import metrics as sk

from attn_shared import trainer
from attn_shared.config import OptimConfig, RunConfig, TrainerConfig
from attn_shared.errors import UserError
from attn_timeseries.cli import APP
from attn_timeseries.config import MODELS
from attn_timeseries.records import metrics
from attn_timeseries.records.baselines import everything, values
from attn_timeseries.records.cards import RecordsDataConfig, RecordsTaskConfig, is_records
from attn_timeseries.records.corpus import Corpus, Stay, check_file, load_corpus
from attn_timeseries.records.data import RecordSet, fit_state, prepare, regular_grid, split_stays
from attn_timeseries.records.task import RecordsTask

SMALL: dict[str, Any] = {"d_model": 16, "n_heads": 2, "layers": 1, "embed_time": 8, "time_heads": 2}


def options(**changes: Any) -> RecordsDataConfig:
    return RecordsDataConfig(**{"steps": 12, "stays": 120, "text_features": 16, **changes})


def config(data: str | Path = "synthetic_records", model: str = "utde", **changes: Any) -> RunConfig:
    return RunConfig(
        app="timeseries",
        kind="records",
        model=model,
        model_args=MODELS[model].config(**SMALL),
        data=str(data),
        data_args=options(**changes),
        task_args=RecordsTaskConfig(bootstrap=20),
        trainer=TrainerConfig(max_epochs=1, batch_size=32, progress=False, threads=1),
        optim=OptimConfig(lr=1e-3, schedule="constant"),
    )


# -- files of the user's own ------------------------------------------------------------------------------------------

VALUES = [
    "id,time,variable,value",
    "a,0.5,heart rate,80",
    "a,0.5,lactate,1.5",
    "a,3,heart rate,90",
    "b,1,heart rate,70",
    "b,2,rhythm,sinus",
    "b,2.5,rhythm,paced",
    "c,47,lactate,<0.3",
    "c,60,heart rate,100",
    "d,1,heart rate,75",
]
LABELS = ["id,died,sepsis", "a,1,0", "b,0,", "c,1,1", "d,0,0"]
NOTES = ["id,time,text", "a,2,doing worse", "a,1,comfortable", "d,5,stable"]


Lines = list[str] | None


def write(folder: Path, values: list[str] = VALUES, labels: Lines = LABELS, notes: Lines = NOTES) -> Path:
    path = folder / "mine.csv"
    for name, lines in (("mine", values), ("mine_labels", labels), ("mine_notes", notes)):
        if lines is not None:
            (folder / f"{name}.csv").write_text("\n".join(lines) + "\n")
    return path


def test_long_table(tmp_path: Path) -> None:
    corpus = load_corpus(str(write(tmp_path)), options())
    assert corpus.variables == ["heart rate", "lactate", "rhythm=paced", "rhythm=sinus"]
    assert corpus.categorical == ["rhythm"]
    assert corpus.labels == ["died", "sepsis"]
    a, b, c, d = corpus.stays
    assert a.hours.tolist() == [0.5, 3]
    np.testing.assert_array_equal(a.values[0], np.array([80, 1.5, np.nan, np.nan], np.float32))
    np.testing.assert_array_equal(b.values[1:, 2:], [[0, 1], [1, 0]])
    assert c.values[0, 1] == pytest.approx(0.3)
    assert a.notes.tolist() == ["comfortable", "doing worse"]
    assert a.note_hours.tolist() == [1, 2]
    assert len(b.notes) == 0
    assert d.notes.tolist() == ["stable"]
    np.testing.assert_array_equal(b.label, np.array([0, np.nan], np.float32))
    assert any("limit" in note for note in corpus.found)


def test_dates_count_from_the_start_or_the_first_record(tmp_path: Path) -> None:
    table = ["stay_id;charttime;item;valuenum"]
    table += ["1;2024-05-01 10:30;hr;80", "1;2024-05-01 12:00;hr;81", "2;2024-05-02;hr;90"]
    labels = ["stay_id,start,died", "1,2024-05-01 10:00,1", "2,,0"]
    notes = ["stay_id,time,text", "2,2024-05-01T21:00,early"]
    corpus = load_corpus(str(write(tmp_path, table, labels, notes)), options())
    assert [stay.hours.tolist() for stay in corpus.stays] == [[0.5, 2.0], [3.0]]
    assert corpus.stays[1].note_hours.tolist() == [0.0]


def test_decimal_commas(tmp_path: Path) -> None:
    table = ["id;time;variable;value", "a;0,5;hr;80,5", "b;1;hr;-3,25", "b;2;hr;4"]
    corpus = load_corpus(str(write(tmp_path, table, ["id;died", "a;1", "b;0"], None)), options())
    assert corpus.variables == ["hr"]
    assert corpus.stays[0].hours.tolist() == [0.5]
    assert [stay.values[:, 0].tolist() for stay in corpus.stays] == [[80.5], [-3.25, 4.0]]


def test_embeddings_as_notes(tmp_path: Path) -> None:
    corpus = load_corpus(str(write(tmp_path, notes=["id,time,e0,e1,e2", "a,1,0.5,1,2", "d,2,3,4,5"])), options())
    assert corpus.embedding == 3
    assert corpus.stays[0].notes.tolist() == [[0.5, 1, 2]]
    assert corpus.stays[1].notes.shape == (0, 3)
    held = RecordSet(corpus.stays, np.arange(4), fit_state(corpus, corpus.stays, options()))
    batch = held.__getitems__([1, 0, 3])
    assert batch["notes"].shape == (3, 1, 3)
    assert batch["notes"][1, 0].tolist() == [0.5, 1, 2]
    assert batch["note_mask"].tolist() == [[False], [True], [True]]


@pytest.mark.parametrize(
    ("values", "labels", "notes", "message"),
    [
        (["id,time,variable", "a,1,hr"], LABELS, None, "no column called value"),
        ([*VALUES[:2], "a,x,hr,1"], LABELS, None, r"mine.csv:3: time 'x' is no number"),
        ([*VALUES[:2], "a,,hr,1"], LABELS, None, r"mine.csv:3: no time"),
        ([*VALUES[:2], ",1,hr,1"], LABELS, None, r"mine.csv:3: no id"),
        ([*VALUES[:2], "a,1,,1"], LABELS, None, r"mine.csv:3: no variable"),
        ([*VALUES[:2], "a,1,hr"], LABELS, None, r"mine.csv:3"),
        (VALUES[:1], LABELS, None, "no rows"),
        (["id,time,variable,value", "a,1,hr,"], LABELS, None, "holds no value"),
        ([VALUES[0], *(f"a,{i},word,w{i}" for i in range(40))], LABELS, None, "more than the 30"),
        (VALUES, None, None, "there are no labels"),
        (VALUES, ["id,died", "a,2"], None, r"mine_labels.csv:2: label 'died' is 2; it must be 0 or 1"),
        (VALUES, ["id,died", "a,yes"], None, r"mine_labels.csv:2: label 'died' 'yes' is no number"),
        (VALUES, ["id,died", "a,1", "a,0"], None, r"mine_labels.csv:3: the id 'a' comes a second time"),
        (VALUES, ["id", "a"], None, "no column of labels"),
        (VALUES, ["who,died", "a,1"], None, "no column called id"),
        (VALUES, ["id,died,split", "a,1,exam"], None, r"split is 'exam'"),
        (VALUES, LABELS, ["id,time,text", "a,noon,hello"], r"mine_notes.csv"),
        (VALUES, LABELS, ["id,time", "a,1"], "neither a column of text"),
        (VALUES, LABELS, ["id,time,e0", "a,1,zero"], r"mine_notes.csv:2: the embedding's 'zero' is no number"),
        (VALUES, LABELS, ["id,time,text", "a,2024-01-01,hello"], "one gives times in hours and the other as dates"),
    ],
)  # fmt: skip
def test_bad_tables_in_one_sentence(
    tmp_path: Path, values: list[str], labels: list[str] | None, notes: list[str] | None, message: str
) -> None:
    with pytest.raises(UserError, match=message) as error:
        load_corpus(str(write(tmp_path, values, labels, notes)), options())
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"value_column": "valeu"}, "did you mean 'value'"),
        ({"label_columns": ["dead"]}, "no column 'dead'"),
        ({"labels": "elsewhere.csv"}, "there is no file elsewhere.csv"),
        ({"notes": "elsewhere.csv"}, "there is no file elsewhere.csv"),
        ({"patient_column": "mrn"}, "no column 'mrn'"),
    ],
)
def test_wrong_names_of_columns_and_files(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        load_corpus(str(write(tmp_path)), options(**change))


@pytest.mark.parametrize("change", [{"steps": 0}, {"hours": 0.0}, {"val_fraction": 0.6, "test_fraction": 0.4}])
def test_wrong_options(change: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="must be"):
        options(**change)


def test_files_are_told_apart(tmp_path: Path) -> None:
    assert is_records(str(write(tmp_path)))
    (tmp_path / "series.csv").write_text("date,value\n2024-01-01,1\n")
    (tmp_path / "binary.bin").write_bytes(b"\xff\xfe\x00")
    for name in ("series.csv", "binary.bin", "missing.csv"):
        assert not is_records(str(tmp_path / name))


# -- the benchmark's folders ------------------------------------------------------------------------------------------

HEADER = "Hours,Glascow coma scale eye opening,Heart Rate,pH"


@pytest.fixture
def benchmark(tmp_path: Path) -> Path:
    """MIMIC-III benchmark: 40 training patients, one with two stays, and 12 for testing."""
    root, rng = tmp_path / "in-hospital-mortality", np.random.default_rng(0)
    (root / "notes").mkdir(parents=True)
    starts = ["stay,start"]
    for part, patients in (("train", range(40)), ("test", range(40, 52))):
        (root / part).mkdir()
        rows = ["stay,y_true"]
        for patient in patients:
            for episode in (1, 2) if patient == 3 else (1,):
                label = int(patient % 3 == 0)
                name = f"{patient}_episode{episode}_timeseries.csv"
                times = np.sort(rng.uniform(0, 48, 8)).round(3)
                lines = [f"{t},{['4 Spontaneously', 'To Speech', ''][i % 3]},{80 + 20 * label + rng.normal():.1f},"
                         for i, t in enumerate(times)]  # fmt: skip
                (root / part / name).write_text("\n".join([HEADER, *lines]) + "\n")
                rows.append(f"{name},{label}")
                if patient % 2:
                    starts.append(f"{patient}_{episode},2101-10-20 19:00:00")
                    note = {"2101-10-20 20:30:00": ["patient is", "worse"], "2101-10-20 19:30:00": "admitted"}
                    (root / "notes" / f"{patient}_{episode}").write_text(json.dumps(note))
        (root / part / "listfile.csv").write_text("\n".join(rows) + "\n")
    (root / "notes" / "starttimes.csv").write_text("\n".join(starts) + "\n")
    return root


def test_benchmark_folder(benchmark: Path) -> None:
    assert is_records(str(benchmark))
    corpus = load_corpus(str(benchmark), options())
    assert corpus.variables == ["Glascow coma scale eye opening", "Heart Rate", "pH"]
    assert corpus.labels == ["y_true"]
    assert len(corpus.stays) == 53
    first = corpus.stays[0]
    assert (first.name, first.patient, first.split) == ("0_episode1", "0", "train")
    np.testing.assert_array_equal(first.values[:3, 0], np.array([4, 3, np.nan], np.float32))
    assert np.isnan(first.values[:, 2]).all()
    noted = next(stay for stay in corpus.stays if stay.patient == "1")
    assert noted.notes.tolist() == ["admitted", "patient is worse"]
    assert noted.note_hours.tolist() == [0.5, 1.5]
    prepared = prepare(options(), corpus)
    assert prepared.state["variables"] == ["Glascow coma scale eye opening", "Heart Rate"]  # pH is never there
    assert len(prepared.test) == 12
    assert len(prepared.train) + len(prepared.val) == 41
    assert "split of the data" in prepared.protocol


def test_benchmark_validation_list_and_phenotypes(benchmark: Path) -> None:
    header = "stay,period_length,Acute,Chronic"
    for part in ("train", "test"):
        listing = benchmark / part / "listfile.csv"
        rows = [row.replace(",", ",48.0,") for row in listing.read_text(encoding="utf-8").splitlines()[1:]]
        listing.write_text("\n".join([header, *(f"{row},1" for row in rows)]))
    held = [f"{patient}_episode1_timeseries.csv" for patient in (0, 1, 5)]
    (benchmark / "val_listfile.csv").write_text("\n".join([header, *(f"{name},1,0,0" for name in held)]))
    corpus = load_corpus(str(benchmark), options())
    assert corpus.labels == ["Acute", "Chronic"]
    assert [stay.name for stay in corpus.stays if stay.split == "val"] == [n[: -len("_timeseries.csv")] for n in held]


@pytest.mark.parametrize(
    ("file", "text", "message"),
    [
        ("train/listfile.csv", "stay,y_true\nmissing.csv,1\n", "is listed in listfile.csv and is not there"),
        ("train/listfile.csv", "stay,y_true\n0_episode1_timeseries.csv,13.5\n", "must be 0 or 1"),
        ("train/listfile.csv", "name,y_true\n0_episode1_timeseries.csv,1\n", "first column is 'name'"),
        ("train/listfile.csv", "stay,died\n0_episode1_timeseries.csv,1\n", "differ from those of the other part"),
        ("train/0_episode1_timeseries.csv", "time,Heart Rate\n1,80\n", "starts with the column Hours"),
        ("train/0_episode1_timeseries.csv", "Hours,Heart Rate\n1,fast\n", "'fast', which is neither a number"),
        ("train/0_episode1_timeseries.csv", "Hours,Heart Rate\n,80\n", "no time"),
        ("notes/1_1", "not json", "is no JSON"),
        ("notes/1_1", '{"2101": 5}', "a text or a list"),
        ("notes/1_1", '{"yesterday": "x"}', "neither a number of hours nor a date"),
        ("notes/starttimes.csv", "stay,start\n2_1,2101-10-20\n", "has no start of 1_1"),
    ],
)
def test_bad_folders_in_one_sentence(benchmark: Path, file: str, text: str, message: str) -> None:
    (benchmark / file).write_text(text)
    with pytest.raises(UserError, match=message) as error:
        load_corpus(str(benchmark), options())
    assert "\n" not in str(error.value)


def test_empty_folder(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"listfile\.csv"):
        load_corpus(str(tmp_path), options())


# -- splits and statistics --------------------------------------------------------------------------------------------


def test_no_patient_is_in_two_parts() -> None:
    corpus = load_corpus("synthetic_records", options(stays=400))
    parts, _ = split_stays(corpus, options(stays=400))
    patients = {name: {stay.patient for stay in stays} for name, stays in parts.items()}
    assert sum(map(len, parts.values())) == 400
    assert not patients["train"] & patients["test"]
    assert not patients["train"] & patients["val"]
    assert not patients["val"] & patients["test"]
    assert len({stay.patient for stay in corpus.stays}) < 400
    shares = [np.mean([stay.label[0] for stay in stays]) for stays in parts.values()]
    assert max(shares) - min(shares) < 0.15


def stay(name: str, patient: str, split: str = "", label: float = 0.0, value: float = 1.0) -> Stay:
    return Stay(
        name=name,
        patient=patient,
        hours=np.array([1.0]),
        values=np.array([[value]], np.float32),
        note_hours=np.zeros(0),
        notes=np.zeros(0, object),
        label=np.array([label], np.float32),
        split=split,
    )


def corpus_of(*stays: Stay) -> Corpus:
    return Corpus(source="x.csv", variables=["v"], labels=["l"], stays=list(stays))


@pytest.mark.parametrize(
    ("stays", "message"),
    [
        ([stay("1", "p", "train"), stay("2", "p", "test")], "patient 'p' is in"),
        ([stay("1", "p", "train"), stay("2", "p", "val")], "patient 'p' is in train and in val"),
        ([stay("1", "p", "train"), stay("2", "q")], "'2' is in no split"),
        ([stay("1", "p", "test"), stay("2", "q", "test")], "no stay is left for training"),
    ],
)
def test_splits_that_leak_are_refused(stays: list[Stay], message: str) -> None:
    with pytest.raises(UserError, match=message):
        split_stays(corpus_of(*stays), options())


def test_statistics_see_training_stays_only() -> None:
    args = options()
    corpus = load_corpus("synthetic_records", args)
    state = prepare(args, corpus).state
    parts, _ = split_stays(corpus, args)
    for one in parts["test"]:
        one.values[:] = 1e6
        one.notes[:] = "unheard of"
    assert prepare(args, corpus).state == state
    parts["train"][0].values[:] = 1e6
    assert prepare(args, corpus).state["mean"] != state["mean"]


def test_a_label_with_one_outcome_is_refused() -> None:
    with pytest.raises(UserError, match="is 0 in all of them"):
        prepare(options(val_fraction=0.0), corpus_of(*(stay(str(i), str(i)) for i in range(20))))


def test_later_records_are_not_seen() -> None:
    args = options(hours=10.0)
    corpus = load_corpus("synthetic_records", options())
    one = corpus.stays[0]
    one.hours, one.values = np.array([1.0, 9.9, 10.0, 30.0]), np.tile(np.arange(4.0, dtype=np.float32)[:, None], 8)
    one.note_hours, one.notes = np.array([2.0, 11.0]), np.array(["early", "late"], object)
    state = fit_state(corpus, corpus.stays, args)
    before = RecordSet([one], np.arange(8), state).__getitems__([0])
    assert before["x"].shape[1] == 2
    assert before["note_mask"].sum() == 1
    one.values[2:], one.notes[1] = 99.0, "changed"
    after = RecordSet([one], np.arange(8), state).__getitems__([0])
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_regular_grid_by_hand() -> None:
    nan = np.nan
    time = np.array([0.05, 0.1, 0.3, 0.99, 1.0], np.float32)
    x = np.array([[1, nan], [2, nan], [nan, 5], [nan, nan], [7, nan]], np.float32)
    grid = regular_grid(time, x, 4)
    np.testing.assert_array_equal(grid[:, 0], [2, 2, 2, 7])
    np.testing.assert_array_equal(grid[:, 1], [0, 5, 5, 5])
    np.testing.assert_array_equal(grid[:, 2], [1, 0, 0, 1])
    np.testing.assert_array_equal(grid[:, 3], [0, 1, 0, 0])
    assert not regular_grid(np.zeros(0, np.float32), np.zeros((0, 2), np.float32), 4).any()


def test_batches_hold_what_was_read() -> None:
    args = options()
    corpus = load_corpus("synthetic_records", args)
    prepared = prepare(args, corpus)
    held = prepared.train
    batch = held.__getitems__([5, 2, 9])
    by_name = {stay.name: stay for stay in corpus.stays}
    mean, std = np.array(prepared.state["mean"]), np.array(prepared.state["std"])
    for row, i in enumerate([5, 2, 9]):
        one = by_name[held.names[i]]
        n = len(one.hours)
        observed = batch["observed"][row, :n].numpy()
        np.testing.assert_array_equal(observed, ~np.isnan(one.values))
        np.testing.assert_allclose(
            (batch["x"][row, :n].numpy() * std + mean)[observed], one.values[observed], rtol=1e-4
        )
        assert not batch["observed"][row, n:].any()
        assert batch["y"][row].tolist() == one.label.tolist()
        assert int(batch["note_mask"][row].sum()) == len(one.notes)
    assert torch.equal(held[5]["y"], batch["y"][0])


def test_synthetic_data_says_what_it_promises() -> None:
    """Counts tell of the label only where missingness is a signal; the patterns are the same as a whole."""
    counts, areas, words = {}, {}, {}
    for kind in ("signal", "random"):
        args = options(stays=2000, missingness=kind)
        corpus = load_corpus("synthetic_records", args)
        again = load_corpus("synthetic_records", args)
        assert all(np.array_equal(a.values, b.values, equal_nan=True) for a, b in zip(corpus.stays, again.stays))
        many = np.array([(~np.isnan(one.values)).sum() for one in corpus.stays])
        truth = np.array([one.label[0] for one in corpus.stays]) > 0.5
        bad = np.array([sum("worsening" in note for note in one.notes) for one in corpus.stays])
        counts[kind], areas[kind], words[kind] = many, metrics.auroc(truth, many), metrics.auroc(truth, bad)
    assert areas["signal"] > 0.68
    assert abs(areas["random"] - 0.5) < 0.04
    assert np.quantile(counts["signal"], [0.1, 0.5, 0.9]) == pytest.approx(
        np.quantile(counts["random"], [0.1, 0.5, 0.9]), rel=0.05
    )
    assert min(words.values()) > 0.52


# -- scores -----------------------------------------------------------------------------------------------------------


def test_scores_agree_with_scikit_learn() -> None:
    rng = np.random.default_rng(0)
    for ties in (False, True):
        truth = rng.random(300) < 0.3
        said = rng.random(300) + 0.3 * truth
        said = np.round(said, 1) if ties else said
        assert metrics.auroc(truth, said) == pytest.approx(sk.roc_auc_score(truth, said), abs=1e-12)
        assert metrics.average_precision(truth, said) == pytest.approx(
            sk.average_precision_score(truth, said), abs=1e-12
        )
        assert metrics.f1(truth, said >= 0.5) == pytest.approx(sk.f1_score(truth, said >= 0.5), abs=1e-12)
        best = max(sk.f1_score(truth, said >= t) for t in np.unique(said))
        assert metrics.best_f1(truth, said) == pytest.approx(best, abs=1e-12)
    assert np.isnan(metrics.auroc(np.zeros(3, bool), np.arange(3.0)))


def test_calibration_error() -> None:
    rng = np.random.default_rng(1)
    probability = rng.random(20000)
    truth = rng.random(20000) < probability
    assert metrics.calibration_error(truth, probability) < 0.02
    assert metrics.calibration_error(truth, np.clip(probability + 0.3, 0, 1)) > 0.15


def test_intervals_resample_patients() -> None:
    """A patient's copies add nothing: the interval of tripled stays is that of single ones, not narrower."""
    rng = np.random.default_rng(2)
    truth = rng.random(200) < 0.4
    said = rng.random(200) + 0.4 * truth
    single = metrics.resampled(truth, said, np.arange(200), 400, 0)
    triple = metrics.resampled(*(np.repeat(a, 3) for a in (truth, said, np.arange(200))), 400, 0)
    assert single[:, 0].std() == pytest.approx(triple[:, 0].std(), rel=0.05)
    assert single[:, 0].std() == pytest.approx(0.038, rel=0.3)
    low, high = np.percentile(single[:, 0], [2.5, 97.5])
    assert low < metrics.auroc(truth, said) < high


def test_unknown_labels_count_nowhere() -> None:
    truth = np.array([[1, np.nan], [0, 1], [1, 0], [0, np.nan]])
    said = np.array([[0.9, 0.1], [0.2, 0.8], [0.7, 0.3], [0.4, 0.9]])
    found = metrics.figures(metrics.Predictions(np.arange(4), np.arange(4), truth, said))
    assert found["auroc"] == 1.0
    said[0, 1], said[3, 1] = 0.99, 0.0
    assert metrics.figures(metrics.Predictions(np.arange(4), np.arange(4), truth, said)) == found


def test_summaries_of_the_baselines() -> None:
    args = options()
    prepared = prepare(args, load_corpus("synthetic_records", args))
    held = prepared.train
    table = values(held).reshape(len(held), 4, -1)
    column = held.x[7][:, 5]
    seen = column[~np.isnan(column)]
    expected = [seen[-1], seen.mean(), seen.min(), seen.max()] if len(seen) else [np.nan] * 4
    np.testing.assert_allclose(table[7, :, 5], expected, rtol=1e-5)
    assert everything(held)[7, 4 * 8 + 5] == len(seen)


# -- the task ---------------------------------------------------------------------------------------------------------


def test_loss_leaves_out_unknown_labels(tmp_path: Path) -> None:
    run = config(write(tmp_path), val_fraction=0.0, test_fraction=0.0)
    bundle = RecordsTask.load_data(run)
    torch.manual_seed(0)
    task = RecordsTask(run, bundle.state).eval()
    batch = bundle.train.__getitems__(range(4))
    logits = task.forward_batch(batch)
    known = ~batch["y"].isnan()
    each = torch.nn.functional.binary_cross_entropy_with_logits(logits[known], batch["y"][known])
    assert task.training_loss(batch).item() == pytest.approx(each.item(), rel=1e-6)
    run.task_args = RecordsTaskConfig(class_weight="balanced")
    weighted = RecordsTask(run, bundle.state).eval()
    weighted.load_state_dict(task.state_dict())
    assert weighted.training_loss(batch).item() != pytest.approx(each.item(), rel=1e-3)


def test_train_evaluate_predict(benchmark: Path, tmp_path: Path) -> None:
    run = config(benchmark)
    run.runs = str(tmp_path / "runs")
    folder = trainer.train(APP, run)
    results = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))
    assert {"auroc", "auprc", "f1", "ece", "auroc_low", "auroc_high"} <= set(results["splits"]["test"])
    assert [row["model"] for row in results["baselines"]] == ["majority", "logistic regression", "gradient boosting"]
    assert {path.stem for path in (folder / "plots").iterdir()} >= {"curves", "calibration", "stay", "gate"}
    for path in [*(benchmark / "test").glob("listfile.csv"), *(benchmark / "train").glob("listfile.csv")]:
        path.unlink()  # prediction needs no labels
    written = trainer.predict(APP, folder, [benchmark], tmp_path / "out")
    frame = pd.read_csv(written[0])
    assert list(frame.columns) == ["id", "p_y_true"]
    assert len(frame) == 53
    assert frame["p_y_true"].between(0, 1).all()
    task, _ = trainer.load_task(APP, folder)
    corpus = load_corpus(str(benchmark), options(), labelled=False)
    held = RecordSet(corpus.stays, corpus.aligned(task.data_state["variables"]), task.data_state)
    np.testing.assert_allclose(frame["p_y_true"], task.predictions(held).probability[:, 0], atol=1e-6)


def test_prediction_of_other_files(tmp_path: Path) -> None:
    run = config(write(tmp_path), val_fraction=0.0, test_fraction=0.0)
    bundle = RecordsTask.load_data(run)
    task = RecordsTask(run, bundle.state).eval()
    new = tmp_path / "new.csv"
    new.write_text("id,time,variable,value\nz,1,heart rate,77\nz,2,rhythm,unheard\ny,3,unknown,1\n")
    frame = pd.read_csv(task.predict_files([new], tmp_path / "out", {})[0])
    assert list(frame["id"]) == ["z", "y"]
    assert list(frame.columns) == ["id", "p_died", "p_sepsis"]
    notes = tmp_path / "words.csv"
    notes.write_text("id,time,text\nz,1,doing worse\n")
    with_notes = pd.read_csv(task.predict_files([new], tmp_path / "out", {"notes": str(notes)})[0])
    assert with_notes.iloc[0, 1] != frame.iloc[0, 1]
    assert with_notes.iloc[1, 1] == frame.iloc[1, 1]
    for text, message in (
        ("id,time,variable,value\nz,1,other,77\n", "none of the variables"),
        ("id,time,variable,value\nz,1,heart rate,fast\n", "new.csv:2: 'heart rate' is 'fast', and the model"),
    ):
        new.write_text(text)
        with pytest.raises(UserError, match=message):
            task.predict_files([new], tmp_path / "out2", {})
    assert not list((tmp_path / "out2").glob("*"))


def test_check_file(tmp_path: Path, benchmark: Path) -> None:
    assert check_file(benchmark) == []
    problems = check_file(write(tmp_path, labels=["id,died", "a,7"]))
    assert problems == ["mine_labels.csv:2: label 'died' is 7; it must be 0 or 1"]


def test_evaluation_is_the_same_for_every_batch_size() -> None:
    run = config()
    bundle = RecordsTask.load_data(run)
    torch.manual_seed(0)
    task, seen = RecordsTask(run, bundle.state).eval(), []
    for size in (1, 7, 64):
        run.trainer.eval_batch_size = size
        seen.append(trainer.evaluate_split(task, bundle, "val", run))
    for figures in seen[1:]:
        assert figures == pytest.approx(seen[0], abs=1e-6)


def test_options_of_the_data_reach_the_network() -> None:
    run = config(max_notes=0, steps=5, max_points=3)
    bundle = RecordsTask.load_data(run)
    assert "notes" not in bundle.train.__getitems__([0])
    task = RecordsTask(run, bundle.state)
    assert task.shape.text == 0
    assert task.network.positions.shape[0] == 5
    assert bundle.train.__getitems__([0])["x"].shape[1] == 3
    assert dataclasses.asdict(RecordsTaskConfig())["class_weight"] == "none"
