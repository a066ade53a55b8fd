"""The task of predicting clicks: data, loss, scores, baselines, pictures."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor

from attn_recsys.clicks import metrics
from attn_recsys.clicks.data import load_table, prepare
from attn_recsys.clicks.encode import Encoder
from attn_recsys.clicks.options import ClicksTaskConfig
from attn_recsys.config import MODELS
from attn_recsys.models.clicks import ClickModel
from attn_shared.app import load
from attn_shared.config import RunConfig
from attn_shared.errors import UserError
from attn_shared.task import DataBundle, Picture, Task


class ClicksTask(Task):
    """Predict, for each impression, the probability of a click."""

    primary: ClassVar[str] = "auc"
    maximize: ClassVar[bool] = True
    metric_format: ClassVar[Mapping[str, str]] = metrics.FORMATS

    def __init__(self, config: RunConfig, data_state: Mapping[str, Any]) -> None:
        super().__init__(config, data_state)
        self.options = options(config)
        self.encoder = Encoder(data_state)
        try:
            self.network: ClickModel = load(MODELS[config.model].target)(
                config.model_args, self.encoder.shape, mixer=config.mixer, mixer_args=dict(config.mixer_args)
            )
        except ValueError as error:
            raise UserError(f"model {config.model!r}: {error}") from None

    @property
    def model(self) -> ClickModel:
        return self.network

    @classmethod
    def load_data(cls, config: RunConfig, *, state: Mapping[str, Any] | None = None) -> DataBundle:
        prepared = prepare(load_table(config.data, config.data_args, state), config.data_args, state)
        return DataBundle(
            train=prepared.train,
            val=prepared.val,
            test=prepared.test,
            state=prepared.state,
            facts=prepared.facts,
            protocol=prepared.protocol,
        )

    # -- training and scores ------------------------------------------------------------------------------------------

    def training_loss(self, batch: Mapping[str, Tensor]) -> Tensor:
        return self.network.loss(batch)

    def forward_batch(self, batch: Mapping[str, Tensor]) -> Tensor:
        """(B,) log odds."""
        found: Tensor = self.network(batch)
        return found

    def update_metrics(self, split: str, batch: Mapping[str, Tensor]) -> None:
        self.gathered[split] |= metrics.pack(batch, self.forward_batch(batch))

    def compute_metrics(self, split: str, sums: Mapping[str, Tensor]) -> dict[str, float]:
        rows = metrics.unpack(sums)
        if rows is None:
            return {}
        return metrics.figures(rows, groups=self.options.groups, bins=self.options.bins, intervals=split == "test")

    def rows(self, split: str = "test") -> metrics.Rows | None:
        """The rows of the last evaluation of a split."""
        return metrics.unpack(self.gathered.get(split) or {})

    # -- beside the model ---------------------------------------------------------------------------------------------

    @classmethod
    def baselines(cls, config: RunConfig, bundle: DataBundle) -> list[dict[str, Any]]:
        from attn_recsys.clicks.baselines import rows

        return rows(bundle, options(config))

    def pictures(self, bundle: DataBundle) -> Iterable[Picture]:
        from attn_recsys.clicks.plots import pictures

        return pictures(self, bundle)

    def predict_files(self, inputs: Sequence[Path], output: Path, options: Mapping[str, Any]) -> list[Path]:
        from attn_recsys.clicks.predict import predict_files

        return predict_files(self, inputs, output)


def options(config: RunConfig) -> ClicksTaskConfig:
    """The task's options, checked."""
    found: ClicksTaskConfig = config.task_args
    if found.bins < 1:
        raise UserError(f"--task_args.bins must be 1 or more, got {found.bins}")
    if found.groups < 0:
        raise UserError(f"--task_args.groups must be 0 or more, got {found.groups}")
    return found
