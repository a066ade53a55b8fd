"""Masks of files in the geometry of each file, as SimpleITK and nibabel read it."""

from __future__ import annotations

import csv
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
import SimpleITK as sitk
import torch

from attn_medseg.cli import APP
from attn_medseg.segment import data
from attn_medseg.segment.corpus import Case, Corpus, Image
from attn_medseg.segment.options import SegmentDataConfig
from attn_medseg.segment.predict import predict_files
from attn_medseg.segment.readers.files import read_image
from attn_medseg.segment.task import SegmentTask
from attn_medseg.segment.transforms import prepare
from attn_shared import options, trainer
from attn_shared.errors import UserError

TURN = np.array([[0.9553365, -0.29552021, 0.0], [0.29552021, 0.9553365, 0.0], [0.0, 0.0, 1.0]])


def volume(size: tuple[int, ...] = (19, 14, 9), seed: int = 0) -> np.ndarray:
    """Noise with a bright ball."""
    rng = np.random.default_rng(seed)
    grid = np.stack(np.meshgrid(*map(np.arange, size), indexing="ij"), axis=-1)
    ball = (((grid - np.array(size) / 2.2) / np.array(size)) ** 2).sum(-1) < 0.04
    return (100 * rng.random(size) + 300 * ball).astype(np.int16)


def task_of(state: Mapping[str, Any]) -> SegmentTask:
    config = options.config_from_dict(
        APP,
        {
            **{"app": "medseg", "model": "unet", "data": "synthetic"},
            "model_args": {"channels": [4, 8], "residual_units": 1},
        },
    )
    made = trainer.build_task(APP, config, state)
    assert isinstance(made, SegmentTask)
    with torch.no_grad():
        for name, weight in made.named_parameters():
            weight.mul_(3.0 if name.endswith("weight") else 1.0)  # so that labels differ between voxels
    return made.eval()


def state_of(ndim: int, channels: int, **chosen: object) -> dict[str, Any]:
    affine = np.diag([1.0, 1.0, 2.0, 1.0]) if ndim == 3 else None
    images = [
        Image(values=np.stack([volume((16, 16, 8)[:ndim] if ndim == 3 else (24, 20), s)] * channels), affine=affine)
        for s in range(3)
    ]
    cases = tuple(
        Case(
            name=f"c{i}",
            patient=f"p{i}",
            image=lambda image=image: image,  # type: ignore[misc]
            label=lambda image=image: Image(values=(image.values[0] > 250).astype(np.uint8), affine=affine),  # type: ignore[misc]
        )
        for i, image in enumerate(images)
    )
    names = ("ball", "ring") if ndim == 3 else ("ball",)
    corpus = Corpus(cases=cases, structures=names, ndim=ndim, channels=channels, unit="mm" if ndim == 3 else "px")
    return data.build(corpus, SegmentDataConfig(test=0.4, **chosen), "tiny").state  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def task() -> SegmentTask:
    return task_of(state_of(3, 1, size=(16, 16, 8)))


def run(task: SegmentTask, inputs: list[Path], output: Path, **chosen: object) -> list[Path]:
    output.mkdir(exist_ok=True)
    return predict_files(task, inputs, output, chosen)


def same_place(one: Path, other: Path) -> None:
    a, b = sitk.ReadImage(str(one)), sitk.ReadImage(str(other))
    assert a.GetSize() == b.GetSize()
    assert a.GetOrigin() == b.GetOrigin()
    assert a.GetSpacing() == b.GetSpacing()
    assert a.GetDirection() == b.GetDirection()


def nifti(path: Path, values: np.ndarray, affine: np.ndarray) -> Path:
    made = nibabel.Nifti1Image(values, affine)
    made.header["descrip"] = b"scanner"
    made.set_sform(affine, 1)
    made.set_qform(affine, 2, strip_shears=True)
    made.header.set_xyzt_units("mm", "sec")
    nibabel.save(made, path)
    return path


def affine_of(directions: np.ndarray, spacing: tuple[float, ...], origin: tuple[float, ...]) -> np.ndarray:
    made = np.eye(4)
    made[:3, :3], made[:3, 3] = directions * spacing, origin
    return made


