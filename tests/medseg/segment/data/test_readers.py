"""Each layout of folders on a small one that the test writes, and the sets that cards describe."""

from __future__ import annotations

import importlib.util
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
from PIL import Image as Pillow

from attn_medseg.cli import APP
from attn_medseg.segment.cards import DATASETS
from attn_medseg.segment.check import check_file
from attn_medseg.segment.corpus import Case, Corpus
from attn_medseg.segment.data import load_bundle, load_image, load_label, load_scribble
from attn_medseg.segment.options import SegmentDataConfig
from attn_medseg.segment.readers import load_corpus
from attn_medseg.segment.readers.files import IGNORE
from attn_medseg.segment.readers.folders import patient_of
from attn_shared import datasets
from attn_shared.errors import UserError

ARGS = SegmentDataConfig()
RNG = np.random.default_rng(0)


def nifti(path: Path, values: np.ndarray, spacing: Sequence[float] = (1.0, 1.0, 2.0)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    nibabel.save(nibabel.Nifti1Image(values, np.diag([*spacing, 1.0])), path)
    return path


def picture(path: Path, values: np.ndarray) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Pillow.fromarray(values).save(path)
    return path


def scan(size: Sequence[int] = (6, 5, 4)) -> np.ndarray:
    return RNG.integers(0, 900, size).astype(np.int16)


def mask(size: Sequence[int] = (6, 5, 4), labels: int = 3) -> np.ndarray:
    return RNG.integers(0, labels, size).astype(np.uint8)


def read(path: Path, **options: Any) -> Corpus:
    return load_corpus(str(path), SegmentDataConfig(**options))


def names(corpus: Corpus) -> list[str]:
    return [case.name for case in corpus.cases]


def describe(folder: Path, **told: Any) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "dataset.json").write_text(json.dumps(told))


# -- patients -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "patient"),
    [
        ("hippocampus_001", "hippocampus_001"),
        ("patient001_frame01", "patient001"),
        ("patient001_frame01_ED", "patient001"),
        ("case0005_slice000", "case0005"),
        ("p7-visit2_slice-12", "p7"),
        ("ISIC_0000000", "ISIC_0000000"),
        ("scan_t3", "scan_t3"),
        ("brain_scan_12", "brain_scan_12"),
        ("frame01", "frame01"),
    ],
)
def test_the_patient_in_a_name(name: str, patient: str) -> None:
    assert patient_of(name, "") == patient


def test_a_pattern_of_patients() -> None:
    assert patient_of("site3-0042-T1", r"-(\d+)-") == "0042"
    with pytest.raises(UserError, match="does not fit the name 'other'"):
        patient_of("other", r"-(\d+)-")


# -- dataset.json ---------------------------------------------------------------------------------------------------


def nnunet(root: Path, **told: Any) -> Path:
    describe(
        root,
        **{
            "channel_names": {"0": "T1", "1": "T2"},
            "labels": {"background": 0, "tumour": 2, "liver": 1, "ignore": 3},
            "numTraining": 3,
            "file_ending": ".nii.gz",
        }
        | told,
    )
    for name in ("a", "b", "c"):
        for channel in range(2):
            nifti(root / "imagesTr" / f"{name}_{channel:04d}.nii.gz", scan())
        nifti(root / "labelsTr" / f"{name}.nii.gz", mask(labels=4))
    return root


def test_nnunet(tmp_path: Path) -> None:
    corpus = read(nnunet(tmp_path / "d"))
    assert names(corpus) == ["a", "b", "c"]
    assert (corpus.structures, corpus.ndim, corpus.channels, corpus.unit, corpus.exact) == (
        ("liver", "tumour"),
        3,
        2,
        "mm",
        True,
    )
    assert dict(corpus.values) == {0: 0, 1: 1, 2: 2, 3: IGNORE}
    assert corpus.notes == ()
    case = corpus.cases[1]
    image = load_image(case)
    for channel in range(2):
        stored = np.asanyarray(nibabel.load(tmp_path / "d/imagesTr" / f"b_{channel:04d}.nii.gz").dataobj)
        assert (image.values[channel] == stored).all()
    stored = np.asanyarray(nibabel.load(tmp_path / "d/labelsTr/b.nii.gz").dataobj)
    assert (load_label(case, corpus) == np.array([0, 1, 2, IGNORE])[stored]).all()
    assert names(read(tmp_path / "d" / "dataset.json")) == ["a", "b", "c"]


