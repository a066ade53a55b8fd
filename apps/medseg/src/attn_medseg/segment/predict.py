"""Masks of users' images and volumes: in the geometry of each input, with volumes in ml and pictures."""

from __future__ import annotations

import csv
import io
import os
import re
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from attn_medseg.segment.corpus import Image
from attn_medseg.segment.readers.files import is_image, is_picture, read_image, stem, suffix
from attn_medseg.segment.transforms import prepare
from attn_shared.errors import UserError
from attn_shared.inputs import one_by_one, refuse
from attn_shared.runs import slug

if TYPE_CHECKING:
    from attn_medseg.segment.task import SegmentTask

VOLUMES = "volumes.csv"
_NIFTI = (".nii", ".nii.gz")
_FORMATS = ("same", "nii.gz", "nrrd", "png")
_CHANNEL = re.compile(r"_\d{4}$")


@dataclass(frozen=True)
class _Input:
    """An image of one file, or of one for each channel, and what it writes is called."""

    name: str
    files: tuple[Path, ...]


def predict_files(task: SegmentTask, inputs: Sequence[Path], output: Path, options: Mapping[str, Any]) -> list[Path]:
    """`<name>.<format>` with the labels for each image, `<name>_overlay.png`, and volumes.csv.

    A folder stands for the images in it, or for the DICOM series that its files are. Where the model reads several
    channels, files called `<name>_0000`, `<name>_0001`, … are the channels of one image.

    Args:
        task: a trained model.
        inputs: files and folders.
        output: folder for what is written.
        options: the fields of `SegmentPredictOptions`.

    Raises:
        UserError: names every image that could not be segmented and why; the others have been written all the same.
    """
    chosen = _options(task, options)
    found = _inputs(inputs, int(task.data_state["channels"]))
    _check_names(found, output)
    rows: list[list[str]] = []
    task.eval()
    written, failed = one_by_one(found, lambda one: _predict(task, one, output, chosen, rows), lambda one: one.name)
    if rows:
        target = output / VOLUMES
        out = io.StringIO()
        writer = csv.writer(out, lineterminator="\n")
        writer.writerow(["name", "structure", "label", "voxels", "ml"])
        writer.writerows(rows)
        _write(lambda part: part.write_text(out.getvalue(), encoding="utf-8"), target)
        written.append(target)
    others = f"the others were done ({output})" if written else ""
    refuse(failed, len(found), what="images", done="segmented", others=others)
    return written


# -- what is to be done -----------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class _Options:
    overlap: float
    flips: bool
    format: str
    probabilities: bool
    overlays: bool
    window: tuple[int, ...]


def _options(task: SegmentTask, options: Mapping[str, Any]) -> _Options:
    overlap, form = float(options.get("overlap", -1.0)), str(options.get("format", "same"))
    if overlap >= 1:
        raise UserError(f"--overlap is {overlap:g}; give the share of a window, from 0 to below 1")
    if form not in _FORMATS:
        raise UserError(f"--format is {form!r}; it may be {', '.join(_FORMATS)}")
    window = tuple(int(one) for one in options.get("window", ()))
    axes = int(task.data_state["ndim"])
    if window and (len(window) not in (1, axes) or min(window) < 1):
        raise UserError(f"--window needs {axes} numbers from 1 on, or one for all, got {list(window)}")
    return _Options(
        overlap=task.options.overlap if overlap < 0 else overlap,
        flips=bool(options.get("flips", False)) or task.options.flips,
        format=form,
        probabilities=bool(options.get("probabilities", False)),
        overlays=bool(options.get("overlays", True)),
        window=window * axes if len(window) == 1 else window,
    )


def _inputs(inputs: Sequence[Path], channels: int) -> list[_Input]:
    files: list[Path] = []
    for path in inputs:
        if not path.is_dir() or is_image(path):
            files.append(path)
            continue
        inside = sorted(one for one in path.iterdir() if is_image(one))
        if not inside:
            raise UserError(f"{path} holds neither images nor a DICOM series")
        files += inside
    if channels == 1 or not any(_CHANNEL.search(_stem(path)) for path in files):
        return [_Input(_CHANNEL.sub("", _stem(path)) if _is_first(path) else _stem(path), (path,)) for path in files]
    groups: dict[tuple[Path, str], list[Path]] = {}
    for path in files:
        groups.setdefault((path.parent, _CHANNEL.sub("", _stem(path))), []).append(path)
    return [_Input(name, tuple(sorted(group))) for (_, name), group in groups.items()]


