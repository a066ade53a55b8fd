"""The command `genomics`. Imports no torch."""

from __future__ import annotations

from pathlib import Path

from attn_genomics.config import MODELS
from attn_genomics.genome import cards as genome
from attn_genomics.genome.options import GenomeDataConfig, GenomePredictOptions, GenomeTaskConfig
from attn_genomics.sequences import cards as sequences
from attn_genomics.sequences.options import SequencesDataConfig, SequencesPredictOptions, SequencesTaskConfig
from attn_shared.app import App, DataCard, Kind
from attn_shared.config import OptimConfig, TrainerConfig


def _sequences_trainer() -> TrainerConfig:
    return TrainerConfig(max_epochs=20, batch_size=64, eval_batch_size=256, patience=5, gradient_clip=1.0, log_every=20)


def _genome_trainer() -> TrainerConfig:
    return TrainerConfig(max_epochs=5, batch_size=8, eval_batch_size=16, patience=3, gradient_clip=1.0, log_every=20)


def _optim() -> OptimConfig:
    return OptimConfig(name="adamw", lr=2e-3, weight_decay=0.01, schedule="cosine", warmup=50)


KINDS = (
    Kind(
        name="sequences",
        title="classify sequences",
        task="attn_genomics.sequences.task:SequencesTask",
        data_config=SequencesDataConfig,
        task_config=SequencesTaskConfig,
        default_model="bigla",
        default_data="synthetic",
        predict_options=SequencesPredictOptions,
        file_suffixes=sequences.FILE_SUFFIXES,
        trainer_defaults=_sequences_trainer,
        optim_defaults=_optim,
    ),
    Kind(
        name="genome",
        title="model the language of genomes",
        task="attn_genomics.genome.task:GenomeTask",
        data_config=GenomeDataConfig,
        task_config=GenomeTaskConfig,
        default_model="hybridna",
        default_data="synthetic_genome",
        predict_options=GenomePredictOptions,
        file_suffixes=genome.FILE_SUFFIXES,
        trainer_defaults=_genome_trainer,
        optim_defaults=_optim,
    ),
)
DATASETS: dict[str, DataCard] = {**sequences.DATASETS, **genome.DATASETS}

APP = App(
    name="genomics",
    package="attn_genomics",
    title="DNA language models and sequence tasks, from FASTA to predictions, with honest baselines",
    models=MODELS,
    datasets=DATASETS,
    kinds=KINDS,
    kind_of_file="attn_genomics.cli:kind_of_file",
    file_formats=f"{sequences.FILE_FORMATS} {genome.FILE_FORMATS}",
    file_suffixes=(*sequences.FILE_SUFFIXES, *genome.FILE_SUFFIXES),
    check_file="attn_genomics.data.check:check_file",
    commands={
        "pretrain": ("attn_genomics.commands.pretrain:main", "train a language model on a genome"),
        "generate": ("attn_genomics.commands.generate:main", "draw sequences from a language model"),
        "score-variants": (
            "attn_genomics.commands.score_variants:main",
            "what the variants of a VCF change, by any trained model",
        ),
        "mutagenesis": (
            "attn_genomics.commands.mutagenesis:main",
            "what every possible change of a sequence does, as a table and a picture",
        ),
    },
)


def kind_of_file(path: str) -> str:
    """The kind of task that a file of the user's own is for: one FASTA file is a genome, all else is sequences."""
    return "genome" if Path(path).name.lower().endswith(genome.FILE_SUFFIXES) else "sequences"


def main(argv: list[str] | None = None) -> int:
    """Run the command; the exit status."""
    from attn_shared.cli import run

    return run(APP, argv)
