"""The command line: what it imports, what it explains, what it refuses."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from attn_eeg.cli import APP, PredictOptions, main
from attn_eeg.data.options import EegDataConfig
from attn_shared.options import describe_fields

CONFIGS = sorted((Path(sys.modules["attn_eeg.cli"].__file__ or "").parent / "configs").glob("*.yaml"))


@pytest.mark.parametrize(
    "argv",
    [["--help"], ["train", "--help"], ["audit", "--help"], ["predict", "--help"], ["models"], ["data", "list"]],
)
def test_listings_import_nothing_heavy(argv: list[str]) -> None:
    code = (
        f"import sys; from attn_eeg.cli import main; assert main({argv!r}) == 0; "
        "heavy = {'torch', 'lightning', 'numpy', 'mne', 'sklearn'} & set(sys.modules); assert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, encoding="utf-8", timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout


def test_every_option_is_documented(capsys: pytest.CaptureFixture[str]) -> None:
    for cls in (EegDataConfig, PredictOptions):
        texts = describe_fields(cls)
        assert set(texts) == set(cls.__dataclass_fields__)
        assert all(len(text) > 10 for text in texts.values())
    assert main(["train", "--help"]) == 0
    text = capsys.readouterr().out
    assert all(f"--data_args.{name}" in text for name in EegDataConfig.__dataclass_fields__)
    assert main(["predict", "--help"]) == 0
    text = capsys.readouterr().out
    assert all(f"--{name}" in text for name in PredictOptions.__dataclass_fields__)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_presets_fit_their_model(path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, _, data = path.stem.partition("-")
    assert model in APP.models
    assert not data or data in APP.datasets
    (own := tmp_path / "own.csv").write_text("file,subject,label\n")
    assert main(["train", "--model", model, "--data", data or str(own), "--print_config"]) == 0
    resolved = yaml.safe_load(capsys.readouterr().out)
    for part, values in yaml.safe_load(path.read_text(encoding="utf-8")).items():
        for name, value in values.items():
            assert resolved[part][name] == value


@pytest.mark.parametrize(
    ("argv", "sentence"),
    [
        (["train", "--data", "deap"], "www.eecs.qmul.ac.uk"),
        (["train", "--data", "eegmatt"], "eegmat"),
        (["train", "--model", "eegnett"], "eegnet"),
        (["train", "--mixer", "softmax", "--model", "mlp"], "no tokens"),
        (["predict", "nowhere", "x.edf", "--output", "o"], "nowhere"),
    ],
)
def test_errors_are_one_sentence(
    argv: list[str],
    sentence: str,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(argv) != 0
    said = capsys.readouterr().err.strip()
    assert sentence in said
    assert len(said.splitlines()) == 1
