"""Training, evaluation and loading: the one way every application does them.

Lightning's Trainer runs the steps: devices, precision, clipping, gradients over processes. What makes a resumed run
equal to an uninterrupted one is here. `Progress` is the truth about where training stands; Lightning never learns that
a run was resumed. It is handed the rest of the interrupted epoch as a shorter epoch, and the epochs that remain:

- the order of samples follows from seed and epoch, so an epoch can be entered at any batch (`sampler.py`);
- the learning rate follows from step and epoch (`OptimConfig.rate`);
- weights (their running mean, too), optimiser, random states, mean loss and best score come from the checkpoint;
- evaluation draws from a random state of its own, so how often it happens changes nothing.
"""

from __future__ import annotations

import json
import logging
import math
import os
import platform
import shutil
import signal
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import asdict, dataclass, field, replace
from importlib import metadata
from pathlib import Path
from types import FrameType
from typing import Any

import lightning
import torch
import torch.distributed as dist
from lightning.fabric.utilities import move_data_to_device
from lightning.fabric.utilities.apply_func import apply_to_collection
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate

from attn_shared import checkpoint as checkpoints
from attn_shared import options
from attn_shared.app import App, Kind, load
from attn_shared.checkpoint import Checkpoint
from attn_shared.config import RunConfig, config_to_dict
from attn_shared.errors import CheckpointError, UserError
from attn_shared.runs import Run, write_atomically
from attn_shared.sampler import EvalSampler, TrainSampler
from attn_shared.seeding import derive, fork, get_state, seed_everything, set_state
from attn_shared.task import DataBundle, Task


class Interrupted(BaseException):
    """Training was asked to stop and has saved where it stands. Not an Exception: nothing should swallow it.

    Attributes:
        run: the run folder to resume.
        step: optimiser steps done.
    """

    def __init__(self, run: Path | None, step: int) -> None:
        super().__init__(f"interrupted at step {step}")
        self.run, self.step = run, step


@dataclass(kw_only=True)
class Progress:
    """Where training stands.

    Attributes:
        epoch: whole epochs done.
        batch: batches done in the epoch begun.
        step: optimiser steps done.
        seconds, cpu_seconds: time spent training so far, over all resumes, validation included.
        loss_count: steps in `loss_sum` of the epoch begun.
        best: validation figures of the best epoch; `best_step`, `best_epoch` when it was.
        waited: epochs since then.
    """

    epoch: int = 0
    batch: int = 0
    step: int = 0
    seconds: float = 0.0
    cpu_seconds: float = 0.0
    loss_count: int = 0
    best: dict[str, float] = field(default_factory=dict)
    best_step: int = 0
    best_epoch: int = 0
    waited: int = 0


# -- building and loading ---------------------------------------------------------------------------------------------


def task_class(app: App, config: RunConfig) -> type[Task]:
    return load(app.kind(config.data, config.kind).task)


def load_data(app: App, config: RunConfig, state: Mapping[str, Any] | None = None) -> DataBundle:
    """The app's data for `config`, its state in the form a checkpoint gives back."""
    with fork(config.seed, "data"):
        bundle = task_class(app, config).load_data(config, state=state)
    try:
        bundle.state = json.loads(json.dumps(bundle.state))
    except TypeError as error:
        raise TypeError(f"DataBundle.state of {app.name} must hold plain values, as JSON does: {error}") from None
    return bundle


def build_task(app: App, config: RunConfig, data_state: Mapping[str, Any]) -> Task:
    """The task with a model whose weights follow from `config.seed` alone.

    Raises:
        UserError: a mechanism or an option that the model cannot take.
    """
    check_mixer(app, config)
    with fork(config.seed, "weights"):
        try:
            return task_class(app, config)(config, data_state)
        except ValueError as error:
            raise UserError(f"cannot build {config.model}: {error}") from error


def check_mixer(app: App, config: RunConfig) -> None:
    """Refuse a mechanism that does not exist or does not fit the model."""
    card = app.model(config.model)
    if config.mixer is None:
        if config.mixer_args and card.mixer is None:
            raise UserError(f"{card.name} mixes no tokens, so it takes no --mixer_args")
        return
    if card.mixer is None and not card.mixer_patterns:
        raise UserError(f"{card.name} mixes no tokens, so it takes no --mixer")
    from core_attn import registry

    try:
        info = registry.get(config.mixer).info
    except ValueError as error:
        raise UserError(str(error)) from None
    if not card.takes(info.patterns):
        able = [name for name in registry.names() if card.takes(registry.get(name).info.patterns)]
        raise UserError(
            f"{config.mixer} cannot replace the attention of {card.name}: it computes no {card.mixer_wanted} "
            f"attention; these can: {', '.join(able) or 'none'}"
        )