def test_nnunet_names_what_is_missing(tmp_path: Path) -> None:
    root = nnunet(tmp_path / "d")
    (root / "imagesTr" / "a_0000.nii.gz").unlink()
    (root / "imagesTr" / "a_0001.nii.gz").unlink()
    (root / "labelsTr" / "b.nii.gz").unlink()
    nifti(root / "labelsTr" / "e.nii.gz", mask())
    nifti(root / "imagesTr" / "e_0000.nii.gz", scan())
    (root / "imagesTr" / "f_0000.nii.gz").write_bytes(b"1234")
    (root / "imagesTr" / "f_0001.nii.gz").write_bytes(b"1234")
    nifti(root / "labelsTr" / "f.nii.gz", mask())
    for channel in range(2):
        nifti(root / "imagesTr" / f"g_{channel:04d}.nii.gz", scan())
    nifti(root / "labelsTr" / "g.nii.gz", mask((6, 5, 3)))
    corpus = read(root)
    assert names(corpus) == ["c"]
    assert corpus.notes == (
        "e lacks channel 0001 and is left out",
        "imagesTr: 1 labels have no image and are left out: a",
        "imagesTr: 1 images have no label and are left out: b",
        "f_0000.nii.gz cannot be read: it is cut short, damaged or of another format; f is left out",
        "g.nii.gz is of size 6 x 5 x 3, g_0000.nii.gz of 6 x 5 x 4; g is left out",
    )
    assert tuple(check_file(root)) == corpus.notes


def test_nnunet_with_a_test_part_and_regions(tmp_path: Path) -> None:
    root = nnunet(
        tmp_path / "d",
        labels={"background": 0, "whole": [1, 2, 3], "core": [2, 3], "enhancing": [3]},
        regions_class_order=[1, 2, 3],
    )
    for channel in range(2):
        nifti(root / "imagesTs" / f"t_{channel:04d}.nii.gz", scan())
    assert all(case.part == "" for case in read(root).cases)
    nifti(root / "labelsTs" / "t.nii.gz", mask())
    corpus = read(root)
    assert [case.part for case in corpus.cases] == ["train", "train", "train", "test"]
    assert corpus.structures == ("whole", "core", "enhancing")
    assert dict(corpus.values) == {0: 0, 1: 1, 2: 2, 3: 3}
    assert "smallest region" in corpus.notes[0]


def test_hounsfield_units_are_kept(tmp_path: Path) -> None:
    corpus = read(nnunet(tmp_path / "d", channel_names={"0": "CT", "1": "ct"}))
    assert corpus.defaults["normalise"] == "clip"
    assert "Hounsfield units" in corpus.notes[0]
    assert "normalise" not in read(nnunet(tmp_path / "e", channel_names={"0": "CT", "1": "PET"})).defaults


def test_nnunet_of_pictures(tmp_path: Path) -> None:
    describe(
        tmp_path, channel_names={"0": "R", "1": "G", "2": "B"}, labels={"background": 0, "road": 1}, file_ending=".png"
    )
    picture(tmp_path / "imagesTr/a_0000.png", mask((8, 6, 3), 256))
    picture(tmp_path / "labelsTr/a.png", mask((8, 6), 2))
    corpus = read(tmp_path)
    assert (corpus.ndim, corpus.channels, corpus.unit, corpus.exact) == (2, 3, "px", False)


