"""Our models on pytorch-forecasting's data sets, and its models in our tables."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning
import numpy as np
import pandas as pd
import pytest
import torch
from torch import Tensor

from attn_shared import trainer
from attn_shared.config import OptimConfig, RunConfig, TrainerConfig
from attn_shared.errors import UserError
from attn_timeseries.cli import APP, main
from attn_timeseries.config import MODELS, ForecastTaskConfig
from attn_timeseries.data.cards import ForecastDataConfig
from attn_timeseries.models.base import SeriesShape

pytorch_forecasting = pytest.importorskip("pytorch_forecasting")

from pytorch_forecasting import TimeSeriesDataSet  # noqa: E402
from pytorch_forecasting.data import MultiNormalizer, TorchNormalizer  # noqa: E402
from pytorch_forecasting.metrics import MAE, QuantileLoss  # noqa: E402

from attn_timeseries.integrations import baselines  # noqa: E402
from attn_timeseries.integrations.pytorch_forecasting import Forecaster  # noqa: E402

L, H = 24, 6
SMALL = {"d_model": 8, "d_ff": 8, "n_heads": 2, "e_layers": 1, "patch_len": 8, "stride": 4}


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def frame(rows: int = 100) -> pd.DataFrame:
    parts = []
    for number, shop in enumerate("nsw"):
        t = np.arange(rows)
        rng = np.random.default_rng(number)
        price = rng.choice([0.0, 1.0], size=rows)
        sold = 20 * (number + 1) + 5 * np.sin(2 * np.pi * t / 12) + 8 * price + rng.normal(scale=0.3, size=rows)
        parts.append(
            pd.DataFrame(
                {
                    "t": t,
                    "shop": shop,
                    "sold": sold,
                    "visits": sold * 3 + rng.normal(size=rows),
                    "price": price,
                    "rain": rng.normal(size=rows),
                    "day": (t % 7 / 6) - 0.5,
                    "holiday": np.where(t % 10 == 0, "yes", "no"),
                    "size": float(number),
                }
            )
        )
    return pd.concat(parts, ignore_index=True)


def dataset(target: str | list[str] = "sold", **options: Any) -> TimeSeriesDataSet:
    targets = [target] if isinstance(target, str) else target
    return TimeSeriesDataSet(
        frame(),
        time_idx="t",
        target=target,
        group_ids=["shop"],
        **{
            "min_encoder_length": L,
            "max_encoder_length": L,
            "min_prediction_length": H,
            "max_prediction_length": H,
            "time_varying_unknown_reals": targets,
            "target_normalizer": TorchNormalizer()
            if len(targets) == 1
            else MultiNormalizer([TorchNormalizer() for _ in targets]),
            **options,
        },
    )


def fit(model: Forecaster, data: TimeSeriesDataSet, epochs: int) -> float:
    """Mean absolute error over the data after training, in its units."""
    lightning.seed_everything(0, verbose=False)
    runner = lightning.Trainer(
        max_epochs=epochs, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False,
    )  # fmt: skip
    runner.fit(model, data.to_dataloader(train=True, batch_size=64), data.to_dataloader(train=False, batch_size=256))
    return float(runner.callback_metrics["val_loss"])


def first_batch(data: TimeSeriesDataSet, size: int = 8) -> tuple[dict[str, Any], Any]:
    return next(iter(data.to_dataloader(train=False, batch_size=size)))


def small(name: str) -> dict[str, Any]:
    return {key: n for key, n in SMALL.items() if key in MODELS[name].config.__dataclass_fields__}


@pytest.mark.parametrize("name", ["patchtst", "dlinear", "itransformer", "autoformer", "naive"])
def test_one_target(name: str) -> None:
    """The prediction is the network's on the scaled look-back, in the target's units; gradients reach every weight."""
    data = dataset()
    model = Forecaster.from_dataset(data, model=name, model_args=small(name)).eval()
    x, _ = first_batch(data)
    prediction = model(x)["prediction"]
    assert prediction.shape == (8, H, 1)
    centre, scale = x["target_scale"][:, 0], x["target_scale"][:, 1]
    scaled = (x["encoder_target"] - centre[:, None]) / scale[:, None]
    with torch.no_grad():
        ours = model.network(scaled[..., None].float(), torch.zeros(8, L, 0), torch.zeros(8, L // 2 + H, 0))
    torch.testing.assert_close(
        prediction[..., 0], (ours[..., 0] * scale[:, None] + centre[:, None]).float(), rtol=1e-4, atol=1e-3
    )
    if MODELS[name].trainable:
        prediction.mean().backward()
        assert all(p.grad is not None for p in model.network.parameters())


def test_several_targets_and_a_mixer() -> None:
    data = dataset(["sold", "visits"])
    model = Forecaster.from_dataset(
        data, model="transformer", model_args={**small("transformer"), "d_layers": 1}, mixer="flow", learning_rate=1e-2
    )
    x, y = first_batch(data)
    before = model(x)["prediction"]
    assert [tuple(part.shape) for part in before] == [(8, H, 1), (8, H, 1)]
    # Each in its own units: visits are three times what is sold.
    assert before[1].mean() > 2 * before[0].mean()
    assert "flow" in type(model.network.encoder[0].attention).__module__
    assert fit(model, data, 1) < 200
    assert isinstance(y[0], list)


def test_known_covariates_decide_the_target() -> None:
    data = dataset(
        time_varying_known_reals=["price", "day"],
        time_varying_unknown_reals=["sold", "rain"],
        time_varying_known_categoricals=["holiday"],
        static_categoricals=["shop"],
        static_reals=["size"],
    )
    with_price = Forecaster.from_dataset(data, model="dlinear", calendar=["day"], learning_rate=3e-2)
    assert {role: list(names) for role, names in with_price.roles.items()} == {
        "past": ["rain"],
        "known": ["price"],
        "known_cat": ["holiday"],
        "static": ["size"],
        "static_cat": ["shop"],
    }
    without = Forecaster.from_dataset(dataset(), model="dlinear", learning_rate=3e-2)
    assert fit(with_price, data, 5) < 0.7 * fit(without, dataset(), 5)
    # What comes later of an observed covariate changes nothing, a known one does.
    x, _ = first_batch(data)
    place = {name: data.reals.index(name) for name in ("rain", "price")}
    with_price.eval()
    with torch.no_grad():
        before = with_price(x)["prediction"]
        for name, same in (("rain", True), ("price", False)):
            changed = {**x, "decoder_cont": x["decoder_cont"].clone()}
            changed["decoder_cont"][..., place[name]] += 10
            assert torch.equal(with_price(changed)["prediction"], before) is same


def test_quantile_loss() -> None:
    data = dataset()
    model = Forecaster.from_dataset(data, model="dlinear", loss=QuantileLoss([0.1, 0.5, 0.9])).eval()
    x, _ = first_batch(data)
    prediction = model(x)["prediction"]
    assert prediction.shape == (8, H, 3)
    assert (prediction.diff(dim=-1) > 0).all()


def test_validation_after_training_and_predict() -> None:
    """`from_dataset(predict=True)` splits by time as that library does; its `predict` works on our model."""
    whole = frame()
    training = TimeSeriesDataSet.from_dataset(dataset(), whole[whole["t"] < 90])
    last = TimeSeriesDataSet.from_dataset(training, whole, predict=True, stop_randomization=True)
    model = Forecaster.from_dataset(training, model="dlinear", loss=MAE())
    fit(model, training, 1)
    predicted = model.predict(
        last, trainer_kwargs={"accelerator": "cpu", "logger": False, "enable_progress_bar": False}
    )
    assert predicted.shape == (3, H)
    x, y = first_batch(last)
    with torch.no_grad():
        torch.testing.assert_close(predicted, model.eval()(x)["prediction"][..., 0])
    np.testing.assert_allclose(y[0], whole["sold"].to_numpy().reshape(3, -1)[:, -H:], rtol=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"min_encoder_length": 4}, "one look-back and one horizon"),
        ({"time_varying_unknown_reals": []}, "'sold' must be among time_varying_unknown_reals"),
    ],
)
def test_data_sets_that_do_not_fit(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Forecaster.from_dataset(dataset(**options), model="dlinear")


def test_mistakes() -> None:
    data = dataset()
    with pytest.raises(ValueError, match="unknown forecasting model 'patchts'"):
        Forecaster.from_dataset(data, model="patchts")
    with pytest.raises(ValueError, match="'hour' is none of the reals known in advance"):
        Forecaster.from_dataset(data, model="dlinear", calendar=["hour"])
    with pytest.raises(ValueError, match=r"hold 0\.5"):
        Forecaster.from_dataset(data, model="dlinear", loss=QuantileLoss([0.1, 0.9]))


# -- its models in our tables -----------------------------------------------------------------------------------------


def unscaled(data: pd.DataFrame) -> TimeSeriesDataSet:
    """Of the data as it is: the target is not scaled."""
    return TimeSeriesDataSet(
        data,
        time_idx="t",
        target="value",
        group_ids=["column"],
        static_categoricals=["column"],
        time_varying_known_reals=["calendar_0", "calendar_1"],
        time_varying_unknown_reals=["value"],
        min_encoder_length=L,
        max_encoder_length=L,
        min_prediction_length=H,
        max_prediction_length=H,
        target_normalizer=TorchNormalizer(method="identity"),
    )


@pytest.mark.parametrize("name", ["tft", "nhits"])
def test_is_the_library_on_its_own_data_set(name: str) -> None:
    """Its own class, made from its own data set of the same rows, gives the same forecast with the same weights."""
    rng, steps, columns = np.random.default_rng(0), L + H, ["a", "b", "c"]
    values = rng.normal(size=(steps, 3)).astype(np.float32)
    marks = rng.uniform(-0.5, 0.5, size=(steps, 2)).astype(np.float32)
    rows = pd.concat(
        pd.DataFrame({"t": np.arange(steps), "column": column, "value": values[:, c], "calendar_0": marks[:, 0],
                      "calendar_1": marks[:, 1]}) for c, column in enumerate(columns)
    ).reset_index(drop=True)  # fmt: skip
    data = unscaled(rows)
    shape = SeriesShape(seq_len=L, label_len=8, pred_len=H, channels=3, marks=2)
    ours = getattr(baselines, {"tft": "TFT", "nhits": "NHiTS"}[name])(MODELS[name].config(), shape).eval()
    kind = {"tft": pytorch_forecasting.TemporalFusionTransformer, "nhits": pytorch_forecasting.NHiTS}[name]
    theirs = kind.from_dataset(data, output_size=1, loss=MAE(), embedding_sizes={"column": (3, 2)}).eval()
    theirs.load_state_dict(ours.network.state_dict())
    x, _ = first_batch(data)
    assert data.reals == ["calendar_0", "calendar_1", "value"]
    assert x["encoder_cat"][:, 0, 0].tolist() == [0, 1, 2]
    torch.testing.assert_close(x["encoder_cont"][..., 2], torch.from_numpy(values[:L].T.copy()))
    with torch.no_grad():
        expected: Tensor = theirs(x)["prediction"][..., 0]  # (columns, H)
        m = torch.cat([x["encoder_cont"], x["decoder_cont"]], dim=1)[:1, :, :2]  # that library scales them
        got = ours(torch.from_numpy(values[None, :L]), m[:, :L], m[:, L - 8 :])[0].T
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["tft", "nhits"])
def test_trains_and_is_scored_as_any_other_model(name: str, tmp_path: Path) -> None:
    args = {"tft": {"hidden_size": 8, "hidden_continuous_size": 4}, "nhits": {"hidden_size": 16}}[name]
    days = pd.date_range("2024-01-01", periods=150, freq="D")
    rng = np.random.default_rng(0)
    table = pd.DataFrame({"date": days, "a": rng.normal(size=150), "b": np.sin(np.arange(150))})
    table.to_csv(tmp_path / "x.csv", index=False)
    config = RunConfig(
        app="timeseries",
        model=name,
        model_args=MODELS[name].config(**args),
        data=str(tmp_path / "x.csv"),
        data_args=ForecastDataConfig(seq_len=L, label_len=0, pred_len=H),
        task_args=ForecastTaskConfig(),
        trainer=TrainerConfig(
            max_epochs=1, max_steps=3, batch_size=8, eval_batch_size=16, accelerator="cpu", progress=False
        ),
        optim=OptimConfig(lr=1e-3, schedule="constant"),
        runs=str(tmp_path),
        kind="forecast",
    )
    bundle = trainer.load_data(APP, config)
    task = trainer.fit(APP, config, bundle)
    assert task.global_step == 3
    figures = trainer.evaluate_split(task, bundle, "test", config)
    naive = next(row for row in task.baselines(config, bundle) if row["model"] == "naive")
    assert figures["windows"] == naive["windows"] == len(bundle.test)  # type: ignore[arg-type]
    assert set(figures) >= {"mse", "mae", "mase"}
    batch = task.example_batch(bundle, 4)
    assert task.forward_batch(batch).shape == (4, H, 2)


def test_takes_no_mixer(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "--model", "tft", "--mixer", "softmax"]) == 2
    assert "takes no --mixer" in capsys.readouterr().err


def test_without_the_library(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(sys.modules, "pytorch_forecasting", None)
    shape = SeriesShape(seq_len=L, label_len=0, pred_len=H, channels=1, marks=0)
    with pytest.raises(UserError, match=r"pip install 'attn-timeseries\[pytorch-forecasting\]' adds it"):
        baselines.TFT(MODELS["tft"].config(), shape)
    assert main(["train", "--model", "nhits", "--data", "co2"]) == 2
    assert len(capsys.readouterr().err.strip().splitlines()) == 1