@pytest.mark.parametrize(
    "directions",
    [np.eye(3), TURN, np.diag([-1.0, -1.0, 1.0]), np.array([[0, 0, 1.0], [-1.0, 0, 0], [0, 1.0, 0]])],
    ids=["RAS", "oblique", "LPS", "PSR"],
)
def test_nifti_keeps_its_header(task: SegmentTask, tmp_path: Path, directions: np.ndarray) -> None:
    affine = affine_of(directions, (0.9, 1.3, 2.7), (-12.5, 30.25, 7.0))
    source = nifti(tmp_path / "scan.nii.gz", volume(), affine)
    made = run(task, [source], tmp_path / "out")
    mask = tmp_path / "out" / "scan.nii.gz"
    assert mask in made
    same_place(mask, source)
    a, b = nibabel.load(mask), nibabel.load(source)
    assert a.get_data_dtype() == np.uint8
    for name in ("sform_code", "qform_code", "srow_x", "quatern_b", "pixdim", "xyzt_units", "descrip", "qoffset_x"):
        assert np.array_equal(a.header[name], b.header[name]), name
    image = read_image(source)
    labels = np.asanyarray(a.dataobj)
    assert np.array_equal(labels, task.labels(prepare(image, task.data_state)))
    assert len(np.unique(labels)) > 1
    rows = list(csv.DictReader((tmp_path / "out" / "volumes.csv").open()))
    for number, row in enumerate(rows, 1):
        assert (row["name"], int(row["label"]), int(row["voxels"])) == ("scan", number, int((labels == number).sum()))
        assert float(row["ml"]) == pytest.approx(int(row["voxels"]) * 0.9 * 1.3 * 2.7 / 1000, rel=1e-4)
    assert (tmp_path / "out" / "scan_overlay.png").read_bytes().startswith(b"\x89PNG")


def test_another_orientation_is_the_same_anatomy(task: SegmentTask, tmp_path: Path) -> None:
    values = volume()
    plain = nifti(tmp_path / "plain.nii.gz", values, np.diag([1.0, 1.0, 2.0, 1.0]))
    turned = nibabel.load(plain).as_reoriented(nibabel.orientations.axcodes2ornt(("P", "I", "L")))
    other = nifti(tmp_path / "turned.nii.gz", np.asanyarray(turned.dataobj), turned.affine)
    run(task, [plain, other], tmp_path / "out", overlays=False)
    first = nibabel.load(tmp_path / "out" / "plain.nii.gz")
    back = nibabel.as_closest_canonical(nibabel.load(tmp_path / "out" / "turned.nii.gz"))
    assert np.asanyarray(nibabel.load(other).dataobj).shape != values.shape
    assert np.array_equal(np.asanyarray(first.dataobj), np.asanyarray(back.dataobj))
    assert np.allclose(first.affine, back.affine)


@pytest.mark.parametrize("end", [".nrrd", ".mha", ".nii"])
@pytest.mark.parametrize("wanted", ["same", "nrrd", "nii.gz"])
def test_other_formats_keep_their_place(task: SegmentTask, tmp_path: Path, end: str, wanted: str) -> None:
    image = sitk.GetImageFromArray(volume().T.copy())
    image.SetSpacing((0.7, 1.1, 3.0))
    image.SetOrigin((5.0, -7.5, 100.0))
    image.SetDirection(TURN.ravel().tolist())
    source = tmp_path / f"scan{end}"
    sitk.WriteImage(image, str(source))
    made = run(task, [source], tmp_path / "out", format=wanted, overlays=False)
    mask = tmp_path / "out" / f"scan{end if wanted == 'same' else f'.{wanted}'}"
    assert mask in made
    a, b = sitk.ReadImage(str(mask)), sitk.ReadImage(str(source))
    assert a.GetSize() == b.GetSize()
    # NIfTI has places in single precision.
    allowed = 1e-12 if mask.suffix == source.suffix else 1e-5
    for one, other in (
        (a.GetOrigin(), b.GetOrigin()),
        (a.GetSpacing(), b.GetSpacing()),
        (a.GetDirection(), b.GetDirection()),
    ):
        assert np.abs(np.subtract(one, other)).max() <= allowed


def test_sheared_axes(task: SegmentTask, tmp_path: Path) -> None:
    affine = affine_of(np.array([[1.0, 0.2, 0], [0, 1.0, 0], [0, 0, 1.0]]), (1.0, 1.0, 2.0), (1.0, 2.0, 3.0))
    made = nibabel.Nifti1Image(volume(), None)
    made.set_sform(affine, 1)
    nibabel.save(made, tmp_path / "sheared.nii.gz")
    run(task, [tmp_path / "sheared.nii.gz"], tmp_path / "out")
    mask = nibabel.load(tmp_path / "out" / "sheared.nii.gz")
    assert np.array_equal(mask.get_sform(), nibabel.load(tmp_path / "sheared.nii.gz").get_sform())


