"""Files of EEG: what each reader gives, and what it says of files that are not what they should be."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

from attn_eeg.data.channels import electrode, is_eeg
from attn_eeg.data.corpus import check_file, load_corpus
from attn_eeg.data.options import EegDataConfig
from attn_eeg.data.readers import read_file
from attn_shared.errors import UserError

NAMES = ["Fp1", "Fp2", "C3", "C4", "O1", "O2"]


def _signal(channels: int = 6, seconds: float = 10, rate: float = 100.0, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(0, 15, (channels, int(seconds * rate))).astype(np.float32)


def _write_edf(
    path: Path, data: np.ndarray, rate: float = 100.0, names: list[str] | None = None, unit: str = "uV"
) -> None:
    import edfio

    signals = [
        edfio.EdfSignal(row.astype(np.float64), rate, label=name, physical_dimension=unit)
        for name, row in zip(names or NAMES, data, strict=True)
    ]
    edfio.Edf(signals).write(path)


def _need_data(*names: str) -> Path:
    root = Path(os.environ.get("ATTN_DATA") or "data") / "eeg"
    if not all((root / name).exists() for name in names):
        pytest.skip(f"real data are not under {root}")
    return root


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("EEG FP1-REF", "Fp1"),
        ("Fp1.", "Fp1"),
        ("T3", "T7"),
        ("EEG T6-LE", "P8"),
        ("FCz", "FCz"),
        ("fcz", "FCz"),
        ("CZ", "Cz"),
        ("C3-A2", "C3"),
        ("EEG Fpz", "Fpz"),
        ("po10", "PO10"),
        ("Sensor 4", "Sensor 4"),
        ("CB1", "CB1"),
    ],
)
def test_names_of_electrodes(given: str, expected: str) -> None:
    assert electrode(given) == expected
    assert electrode(expected) == expected


def test_signals_that_are_no_eeg() -> None:
    others = ["ECG ECG", "EOG1", "EEG A2-A1", "STATUS", "EMG left", "A1", "EDF Annotations", "TRIGGER"]
    assert not any(map(is_eeg, others))
    assert all(map(is_eeg, ["EEG Fp1", "C3-A2", "AF3", "Iz", "T7"]))


def test_edf(tmp_path: Path) -> None:
    data = _signal()
    _write_edf(tmp_path / "a.edf", np.vstack([data, data[:1]]), names=[f"EEG {n.upper()}-REF" for n in NAMES] + ["ECG"])
    found = read_file(tmp_path / "a.edf")
    assert found.channels == NAMES
    assert found.sfreq == 100.0
    assert found.data.dtype == np.float32
    # 16 bits over a range of some 130 microvolt.
    np.testing.assert_allclose(found.data, data, atol=0.01)
    assert not found.notes


def test_truncated_and_damaged_edf(tmp_path: Path) -> None:
    _write_edf(tmp_path / "a.edf", _signal())
    whole = (tmp_path / "a.edf").read_bytes()
    (tmp_path / "cut.edf").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match=r"cut\.edf is cut short: it holds \d+ of the 10 records"):
        read_file(tmp_path / "cut.edf")
    (tmp_path / "head.edf").write_bytes(whole[:300])
    with pytest.raises(UserError, match=r"head\.edf (is cut short|is damaged)"):
        read_file(tmp_path / "head.edf")
    (tmp_path / "text.edf").write_text("this is no EDF file" * 100)
    with pytest.raises(UserError, match="is damaged"):
        read_file(tmp_path / "text.edf")
    (tmp_path / "empty.edf").write_bytes(b"")
    with pytest.raises(UserError, match="is empty"):
        read_file(tmp_path / "empty.edf")
    with pytest.raises(UserError, match="no such file"):
        read_file(tmp_path / "none.edf")
    (tmp_path / "a.xyz").write_bytes(b"1")
    with pytest.raises(UserError, match=r"files of kind \.xyz are not known"):
        read_file(tmp_path / "a.xyz")


@pytest.mark.parametrize(("factor", "unit"), [(1e-6, "volt"), (1e-3, "millivolt"), (1e6, "picovolt")])
def test_units_mixed_up(tmp_path: Path, factor: float, unit: str) -> None:
    data = _signal()
    np.savez(tmp_path / "a.npz", data=data * np.float32(factor), sfreq=100.0, channels=np.array(NAMES))
    found = read_file(tmp_path / "a.npz")
    np.testing.assert_allclose(found.data, data, rtol=1e-4, atol=1e-3)
    assert len(found.notes) == 1
    assert "unit mixed up" in found.notes[0]
    assert unit in found.notes[0]


def test_no_numbers_and_flat_electrodes(tmp_path: Path) -> None:
    data = _signal()
    data[2, 100:150] = np.nan
    data[4] = 7.0
    np.savez(tmp_path / "a.npz", data=data, sfreq=100.0, channels=np.array(NAMES))
    found = read_file(tmp_path / "a.npz")
    assert np.isnan(found.data[2, 100:150]).all()
    assert np.isfinite(np.delete(found.data, 2, axis=0)).all()
    assert any("5.0% of the samples are no numbers (of C3)" in note for note in found.notes)
    assert any("flat: O1" in note for note in found.notes)
    data[:] = np.inf
    np.savez(tmp_path / "b.npz", data=data, sfreq=100.0, channels=np.array(NAMES))
    with pytest.raises(UserError, match="holds no number"):
        read_file(tmp_path / "b.npz")


def test_arrays_that_do_not_say_enough(tmp_path: Path) -> None:
    data = _signal()
    np.savez(tmp_path / "a.npz", data=data, channels=np.array(NAMES))
    with pytest.raises(UserError, match="sampling rate"):
        read_file(tmp_path / "a.npz")
    assert read_file(tmp_path / "a.npz", rate=100).sfreq == 100
    np.savez(tmp_path / "b.npz", data=data, sfreq=100)
    with pytest.raises(UserError, match="does not name its 6 electrodes"):
        read_file(tmp_path / "b.npz")
    assert read_file(tmp_path / "b.npz", channels=NAMES).channels == NAMES
    np.savez(tmp_path / "c.npz", data=data, sfreq=100, channels=np.array(NAMES[:4]))
    with pytest.raises(UserError, match="4 names of electrodes"):
        read_file(tmp_path / "c.npz")
    np.savez(tmp_path / "d.npz", data=data, sfreq=100, channels=np.array([*NAMES[:5], "Fp1"]))
    with pytest.raises(UserError, match="two signals are electrode Fp1"):
        read_file(tmp_path / "d.npz")
    np.savez(tmp_path / "e.npz", data=np.array([{"a": 1}], dtype=object))
    with pytest.raises(UserError, match="cannot be read as NPZ"):
        read_file(tmp_path / "e.npz")
    # Samples first is recognised by the number of names.
    np.savez(tmp_path / "f.npz", data=data.T, sfreq=100, channels=np.array(NAMES))
    np.testing.assert_array_equal(read_file(tmp_path / "f.npz").data, data)


def test_matlab_files(tmp_path: Path) -> None:
    from scipy.io import savemat

    data = _signal()
    savemat(tmp_path / "a.mat", {"data": data, "fs": 100.0, "channels": np.array(NAMES, dtype=object)})
    found = read_file(tmp_path / "a.mat")
    assert (found.channels, found.sfreq) == (NAMES, 100.0)
    np.testing.assert_array_equal(found.data, data)
    (tmp_path / "b.mat").write_bytes(b"MATLAB 5.0 MAT-file, and then nothing of it" * 10)
    with pytest.raises(UserError, match=r"cannot be read as a MATLAB file|version 7"):
        read_file(tmp_path / "b.mat")


def test_arff(tmp_path: Path) -> None:
    rows = "\n".join(f"{a:.3f},{b:.3f},{i % 2}" for i, (a, b) in enumerate(_signal(2, 3).T))
    head = "@RELATION x\n@ATTRIBUTE AF3 NUMERIC\n@ATTRIBUTE T3 NUMERIC\n@ATTRIBUTE state {0,1}\n@DATA\n"
    (tmp_path / "a.arff").write_text(head + rows + "\n")
    found = read_file(tmp_path / "a.arff", rate=100)
    assert found.channels == ["AF3", "T7"]
    assert found.labels is not None
    assert found.labels.tolist() == [i % 2 for i in range(300)]
    with pytest.raises(UserError, match="ARFF does not say its sampling rate"):
        read_file(tmp_path / "a.arff")


@pytest.mark.data
def test_real_files() -> None:
    root = _need_data("eegmat_edf", "eeglab_sample", "eegmat_128hz", "eye_state")
    edf = read_file(root / "eegmat_edf" / "Subject00_2.edf")
    assert (len(edf.channels), edf.sfreq, edf.data.shape[1]) == (19, 500.0, 31_000)
    with np.load(root / "eegmat_128hz" / "Subject00.npz", allow_pickle=False) as resampled:
        other = resampled["task"] * float(resampled["scale"])
    # The same recording at another rate: equal deviations where the anti-alias filter takes nothing away.
    np.testing.assert_allclose(edf.data.std(axis=1), other.std(axis=1), rtol=0.02)
    eeglab = read_file(root / "eeglab_sample" / "eeglab_data.set")
    assert (len(eeglab.channels), eeglab.sfreq, eeglab.data.shape[1]) == (30, 128.0, 30_504)
    corpus = load_corpus("eegmat", EegDataConfig())
    assert len(corpus.recordings) == 72
    assert all(r.data.shape == (19, 7936) for r in corpus.recordings)
    assert sum(r.label for r in load_corpus("eegmat", EegDataConfig(label="quality")).recordings) == 26
    eye = load_corpus("eye_state", EegDataConfig()).recordings[0]
    assert eye.labels is not None
    assert eye.labels.sum() == 6723
    assert np.isnan(eye.data).any(axis=0).sum() == 4


# -- recordings of one's own -------------------------------------------------------------------------------------------


def _manifest(folder: Path, text: str) -> Path:
    (folder / "recordings.csv").write_text(text, encoding="utf-8")
    return folder / "recordings.csv"


def test_manifest(tmp_path: Path) -> None:
    for number in range(3):
        _write_edf(tmp_path / f"{number}.edf", _signal(seed=number))
    _manifest(
        tmp_path,
        "file;subject;label;start;stop\n0.edf;anna;rest;0;4\n0.edf;anna;task;4;8\n1.edf;ben;rest;;\n2.edf;ben;task;2;\n",
    )
    for path in (tmp_path, tmp_path / "recordings.csv"):
        corpus = load_corpus(str(path), EegDataConfig())
        assert corpus.classes == ["rest", "task"]
        assert [r.data.shape[1] for r in corpus.recordings] == [400, 400, 1000, 800]
        assert [r.label for r in corpus.recordings] == [0, 1, 0, 1]
        assert [r.subject for r in corpus.recordings] == ["anna", "anna", "ben", "ben"]
        assert len({(r.subject, r.trial) for r in corpus.recordings}) == 4
    assert check_file(tmp_path) == []
    np.testing.assert_allclose(corpus.recordings[1].data, _signal(seed=0)[:, 400:800], atol=0.01)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("file,subject\n0.edf,a\n", "lacks the column label"),
        ("file,subject,label\n", "names no recording"),
        ("file,subject,label\n9.edf,a,x\n0.edf,b,y\n", r"csv:2: .*9\.edf: no such file"),
        ("file,subject,label\n0.edf,,x\n", "csv:2: column subject is empty"),
        ("file,subject,label\n0.edf,a,x\n0.edf,b,x\n", "has 1 different values"),
        ("file,subject,label\n0.txt,a,x\n", r"csv:2: 0\.txt is none of"),
        ("file,subject,label,start\n0.edf,a,x,99\n0.edf,b,y,\n", "csv:2: 99 to inf s holds nothing"),
        ("file,subject,label,start\n0.edf,a,x,soon\n0.edf,b,y,\n", "csv:2: start is 'soon'"),
        ("file,subject,label,stop\n0.edf,a,x,-1\n0.edf,b,y,\n", "csv:2: stop is '-1'"),
    ],
)
def test_manifests_that_do_not_fit(tmp_path: Path, text: str, message: str) -> None:
    _write_edf(tmp_path / "0.edf", _signal())
    path = _manifest(tmp_path, text)
    with pytest.raises(UserError, match=message):
        load_corpus(str(path), EegDataConfig())


def test_data_that_are_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ATTN_DATA", str(tmp_path))
    for name in ("eegmat", "eye_state", "deap", "dreamer", "seed"):
        with pytest.raises(UserError, match=r"download|ask for access"):
            load_corpus(name, EegDataConfig())
    with pytest.raises(UserError, match=r"did you mean|eegmat"):
        load_corpus("eegmatt", EegDataConfig())
    with pytest.raises(UserError, match=r"holds no recordings\.csv"):
        load_corpus(str(tmp_path), EegDataConfig())
    _write_edf(tmp_path / "a.edf", _signal())
    with pytest.raises(UserError, match="is one recording, and training needs several"):
        load_corpus(str(tmp_path / "a.edf"), EegDataConfig())


def test_check_says_what_to_mind(tmp_path: Path) -> None:
    _write_edf(tmp_path / "0.edf", _signal())
    _write_edf(tmp_path / "1.edf", _signal(5), names=NAMES[:5])
    (tmp_path / "2.edf").write_bytes((tmp_path / "0.edf").read_bytes()[:3000])
    path = _manifest(tmp_path, "file,subject,label\n0.edf,a,x\n1.edf,b,y\n2.edf,c,x\n")
    found = check_file(path)
    assert any("2.edf is cut short" in problem for problem in found)
    assert any("no subject has more than one label" in problem for problem in found)
    assert any("differ in their electrodes; 5 are in all" in problem for problem in found)


# -- licensed data sets: small files of the same structure ------------------------------------------------------------


def test_deap(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from scipy.io import savemat

    monkeypatch.setenv("ATTN_DATA", str(tmp_path))
    folder = tmp_path / "eeg" / "deap"
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    data, labels = rng.normal(0, 10, (3, 40, 384 + 640)), np.array([[1.0, 9, 5, 4.99], [6.2, 2, 1, 5], [5.0, 4, 8, 9]])
    savemat(folder / "s01.mat", {"data": data, "labels": labels})
    corpus = load_corpus("deap", EegDataConfig())
    assert [r.label for r in corpus.recordings] == [0, 1, 1]
    assert [r.label for r in load_corpus("deap", EegDataConfig(label="liking", levels=9)).recordings] == [3, 4, 8]
    first = corpus.recordings[0]
    assert (first.data.shape, first.sfreq, len(first.channels)) == ((32, 640), 128.0, 32)
    assert first.baseline is not None
    np.testing.assert_allclose(first.baseline, data[0, :32, :384], rtol=1e-6)
    np.testing.assert_allclose(first.data, data[0, :32, 384:], rtol=1e-6)
    with pytest.raises(UserError, match="levels is 3"):
        load_corpus("deap", EegDataConfig(levels=3))
    with pytest.raises(UserError, match="has the labels valence"):
        load_corpus("deap", EegDataConfig(label="joy"))
    savemat(folder / "s02.mat", {"data": data, "labels": labels + 9})
    with pytest.raises(UserError, match="is not between 1 and 9"):
        load_corpus("deap", EegDataConfig())
    for path in folder.glob("*.mat"):
        path.unlink()
    (folder / "s01.dat").write_bytes(b"\x80\x02cos\nsystem\n")
    with pytest.raises(UserError, match="pickles and are not opened"):
        load_corpus("deap", EegDataConfig())


def test_dreamer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from scipy.io import savemat

    monkeypatch.setenv("ATTN_DATA", str(tmp_path))
    folder = tmp_path / "eeg" / "dreamer"
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)

    def cell(seconds: list[int]) -> np.ndarray:
        found = np.empty((len(seconds), 1), dtype=object)
        for i, s in enumerate(seconds):
            found[i, 0] = rng.normal(0, 10, (128 * s, 14))
        return found

    subjects = np.empty((1, 2), dtype=object)
    for i in range(2):
        scores = np.array([[2.0], [3.0], [5.0]])
        eeg = {"stimuli": cell([8, 9, 10]), "baseline": cell([4, 4, 4])}
        subjects[0, i] = {"EEG": eeg, "ScoreValence": scores, "ScoreArousal": scores, "ScoreDominance": scores}
    savemat(folder / "DREAMER.mat", {"DREAMER": {"Data": subjects, "EEG_SamplingRate": 128.0}})
    corpus = load_corpus("dreamer", EegDataConfig())
    assert [r.label for r in corpus.recordings] == [0, 1, 1] * 2
    assert [r.data.shape for r in corpus.recordings[:3]] == [(14, 1024), (14, 1152), (14, 1280)]
    assert corpus.recordings[0].baseline is not None
    assert corpus.recordings[0].baseline.shape == (14, 512)
    assert [r.label for r in load_corpus("dreamer", EegDataConfig(levels=5)).recordings[:3]] == [1, 2, 4]
    savemat(folder / "DREAMER.mat", {"DREAMER": {"Other": 1}})
    with pytest.raises(UserError, match="is no file of DREAMER"):
        load_corpus("dreamer", EegDataConfig())


def test_seed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from scipy.io import savemat

    monkeypatch.setenv("ATTN_DATA", str(tmp_path))
    folder = tmp_path / "eeg" / "seed"
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    savemat(folder / "label.mat", {"label": np.array([[1, 0, -1]])})
    for name in ("1_20131030", "1_20131107", "2_20140404"):
        savemat(folder / f"{name}.mat", {f"djc_eeg{i}": rng.normal(0, 10, (62, 800 + i)) for i in (1, 2, 3)})
    corpus = load_corpus("seed", EegDataConfig())
    assert [(r.subject, r.session, r.label) for r in corpus.recordings] == [
        (subject, session, label) for subject, session in (("01", "1"), ("01", "2"), ("02", "1")) for label in (2, 1, 0)
    ]
    assert corpus.recordings[1].data.shape == (62, 802)
    assert len(set(corpus.recordings[0].channels)) == 62
    savemat(folder / "2_20140404.mat", {"djc_eeg1": rng.normal(0, 10, (62, 800))})
    with pytest.raises(UserError, match=r"holds 1 clips .* 3 labels"):
        load_corpus("seed", EegDataConfig())


def test_synthetic_is_the_same_every_time() -> None:
    a, b = (load_corpus("synthetic", EegDataConfig()) for _ in range(2))
    assert all(np.array_equal(x.data, y.data) for x, y in zip(a.recordings, b.recordings, strict=True))
    assert len({r.subject for r in a.recordings}) == 12
    assert all(5 < r.data.std() < 60 for r in a.recordings)
    assert any("synthetic" in note for note in a.notes)
