"""Folders and tables of speech: which file is whose, in which part."""

from __future__ import annotations

import csv
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from attn_shared.errors import UserError
from attn_speech.audio import write
from attn_speech.data.bundle import load_bundle, load_corpus
from attn_speech.data.cards import DATASETS
from attn_speech.data.check import check_file
from attn_speech.data.corpus import Corpus
from attn_speech.data.folders import part_of
from attn_speech.data.options import SpeechDataConfig
from attn_speech.data.readers import read_any

ARGS = SpeechDataConfig()


def noise(seed: int, seconds: float = 0.4, rate: int = 8000) -> np.ndarray:
    return np.random.default_rng(seed).uniform(-0.4, 0.4, round(seconds * rate)).astype(np.float32)


def sound(path: Path, seed: int = 0, seconds: float = 0.4, rate: int = 8000) -> Path:
    return write(path, noise(seed, seconds, rate), rate)


def table(path: Path, rows: list[dict[str, str]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return path


def speakers(corpus: Corpus) -> dict[str, set[str]]:
    return {part: {one.speaker for one in ones} for part, ones in corpus.utterances.items()}


def mixture_folder(root: Path, names: list[str], sources: int = 2) -> None:
    for seed, name in enumerate(names):
        voices = [noise(seed * 10 + i) for i in range(sources)]
        for i, voice in enumerate(voices, 1):
            write(root / f"s{i}" / f"{name}.wav", voice, 8000)
        write(root / "mix" / f"{name}.wav", np.sum(voices, axis=0) / sources, 8000)


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("tr", "train"),
        ("train-clean-100", "train"),
        ("cv", "val"),
        ("dev_other", "val"),
        ("tt", "test"),
        ("TEST", "test"),
        ("trees", None),
        ("testimony", None),
        ("1034", None),
    ],
)
def test_names_of_parts(name: str, part: str | None) -> None:
    assert part_of(name) == part


def test_a_folder_for_each_speaker(tmp_path: Path) -> None:
    for number in range(20):
        sound(tmp_path / f"speaker{number:02d}" / "a.wav", number)
        sound(tmp_path / f"speaker{number:02d}" / "session" / "b.flac", number, rate=16000)
    (tmp_path / ".hidden").mkdir()
    sound(tmp_path / ".hidden" / "x.wav")
    found = read_any(tmp_path, SpeechDataConfig(val=0.2, test=0.1))
    sets = speakers(found)
    assert {part: len(names) for part, names in sets.items()} == {"train": 14, "val": 4, "test": 2}
    assert len(set.union(*sets.values())) == 20
    assert all(len(ones) == 2 * len(sets[part]) for part, ones in found.utterances.items())
    assert any("20 files of 16000 Hz are resampled" in note for note in found.notes)
    again = speakers(read_any(tmp_path, SpeechDataConfig(val=0.2, test=0.1)))
    assert again == sets
    assert speakers(read_any(tmp_path, SpeechDataConfig(val=0.2, test=0.1, shuffle=1))) != sets


def test_speakers_are_held_out_by_sex(tmp_path: Path) -> None:
    for number in range(40):
        sound(tmp_path / f"{number}" / "a.wav", number)
    table(
        tmp_path / "speakers.csv",
        [{"speaker": str(n), "sex": "female" if n % 4 == 0 else "M"} for n in range(40)],
    )
    found = read_any(tmp_path, SpeechDataConfig(val=0.2, test=0.2))
    for part, women in {"train": 6, "val": 2, "test": 2}.items():
        sexes = [one.sex for one in found.utterances[part]]  # type: ignore[index]
        assert set(sexes) == {"F", "M"}
        assert abs(sexes.count("F") - women) <= 1


def test_folders_of_parts_are_kept(tmp_path: Path) -> None:
    for part, names in {"train": "abcd", "dev": "ef", "test": "gh", "notes": "i"}.items():
        for name in names:
            sound(tmp_path / part / name / "1.wav")
    found = read_any(tmp_path, ARGS)
    assert speakers(found) == {"train": set("abcd"), "val": set("ef"), "test": set("gh")}
    assert any("left out: notes" in note for note in found.notes)


