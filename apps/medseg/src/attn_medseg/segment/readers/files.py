"""Images and masks from files: NIfTI, NRRD, MetaImage, DICOM series and pictures, with their geometry."""

from __future__ import annotations

import contextlib
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from attn_medseg.segment.cards import PICTURES, VOLUMES
from attn_medseg.segment.corpus import Image
from attn_shared.errors import UserError

IGNORE = 255
"""Label of voxels that nothing counts (`attn_medseg.models.base.IGNORE`, which needs torch)."""
_PILLOW = (".gif", ".bmp")  # formats of which SimpleITK reads none, or not those of one bit
_DAMAGED = "it is cut short, damaged or of another format"


@dataclass(frozen=True, kw_only=True)
class Header:
    """What a file says of its image before its voxels are read.

    Attributes:
        size: voxels along each axis.
        spacing: millimetres between them; ones where the file knows none.
        channels: of the image.
        affine: as in `Image`.
    """

    size: tuple[int, ...]
    spacing: tuple[float, ...]
    channels: int
    affine: NDArray[np.float64] | None


def suffix(path: Path) -> str:
    """The suffix that tells a file's format, such as ".nii.gz"; empty where it is none of an image."""
    name = path.name.lower()
    return next((one for one in (*VOLUMES, *PICTURES) if name.endswith(one)), "")


def stem(path: Path) -> str:
    """A file's name without the suffix of its format."""
    return path.name[: len(path.name) - len(suffix(path))] if suffix(path) else path.stem


def is_image(path: Path) -> bool:
    """Whether a path looks like an image: a file by its suffix, or a folder with a DICOM series."""
    if path.name.startswith("."):
        return False
    return bool(suffix(path)) and path.is_file() if not path.is_dir() else bool(_series(path))


def is_picture(path: Path) -> bool:
    """Whether a file is a picture, of height and width, that knows no millimetres."""
    return suffix(path) in PICTURES


def spacing_of(affine: NDArray[np.float64] | None, ndim: int) -> tuple[float, ...]:
    """Millimetres between voxels along each axis; ones where there is no affine."""
    if affine is None:
        return (1.0,) * ndim
    return tuple(float(one) for one in np.linalg.norm(affine[:3, :ndim], axis=0))


def read_header(path: Path) -> Header:
    """Size, spacing and channels, without the voxels.

    Raises:
        UserError: what cannot be read, in one sentence.
    """
    import SimpleITK as sitk

    path = _existing(path)
    kind = suffix(path)
    if kind in _PILLOW or path.is_dir():
        image = read_image(path)
        return Header(
            size=image.values.shape[1:],
            spacing=spacing_of(image.affine, image.values.ndim - 1),
            channels=image.values.shape[0],
            affine=image.affine,
        )
    reader = sitk.ImageFileReader()
    reader.SetFileName(str(path))
    try:
        reader.ReadImageInformation()
    except RuntimeError as error:
        if kind in (".nii", ".nii.gz") and "orthonormal" in str(error):
            loaded = _sheared(path)
            size = tuple(int(one) for one in loaded.shape[:3])
            channels = int(loaded.shape[3]) if len(loaded.shape) > 3 else 1
            affine = np.asarray(loaded.affine, np.float64)
            return Header(size=size, spacing=spacing_of(affine, 3), channels=channels, affine=affine)
        raise UserError(f"{path.name} cannot be read: {_DAMAGED}") from None
    voxels = tuple(int(one) for one in reader.GetSize())
    channels = reader.GetNumberOfComponents() * (voxels[3] if len(voxels) == 4 else 1)
    voxels = voxels[:3]
    if kind in PICTURES:
        voxels = voxels[::-1] if len(voxels) == 2 else voxels
        return Header(size=voxels, spacing=(1.0,) * len(voxels), channels=_coloured(channels), affine=None)
    affine = _affine(reader)
    return Header(size=voxels, spacing=spacing_of(affine, len(voxels)), channels=channels, affine=affine)


def read_image(path: Path) -> Image:
    """An image from a file, or from a folder that holds one DICOM series.

    Axes are x, y, z of volumes and height, width of pictures; the fourth axis of a 4-D file, such as modalities or
    frames, and the colours of a picture are channels. An alpha channel is left out.

    Raises:
        UserError: no such file, an unknown format, a damaged or truncated file, one without voxels, values that are no
            numbers; one sentence.
    """
    path = _existing(path)
    values, affine = _read(path)
    if not values.size:
        raise UserError(f"{path.name} holds no voxels: its size is {' x '.join(map(str, values.shape[1:]))}")
    values = values.astype(np.float32)
    if not (good := np.isfinite(values)).all():
        count = int(values.size - np.count_nonzero(good))
        raise UserError(f"{path.name} holds {count:,} values that are no numbers (NaN or infinite)")
    return Image(values=values, affine=affine)