def test_a_dicom_series(task: SegmentTask, tmp_path: Path) -> None:
    folder = tmp_path / "series"
    folder.mkdir()
    values, writer = volume(), sitk.ImageFileWriter()
    writer.KeepOriginalImageUIDOn()
    for number in range(values.shape[2]):
        part = sitk.GetImageFromArray(values[:, :, number].T.copy()[None])
        part.SetSpacing((0.8, 1.25, 2.5))
        for key, text in (
            ("0008|0060", "MR"),
            ("0020|000e", "1.2.826.0.1.3680043.2.1125.1"),
            ("0020|000d", "1.2.826.0.1.3680043.2.1125.2"),
            ("0008|0018", f"1.2.826.0.1.3680043.2.1125.1.{number}"),
            ("0020|0032", f"10\\-20\\{5 + 2.5 * number}"),
            ("0020|0037", "1\\0\\0\\0\\1\\0"),
            ("0020|0013", str(number)),
        ):
            part.SetMetaData(key, text)
        writer.SetFileName(str(folder / f"{number:03d}.dcm"))
        writer.Execute(part)
    reader = sitk.ImageSeriesReader()
    reader.SetFileNames(reader.GetGDCMSeriesFileNames(str(folder)))
    series = reader.Execute()
    made = run(task, [folder], tmp_path / "out")
    assert tmp_path / "out" / "series.nii.gz" in made
    mask = sitk.ReadImage(str(tmp_path / "out" / "series.nii.gz"))
    assert mask.GetSize() == series.GetSize() == values.shape
    for one, other in (
        (mask.GetOrigin(), series.GetOrigin()),
        (mask.GetSpacing(), series.GetSpacing()),
        (mask.GetDirection(), series.GetDirection()),
    ):
        assert np.abs(np.subtract(one, other)).max() <= 1e-5


