"""The task of classifying bags: data, loss, scores, baselines, pictures."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from attn_medseg.config import MODELS
from attn_medseg.models.mil import BagClassifier, BagOutput, BagShape
from attn_medseg.pathology.bags import metrics
from attn_medseg.pathology.bags.data import BagSet, load_bundle
from attn_medseg.pathology.bags.options import BagsTaskConfig
from attn_shared.app import load
from attn_shared.config import RunConfig
from attn_shared.errors import UserError
from attn_shared.task import DataBundle, Picture, Task


class BagsTask(Task):
    """Tell the class of a bag, and which of its instances tell it."""

    primary: ClassVar[str] = "accuracy"
    maximize: ClassVar[bool] = True
    chooser: ClassVar[str] = "loss"
    metric_format: ClassVar[Mapping[str, str]] = metrics.FORMAT
    weight: Tensor | None

    def __init__(self, config: RunConfig, data_state: Mapping[str, Any]) -> None:
        super().__init__(config, data_state)
        self.options = options(config)
        self.classes: tuple[str, ...] = tuple(data_state["classes"])
        self.network: BagClassifier = load(MODELS[config.model].target)(
            config.model_args, BagShape(int(data_state["features"]), len(self.classes))
        )
        counts = torch.tensor(data_state["counts"], dtype=torch.float32)
        weight = counts.sum() / (len(counts) * counts.clamp(min=1))
        self.register_buffer("weight", weight if self.options.class_weights else None, persistent=False)

    @property
    def model(self) -> BagClassifier:
        return self.network

    @classmethod
    def load_data(cls, config: RunConfig, *, state: Mapping[str, Any] | None = None) -> DataBundle:
        options(config)
        return load_bundle(config.data, config.data_args, seed=config.seed, state=state)

    def training_loss(self, batch: Mapping[str, Tensor]) -> Tensor:
        output = self.network(batch["x"], batch["mask"])
        return torch.stack(list(self.network.losses(output, batch["label"], weight=self.weight).values())).sum()

    def output(self, batch: Mapping[str, Tensor]) -> BagOutput:
        """What the model says of a batch."""
        kind = next(self.network.parameters()).dtype  # pictures and files come in float32 to a model in float64
        found: BagOutput = self.network(batch["x"].to(kind), batch["mask"])
        return found

    def forward_batch(self, batch: Mapping[str, Tensor]) -> Tensor:
        """(B, K) logits."""
        return self.output(batch).logits

    def update_metrics(self, split: str, batch: Mapping[str, Tensor]) -> None:
        chances = self.forward_batch(batch).double().softmax(dim=-1)
        for index, label, patient, chance in zip(
            batch["index"].tolist(), batch["label"].tolist(), batch["patient"].tolist(), chances
        ):
            self.gathered[split] |= metrics.pack(index, patient, label, chance)

    def compute_metrics(self, split: str, sums: Mapping[str, Tensor]) -> dict[str, float]:
        found = metrics.unpack(sums)
        if found is None:
            return {}
        self.gathered[split] = dict(sums)  # those of all processes, for the pictures
        return metrics.figures(found, resamples=self.options.bootstrap if split == "test" else 0)

    def scored(self, split: str = "test") -> metrics.Scored | None:
        """The predictions of the last evaluation of a split."""
        return metrics.unpack(self.gathered.get(split) or {})

    @classmethod
    def baselines(cls, config: RunConfig, bundle: DataBundle) -> list[dict[str, Any]]:
        from attn_medseg.pathology.bags.baselines import predictions

        if not isinstance(bundle.train, BagSet) or not isinstance(bundle.test, BagSet):
            return []
        resamples = options(config).bootstrap
        return [
            {"model": name, "note": note, **metrics.figures(found, resamples=resamples)}
            for name, (note, found) in predictions(bundle.train, bundle.test).items()
        ]

    def pictures(self, bundle: DataBundle) -> Iterable[Picture]:
        from attn_medseg.pathology.bags.plots import pictures

        return pictures(self, bundle)

    def predict_files(self, inputs: Sequence[Path], output: Path, options: Mapping[str, Any]) -> list[Path]:
        from attn_medseg.pathology.bags.predict import predict_files

        return predict_files(self, inputs, output, options)


def options(config: RunConfig) -> BagsTaskConfig:
    """The task's options, checked."""
    found: BagsTaskConfig = config.task_args
    if found.bootstrap < 0:
        raise UserError(f"--task_args.bootstrap must be 0 or more, got {found.bootstrap}")
    return found