def test_a_speaker_may_be_called_val(tmp_path: Path) -> None:
    for name in ("Ann", "Ben", "Cid", "Val", "Eve", "Tom", "Una"):
        sound(tmp_path / name / "1.wav")
    assert set.union(*speakers(read_any(tmp_path, ARGS)).values()) == {"Ann", "Ben", "Cid", "Val", "Eve", "Tom", "Una"}


def test_speakers_may_be_called_like_the_folders_of_a_mixture(tmp_path: Path) -> None:
    for part, names in {"train": ("s0", "s1", "s2"), "val": ("s4", "s5"), "test": ("s6", "s7")}.items():
        for name in names:
            sound(tmp_path / part / name / "1.wav")
    assert speakers(read_any(tmp_path, ARGS))["train"] == {"s0", "s1", "s2"}
    for name in ("s1", "s2", "s3"):
        sound(tmp_path / "alike" / name / f"{name}.wav")
    assert read_any(tmp_path / "alike", SpeechDataConfig(test=1.0)).mixtures == {}


def test_librispeech_as_it_is_unpacked(tmp_path: Path) -> None:
    people = {
        "train-clean-100": ("103", "1034"),
        "dev-clean": ("84",),
        "dev-other": ("116",),
        "test-clean": ("61", "121"),
    }
    for part, names in people.items():
        for name in names:
            sound(tmp_path / part / name / "77" / f"{name}-77-0000.flac")
    lines = "; comment\n103  | F | train-clean-100    | 25.19 | Somebody\n1034 | M | train-clean-100 | 25 | Nobody\n"
    (tmp_path / "SPEAKERS.TXT").write_text(lines)
    found = read_any(tmp_path, ARGS)
    assert speakers(found) == {"train": {"103", "1034"}, "val": {"84", "116"}, "test": {"61", "121"}}
    assert sorted(one.sex for one in found.utterances["train"]) == ["F", "M"]
    inner = read_any(tmp_path / "train-clean-100", SpeechDataConfig(val=0, test=0))
    assert sorted(one.sex for one in inner.utterances["train"]) == ["F", "M"]


def test_names_like_librispeechs_tell_the_speaker(tmp_path: Path) -> None:
    for name in ("19-198-0001", "19-198-0002", "26-495-0000"):
        sound(tmp_path / f"{name}.flac")
    assert speakers(read_any(tmp_path, SpeechDataConfig(val=0, test=0))) == {"train": {"19", "26"}}
    sound(tmp_path / "hello.wav")
    write(tmp_path / "other.wav", np.zeros(8000, dtype=np.float32), 8000)
    with pytest.raises(UserError, match=r"hello\.wav \(and 1 more\): whose voice is this"):
        read_any(tmp_path, ARGS)


def test_a_table_of_utterances(tmp_path: Path) -> None:
    rows = []
    for number, (part, sex) in enumerate([("train", "f"), ("tr", "Male"), ("val", ""), ("val", "F"), ("test", "m")]):
        sound(tmp_path / "wav" / f"{number}.wav", number)
        rows.append({"file": f"wav/{number}.wav", "speaker": f"s{number}", "sex": sex, "split": part})
    found = read_any(table(tmp_path / "list.csv", rows), ARGS)
    assert speakers(found) == {"train": {"s0", "s1"}, "val": {"s2", "s3"}, "test": {"s4"}}
    assert [one.sex for one in found.utterances["train"]] == ["F", "M"]
    assert read_any(table(tmp_path / "utterances.csv", rows).parent, ARGS).utterances == found.utterances


def wrong_tables(folder: Path) -> dict[str, Path]:
    for number in range(4):
        sound(folder / f"{number}.wav", number)
    rows = [{"file": f"{n}.wav", "speaker": f"s{n % 3}", "split": "train"} for n in range(4)]
    return {
        "speaker s0 is in the parts train and test": table(
            folder / "a.csv", [rows[0], {**rows[3], "split": "test"}, *rows[1:3]]
        ),
        "line 3: split is train, val or test, got 'trane'": table(
            folder / "b.csv", [rows[0], {**rows[1], "split": "trane"}]
        ),
        "no such file": table(folder / "c.csv", [*rows, {**rows[0], "file": "9.wav"}]),
        "line 2: speaker is empty": table(folder / "d.csv", [{**rows[0], "speaker": ""}, rows[1]]),
        "1 rows have no split": table(folder / "e.csv", [*rows[:3], {**rows[3], "split": ""}]),
        "needs the columns file and speaker": table(folder / "f.csv", [{"path": "0.wav", "who": "s0"}]),
        "has no rows": write_text(folder / "g.csv", "file,speaker\n"),
    }