def test_bad_files_are_named_and_the_rest_done(
    task: SegmentTask, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    place = np.diag([1.0, 1.0, 2.0, 1.0])
    folder = tmp_path / "in"
    folder.mkdir()
    good = nifti(folder / "good.nii.gz", volume(), place)
    nan = volume().astype(np.float32)
    nan[0, 0, 0] = np.nan
    nifti(folder / "nan.nii.gz", nan, place)
    nifti(folder / "four.nii.gz", np.stack([volume()] * 2, -1), place)
    whole = nifti(folder / "cut.nii", volume(), place)
    whole.write_bytes(whole.read_bytes()[:-100])
    (folder / "empty.nii.gz").write_bytes(b"")
    (folder / "text.nrrd").write_text("no image")
    nifti(folder / "packed.nii.gz", volume(), place)
    (folder / "packed.nii.gz").write_bytes((folder / "packed.nii.gz").read_bytes()[:-200])
    with pytest.raises(UserError, match=r"6 of 7 images could not be segmented.*: cut, empty, four, nan, packed, text"):
        run(task, [folder], tmp_path / "out", overlays=False)
    told = [line for line in capsys.readouterr().err.splitlines() if line.startswith("left out: ")]
    assert len(told) == 6
    for name in ("cut.nii", "empty.nii.gz is empty", "four.nii.gz: the image has 2 channels", "no numbers"):
        assert any(name in line for line in told), name
    assert sorted(file.name for file in (tmp_path / "out").iterdir()) == ["good.nii.gz", "volumes.csv"]
    same_place(tmp_path / "out" / "good.nii.gz", good)
    with pytest.raises(UserError, match=r"^empty.nii.gz is empty$"):
        run(task, [folder / "empty.nii.gz"], tmp_path / "none")
    assert not list((tmp_path / "none").iterdir())


def test_nothing_is_overwritten(task: SegmentTask, tmp_path: Path) -> None:
    source = nifti(tmp_path / "a.nii.gz", volume(), np.eye(4))
    before = source.read_bytes()
    with pytest.raises(UserError, match="choose another --output"):
        run(task, [source], tmp_path)
    other = tmp_path / "other"
    other.mkdir()
    nifti(other / "a.nii.gz", volume(), np.eye(4))
    with pytest.raises(UserError, match="two inputs are called 'a'"):
        run(task, [source, other / "a.nii.gz"], tmp_path / "out")
    assert source.read_bytes() == before
    (tmp_path / "bare").mkdir()
    with pytest.raises(UserError, match="neither images nor a DICOM series"):
        run(task, [tmp_path / "bare"], tmp_path / "out")


def test_probabilities_windows_and_flips(task: SegmentTask, tmp_path: Path) -> None:
    source = nifti(tmp_path / "a.nii.gz", volume((33, 20, 12)), np.diag([1.0, 1.0, 2.0, 1.0]))
    made = run(task, [source], tmp_path / "out", probabilities=True, overlays=False, window=(12,), overlap=0.5)
    assert [one.name for one in made] == [
        "a.nii.gz", "a_ball_probability.nii.gz", "a_ring_probability.nii.gz", "volumes.csv",
    ]  # fmt: skip
    ball, ring = (nibabel.load(one) for one in made[1:3])
    assert ball.get_data_dtype() == np.float32
    same_place(made[1], source)
    chances = np.stack([ball.get_fdata(), ring.get_fdata()])
    chances = np.concatenate([1 - chances.sum(0, keepdims=True), chances])
    assert chances.min() > -1e-5
    sure = np.sort(chances, axis=0)
    clear = sure[-1] - sure[-2] > 1e-5
    assert np.array_equal(chances.argmax(0)[clear], np.asanyarray(nibabel.load(made[0]).dataobj)[clear])
    with pytest.raises(UserError, match="--window needs 3 numbers"):
        run(task, [source], tmp_path / "out", window=(8, 8))
    with pytest.raises(UserError, match="--overlap is 1"):
        run(task, [source], tmp_path / "out", overlap=1.0)
    with pytest.raises(UserError, match="PNG cannot hold"):
        run(task, [source], tmp_path / "out", format="png")


def test_channels_of_one_image(tmp_path: Path) -> None:
    task = task_of(state_of(3, 2, size=(16, 16, 8)))
    place = np.diag([1.0, 1.0, 2.0, 1.0])
    parts = [volume(seed=1), volume(seed=2)]
    for number, part in enumerate(parts):
        nifti(tmp_path / f"a_{number:04d}.nii.gz", part, place)
    whole = nifti(tmp_path / "b.nii.gz", np.stack(parts, -1), place)
    apart = [tmp_path / "a_0000.nii.gz", tmp_path / "a_0001.nii.gz"]
    run(task, apart, tmp_path / "out", overlays=False)
    run(task, [whole], tmp_path / "one", overlays=False)
    a, b = nibabel.load(tmp_path / "out" / "a.nii.gz"), nibabel.load(tmp_path / "one" / "b.nii.gz")
    assert a.shape == b.shape == parts[0].shape
    assert np.array_equal(np.asanyarray(a.dataobj), np.asanyarray(b.dataobj))


def test_pictures(tmp_path: Path) -> None:
    task = task_of(state_of(2, 1, size=(16, 16)))
    source = tmp_path / "skin.png"
    sitk.WriteImage(sitk.GetImageFromArray((volume((37, 23)) % 256).astype(np.uint8)), str(source))
    run(task, [source], tmp_path / "out")
    mask = sitk.GetArrayFromImage(sitk.ReadImage(str(tmp_path / "out" / "skin.png")))
    assert mask.shape == (37, 23)
    assert set(np.unique(mask).tolist()) == {0, 255}
    assert np.array_equal(mask > 0, task.labels(prepare(read_image(source), task.data_state)) > 0)
    (row,) = csv.DictReader((tmp_path / "out" / "volumes.csv").open())
    assert row["ml"] == ""


def test_slices_of_volumes(tmp_path: Path) -> None:
    task = task_of(state_of(3, 1, size=(16, 16), slices=2))
    source = nifti(tmp_path / "heart.nii.gz", volume(), affine_of(TURN, (1.5, 1.5, 10.0), (0, 0, 0)))
    run(task, [source], tmp_path / "out")
    same_place(tmp_path / "out" / "heart.nii.gz", source)
    labels = np.asanyarray(nibabel.load(tmp_path / "out" / "heart.nii.gz").dataobj)
    assert np.array_equal(labels, task.labels(prepare(read_image(source), task.data_state)))


@pytest.mark.data
def test_real_volumes_keep_their_place(tmp_path: Path) -> None:
    from attn_medseg.segment.cards import DATASETS, HIPPOCAMPUS
    from attn_shared import datasets

    try:
        folder = datasets.locate(DATASETS["hippocampus"]) / HIPPOCAMPUS / "images"
    except UserError as error:
        pytest.skip(str(error))
    files = sorted(folder.glob("*.nii.gz"))[:3]
    state = data.load_bundle("hippocampus", SegmentDataConfig(max_train=4)).state
    task = task_of(state)
    run(task, files, tmp_path / "out")
    for file in files:
        same_place(tmp_path / "out" / file.name, file)
        labels = np.asanyarray(nibabel.load(tmp_path / "out" / file.name).dataobj)
        assert np.array_equal(labels, task.labels(prepare(read_image(file), state)))
