"""Parts by patient: none in two, folds that cover all, files that are saved and read."""

from __future__ import annotations

import json
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest

from attn_medseg.segment.corpus import Case, Corpus, Image, Part
from attn_medseg.segment.options import SegmentDataConfig
from attn_medseg.segment.splits import PARTS, folds_of, split
from attn_shared.errors import UserError


def nothing() -> Image:
    return Image(values=np.zeros((1, 4, 4), np.float32))


def corpus(patients: int = 20, each: int = 3, parts: dict[int, Part] | None = None) -> Corpus:
    cases = [
        Case(
            name=f"p{one:02d}_{scan}",
            patient=f"p{one:02d}",
            image=nothing,
            label=nothing,
            part=(parts or {}).get(one, ""),
        )
        for one in range(patients)
        for scan in range(each)
    ]
    return Corpus(cases=tuple(cases), structures=("a",), ndim=2, channels=1)


def patients(parts: dict[str, list[Case]]) -> dict[str, set[str]]:
    return {part: {case.patient for case in parts[part]} for part in PARTS}


def apart(parts: dict[str, list[Case]]) -> bool:
    return all(not one & other for one, other in combinations(patients(parts).values(), 2))


@pytest.mark.parametrize("shuffle", range(10))
def test_drawn_parts_keep_patients_together(shuffle: int) -> None:
    options = SegmentDataConfig(split="random", val=0.25, test=0.2, shuffle=shuffle)
    parts, how = split(corpus(), options)
    assert {part: len(found) for part, found in patients(parts).items()} == {"train": 12, "val": 4, "test": 4}
    assert apart(parts)
    assert sum(len(cases) for cases in parts.values()) == 60
    assert how == f"by patient, 20% drawn for test, 25% of the rest for validation (shuffle {shuffle})"
    assert split(corpus(), options)[0] == parts
    other = split(corpus(), SegmentDataConfig(split="random", val=0.25, test=0.2, shuffle=shuffle + 100))[0]
    assert patients(other)["test"] != patients(parts)["test"] or patients(other)["val"] != patients(parts)["val"]


def test_folds_test_every_patient_once() -> None:
    tested: list[str] = []
    for fold in range(5):
        parts, how = split(corpus(23), SegmentDataConfig(split="kfold", folds=5, fold=fold))
        assert apart(parts)
        assert all(parts.values())
        assert how.startswith(f"by patient, part {fold} of 5 for test")
        tested += sorted(patients(parts)["test"])
    assert sorted(tested) == sorted({case.patient for case in corpus(23).cases})
    sizes = [len(one) for one in folds_of([f"p{one}" for one in range(23)], 5, 0)]
    assert sorted(sizes) == [4, 4, 5, 5, 5]


def test_the_datas_own_parts() -> None:
    given = corpus(parts={0: "test", 1: "test", 2: "val"})
    parts, how = split(given, SegmentDataConfig())
    assert patients(parts)["test"] == {"p00", "p01"}
    assert patients(parts)["val"] == {"p02"}
    assert how == "the data's own parts"
    parts, how = split(corpus(parts={0: "test", 1: "test"}), SegmentDataConfig(val=0.25))
    assert patients(parts)["test"] == {"p00", "p01"}
    assert len(patients(parts)["val"]) == round(0.25 * 18)
    assert "25% of the training patients drawn for val" in how
    assert apart(parts)
    assert patients(split(given, SegmentDataConfig(split="random"))[0])["test"] != {"p00", "p01"}


def test_a_leak_in_the_datas_own_parts_is_refused() -> None:
    cases = list(corpus(4).cases)
    cases[0] = Case(name="p00_0", patient="p00", image=nothing, label=nothing, part="test")
    with pytest.raises(UserError, match="patient p00 would be in two parts: p00_0 in test, p00_1 in train"):
        split(Corpus(cases=tuple(cases), structures=("a",), ndim=2, channels=1), SegmentDataConfig())


def test_all_of_it_test() -> None:
    parts, how = split(corpus(), SegmentDataConfig(test=1))
    assert (len(parts["test"]), parts["train"], parts["val"], how) == (60, [], [], "all of it test")


def test_a_learning_curve_draws_training_patients() -> None:
    whole, some = (split(corpus(), SegmentDataConfig(max_train=count)) for count in (0, 3))
    assert len(patients(some[0])["train"]) == 3
    assert patients(some[0])["train"] < patients(whole[0])["train"]
    assert some[0]["test"] == whole[0]["test"]
    assert some[1].endswith("3 of 14 training patients drawn")


