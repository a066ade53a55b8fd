"""The command `eeg`. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass

from attn_eeg.config import MODELS
from attn_eeg.data.cards import DATASETS, FILE_FORMATS, FILE_SUFFIXES, EegDataConfig
from attn_shared.app import App
from attn_shared.config import OptimConfig, TrainerConfig


@dataclass(kw_only=True)
class PredictOptions:
    """How files of one's own are classified.

    Attributes:
        stride: seconds between the starts of windows; 0 = as in the model's evaluation.
        interpolate: compute electrodes that a file lacks from their neighbours, up to a third of all; false = refuse
            the file.
        rate: sampling rate of files that do not say it (ARFF, plain arrays), Hz; 0 = as in training.
    """

    stride: float = 0.0
    interpolate: bool = False
    rate: float = 0.0


def _trainer() -> TrainerConfig:
    return TrainerConfig(max_epochs=40, batch_size=64, patience=None)


def _optim() -> OptimConfig:
    return OptimConfig(name="adamw", lr=1e-3, weight_decay=1e-3, schedule="cosine")


APP = App(
    name="eeg",
    package="attn_eeg",
    title="Classify EEG with published attention models, under splits that do not flatter them",
    models=MODELS,
    datasets=DATASETS,
    data_config=EegDataConfig,
    default_model="rbtransformer",
    default_data="synthetic",
    task="attn_eeg.task:EegTask",
    file_formats=FILE_FORMATS,
    file_suffixes=FILE_SUFFIXES,
    check_file="attn_eeg.data.corpus:check_file",
    predict_options=PredictOptions,
    commands={"audit": ("attn_eeg.audit:main", "show how much a split flatters: 1-NN and LDA beside unseen subjects")},
    trainer_defaults=_trainer,
    optim_defaults=_optim,
)


def main(argv: list[str] | None = None) -> int:
    """Run the command; the exit status."""
    from attn_shared.cli import run

    return run(APP, argv)
