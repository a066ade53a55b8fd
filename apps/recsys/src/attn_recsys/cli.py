"""The command `recsys`. Imports no torch."""

from __future__ import annotations

from pathlib import Path

from attn_recsys.clicks import cards as clicks
from attn_recsys.clicks.options import ClicksDataConfig, ClicksTaskConfig
from attn_recsys.config import MODELS
from attn_recsys.items import cards as items
from attn_recsys.items.options import ItemsDataConfig, ItemsPredictOptions, ItemsTaskConfig
from attn_shared.app import App, DataCard, Kind
from attn_shared.config import OptimConfig, TrainerConfig


def _items_trainer() -> TrainerConfig:
    return TrainerConfig(max_epochs=100, batch_size=1024, eval_batch_size=256, patience=10, log_every=50)


def _items_optim() -> OptimConfig:
    return OptimConfig(lr=1e-3, schedule="constant")


def _clicks_trainer() -> TrainerConfig:
    return TrainerConfig(max_epochs=30, batch_size=256, eval_batch_size=2048, patience=3, log_every=50)


def _clicks_optim() -> OptimConfig:
    return OptimConfig(lr=1e-3, schedule="constant")


KINDS = (
    Kind(
        name="items",
        title="rank items for users",
        task="attn_recsys.items.task:ItemsTask",
        data_config=ItemsDataConfig,
        task_config=ItemsTaskConfig,
        default_model="kgat",
        default_data="synthetic",
        predict_options=ItemsPredictOptions,
        trainer_defaults=_items_trainer,
        optim_defaults=_items_optim,
    ),
    Kind(
        name="clicks",
        title="predict clicks",
        task="attn_recsys.clicks.task:ClicksTask",
        data_config=ClicksDataConfig,
        task_config=ClicksTaskConfig,
        default_model="hiformer",
        default_data="synthetic_clicks",
        trainer_defaults=_clicks_trainer,
        optim_defaults=_clicks_optim,
    ),
)
DATASETS: dict[str, DataCard] = {**items.DATASETS, **clicks.DATASETS}

APP = App(
    name="recsys",
    package="attn_recsys",
    title="Recommend with published graph-attention and feature-interaction models, ranked against everything",
    models=MODELS,
    datasets=DATASETS,
    kinds=KINDS,
    kind_of_file="attn_recsys.cli:kind_of_file",
    file_formats=f"{items.FILE_FORMATS} {clicks.FILE_FORMATS}",
    file_suffixes=items.FILE_SUFFIXES,
    check_file="attn_recsys.cli:check_file",
    commands={
        "recommend": (
            "attn_recsys.items.recommend_command:main",
            "users in, their best items with scores and reasons out",
        ),
        "export": (
            "attn_recsys.clicks.export_command:main",
            "write a trained click model as ONNX, checked and timed",
        ),
    },
)


def kind_of_file(path: str) -> str:
    """The kind of task that a file of the user's own is for: clicks where it has a column of labels, else items."""
    return "clicks" if "label" in items.roles(Path(path)) | clicks.parquet_roles(Path(path)) else "items"


def check_file(path: Path) -> list[str]:
    """What is wrong with a file of the user's own, a sentence each."""
    if kind_of_file(str(path)) == "clicks":
        from attn_recsys.clicks.readers import check_file as check_clicks

        return check_clicks(path)
    from attn_recsys.items.readers import check_file as check_items

    return check_items(path)


def main(argv: list[str] | None = None) -> int:
    """Run the command; the exit status."""
    from attn_shared.cli import run

    return run(APP, argv)