def load_task(app: App, source: Path, *, overrides: Mapping[str, Any] | None = None) -> tuple[Task, RunConfig]:
    """The trained task in a run (its best checkpoint) or a checkpoint folder, in eval mode on the CPU.

    Args:
        overrides: dotted options to change, such as {"trainer.eval_batch_size": 64}.

    Raises:
        CheckpointError: the checkpoint is damaged, unsafe, too new or of another app.
        UserError: there is none, or an override is wrong.
    """
    folder = checkpoints.resolve(source)
    state = checkpoints.load(folder, app=app.name)
    config = _saved_config(app, state, folder)
    if overrides:
        config = options.override(app, config, overrides)
    return _task_of(app, state, config, folder), config


def saved_kind(app: App, source: Path) -> Kind:
    """The kind of task that a run or checkpoint folder was trained for.

    Raises:
        CheckpointError: there is none, or it is damaged, too new or of another app.
    """
    card = checkpoints.read_card(checkpoints.resolve(source), app=app.name)
    return app.kind(str(card["config"].get("data")), card["config"].get("kind"))


def _saved_config(app: App, state: Checkpoint, folder: Path) -> RunConfig:
    try:
        return options.config_from_dict(app, state.config)
    except UserError as error:
        raise CheckpointError(f"{folder} holds a configuration that does not fit this version: {error}") from None


def _task_of(app: App, state: Checkpoint, config: RunConfig, folder: Path) -> Task:
    try:
        task = build_task(app, config, state.data_state)
    except (UserError, KeyError, TypeError) as error:
        raise CheckpointError(f"{folder} does not describe a model that can be built: {error}") from error
    checkpoints.load_weights(task, state, folder)
    task._epoch, task._step = state.epoch, state.step
    return task.eval()


def resume_config(app: App, source: Path, changes: Mapping[str, Any] | None = None) -> RunConfig:
    """The configuration to go on with: the saved one, with trainer options changed.

    Raises:
        UserError: a change that would make it another run.
    """
    folder = checkpoints.resolve(source, prefer="last")
    config = options.config_from_dict(app, checkpoints.read_card(folder, app=app.name)["config"])
    for name in changes or {}:
        if not name.startswith("trainer.") or name in ("trainer.batch_size", "trainer.precision"):
            raise UserError(f"--{name} cannot change when a run is resumed; start a new run for that")
    return options.override(app, config, changes) if changes else config


def versions(app: App) -> dict[str, str]:
    """Versions of what decides a result."""
    found = {"python": platform.python_version()}
    for name in ("torch", "lightning", "numpy", "core-attn", "attn-shared", app.package.replace("_", "-")):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


# -- data -------------------------------------------------------------------------------------------------------------


class _Collate:
    """`collate`, unless the data set made the batch itself (`__getitems__` that gives no list)."""

    def __init__(self, collate: Callable[[list[Any]], Any] | None) -> None:
        self.collate = collate or default_collate

    def __call__(self, items: Any) -> Any:
        return self.collate(items) if isinstance(items, list) else items


def _loader(dataset: Dataset[Any], batches: Any, bundle: DataBundle, config: RunConfig, *seed: int | str) -> DataLoader:
    return DataLoader(
        dataset,
        batch_sampler=batches,
        collate_fn=_Collate(bundle.collate),
        num_workers=config.trainer.num_workers,
        # The seed of the workers: of its own, so that making a loader draws nothing from the global state.
        generator=torch.Generator().manual_seed(derive(config.seed, *seed)),
    )


def _size(dataset: Dataset[Any]) -> int:
    return len(dataset)  # type: ignore[arg-type]


class _Epochs:
    """What Lightning iterates over: the rest of the epoch that `progress` is in.

    A generator, because Lightning asks for an iterator twice an epoch and workers should start once.
    """

    def __init__(self, bundle: DataBundle, config: RunConfig, progress: Progress, rank: int, world: int) -> None:
        self.bundle, self.config, self.progress, self.rank, self.world = bundle, config, progress, rank, world

    def sampler(self) -> TrainSampler:
        assert self.bundle.train is not None
        return TrainSampler(
            _size(self.bundle.train),
            self.config.trainer.batch_size,
            seed=self.config.seed,
            epoch=self.progress.epoch,
            start=self.progress.batch,
            rank=self.rank,
            world=self.world,
        )

    def __len__(self) -> int:
        return len(self.sampler())

    def __iter__(self) -> Iterator[Any]:
        train, epoch = self.bundle.train, self.progress.epoch
        assert train is not None
        if hasattr(train, "set_epoch"):
            train.set_epoch(self.config.seed, epoch)
        yield from _loader(train, self.sampler(), self.bundle, self.config, "workers", epoch)


class _Data(lightning.LightningDataModule):
    """Hands Lightning a fresh `_Epochs` each epoch, for its length changes after the first of a resumed run."""

    def __init__(self, make: Callable[[], _Epochs]) -> None:
        super().__init__()
        self.make = make

    def train_dataloader(self) -> _Epochs:
        return self.make()


# -- evaluation -------------------------------------------------------------------------------------------------------


