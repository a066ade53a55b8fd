"""The command `timeseries`. Imports no torch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from attn_shared.app import App, Kind
from attn_timeseries.classification import cards as classification
from attn_timeseries.config import MODELS, ForecastTaskConfig
from attn_timeseries.data.cards import DATASETS, FILE_FORMATS, FILE_SUFFIXES, ForecastDataConfig, ForecastPredictOptions
from attn_timeseries.records import cards as records
from attn_timeseries.traffic import cards as traffic

KINDS = (
    Kind(
        name="forecast",
        title="forecast tables of series",
        task="attn_timeseries.task:ForecastTask",
        data_config=ForecastDataConfig,
        task_config=ForecastTaskConfig,
        default_model="patchtst",
        default_data="co2",
        predict_options=ForecastPredictOptions,
        file_suffixes=FILE_SUFFIXES,
    ),
    traffic.KIND,
    classification.KIND,
    records.KIND,
)

APP = App(
    name="timeseries",
    package="attn_timeseries",
    title="Forecast time series with published attention models, scored beside strong baselines",
    models=MODELS,
    datasets={**DATASETS, **traffic.DATASETS, **classification.DATASETS, **records.DATASETS},
    kinds=KINDS,
    kind_of_file="attn_timeseries.cli:kind_of_file",
    file_formats=f"{FILE_FORMATS} {traffic.FILE_FORMATS} {classification.FILE_FORMATS} {records.FILE_FORMATS}",
    file_suffixes=(*FILE_SUFFIXES, *classification.FILE_SUFFIXES),
    check_file="attn_timeseries.cli:check_file",
    commands={
        "demo": ("attn_timeseries.demo:main", "train, score and forecast the built-in data in about a minute"),
        "backtest": ("attn_timeseries.commands:backtest", "forecast from one moment after the other, and score it"),
        "export": ("attn_timeseries.commands:export", "write a trained forecaster as ONNX, checked and timed"),
    },
)


def kind_of_file(path: str) -> str:
    """The kind of task that a file of the user's own is for; `--kind` says another."""
    if records.is_records(path):
        return records.NAME
    if classification.is_labelled(Path(path)):
        return classification.NAME
    if traffic.is_traffic(path):
        return traffic.NAME
    return "forecast"


def check_file(path: Path, args: Any = None) -> list[str]:
    """What is wrong with a file of the user's own, a sentence each; `args` are the options of its kind's data."""
    kind = next((kind.name for kind in KINDS if type(args) is kind.data_config), None) or kind_of_file(str(path))
    if kind == records.NAME:
        from attn_timeseries.records.corpus import check_file as check_records

        return check_records(path, args)
    if kind == classification.NAME:
        from attn_timeseries.classification.cases import check_file as check_cases

        return check_cases(path, args)
    if kind == traffic.NAME:
        from attn_timeseries.traffic.data import check_file as check_sensors

        return check_sensors(path, args)
    from attn_timeseries.data.table import check_file as check_table

    return check_table(path, args)


def main(argv: list[str] | None = None) -> int:
    """Run the command; the exit status."""
    from attn_shared.cli import run

    return run(APP, argv)
