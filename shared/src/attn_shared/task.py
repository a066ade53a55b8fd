"""What an application implements: one Task. The engine (trainer.py, compare.py, report.py) does the rest."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import lightning
import torch
from torch import Tensor

from attn_shared.bundle import DataBundle
from attn_shared.config import RunConfig

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True, kw_only=True)
class Sound:
    """A recording to listen to, as the bytes of a file that browsers play; `kind` is its MIME type."""

    name: str
    data: bytes
    kind: str = "audio/flac"


@dataclass(kw_only=True)
class Picture:
    """A figure for the report, and what is to be heard with it."""

    name: str
    caption: str
    figure: Figure
    sounds: Sequence[Sound] = ()


def make_optimizer(parameters: Any, config: RunConfig) -> torch.optim.Optimizer:
    """Adam, AdamW or SGD over parameters or parameter groups, as `config.optim` says."""
    optim = config.optim
    # One kernel for all parameters; with mixed precision Lightning could not clip gradients before it.
    common: dict[str, Any] = {
        "lr": optim.lr,
        "weight_decay": optim.weight_decay,
        "fused": "mixed" not in config.trainer.precision,
    }
    if optim.name == "sgd":
        return torch.optim.SGD(parameters, momentum=optim.betas[0], **common)
    kind = torch.optim.AdamW if optim.name == "adamw" else torch.optim.Adam
    return kind(parameters, betas=optim.betas, **common)


class Task(lightning.LightningModule):
    """An app's task: builds the model, gives the loss, accumulates metrics, draws pictures, predicts files.

    The engine calls, in order: `load_data(config)`; `Task(config, bundle.state)`; training with `training_loss`;
    after each epoch and at the end `reset_metrics`, `update_metrics` over all batches of a split, `compute_metrics`;
    between the last epoch and the end `after_training`.

    Class attributes:
        primary: name of the metric that orders tables and, unless `chooser` names another, chooses the best epoch.
        maximize: whether more of it is better.
        chooser: name of the metric that chooses the best epoch, less being better: a loss, where the primary metric is
            coarse and many epochs share its best value.

    Attributes:
        gathered: split -> what `update_metrics` put there since `reset_metrics`.
    """

    primary: ClassVar[str]
    maximize: ClassVar[bool] = False
    chooser: ClassVar[str] = ""
    metric_format: ClassVar[Mapping[str, str]] = {}

    def __init__(self, config: RunConfig, data_state: Mapping[str, Any]) -> None:
        super().__init__()
        self.config = config
        self.data_state = dict(data_state)
        # Where training stands; the engine keeps it, also over a resume. Read it as current_epoch and global_step.
        self._epoch, self._step = 0, 0
        self.gathered: dict[str, dict[str, Tensor]] = {}

    @property
    def current_epoch(self) -> int:
        """Whole epochs done, resumed ones included."""
        return self._epoch

    @property
    def global_step(self) -> int:
        """Optimiser steps done, resumed ones included."""
        return self._step

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.training_loss(batch)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """The optimiser of `config.optim` over all trainable parameters. An app may group them differently."""
        return make_optimizer([p for p in self.parameters() if p.requires_grad], self.config)

    @classmethod
    @abstractmethod
    def load_data(cls, config: RunConfig, *, state: Mapping[str, Any] | None = None) -> DataBundle:
        """Read and split the data. With `state` (from a checkpoint) nothing is fitted anew: eval on other data."""

    @property
    @abstractmethod
    def model(self) -> torch.nn.Module:
        """The network whose parameters are trained and saved."""

    @abstractmethod
    def training_loss(self, batch: Any) -> Tensor:
        """Mean loss of a training batch, a scalar."""

    def after_training(self, batches: Callable[[str], Iterable[Any]]) -> bool:
        """Fit what is fitted on the validation split once the weights are final, such as a calibration.

        Called with the best weights, before the last evaluation. What it puts into buffers of the task is saved with
        that checkpoint.

        Args:
            batches: name of a split -> its batches, in order, as `update_metrics` gets them.

        Returns:
            Whether anything was fitted.
        """
        return False

    def reset_metrics(self, split: str) -> None:
        """Forget what `update_metrics` gathered for `split`."""
        self.gathered[split] = {}

    @abstractmethod
    def update_metrics(self, split: str, batch: Any) -> None:
        """Take in one evaluation batch. Sums and counts, so that neither batch size nor processes change the result."""

    def metric_state(self, split: str) -> dict[str, Tensor]:
        """The sums as float64 tensors; the engine adds them up over processes before `compute_metrics`."""
        return self.gathered[split]

    @abstractmethod
    def compute_metrics(self, split: str, sums: Mapping[str, Tensor]) -> dict[str, float]:
        """Final figures of a split from the summed state.

        Beside a metric stand the bounds of its interval, named by `intervals.interval_names`; tables show them with it.
        """

    def example_batch(self, bundle: DataBundle, size: int) -> Any:
        """A batch of `size` real samples for measuring cost."""
        part: Any = bundle.train or bundle.val or bundle.test
        return part.__getitems__([i % len(part) for i in range(size)])

    @abstractmethod
    def forward_batch(self, batch: Any) -> Tensor:
        """The model's output for a batch: what inference costs."""

    @classmethod
    def baselines(cls, config: RunConfig, bundle: DataBundle) -> list[dict[str, Any]]:
        """Rows beside the model in its table, {"model": name, **metrics}: a trivial and a strong simple one.

        A row with "oracle": True was made by knowing the answer: a bound, which no model is measured by.
        """
        return []

    def published(self) -> list[dict[str, Any]]:
        """Rows of published figures under the same protocol: {"model": name, "source": where, **metrics}."""
        return []

    def pictures(self, bundle: DataBundle) -> Iterable[Picture]:
        """Figures of the task on the test split for the report."""
        return ()

    @abstractmethod
    def predict_files(self, inputs: Sequence[Path], output: Path, options: Mapping[str, Any]) -> list[Path]:
        """Read each input, write predictions under `output`, return the files written.

        A bad file is a UserError that names it; files already written stay whole.
        """
