"""From recordings to training tensors: what they hold, and that nothing of the test part is in them."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from sklearn.neighbors import KNeighborsClassifier

from attn_eeg.data import pipeline
from attn_eeg.data.features import parse_bands, window_features
from attn_eeg.data.options import PAPER_BANDS, EegDataConfig
from attn_eeg.data.pipeline import Prepared, encode, prepare
from attn_eeg.data.recording import Corpus, Recording
from attn_shared.errors import UserError

NAMES = ["Fp1", "F3", "C3", "P3", "O1"]
EEGMAT = Path(os.environ.get("ATTN_DATA", "data")) / "eeg" / "eegmat_128hz"


@pytest.fixture(autouse=True)
def _no_cache() -> None:
    pipeline._cache.clear()


def corpus(subjects: int = 6, seconds: float = 20.0, sfreq: float = 128.0, seed: int = 0, **more: Any) -> Corpus:
    """Two trials a subject, one of each class."""
    rng = np.random.default_rng(seed)
    recordings = []
    for s in range(subjects):
        for label in (0, 1):
            data = (s + 1) * rng.normal(size=(len(NAMES), round(seconds * sfreq))).cumsum(axis=1)
            recordings.append(
                Recording(
                    subject=f"s{s}",
                    trial=f"t{label}",
                    data=data.astype(np.float32),
                    sfreq=sfreq,
                    channels=list(NAMES),
                    label=label,
                    **{name: value(rng) if callable(value) else value for name, value in more.items()},
                )
            )
    return Corpus(name="made up", classes=["rest", "work"], recordings=recordings)


def config(**args: Any) -> EegDataConfig:
    return EegDataConfig(**{"folds": 3, "stride": 2.0, "normalize": "array", **args})


def tensors(prepared: Prepared, part: str = "train") -> dict[str, torch.Tensor]:
    windows = prepared.part(part)
    assert windows is not None
    return windows.__getitems__(range(len(windows)))


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


# -- what is in a window ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("normalize", ["array", "channel", "none"])
def test_features_are_those_of_the_window(normalize: str) -> None:
    data = corpus()
    prepared = prepare(config(scale="none", normalize=normalize, train_stride=1.0), data, 0)
    for name in ("train", "val", "test"):
        windows = prepared.part(name)
        assert windows is not None
        assert windows.shape == (5, 4)
        assert windows.features == ["theta", "alpha", "beta", "gamma"]
        for i in (0, len(windows) // 2, len(windows) - 1):
            m = windows.meta
            recording = data.recordings[m.recording[i]]
            first = round(m.start[i] * 128)
            expected = window_features(
                recording.data[:, first : first + 512], 128.0, parse_bands(PAPER_BANDS), normalize=normalize, order=5,
                causal=True,
            )  # fmt: skip
            item = windows[i]
            np.testing.assert_allclose(item["x"], expected, atol=1e-5)
            assert item["y"] == recording.label == m.label[i]
            assert windows.subjects[item["subject"]] == recording.subject
            assert item["index"] == i
            assert m.stop[i] - m.start[i] == 4.0


@pytest.mark.parametrize("normalize", ["array", "channel", "none"])
def test_raw_windows_are_the_samples(normalize: str) -> None:
    data = corpus()
    prepared = prepare(config(scale="none", features="raw", normalize=normalize), data, 1)
    windows = prepared.test
    assert windows is not None
    assert windows.shape == (5, 512)
    batch = windows.__getitems__([7, 0, 3])
    for x, i in zip(batch["x"].double().numpy(), batch["index"].tolist()):
        first = round(windows.meta.start[i] * 128)
        expected = data.recordings[windows.meta.recording[i]].data[:, first : first + 512].astype(np.float64)
        axis = {"array": (0, 1), "channel": (1,), "none": ()}[normalize]
        if axis:
            expected = expected - expected.mean(axis=axis, keepdims=True)
            expected /= expected.std(axis=axis, keepdims=True)
        np.testing.assert_allclose(x, expected, rtol=1e-4, atol=1e-4)


def test_train_stride_adds_windows_to_training_only() -> None:
    few, many = (prepare(config(train_stride=stride), corpus(), 0) for stride in (0.0, 0.5))
    assert same(tensors(few, "val") | {"x": torch.zeros(())}, tensors(many, "val") | {"x": torch.zeros(())})
    assert len(few.test or ()) == len(many.test or ()) == 2 * 2 * 9
    assert (len(few.train or ()), len(many.train or ())) == (3 * 2 * 9, 3 * 2 * 33)
    assert few.train is not None
    assert many.train is not None
    assert set(few.train.meta.subject) == set(many.train.meta.subject)


def test_a_label_of_the_subject_makes_a_split_by_trial_leak() -> None:
    """Two recordings of each subject: with a label each the split is sound, with one for both it is not."""
    data = corpus()
    assert len({r.subject for r in data.recordings}) * 2 <= len(data.recordings)
    assert prepare(config(split="trial", folds=3), data, 0).warning == ""
    for recording in data.recordings:
        recording.label = int(sorted({r.subject for r in data.recordings}).index(recording.subject) % 2)
    assert "every subject has one label" in prepare(config(split="trial", folds=3), data, 0).warning
    assert prepare(config(split="subject", folds=3), data, 0).warning == ""


def test_published_stride_is_117_samples() -> None:
    windows = prepare(config(split="random", stride=0.9140625, val=0.0), corpus(), 0)
    starts = np.concatenate([one.meta.start[one.meta.recording == 0] for one in (windows.train, windows.test) if one])
    np.testing.assert_array_equal(np.sort(starts) * 128, np.arange(18) * 117)


def test_baseline_is_subtracted() -> None:
    data = corpus(baseline=lambda rng: rng.normal(size=(len(NAMES), 400)).astype(np.float32))
    plain, less = (tensors(prepare(config(scale="none", baseline=b), data, 0))["x"] for b in (False, True))
    difference = (plain - less).reshape(-1, 9, 5, 4)  # 9 windows a recording, the same shift for each
    torch.testing.assert_close(difference, difference[:, :1].expand_as(difference), atol=1e-5, rtol=0)
    assert difference.std() > 0.1
    data.recordings[0].baseline = np.ones((5, 60), np.float32)
    assert "baseline holds no whole second" in prepare(config(), data, 0).facts["found"]


@pytest.mark.parametrize("features", ["bde", "raw"])
def test_labels_along_time(features: str) -> None:
    data = corpus()
    for recording in data.recordings:
        recording.labels = np.repeat([0, 1, 0], [1000, 800, 760])
    prepared = prepare(config(features=features), data, 0)
    for part in ("train", "val", "test"):
        windows = prepared.part(part)
        assert windows is not None
        for start, y in zip(windows.meta.start[:8], windows.y):
            span = data.recordings[0].labels[round(start * 128) : round(start * 128) + 512]  # type: ignore[index]
            assert set(span) == {int(y)}
    assert prepared.facts["several labels"].endswith("windows left out")


@pytest.mark.parametrize("features", ["bde", "raw"])
def test_windows_with_samples_that_are_no_numbers_are_left_out(features: str) -> None:
    data = corpus()
    data.recordings[0].data[2, 1280:1290] = np.nan
    whole, holed = (prepare(config(features=features), d, 0) for d in (corpus(), data))
    counts = [sum(len(p.part(n) or ()) for n in ("train", "val", "test")) for p in (whole, holed)]
    assert counts == [108, 106]
    assert holed.facts["no numbers"] == "2 windows left out"
    for part in ("train", "val", "test"):
        assert torch.isfinite(tensors(holed, part)["x"]).all()


def test_windows_of_unknown_class_are_left_out() -> None:
    data = corpus()
    data.recordings[3].label = -1
    data.recordings[4].labels = np.repeat([-1, 0], 1280)
    prepared = prepare(config(), data, 0)
    every = [tensors(prepared, part)["y"] for part in ("train", "val", "test")]
    assert torch.cat(every).min() == 0
    assert sum(map(len, every)) == 108 - 9 - 5  # of the fifth recording four are unknown and one changes within


def test_flat_electrodes_and_flat_recordings_give_numbers() -> None:
    data = corpus()
    data.recordings[0].data[2] = 0.0
    data.recordings[1].data[:] = 4200.0
    for args in ({}, {"features": "raw"}, {"normalize": "channel"}, {"normalize": "none"}, {"scale": "subject"}):
        for fold in range(3):
            prepared = prepare(config(**args), data, fold)
            for part in ("train", "val", "test"):
                assert torch.isfinite(tensors(prepared, part)["x"]).all()


# -- what is fitted ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("features", ["bde", "raw"])
def test_global_scaling_is_that_of_the_training_windows(features: str) -> None:
    prepared = prepare(config(features=features), corpus(), 0)
    x = tensors(prepared)["x"].double()
    axis = (0,) if features == "bde" else (0, 2)
    assert x.mean(dim=axis).abs().max() < 1e-4
    assert (x.std(dim=axis, correction=0) - 1).abs().max() < 1e-4
    assert tensors(prepared, "test")["x"].double().mean(dim=axis).abs().max() > 1e-2


@pytest.mark.parametrize("features", ["bde", "raw"])
def test_subject_scaling_is_each_subjects_own_and_marked(features: str) -> None:
    prepared = prepare(config(features=features, scale="subject", normalize="none"), corpus(), 0)
    axis = (0,) if features == "bde" else (0, 2)
    for part in ("train", "test"):
        batch = tensors(prepared, part)
        for subject in batch["subject"].unique():
            x = batch["x"][batch["subject"] == subject].double()
            assert x.mean(dim=axis).abs().max() < 1e-3
            assert (x.std(dim=axis, correction=0) - 1).abs().max() < 1e-3
    assert "each subject scaled by its own windows without labels, test subjects included" in prepared.protocol
    assert "own windows" not in prepare(config(), corpus(), 0).protocol


def test_smote_balances_training_only() -> None:
    data = corpus()
    data.recordings = [r for i, r in enumerate(data.recordings) if not (r.label and i % 4 == 1)]
    plain, more = (prepare(config(balance=b, split="trial"), data, 0) for b in ("none", "smote"))
    assert plain.train is not None
    assert more.train is not None
    real = len(plain.train)
    assert same({k: v[:real] for k, v in tensors(more).items()}, tensors(plain))
    assert same(tensors(plain, "val"), tensors(more, "val"))
    assert same(tensors(plain, "test"), tensors(more, "test"))
    counts = torch.bincount(more.train.y)
    assert counts[0] == counts[1]
    assert more.train.synthetic == len(more.train) - real > 0
    assert (more.train.subject[real:] == -1).all()


def test_weights_and_keep() -> None:
    data = corpus()
    data.recordings = [r for i, r in enumerate(data.recordings) if not (r.label and i % 4 == 1)]
    prepared = prepare(config(balance="weights", split="trial"), data, 0)
    assert prepared.train is not None
    weights = torch.tensor(prepared.state["class_weights"])
    counts = torch.bincount(prepared.train.y)
    torch.testing.assert_close(weights * counts, torch.full((2,), len(prepared.train) / 2))
    assert prepare(config(), data, 0).state["class_weights"] is None
    for features in ("bde", "raw"):
        whole, most = (prepare(config(keep=keep, features=features), corpus(), 0) for keep in (1.0, 0.9))
        assert len(most.train or ()) == round(0.9 * len(whole.train or ()))
        assert len(most.test or ()) == len(whole.test or ())


# -- nothing of the test part reaches training ------------------------------------------------------------------------

SETTINGS: list[dict[str, Any]] = [
    {"split": "subject", "folds": 0},
    {"split": "subject", "folds": 0, "scale": "subject"},
    {"split": "subject", "folds": 0, "balance": "smote", "keep": 0.7},
    {"split": "subject", "folds": 0, "features": "raw", "balance": "weights", "train_stride": 1.0},
    {"split": "subject", "folds": 0, "resample": 100.0, "low": 1.0, "high": 40.0, "reference": "average"},
    {"split": "trial", "folds": 0, "scale": "subject"},
    {"split": "blocked", "folds": 3, "val": 0.4, "low": 1.0, "high": 40.0, "gap": 1.0},
    {"split": "blocked", "folds": 3, "val": 0.4, "scale": "subject", "balance": "smote", "gap": 0.0},
    {"split": "blocked", "folds": 3, "val": 0.4, "features": "raw", "resample": 100.0, "train_stride": 1.0},
]


def poisoned(data: Corpus, prepared: Prepared, how: str) -> Corpus:
    """Garbage, or no numbers, in place of every sample of the test part, and other labels."""
    assert prepared.test is not None
    m = prepared.test.meta
    rng = np.random.default_rng(99)
    recordings = []
    for i, recording in enumerate(data.recordings):
        own = m.recording == i
        if own.any():
            values, labels = recording.data.copy(), np.full(recording.data.shape[1], recording.label)
            spans = [(a, b) for a, b in zip(m.start[own], m.stop[own])]
            for number, (a, b) in enumerate(spans):
                first, last = round(a * recording.sfreq), round(b * recording.sfreq)
                labels[first:last] = 1 - recording.label
                if how == "garbage" or number:  # a whole window must be left to test on
                    values[:, first:last] = 1e4 * rng.normal(size=values[:, first:last].shape) + 1e5
                if how == "no numbers" and number:
                    values[:, last - 5 : last] = np.nan
            recording = dataclasses.replace(recording, data=values, labels=labels)
        recordings.append(recording)
    return dataclasses.replace(data, recordings=recordings)


@pytest.mark.parametrize("how", ["garbage", "no numbers"])
@pytest.mark.parametrize("args", SETTINGS)
def test_poisoned_test_part_changes_nothing_that_training_sees(args: dict[str, Any], how: str) -> None:
    data = corpus(seconds=30.0)
    options = config(**args)
    clean = prepare(options, data, 1)
    dirty = prepare(options, poisoned(data, clean, how), 1)
    assert clean.state == dirty.state
    assert same(tensors(clean), tensors(dirty))
    assert same(tensors(clean, "val"), tensors(dirty, "val"))
    one, other = tensors(clean, "test"), tensors(dirty, "test")
    assert one["x"].shape != other["x"].shape or not torch.equal(one["x"], other["x"])  # the poison is real


@pytest.mark.parametrize("args", SETTINGS[:4])
def test_poisoned_test_part_trains_the_same_weights(args: dict[str, Any]) -> None:
    data = corpus(seconds=30.0)
    options = config(**args)
    clean = prepare(options, data, 1)
    weights = []
    for prepared in (clean, prepare(options, poisoned(data, clean, "garbage"), 1)):
        torch.manual_seed(0)
        batch = tensors(prepared)
        net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(batch["x"][0].numel(), 2))
        optimizer = torch.optim.AdamW(net.parameters(), lr=1e-2)
        weight = prepared.state["class_weights"]
        for _ in range(5):
            loss = torch.nn.functional.cross_entropy(
                net(batch["x"]), batch["y"], weight=None if weight is None else torch.tensor(weight)
            )
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        weights.append(torch.nn.utils.parameters_to_vector(net.parameters()))
    assert torch.equal(*weights)


def test_the_random_split_shares_samples_and_says_so() -> None:
    prepared = prepare(config(split="random", stride=1.0), corpus(), 0)
    assert prepared.warning
    assert prepared.warning in prepared.protocol
    assert prepare(config(), corpus(), 0).warning == ""
    assert prepared.train is not None
    assert prepared.test is not None
    ours, theirs = prepared.train.meta, prepared.test.meta
    overlaps = [
        ((ours.recording == r) & (ours.start < stop) & (start < ours.stop)).any()
        for r, start, stop in zip(theirs.recording, theirs.start, theirs.stop)
    ]
    assert np.mean(overlaps) > 0.9


@pytest.mark.parametrize("split", ["subject", "session", "trial", "blocked"])
def test_no_other_split_shares_a_sample(split: str) -> None:
    prepared = prepare(config(split=split, stride=1.0, train_stride=0.5, val=0.3), corpus(seconds=50.0), 1)
    sets = [prepared.train, prepared.val, prepared.test]
    for i, one in enumerate(sets):
        for other in sets[i + 1 :]:
            assert one is not None
            assert other is not None
            for r, start, stop in zip(other.meta.recording, other.meta.start, other.meta.stop):
                m = one.meta
                assert not ((m.recording == r) & (m.start < stop - 1e-9) & (start < m.stop - 1e-9)).any()


# -- state ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("args", [*SETTINGS, {"split": "random", "scale": "subject"}])
def test_state_gives_the_same_windows_again(args: dict[str, Any]) -> None:
    data, options = corpus(seconds=30.0), config(**args)
    first = prepare(options, data, 1)
    again = prepare(options, data, 1, json.loads(json.dumps(first.state)))
    for part in ("val", "test"):
        assert same(tensors(first, part), tensors(again, part))
    assert again.protocol == first.protocol


def test_other_data_is_all_test_under_the_statistics_of_training() -> None:
    first = prepare(config(), corpus(), 0)
    other = prepare(config(), corpus(subjects=2, seed=5), 0, first.state)
    assert other.train is None
    assert other.val is None
    assert len(other.test or ()) == 2 * 2 * 9
    assert "not trained on" in other.protocol
    mean, std = (torch.tensor(v, dtype=torch.float64) for v in first.state["scaler"]["known"][""])
    plain = prepare(
        config(scale="none"), corpus(subjects=2, seed=5), 0, {**first.state, "scaler": {"kind": "none", "known": {}}}
    )
    torch.testing.assert_close(
        tensors(other, "test")["x"], ((tensors(plain, "test")["x"].double() - mean) / std).float(), atol=1e-5, rtol=1e-5
    )
    wrong = dataclasses.replace(corpus(subjects=2), classes=["left", "right"])
    with pytest.raises(UserError, match="trained on rest, work"):
        prepare(config(), wrong, 0, first.state)


@pytest.mark.parametrize("scale", ["global", "subject", "none"])
@pytest.mark.parametrize("features", ["bde", "raw"])
def test_encode_gives_what_the_test_part_had(scale: str, features: str) -> None:
    data, options = corpus(), config(scale=scale, features=features)
    prepared = prepare(options, data, 0)
    assert prepared.test is not None
    chosen = [data.recordings[i] for i in dict.fromkeys(prepared.test.meta.recording.tolist())]
    unknown = [dataclasses.replace(r, label=-1, channels=r.channels[::-1], data=r.data[::-1].copy()) for r in chosen]
    windows, notes = encode(unknown, options, prepared.state)
    torch.testing.assert_close(windows.values(torch.arange(len(windows))), tensors(prepared, "test")["x"])
    assert (windows.y == -1).all()
    assert notes == []
    few, notes = encode(
        [dataclasses.replace(unknown[0], data=unknown[0].data[:, :900])], options, prepared.state, stride=3
    )
    assert len(few) == 2
    assert few.meta.start.tolist() == [0.0, 3.0]
    assert bool(notes) == (scale == "subject")


def test_encode_refuses_in_a_sentence_and_tells_what_it_left_out() -> None:
    prepared = prepare(config(), corpus(), 0)
    one = corpus().recordings[0]
    short = dataclasses.replace(one, data=one.data[:, :300], source="short.edf")
    with pytest.raises(UserError, match=r"short\.edf: no window can be cut: it lasts 2\.34375 s and a window 4 s"):
        encode([short], config(), prepared.state)
    hole = dataclasses.replace(one, data=one.data.copy(), source="hole.edf")
    hole.data[0, 100] = np.nan
    assert encode([hole], config(), prepared.state)[1] == ["1 windows left out: they hold samples that are no numbers"]
    hole.data[0] = np.nan
    with pytest.raises(UserError, match=r"hole\.edf: no window can be cut: all 9 windows hold"):
        encode([hole], config(), prepared.state)
    lacking = dataclasses.replace(one, channels=["Fp1", "F3", "C3", "P3", "Oz"])
    with pytest.raises(UserError, match="lacks the electrode O1"):
        encode([lacking], config(), prepared.state)
    windows, notes = encode([lacking], config(), prepared.state, interpolate=True)
    assert len(windows) == 9
    assert "O1" in notes[0]


# -- refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("args", "says"),
    [
        ({"window": 30.0}, "no training window is left: the longest recording lasts 20 s"),
        ({"split": "blocked", "folds": 6}, "leave stretches of 3.33 s"),
        (
            {"split": "blocked", "folds": 3, "gap": 1.0},
            "no validation window is left.*raise data_args.val or set it to 0",
        ),
        ({"window": 0.0}, "above 0"),
        ({"stride": -1.0}, "above 0"),
        ({"window": 0.001}, "shorter than the samples"),
        ({"keep": 0.0}, "keep is 0"),
        ({"balance": "smote", "features": "raw"}, "weights works for raw"),
        ({"bands": "high:40-70"}, "half the sampling rate"),
        ({"fold": 3}, "there are 3 folds"),
        ({"band_order": 0}, "at least 1"),
    ],
)
def test_what_cannot_be_is_refused_in_a_sentence(args: dict[str, Any], says: str) -> None:
    with pytest.raises(UserError, match=says):
        prepare(config(**args), corpus())


def test_the_seed_chooses_the_fold_unless_it_is_named() -> None:
    assert [prepare(config(), corpus(), seed=seed).fold for seed in range(4)] == [0, 1, 2, 0]
    assert prepare(config(fold=2), corpus(), seed=0).fold == 2
    assert prepare(config(folds=0), corpus(), seed=5).fold == 5


def test_features_are_computed_once() -> None:
    data = corpus()
    prepare(config(), data, 0)
    kept = list(pipeline._cache)
    prepare(config(), data, 1)
    assert list(pipeline._cache) == kept
    data.recordings[0].data[0, 0] += 1
    prepare(config(), data, 1)
    assert len(pipeline._cache) == len(kept) + 1


# -- real data --------------------------------------------------------------------------------------------------------


@pytest.mark.data
@pytest.mark.skipif(not EEGMAT.is_dir(), reason=f"no {EEGMAT}: set ATTN_DATA")
def test_on_eegmat_random_windows_fool_a_nearest_neighbour_and_subjects_do_not() -> None:
    from attn_eeg.data.corpus import load_corpus

    options = {
        "random": EegDataConfig(split="random", folds=5, shuffle=23, stride=0.9140625, val=0.0, normalize="array"),
        "subject": EegDataConfig(val=0.0, normalize="array"),
        "own": EegDataConfig(val=0.0, normalize="array", scale="subject"),
    }
    data = load_corpus("eegmat", options["subject"])
    found: dict[str, list[float]] = {}
    for name, args in options.items():
        for fold in range(1 if name == "random" else 6):
            prepared = prepare(args, data, fold)
            assert prepared.train is not None
            assert prepared.test is not None
            (x, y), (tx, ty) = prepared.train.arrays(), prepared.test.arrays()
            for kind, rule in (("1-NN", KNeighborsClassifier(1)), ("LDA", LinearDiscriminantAnalysis())):
                found.setdefault(f"{kind} {name}", []).append(rule.fit(x, y).score(tx, ty))
    mean = {name: float(np.mean(values)) for name, values in found.items()}
    assert mean["1-NN random"] >= 0.99
    assert mean["1-NN subject"] <= 0.65
    assert 0.58 <= mean["LDA subject"] <= 0.72
    assert mean["LDA own"] >= mean["LDA subject"] + 0.08