def _autocast(config: RunConfig, device: torch.device) -> AbstractContextManager[Any]:
    kinds = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}
    kind = kinds.get(config.trainer.precision)
    return torch.autocast(device.type, dtype=kind) if kind is not None else nullcontext()


def evaluate_split(
    task: Task,
    bundle: DataBundle,
    split: str,
    config: RunConfig,
    *,
    distributed: bool = False,
) -> dict[str, float]:
    """The task's figures on every sample of a split: the same for any batch size and any number of processes.

    Args:
        split: "train", "val" or "test".
        distributed: share the samples out between the processes of the running group; all must call it.

    Raises:
        UserError: the data has no such split.
    """
    dataset = bundle.split(split)
    if dataset is None or _size(dataset) == 0:
        raise UserError(f"{config.data} has no {split} split")
    rank, world = (dist.get_rank(), dist.get_world_size()) if distributed and dist.is_initialized() else (0, 1)
    device, training = task.device, task.training
    task.eval()
    try:
        with fork(config.seed, "eval"), torch.no_grad(), _autocast(config, device):
            task.reset_metrics(split)
            for batch in _batches(task, bundle, split, config, rank, world):
                task.update_metrics(split, batch)
            sums = {name: value.detach().cpu() for name, value in task.metric_state(split).items()}
            if world > 1:
                sums = _add_up(sums, world)
            return {name: float(value) for name, value in task.compute_metrics(split, sums).items()}
    finally:
        task.train(training)


def _batches(
    task: Task, bundle: DataBundle, split: str, config: RunConfig, rank: int = 0, world: int = 1
) -> Iterator[Any]:
    """The batches of a split in order, where the task is and as precise as it is."""
    dataset = bundle.split(split)
    if dataset is None or _size(dataset) == 0:
        raise UserError(f"{config.data} has no {split} split")
    sampler = EvalSampler(_size(dataset), config.trainer.eval_batch_size, rank=rank, world=world)
    for batch in _loader(dataset, sampler, bundle, config, "eval"):
        yield _move(batch, task.device, config)


def _move(batch: Any, device: torch.device, config: RunConfig) -> Any:
    if device.type != "cpu":
        batch = move_data_to_device(batch, device)
    if config.trainer.precision == "64-true":
        batch = apply_to_collection(batch, Tensor, lambda t: t.double() if t.is_floating_point() else t)
    return batch


def _add_up(sums: dict[str, Tensor], world: int) -> dict[str, Tensor]:
    """Sums over processes, added in the order of ranks; a process that had no sample may lack a name."""
    gathered: list[Any] = [None] * world
    dist.all_gather_object(gathered, sums)
    total: dict[str, Tensor] = {}
    for part in gathered:
        for name, value in part.items():
            total[name] = total[name] + value if name in total else value
    return total