def test_the_decathlon(tmp_path: Path) -> None:
    root = tmp_path / "Task04"
    pairs = [{"image": f"./imagesTr/h_{one}.nii.gz", "label": f"./labelsTr/h_{one}.nii.gz"} for one in "123"]
    describe(
        root,
        modality={"0": "FLAIR", "1": "T1w"},
        labels={"0": "background", "1": "Anterior", "2": "Posterior"},
        numTraining=3,
        training=pairs,
        test=["./imagesTs/h_9.nii.gz"],
    )
    for one in "124":
        nifti(root / f"imagesTr/h_{one}.nii.gz", scan((6, 5, 4, 2)))
    for one in "123":
        nifti(root / f"labelsTr/h_{one}.nii.gz", mask())
    corpus = read(root)
    assert names(corpus) == ["h_1", "h_2"]
    assert (corpus.structures, corpus.channels, corpus.ndim) == (("Anterior", "Posterior"), 2, 3)
    assert corpus.notes == (
        "1 cases of dataset.json have no image and are left out: h_3",
        "1 files of imagesTr are not named in dataset.json and are left out: h_4",
    )
    assert load_image(corpus.cases[0]).values.shape == (2, 6, 5, 4)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("{", "dataset.json in d cannot be read"),
        ("[]", 'dataset.json in d has no "labels"'),
        ('{"labels": {"background": 0}}', "names no structure beside the background"),
        ('{"labels": {"background": 0, "a": 1}}', "d has a dataset.json but no folder imagesTr"),
    ],
)
def test_descriptions_that_are_none(tmp_path: Path, text: str, sentence: str) -> None:
    (tmp_path / "d").mkdir()
    (tmp_path / "d/dataset.json").write_text(text)
    with pytest.raises(UserError, match=sentence):
        read(tmp_path / "d")


# -- images beside masks --------------------------------------------------------------------------------------------


def test_images_beside_masks(tmp_path: Path) -> None:
    for name in ("a", "b", "c"):
        picture(tmp_path / f"images/{name}.jpg", mask((8, 6, 3), 256))
    picture(tmp_path / "masks/a.png", mask((8, 6), 2) * 255)
    picture(tmp_path / "masks/b_mask.png", mask((8, 6), 2) * 255)
    picture(tmp_path / "masks/d.png", mask((8, 6), 2) * 255)
    corpus = read(tmp_path)
    assert names(corpus) == ["a", "b"]
    assert corpus.notes == (
        "1 labels have no image and are left out: d",
        "1 images have no label and are left out: c",
    )
    assert (corpus.structures, dict(corpus.values)) == (("structure 1",), {0: 0, 255: 1})
    assert read(tmp_path, structures=("lesion",)).structures == ("lesion",)
    assert set(np.unique(load_label(corpus.cases[0], corpus)).tolist()) == {0, 1}


def test_volumes_in_parts_with_scribbles(tmp_path: Path) -> None:
    for part, name in (("train", "p1_frame1"), ("train", "p1_frame2"), ("val", "p2"), ("test", "p3")):
        nifti(tmp_path / part / "images" / f"{name}.nii.gz", scan())
        nifti(tmp_path / part / "labels" / f"{name}.nii.gz", mask())
    drawn = np.full((6, 5, 4), 255, np.uint8)
    drawn[1:3] = 2
    nifti(tmp_path / "train/scribbles/p1_frame1.nii.gz", drawn)
    corpus = read(tmp_path, structures=("x", "y"))
    assert [(case.name, case.patient, case.part) for case in corpus.cases] == [
        ("p1_frame1", "p1", "train"),
        ("p1_frame2", "p1", "train"),
        ("p2", "p2", "val"),
        ("p3", "p3", "test"),
    ]
    assert corpus.structures == ("x", "y")
    assert corpus.notes == ("4 cases are of 3 patients by their names, such as p1_frame1 of p1",)
    found = load_scribble(corpus.cases[0], corpus, (6, 5, 4))
    assert (found == drawn).all()
    with pytest.raises(UserError, match="p1_frame2 has no scribble"):
        load_scribble(corpus.cases[1], corpus, (6, 5, 4))


def test_folders_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"holds no data set: there is no dataset.json"):
        read(tmp_path)
    with pytest.raises(UserError, match="there is no folder"):
        read(tmp_path / "none")
    with pytest.raises(UserError, match="is one image; to train or evaluate, name a folder"):
        read(nifti(tmp_path / "a.nii.gz", scan()))
    picture(tmp_path / "images/a.png", mask((8, 6), 200))
    picture(tmp_path / "masks/b.png", mask((8, 6), 2))
    with pytest.raises(UserError, match=r"no image in .* has a mask of the same name"):
        read(tmp_path)
    picture(tmp_path / "masks/a.png", mask((8, 6), 1))
    with pytest.raises(UserError, match="hold nothing but 0"):
        read(tmp_path)
    picture(tmp_path / "masks/a.png", np.arange(80, dtype=np.uint8).reshape(8, 10))
    with pytest.raises(UserError, match="hold more than 64 values"):
        read(tmp_path)


