"""The command `medseg`. Imports no torch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from attn_medseg.config import MODELS
from attn_medseg.pathology import tables
from attn_medseg.pathology.bags import cards as bags
from attn_medseg.pathology.bags.options import BagsDataConfig, BagsPredictOptions, BagsTaskConfig
from attn_medseg.pathology.survival import cards as survival
from attn_medseg.pathology.survival.options import SurvivalDataConfig, SurvivalPredictOptions, SurvivalTaskConfig
from attn_medseg.segment import cards as segment
from attn_medseg.segment.evaluate import FLAGS
from attn_medseg.segment.options import SegmentDataConfig, SegmentPredictOptions, SegmentTaskConfig
from attn_shared.app import App, DataCard, Kind
from attn_shared.config import OptimConfig, TrainerConfig


def _segment_trainer() -> TrainerConfig:
    return TrainerConfig(max_epochs=40, batch_size=4, eval_batch_size=1, patience=None, gradient_clip=12.0)


def _segment_optim() -> OptimConfig:
    return OptimConfig(name="adamw", lr=1e-3, weight_decay=1e-4, schedule="cosine", warmup=20)


def _bags_trainer() -> TrainerConfig:
    return TrainerConfig(max_epochs=50, batch_size=1, eval_batch_size=1, patience=None)


def _bags_optim() -> OptimConfig:
    return OptimConfig(name="adamw", lr=1e-4, weight_decay=1e-5, schedule="cosine")


def _survival_trainer() -> TrainerConfig:
    return TrainerConfig(max_epochs=20, batch_size=32, eval_batch_size=8, patience=None)


def _survival_optim() -> OptimConfig:
    return OptimConfig(name="adam", lr=2e-4, weight_decay=1e-5, schedule="constant")


KINDS = (
    Kind(
        name="segment",
        title="segment images and volumes",
        task="attn_medseg.segment.task:SegmentTask",
        data_config=SegmentDataConfig,
        task_config=SegmentTaskConfig,
        default_model="unet",
        default_data="synthetic",
        predict_options=SegmentPredictOptions,
        file_suffixes=segment.FILE_SUFFIXES,
        trainer_defaults=_segment_trainer,
        optim_defaults=_segment_optim,
    ),
    Kind(
        name="bags",
        title="classify bags of instances",
        task="attn_medseg.pathology.bags.task:BagsTask",
        data_config=BagsDataConfig,
        task_config=BagsTaskConfig,
        default_model="acmil",
        default_data="synthetic_bags",
        predict_options=BagsPredictOptions,
        file_suffixes=bags.FILE_SUFFIXES,
        trainer_defaults=_bags_trainer,
        optim_defaults=_bags_optim,
    ),
    Kind(
        name="survival",
        title="tell survival",
        task="attn_medseg.pathology.survival.task:SurvivalTask",
        data_config=SurvivalDataConfig,
        task_config=SurvivalTaskConfig,
        default_model="motcat",
        default_data="synthetic_survival",
        predict_options=SurvivalPredictOptions,
        file_suffixes=survival.FILE_SUFFIXES,
        trainer_defaults=_survival_trainer,
        optim_defaults=_survival_optim,
    ),
)
DATASETS: dict[str, DataCard] = {**segment.DATASETS, **bags.DATASETS, **survival.DATASETS}

APP = App(
    name="medseg",
    package="attn_medseg",
    title="medical segmentation with attention, in 2-D and 3-D, scored as clinicians' challenges score",
    models=MODELS,
    datasets=DATASETS,
    kinds=KINDS,
    kind_of_file="attn_medseg.cli:kind_of_file",
    file_formats=f"{segment.FILE_FORMATS} {bags.FILE_FORMATS} {survival.FILE_FORMATS}",
    file_suffixes=(*segment.FILE_SUFFIXES, *bags.FILE_SUFFIXES),
    check_file="attn_medseg.cli:check_file",
    commands={
        "crossval": (
            "attn_medseg.pathology.crossval:main",
            "bags and survival: train every fold, repeatedly, and score what the folds say together",
        ),
        "score": (
            "attn_medseg.segment.evaluate:main",
            "masks of any tool, published protocols, a table of cases (eval --predictions, --protocol, --cases)",
        ),
    },
    eval_flags=FLAGS,
    eval_hint="`medseg score --help`: masks of any tool (--predictions), protocols (--protocol), --cases FILE.csv.",
)


def kind_of_file(path: str) -> str:
    """The kind of task that a file or folder of the user's own is for: images are to be segmented."""
    return tables.kind_of(Path(path)) or KINDS[0].name


def check_file(path: Path, args: Any = None) -> list[str]:
    """What is wrong with a file or folder of the user's own, a sentence each.

    Args:
        args: options of the data; None = the defaults of the kind that the path looks like.
    """
    kind = kind_of_file(str(path)) if args is None else ""
    if kind == "survival" or isinstance(args, SurvivalDataConfig):
        from attn_medseg.pathology.survival.check import check_file as check_survival

        return check_survival(path, args)
    if kind == "bags" or isinstance(args, BagsDataConfig):
        from attn_medseg.pathology.bags.check import check_file as check_bags

        return check_bags(path, args)
    from attn_medseg.segment.check import check_file as check_images

    return check_images(path, args)


def main(argv: list[str] | None = None) -> int:
    """Run the command; the exit status."""
    from attn_shared.cli import run

    return run(APP, argv)
