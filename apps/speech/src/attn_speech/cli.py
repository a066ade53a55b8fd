"""The command `speech`. Imports no torch."""

from __future__ import annotations

from attn_shared.app import App
from attn_shared.config import OptimConfig, TrainerConfig
from attn_speech.config import MODELS
from attn_speech.data.cards import DATASETS, FILE_FORMATS, FILE_SUFFIXES
from attn_speech.data.options import SpeechDataConfig
from attn_speech.options import PredictOptions, SpeechTaskConfig


def _trainer() -> TrainerConfig:
    return TrainerConfig(max_epochs=20, batch_size=4, eval_batch_size=4, patience=None, gradient_clip=5.0)


def _optim() -> OptimConfig:
    return OptimConfig(name="adam", lr=1e-3, schedule="cosine")


APP = App(
    name="speech",
    package="attn_speech",
    title="Separate voices with published attention models, on recordings of any length",
    models=MODELS,
    datasets=DATASETS,
    data_config=SpeechDataConfig,
    task_config=SpeechTaskConfig,
    default_model="mossformer",
    default_data="synthetic",
    task="attn_speech.task:SpeechTask",
    file_formats=FILE_FORMATS,
    file_suffixes=FILE_SUFFIXES,
    check_file="attn_speech.data.check:check_file",
    predict_options=PredictOptions,
    commands={
        "score": (
            "attn_speech.scoring:main",
            "figures of voices that are there as files (eval --estimates)",
        ),
        "mix": ("attn_speech.export:main", "write a data set's mixtures and voices as files, for other programs"),
    },
    trainer_defaults=_trainer,
    optim_defaults=_optim,
    eval_flags=("--estimates",),
    eval_hint="`speech eval --estimates DIR --data NAME_OR_PATH` scores voices that are there as files.",
)


def main(argv: list[str] | None = None) -> int:
    """Run the command; the exit status."""
    from attn_shared.cli import run

    return run(APP, argv)
