"""The audit: what it flags, what it lets pass, and the figures it prints on real data."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from attn_eeg.audit import PAPER_STRIDE, audit
from attn_eeg.cli import main
from attn_eeg.data.options import EegDataConfig
from attn_shared.errors import UserError


def own_data(folder: Path, label: str, trials: int = 3) -> str:
    """Six subjects; the label belongs to the subject, to the trial, or changes with each trial of a session."""
    draw = np.random.default_rng(0)
    rows = ["file,subject,trial,label"]
    for subject in range(6):
        for trial in range(trials):
            name = f"s{subject}t{trial}.npz"
            data = 10 * draw.normal(size=(4, 128 * 12)) * draw.uniform(0.5, 2, (4, 1))
            np.savez(folder / name, data=data.astype(np.float32), sfreq=128.0, channels=["C3", "C4", "O1", "O2"])
            kind = subject % 2 if label == "subject" else (trial + subject) % 2
            rows.append(f"{name},{subject},{trial},{'ab'[kind]}")
    (folder / "recordings.csv").write_text("\n".join(rows) + "\n")
    return str(folder / "recordings.csv")


def test_the_random_split_is_flagged(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    output = str(tmp_path / "deep" / "a.json")
    assert main(["audit", "synthetic", "--data_args.normalize", "array", "--output", output]) == 0
    printed = capsys.readouterr().out
    assert "The random split LEAKS" in printed
    found = json.loads((tmp_path / "deep" / "a.json").read_text(encoding="utf-8"))
    assert found["leaks"] is True
    assert found["stride_s"] == PAPER_STRIDE
    assert found["chosen"]["accuracy"]["1-nn"]["mean"] > 0.99
    assert found["reference"]["accuracy"]["1-nn"]["mean"] < 0.65
    assert found["chosen"]["shared"] == pytest.approx(
        {"subject": 1, "session": 1, "recording": 1, "samples": 1}, abs=0.01
    )
    assert found["reference"]["shared"] == {"subject": 0, "session": 0, "recording": 0, "samples": 0}
    assert len(found["reference"]["accuracy"]["lda"]["folds"]) == 6


def test_the_split_by_subject_passes(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["audit", "synthetic", "--data_args.split", "subject"]) == 0
    printed = capsys.readouterr().out
    assert "The split by subject does not leak: no subject is on both sides." in printed
    assert "LEAKS" not in printed


def test_time_does_not_help_where_a_recording_has_one_label() -> None:
    found = audit("synthetic", EegDataConfig(split="blocked"))
    assert found["leaks"]
    assert "recognising the recording" in found["verdict"]
    assert found["chosen"]["shared"]["samples"] == 0


def test_trials_apart_leak_where_a_subject_has_one_label(tmp_path: Path) -> None:
    found = audit(own_data(tmp_path, "subject"), EegDataConfig(split="trial", folds=3))
    assert found["leaks"]
    assert "recognising the subject is knowing the label" in found["verdict"]


def test_trials_apart_pass_where_labels_change_within_subjects(tmp_path: Path) -> None:
    found = audit(own_data(tmp_path, "trial"), EegDataConfig(split="trial", folds=3))
    assert not found["leaks"]
    assert "its subjects are on both sides" in found["verdict"]


@pytest.mark.parametrize(
    ("argv", "sentence"),
    [
        (["audit"], "one data set"),
        (["audit", "nowhere"], "nowhere"),
        (["audit", "synthetic", "--data_args.features", "raw"], "band features"),
        (["audit", "synthetic", "--data_args.spilt", "subject"], "split"),
    ],
)
def test_errors_are_one_sentence(argv: list[str], sentence: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(argv) != 0
    captured = capsys.readouterr()
    assert sentence in captured.err
    assert len(captured.err.strip().splitlines()) == 1


def test_output_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    argv = ["audit", "synthetic", "--data_args.split", "subject", "--output", str(tmp_path / "file" / "a.json")]
    assert main(argv) != 0
    with pytest.raises(UserError):
        audit(str(tmp_path / "none.csv"), EegDataConfig())


@pytest.mark.data
def test_eegmat_is_the_field_in_small(eegmat: Path) -> None:
    found = audit("eegmat", EegDataConfig(split="random", stride=PAPER_STRIDE))
    assert found["leaks"]
    chosen, unseen = (found[side]["accuracy"]["1-nn"]["mean"] for side in ("chosen", "reference"))
    assert chosen >= 0.99
    assert unseen <= 0.60
