"""Images and masks from files: every format's geometry, and what is wrong with a file in one sentence."""

from __future__ import annotations

from pathlib import Path

import nibabel
import numpy as np
import pytest
import SimpleITK as sitk
from PIL import Image as Pillow

from attn_medseg.models import base
from attn_medseg.segment.readers.files import (
    IGNORE,
    is_image,
    read_header,
    read_image,
    read_mask,
    spacing_of,
    stem,
    suffix,
)
from attn_shared.errors import UserError

OBLIQUE = (0.8, 0.6, 0.0, -0.6, 0.8, 0.0, 0.0, 0.0, 1.0)


def volume(
    path: Path, size: tuple[int, ...] = (7, 5, 3), *, direction: tuple[float, ...] | None = None, seed: int = 0
) -> sitk.Image:
    """A volume with a geometry of its own, of x, y, z `size`, written to `path`."""
    array = np.random.default_rng(seed).integers(-50, 1000, size[::-1]).astype(np.int16)
    image = sitk.GetImageFromArray(array)
    image.SetSpacing((0.7, 1.25, 3.0)[: len(size)])
    image.SetOrigin((-11.0, 22.0, 33.0)[: len(size)])
    if direction is not None:
        image.SetDirection(direction)
    sitk.WriteImage(image, str(path))
    return image


def series(folder: Path, count: int = 4, number: str = "1.2.3", direction: tuple[float, ...] = OBLIQUE) -> sitk.Image:
    """A DICOM series of `count` slices in a folder, and the volume that it is."""
    folder.mkdir(exist_ok=True)
    array = np.random.default_rng(1).integers(0, 500, (count, 6, 5)).astype(np.int16)
    image = sitk.GetImageFromArray(array)
    image.SetSpacing((0.5, 0.75, 2.5))
    image.SetOrigin((1.0, 2.0, 3.0))
    image.SetDirection(direction)
    writer = sitk.ImageFileWriter()
    writer.KeepOriginalImageUIDOn()
    for z in range(count):
        one = image[:, :, z]
        place = image.TransformIndexToPhysicalPoint((0, 0, z))
        cosines = np.array(direction).reshape(3, 3)
        tags = {
            "0008|0060": "CT",
            "0020|000e": number,
            "0020|000d": "1.2",
            "0008|0018": f"{number}.{z}",
            "0020|0013": str(z),
            "0020|0032": "\\".join(f"{value:.6f}" for value in place),
            "0020|0037": "\\".join(f"{value:.6f}" for value in (*cosines[:, 0], *cosines[:, 1])),
        }
        for key, value in tags.items():
            one.SetMetaData(key, value)
        writer.SetFileName(str(folder / f"{number}_{z}.dcm"))
        writer.Execute(one)
    return image


def world(image: sitk.Image, index: tuple[int, ...]) -> np.ndarray:
    """RAS millimetres of a voxel, as SimpleITK (LPS) has it."""
    return np.array(image.TransformIndexToPhysicalPoint(index)) * (-1, -1, 1)


def test_one_value_stands_for_what_nothing_counts() -> None:
    assert IGNORE == base.IGNORE


@pytest.mark.parametrize("ending", [".nii.gz", ".nii", ".nrrd", ".mha"])
@pytest.mark.parametrize("direction", [None, OBLIQUE, (-1.0, 0, 0, 0, 0, 1, 0, 1, 0)])
def test_volumes_keep_values_and_places(tmp_path: Path, ending: str, direction: tuple[float, ...] | None) -> None:
    path = tmp_path / f"a.b{ending}"
    written = volume(path, direction=direction)
    image, header = read_image(path), read_header(path)
    assert image.values.dtype == np.float32
    assert image.values.shape == (1, 7, 5, 3)
    assert (image.values[0] == sitk.GetArrayFromImage(written).T).all()
    assert image.affine is not None
    for index in ((0, 0, 0), (6, 4, 2), (3, 0, 1)):
        assert image.affine @ (*index, 1) == pytest.approx([*world(written, index), 1], abs=1e-4)
    assert spacing_of(image.affine, 3) == pytest.approx((0.7, 1.25, 3.0), abs=1e-6)
    assert header.size == (7, 5, 3)
    assert header.channels == 1
    assert header.affine == pytest.approx(image.affine)
    assert header.spacing == pytest.approx((0.7, 1.25, 3.0), abs=1e-6)
    assert (suffix(path), stem(path)) == (ending, "a.b")
    assert is_image(path)