def _stem(path: Path) -> str:
    return path.resolve().name if path.is_dir() else stem(path)


def _is_first(path: Path) -> bool:
    return _stem(path).endswith("_0000")


def _check_names(found: Sequence[_Input], output: Path) -> None:
    names = [one.name for one in found]
    for one in found:
        if names.count(one.name) > 1:
            raise UserError(f"two inputs are called {one.name!r} and would write the same files; rename one")
        for file in one.files:
            if file.is_file() and output.exists() and file.parent.resolve() == output.resolve():
                raise UserError(
                    f"{output} is the folder of {file.name}; choose another --output so that nothing is lost"
                )


# -- one image --------------------------------------------------------------------------------------------------------


def _predict(task: SegmentTask, one: _Input, output: Path, chosen: _Options, rows: list[list[str]]) -> list[Path]:
    """Write what belongs to an image and say on stderr how long it took; the files."""
    started = time.perf_counter()
    image = _read(one)
    try:
        prepared = prepare(image, task.data_state)
        scores = task.scores(prepared, overlap=chosen.overlap, flips=chosen.flips, window=chosen.window)
    except UserError as error:
        raise UserError(f"{one.files[0].name}: {error}") from None
    except ValueError as error:
        raise UserError(f"{one.files[0].name}: {error}") from None
    if not torch.isfinite(scores[0]).all():
        raise UserError(f"{one.files[0].name}: the model gave scores that are no numbers; its training may have failed")
    labels = prepared.labels(scores)
    form = _format(one.files[0], chosen.format, labels.ndim)
    written = [save(output / f"{one.name}{form}", _coded(labels, task, form), one.files[0], image)]
    structures = list(task.structures)
    if chosen.probabilities:
        for number, name in enumerate(structures, 1):
            chance = prepared.restore(scores[number : number + 1])[0].float().numpy()
            end = form if form != ".png" else ".tif"
            target = output / f"{one.name}_{slug(name)}_probability{end}"
            written.append(save(target, chance, one.files[0], image))
    if chosen.overlays:
        written.append(_overlay(output / f"{one.name}_overlay.png", image, labels, task))
    told = []
    for number, name in enumerate(structures, 1):
        voxels = int((labels == number).sum())
        ml = volume_ml(voxels, image)
        rows.append([one.name, name, str(number), str(voxels), "" if ml is None else f"{ml:.6g}"])
        told.append(f"{name} {voxels:,} voxels" if ml is None else f"{name} {ml:.4g} ml")
    seconds = time.perf_counter() - started
    print(f"{one.name}: {', '.join(told)} in {seconds:.1f} s", file=sys.stderr)
    return written


def _read(one: _Input) -> Image:
    parts = [read_image(file) for file in one.files]
    first = parts[0]
    for file, part in zip(one.files, parts):
        if part.values.shape[1:] != first.values.shape[1:]:
            sizes = [" x ".join(map(str, each.values.shape[1:])) for each in (first, part)]
            raise UserError(f"{one.files[0].name} has {sizes[0]} voxels and {file.name} {sizes[1]}")
    if len(parts) == 1:
        return first
    return Image(values=np.concatenate([part.values for part in parts]), affine=first.affine)


def volume_ml(voxels: int, image: Image) -> float | None:
    """Of so many voxels; None where the image knows no millimetres or is no volume."""
    if image.affine is None or image.values.ndim != 4:
        return None
    return voxels * abs(float(np.linalg.det(image.affine[:3, :3]))) / 1000


def _format(path: Path, wanted: str, axes: int) -> str:
    """The suffix of what is written."""
    if wanted == "png":
        if axes != 2:
            raise UserError(f"{path.name} is a volume, which PNG cannot hold; take --format nii.gz or nrrd")
        return ".png"
    if wanted != "same":
        return f".{wanted}"
    if path.is_dir() or suffix(path) in ("", ".dcm"):
        return ".nii.gz"
    if is_picture(path):
        return ".png" if axes == 2 else ".tif"
    return {".nhdr": ".nrrd", ".mhd": ".mha"}.get(suffix(path), suffix(path))