@pytest.mark.parametrize("kind", ["random", "kfold", "given"])
def test_files_are_written_and_read(tmp_path: Path, kind: str) -> None:
    file = tmp_path / "made" / "splits.json"
    data = corpus(parts={0: "test", 1: "val"} if kind == "given" else None)
    options = SegmentDataConfig(split=kind, splits=str(file), fold=1)  # type: ignore[arg-type]
    made, how = split(data, options)
    assert how.endswith("written to splits.json")
    told = json.loads(file.read_text(encoding="utf-8"))
    if kind == "kfold":
        assert sorted(one for fold in told["folds"] for one in fold) == sorted({case.patient for case in data.cases})
    else:
        assert {part: set(told[part]) for part in PARTS} == patients(made)
    read, how = split(data, options)
    assert read == made
    assert how.startswith("as splits.json says")
    # The file decides, whatever else is asked for.
    again = SegmentDataConfig(split="random", splits=str(file), fold=1, shuffle=0, test=0.5)
    assert patients(split(data, again)[0])["test"] == patients(made)["test"]
    assert not list(tmp_path.rglob("*.partial"))


def test_files_of_nnunet(tmp_path: Path) -> None:
    file = tmp_path / "splits_final.json"
    names = [case.name for case in corpus(4, 1).cases]
    file.write_text(json.dumps([{"train": names[1:], "val": names[:1]}, {"train": names[:3], "val": names[3:]}]))
    parts, how = split(corpus(4, 1), SegmentDataConfig(splits=str(file), fold=1, val=0))
    assert [case.name for case in parts["test"]] == ["p03_0"]
    assert len(parts["train"]) == 3
    assert how == "as splits_final.json says, part 1 of 2 for test"
    assert len(split(corpus(4, 1), SegmentDataConfig(splits=str(file), fold=1, val=0.3))[0]["val"]) == 1


@pytest.mark.parametrize(
    ("told", "sentence"),
    [
        ("{", "splits.json is no file of splits"),
        ("{}", 'it has neither "folds" nor "train", "val" and "test"'),
        ('{"train": ["p99"]}', "splits.json names p99, which is neither a case nor a patient"),
        ('{"train": ["p00_0"], "test": ["p00_1"]}', "patient p00 would be in two parts: p00_0 in train, p00_1 in test"),
        ('{"train": ["p00"], "test": ["p00"]}', "splits.json has p00_0 in two parts: train and test"),
        ('{"train": "p00"}', "splits.json: a part is a list of names"),
        ('[{"train": []}]', "is a list whose folds are no"),
        ('[{"train": ["p00"], "val": ["p01"]}]', "--data_args.fold 1: splits.json has 1 folds"),
    ],
)
def test_files_that_do_not_fit(tmp_path: Path, told: str, sentence: str) -> None:
    (tmp_path / "splits.json").write_text(told)
    fold = 1 if "--data_args.fold 1" in sentence else 0
    with pytest.raises(UserError) as error:
        split(corpus(), SegmentDataConfig(splits=str(tmp_path / "splits.json"), fold=fold))
    assert sentence in str(error.value)
    assert "\n" not in str(error.value)


def test_cases_that_a_file_leaves_out(tmp_path: Path) -> None:
    (tmp_path / "splits.json").write_text('{"train": ["p00", "p01"], "val": ["p02"], "test": ["p03"]}')
    parts, how = split(corpus(), SegmentDataConfig(splits=str(tmp_path / "splits.json")))
    assert {part: len(cases) for part, cases in parts.items()} == {"train": 6, "val": 3, "test": 3}
    assert how == "as splits.json says, 48 cases in no part"


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"val": 1.5}, "val is a share from 0 to 1"),
        ({"val": 0.5, "test": 0.5}, "leave nothing for training"),
        ({"folds": 1}, "folds must be 2 or more"),
        ({"fold": 5}, "fold is 0 to 4"),
        ({"max_train": -1}, "max_train must not be negative"),
        ({"split": "given"}, "has no parts of its own"),
        ({"split": "kfold", "folds": 30}, "20 patients are too few for 30 folds"),
    ],
)
def test_options_that_cannot_be(options: dict[str, object], sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        split(corpus(), SegmentDataConfig(**options))  # type: ignore[arg-type]