def test_the_affine_is_nibabels(tmp_path: Path) -> None:
    volume(tmp_path / "a.nii.gz", direction=OBLIQUE)
    found = read_image(tmp_path / "a.nii.gz").affine
    assert found == pytest.approx(np.asarray(nibabel.load(tmp_path / "a.nii.gz").affine), abs=1e-5)


def test_axes_that_are_not_at_right_angles(tmp_path: Path) -> None:
    """SimpleITK refuses a sheared affine; the values and the affine are read all the same."""
    affine = np.array([[1.0, 0.3, 0, 5], [0, 1, 0, 6], [0, 0, 2, 7], [0, 0, 0, 1]])
    values = np.arange(24, dtype=np.float32).reshape(2, 3, 4)
    written = nibabel.Nifti1Image(values, affine)
    written.set_qform(None, 0)
    nibabel.save(written, tmp_path / "a.nii.gz")
    image = read_image(tmp_path / "a.nii.gz")
    assert (image.values[0] == values).all()
    assert image.affine == pytest.approx(affine)
    assert read_header(tmp_path / "a.nii.gz").size == (2, 3, 4)


def test_the_fourth_axis_is_channels(tmp_path: Path) -> None:
    values = np.random.default_rng(0).random((4, 5, 6, 3), np.float32)
    nibabel.save(nibabel.Nifti1Image(values, np.diag([2.0, 3, 4, 1])), tmp_path / "a.nii.gz")
    image, header = read_image(tmp_path / "a.nii.gz"), read_header(tmp_path / "a.nii.gz")
    assert (image.values == np.moveaxis(values, 3, 0)).all()
    assert image.affine == pytest.approx(np.diag([2.0, 3, 4, 1]))
    assert (header.size, header.channels) == ((4, 5, 6), 3)


@pytest.mark.parametrize("ending", [".png", ".bmp", ".tif", ".gif"])
def test_pictures(tmp_path: Path, ending: str) -> None:
    grey = np.random.default_rng(0).integers(0, 256, (6, 9)).astype(np.uint8)
    path = tmp_path / f"a{ending}"
    Pillow.fromarray(grey).save(path)
    image, header = read_image(path), read_header(path)
    assert (image.values == grey[None]).all()
    assert image.affine is None
    assert (header.size, header.channels, header.spacing, header.affine) == ((6, 9), 1, (1.0, 1.0), None)
    if ending != ".gif":
        colours = np.random.default_rng(0).integers(0, 256, (6, 9, 3)).astype(np.uint8)
        Pillow.fromarray(colours).save(path)
        assert (read_image(path).values == np.moveaxis(colours, 2, 0)).all()
        assert read_header(path).channels == 3


def test_an_alpha_channel_is_left_out(tmp_path: Path) -> None:
    colours = np.random.default_rng(0).integers(0, 256, (6, 9, 4)).astype(np.uint8)
    Pillow.fromarray(colours, "RGBA").save(tmp_path / "a.png")
    assert (read_image(tmp_path / "a.png").values == np.moveaxis(colours, 2, 0)[:3]).all()
    assert read_header(tmp_path / "a.png").channels == 3


def test_a_dicom_series(tmp_path: Path) -> None:
    written = series(tmp_path / "scan")
    image, header = read_image(tmp_path / "scan"), read_header(tmp_path / "scan")
    assert (image.values[0] == sitk.GetArrayFromImage(written).T).all()
    assert image.affine is not None
    for index in ((0, 0, 0), (4, 5, 3)):
        assert image.affine @ (*index, 1) == pytest.approx([*world(written, index), 1], abs=1e-4)
    assert header.size == (5, 6, 4)
    assert is_image(tmp_path / "scan")
    series(tmp_path / "scan", number="1.2.4")
    with pytest.raises(UserError, match="the folder scan holds 2 DICOM series; each needs a folder of its own"):
        read_image(tmp_path / "scan")


# -- what is wrong with files ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("ending", [".nii.gz", ".nii", ".nrrd", ".mha"])
@pytest.mark.parametrize("share", [0.9, 0.5, 0.01])
def test_truncated_files(tmp_path: Path, ending: str, share: float, capfd: pytest.CaptureFixture[str]) -> None:
    """SimpleITK itself reads a NIfTI file that is cut short, and fills it up."""
    volume(tmp_path / f"a{ending}", (20, 30, 10))
    whole = (tmp_path / f"a{ending}").read_bytes()
    (tmp_path / f"a{ending}").write_bytes(whole[: int(len(whole) * share)])
    with pytest.raises(UserError, match=r"^a\S+ cannot be read: it is cut short"):
        read_image(tmp_path / f"a{ending}")
    capfd.readouterr()