def write_text(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def test_wrong_tables_are_told_in_one_sentence(tmp_path: Path) -> None:
    for text, path in wrong_tables(tmp_path).items():
        with pytest.raises(UserError, match=text):
            read_any(path, ARGS)
        assert any(text in problem for problem in check_file(path)), (text, check_file(path))


@pytest.mark.parametrize("steps", ["", "2speakers/wav8k/min"])
def test_wsj0_mix(tmp_path: Path, steps: str) -> None:
    for part in ("tr", "cv", "tt"):
        mixture_folder(tmp_path / steps / part, [f"01aa010k_1.3_02{part[0]}o031_-1.3", "050a0501_0.1_052a050r_-0.1"])
    if steps:
        mixture_folder(tmp_path / "3speakers/wav8k/min/tr", ["a"], sources=3)
        mixture_folder(tmp_path / "2speakers/wav8k/max/tr", ["b"])
    found = read_any(tmp_path, ARGS)
    assert {part: len(ones) for part, ones in found.mixtures.items()} == {"train": 2, "val": 2, "test": 2}
    assert found.mixtures["train"][0].speakers == ("01a", "02t")
    one = load_bundle(str(tmp_path), ARGS).test[1]  # type: ignore[index]
    assert one["sources"].shape == (2, 3200)
    assert (one["sources"].sum(0) / 2 - one["mixture"]).abs().max() < 2e-4


def test_three_voices_are_asked_for(tmp_path: Path) -> None:
    mixture_folder(tmp_path / "tt", ["a", "b"], sources=3)
    with pytest.raises(UserError, match=r"3 voices, not of 2; set --data_args.speakers 3"):
        load_bundle(str(tmp_path), ARGS)
    bundle = load_bundle(str(tmp_path), SpeechDataConfig(speakers=3))
    assert bundle.train is None
    assert bundle.test[0]["sources"].shape == (3, 3200)  # type: ignore[index]
    assert check_file(tmp_path) == []


def libri_mix(root: Path, made_at: str) -> Path:
    base = root / "wav8k" / "min"
    for part in ("train-100", "train-360", "dev", "test"):
        rows = []
        for number in range(2):
            name = f"4077-13754-000{number}_5142-33396-006{number}"
            voices = [noise(number), noise(number + 5)]
            for folder, samples in {"mix_clean": np.add(*voices), "s1": voices[0], "s2": voices[1]}.items():
                write(base / part / folder / f"{name}.wav", samples, 8000)
            there = f"{made_at}/wav8k/min/{part}"
            rows.append(
                {
                    "mixture_ID": name,
                    "mixture_path": f"{there}/mix_clean/{name}.wav",
                    "source_1_path": f"{there}/s1/{name}.wav",
                    "source_2_path": f"{there}/s2/{name}.wav",
                    "length": "3200",
                }
            )
        table(base / "metadata" / f"mixture_{part}_mix_clean.csv", rows)
    return base / "metadata"


def test_libri_mix(tmp_path: Path) -> None:
    metadata = libri_mix(tmp_path / "Libri2Mix", "/home/somebody/data/Libri2Mix")
    found = read_any(tmp_path, ARGS)
    assert found.name == "Libri2Mix"
    assert {part: len(ones) for part, ones in found.mixtures.items()} == {"train": 2, "val": 2, "test": 2}
    assert found.mixtures["val"][0].speakers == ("4077", "5142")
    assert "train-100" in str(found.mixtures["train"][0].mixture)
    named = read_any(metadata / "mixture_train-360_mix_clean.csv", ARGS)
    assert "train-360" in str(named.mixtures["train"][0].mixture)


def test_a_table_of_mixtures(tmp_path: Path) -> None:
    mixture_folder(tmp_path, ["a", "b", "c"])
    sound(tmp_path / "noise.wav", 99)
    rows = [
        {
            "mixture": f"mix/{n}.wav",
            "source_1": f"s1/{n}.wav",
            "source_2": f"s2/{n}.wav",
            "speaker_1": "x",
            "sex_1": "f",
            "speaker_2": "y",
            "sex_2": "m",
            "split": part,
        }
        for n, part in zip("abc", ("train", "val", "test"))
    ]
    found = read_any(table(tmp_path / "mixtures.csv", rows).parent, ARGS)
    assert found.mixtures["test"][0].name == "c"
    assert found.mixtures["test"][0].sexes == ("F", "M")
    assert found.mixtures["test"][0].speakers == ("x", "y")
    sums = [{"source_1": "s1/a.wav", "source_2": "s2/a.wav", "noise": "noise.wav", "split": "test", "name": "sum"}]
    bundle = load_bundle(str(table(tmp_path / "sums.csv", sums)), ARGS)
    assert bundle.test is not None
    one = bundle.test[0]
    rest = one["mixture"] - one["sources"].sum(0)
    assert abs(float(rest.std()) - 0.8 / np.sqrt(12)) < 0.01


def test_mixtures_without_parts_are_shared_out_and_say_so(tmp_path: Path) -> None:
    mixture_folder(tmp_path, [f"m{n:02d}" for n in range(20)])
    found = read_any(tmp_path, SpeechDataConfig(val=0.1, test=0.2))
    assert {part: len(ones) for part, ones in found.mixtures.items()} == {"train": 14, "val": 2, "test": 4}
    assert any("the same voice may be in two parts" in note for note in found.notes)


@pytest.mark.parametrize("names", [("mix", "s1", "s2"), ("mixture", "source1", "source2"), ("mix", "spk1", "spk2")])
def test_one_folder_of_mixtures_and_voices(tmp_path: Path, names: tuple[str, ...]) -> None:
    for item in ("item_0", "item_1"):
        for number, name in enumerate(names):
            sound(tmp_path / f"{item}_{name}.wav", number)
        sound(tmp_path / f"{item}_{names[1]}hat.wav", 7)
    found = read_any(tmp_path, SpeechDataConfig(test=1.0)).mixtures
    assert [one.name for one in found["test"]] == ["item_0", "item_1"]
    assert list(found) == ["test"]
    assert found["test"][1].mixture == tmp_path / f"item_1_{names[0]}.wav"
    assert found["test"][1].sources == tuple(tmp_path / f"item_1_{name}.wav" for name in names[1:])


def test_everything_may_be_for_test(tmp_path: Path) -> None:
    for name in "abcd":
        sound(tmp_path / name / "1.wav")
    found = read_any(tmp_path, SpeechDataConfig(test=1.0))
    assert speakers(found) == {"test": set("abcd")}
    assert found.notes == ["4 speakers held out for test"]


def test_voices_of_the_test_part_that_are_in_training_are_told(tmp_path: Path) -> None:
    for part, names in {"tr": "1_2", "tt": "2_3"}.items():
        first, second = names.split("_")
        mixture_folder(tmp_path / part, [f"{first}-1-1_{second}-1-1"])
    notes = read_any(tmp_path, ARGS).notes
    assert notes == ["1 of the 2 voices of the test part are in training too"]


def test_what_is_wrong_with_mixtures(tmp_path: Path) -> None:
    mixture_folder(tmp_path, ["good", "rate", "length", "lonely", "other"])
    sound(tmp_path / "s2" / "rate.wav", rate=16000)
    sound(tmp_path / "s1" / "length.wav", seconds=0.5)
    (tmp_path / "s1" / "lonely.wav").unlink()
    problems = check_file(tmp_path)
    assert len(problems) == 3
    for text in (
        "mixture rate: its files have different sampling rates (16000 Hz, 8000 Hz)",
        "mixture length: its files have different lengths, 3200 to 4000",
        "mix/lonely.wav has no s1/lonely.wav",
    ):
        assert any(text in problem for problem in problems), problems
    for name in ("rate", "length", "lonely"):
        for folder in ("mix", "s1", "s2"):
            (tmp_path / folder / f"{name}.wav").unlink(missing_ok=True)
    sound(tmp_path / "mix" / "other.wav", 1234)
    (problem,) = check_file(tmp_path)
    assert "mixture other: its voices make up" in problem


def test_what_is_wrong_with_voices(tmp_path: Path) -> None:
    for part, names in {"train": "abc", "val": "d", "test": "ef"}.items():
        for name in names:
            sound(tmp_path / part / name / "1.wav")
    sound(tmp_path / "train" / "a" / "short.wav", seconds=0.1)
    write(tmp_path / "train" / "a" / "silent.wav", np.zeros(8000, dtype=np.float32), 8000)
    write(tmp_path / "train" / "b" / "loud.wav", np.clip(30 * noise(3), -1, 1), 8000)
    write(tmp_path / "train" / "b" / "nan.wav", np.full(8000, np.nan, dtype=np.float32), 8000, subtype="FLOAT")
    (tmp_path / "test" / "e" / "text.wav").write_text("no sound " * 10)
    raw = sound(tmp_path / "test" / "e" / "cut.wav").read_bytes()
    (tmp_path / "test" / "e" / "cut.wav").write_bytes(raw[:2000])
    problems = check_file(tmp_path)
    for text in (
        "silent.wav is silent",
        "loud.wav is overdriven",
        "no finite numbers",
        "text.wav cannot be read",
        "cut.wav is cut short",
        "the val part has one speaker only (d)",
    ):
        assert sum(text in problem for problem in problems) == 1, (text, problems)
    assert len(problems) == 6
    assert check_file(tmp_path / "train" / "a" / "short.wav") == [
        f"{tmp_path}/train/a/short.wav lasts 0.100 s; speech shorter than 0.25 s is left out"
    ]
    assert check_file(tmp_path / "train" / "a" / "1.wav") == []


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda path: path / "missing", "there is no file or folder"),
        (lambda path: path, "holds no speech that can be read"),
        (lambda path: sound(path / "one.wav"), "is one file, and mixtures need several speakers"),
        (lambda path: sound(path / "who" / "one.wav").parents[1], "need as many speakers"),
    ],
)
def test_data_that_cannot_be_used(tmp_path: Path, make: Callable[[Path], Path], text: str) -> None:
    with pytest.raises(UserError, match=text):
        load_bundle(str(make(tmp_path)), ARGS)


