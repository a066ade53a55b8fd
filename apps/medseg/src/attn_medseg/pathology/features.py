"""Files of the instances of one bag: (N, C) features, as encoders of slides write them."""

from __future__ import annotations

import zipfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from attn_shared.errors import UserError

SUFFIXES = (".npy", ".npz", ".h5", ".hdf5", ".pt")
_NAMES = ("features", "feats", "embeddings")
_PLACES = ("coords", "coordinates")
_SLIDES = (".svs", ".tif", ".tiff", ".ndpi", ".mrxs", ".scn")


@dataclass(frozen=True)
class Instances:
    """What a feature file holds.

    Attributes:
        features: (N, C) float32, finite.
        coords: (N, 2) where the file tells the places of the instances.
    """

    features: NDArray[np.float32]
    coords: NDArray[np.float64] | None = None


def read(path: Path) -> Instances:
    """The instances in a file. Nothing in it is ever run: no pickles.

    `.npy`: the array; `.npz` and `.h5`: "features" (or the only array), and "coords" where there are any; `.pt`: a
    tensor, or a dictionary with "features".

    Raises:
        UserError: the file cannot be read, or holds something else; one sentence with its name.
    """
    suffix = path.suffix.lower()
    readers = {".npy": _npy, ".npz": _npz, ".h5": _h5, ".hdf5": _h5, ".pt": _pt}
    if suffix not in readers:
        raise UserError(f"{path.name} is no feature file; these are: {', '.join(SUFFIXES)}")
    if not path.is_file():
        raise UserError(f"there is no file {path}")
    try:
        features, coords = readers[suffix](path)
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(f"{path.name} cannot be read: {reason}") from None
    found = checked(features, path.name)
    return Instances(found, _places(coords, len(found)))


def checked(features: Any, name: str) -> NDArray[np.float32]:
    """(N, C) finite numbers as float32.

    Raises:
        UserError: they are not; `name` says of what.
    """
    found = np.asarray(features)
    if found.ndim == 3 and len(found) == 1:
        found = found[0]
    if found.ndim != 2 or not (np.issubdtype(found.dtype, np.floating) or np.issubdtype(found.dtype, np.integer)):
        raise UserError(
            f"{name} holds {found.dtype} of shape {found.shape}, not numbers of shape (instances, features)"
        )
    if not found.size:
        raise UserError(f"{name} holds no instances")
    found = found.astype(np.float32)
    if not np.isfinite(found).all():
        rows = int((~np.isfinite(found)).any(axis=1).sum())
        raise UserError(f"{name} has values that are no finite numbers, in {rows} of {len(found)} instances")
    return np.asarray(found)


def name_of(slide: str) -> str:
    """The name of a slide without the suffix of its file: "a.svs" is "a"."""
    for end in _SLIDES:
        if slide.lower().endswith(end):
            return slide[: -len(end)]
    return slide


def listing(folder: Path) -> dict[str, Path]:
    """Name of a slide -> its feature file, in a folder and the folders in it (`pt_files`, `h5_files`, …).

    Of two files of a slide the one that also tells the places of its instances is taken.
    """
    order = {suffix: place for place, suffix in enumerate((".npy", ".pt", ".npz", ".hdf5", ".h5"))}
    found: dict[str, Path] = {}
    for path in sorted(folder.rglob("*")):
        suffix = path.suffix.lower()
        if suffix in order and path.is_file():
            name = name_of(path.stem)
            if name not in found or order[suffix] > order[found[name].suffix.lower()]:
                found[name] = path
    return found


def _npy(path: Path) -> tuple[Any, Any]:
    return np.load(path, allow_pickle=False), None


def _npz(path: Path) -> tuple[Any, Any]:
    with np.load(path, allow_pickle=False) as pack:
        return _chosen({name: pack[name] for name in pack.files}, path)


def _h5(path: Path) -> tuple[Any, Any]:
    try:
        import h5py
    except ImportError:
        raise UserError(f"{path.name} needs h5py, which is not installed: pip install h5py") from None
    with h5py.File(path, "r") as pack:
        arrays = {name: pack[name][()] for name in pack if isinstance(pack[name], h5py.Dataset)}
    return _chosen(arrays, path)


def _pt(path: Path) -> tuple[Any, Any]:
    import pickle

    import torch

    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, pickle.UnpicklingError) as error:
        unsafe = "weights_only" in str(error) or "Unsupported" in str(error)
        reason = "it holds more than tensors, and code in files is never run" if unsafe else "it is damaged"
        raise UserError(f"{path.name} cannot be read: {reason}") from None
    arrays = loaded if isinstance(loaded, Mapping) else {"features": loaded}
    return _chosen(
        {str(name): value.float().numpy() for name, value in arrays.items() if isinstance(value, torch.Tensor)}, path
    )


def _chosen(arrays: Mapping[str, Any], path: Path) -> tuple[Any, Any]:
    """Features and places among named arrays."""
    name = _first(_NAMES, arrays)
    places = _first(_PLACES, arrays)
    if name is None:
        rest = [one for one in arrays if one != places]
        if len(rest) != 1:
            raise UserError(f"{path.name} has no array called features; it has: {', '.join(arrays) or 'none'}")
        name = rest[0]
    return arrays[name], None if places is None else arrays[places]


def _first(names: Iterable[str], there: Mapping[str, Any]) -> str | None:
    return next((name for name in names if name in there), None)


def _places(coords: Any, count: int) -> NDArray[np.float64] | None:
    if coords is None:
        return None
    found = np.asarray(coords)
    if found.ndim == 3 and len(found) == 1:
        found = found[0]
    fits = found.ndim == 2 and found.shape[1] >= 2 and len(found) == count and np.issubdtype(found.dtype, np.number)
    return found[:, :2].astype(np.float64) if fits else None
