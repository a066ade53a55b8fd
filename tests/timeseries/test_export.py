"""ONNX files: what comes out is what PyTorch computes, at every batch size and look-back, and enough to serve it."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from attn_shared.config import RunConfig
from attn_shared.errors import UserError
from attn_timeseries.calibration import widen
from attn_timeseries.cli import main
from attn_timeseries.config import MODELS, ForecastTaskConfig
from attn_timeseries.data.calendar import calendar_features
from attn_timeseries.data.cards import ForecastDataConfig
from attn_timeseries.task import ForecastTask

onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnx")
pytest.importorskip("onnxscript")

from attn_timeseries import export  # noqa: E402
from attn_timeseries.export import METADATA, _reason, example_inputs, export_task  # noqa: E402

SMALL = {"d_model": 16, "d_ff": 16, "n_heads": 2, "e_layers": 1, "factor": 1}
STATE: dict[str, Any] = {
    "columns": ["a", "b"],
    "time_column": "date",
    "id_column": None,
    "frequency": "h",
    "calendar": "h",
    "season": 24,
    "scaler": {"groups": {"": 0}, "mean": [[1.0, 2.0]], "std": [[3.0, 4.0]]},
    "seasonal_error": [[1.0, 1.0]],
}


def build(
    model: str, loss: str = "mse", calibrate: str = "none", mixer: str | None = None, **state: Any
) -> ForecastTask:
    sizes = {name: n for name, n in SMALL.items() if name in MODELS[model].config.__dataclass_fields__}
    config = RunConfig(
        app="timeseries",
        model=model,
        model_args=MODELS[model].config(**sizes),
        data="own.csv",
        mixer=mixer,
        data_args=ForecastDataConfig(seq_len=32, label_len=16, pred_len=8),
        task_args=ForecastTaskConfig(loss=loss, calibrate=calibrate),  # type: ignore[arg-type]
    )
    torch.manual_seed(0)
    return ForecastTask(config, {**STATE, **state}).eval()


def largest_difference(task: ForecastTask, path: Path, batch: int, length: int) -> float:
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    inputs = example_inputs(task, batch, length, seed=99)
    names = {value.name for value in session.get_inputs()}
    theirs = session.run(["forecast"], {name: value.numpy() for name, value in inputs.items() if name in names})[0]
    with torch.no_grad():
        return float((task.network(**inputs) - torch.from_numpy(theirs)).abs().max())


@pytest.mark.parametrize("model", ["transformer", "naive"])
def test_any_batch_and_any_look_back(model: str, tmp_path: Path) -> None:
    task = build(model)
    done = export_task(task, tmp_path / "m.onnx", calls=3)
    assert done.lengths == (16, 128)
    assert done.fixed == ""
    for batch, length in ((1, 16), (3, 32), (5, 77), (2, 128)):
        assert largest_difference(task, tmp_path / "m.onnx", batch, length) < 1e-5
    assert set(done.latency) == {"torch", "onnxruntime"}
    assert all(0 < p50 <= p99 for p50, p99 in done.latency.values())


@pytest.mark.parametrize(
    ("model", "why"),
    [
        ("patchtst", "weights for each of the 32 steps"),
        ("dlinear", "weights for each of the 32 steps"),
        ("autoformer", "sizes its work by the look-back"),
    ],
)
def test_a_look_back_that_the_model_fixes(
    model: str, why: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The search for an open look-back, the same both times, takes seconds.
    monkeypatch.setattr(export, "_open", functools.lru_cache(lambda task, *_, search=export._open: search(task, *_)))
    task = build(model)
    done = export_task(task, tmp_path / "m.onnx", calls=0)
    assert done.lengths == (32, 32)
    assert why in done.fixed
    assert why in str(done)
    for batch in (1, 5):
        assert largest_difference(task, tmp_path / "m.onnx", batch, 32) < 1e-5
    session = onnxruntime.InferenceSession(str(tmp_path / "m.onnx"))
    assert next(value.shape[1] for value in session.get_inputs() if value.name == "x") == 32
    with pytest.raises(UserError, match=f"{model} cannot be exported for any look-back: .*{why}"):
        export_task(task, tmp_path / "n.onnx", length="any")
    assert not (tmp_path / "n.onnx").exists()


def test_other_look_backs_give_the_same_forecast_in_pytorch() -> None:
    """The trained look-back is not special: a network built for another length with the same weights agrees."""
    task, other = build("transformer"), build("transformer")
    other.network.load_state_dict(task.network.state_dict())
    inputs = example_inputs(task, 2, 32)
    with torch.no_grad():
        before = task.network(**inputs)
        task.network.allow_lengths(100)
        torch.testing.assert_close(task.network(**inputs), before, rtol=0, atol=0)
        longer = example_inputs(task, 2, 60)
        assert task.network(**longer).shape == (2, 8, 2)
        with pytest.raises(ValueError, match=r"built for x of shape \(B, 32, 2\)"):
            other.network(**longer)
        with pytest.raises(ValueError, match="built for x of shape"):
            task.network(**example_inputs(task, 2, 101))
    for name in ("dlinear", "patchtst", "itransformer"):
        with pytest.raises(ValueError, match="has weights for each of the 32 steps of its look-back"):
            build(name).network.allow_lengths(64)


def test_covariates_are_inputs_of_the_graph(tmp_path: Path) -> None:
    covariates = {
        "names": {"known": ["price"], "static_cat": ["shop"]},
        "mean": {"known": [0.0]},
        "std": {"known": [1.0]},
        "vocabulary": {"static_cat": [["north", "south"]]},
    }
    task = build("dlinear", covariates=covariates)
    done = export_task(task, tmp_path / "m.onnx", calls=0)
    session = onnxruntime.InferenceSession(str(tmp_path / "m.onnx"))
    shapes = {value.name: value.shape[1:] for value in session.get_inputs()}
    assert shapes["known"] == [40, 1]
    assert shapes["static_cat"] == [1]
    assert "weights for each of its 32 steps" in done.fixed
    assert largest_difference(task, tmp_path / "m.onnx", 4, 32) < 1e-5


@pytest.mark.parametrize("loss", ["quantile", "mse"])
def test_quantiles_are_an_output_and_calibrated(loss: str, tmp_path: Path) -> None:
    task = build("dlinear", loss=loss, calibrate="conformal")
    assert task.calibration is not None
    generator = torch.Generator().manual_seed(0)
    factors = 0.5 + torch.rand(task.calibration.factors.shape, generator=generator, dtype=torch.float64)
    task.calibration.factors.copy_(factors)
    task.calibration.fitted.fill_(True)
    export_task(task, tmp_path / "m.onnx", calls=0)
    session = onnxruntime.InferenceSession(str(tmp_path / "m.onnx"))
    inputs = example_inputs(task, 3, 32, seed=5)
    names = {value.name for value in session.get_inputs()}
    forecast, quantiles = session.run(
        ["forecast", "quantiles"], {name: value.numpy() for name, value in inputs.items() if name in names}
    )
    with torch.no_grad():
        output = task._output({**inputs, "y": inputs["y_mark"]})
        expected = widen(task.quantiles(output), task.calibration.conformal().float())
    np.testing.assert_allclose(quantiles, expected.numpy(), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(forecast, expected[..., expected.shape[-1] // 2].numpy(), rtol=1e-5, atol=1e-5)
    facts = json.loads(session.get_modelmeta().custom_metadata_map[METADATA])
    assert facts["quantiles"] == list(task.options.levels)
    assert len(facts["quantiles"]) == quantiles.shape[-1]
    assert facts["calibrated"] is True


def test_what_the_exporter_cannot_is_a_sentence(tmp_path: Path) -> None:
    task = build("patchtst", mixer="hyena")
    expected = (
        "^patchtst with hyena cannot be written as ONNX: its operation core_attn.fft_conv has no counterpart there$"
    )
    with pytest.raises(UserError, match=expected):
        export_task(task, tmp_path / "m.onnx", calls=0)
    assert list(tmp_path.iterdir()) == []
    assert _reason("Could not guard on data-dependent expression Eq(u0, 1)\nmore") == (
        "its work depends on the values that it is given"
    )
    assert _reason("first\nsecond") == "first"
    assert len(_reason("word " * 100)) <= 160


def test_a_difference_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"differs from PyTorch by .*nothing was written"):
        export_task(build("itransformer"), tmp_path / "m.onnx", tolerance=1e-12)
    assert list(tmp_path.iterdir()) == []


def test_the_file_alone_gives_what_predict_gives(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Train, predict, export; then the CSV again with numpy and onnxruntime alone, from the file's metadata."""
    dates = pd.date_range("2024-01-01", periods=300, freq="D")
    rng = np.random.default_rng(0)
    frame = pd.DataFrame({"when": dates, "a": 5 + rng.normal(size=300), "b": 100 * rng.normal(size=300)})
    frame.to_csv(tmp_path / "own.csv", index=False)
    sizes = ["--data_args.seq_len", "28", "--data_args.label_len", "7", "--data_args.pred_len", "7"]
    short = ["--trainer.max_epochs", "1", "--trainer.accelerator", "cpu", "--trainer.progress", "false"]
    assert main(["train", "--model", "dlinear", "--data", str(tmp_path / "own.csv"), "--runs", str(tmp_path / "runs"),
                 *sizes, *short]) == 0  # fmt: skip
    run = capsys.readouterr().out.strip().splitlines()[-1]
    assert main(["predict", run, str(tmp_path / "own.csv"), "--output", str(tmp_path / "out")]) == 0
    assert main(["export", run, "--output", str(tmp_path / "deep" / "m.onnx"), "--calls", "5"]) == 0
    told = capsys.readouterr().out
    assert "onnxruntime  p50" in told
    assert "DLinear has weights for each of the 28 steps" in told

    session = onnxruntime.InferenceSession(str(tmp_path / "deep" / "m.onnx"))
    facts = json.loads(session.get_modelmeta().custom_metadata_map[METADATA])
    assert facts["columns"] == ["a", "b"]
    assert facts["look_back"] == {"trained": 28, "shortest": 28, "longest": 28}
    mean, std = (np.array(facts["scaler"][name][0]) for name in ("mean", "std"))
    x = ((frame[["a", "b"]].to_numpy()[-28:] - mean) / std).astype(np.float32)[None]
    days = pd.date_range(dates[-7], periods=14, freq="D")
    marks = {
        "x_mark": calendar_features(dates[-28:], facts["calendar"]).astype(np.float32)[None],
        "y_mark": calendar_features(days, facts["calendar"]).astype(np.float32)[None],
    }
    names = {value.name for value in session.get_inputs()}
    (scaled,) = session.run(None, {name: v for name, v in {"x": x, **marks}.items() if name in names})
    predicted = pd.read_csv(tmp_path / "out" / "own_forecast.csv")[["a", "b"]].to_numpy()
    np.testing.assert_allclose(scaled[0] * std + mean, predicted, rtol=1e-5, atol=1e-4)

    # No path of the machine that exported stands in the file.
    assert str(Path(__file__).parents[2]).encode() not in (tmp_path / "deep" / "m.onnx").read_bytes()


def test_mistakes_are_a_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for argv, part in (
        ([str(tmp_path)], "--output FILE.onnx"),
        ([str(tmp_path), "--output", "m.pt"], "ends in .onnx"),
        ([str(tmp_path / "none"), "--output", str(tmp_path / "m.onnx")], "no run or checkpoint"),
        (["a", "b", "--output", "m.onnx"], "takes one run"),
        ([str(tmp_path), "--output", "m.onnx", "--length", "long"], "auto, any, fixed"),
        ([str(tmp_path), "--output", "m.onnx", "--longest", "0"], "--longest takes a whole number"),
        ([str(tmp_path), "--output", "m.onnx", "--tolerence", "1"], "did you mean --tolerance"),
    ):
        assert main(["export", *argv]) == 2
        error = capsys.readouterr().err
        assert part in error, error
        assert len(error.strip().splitlines()) == 1
    assert list(tmp_path.iterdir()) == []
    assert main(["export", "--help"]) == 0
    assert "--longest" in capsys.readouterr().out
