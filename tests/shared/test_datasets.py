"""datasets.py: what is found, what is missing, what is damaged, and what the user is told."""

from __future__ import annotations

import hashlib
import subprocess
import sys
from pathlib import Path

import pytest

from attn_shared import datasets
from attn_shared.app import App, DataCard, DataFile
from attn_shared.errors import UserError

ONE, TWO = b"first,file\n", b"second,file\n"


def card(**changes: object) -> DataCard:
    facts = {
        "name": "pair",
        "title": "A pair of files",
        "task": "forecasting",
        "licence": "CC0",
        "source": "example.org/pair",
        "size": "2 rows",
        "split": "first half, second half",
        "citation": "Nobody, Nothing, 2020",
        "subdir": "field",
        "files": (
            DataFile(path="one.csv", sha256=hashlib.sha256(ONE).hexdigest(), bytes=len(ONE), url="http://h/one.csv"),
            DataFile(path="two.csv", sha256=hashlib.sha256(TWO).hexdigest(), bytes=len(TWO), url="http://h/two.csv"),
        ),
        **changes,
    }
    return DataCard(**facts)  # type: ignore[arg-type]


def app(*cards: DataCard, **changes: object) -> App:
    facts = {
        "name": "toy",
        "package": "attn_toy",
        "title": "Toy",
        "models": {},
        "datasets": {c.name: c for c in cards},
        "data_config": dict,
        "default_model": "",
        "default_data": "",
        "task": "",
        **changes,
    }
    return App(**facts)  # type: ignore[arg-type]


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("ATTN_DATA", str(tmp_path))
    return tmp_path


def fill(root: Path, one: bytes = ONE, two: bytes = TWO) -> None:
    (root / "field").mkdir(exist_ok=True)
    (root / "field/one.csv").write_bytes(one)
    (root / "field/two.csv").write_bytes(two)