# -- published layouts ----------------------------------------------------------------------------------------------


def test_acdc_as_it_is_published(tmp_path: Path) -> None:
    for part, number in (("training", 1), ("training", 2), ("testing", 101)):
        place = tmp_path / part / f"patient{number:03d}"
        stem = place / f"patient{number:03d}"
        for frame in (1, 12):
            nifti(stem.with_name(f"{stem.name}_frame{frame:02d}.nii.gz"), scan(), (1.5, 1.5, 10))
            nifti(stem.with_name(f"{stem.name}_frame{frame:02d}_gt.nii.gz"), mask(labels=4), (1.5, 1.5, 10))
        nifti(stem.with_name(f"{stem.name}_4d.nii.gz"), scan((6, 5, 4, 3)), (1.5, 1.5, 10))
        if number != 2:
            (place / "Info.cfg").write_text("ED: 1\nES: 12\nGroup: DCM\nHeight: 184.0\nNbFrame: 30\nWeight: 95.0\n")
    (tmp_path / "training/patient002/patient002_frame12_gt.nii.gz").unlink()
    corpus = read(tmp_path)
    assert [(case.name, case.patient, case.part, case.slices) for case in corpus.cases] == [
        ("patient001_frame01_ED", "patient001", "train", 2),
        ("patient001_frame12_ES", "patient001", "train", 2),
        ("patient002_frame01", "patient002", "train", 2),
        ("patient101_frame01_ED", "patient101", "test", 2),
        ("patient101_frame12_ES", "patient101", "test", 2),
    ]
    assert (corpus.ndim, corpus.unit, corpus.exact) == (2, "mm", True)
    assert corpus.structures == ("right ventricle", "myocardium", "left ventricle")
    assert corpus.notes == (
        "patient002 has no Info.cfg: which frame is ED and which ES is not known",
        "patient002: 1 images have no label and are left out: patient002_frame12",
    )
    alone = read(tmp_path / "training")
    assert [case.part for case in alone.cases] == [""] * 3


def test_synapse_as_transunet_prepares_it(tmp_path: Path) -> None:
    (tmp_path / "train_npz").mkdir()
    slices = {}
    for case, number in ((5, 0), (5, 1), (5, 2), (6, 0)):
        arrays = {"image": RNG.random((8, 8), np.float32), "label": mask((8, 8), 9).astype(np.float32)}
        np.savez(tmp_path / "train_npz" / f"case{case:04d}_slice{number:03d}.npz", **arrays)
        slices[case, number] = arrays
    corpus = read(tmp_path)
    assert [(case.name, case.patient, case.part, case.slices) for case in corpus.cases] == [
        ("case0005", "case0005", "train", 2),
        ("case0006", "case0006", "train", 2),
    ]
    assert len(corpus.structures) == 8
    image, label = load_image(corpus.cases[0]), load_label(corpus.cases[0], corpus)
    for number in range(3):
        assert (image.values[0, :, :, number] == slices[5, number]["image"]).all()
        assert (label[:, :, number] == slices[5, number]["label"]).all()
    lists = tmp_path / "lists" / "lists_Synapse"
    lists.mkdir(parents=True)
    (lists / "train.txt").write_text("case0005_slice000\ncase0007_slice000\n")
    corpus = read(tmp_path)
    assert names(corpus) == ["case0005"]
    assert "1 slices of train.txt have no file: case0007_slice000" in corpus.notes
    (tmp_path / "test_vol_h5").mkdir()
    (tmp_path / "test_vol_h5" / "case0001.npy.h5").write_bytes(b"none")
    if importlib.util.find_spec("h5py") is None:
        with pytest.raises(UserError, match=r"case0001.npy.h5 needs h5py: `pip install attn-medseg\[synapse\]`"):
            read(tmp_path)


@pytest.mark.skipif(importlib.util.find_spec("h5py") is None, reason="h5py is not installed")
def test_synapse_test_volumes(tmp_path: Path) -> None:
    import h5py

    image, label = RNG.random((3, 8, 7), np.float32), mask((3, 8, 7), 14)
    (tmp_path / "test_vol_h5").mkdir()
    with h5py.File(tmp_path / "test_vol_h5" / "case0001.npy.h5", "w") as file:
        file["image"], file["label"] = image, label
    corpus = read(tmp_path)
    assert [(case.name, case.part) for case in corpus.cases] == [("case0001", "test")]
    assert (load_image(corpus.cases[0]).values[0] == np.moveaxis(image, 0, -1)).all()
    assert (load_label(corpus.cases[0], corpus) == np.moveaxis(np.where(label > 8, 0, label), 0, -1)).all()


