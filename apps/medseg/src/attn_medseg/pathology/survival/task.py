"""The task of survival: data, loss, scores, baselines, pictures."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor

from attn_medseg.config import MODELS
from attn_medseg.models.motcat import SurvivalModel, SurvivalOutput, SurvivalShape, nll
from attn_medseg.pathology.survival import metrics
from attn_medseg.pathology.survival.data import PatientSet, load_bundle
from attn_medseg.pathology.survival.options import SurvivalTaskConfig
from attn_shared.app import load
from attn_shared.config import RunConfig
from attn_shared.errors import UserError
from attn_shared.task import DataBundle, Picture, Task


class SurvivalTask(Task):
    """Rank patients by when the event comes, and tell its chance over time."""

    primary: ClassVar[str] = "c_index"
    maximize: ClassVar[bool] = True
    chooser: ClassVar[str] = "loss"
    metric_format: ClassVar[Mapping[str, str]] = metrics.FORMAT

    def __init__(self, config: RunConfig, data_state: Mapping[str, Any]) -> None:
        super().__init__(config, data_state)
        self.options = options(config)
        self.network: SurvivalModel = model_class(config)(
            config.model_args,
            SurvivalShape(
                groups=tuple(len(own) for own in data_state["groups"].values()),
                patches=int(data_state["patches"]),
                intervals=len(data_state["edges"]) - 1,
            ),
        )

    @property
    def model(self) -> SurvivalModel:
        return self.network

    @classmethod
    def load_data(cls, config: RunConfig, *, state: Mapping[str, Any] | None = None) -> DataBundle:
        options(config)
        needs = model_class(config).needs
        return load_bundle(config.data, config.data_args, needs=needs, seed=config.seed, state=state)

    def training_loss(self, batch: Mapping[str, Tensor]) -> Tensor:
        return nll(self.output(batch), batch["interval"], batch["event"], alpha=self.options.alpha).mean()

    def output(self, batch: Mapping[str, Tensor]) -> SurvivalOutput:
        """What the model says of a batch."""
        kind = next(self.network.parameters()).dtype  # pictures and files come in float32 to a model in float64
        found: SurvivalOutput = self.network(batch["genes"].to(kind), batch["x"].to(kind), batch["mask"])
        return found

    def forward_batch(self, batch: Mapping[str, Tensor]) -> Tensor:
        """(B, K) logits of the hazards."""
        return self.output(batch).logits

    def update_metrics(self, split: str, batch: Mapping[str, Tensor]) -> None:
        output = self.output(batch)
        losses = nll(output, batch["interval"], batch["event"])
        rows = zip(
            *(batch[name].tolist() for name in ("index", "time", "event")),
            output.risk.tolist(),
            losses.tolist(),
            output.survival,
        )
        for row in rows:
            self.gathered[split] |= metrics.pack(*row)

    def compute_metrics(self, split: str, sums: Mapping[str, Tensor]) -> dict[str, float]:
        found = metrics.unpack(sums)
        if found is None:
            return {}
        self.gathered[split] = dict(sums)  # those of all processes, for the pictures
        return metrics.figures(found, self.data_state, resamples=self.options.bootstrap if split == "test" else 0)

    def scored(self, split: str = "test") -> metrics.Scored | None:
        """The predictions of the last evaluation of a split."""
        return metrics.unpack(self.gathered.get(split) or {})

    @classmethod
    def baselines(cls, config: RunConfig, bundle: DataBundle) -> list[dict[str, Any]]:
        from attn_medseg.pathology.survival.baselines import predictions

        if not isinstance(bundle.train, PatientSet) or not isinstance(bundle.test, PatientSet):
            return []
        resamples = options(config).bootstrap
        return [
            {"model": name, "note": note, **metrics.figures(found, bundle.state, resamples=resamples)}
            for name, (note, found) in predictions(bundle.train, bundle.test).items()
        ]

    def pictures(self, bundle: DataBundle) -> Iterable[Picture]:
        from attn_medseg.pathology.survival.plots import pictures

        return pictures(self, bundle)

    def predict_files(self, inputs: Sequence[Path], output: Path, options: Mapping[str, Any]) -> list[Path]:
        from attn_medseg.pathology.survival.predict import predict_files

        return predict_files(self, inputs, output, options)


def model_class(config: RunConfig) -> type[SurvivalModel]:
    """The class that does survival under the model's name."""
    card = MODELS[config.model]
    found: type[SurvivalModel] = load(card.targets.get("survival", card.target))
    return found


def options(config: RunConfig) -> SurvivalTaskConfig:
    """The task's options, checked."""
    found: SurvivalTaskConfig = config.task_args
    if not 0 <= found.alpha < 1:
        raise UserError(f"--task_args.alpha must be 0 or more and below 1, got {found.alpha:g}")
    if found.bootstrap < 0:
        raise UserError(f"--task_args.bootstrap must be 0 or more, got {found.bootstrap}")
    return found
