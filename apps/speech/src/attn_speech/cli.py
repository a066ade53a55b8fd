"""The command `speech`. Imports no torch."""

from __future__ import annotations

from attn_shared.app import App, DataCard
from attn_speech.config import MODELS
from attn_speech.data.options import SpeechDataConfig

DATASETS: dict[str, DataCard] = {}

APP = App(
    name="speech",
    package="attn_speech",
    title="Separate voices with published attention models, on recordings of any length",
    models=MODELS,
    datasets=DATASETS,
    data_config=SpeechDataConfig,
    default_model="mossformer",
    default_data="synthetic",
    task="attn_speech.task:SpeechTask",
)


def main(argv: list[str] | None = None) -> int:
    """Run the command; the exit status."""
    from attn_shared.cli import run

    return run(APP, argv)
