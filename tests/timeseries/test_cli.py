"""The command line from end to end, in this process where that is honest and in a new one where it is not."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
import yaml

from attn_timeseries.cli import APP, main
from attn_timeseries.data.cards import ForecastDataConfig

CONFIGS = sorted((Path(sys.modules["attn_timeseries.cli"].__file__ or "").parent / "configs").glob("*.yaml"))


def run(*argv: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *argv], capture_output=True, encoding="utf-8", timeout=120, check=False)


def test_help_imports_no_torch() -> None:
    code = (
        "import sys; from attn_timeseries.cli import main; main(['--help']); "
        "heavy = {'torch', 'lightning', 'pandas', 'numpy', 'matplotlib'} & set(sys.modules); assert not heavy, heavy"
    )
    done = run("-c", code)
    assert done.returncode == 0, done.stderr
    assert "demo" in done.stdout
    assert "predict" in done.stdout


@pytest.mark.parametrize("argv", [["train", "--help"], ["models"], ["models", "autoformer"], ["data", "list"]])
def test_listings_import_no_torch(argv: list[str]) -> None:
    done = run(
        "-c", f"import sys; from attn_timeseries.cli import main; main({argv!r}); assert 'torch' not in sys.modules"
    )
    assert done.returncode == 0, done.stderr


def test_help_explains_every_data_option(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "--help"]) == 0
    text = capsys.readouterr().out
    for name in ForecastDataConfig.__dataclass_fields__:
        assert f"--data_args.{name}" in text, name


def test_every_option_is_documented() -> None:
    from attn_shared.options import describe_fields

    texts = describe_fields(ForecastDataConfig)
    assert set(texts) == set(ForecastDataConfig.__dataclass_fields__)
    assert all(len(text) > 10 for text in texts.values())


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_presets_fit_their_model(path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, _, data = path.stem.partition("-")
    assert model in APP.models
    kind = data if data in [each.name for each in APP.kinds] else None
    assert not data or kind or data in APP.datasets
    (own := tmp_path / "own.csv").write_text("date,a\n")
    argv = ["--data", str(own), "--kind", kind] if kind else ["--data", data or str(own)]
    assert main(["train", "--model", model, *argv, "--print_config"]) == 0
    resolved = yaml.safe_load(capsys.readouterr().out)
    preset = yaml.safe_load(path.read_text(encoding="utf-8"))
    for part, values in preset.items():
        for name, value in values.items():
            assert resolved[part][name] == value


def test_train_eval_predict(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    dates = pd.date_range("2024-01-01", periods=300, freq="D")
    frame = pd.DataFrame({"when": dates, "a": [1.0 * (i % 7) for i in range(300)], "b": [0.1 * i for i in range(300)]})
    frame.to_csv(tmp_path / "own.csv", index=False)
    sizes = ["--data_args.seq_len", "28", "--data_args.label_len", "7", "--data_args.pred_len", "7"]
    short = ["--trainer.max_epochs", "2", "--trainer.accelerator", "cpu", "--trainer.progress", "false"]
    argv = ["train", "--model", "dlinear", "--data", str(tmp_path / "own.csv"), "--runs", str(tmp_path / "runs")]
    assert main([*argv, *sizes, *short]) == 0
    folder = Path(capsys.readouterr().out.strip().splitlines()[-1])
    results = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))
    assert results["protocol"].startswith("own.csv, 28 steps to 7, 70% / 10% / 20%")
    assert {row["model"] for row in results["baselines"]} == {"naive", "seasonal_naive", "dlinear (closed form)"}
    assert (folder / "report.html").stat().st_size > 10_000

    assert main(["eval", str(folder)]) == 0
    assert f"{results['splits']['test']['mse']:.3f}"[:4] in capsys.readouterr().out

    assert main(["predict", str(folder), str(tmp_path / "own.csv"), "--output", str(tmp_path / "out")]) == 0
    out = pd.read_csv(tmp_path / "out" / "own_forecast.csv")
    assert list(out.columns) == ["when", "a", "b"]
    assert out["when"].tolist() == [str(day)[:10] for day in pd.date_range("2024-10-27", periods=7)]

    # A bad file: one sentence, status 2, nothing written.
    capsys.readouterr()
    (tmp_path / "bad.csv").write_text("when,a,b\n2024-01-01,1,x\n2024-01-02,1,2\n")
    assert main(["predict", str(folder), str(tmp_path / "bad.csv"), "--output", str(tmp_path / "bad")]) == 2
    message = capsys.readouterr().err
    assert "bad.csv:2: 'x' in column 'b' is not a number" in message
    assert "Traceback" not in message
    assert not (tmp_path / "bad").exists()


def test_errors_are_a_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "short.csv").write_text("date,a\n" + "".join(f"2024-01-{d:02d},{d}\n" for d in range(1, 31)))
    for argv, part in (
        (["train", "--model", "autofromer"], "did you mean 'autoformer'"),
        (["train", "--data", "etth"], "did you mean"),
        (["train", "--data_args.seq_length", "9"], "--data_args.seq_len"),
        (["train", "--model", "dlinear", "--data", str(tmp_path / "short.csv"), "--runs", str(tmp_path)], "too short"),
        (["train", "--data", str(tmp_path / "none.csv")], "none.csv"),
    ):
        assert main(argv) == 2
        error = capsys.readouterr().err
        assert part in error, error
        assert len(error.strip().splitlines()) == 1


def test_data_check_reads_users_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "own.csv"
    path.write_text("date,a\n" + "".join(f"2024-01-{d:02d},{d}\n" for d in range(1, 31) if d not in (9, 10)))
    main(["data", "check", str(path)])
    captured = capsys.readouterr()
    assert "2 steps have no row" in captured.out + captured.err


def test_data_check_takes_the_options_of_the_data(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "own.csv"
    path.write_text("date,a,what\n" + "".join(f"2024-01-{d:02d},{d},thing {d}\n" for d in range(1, 31)))
    assert main(["data", "check", str(path)]) == 2
    assert "column 'what' holds text" in capsys.readouterr().out
    assert main(["data", "check", str(path), "--data_args.columns", "a"]) == 0
    assert main(["data", "check", str(path), "--data_args.column", "a"]) == 2
    assert main(["data", "check", "co2", "--data_args.columns", "a"]) == 2
    error = capsys.readouterr().err
    assert "did you mean --data_args.columns" in error
    assert "co2 is a data set; options are for files of one's own" in error


def test_demo_help_and_options(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["demo", "--help"]) == 0
    assert "Mauna Loa" in capsys.readouterr().out
    assert main(["demo", "--rums", "x"]) == 2
    assert "did you mean --runs" in capsys.readouterr().err
