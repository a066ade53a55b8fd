"""The command `timeseries`. Imports no torch."""

from __future__ import annotations

from attn_shared.app import App
from attn_shared.config import OptimConfig, TrainerConfig
from attn_timeseries.config import MODELS
from attn_timeseries.data.cards import DATASETS, FILE_FORMATS, FILE_SUFFIXES, ForecastDataConfig

APP = App(
    name="timeseries",
    package="attn_timeseries",
    title="Forecast time series with published attention models, scored beside strong baselines",
    models=MODELS,
    datasets=DATASETS,
    data_config=ForecastDataConfig,
    default_model="patchtst",
    default_data="co2",
    task="attn_timeseries.task:ForecastTask",
    file_formats=FILE_FORMATS,
    file_suffixes=FILE_SUFFIXES,
    check_file="attn_timeseries.data.table:check_file",
    commands={"demo": ("attn_timeseries.demo:main", "train, score and forecast the built-in data in about a minute")},
    trainer_defaults=TrainerConfig,
    optim_defaults=OptimConfig,
)


def main(argv: list[str] | None = None) -> int:
    """Run the command; the exit status."""
    from attn_shared.cli import run

    return run(APP, argv)
