"""Weights to start from: of a run of this program, or published ones."""

from __future__ import annotations

import json
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from attn_genomics.config import MODELS, HyenaDNAConfig
from attn_genomics.models.base import Backbone, Shape
from attn_genomics.models.hyenadna import length_of_filters
from attn_shared import checkpoint
from attn_shared.errors import UserError
from attn_shared.runs import is_run

_PREFIX = "network.backbone."
# Options that change no weight's meaning.
_FREE = {"dropout", "embed_dropout", "resid_dropout", "checkpoint", "echo", "pool", "l_max"}
_FILES = ("*.safetensors", "*.ckpt", "*.bin", "*.pt", "*.pth")


def load_start(backbone: Backbone, path: Path) -> None:
    """Put weights into `backbone`.

    Args:
        backbone: a model, built.
        path: a run folder or checkpoint of `genomics`, of the same model; or published weights: a file (.safetensors,
            .ckpt, .bin, .pt) or a folder with one of them and perhaps a config.json.

    Raises:
        UserError: there is nothing, or it is of another model, and which options would fit.
    """
    if is_run(path) or _is_checkpoint(path) or (path.name == "checkpoints" and is_run(path.parent)):
        _from_run(backbone, path)
    elif path.exists():
        _from_published(backbone, path)
    else:
        raise UserError(f"--task_args.start: there is nothing at {path}")


def _is_checkpoint(path: Path) -> bool:
    try:
        return "schema" in json.loads((path / checkpoint.CONFIG).read_bytes())
    except (OSError, ValueError, TypeError):
        return False


def _from_run(backbone: Backbone, path: Path) -> None:
    folder = checkpoint.resolve(path)
    found = checkpoint.load(folder, app="genomics")
    name = str(found.config.get("model"))
    card = next((card for card in MODELS.values() if isinstance(backbone.config, card.config)), None)
    if card is None or card.name != name:
        raise UserError(f"--task_args.start: {path} is a run of {name}, so it needs --model {name}")
    theirs, ours = found.config.get("model_args") or {}, vars(backbone.config)
    for option, value in theirs.items():
        if option not in _FREE and option in ours and ours[option] != value:
            raise UserError(
                f"--task_args.start: {path} has {option}={value}, this model {ours[option]}: "
                f"set --model_args.{option} {value}"
            )
    if isinstance(backbone.config, HyenaDNAConfig) and backbone.longest is not None:
        longest = length_of_filters(
            int(theirs.get("l_max") or 0), Shape(length=int(found.data_state.get("length") or 1))
        )
        if longest != backbone.longest:
            raise UserError(
                f"--task_args.start: filters of {path} are functions of {longest} places, these of "
                f"{backbone.longest}: set --model_args.l_max {longest}"
            )
    weights = {key.removeprefix(_PREFIX): value for key, value in found.weights.items() if key.startswith(_PREFIX)}
    own = backbone.state_dict()
    wrong = sorted(weights.keys() ^ own.keys()) or sorted(k for k in own if own[k].shape != weights[k].shape)
    # Trained positions of published weights are in no model that was built here.
    wrong = [key for key in wrong if not key.endswith("filter.offsets")]
    if wrong:
        raise UserError(
            f"--task_args.start: {path} does not fit this model, {wrong[0]} is another: give it the same --mixer and "
            "--model_args"
        )
    backbone.load_state_dict(weights)


def _from_published(backbone: Backbone, path: Path) -> None:
    file = path
    if path.is_dir():
        files = [file for pattern in _FILES for file in sorted(path.glob(pattern))]
        if not files:
            raise UserError(
                f"--task_args.start: {path} is neither a run nor a folder with weights (.safetensors, .ckpt, .bin, .pt)"
            )
        file = files[0]
        if (path / checkpoint.CONFIG).is_file():
            _same_sizes(backbone, path / checkpoint.CONFIG)
    tensors = _read(file)
    try:
        backbone.load_official(tensors)
    except ValueError as error:
        raise UserError(f"--task_args.start: {file}: {error}") from None


def _same_sizes(backbone: Backbone, file: Path) -> None:
    """Refuse published sizes that this model does not have, with the options that would give them."""
    try:
        theirs = json.loads(file.read_bytes())
        layer = theirs.get("layer") or {}
    except (OSError, ValueError, AttributeError) as error:
        raise UserError(f"--task_args.start: cannot read {file}: {' '.join(str(error).split())}") from None
    if not isinstance(backbone.config, HyenaDNAConfig):
        return
    ours: dict[str, Any] = {**vars(backbone.config), "l_max": backbone.longest}
    ours["d_inner"] = ours["d_inner"] or 4 * ours["d_model"]
    wanted = {key: theirs.get(key, layer.get(key)) for key in ours if key not in _FREE - {"l_max"}}
    wrong = {key: value for key, value in wanted.items() if value is not None and value != ours[key]}
    if wrong:
        asked = " ".join(f"--model_args.{key} {value}" for key, value in sorted(wrong.items()))
        raise UserError(f"--task_args.start: the weights beside {file} are of another size: set {asked}")


def _read(file: Path) -> Mapping[str, Tensor]:
    """Tensors by name, without running anything that is in the file."""
    try:
        if file.suffix == ".safetensors":
            return load_file(file)
        found: Any = torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise UserError(
            f"--task_args.start: {file} holds something other than tensors and plain values; it was not loaded"
        ) from None
    except (SafetensorError, RuntimeError, EOFError, ValueError, KeyError, OSError) as error:
        raise UserError(f"--task_args.start: cannot read {file}: {' '.join(str(error).split())[:200]}") from None
    if isinstance(found, dict) and isinstance(found.get("state_dict"), dict):
        found = found["state_dict"]
    if not isinstance(found, dict) or not all(isinstance(value, Tensor) for value in found.values()):
        raise UserError(f"--task_args.start: {file} holds no tensors by name")
    return found
