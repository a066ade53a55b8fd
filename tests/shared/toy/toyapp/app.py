from __future__ import annotations

from dataclasses import dataclass

from attn_shared.app import App, DataCard, ModelCard
from attn_shared.cli import run
from attn_shared.config import OptimConfig, TrainerConfig


@dataclass(kw_only=True)
class MlpConfig:
    """A perceptron.

    Attributes:
        width: hidden units.
        dropout: share of hidden units
            left out in training.
        sizes: unused, a tuple.
    """

    width: int = 16
    dropout: float = 0.2
    sizes: tuple[int, ...] = (1, 2)


@dataclass(kw_only=True)
class MeanConfig:
    """The training mean."""


@dataclass(kw_only=True)
class ToyData:
    """Made-up points.

    Attributes:
        samples: training points.
        noise: standard deviation of the noise.
    """

    samples: int = 200
    noise: float = 0.1


@dataclass(kw_only=True)
class ToyPredict:
    """Options of predict.

    Attributes:
        digits: digits after the point.
    """

    digits: int = 6


def card(name: str) -> DataCard:
    return DataCard(
        name=name,
        title="Made-up points",
        task="regression",
        licence="CC0-1.0",
        source="made here",
        size="any",
        split="by draw",
        citation="none",
        synthetic=True,
        embedded=True,
    )


MODELS = (
    ModelCard(name="mlp", title="A perceptron", source="toy", year=1986, target="toyapp.task:Mlp", config=MlpConfig),
    ModelCard(
        name="mixing",
        title="Attention over features",
        source="toy",
        year=2017,
        target="toyapp.task:Mixing",
        config=MlpConfig,
        mixer="softmax",
        mixer_patterns=("noncausal_self",),
    ),
    ModelCard(
        name="mean",
        title="The training mean",
        source="toy",
        year=1800,
        target="toyapp.task:Mean",
        config=MeanConfig,
        trainable=False,
    ),
)

APP = App(
    name="toyapp",
    package="toyapp",
    title="synthetic regression",
    models={model.name: model for model in MODELS},
    datasets={name: card(name) for name in ("points", "other")},
    data_config=ToyData,
    default_model="mlp",
    default_data="points",
    task="toyapp.task:ToyTask",
    file_suffixes=(".csv",),
    predict_options=ToyPredict,
    trainer_defaults=lambda: TrainerConfig(max_epochs=3, batch_size=16, eval_batch_size=64, log_every=1, threads=1),
    optim_defaults=lambda: OptimConfig(lr=1e-2, schedule="constant"),
)


def main(argv: list[str] | None = None) -> int:
    return run(APP, argv)