def test_files_that_are_none(tmp_path: Path) -> None:
    (tmp_path / "a.nii.gz").write_bytes(b"")
    (tmp_path / "a.png").write_text("no picture")
    (tmp_path / "a.txt").write_text("no picture")
    (tmp_path / "folder").mkdir()
    for name, sentence in (
        ("none.nii", "there is no file"),
        ("a.nii.gz", "a.nii.gz is empty"),
        ("a.png", "a.png cannot be read: it is cut short, damaged or of another format"),
        ("a.txt", "a.txt is no image that can be read; these are: .nii.gz, .nii"),
        ("folder", "the folder folder holds no DICOM series"),
    ):
        with pytest.raises(UserError, match=sentence) as error:
            read_image(tmp_path / name)
        assert "\n" not in str(error.value)
    for name in ("none.nii", "a.txt", "folder"):
        assert not is_image(tmp_path / name)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_values_that_are_no_numbers(tmp_path: Path, value: float) -> None:
    values = np.zeros((4, 5, 6), np.float32)
    values[1, 2, :3] = value
    nibabel.save(nibabel.Nifti1Image(values, np.eye(4)), tmp_path / "a.nii.gz")
    sitk.WriteImage(sitk.GetImageFromArray(values), str(tmp_path / "a.nrrd"))
    for name in ("a.nii.gz", "a.nrrd"):
        with pytest.raises(UserError, match=rf"{name} holds 3 values that are no numbers \(NaN or infinite\)"):
            read_image(tmp_path / name)


# -- masks ----------------------------------------------------------------------------------------------------------


def test_masks_are_whole_numbers(tmp_path: Path) -> None:
    def save(values: np.ndarray) -> Path:
        nibabel.save(nibabel.Nifti1Image(values, np.eye(4)), tmp_path / "m.nii.gz")
        return tmp_path / "m.nii.gz"

    labels = np.random.default_rng(0).integers(0, 3, (4, 5, 6))
    found = read_mask(save(labels.astype(np.float32)), classes=3)
    assert found.values.dtype == np.uint8
    assert (found.values == labels).all()
    mapped = read_mask(save((labels * 500).astype(np.int16)), {0: 0, 500: 2, 1000: 1}).values
    assert (mapped == np.array([0, 2, 1])[labels]).all()
    for values, options, sentence in (
        (labels + 0.5, {}, "m.nii.gz is no mask: it holds values that are no whole numbers"),
        (labels, {"classes": 2}, "m.nii.gz holds the value 2, which is no label from 0 to 1"),
        (labels, {"values": {0: 0, 1: 1}}, "m.nii.gz holds the value 2, which is none of 0, 1"),
        (labels - 1, {}, "m.nii.gz holds the value -1, which is no label"),
        (labels * 200, {}, "m.nii.gz holds the value 400, which is no label"),
    ):
        with pytest.raises(UserError, match=sentence):
            read_mask(save(values.astype(np.float32)), **options)  # type: ignore[arg-type]


def test_masks_of_pictures(tmp_path: Path) -> None:
    labels = np.random.default_rng(0).integers(0, 3, (6, 9)).astype(np.uint8)
    palette = Pillow.fromarray(labels, "P")
    palette.putpalette([0, 0, 0, 255, 0, 0, 0, 255, 0])
    palette.save(tmp_path / "p.png")
    assert (read_mask(tmp_path / "p.png", classes=3).values == labels).all()
    Pillow.fromarray(np.repeat(labels[..., None], 3, 2)).save(tmp_path / "rgb.png")
    assert (read_mask(tmp_path / "rgb.png", classes=3).values == labels).all()
    Pillow.fromarray(labels > 0).save(tmp_path / "bit.png")
    assert (read_mask(tmp_path / "bit.png", {0: 0, 255: 1}).values == (labels > 0)).all()
    Pillow.fromarray((labels > 0).astype(np.uint8) * 255).save(tmp_path / "m.gif")
    assert (read_mask(tmp_path / "m.gif", {0: 0, 255: 1}).values == (labels > 0)).all()
    Pillow.fromarray(np.random.default_rng(0).integers(0, 256, (6, 9, 3)).astype(np.uint8)).save(tmp_path / "photo.png")
    with pytest.raises(UserError, match=r"photo.png has 3 channels; a mask has one, of whole numbers"):
        read_mask(tmp_path / "photo.png")
