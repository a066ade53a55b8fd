"""The task of modelling the language of genomes: data, loss, scores, baselines, pictures."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

from torch import Tensor

from attn_genomics.config import MODELS
from attn_genomics.genome import metrics
from attn_genomics.genome.data import load_bundle
from attn_genomics.genome.options import GenomeTaskConfig
from attn_genomics.models.base import Backbone, Shape
from attn_genomics.models.network import LanguageModel
from attn_shared.app import load
from attn_shared.config import RunConfig
from attn_shared.errors import UserError
from attn_shared.task import DataBundle, Picture, Task


class GenomeTask(Task):
    """Tell each base from those before it, or from those around it."""

    primary: ClassVar[str] = "bits per base"
    maximize: ClassVar[bool] = False
    metric_format: ClassVar[Mapping[str, str]] = metrics.FORMATS

    def __init__(self, config: RunConfig, data_state: Mapping[str, Any]) -> None:
        super().__init__(config, data_state)
        self.options = options(config)
        self.network = LanguageModel(
            backbone(config, int(data_state["length"])),
            self.options.rc,
            self.options.objective,
            self.options.dropout,
            self.options.mask,
        )

    @property
    def model(self) -> LanguageModel:
        return self.network

    @classmethod
    def load_data(cls, config: RunConfig, *, state: Mapping[str, Any] | None = None) -> DataBundle:
        chosen = options(config)
        if state is None and chosen.start is not None and not Path(chosen.start).exists():
            raise UserError(f"--task_args.start: there is nothing at {chosen.start}")
        bundle = load_bundle(config, state, centred=objective(config) == "masked")
        what = "from the bases before it" if objective(config) == "next" else "from those on both sides"
        bundle.protocol += f"; each base told {what}"
        return bundle

    def setup(self, stage: str) -> None:
        """Where training begins, the backbone takes what another run or published weights know."""
        if stage == "fit" and self.options.start is not None and self.global_step == 0:
            from attn_genomics.models.start import load_start

            load_start(self.network.backbone, Path(self.options.start))

    # -- training and scores ------------------------------------------------------------------------------------------

    def training_loss(self, batch: Mapping[str, Tensor]) -> Tensor:
        return self.network.loss(batch["tokens"])

    def forward_batch(self, batch: Mapping[str, Tensor]) -> Tensor:
        """(B, L, 4) logits."""
        return self.network.scores(batch["tokens"])

    def update_metrics(self, split: str, batch: Mapping[str, Tensor]) -> None:
        metrics.join(self.gathered[split], metrics.pack(batch, self.network.log_probabilities(batch["tokens"])))

    def compute_metrics(self, split: str, sums: Mapping[str, Tensor]) -> dict[str, float]:
        scores = metrics.unpack(sums)
        return {} if scores is None else metrics.figures(scores, intervals=split == "test")

    def scores(self, split: str = "test") -> metrics.Scores | None:
        """What the last evaluation of a split gathered."""
        return metrics.unpack(self.gathered.get(split) or {})

    # -- beside the model ---------------------------------------------------------------------------------------------

    @classmethod
    def baselines(cls, config: RunConfig, bundle: DataBundle) -> list[dict[str, Any]]:
        from attn_genomics.genome.baselines import rows

        return rows(bundle, objective(config))

    def pictures(self, bundle: DataBundle) -> Iterable[Picture]:
        from attn_genomics.genome.plots import pictures

        return pictures(self, bundle)

    def predict_files(self, inputs: Sequence[Path], output: Path, options: Mapping[str, Any]) -> list[Path]:
        from attn_genomics.genome.predict import predict_files

        return predict_files(self, inputs, output, options)


def backbone(config: RunConfig, length: int) -> Backbone:
    """The model's backbone for windows of `length` bases."""
    made: Backbone = load(MODELS[config.model].target)(
        config.model_args, Shape(length=length), mixer=config.mixer, mixer_args=dict(config.mixer_args)
    )
    return made


def objective(config: RunConfig) -> Literal["next", "masked"]:
    """What is learned, "auto" resolved."""
    import torch

    chosen: Literal["auto", "next", "masked"] = config.task_args.objective
    if chosen != "auto":
        return chosen
    try:
        with torch.device("meta"):
            return "next" if backbone(config, 64).causal else "masked"
    except ValueError:  # the task says what is wrong with the model's options
        return "next"


def options(config: RunConfig) -> GenomeTaskConfig:
    """The task's options, checked."""
    found: GenomeTaskConfig = config.task_args
    if not 0 < found.mask < 1:
        raise UserError(f"--task_args.mask must lie between 0 and 1, got {found.mask}")
    if not 0 <= found.dropout < 1:
        raise UserError(f"--task_args.dropout must be 0 or more and below 1, got {found.dropout}")
    return found
