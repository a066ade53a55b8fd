"""What training and test share, for every split; counts, determinism, and the sentences of refusal."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
from sklearn.model_selection import KFold

from attn_eeg.data.options import EegDataConfig
from attn_eeg.data.splits import blocks, deal, group_of, leaks, split
from attn_eeg.data.windows import Meta
from attn_shared.errors import UserError


def meta(subjects: int = 12, sessions: int = 2, trials: int = 3, windows: int = 5, label: Any = None) -> Meta:
    """One row a window; the label follows from the trial unless `label(subject, session, trial)` says otherwise."""
    rows = []
    for s in range(subjects):
        for e in range(sessions):
            for t in range(trials):
                number = (s * sessions + e) * trials + t
                value = (t + e) % 2 if label is None else label(s, e, t)
                rows += [(f"s{s:02}", f"{e}", f"{t}", number, 4.0 * w, 4.0 * w + 4, 4.0 * windows, value)
                         for w in range(windows)]  # fmt: skip
    columns = [np.array(column) for column in zip(*rows)]
    names = ("subject", "session", "trial", "recording", "start", "stop", "duration", "label")
    return Meta(**dict(zip(names, columns)))


def args(**more: Any) -> EegDataConfig:
    return EegDataConfig(**{"folds": 4, **more})


def keys(m: Meta, index: np.ndarray, kind: str) -> set[int]:
    return set(group_of(m, kind)[index].tolist())


@pytest.mark.parametrize("kind", ["subject", "session", "trial"])
@pytest.mark.parametrize("folds", [0, 2, 5])
def test_groups_stand_on_one_side_and_every_window_is_tested_once(kind: str, folds: int) -> None:
    m = meta(subjects=7)
    options = args(split=kind, folds=folds)
    tested = []
    for fold in range(folds or len(set(group_of(m, kind)))):
        train, val, test = split(m, options, fold)
        sides = [keys(m, part, kind) for part in (train, val, test)]
        assert all(sides)
        assert len(set.union(*sides)) == sum(map(len, sides))
        assert sorted(np.concatenate([train, val, test])) == list(range(len(m)))
        tested.append(test)
    assert sorted(np.concatenate(tested)) == list(range(len(m)))


def test_session_split_may_share_subjects_and_trial_split_sessions() -> None:
    m = meta()
    train, _, test = split(m, args(split="session"), 0)
    assert keys(m, train, "subject") & keys(m, test, "subject")
    train, _, test = split(m, args(split="trial"), 0)
    assert keys(m, train, "session") & keys(m, test, "session")


def test_sessions_of_one_name_belong_to_their_subjects() -> None:
    m = meta(subjects=3, sessions=2, trials=1)
    assert len(set(group_of(m, "session"))) == 6
    assert len(set(group_of(m, "trial"))) == 6


def test_leave_one_out_takes_subjects_in_order_of_name() -> None:
    m = meta(subjects=5)
    for fold in range(5):
        assert set(m.subject[split(m, args(folds=0), fold)[2]]) == {f"s{fold:02}"}


def test_classes_and_sizes_are_even_over_folds() -> None:
    # A third of the subjects is of class 1: each of four folds gets one of four.
    m = meta(subjects=12, sessions=1, trials=1, label=lambda s, e, t: int(s % 3 == 0))
    for shuffle in range(5):
        for fold in range(4):
            test = split(m, args(shuffle=shuffle), fold)[2]
            assert len(set(m.subject[test])) == 3
            assert len(set(m.subject[test][m.label[test] == 1])) == 1


def test_validation_is_even_too_and_as_large_as_asked() -> None:
    m = meta(subjects=24, sessions=1, trials=1, label=lambda s, e, t: s % 2)
    train, val, _ = split(m, args(val=0.33), 1)
    assert len(set(m.subject[val])) == 6
    assert abs(m.label[val].mean() - 0.5) < 1e-9
    assert abs(m.label[train].mean() - 0.5) < 1e-9
    train, val, _ = split(m, args(val=0.0), 1)
    assert not len(val)


def test_shuffle_decides_the_folds_and_nothing_else_does() -> None:
    m = meta(subjects=24)
    same = [split(m, args(shuffle=3), 1)[2] for _ in range(2)]
    np.testing.assert_array_equal(*same)
    assert len({tuple(split(m, args(shuffle=shuffle), 1)[2]) for shuffle in range(6)}) > 1


def test_deal_fills_bins_by_their_shares() -> None:
    groups = np.repeat(np.arange(100), 3)
    bins = deal(groups, np.zeros(300, int), [0.7, 0.2, 0.1], np.random.default_rng(0))
    assert np.bincount(bins).tolist() == [70, 20, 10]


def test_random_split_is_the_papers() -> None:
    m = meta()
    theirs = list(KFold(5, shuffle=True, random_state=23).split(np.zeros(len(m))))
    for fold, (train, test) in enumerate(theirs):
        ours = split(m, args(split="random", folds=5, shuffle=23, val=0.0), fold)
        np.testing.assert_array_equal(ours[0], train)
        np.testing.assert_array_equal(ours[2], test)
    train, val, test = split(m, args(split="random", folds=5, val=0.25), 0)
    assert sorted(np.concatenate([train, val, test])) == list(range(len(m)))
    assert len(val) == round(0.25 * (len(train) + len(val)))


class TestBlocks:
    @pytest.mark.parametrize("fold", range(5))
    @pytest.mark.parametrize("gap", [0.0, 3.0])
    @pytest.mark.parametrize("val", [0.0, 0.25])
    def test_parts_lie_apart(self, fold: int, gap: float, val: float) -> None:
        found = blocks(100.0, args(split="blocked", folds=5, gap=gap, val=val), fold)
        assert next(s for s in found if s.part == "test").stop == pytest.approx(20.0 * (fold + 1))
        for one, following in itertools.pairwise(found):
            assert following.start - one.stop >= gap - 1e-9
        length = {part: sum(s.stop - s.start for s in found if s.part == part) for part in ("train", "val", "test")}
        sides = 2 if 0 < fold < 4 else 1
        assert length["test"] == pytest.approx(20.0)
        assert length["val"] == pytest.approx(val * (80 - sides * gap))
        assert length["train"] == pytest.approx((1 - val) * (80 - sides * gap) - (gap if val else 0.0))

    def test_windows_lie_within_their_stretch(self) -> None:
        m = meta(windows=25)
        options = args(split="blocked", folds=5, gap=4.0)
        for fold in range(5):
            parts = split(m, options, fold)
            assert len(parts[2]) == 5 * len(set(m.recording))
            for index, name in zip(parts, ("train", "val", "test")):
                for i in index[:50]:
                    own = [s for s in blocks(m.duration[i], options, fold) if s.part == name]
                    assert any(s.start - 1e-6 <= m.start[i] and m.stop[i] <= s.stop + 1e-6 for s in own)

    def test_a_gap_longer_than_the_rest_leaves_no_training(self) -> None:
        assert {s.part for s in blocks(10.0, args(split="blocked", gap=50.0), 0)} == {"test"}


def test_warnings() -> None:
    assert "random split" in leaks(args(split="random", stride=1.0))
    assert "overlap by 75%" in leaks(args(split="random", stride=1.0))
    assert "overlap" not in leaks(args(split="random"))
    for level, leaking in (("subject", {"trial", "session"}), ("session", {"trial"}), ("", set())):
        for how in ("subject", "session", "trial"):
            assert bool(leaks(args(split=how), constant=True, one_label=level)) == (how in leaking)
    assert leaks(args(split="blocked"), constant=True)
    for kind in ("subject", "session", "trial", "blocked"):
        assert leaks(args(split=kind)) == ""


@pytest.mark.parametrize(
    ("options", "fold", "says"),
    [
        ({"folds": 13}, 0, "12 subjects cannot be parted into 13 folds; set data_args.folds to at most 12"),
        ({"folds": 4}, 4, "there are 4 folds"),
        ({"folds": 0}, 12, "there are 12 folds"),
        ({"folds": 1}, 0, "at least 2"),
        ({"folds": 0, "split": "random"}, 0, "at least 2"),
        ({"split": "person"}, 0, "there are: subject"),
        ({"val": 1.0}, 0, "below 1"),
        ({"gap": -1.0}, 0, "negative"),
        ({"split": "random", "train_stride": 1.0}, 0, "train_stride cannot differ"),
        ({"split": "random", "folds": 10_000}, 0, "cannot be parted"),
    ],
)
def test_what_cannot_be_is_refused_in_a_sentence(options: dict[str, Any], fold: int, says: str) -> None:
    with pytest.raises(UserError, match=says):
        split(meta(), args(**options), fold)


def test_too_few_subjects() -> None:
    with pytest.raises(UserError, match=r"set data_args\.val to 0"):
        split(meta(subjects=2), args(folds=2), 0)
    train, val, test = split(meta(subjects=2), args(folds=2, val=0.0), 0)
    assert len(train) == len(test)
    assert not len(val)
    with pytest.raises(UserError, match=r"choose another data_args\.split"):
        split(meta(subjects=1), args(folds=0), 0)
    for fold in range(3):  # three large groups: validation still gets one, and training keeps one
        train, val, test = split(meta(subjects=3), args(folds=3), fold)
        assert len(train) == len(val) == len(test)
