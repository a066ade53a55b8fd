"""The command `timeseries`. Imports no torch."""

from __future__ import annotations

from attn_shared.app import App, Kind
from attn_timeseries.config import MODELS, ForecastTaskConfig
from attn_timeseries.data.cards import DATASETS, FILE_FORMATS, FILE_SUFFIXES, ForecastDataConfig, ForecastPredictOptions
from attn_timeseries.traffic import cards as traffic

KINDS = (
    Kind(
        name="forecast",
        title="forecast tables of series",
        task="attn_timeseries.task:ForecastTask",
        data_config=ForecastDataConfig,
        task_config=ForecastTaskConfig,
        predict_options=ForecastPredictOptions,
        default_model="patchtst",
        default_data="co2",
    ),
    traffic.KIND,
)

APP = App(
    name="timeseries",
    package="attn_timeseries",
    title="Forecast time series with published attention models, scored beside strong baselines",
    models=MODELS,
    datasets={**DATASETS, **traffic.DATASETS},
    kinds=KINDS,
    kind_of_file="attn_timeseries.cli:kind_of_file",
    file_formats=f"{FILE_FORMATS} {traffic.FILE_FORMATS}",
    file_suffixes=FILE_SUFFIXES,
    check_file="attn_timeseries.data.table:check_file",
    commands={"demo": ("attn_timeseries.demo:main", "train, score and forecast the built-in data in about a minute")},
)


def kind_of_file(path: str) -> str:
    """The kind of task that a file of the user's own is for; `--kind` says another."""
    if traffic.is_traffic(path):
        return traffic.NAME
    return "forecast"


def main(argv: list[str] | None = None) -> int:
    """Run the command; the exit status."""
    from attn_shared.cli import run

    return run(APP, argv)