def read_mask(path: Path, values: Mapping[int, int] | None = None, classes: int = 0) -> Image:
    """A mask from a file, as (*axes) uint8 labels.

    Args:
        values: value in the file -> label; empty = labels as they are.
        classes: labels from 0 to below this, or `IGNORE`, are allowed; 0 = not checked.

    Raises:
        UserError: as `read_image`; several channels, fractions, or values that are no labels.
    """
    path = _existing(path)
    if suffix(path) == ".png" and _has_palette(path):
        found, affine = _numbers(path), None
    else:
        found, affine = _read(path)
    if found.shape[0] > 1:
        if not is_picture(path) or (found != found[:1]).any():
            raise UserError(f"{path.name} has {found.shape[0]} channels; a mask has one, of whole numbers")
        found = found[:1]
    return Image(values=as_labels(found[0], path.name, values, classes), affine=affine)


def as_labels(
    array: NDArray[Any], name: str, values: Mapping[int, int] | None = None, classes: int = 0
) -> NDArray[np.uint8]:
    """Whole numbers as uint8 labels. See `read_mask`.

    Raises:
        UserError: fractions, or values that are no labels.
    """
    kinds = np.unique(array)
    if not np.isfinite(kinds).all() or (kinds != np.round(kinds)).any():
        raise UserError(f"{name} is no mask: it holds values that are no whole numbers")
    if values:
        strange = [int(one) for one in kinds if int(one) not in values]
        if strange:
            raise UserError(f"{name} holds the value {strange[0]}, which is none of {_some(values)}")
        out = np.zeros(array.shape, np.uint8)
        for one in kinds.tolist():
            out[array == one] = values[int(one)]
        return out
    strange = [int(one) for one in kinds if not 0 <= one <= IGNORE or (classes and classes <= one < IGNORE)]
    if strange:
        raise UserError(f"{name} holds the value {strange[0]}, which is no label from 0 to {classes - 1 or IGNORE}")
    return array.astype(np.uint8)


def _some(values: Mapping[int, int]) -> str:
    known = [str(one) for one in values]
    return ", ".join(known[:12]) + (" …" if len(known) > 12 else "")


def _existing(path: Path) -> Path:
    if not path.exists():
        raise UserError(f"there is no file {path}")
    if path.is_file() and not path.stat().st_size:
        raise UserError(f"{path.name} is empty")
    if path.is_file() and not suffix(path) and not _is_dicom(path):
        raise UserError(f"{path.name} is no image that can be read; these are: {', '.join((*VOLUMES, *PICTURES))}")
    return path


def _read(path: Path) -> tuple[NDArray[Any], NDArray[np.float64] | None]:
    """(channels, *axes) values of any type, and the affine."""
    import SimpleITK as sitk

    sitk.ProcessObject.SetGlobalWarningDisplay(False)
    if path.is_dir():
        return _read_series(path)
    kind = suffix(path)
    if kind in _PILLOW:
        return _picture(path), None
    try:
        if kind in (".nii", ".nii.gz"):
            return _read_nifti(path)
        image = sitk.ReadImage(str(path))
    except RuntimeError:
        raise UserError(f"{path.name} cannot be read: {_DAMAGED}") from None
    return _unpack(image, path)


def _read_nifti(path: Path) -> tuple[NDArray[Any], NDArray[np.float64]]:
    """Voxels by nibabel, places by SimpleITK, which fills up a file that is cut short and makes NaN 0."""
    import nibabel

    affine = read_header(path).affine
    assert affine is not None
    try:
        loaded: Any = nibabel.load(path)  # type: ignore[attr-defined]
        if len(loaded.shape) > 4:
            raise UserError(f"{path.name} has {len(loaded.shape)} axes; an image has 2 or 3, and channels")
        array = np.asanyarray(loaded.dataobj)
    except (OSError, EOFError, ValueError, zlib.error, nibabel.filebasedimages.ImageFileError):
        raise UserError(f"{path.name} cannot be read: {_DAMAGED}") from None
    if array.dtype.fields:  # colours
        array = np.stack([array[one] for one in array.dtype.fields], -1)
    return (np.moveaxis(array, -1, 0) if array.ndim == 4 else array[None]), affine