def evaluate(
    app: App,
    source: Path,
    *,
    split: str = "test",
    data: str | None = None,
    output: Path | None = None,
    overrides: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Figures of a trained model on a split of its own data, or of other data under the statistics it was trained with.

    Args:
        source: run or checkpoint folder.
        data: name or path of other data.
        output: also write the result here as JSON.
        overrides: dotted options to change, such as {"trainer.eval_batch_size": 64} or {"data_args.seq_len": 96}.

    Returns:
        {"app", "model", "data", "mixer", "seed", "split", "protocol", "metrics", "checkpoint", "step", "versions"}.

    Raises:
        UserError: nothing to load, damaged, or no such data.
    """
    changes = {**(overrides or {}), **({"data": data} if data is not None else {})}
    folder = checkpoints.resolve(source)
    state = checkpoints.load(folder, app=app.name)
    config = _saved_config(app, state, folder)
    if changes:
        config = options.override(app, config, changes)
    if split not in ("train", "val", "test"):
        raise UserError(f"unknown split {split!r}; there are: train, val, test")
    _set_threads(config)
    with _quiet():
        task = _task_of(app, state, config, folder).to(_device(config))
        if config.trainer.precision == "64-true":
            task.double()
        bundle = load_data(app, config, state.data_state)
        figures = evaluate_split(task, bundle, split, config)
    result = {
        "app": app.name,
        "model": config.model,
        "data": config.data,
        "mixer": config.mixer,
        "seed": config.seed,
        "split": split,
        "protocol": bundle.protocol,
        "metrics": figures,
        "checkpoint": str(folder),
        "step": state.step,
        "versions": versions(app),
    }
    if output is not None:
        output.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(output, json.dumps(result, indent=2, ensure_ascii=False) + "\n")
    return result


def predict(
    app: App,
    source: Path,
    inputs: Sequence[Path],
    output: Path,
    *,
    options: Mapping[str, Any] | None = None,
    overrides: Mapping[str, Any] | None = None,
) -> list[Path]:
    """Let the task predict each file of `inputs` into the folder `output`; the files written.

    Raises:
        UserError: nothing to load, or a file the task cannot read.
    """
    task, config = load_task(app, source, overrides=overrides)
    _set_threads(config)
    with _quiet(), fork(config.seed, "predict"):
        task = task.to(_device(config))
        with output_folder(output), torch.no_grad(), _autocast(config, task.device):
            return list(task.predict_files(inputs, output, dict(options or {})))


@contextmanager
def output_folder(path: Path) -> Iterator[None]:
    """A folder to write into; made here, it is gone again where nothing was written before an error."""
    made = [folder for folder in (path, *path.parents) if not folder.exists()]
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot write to {path}: {error.strerror or error}") from None
    try:
        yield
    except BaseException:
        with suppress(OSError):  # not empty
            for folder in made:
                folder.rmdir()
        raise


def _device(config: RunConfig) -> torch.device:
    wanted = config.trainer.accelerator
    if wanted == "gpu" and not torch.cuda.is_available():
        raise UserError("--trainer.accelerator gpu, but PyTorch sees no GPU here; use --trainer.accelerator cpu")
    return torch.device("cuda" if wanted != "cpu" and torch.cuda.is_available() else "cpu")


# -- training ---------------------------------------------------------------------------------------------------------


def train(app: App, config: RunConfig, *, resume: Path | None = None) -> Path:
    """Train, evaluate the best checkpoint on val and test, write the report.

    Args:
        config: what to run; with `resume`, as `resume_config` gives it.
        resume: a run folder to go on with, or a lone checkpoint folder to start a new run from.

    Returns:
        The run folder.

    Raises:
        UserError: what the user can put right.
        Interrupted: asked to stop (SIGINT, SIGTERM); where it stood is saved.
    """
    world = _check_launch(config)
    _device(config)
    _set_threads(config)
    with _quiet():
        state = None
        if resume is not None:
            folder = checkpoints.resolve(resume, prefer="last")
            state = checkpoints.load(folder, app=app.name, trainer=True)
        bundle = load_data(app, config)
        _check_data(bundle, config, world, state)
        task = build_task(app, config, bundle.state)
        if state is not None:
            checkpoints.load_weights(task, state, folder)
        engine = _Engine(app, config, task, bundle, state, world)
        engine.open_run(checkpoints.run_of(resume) if resume is not None else None)
        engine.fit()
        try:
            folder = engine.finish()
        except KeyboardInterrupt:  # training is complete and saved; resuming only evaluates
            raise Interrupted(engine.run.path if engine.run else None, engine.progress.step) from None
        if world > 1:  # nobody leaves while another still writes or speaks to it
            dist.barrier()
        return folder


def fit(app: App, config: RunConfig, bundle: DataBundle) -> Task:
    """Train on data in memory in this process; the task with its best weights, in eval mode on the CPU.

    Nothing is evaluated but the validation split, no report is written, and nothing stays on disk.

    Raises:
        UserError: what the user can put right.
        KeyboardInterrupt: asked to stop.
    """
    bundle.state = json.loads(json.dumps(bundle.state))
    _check_data(bundle, config, 1, None)
    _set_threads(config)
    with _quiet(), tempfile.TemporaryDirectory() as folder:
        config = replace(config, runs=folder, trainer=replace(config.trainer, devices=1, progress=False))
        task = build_task(app, config, bundle.state)
        engine = _Engine(app, config, task, bundle, None)
        engine.open_run(None)
        assert engine.run is not None
        try:
            engine.fit()
        except Interrupted:
            raise KeyboardInterrupt from None
        best = checkpoints.resolve(engine.run.path)
        checkpoints.load_weights(task, checkpoints.load(best, app=app.name), best)
        task.to(engine.trainer.strategy.root_device).eval()
        engine._complete(best)
        return task.cpu()


def _check_launch(config: RunConfig) -> int:
    """Number of processes in all; refuses a launch that does not fit `trainer.devices`."""
    world, local = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("LOCAL_WORLD_SIZE", "0"))
    devices = config.trainer.devices
    if devices < 1:
        raise UserError(f"--trainer.devices must be 1 or more, got {devices}")
    if local and world > 1 and local != devices:
        raise UserError(f"torchrun started {local} processes here, but --trainer.devices is {devices}; make them equal")
    if config.trainer.batch_size < 1 or config.trainer.eval_batch_size < 1:
        raise UserError("--trainer.batch_size and --trainer.eval_batch_size must be 1 or more")
    if config.trainer.max_epochs < 0:
        raise UserError(f"--trainer.max_epochs must be 0 or more, got {config.trainer.max_epochs}")
    if config.trainer.log_every < 1 or (config.trainer.checkpoint_every or 1) < 1:
        raise UserError("--trainer.log_every and --trainer.checkpoint_every must be 1 or more")
    return world if local and world > 1 else devices


def _check_data(bundle: DataBundle, config: RunConfig, world: int, state: Checkpoint | None) -> None:
    if bundle.train is None or _size(bundle.train) == 0:
        raise UserError(f"{config.data} has no training samples")
    try:
        TrainSampler(_size(bundle.train), config.trainer.batch_size, seed=0, epoch=0, world=world)
    except ValueError as error:
        raise UserError(str(error)) from None
    if state is not None and state.data_state != bundle.state:
        raise UserError(f"the data of {config.data} has changed since the run began, so it cannot be resumed exactly")


def _set_threads(config: RunConfig) -> None:
    if config.trainer.threads is not None:
        torch.set_num_threads(config.trainer.threads)


@contextmanager
def _quiet() -> Iterator[None]:
    """Lightning's tips and banners off; its errors and everybody else's warnings stay."""
    loggers = [logging.getLogger(name) for name in ("lightning.pytorch", "lightning.fabric")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module=r"lightning\.")
            warnings.filterwarnings("ignore", message=".*find_unused_parameters=True was specified.*")
            warnings.filterwarnings("ignore", message=".*LeafSpec.*")
            yield
    finally:
        for logger, level in zip(loggers, levels):
            logger.setLevel(level)


class _Engine(lightning.Callback):
    """One training: the callback that keeps `Progress`, metrics.csv, checkpoints and the limits."""

    def __init__(
        self, app: App, config: RunConfig, task: Task, bundle: DataBundle, state: Checkpoint | None, world: int = 1
    ) -> None:
        self.app, self.config, self.task, self.bundle = app, config, task, bundle
        self.trainable = app.model(config.model).trainable and any(p.requires_grad for p in task.parameters())
        self.run: Run | None = None
        self.progress = Progress()
        self.loss_sum = torch.zeros((), dtype=torch.float64)
        self.restore: dict[str, Any] | None = None
        if state is not None:
            self._take(state)
        cfg = config.trainer
        several = world > 1
        try:
            self.trainer = lightning.Trainer(
                logger=False,
                enable_checkpointing=False,
                enable_progress_bar=False,
                enable_model_summary=False,
                num_sanity_val_steps=0,
                accelerator="cpu" if not several and cfg.accelerator == "auto" and not _gpu() else cfg.accelerator,
                devices=cfg.devices,
                num_nodes=world // cfg.devices,
                # Networks with parts that some batches leave out are common; without this DDP stops at the second step.
                strategy=DDPStrategy(find_unused_parameters=True) if several else "auto",
                precision=cfg.precision,
                gradient_clip_val=cfg.gradient_clip,
                max_epochs=max(1, cfg.max_epochs - self.progress.epoch),
                reload_dataloaders_every_n_epochs=1,
                use_distributed_sampler=False,
                deterministic=cfg.deterministic or None,
                callbacks=[self],
            )
        except (ValueError, RuntimeError, lightning.fabric.utilities.exceptions.MisconfigurationException) as error:
            raise UserError(f"cannot train so: {error}") from error
        self.rank, self.world = self.trainer.global_rank, self.trainer.world_size
        self.loader = _Epochs(bundle, config, self.progress, self.rank, self.world)
        self.steps_per_epoch = self.loader.sampler().total
        self.total_steps = min(cfg.max_epochs * self.steps_per_epoch, cfg.max_steps or sys.maxsize)
        self.rate: float | None = None
        self.weights: list[Tensor] = [p for p in task.parameters() if p.requires_grad]
        self.average: list[Tensor] | None = None
        self.signals = 0
        self.interrupted = False
        self.started = self.cpu_started = 0.0
        self.line = _Line(cfg.progress and self.rank == 0)

    # -- state --------------------------------------------------------------------------------------------------------

    def _take(self, state: Checkpoint) -> None:
        """Progress and running means from a checkpoint; optimiser and random states follow when training starts."""
        try:
            saved = state.trainer["progress"]
            self.progress = Progress(**saved)
            self.restore = {key: state.trainer[key] for key in ("optimizers", "precision", "processes", "weights")}
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointError(f"the checkpoint does not hold what resuming needs: {error}") from None

    def open_run(self, run: Run | None) -> None:
        """The folder to write to, on rank 0: that of the resumed run, or a new one."""
        if self.rank:
            return
        if run is None:
            self.run = Run.create(self.config)
        else:
            self.run = run
            run.write_config(self.config)
            run.trim(self.progress.step)
            for name in ("last", "best"):
                checkpoints.recover(run.checkpoints / name)
        self.line.note(f"run {self.run.path}")

    def done(self) -> bool:
        """Whether a limit is reached."""
        cfg, now = self.config.trainer, self.progress
        return (
            not self.trainable
            or now.epoch >= cfg.max_epochs
            or (cfg.max_steps is not None and now.step >= cfg.max_steps)
            or (cfg.max_minutes is not None and self._seconds() >= 60 * cfg.max_minutes)
            or (cfg.patience is not None and now.waited >= cfg.patience)
        )

    def _seconds(self) -> float:
        return self.progress.seconds + (time.monotonic() - self.started if self.started else 0.0)

    def _clock(self) -> None:
        """Bring the time spent up to date."""
        now, cpu = time.monotonic(), time.process_time()
        if self.started:
            self.progress.seconds += now - self.started
            self.progress.cpu_seconds += cpu - self.cpu_started
        self.started, self.cpu_started = now, cpu

    def save(self, name: str = "last") -> None:
        """Save everything as checkpoint `name`; every process must call it."""
        self._clock()
        mine = {"random": get_state(), "loss_sum": float(self.loss_sum)}
        everyone: list[Any] = [mine]
        if self.world > 1:
            everyone = [None] * self.world
            dist.all_gather_object(everyone, mine)
        strategy = self.trainer.strategy
        optimizers = [strategy.optimizer_state(optimizer) for optimizer in self.trainer.optimizers]
        if self.run is None:
            return
        latest = [p.detach() for p in self.weights] if self.average is not None else None
        with self._averaged():
            checkpoint = Checkpoint(
                app=self.app.name,
                config=config_to_dict(self.config),
                data_state=self.bundle.state,
                weights=self.task.state_dict(),
                trainer={
                    "progress": asdict(self.progress),
                    "optimizers": optimizers,
                    "precision": self.trainer.precision_plugin.state_dict(),
                    "processes": everyone,
                    "weights": latest,
                },
                step=self.progress.step,
                epoch=self.progress.epoch,
                metrics=self.progress.best if self.progress.best_step == self.progress.step else {},
                versions=versions(self.app),
            )
            checkpoints.save(checkpoint, self.run.checkpoints / name)

    # -- the running mean of the weights ------------------------------------------------------------------------------

    def _start_average(self) -> None:
        """Begin the mean, or take it up: a checkpoint's weights are the mean, the last ones lie beside them."""
        decay = self.config.optim.average
        if decay is None:
            return
        if not 0 < decay < 1:
            raise UserError(f"--optim.average must lie between 0 and 1, got {decay}")
        self.average = [p.detach().clone() for p in self.weights]
        latest = self.restore["weights"] if self.restore is not None else None
        if latest is None:
            return
        try:
            with torch.no_grad():
                for weight, value in zip(self.weights, latest, strict=True):
                    weight.copy_(value)
        except (TypeError, ValueError, RuntimeError) as error:
            raise CheckpointError(f"the last weights do not fit: {error}") from error

    def _update_average(self) -> None:
        decay = self.config.optim.average
        if self.average is None or decay is None:
            return
        # The first weights are random: the mean forgets them at once instead of after 1 / (1 - decay) steps.
        decay = min(decay, (1 + self.progress.step) / (10 + self.progress.step))
        with torch.no_grad():
            torch._foreach_lerp_(self.average, self.weights, 1 - decay)

    @contextmanager
    def _averaged(self) -> Iterator[None]:
        """The task with the mean in place of its last weights, if there is one."""
        if self.average is None:
            yield
            return
        self._swap_average()
        try:
            yield
        finally:
            self._swap_average()

    def _swap_average(self) -> None:
        assert self.average is not None
        for i, weight in enumerate(self.weights):
            weight.data, self.average[i] = self.average[i], weight.data

    # -- the run ------------------------------------------------------------------------------------------------------

    def fit(self) -> None:
        """Train from where `progress` stands to the first limit."""
        if self.done():
            self._settle()
            return
        handlers = self._install_handlers()
        self.task.train()
        self.task._epoch, self.task._step = self.progress.epoch, self.progress.step
        try:
            self.trainer.fit(self.task, datamodule=_Data(lambda: self.loader))
        finally:
            self._clock()
            self.started = 0.0
            self.line.close()
            for number, handler in handlers.items():
                signal.signal(number, handler)

    def _settle(self) -> None:
        """A rule without weights, or a run already complete, still needs a checkpoint to evaluate."""
        if self.run is not None and not (self.run.checkpoints / "best" / checkpoints.CONFIG).exists():
            self.save("best")

    def _install_handlers(self) -> dict[signal.Signals, Any]:
        if threading.current_thread() is not threading.main_thread():
            return {}
        return {number: signal.signal(number, self._on_signal) for number in (signal.SIGINT, signal.SIGTERM)}

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self.signals = 1
        if number == signal.SIGINT:
            if self.interrupted:  # the second Ctrl-C: at once; the last checkpoint is whole
                raise Interrupted(self.run.path if self.run else None, self.progress.step)
            self.interrupted = True
            self.line.note("stopping after this step and saving; Ctrl-C again stops at once")

    # -- Lightning's hooks --------------------------------------------------------------------------------------------

    def on_train_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, self._on_signal)  # Lightning has put its own in front
        self.loss_sum = self.loss_sum.to(self.task.device)
        self._start_average()
        self.started, self.cpu_started = time.monotonic(), time.process_time()
        if self.restore is None:
            seed_everything(self.config.seed, "train", self.rank)
            self.save()  # so that a run killed in its first epoch can be resumed
            return
        try:
            trainer.strategy.load_optimizer_state_dict({"optimizer_states": self.restore["optimizers"]})
            trainer.precision_plugin.load_state_dict(self.restore["precision"])
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            raise CheckpointError(f"the optimiser's state does not fit: {error}") from error
        if self.run is not None and not (self.run.checkpoints / "last").exists():  # a new run from a lone checkpoint
            self._take_up()
            self.save()

    def on_train_epoch_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        if self.restore is not None:
            self._take_up()
            self.restore = None

    def _take_up(self) -> None:
        """Random state and running mean of this process."""
        assert self.restore is not None
        processes = self.restore["processes"]
        try:
            if len(processes) == self.world:
                set_state(processes[self.rank]["random"])
                self.loss_sum.fill_(processes[self.rank]["loss_sum"])
            else:  # another number of processes than before
                seed_everything(self.config.seed, "train", self.rank, self.progress.step)
                self.loss_sum.fill_(sum(process["loss_sum"] for process in processes) / len(processes))
        except (KeyError, TypeError, ValueError, RuntimeError, AttributeError) as error:
            raise CheckpointError(f"the checkpoint does not hold what resuming needs: {error}") from error

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        rate = self.config.optim.rate(self.progress.step, self.progress.epoch, self.total_steps)
        if rate != self.rate:
            # Groups that an app gives rates of their own keep their proportion.
            for optimizer in trainer.optimizers:
                for group in optimizer.param_groups:
                    base = group.setdefault("base_lr", group["lr"])
                    group["lr"] = rate * base / self.config.optim.lr if self.config.optim.lr else rate
            self.rate = rate

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        now, cfg = self.progress, self.config.trainer
        loss = outputs["loss"].detach()
        now.step += 1
        now.batch += 1
        now.loss_count += 1
        self.loss_sum += loss
        self.task._step = now.step
        self._update_average()
        if now.step % cfg.log_every == 0:
            self._log(loss)
        whole = now.batch >= self.steps_per_epoch
        if self._agree(self.signals):
            self.signals = 1
            if not whole:  # else the epoch's end follows at once: it validates, saves and then stops
                self.save()
                self._stop()
        if (cfg.max_steps is not None and now.step >= cfg.max_steps) or (
            cfg.max_minutes is not None and self._agree(self._seconds() >= 60 * cfg.max_minutes)
        ):
            trainer.should_stop = True
        elif cfg.checkpoint_every and now.step % cfg.checkpoint_every == 0 and not whole:
            self.save()

    def _agree(self, flag: int) -> bool:
        """Whether any process says so."""
        if self.world == 1:
            return bool(flag)
        word = torch.tensor([int(flag)], device=self.task.device)
        dist.all_reduce(word, op=dist.ReduceOp.MAX)
        return bool(word.item())

    def _stop(self) -> None:
        raise Interrupted(self.run.path if self.run else None, self.progress.step)

    def _mean(self, value: Tensor) -> float:
        if self.world > 1:
            value = value.clone()
            dist.all_reduce(value)
            value /= self.world
        return value.item()

    def _log(self, loss: Tensor) -> None:
        now, value = self.progress, self._mean(loss)
        if not math.isfinite(value):
            raise UserError(
                f"the training loss became {value} at step {now.step}; "
                "try a smaller --optim.lr or --trainer.gradient_clip"
            )
        if self.run is not None:
            self.run.append({"step": now.step, "epoch": now.epoch, "lr": self.rate, "train_loss": value})
            self.line.update(
                f"epoch {now.epoch + 1}/{self.config.trainer.max_epochs}  "
                f"step {now.batch}/{self.steps_per_epoch}  loss {value:.4g}"
            )

    def on_train_epoch_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        now = self.progress
        mean = self._mean(self.loss_sum) / max(1, now.loss_count)
        if not math.isfinite(mean):
            raise UserError(
                f"the training loss became {mean} in epoch {now.epoch + 1}; "
                "try a smaller --optim.lr or --trainer.gradient_clip"
            )
        figures = {}
        if self.bundle.val is not None and _size(self.bundle.val):
            with self._averaged():
                figures = evaluate_split(self.task, self.bundle, "val", self.config, distributed=True)
        row = {"step": now.step, "epoch": now.epoch, "lr": self.rate, "train_loss": mean}
        if self.run is not None:
            self.run.append({**row, **{f"val_{name}": value for name, value in figures.items()}})
        better = self._better(figures)
        if better:
            now.best, now.best_step, now.best_epoch, now.waited = figures, now.step, now.epoch, 0
        else:
            now.waited += 1
        if now.batch >= self.steps_per_epoch:
            now.epoch, now.batch = now.epoch + 1, 0
        # A stop by step or time in mid-epoch starts the mean anew, too: the row above has used it.
        now.loss_count = 0
        self.loss_sum.zero_()
        self.task._epoch = now.epoch
        self.line.note(self._summary(mean, figures, better), transient=False)
        # The best first: a run killed in between goes on from the older `last` and makes the same `best` again.
        if better:
            self.save("best")
            if self.run is not None:
                checkpoints.copy(self.run.checkpoints / "best", self.run.checkpoints / "last")
        else:
            self.save("last")
        if self._agree(self.signals):
            self._stop()
        if self._agree(self.done()):
            trainer.should_stop = True

    def _better(self, figures: Mapping[str, float]) -> bool:
        if not figures or not self.progress.best:
            return True
        name, sign = self.task.primary, -1 if self.task.maximize else 1
        if self.task.chooser:
            name, sign = self.task.chooser, 1
        value, best = figures.get(name, math.nan), self.progress.best.get(name, math.nan)
        return not math.isnan(value) and (math.isnan(best) or sign * value < sign * best)

    def _summary(self, loss: float, figures: Mapping[str, float], better: bool) -> str:
        now = self.progress
        name = self.task.primary
        score = f"  val {name} {figures[name]:.5g}{' *' if better else ''}" if name in figures else ""
        return f"epoch {now.epoch}/{self.config.trainer.max_epochs}  step {now.step}  loss {loss:.5g}{score}"

    # -- the end ------------------------------------------------------------------------------------------------------

    def finish(self) -> Path:
        """Evaluate the best checkpoint on val and test, measure its cost, write metrics.json and the report."""
        folder = self.trainer.strategy.broadcast(str(self.run.path) if self.run is not None else "")
        best = checkpoints.resolve(Path(folder))
        state = checkpoints.load(best, app=self.app.name)
        checkpoints.load_weights(self.task, state, best)
        self.task.to(self.trainer.strategy.root_device).eval()
        self._complete(best)
        splits = {
            split: evaluate_split(self.task, self.bundle, split, self.config, distributed=self.world > 1)
            for split in ("val", "test")
            if self.bundle.split(split) is not None and _size(self.bundle.split(split))  # type: ignore[arg-type]
        }
        if self.run is None:
            return Path(folder)
        from attn_shared.profiling import measure_cost

        now, config = self.progress, self.config
        for split, figures in splits.items():
            name = self.task.primary
            if name in figures:
                self.line.note(f"{split} {name} {figures[name]:.5g}", transient=False)
        results: dict[str, Any] = {
            "app": self.app.name,
            "model": config.model,
            "data": config.data,
            "mixer": config.mixer or self.app.model(config.model).mixer,
            "seed": config.seed,
            "protocol": self.bundle.protocol,
            "splits": splits,
            "baselines": self.task.baselines(config, self.bundle),
            "published": self.task.published(),
            "cost": asdict(measure_cost(self.task, self.bundle, config)),
            "steps": now.step,
            "epochs": now.epoch,
            "train_seconds": now.seconds,
            "train_cpu_seconds": now.cpu_seconds,
            "best": {"step": now.best_step, "epoch": now.best_epoch, "val": now.best},
            "versions": versions(self.app),
        }
        self.run.write_results(results)
        from attn_shared.report import write_report

        report = write_report(self.app, self.run, self.task, self.bundle)
        self.line.note(f"report {report}", transient=False)
        return self.run.path

    def _complete(self, best: Path) -> None:
        """Fit what the task fits after training, and keep it in the best checkpoint; every process fits the same."""
        task, config = self.task, self.config
        with fork(config.seed, "eval"), torch.no_grad(), _autocast(config, task.device):
            fitted = task.after_training(lambda split: _batches(task, self.bundle, split, config))
        if self.world > 1:  # nobody still reads what is written anew
            dist.barrier()
        if fitted and self.run is not None:
            whole = checkpoints.load(best, app=self.app.name, trainer=True)
            whole.weights = task.state_dict()
            checkpoints.save(whole, best)


def _gpu() -> bool:
    return torch.cuda.is_available()


class _Line:
    """One line of progress on stderr, redrawn in place; without a terminal only the lines that stay."""

    def __init__(self, wanted: bool) -> None:
        self.wanted = wanted
        self.live = wanted and sys.stderr.isatty()
        self.drawn = 0.0
        self.width = 0

    def update(self, text: str) -> None:
        if self.live and time.monotonic() - self.drawn > 0.1:
            self._draw(text)
            self.drawn = time.monotonic()

    def note(self, text: str, *, transient: bool = False) -> None:
        """A line that stays."""
        if self.live:
            self._draw(text)
            sys.stderr.write("\n")
            self.width = 0
        elif self.wanted and not transient:
            print(text, file=sys.stderr, flush=True)

    def _draw(self, text: str) -> None:
        limit = shutil.get_terminal_size().columns - 1
        sys.stderr.write("\r" + text[:limit].ljust(min(self.width, limit)))
        sys.stderr.flush()
        self.width = len(text)

    def close(self) -> None:
        if self.live and self.width:
            sys.stderr.write("\n")
            self.width = 0