@pytest.mark.parametrize(
    ("inputs", "truths"),
    [
        ("ISIC2018_Task1-2_{}_Input", "ISIC2018_Task1_{}_GroundTruth"),
        ("ISIC-2017_{}_Data", "ISIC-2017_{}_Part1_GroundTruth"),
    ],
)
def test_isic(tmp_path: Path, inputs: str, truths: str) -> None:
    for word, number in (("Training", 1), ("Training", 2), ("Validation", 3), ("Test", 4)):
        name = f"ISIC_{number:07d}"
        picture(tmp_path / inputs.format(word) / f"{name}.jpg", mask((8 + number, 6, 3), 256))
        picture(tmp_path / inputs.format(word) / f"{name}_superpixels.png", mask((8 + number, 6, 3), 256))
        if number != 2:
            picture(tmp_path / truths.format(word) / f"{name}_segmentation.png", mask((8 + number, 6), 2) * 255)
    (tmp_path / inputs.format("Training") / "ATTRIBUTION.txt").write_text("x")
    corpus = read(tmp_path)
    assert [(case.name, case.part) for case in corpus.cases] == [
        ("ISIC_0000001", "train"),
        ("ISIC_0000003", "val"),
        ("ISIC_0000004", "test"),
    ]
    assert "Training: 1 images have no label and are left out: ISIC_0000002" in corpus.notes
    assert (corpus.structures, corpus.channels, corpus.defaults["resize"]) == (("lesion",), 3, "whole")
    assert set(np.unique(load_label(corpus.cases[0], corpus)).tolist()) == {0, 1}


def test_ph2_as_it_is_published(tmp_path: Path) -> None:
    root = tmp_path / "PH2 Dataset images"
    for name in ("IMD002", "IMD003"):
        picture(root / name / f"{name}_Dermoscopic_Image" / f"{name}.bmp", mask((8, 6, 3), 256))
        picture(root / name / f"{name}_lesion" / f"{name}_lesion.bmp", mask((8, 6), 2) > 0)
        picture(root / name / f"{name}_roi" / f"{name}_R1_Label3.bmp", mask((8, 6), 2))
    for place in (tmp_path, root):
        corpus = read(place)
        assert names(corpus) == ["IMD002", "IMD003"]
        assert set(np.unique(load_label(corpus.cases[0], corpus)).tolist()) == {0, 1}
        assert load_image(corpus.cases[0]).values.shape == (3, 8, 6)


def test_drive(tmp_path: Path) -> None:
    views = {}
    for part, number in (("training", 21), ("training", 22), ("test", 1)):
        picture(tmp_path / part / "images" / f"{number:02d}_{part}.tif", mask((8, 6, 3), 256))
        picture(tmp_path / part / "1st_manual" / f"{number:02d}_manual1.gif", mask((8, 6), 2) * 255)
        views[number] = mask((8, 6), 2)
        picture(tmp_path / part / "mask" / f"{number:02d}_{part}_mask.gif", views[number] * 255)
    corpus = read(tmp_path)
    assert [(case.name, case.part) for case in corpus.cases] == [
        ("01_test", "test"),
        ("21_training", "train"),
        ("22_training", "train"),
    ]
    label = load_label(corpus.cases[0], corpus)
    assert ((label == IGNORE) == (views[1] == 0)).all()
    assert "what lies outside of the field of view counts nowhere" in corpus.notes


# -- data check -----------------------------------------------------------------------------------------------------


