"""Training, evaluation, prediction, scoring of files: the commands on a small model."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
import yaml

from attn_shared import options, trainer
from attn_shared.errors import UserError
from attn_shared.options import describe_fields
from attn_speech import metrics
from attn_speech.baselines import ideal_ratio_mask
from attn_speech.cli import APP, main
from attn_speech.config import MODELS
from attn_speech.data.mixing import Mixtures
from attn_speech.data.options import SpeechDataConfig
from attn_speech.options import PredictOptions, SpeechTaskConfig
from attn_speech.plots import gains, sexes_of
from attn_speech.task import SpeechTask

CONFIGS = sorted((Path(sys.modules["attn_speech.cli"].__file__ or "").parent / "configs").glob("*.yaml"))
SMALL = ["--model", "convtasnet", "--preset", "none"]
SMALL += [f"--model_args.{k}={v}" for k, v in {"N": 32, "B": 16, "Sc": 16, "H": 32, "X": 3, "R": 1}.items()]
SHORT = ["--trainer.max_epochs=1", "--trainer.max_steps=4", "--trainer.accelerator=cpu", "--trainer.progress=false"]
FEW = ["--data_args.seconds=0.5", "--data_args.val_mixtures=2", "--data_args.test_mixtures=4"]
RATE = 8000


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of a small Conv-TasNet on the synthetic data."""
    runs = tmp_path_factory.mktemp("runs")
    assert main(["train", "--runs", str(runs), *SMALL, *SHORT, *FEW]) == 0
    (report,) = runs.glob("**/report.html")
    return report.parent


@pytest.fixture
def recording(tmp_path: Path) -> Callable[..., Path]:
    """Write noise, or given samples (T,) or (T, channels), as a sound file."""

    def write(name: str, samples: np.ndarray | int = 4000, rate: int = RATE, subtype: str | None = None) -> Path:
        if isinstance(samples, int):
            samples = 0.1 * np.random.default_rng(samples).normal(size=samples)
        folder = tmp_path / "in"
        folder.mkdir(exist_ok=True)
        soundfile.write(folder / name, samples, rate, subtype=subtype)
        return folder / name

    return write


def task_of(*argv: str) -> tuple[SpeechTask, trainer.DataBundle]:
    config = options.resolve(APP, options.split([*SMALL, *FEW, *argv]))
    bundle = trainer.load_data(APP, config)
    task = trainer.build_task(APP, config, bundle.state)
    assert isinstance(task, SpeechTask)
    return task, bundle


# -- training and evaluation ------------------------------------------------------------------------------------------


def test_a_run_holds_its_table_pictures_and_players(trained: Path) -> None:
    results = json.loads((trained / "metrics.json").read_text(encoding="utf-8"))
    test = results["splits"]["test"]
    assert test["mixtures"] == 4
    assert {"si_sdri", "sdri", "si_sdr", "sdr", "stoi", "below_0_db"} <= set(test)
    assert ("pesq" in test) == metrics.has_pesq()
    assert set(results["splits"]["val"]) == {"si_sdri", "si_sdr", "si_sdr_mixture", "below_0_db", "mixtures"}
    rows = {row["model"]: row for row in results["baselines"]}
    assert rows["mixture"]["si_sdri"] == rows["mixture"]["below_0_db"] == 0
    assert rows["mixture"]["si_sdr"] == pytest.approx(test["si_sdr_mixture"], abs=1e-4)
    assert rows["ideal ratio mask (oracle)"]["si_sdri"] > 6
    assert rows["ideal ratio mask (oracle)"]["oracle"]
    html = (trained / "report.html").read_text(encoding="utf-8")
    assert ">oracle</span>" in html
    assert "worse than" not in html  # nobody is measured by the oracle, and 0 dB is no share of anything
    assert html.count("<audio") == 15  # three mixtures, their two voices, and what the model made of them
    assert "media-src data:" in html
    for name in ("gains", "example_1", "example_2", "example_3"):
        assert (trained / "plots" / f"{name}.png").stat().st_size > 3000


@pytest.mark.parametrize("size", [1, 3])
def test_eval_gives_the_same_figures_for_any_batch(trained: Path, tmp_path: Path, size: int) -> None:
    """Mixtures of a batch differ in length: the shorter are padded."""
    assert main(["eval", str(trained), "--output", str(tmp_path / "e"), f"--trainer.eval_batch_size={size}"]) == 0
    expected = json.loads((trained / "metrics.json").read_text(encoding="utf-8"))["splits"]["test"]
    found = json.loads((tmp_path / "e").read_text(encoding="utf-8"))["metrics"]
    assert found == pytest.approx(expected, abs=2e-4)


