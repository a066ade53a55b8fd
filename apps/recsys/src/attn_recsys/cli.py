"""The command `recsys`. Imports no torch."""

from __future__ import annotations

from attn_recsys.clicks.options import ClicksDataConfig, ClicksTaskConfig
from attn_recsys.config import MODELS
from attn_recsys.items.options import ItemsDataConfig, ItemsTaskConfig
from attn_shared.app import App, DataCard, Kind

KINDS = (
    Kind(
        name="items",
        title="rank items for users",
        task="attn_recsys.items.task:ItemsTask",
        data_config=ItemsDataConfig,
        task_config=ItemsTaskConfig,
        default_model="kgat",
        default_data="synthetic",
    ),
    Kind(
        name="clicks",
        title="predict clicks",
        task="attn_recsys.clicks.task:ClicksTask",
        data_config=ClicksDataConfig,
        task_config=ClicksTaskConfig,
        default_model="hiformer",
        default_data="synthetic_clicks",
    ),
)
DATASETS: dict[str, DataCard] = {}

APP = App(
    name="recsys",
    package="attn_recsys",
    title="Recommend with published graph-attention and feature-interaction models, ranked against everything",
    models=MODELS,
    datasets=DATASETS,
    kinds=KINDS,
)


def main(argv: list[str] | None = None) -> int:
    """Run the command; the exit status."""
    from attn_shared.cli import run

    return run(APP, argv)