def test_root_follows_environment(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert datasets.data_root() == root
    for value in ("", None):
        monkeypatch.setenv("ATTN_DATA", value) if value is not None else monkeypatch.delenv("ATTN_DATA")
        assert datasets.data_root() == Path("data")


def test_locate(root: Path) -> None:
    with pytest.raises(UserError) as caught:
        datasets.locate(card())
    message = str(caught.value)
    for file in ("one.csv", "two.csv"):  # what, from where, where to
        assert f"download http://h/{file} to {root}/field/{file}" in message
    assert "data fetch pair" in message
    fill(root)
    assert datasets.locate(card()) == root / "field"
    (root / "field/one.csv").write_bytes(ONE[:-1])
    with pytest.raises(UserError, match=r"one\.csv has 10 bytes where the original has 11.*move it away"):
        datasets.locate(card())


def test_locate_names_by_hand_steps(root: Path) -> None:
    by_hand = card(files=(DataFile(path="x.csv"),), manual="ask the authors for x.csv")
    with pytest.raises(UserError, match=r"ask the authors for x\.csv, so that there is .*/field/x\.csv") as caught:
        datasets.locate(by_hand)
    assert "data fetch" not in str(caught.value)


def test_unset_variable_is_mentioned(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("ATTN_DATA", raising=False)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="name the folder that holds your data in ATTN_DATA"):
        datasets.locate(card())


def test_verify(root: Path) -> None:
    (sentence,) = datasets.verify(card())  # one sentence, however many files
    assert sentence.startswith(f"data set 'pair' is not under {root}: download ")
    fill(root)
    assert datasets.verify(card()) == []
    (root / "field/two.csv").unlink()
    (sentence,) = datasets.verify(card())
    assert sentence.startswith(f"a file of data set 'pair' is not under {root}: download http://h/two.csv to ")
    by_hand = card(files=(DataFile(path="x.csv"),), manual="ask the authors for x.csv")
    (sentence,) = datasets.verify(by_hand)
    assert "ask the authors for x.csv, so that there is" in sentence
    assert "checksum" not in sentence
    fill(root, one=ONE.replace(b"f", b"F"), two=TWO + b"!")
    first, second = datasets.verify(card())
    assert "one.csv differs from the original: SHA-256" in first
    assert "two.csv has 13 bytes where the original has 12" in second


def test_fetch_gets_only_what_is_missing(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def fake(url: str, target: Path, *, checksum: str, size: int) -> Path:
        asked.append((url, checksum, size))
        target.write_bytes(TWO)
        return target

    monkeypatch.setattr(datasets, "download", fake)
    fill(root)
    (root / "field/two.csv").unlink()
    assert datasets.fetch(card()) == root / "field"
    assert asked == [("http://h/two.csv", hashlib.sha256(TWO).hexdigest(), len(TWO))]
    datasets.fetch(card())
    assert len(asked) == 1


def test_fetch_never_overwrites(root: Path) -> None:
    changed = ONE.replace(b"f", b"F")
    fill(root, one=changed)
    with pytest.raises(UserError, match=r"one\.csv differs from the original.*move it away and fetch again"):
        datasets.fetch(card())
    assert (root / "field/one.csv").read_bytes() == changed


def test_fetch_without_network_says_how_by_hand(root: Path) -> None:
    file = DataFile(path="one.csv", sha256="0" * 64, url="http://127.0.0.1:1/one.csv")
    original = datasets.download

    def impatient(url: str, target: Path, **options: object) -> Path:
        return original(url, target, **{**options, "pause": 0.0, "attempts": 1})  # type: ignore[arg-type]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets, "download", impatient)
        with pytest.raises(UserError) as caught:
            datasets.fetch(card(files=(file,)))
    assert "refuses the connection" in str(caught.value)
    assert f"By hand: download http://127.0.0.1:1/one.csv to {root}/field/one.csv" in str(caught.value)


def test_fetch_by_hand(root: Path) -> None:
    with pytest.raises(UserError, match=r"must be got by hand: get it from example\.org/pair, so that there is"):
        datasets.fetch(card(files=(DataFile(path="x.csv"),)))


def test_list(root: Path) -> None:
    fill(root)
    cards = (
        card(),
        card(name="made", synthetic=True, files=()),
        card(name="inside", embedded=True, files=()),
        card(name="far", files=(DataFile(path="far.csv", url="http://h/far.csv"),)),
        card(name="asked", files=(DataFile(path="asked.csv"),)),
        card(name="half", files=(DataFile(path="one.csv"), DataFile(path="none.csv", url="http://h/none.csv"))),
        card(name="bad", files=(DataFile(path="one.csv", bytes=3),)),
    )
    text = datasets.list_data(app(*cards, file_formats="CSV with a header."))
    states = {line.split()[0]: line for line in text.splitlines() if line}
    for name, state in {
        "pair": "here",
        "made": "synthetic",
        "inside": "built in",
        "far": "can be fetched",
        "asked": "by hand",
        "half": "1/2 files",
        "bad": "damaged",
    }.items():
        assert state in states[name], name
    assert str(root) in text
    assert "CSV with a header." in text


def test_describe_names_licence_and_citation(root: Path) -> None:
    text = datasets.describe(card(facts={"Step": "1 hour"}))
    for part in ("CC0", "Nobody, Nothing, 2020", "first half, second half", "1 hour", str(root / "field")):
        assert part in text


def refuse(path: Path) -> list[str]:
    if path.suffix == ".bad":
        raise UserError(f"{path} is bad")
    return [] if path.read_text(encoding="utf-8") == "good" else [f"{path} line 1: not good"]


def test_check(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    toy = app(card(), check_file="somewhere:refuse", file_suffixes=(".csv",))
    monkeypatch.setattr(datasets, "load", {"somewhere:refuse": refuse}.__getitem__)
    fill(root)
    assert datasets.check(toy, "pair") == []
    with pytest.raises(UserError, match="did you mean 'pair'"):
        datasets.check(toy, "pear")
    with pytest.raises(UserError, match=r"there is no file pear\.csv"):
        datasets.check(toy, "pear.csv")
    for name, content, expected in (("a.csv", "good", 0), ("b.csv", "evil", 1), ("c.bad", "", 1)):
        (root / name).write_text(content)
        assert len(datasets.check(toy, str(root / name))) == expected
    with pytest.raises(UserError, match="takes no files"):
        datasets.check(app(card()), str(root / "a.csv"))


def test_no_torch() -> None:
    code = "import sys, attn_shared.datasets; sys.exit('torch' in sys.modules or 'numpy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