def _coded(labels: NDArray[np.uint8], task: SegmentTask, form: str) -> NDArray[np.uint8]:
    """Labels as they are written: of one structure in a picture 255, so that it can be seen."""
    if form == ".png" and len(task.structures) == 1:
        return labels * np.uint8(255)
    return labels


def _overlay(target: Path, image: Image, labels: NDArray[np.uint8], task: SegmentTask) -> Path:
    from attn_medseg.segment.overlays import Shown, overlay
    from attn_shared import plotting

    shown = Shown(image=image.values, labels=labels, affine=image.affine, slices=int(task.data_state["slices"]))
    data = plotting.png(overlay(shown, task.structures, target.name.removesuffix("_overlay.png")))
    _write(lambda part: part.write_bytes(data), target)
    return target


# -- files ------------------------------------------------------------------------------------------------------------


def save(target: Path, values: NDArray[Any], source: Path, image: Image) -> Path:
    """Values on the grid of an image, as a file in the geometry of the image's own.

    A NIfTI file of a NIfTI file has its header, affines and codes included. Otherwise origin, spacing and directions
    are those of the source.

    Args:
        target: file to write; its suffix decides the format.
        values: (*axes) in the file's axes.
        source: file or DICOM folder of the image.
        image: as it was read.

    Raises:
        UserError: it cannot be written.
    """
    if source.is_file() and suffix(source) in _NIFTI and suffix(target) in _NIFTI:
        _write(lambda part: _save_nifti(part, values, source), target)
    else:
        _write(lambda part: _save_itk(part, values, source, image), target)
    return target


def _save_nifti(target: Path, values: NDArray[Any], source: Path) -> None:
    import nibabel

    loaded: Any = nibabel.load(source)
    header = loaded.header.copy()
    header.set_data_dtype(values.dtype)
    header["cal_min"] = header["cal_max"] = 0
    with suppress(nibabel.spatialimages.HeaderDataError):
        header.set_slope_inter(1, 0)
    # Without an affine the header keeps what it says, as quaternion and as matrix, with both codes.
    nibabel.save(type(loaded)(values, None, header), target)


def _save_itk(target: Path, values: NDArray[Any], source: Path, image: Image) -> None:
    import SimpleITK as sitk

    picture = image.affine is None
    made = sitk.GetImageFromArray(values if picture and values.ndim == 2 else values.T)
    if image.affine is not None:
        rank = values.ndim
        info = None
        if source.is_file() and suffix(source) not in _NIFTI:
            info = sitk.ImageFileReader()
            info.SetFileName(str(source))
            info.ReadImageInformation()
        if info is not None and info.GetDimension() == rank:
            made.SetOrigin(info.GetOrigin())
            made.SetSpacing(info.GetSpacing())
            made.SetDirection(info.GetDirection())
            for key in info.GetMetaDataKeys() if suffix(target) == suffix(source) else ():
                made.SetMetaData(key, info.GetMetaData(key))
        else:
            affine = image.affine.copy()
            affine[:2] *= -1  # from RAS to LPS
            spacing = np.linalg.norm(affine[:rank, :rank], axis=0)
            made.SetOrigin(affine[:rank, 3].tolist())
            made.SetSpacing(spacing.tolist())
            made.SetDirection((affine[:rank, :rank] / spacing).ravel().tolist())
    sitk.WriteImage(made, str(target), useCompression=suffix(target) != ".mha")


def _write(make: Any, target: Path) -> None:
    """A file that appears whole or not at all; its temporary name keeps the suffix, which decides the format."""
    part = target.with_name(f".{os.getpid()}.part.{target.name}")
    try:
        make(part)
        os.replace(part, target)
    except (OSError, RuntimeError) as error:
        reason = (
            error.strerror if isinstance(error, OSError) and error.strerror else str(error).strip().splitlines()[-1]
        )
        raise UserError(f"cannot write {target}: {reason}") from None
    finally:
        with suppress(OSError):
            part.unlink()