def test_the_same_mixtures_whatever_the_model_was_trained_on(trained: Path, tmp_path: Path) -> None:
    with pytest.raises(AssertionError):
        assert main(["eval", str(trained), "--data", str(tmp_path / "nowhere")]) == 0
    _, bundle = task_of()
    _, again = task_of("--model_args.N=48", "--seed=5")
    assert isinstance(bundle.test, Mixtures)
    assert isinstance(again.test, Mixtures)
    assert np.array_equal(bundle.test.samples(1)[0], again.test.samples(1)[0])


def test_loss_reads_no_padding() -> None:
    task, bundle = task_of()
    assert isinstance(bundle.test, Mixtures)
    batch = bundle.test.__getitems__([0, 1, 2])
    loss = task.training_loss(batch)
    junk = {**batch, "mixture": batch["mixture"].clone(), "sources": batch["sources"].clone()}
    for row, size in enumerate(batch["lengths"].tolist()):
        junk["mixture"][row, size:] = torch.nan
        junk["sources"][row, :, size:] = torch.nan
    assert task.training_loss(junk).item() == pytest.approx(loss.item(), abs=1e-5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert task.training_loss(batch).dtype == torch.float32


@pytest.mark.parametrize(
    ("argv", "sentence"),
    [(["--task_args.limit=0"], "limit must be above 0"), (["--model_args.L=9"], "L must be even")],
)
def test_wrong_options(argv: list[str], sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        task_of(*argv)


def test_ideal_ratio_mask_adds_up_to_the_mixture() -> None:
    sources = torch.randn(2, 3, 3001)
    mixture = sources.sum(dim=1)
    found = ideal_ratio_mask(mixture, sources, RATE)
    assert found.shape == sources.shape
    assert torch.allclose(found.sum(dim=1), mixture, atol=1e-4)


def test_gains_by_sex() -> None:
    assert sexes_of(("M", "F")) == "F+M"
    assert sexes_of(("M", "")) == ""
    values = np.random.default_rng(0).normal(size=(5, 2, 6))
    values[0, 0] = np.nan
    found = metrics.Scores(np.arange(5), values)
    assert len(gains(found, ["F+M", "F+F", "F+M", "M+M", ""]).axes) == 3
    assert len(gains(found, [""] * 5).axes) == 2


# -- prediction -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "samples", "rate", "subtype"),
    [
        ("plain.wav", 12_345, 8000, None),
        ("fast.wav", 44_101, 44_100, "PCM_24"),
        ("slow.flac", 5000, 6000, None),
        ("float.wav", 9001, 16_000, "FLOAT"),
        ("lossy.ogg", 30_011, 22_050, None),
        ("three.wav", 3, 8000, None),
        ("one.wav", 1, 48_000, None),
    ],
)
@pytest.mark.parametrize("kind", ["wav", "flac", "ogg"])
def test_voices_have_the_rate_and_the_length_of_their_recording(
    trained: Path,
    recording: Callable[..., Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    name: str,
    samples: int,
    rate: int,
    subtype: str | None,
    kind: str,
) -> None:
    file = recording(name, samples, rate, subtype)
    output = tmp_path / "out"
    assert main(["predict", str(trained), str(file), "--output", str(output), "--chunk=0.5", f"--format={kind}"]) == 0
    printed = capsys.readouterr()
    assert "real-time factor" in printed.err
    written = [Path(line) for line in printed.out.splitlines()]
    assert written == [output / f"{file.stem}_voice{i}.{kind}" for i in (1, 2)]
    assert sorted(output.iterdir()) == written
    for path in written:
        info = soundfile.info(path)
        assert (info.frames, info.samplerate, info.channels) == (samples, rate, 1)
        if kind == "wav" and subtype:
            assert info.subtype == subtype


def test_voices_add_up_to_the_recording_as_nearly_as_one_gain_can(
    trained: Path, recording: Callable[..., Path], tmp_path: Path
) -> None:
    """At the model's own rate and in one chunk: the network's voices, scaled."""
    x = (0.1 * np.random.default_rng(0).normal(size=6001)).astype(np.float32)
    file = recording("own.wav", x, RATE, "FLOAT")
    assert main(["predict", str(trained), str(file), "--output", str(tmp_path / "out"), "--chunk=0"]) == 0
    found = np.stack([soundfile.read(tmp_path / "out" / f"own_voice{i}.wav")[0] for i in (1, 2)])
    task, _ = trainer.load_task(APP, trained)
    with torch.no_grad():
        voices = task.network(torch.from_numpy(x)[None])[0].double().numpy()
    total = voices.sum(axis=0)
    gain = (total @ x) / (total @ total)
    assert np.abs(gain * voices).max() < 0.99
    assert np.allclose(found, gain * voices, atol=1e-5)


def test_bad_files_do_not_stop_the_others(
    trained: Path, recording: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    noise = 0.1 * np.random.default_rng(0).normal(size=3000)
    good = recording("good.wav", noise)
    stereo = recording("stereo.wav", np.stack([noise, -noise], axis=1), 44_100)
    recording("silent.wav", np.zeros(2000))
    recording("nan.wav", np.where(np.arange(3000) == 7, np.nan, noise), RATE, "FLOAT")
    whole = recording("cut.wav", noise).read_bytes()
    good.with_name("cut.wav").write_bytes(whole[:1001])
    good.with_name("corrupt.wav").write_bytes(whole[:30])
    recording("empty.wav", np.zeros(0))
    good.with_name("nothing.flac").write_bytes(b"")
    good.with_name("notes.txt").write_text("not a sound file")
    output = tmp_path / "out"
    assert main(["predict", str(trained), str(good.parent), "--output", str(output)]) == 2
    said = capsys.readouterr().err
    assert sorted(path.name for path in output.iterdir()) == [
        f"{stem}_voice{i}.wav" for stem in ("good", "silent", "stereo") for i in (1, 2)
    ]
    assert not soundfile.read(output / "silent_voice1.wav")[0].any()
    assert "silent.wav: it is silent" in said
    assert "stereo.wav: its channels together are silent" in said
    last = said.strip().splitlines()[-1]
    assert "5 of 8 files could not be separated" in last
    for name in ("nan.wav", "cut.wav", "corrupt.wav", "empty.wav", "nothing.flac"):
        assert name in last
        assert sum(line.startswith("left out") and name in line for line in said.splitlines()) == 1

    # One channel by itself is what it is as a file of its own.
    assert main(["predict", str(trained), str(stereo), "--output", str(tmp_path / "a"), "--channel=1"]) == 0
    alone = recording("alone.wav", noise, 44_100)
    assert main(["predict", str(trained), str(alone), "--output", str(tmp_path / "a")]) == 0
    first, second = (soundfile.read(tmp_path / "a" / f"{stem}_voice1.wav")[0] for stem in ("stereo", "alone"))
    assert np.allclose(first, second, atol=1e-4)


@pytest.mark.data
def test_edge_cases_as_files(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = Path(os.environ.get("ATTN_DATA", "data")) / "speech" / "esc_edge"
    if not folder.is_dir():
        pytest.skip("the edge cases are not under ATTN_DATA")
    assert main(["predict", str(trained), str(folder), "--output", str(tmp_path / "out")]) == 2
    written = {path.name: soundfile.info(path) for path in (tmp_path / "out").iterdir()}
    assert sorted(written) == [f"{stem}_voice{i}.wav" for stem in ("silent", "stereo_44100") for i in (1, 2)]
    assert (written["stereo_44100_voice1.wav"].frames, written["stereo_44100_voice1.wav"].samplerate) == (
        22_050,
        44_100,
    )
    said = capsys.readouterr().err
    assert "truncated.wav is cut short" in said
    assert "zero_samples.wav holds no samples" in said
    assert "corrupt_header.wav cannot be read" in said


@pytest.mark.parametrize(
    ("argv", "sentence"),
    [
        (["--chunk=0.1"], "give seconds from 0.5 on"),
        (["--overlap=0.7"], "up to 0.5"),
        (["--channel=3"], "has 1 channels"),
        (["--format=mp4"], "format"),
    ],
)
def test_wrong_options_of_predict(
    trained: Path,
    recording: Callable[..., Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    argv: list[str],
    sentence: str,
) -> None:
    assert main(["predict", str(trained), str(recording("a.wav")), "--output", str(tmp_path / "out"), *argv]) == 2
    said = capsys.readouterr().err.strip()
    assert sentence in said
    assert len(said.splitlines()) == 1
    assert not list((tmp_path / "out").glob("*"))


# -- scoring of files -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The synthetic test mixtures as files."""
    folder = tmp_path_factory.mktemp("mixed")
    assert main(["mix", "synthetic", "--output", str(folder), "--data_args.test_mixtures=3"]) == 0
    assert sorted(one.name for one in (folder / "test").iterdir()) == ["mix", "s1", "s2"]
    return folder


def test_files_are_scored_as_the_model_that_wrote_them(
    trained: Path, mixed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own, written = tmp_path / "own.json", tmp_path / "written.json"
    data = ["--data", str(mixed)]
    assert main(["eval", str(trained), *data, "--output", str(own)]) == 0
    assert main(["predict", str(trained), str(mixed / "test" / "mix"), "--output", str(tmp_path / "out")]) == 0
    assert main(["eval", "--estimates", str(tmp_path / "out"), *data, "--output", str(written)]) == 0
    assert "si_sdri" in capsys.readouterr().out
    found = json.loads(written.read_text(encoding="utf-8"))
    expected = json.loads(own.read_text(encoding="utf-8"))["metrics"]
    assert {k: v for k, v in found["metrics"].items() if "pesq" not in k} == pytest.approx(
        {k: v for k, v in expected.items() if "pesq" not in k}, abs=2e-2
    )
    assert len(found["mixtures"]) == 3
    assert np.mean([one["si_sdri"] for one in found["mixtures"]]) == pytest.approx(found["metrics"]["si_sdri"])


def test_estimates_in_folders_of_another_rate_and_order(
    mixed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from attn_speech import audio

    for number, other in ((1, 2), (2, 1)):
        for path in (mixed / "test" / f"s{number}").iterdir():
            voice, rate = audio.read(path)
            audio.write(tmp_path / f"s{other}" / path.name, audio.resample(voice, rate, 16_000)[:-80], 16_000)
    argv = ["--estimates", str(tmp_path), "--data", str(mixed), "--measures", "si_sdr"]
    assert main(["eval", *argv, "--output", str(tmp_path / "e.json")]) == 0
    assert "6 estimates were not exactly as long" in capsys.readouterr().out
    figures = json.loads((tmp_path / "e.json").read_text(encoding="utf-8"))["metrics"]
    assert figures["si_sdr"] > 20
    assert "sdr" not in figures
    next((tmp_path / "s2").iterdir()).unlink()
    assert main(["eval", *argv]) == 2
    assert "lacks the voices of 1 of 3 mixtures" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "sentence"),
    [
        (["eval", "--estimates", "nowhere", "--data", "synthetic"], "there is no folder nowhere"),
        (["eval", "--estimates", "."], "needs --estimates DIR and --data"),
        (["eval", "--estimates", ".", "--data", "synthetic", "--measures", "all_"], "it may be si_sdr"),
        (["eval", "run", "--estimates", ".", "--data", "synthetic"], "takes no run"),
        (["mix", "synthetic"], "needs --output"),
        (["mix", "synthetic", "--output", "x", "--split", "train"], "val or test"),
        (["predict", "nowhere", "x.wav", "--output", "o"], "nowhere"),
        (["train", "--model", "convtasnett"], "convtasnet"),
        (["train", "--model", "convtasnet", "--mixer", "softmax"], "no tokens"),
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
    assert main(argv) == 2
    said = capsys.readouterr().err.strip()
    assert sentence in said
    assert len(said.splitlines()) == 1


# -- the command line -------------------------------------------------------------------------------------------------


def test_listings_import_nothing_heavy() -> None:
    listings = [["--help"], ["train", "--help"], ["eval", "--help"], ["eval", "--estimates", "x", "--help"]]
    listings += [["predict", "--help"], ["mix", "--help"], ["models"], ["data", "list"]]
    code = (
        f"import sys; from attn_speech.cli import main; assert not any(main(argv) for argv in {listings!r}); "
        "heavy = {'torch', 'lightning', 'numpy', 'scipy', 'soundfile'} & set(sys.modules); assert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, encoding="utf-8", timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert "--estimates" in done.stdout


def test_every_option_is_documented(capsys: pytest.CaptureFixture[str]) -> None:
    configs = {card.config for card in MODELS.values()}
    for cls in (SpeechDataConfig, SpeechTaskConfig, PredictOptions, *configs):
        texts = describe_fields(cls)
        assert set(texts) == set(cls.__dataclass_fields__), cls
        assert all(len(text) > 10 for text in texts.values()), cls
    assert main(["train", "--help"]) == 0
    text = capsys.readouterr().out
    assert all(f"--data_args.{name}" in text for name in SpeechDataConfig.__dataclass_fields__)
    assert all(f"--task_args.{name}" in text for name in SpeechTaskConfig.__dataclass_fields__)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_presets_fit_their_model(path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, _, data = path.stem.partition("-")
    assert model in APP.models
    assert not data or data in APP.datasets
    assert main(["train", "--model", model, "--data", data or str(tmp_path), "--print_config"]) == 0
    resolved = yaml.safe_load(capsys.readouterr().out)
    for part, values in yaml.safe_load(path.read_text(encoding="utf-8")).items():
        for name, value in values.items():
            assert resolved[part][name] == value