def _unpack(image: Any, path: Path) -> tuple[NDArray[Any], NDArray[np.float64] | None]:
    import SimpleITK as sitk

    parts, dimension = image.GetNumberOfComponentsPerPixel(), image.GetDimension()
    if dimension not in (2, 3, 4) or (dimension == 4 and parts > 1):
        raise UserError(f"{path.name} has {dimension + (parts > 1)} axes; an image has 2 or 3, and channels")
    array = sitk.GetArrayFromImage(image)
    channels = np.moveaxis(array, -1, 0) if parts > 1 else array if dimension == 4 else array[None]
    if is_picture(path):
        channels = channels[: _coloured(parts)]
        return (channels if dimension == 2 else channels.transpose(0, 3, 2, 1)), None
    return channels.transpose(0, *range(channels.ndim - 1, 0, -1)), _affine(image)


def _coloured(parts: int) -> int:
    """Channels of a picture without its alpha channel."""
    return {2: 1, 4: 3}.get(parts, parts)


def _affine(image: Any) -> NDArray[np.float64]:
    """RAS affine of an image or a reader of SimpleITK, whose own is LPS."""
    dimension = image.GetDimension()
    direction = np.asarray(image.GetDirection(), np.float64).reshape(dimension, dimension)
    rank = min(dimension, 3)
    affine = np.eye(4)
    affine[:rank, :rank] = direction[:rank, :rank] * np.asarray(image.GetSpacing(), np.float64)[:rank]
    affine[:rank, 3] = np.asarray(image.GetOrigin(), np.float64)[:rank]
    affine[:2] *= -1
    return affine


def _sheared(path: Path) -> Any:
    """A NIfTI file whose axes are not at right angles, which SimpleITK refuses."""
    import nibabel

    try:
        return nibabel.load(path)
    except (OSError, nibabel.filebasedimages.ImageFileError):
        raise UserError(f"{path.name} cannot be read: {_DAMAGED}") from None


def _has_palette(path: Path) -> bool:
    from PIL import Image as Pillow

    with contextlib.suppress(OSError, SyntaxError, ValueError), Pillow.open(path) as picture:
        return picture.mode == "P"
    return False


def _numbers(path: Path) -> NDArray[Any]:
    """The numbers of a picture with a palette rather than its colours: labels, in a mask."""
    from PIL import Image as Pillow

    try:
        with Pillow.open(path) as picture:
            return np.asarray(picture)[None]
    except (OSError, SyntaxError, ValueError):
        raise UserError(f"{path.name} cannot be read: {_DAMAGED}") from None


def _picture(path: Path) -> NDArray[Any]:
    """A picture of a format of which SimpleITK reads some or none; grey ones have one channel."""
    from PIL import Image as Pillow

    try:
        with Pillow.open(path) as picture:
            colours = np.moveaxis(np.asarray(picture.convert("RGB")), -1, 0)
    except (OSError, SyntaxError, ValueError):
        raise UserError(f"{path.name} cannot be read: {_DAMAGED}") from None
    return colours[:1] if (colours == colours[:1]).all() else colours


# -- DICOM ------------------------------------------------------------------------------------------------------------


def _is_dicom(path: Path) -> bool:
    with contextlib.suppress(OSError), open(path, "rb") as stream:
        return stream.read(132)[128:] == b"DICM"
    return False


def _series(folder: Path) -> tuple[str, ...]:
    """Numbers of the DICOM series in a folder."""
    import SimpleITK as sitk

    if not any(_is_dicom(file) for file in sorted(folder.iterdir()) if file.is_file()):
        return ()
    return tuple(sitk.ImageSeriesReader.GetGDCMSeriesIDs(str(folder)))


def _read_series(folder: Path) -> tuple[NDArray[Any], NDArray[np.float64] | None]:
    import SimpleITK as sitk

    numbers = _series(folder)
    if len(numbers) != 1:
        found = f"{len(numbers)} DICOM series; each needs a folder of its own" if numbers else "no DICOM series"
        raise UserError(f"the folder {folder.name} holds {found}")
    reader = sitk.ImageSeriesReader()
    reader.SetFileNames(reader.GetGDCMSeriesFileNames(str(folder), numbers[0]))
    try:
        image = reader.Execute()
    except RuntimeError:
        raise UserError(f"the DICOM series in {folder.name} cannot be read: {_DAMAGED}") from None
    return _unpack(image, folder)
