"""The command `medseg`. Imports no torch."""

from __future__ import annotations

from attn_medseg.config import MODELS
from attn_medseg.segment import cards as segment
from attn_medseg.segment.evaluate import FLAGS
from attn_medseg.segment.options import SegmentDataConfig, SegmentPredictOptions, SegmentTaskConfig
from attn_shared.app import App, Kind
from attn_shared.config import OptimConfig, TrainerConfig


def _segment_trainer() -> TrainerConfig:
    return TrainerConfig(max_epochs=40, batch_size=4, eval_batch_size=1, patience=None, gradient_clip=12.0)


def _segment_optim() -> OptimConfig:
    return OptimConfig(name="adamw", lr=1e-3, weight_decay=1e-4, schedule="cosine", warmup=20)


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
)

APP = App(
    name="medseg",
    package="attn_medseg",
    title="medical segmentation with attention, in 2-D and 3-D, scored as clinicians' challenges score",
    models=MODELS,
    datasets=segment.DATASETS,
    kinds=KINDS,
    file_formats=segment.FILE_FORMATS,
    file_suffixes=segment.FILE_SUFFIXES,
    check_file="attn_medseg.segment.check:check_file",
    commands={
        "score": (
            "attn_medseg.segment.evaluate:main",
            "masks of any tool, published protocols, a table of cases (eval --predictions, --protocol, --cases)",
        ),
    },
    eval_flags=FLAGS,
    eval_hint="`medseg score --help`: masks of any tool (--predictions), protocols (--protocol), --cases FILE.csv.",
)


def main(argv: list[str] | None = None) -> int:
    """Run the command; the exit status."""
    from attn_shared.cli import run

    return run(APP, argv)