def test_a_mistyped_name_is_answered_with_the_nearest() -> None:
    with pytest.raises(UserError, match="synthetic"):
        load_corpus("syntetic", ARGS)


@pytest.mark.parametrize("name", ["librispeech", "wsj0_mix", "librimix"])
def test_data_that_only_the_user_can_get(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ATTN_DATA", str(tmp_path))
    with pytest.raises(UserError, match=r"is not at .*ATTN_DATA/speech"):
        load_corpus(name, ARGS)
    if name == "wsj0_mix":
        mixture_folder(tmp_path / "speech/wsj0-mix/2speakers/wav8k/min/tt", ["a"])
    elif name == "librimix":
        libri_mix(tmp_path / "speech/LibriMix/Libri2Mix", "elsewhere")
    else:
        for speaker in ("1", "2"):
            sound(tmp_path / "speech/LibriSpeech/test-clean" / speaker / "3" / f"{speaker}-3-0.flac")
    assert load_bundle(name, ARGS).test is not None


def test_the_synthetic_set() -> None:
    corpus = load_corpus("synthetic", ARGS)
    sets = speakers(corpus)
    assert {part: len(names) for part, names in sets.items()} == {"train": 28, "val": 4, "test": 8}
    assert len(set.union(*sets.values())) == 40
    files = [one for ones in corpus.utterances.values() for one in ones]
    assert len(files) == 320
    assert {one.rate for one in files} == {8000}
    assert sum(one.path.stat().st_size for one in files) < 5_000_000
    assert "synthetic" in DATASETS["synthetic"].title.lower()
    assert any(note.startswith("synthetic") for note in corpus.notes)


@pytest.mark.data
def test_librispeech_mini() -> None:
    if not (Path(os.environ.get("ATTN_DATA", "data")) / "speech" / "librispeech_mini_8k").is_dir():
        pytest.skip("librispeech_mini_8k is not under ATTN_DATA")
    sets = speakers(load_corpus("librispeech_mini", ARGS))
    assert {part: len(names) for part, names in sets.items()} == {"train": 226, "val": 25, "test": 10}
    assert len(set.union(*sets.values())) == 261
