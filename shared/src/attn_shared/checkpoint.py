"""Checkpoints: folders {model.safetensors, config.json, trainer.pt} that say themselves what they are.

config.json names the schema, the app, the whole configuration, the statistics of the data, versions, step and figures,
and holds size and SHA-256 of the two other files, so that damage is noticed before anything is read from them. Nothing
in a checkpoint is ever executed: safetensors and JSON hold no code, trainer.pt is read with `weights_only=True`.

Writing is atomic. A new `last` is written whole beside the old one as `last.new`, flushed to disk, and renamed; a
process killed at any moment leaves the old one or the new one, and `resolve` finds it.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import pickle
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_safetensors
from safetensors.torch import save as save_safetensors
from torch import Tensor

from attn_shared.errors import CheckpointError, UserError
from attn_shared.runs import Run, is_run

SCHEMA = 1
WEIGHTS, CONFIG, TRAINER = "model.safetensors", "config.json", "trainer.pt"


@dataclass(kw_only=True)
class Checkpoint:
    """A checkpoint in memory.

    Attributes:
        app: name of the application.
        config: the run's configuration as plain dictionaries.
        data_state: statistics of the training split.
        weights: the task's state_dict.
        trainer: what resuming needs: tensors and plain values only.
        step, epoch: optimiser steps and whole epochs done.
        metrics: validation figures at that step, as far as measured.
        versions: versions of the packages that wrote it.
    """

    app: str
    config: dict[str, Any]
    data_state: dict[str, Any]
    weights: dict[str, Tensor]
    trainer: dict[str, Any]
    step: int
    epoch: int
    metrics: dict[str, float]
    versions: dict[str, str]


# -- finding ----------------------------------------------------------------------------------------------------------


def resolve(source: Path | str, *, prefer: str = "best") -> Path:
    """The checkpoint folder that `source` means: a run (its `prefer`, else the other one), or a checkpoint folder.

    Raises:
        UserError: there is none.
    """
    source = Path(source)
    if is_run(source):
        other = "last" if prefer == "best" else "best"
        for name in (prefer, other):
            found = _surviving(source / "checkpoints" / name)
            if found is not None:
                return found
        raise UserError(f"{source} has no checkpoint yet; start the training again")
    if source.name == "checkpoints" and is_run(source.parent):
        return resolve(source.parent, prefer=prefer)
    found = _surviving(source)
    if found is None:
        if source.is_file():
            raise UserError(f"{source} is a file; give a run folder or a checkpoint folder")
        if not source.is_dir():
            raise UserError(f"there is no run or checkpoint at {source}")
        if any((source / name).exists() for name in (WEIGHTS, TRAINER)):
            raise CheckpointError(f"{source} is no whole checkpoint: {CONFIG} is missing")
        Run.open(source)  # says why it is no run
        raise UserError(f"{source} is neither a run folder nor a checkpoint folder")
    return found


def run_of(source: Path) -> Run | None:
    """The run that `source` (a run folder, or its `last` checkpoint) would continue; None for a lone checkpoint."""
    if is_run(source):
        return Run(source)
    if source.name == "last" and source.parent.name == "checkpoints" and is_run(source.parent.parent):
        return Run(source.parent.parent)
    return None


def _surviving(folder: Path) -> Path | None:
    """`folder`, or what a kill between the two renames of `save` left of it."""
    for candidate in (folder, _beside(folder, "new"), _beside(folder, "old")):
        if (candidate / CONFIG).is_file():
            return candidate
    return None


def _beside(folder: Path, word: str) -> Path:
    return folder.with_name(f"{folder.name}.{word}")


# -- writing ----------------------------------------------------------------------------------------------------------


def save(checkpoint: Checkpoint, folder: Path) -> Path:
    """Write `checkpoint` as `folder`, replacing an older one there, atomically."""
    weights = save_safetensors(_distinct(checkpoint.weights))
    stream = io.BytesIO()
    torch.save(checkpoint.trainer, stream)
    files = {WEIGHTS: weights, TRAINER: stream.getvalue()}
    card = {
        "schema": SCHEMA,
        "app": checkpoint.app,
        "step": checkpoint.step,
        "epoch": checkpoint.epoch,
        "metrics": checkpoint.metrics,
        "config": checkpoint.config,
        "data_state": checkpoint.data_state,
        "versions": checkpoint.versions,
        "files": {
            name: {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()} for name, data in files.items()
        },
    }
    new = recover(folder)
    new.mkdir(parents=True)
    for name, data in files.items():
        _write(new / name, data)
    # Last, so that a folder with config.json is whole.
    _write(new / f".{CONFIG}", json.dumps(card, ensure_ascii=False).encode())
    os.replace(new / f".{CONFIG}", new / CONFIG)
    _sync(new)
    replace(new, folder)
    return folder


def copy(source: Path, folder: Path) -> Path:
    """Make `folder` the same checkpoint as `source`, atomically; files are shared (hard links) where they can be."""
    new = recover(folder)
    new.mkdir(parents=True)
    for name in (WEIGHTS, TRAINER, CONFIG):
        try:
            os.link(source / name, new / name)
        except OSError:
            shutil.copyfile(source / name, new / name)
    _sync(new)
    replace(new, folder)
    return folder


def recover(folder: Path) -> Path:
    """Bring `folder` back if a kill left only its successor or predecessor; return the clean path of the next one."""
    new, old = _beside(folder, "new"), _beside(folder, "old")
    found = _surviving(folder)
    if found is not None and found != folder:
        os.rename(found, folder)
    shutil.rmtree(new, ignore_errors=True)
    shutil.rmtree(old, ignore_errors=True)
    return new


def replace(new: Path, folder: Path) -> None:
    old = _beside(folder, "old")
    if folder.exists():
        os.rename(folder, old)
    os.rename(new, folder)
    _sync(folder.parent)
    shutil.rmtree(old, ignore_errors=True)


def _write(path: Path, data: bytes) -> None:
    with open(path, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _sync(folder: Path) -> None:
    try:
        handle = os.open(folder, os.O_RDONLY)
    except OSError:  # no folder handles on this system
        return
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _distinct(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Contiguous tensors on the CPU, none sharing memory with another (tied weights), as safetensors wants them."""
    seen: set[int] = set()
    result = {}
    for name, tensor in weights.items():
        tensor = tensor.detach().cpu().contiguous()
        pointer = tensor.untyped_storage().data_ptr()
        result[name] = tensor.clone() if pointer in seen else tensor
        seen.add(pointer)
    return result


