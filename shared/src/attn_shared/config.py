"""The configuration of a run. Plain dataclasses; imports no torch, so that `--help` answers at once."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal


@dataclass(kw_only=True)
class TrainerConfig:
    """How long and on what to train. The engine is Lightning's Trainer.

    Attributes:
        max_epochs: passes over the training set.
        max_steps: stop after this many optimiser steps; None = no limit.
        max_minutes: stop after this much wall time; None = no limit.
        batch_size: global batch, shared out between processes.
        eval_batch_size: batch in evaluation; changes no figure.
        patience: stop after this many epochs without a better validation score; None = never.
        gradient_clip: largest gradient norm; None = no clipping.
        precision: Lightning's names.
        accelerator: "auto", "cpu", "gpu".
        devices: processes (cpu) or cards (gpu).
        threads: CPU threads a process; None = leave PyTorch's choice.
        num_workers: loader processes.
        checkpoint_every: also save each this many steps, besides the end of each epoch; None = never.
        log_every: a row of metrics.csv each this many steps.
        deterministic: refuse operations without a deterministic form.
        progress: one line of progress on stderr.
    """

    max_epochs: int = 10
    max_steps: int | None = None
    max_minutes: float | None = None
    batch_size: int = 32
    eval_batch_size: int = 256
    patience: int | None = 3
    gradient_clip: float | None = None
    precision: Literal["32-true", "bf16-mixed", "16-mixed", "64-true"] = "32-true"
    accelerator: Literal["auto", "cpu", "gpu"] = "auto"
    devices: int = 1
    threads: int | None = None
    num_workers: int = 0
    checkpoint_every: int | None = None
    log_every: int = 10
    deterministic: bool = False
    progress: bool = True


@dataclass(kw_only=True)
class OptimConfig:
    """Optimiser and schedule.

    Attributes:
        name: "adam", "adamw" or "sgd".
        lr: learning rate at the start.
        weight_decay: decoupled for adamw.
        betas: Adam's two decay rates; the first is SGD's momentum.
        schedule: "constant"; "halve" (two epochs at `lr`, then half of it after each, as the official code of Informer
            and Autoformer trains); "cosine" (to zero over the run); "decay" (constant for `warmup` epochs, then times
            `gamma` an epoch; warmup=4, gamma=0.9 is PatchTST's "type3").
        warmup: steps of linear warm-up for "cosine", epochs at full rate for "decay".
        gamma: factor an epoch of "decay".
        average: decay a step of a running mean of the weights, such as 0.998, which is then what is validated and
            saved in place of the last weights; the first steps weigh less. None = no mean.
    """

    name: Literal["adam", "adamw", "sgd"] = "adam"
    lr: float = 1e-4
    weight_decay: float = 0.0
    betas: tuple[float, float] = (0.9, 0.999)
    schedule: Literal["constant", "halve", "cosine", "decay"] = "halve"
    warmup: int = 0
    gamma: float = 0.9
    average: float | None = None

    def rate(self, step: int, epoch: int, total_steps: int) -> float:
        """Learning rate of optimiser step `step` (from 0) in `epoch` (from 0) of a run of `total_steps`."""
        if self.schedule == "halve":
            return self.lr * 0.5 ** max(0, epoch - 1)
        if self.schedule == "decay":
            return self.lr * self.gamma ** max(0, epoch + 1 - max(1, self.warmup))
        if self.schedule == "cosine":
            if step < self.warmup:
                return self.lr * (step + 1) / (self.warmup + 1)
            done = (step - self.warmup) / max(1, total_steps - self.warmup)
            return self.lr * 0.5 * (1 + math.cos(math.pi * min(1.0, done)))
        return self.lr


@dataclass(kw_only=True)
class RunConfig:
    """Everything that decides a run; saved whole as config.yaml.

    Attributes:
        app: the application's name.
        model: name of the model; `model_args` is its own dataclass.
        data: name of a data set or path of a file of one's own; `data_args` is the dataclass of its kind's options.
        mixer: name of the attention mechanism; None = the paper's own.
        mixer_args: options of the mechanism.
        seed: decides weights, order of samples, augmentation and dropout.
        runs: folder under which run folders are made.
        kind: kind of task, in an app that has several.
        task_args: dataclass of the kind's further options, such as its loss; None where it has none.
    """

    app: str
    model: str
    model_args: Any
    data: str
    data_args: Any
    mixer: str | None = None
    mixer_args: dict[str, Any] = field(default_factory=dict)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    seed: int = 0
    runs: str = "runs"
    kind: str | None = None
    task_args: Any = None


def config_to_dict(config: RunConfig) -> dict[str, Any]:
    """`config` in plain dictionaries, lists, strings and numbers, as YAML and JSON hold them.

    What only some apps have is left out where there is none.
    """
    values = {f.name: _plain(getattr(config, f.name)) for f in dataclasses.fields(config)}
    return {name: value for name, value in values.items() if value is not None or name not in ("kind", "task_args")}


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: _plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, Path) else value
