"""The task of classifying sequences: data, loss, scores, baselines, pictures."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from attn_genomics.config import MODELS
from attn_genomics.models.base import Backbone, Shape
from attn_genomics.models.heads import ClassHead
from attn_genomics.models.network import Classifier
from attn_genomics.sequences import metrics
from attn_genomics.sequences.data import load_bundle
from attn_genomics.sequences.options import SequencesTaskConfig
from attn_shared.app import load
from attn_shared.config import RunConfig
from attn_shared.errors import UserError
from attn_shared.task import DataBundle, Picture, Task

_LEAST = 1e-45  # below every float32 above 0


class SequencesTask(Task):
    """Tell the class of each sequence."""

    primary: ClassVar[str] = "mcc"
    maximize: ClassVar[bool] = True
    metric_format: ClassVar[Mapping[str, str]] = metrics.FORMATS

    def __init__(self, config: RunConfig, data_state: Mapping[str, Any]) -> None:
        super().__init__(config, data_state)
        self.options = options(config)
        self.classes: list[str] = list(data_state["classes"])
        backbone: Backbone = load(MODELS[config.model].target)(
            config.model_args,
            Shape(length=int(data_state["length"])),
            mixer=config.mixer,
            mixer_args=dict(config.mixer_args),
        )
        head = ClassHead(
            backbone.width,
            len(self.classes),
            pool=self.options.pool,
            bins=self.options.bins,
            hidden=self.options.hidden,
            dropout=self.options.dropout,
        )
        self.network = Classifier(backbone, head, self.options.rc)
        if self.options.freeze:
            backbone.requires_grad_(False)

    @property
    def model(self) -> Classifier:
        return self.network

    @classmethod
    def load_data(cls, config: RunConfig, *, state: Mapping[str, Any] | None = None) -> DataBundle:
        chosen = options(config)
        if state is None and chosen.start is not None and not Path(chosen.start).exists():
            raise UserError(f"--task_args.start: there is nothing at {chosen.start}")
        bundle = load_bundle(config, state)
        if state is None and chosen.class_weights:
            label = torch.as_tensor(bundle.train.label)  # type: ignore[union-attr]
            bundle.state["counts"] = torch.bincount(label, minlength=len(bundle.state["classes"])).tolist()
        return bundle

    def setup(self, stage: str) -> None:
        """Where training begins, the backbone takes what another run or published weights know."""
        if stage == "fit" and self.options.start is not None and self.global_step == 0:
            from attn_genomics.models.start import load_start

            load_start(self.network.backbone, Path(self.options.start))

    def train(self, mode: bool = True) -> SequencesTask:
        super().train(mode)
        if self.options.freeze:
            self.network.backbone.eval()
        return self

    # -- training and scores ------------------------------------------------------------------------------------------

    def training_loss(self, batch: Mapping[str, Tensor]) -> Tensor:
        scores = self.network(batch["tokens"], batch["lengths"])
        weight = None
        if self.options.class_weights:
            counts = scores.new_tensor(self.data_state["counts"]).clamp_min(1)
            weight = counts.sum() / (len(counts) * counts)
        return F.cross_entropy(scores, batch["label"], weight=weight, label_smoothing=self.options.smoothing)

    def forward_batch(self, batch: Mapping[str, Tensor]) -> Tensor:
        """(B, K) log probabilities, of both strands where they are averaged."""
        tokens, lengths = batch["tokens"], batch["lengths"]
        if self.options.rc == "average" and not self.training:
            return self.network.probabilities(tokens, lengths).double().clamp_min(_LEAST).log()
        scores: Tensor = self.network(tokens, lengths)
        return scores.double().log_softmax(dim=1)

    def update_metrics(self, split: str, batch: Mapping[str, Tensor]) -> None:
        self.gathered[split] |= metrics.pack(batch, self.forward_batch(batch))

    def compute_metrics(self, split: str, sums: Mapping[str, Tensor]) -> dict[str, float]:
        rows = metrics.unpack(sums)
        if rows is None:
            return {}
        return metrics.figures(rows, resamples=self.options.bootstrap if split == "test" else 0)

    def rows(self, split: str = "test") -> metrics.Rows | None:
        """The rows of the last evaluation of a split."""
        return metrics.unpack(self.gathered.get(split) or {})

    # -- beside the model ---------------------------------------------------------------------------------------------

    @classmethod
    def baselines(cls, config: RunConfig, bundle: DataBundle) -> list[dict[str, Any]]:
        from attn_genomics.sequences.baselines import rows

        return rows(bundle, options(config).bootstrap)

    def published(self) -> list[dict[str, Any]]:
        from attn_genomics.sequences.published import published

        return published(self.config.data)

    def pictures(self, bundle: DataBundle) -> Iterable[Picture]:
        from attn_genomics.sequences.plots import pictures

        return pictures(self, bundle)

    def predict_files(self, inputs: Sequence[Path], output: Path, options: Mapping[str, Any]) -> list[Path]:
        from attn_genomics.sequences.predict import predict_files

        return predict_files(self, inputs, output, options)


def options(config: RunConfig) -> SequencesTaskConfig:
    """The task's options, checked."""
    found: SequencesTaskConfig = config.task_args
    for name, least in (("bins", 1), ("hidden", 0), ("bootstrap", 0)):
        if getattr(found, name) < least:
            raise UserError(f"--task_args.{name} must be {least} or more, got {getattr(found, name)}")
    for name in ("dropout", "smoothing"):
        if not 0 <= getattr(found, name) < 1:
            raise UserError(f"--task_args.{name} must be 0 or more and below 1, got {getattr(found, name)}")
    if found.freeze and found.start is None:
        raise UserError(
            "--task_args.freeze trains the head alone; name what the rest starts from with --task_args.start"
        )
    return found