# -- reading ----------------------------------------------------------------------------------------------------------


def read_card(folder: Path, *, app: str | None = None) -> dict[str, Any]:
    """config.json, checked, without reading the weights.

    Raises:
        CheckpointError: damaged, of a newer schema, or of another app.
    """
    file = folder / CONFIG
    try:
        card = json.loads(file.read_bytes())
    except FileNotFoundError:
        raise CheckpointError(f"{folder} is no whole checkpoint: {CONFIG} is missing") from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{file} is damaged: {error}") from None
    if not isinstance(card, dict) or not isinstance(card.get("schema"), int):
        raise CheckpointError(f"{file} is no checkpoint description: it names no schema")
    if card["schema"] > SCHEMA:
        raise CheckpointError(
            f"{folder} was written by a newer version (schema {card['schema']}, this one reads up to {SCHEMA}); upgrade"
        )
    kinds = {"app": str, "step": int, "epoch": int, "metrics": dict, "config": dict, "data_state": dict}
    for key, kind in {**kinds, "versions": dict, "files": dict}.items():
        if not isinstance(card.get(key), kind):
            raise CheckpointError(f"{file} is damaged: {key!r} is missing or wrong")
    if app is not None and card["app"] != app:
        raise CheckpointError(f"{folder} is a checkpoint of {card['app']}, not of {app}; use `{card['app']}` with it")
    return card


def load(folder: Path, *, app: str | None = None, trainer: bool = False) -> Checkpoint:
    """Read a checkpoint; with `trainer` also what resuming needs. Executes nothing that is in it.

    Raises:
        CheckpointError: anything missing, damaged, unsafe, too new or of another app.
    """
    card = read_card(folder, app=app)
    weights = _checked(folder, WEIGHTS, card)
    state: Any = {}
    try:
        tensors = load_safetensors(weights)
    except (SafetensorError, ValueError, KeyError) as error:
        raise CheckpointError(f"{folder / WEIGHTS} is no safetensors file: {error}") from None
    if trainer:
        data = _checked(folder, TRAINER, card)
        try:
            state = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
        except pickle.UnpicklingError:
            raise CheckpointError(
                f"{folder / TRAINER} holds something other than tensors and plain values; it was not loaded"
            ) from None
        except (RuntimeError, EOFError, ValueError, KeyError, OSError) as error:
            raise CheckpointError(f"{folder / TRAINER} is damaged: {' '.join(str(error).split())[:200]}") from None
        if not isinstance(state, dict):
            raise CheckpointError(f"{folder / TRAINER} is damaged: it holds no mapping")
    return Checkpoint(
        app=card["app"],
        config=card["config"],
        data_state=card["data_state"],
        weights=tensors,
        trainer=state,
        step=card["step"],
        epoch=card["epoch"],
        metrics=card["metrics"],
        versions=card["versions"],
    )


def _checked(folder: Path, name: str, card: Mapping[str, Any]) -> bytes:
    entry = card["files"].get(name)
    if not isinstance(entry, dict):
        raise CheckpointError(f"{folder / CONFIG} is damaged: it does not describe {name}")
    try:
        data = (folder / name).read_bytes()
    except FileNotFoundError:
        raise CheckpointError(f"{folder} is no whole checkpoint: {name} is missing") from None
    except OSError as error:
        raise CheckpointError(f"cannot read {folder / name}: {error.strerror or error}") from None
    if len(data) != entry.get("bytes"):
        raise CheckpointError(
            f"{folder / name} is damaged: it has {len(data)} bytes instead of {entry.get('bytes')}; copy it again"
        )
    if hashlib.sha256(data).hexdigest() != entry.get("sha256"):
        raise CheckpointError(
            f"{folder / name} is damaged: its checksum differs from the one in {CONFIG}; copy it again"
        )
    return data


def load_weights(module: torch.nn.Module, checkpoint: Checkpoint, where: Path) -> None:
    """Put the weights into `module`.

    Raises:
        CheckpointError: names or shapes do not fit the model that the configuration describes.
    """
    own = module.state_dict()
    missing, surplus = sorted(own.keys() - checkpoint.weights.keys()), sorted(checkpoint.weights.keys() - own.keys())
    wrong = sorted(k for k in own.keys() & checkpoint.weights.keys() if own[k].shape != checkpoint.weights[k].shape)
    for word, names in (("lacks", missing), ("has, against the model,", surplus)):
        if names:
            raise CheckpointError(f"{where} does not fit its configuration: it {word} {names[0]!r} ({len(names)} such)")
    if wrong:
        name = wrong[0]
        raise CheckpointError(
            f"{where} does not fit its configuration: {name!r} has shape {tuple(checkpoint.weights[name].shape)}, "
            f"the model wants {tuple(own[name].shape)}"
        )
    module.load_state_dict(checkpoint.weights)