def test_check_says_what_is_wrong(tmp_path: Path) -> None:
    good = nnunet(tmp_path / "d")
    assert check_file(good) == []
    bad = np.zeros((6, 5, 4), np.float32)
    bad[0, 0, 0] = np.nan
    nifti(good / "imagesTr/a_0001.nii.gz", bad)
    nifti(good / "labelsTr/b.nii.gz", mask(), (1.0, 1.0, 2.5))
    nifti(good / "labelsTr/c.nii.gz", mask() * 7)
    assert check_file(good) == [
        "a_0001.nii.gz holds 1 values that are no numbers (NaN or infinite)",
        "b: image and label lie in different places (their affines differ)",
        "c.nii.gz holds the value 7, which is none of 0, 1, 2, 3",
    ]
    assert check_file(good / "imagesTr/a_0001.nii.gz") == [
        "a_0001.nii.gz holds 1 values that are no numbers (NaN or infinite)"
    ]
    assert check_file(good / "imagesTr/a_0000.nii.gz") == []
    assert "holds no data set" in check_file(tmp_path)[0]


# -- the sets of the cards ------------------------------------------------------------------------------------------


def test_cards_say_all() -> None:
    for card in DATASETS.values():
        assert card.kind == "segment"
        assert datasets.describe(card)
        assert card.embedded or (card.files and card.manual and card.licence)
    assert "synthetic" in datasets.list_data(APP)


@pytest.mark.parametrize(("name", "ndim"), [("synthetic", 3), ("synthetic_2d", 2)])
def test_synthetic_sets(name: str, ndim: int) -> None:
    corpus, again = load_corpus(name, ARGS), load_corpus(name, ARGS)
    assert corpus.ndim == ndim
    assert "synthetic" in corpus.notes[0]
    assert {case.part for case in corpus.cases} == {"train", "val", "test"}
    images = [load_image(case).values for case in corpus.cases[:6]]
    assert all((one == load_image(case).values).all() for one, case in zip(images, again.cases))
    assert all((images[0] != one).any() for one in images[1:])
    seen = {one for case in corpus.cases for one in np.unique(load_label(case, corpus)).tolist()}
    assert seen == {0, 1, 2, 3}


def real(name: str) -> Corpus:
    root = Path(os.environ.get("ATTN_DATA", "data")) / "medseg"
    if not root.is_dir():
        pytest.skip(f"{root} is not there; set ATTN_DATA to the folder that holds medseg/")
    return load_corpus(name, ARGS)


@pytest.mark.data
def test_hippocampus() -> None:
    corpus = real("hippocampus")
    assert len(corpus.cases) == 260
    assert corpus.notes == (
        "hippocampus_010 has a label but no image and is left out",
        "hippocampus_281 has a label but no image and is left out",
        "hippocampus_118 has an image but no label and is left out",
    )
    case = corpus.cases[0]
    assert load_image(case).values.shape[1:] == load_label(case, corpus).shape
    assert set(np.unique(load_label(case, corpus)).tolist()) == {0, 1, 2}


@pytest.mark.data
def test_acdc_slices_are_volumes_of_patients() -> None:
    corpus = real("acdc")
    assert len(corpus.cases) == 200
    assert len({case.patient for case in corpus.cases}) == 100
    assert sum(load_image(case).values.shape[-1] for case in corpus.cases) == 1902
    for case in corpus.cases[:5]:
        label = load_label(case, corpus)
        drawn = load_scribble(case, corpus, label.shape)
        there = drawn != IGNORE
        assert 0 < there.mean() < 0.1
        # Drawn by hand, apart from the masks: nearly all, not all, lie in their structure.
        assert (drawn[there] == label[there]).mean() > 0.9


@pytest.mark.data
def test_ph2() -> None:
    corpus = real("ph2")
    assert len(corpus.cases) == 199
    assert load_image(corpus.cases[0]).values.shape == (3, 96, 128)
    shares = [load_label(case, corpus).mean() for case in corpus.cases]
    assert 0.05 < float(np.mean(shares)) < 0.6


@pytest.mark.data
@pytest.mark.parametrize("name", ["hippocampus", "acdc", "ph2"])
def test_no_patient_of_a_real_set_is_in_two_parts(name: str) -> None:
    real(name)
    bundle = load_bundle(name, ARGS)
    parts = [{case.patient for case in part.cases} for part in (bundle.train, bundle.val, bundle.test)]  # type: ignore[union-attr]
    assert all(parts)
    assert not parts[0] & parts[1]
    assert not parts[0] & parts[2]
    assert not parts[1] & parts[2]


def test_a_case_says_where_its_files_are() -> None:
    case = Case(name="a", patient="a", image=(Path("none.nii"),))
    with pytest.raises(UserError, match=r"there is no file none.nii"):
        load_image(case)
