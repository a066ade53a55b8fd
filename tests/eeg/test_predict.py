"""Recordings of one's own through a trained model."""

from __future__ import annotations

import csv
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from attn_eeg.cli import main
from attn_eeg.data.cards import DATASETS
from attn_eeg.data.options import EegDataConfig
from attn_eeg.data.synthetic import CHANNELS, load

Write = Callable[..., Path]


@pytest.fixture(scope="module")
def recording() -> np.ndarray:
    """(8, 60 s) microvolts of the synthetic data."""
    return load(DATASETS["synthetic"], EegDataConfig()).recordings[3].data.astype(np.float64)


@pytest.fixture(scope="module")
def sure(train: Callable[..., Path]) -> Path:
    """A run whose probabilities differ between windows and would differ with another order of electrodes."""
    return train("--model", "mlp", "--trainer.max_epochs", "20", "--optim.lr", "0.003", small=False)


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def shares(path: Path) -> np.ndarray:
    return np.array([float(row["p_state B"]) for row in rows(path)])


def test_times_probabilities_and_classes(
    trained: Path, recording: np.ndarray, tmp_path: Path, write_edf: Write
) -> None:
    file = write_edf(tmp_path / "one.edf", recording, list(CHANNELS))
    assert main(["predict", str(trained), str(file), "--output", str(tmp_path / "out")]) == 0
    found = rows(tmp_path / "out" / "one_classes.csv")
    assert list(found[0]) == ["start_s", "end_s", "p_state A", "p_state B", "predicted"]
    assert [float(row["start_s"]) for row in found] == [4.0 * i for i in range(15)]
    assert all(float(row["end_s"]) - float(row["start_s"]) == 4.0 for row in found)
    for row in found:
        a, b = float(row["p_state A"]), float(row["p_state B"])
        assert a + b == pytest.approx(1, abs=2e-6)
        assert row["predicted"] == ("state B" if b > a else "state A")


def test_ten_minutes_with_other_order_names_rate_and_more_electrodes(
    sure: Path, recording: np.ndarray, tmp_path: Path, write_edf: Write, capsys: pytest.CaptureFixture[str]
) -> None:
    from scipy.signal import resample_poly

    long = np.tile(recording, (1, 10))
    plain = write_edf(tmp_path / "plain.edf", long, list(CHANNELS))
    draw = np.random.default_rng(0)
    order = draw.permutation(len(CHANNELS))
    other = resample_poly(np.concatenate([long[order], 20 * draw.normal(size=(2, long.shape[1]))]), 125, 64, axis=1)
    names = [f"EEG {CHANNELS[i].upper()}-REF" for i in order] + ["EEG Cz-REF", "ECG"]
    write_edf(tmp_path / "other.edf", other, names, rate=250.0)
    wrong = write_edf(tmp_path / "wrong.edf", long[order], list(CHANNELS))
    files = [str(plain), str(tmp_path / "other.edf"), str(wrong)]
    argv = ["predict", str(sure), *files, "--output", str(tmp_path / "out")]
    assert main(argv) == 0
    said = capsys.readouterr().err
    assert "resampled from 250 to 128 Hz" in said
    assert "Cz" in said
    expected, found, mixed = (shares(tmp_path / "out" / f"{n}_classes.csv") for n in ("plain", "other", "wrong"))
    assert len(expected) == len(found) == 150
    # Resampling there and back moves the bands a little, a wrong order of electrodes moves them a lot.
    assert np.abs(expected - found).max() < 0.05
    assert np.abs(expected - mixed).max() > 0.2


def test_missing_electrodes(
    trained: Path, recording: np.ndarray, tmp_path: Path, write_edf: Write, capsys: pytest.CaptureFixture[str]
) -> None:
    file = write_edf(tmp_path / "few.edf", recording[1:], list(CHANNELS[1:]))
    argv = ["predict", str(trained), str(file), "--output", str(tmp_path / "out")]
    assert main(argv) != 0
    said = capsys.readouterr().err
    assert "lacks the electrode Fp1" in said
    assert "--interpolate" in said
    assert len(said.strip().splitlines()) == 1
    assert main([*argv, "--interpolate", "true"]) == 0
    assert "computed from their neighbours: Fp1" in capsys.readouterr().err
    assert len(rows(tmp_path / "out" / "few_classes.csv")) == 15
    file = write_edf(tmp_path / "fewer.edf", recording[4:], list(CHANNELS[4:]))
    assert main([*argv[:2], str(file), *argv[3:], "--interpolate", "true"]) != 0
    assert "too many" in capsys.readouterr().err


def test_bad_files_do_not_cost_the_others(
    trained: Path, recording: np.ndarray, tmp_path: Path, write_edf: Write, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    whole = write_edf(folder / "a.edf", recording, list(CHANNELS))
    (folder / "b.edf").write_bytes(whole.read_bytes()[: whole.stat().st_size // 2])
    (folder / "c.edf").write_bytes(b"")
    write_edf(folder / "d.edf", recording[:, : 2 * 128], list(CHANNELS))
    flat = recording.copy()
    flat[2] = 0.0
    write_edf(folder / "e.edf", flat, list(CHANNELS))
    gaps = recording.astype(np.float32)
    gaps[:, 1000:1010] = np.nan
    np.savez(folder / "f.npz", data=gaps, sfreq=128.0, channels=list(CHANNELS))
    assert main(["predict", str(trained), str(folder), "--output", str(tmp_path / "out")]) != 0
    said = capsys.readouterr().err
    assert "3 of 6 files could not be classified" in said
    assert "b.edf is cut short" in said
    assert "c.edf is empty" in said
    assert "lasts 2 s" in said
    assert "flat: C3" in said
    assert "Traceback" not in said
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "a_classes.csv",
        "e_classes.csv",
        "f_classes.csv",
    ]
    assert np.isfinite(shares(tmp_path / "out" / "e_classes.csv")).all()
    # Samples 1000 to 1009 lie in the second window only.
    assert [float(row["start_s"]) for row in rows(tmp_path / "out" / "f_classes.csv")][:3] == [0.0, 8.0, 12.0]


def test_volts_are_seen_and_converted(
    trained: Path, recording: np.ndarray, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, factor in (("micro", 1.0), ("volt", 1e-6)):
        np.savez(tmp_path / f"{name}.npz", data=recording * factor, sfreq=128.0, channels=list(CHANNELS))
    files = [str(tmp_path / f"{name}.npz") for name in ("micro", "volt")]
    assert main(["predict", str(trained), *files, "--output", str(tmp_path / "out")]) == 0
    assert "taken as volt" in capsys.readouterr().err
    assert shares(tmp_path / "out" / "volt_classes.csv") == pytest.approx(
        shares(tmp_path / "out" / "micro_classes.csv"), abs=1e-4
    )


def test_stride_and_two_of_one_name(
    trained: Path, recording: np.ndarray, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "sub").mkdir()
    for folder in (tmp_path, tmp_path / "sub"):
        np.savez(folder / "x.npz", data=recording, sfreq=128.0, channels=list(CHANNELS))
    argv = ["predict", str(trained), str(tmp_path / "x.npz"), "--output", str(tmp_path / "out")]
    assert main([*argv, "--stride", "0.5"]) == 0
    found = rows(tmp_path / "out" / "x_classes.csv")
    assert [float(row["start_s"]) for row in found[:3]] == [0.0, 0.5, 1.0]
    assert len(found) == 113
    assert main([*argv, "--stride", "-1"]) != 0
    assert main([*argv, str(tmp_path / "sub" / "x.npz")]) != 0
    assert "two inputs are called 'x'" in capsys.readouterr().err
