"""Layouts of folders as data sets are published: ACDC, Synapse as TransUNet prepares it, ISIC, PH2, DRIVE."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from attn_medseg.segment.corpus import Case, Corpus, Image, Part
from attn_medseg.segment.options import SegmentDataConfig
from attn_medseg.segment.readers.files import IGNORE, as_labels, is_picture, read_image, read_mask, stem
from attn_medseg.segment.readers.folders import PARTS, finish, unmatched
from attn_shared.errors import UserError

SYNAPSE = ("aorta", "gallbladder", "left kidney", "right kidney", "liver", "pancreas", "spleen", "stomach")
"""Labels 1 to 8 of TransUNet's Synapse."""

# -- ACDC -------------------------------------------------------------------------------------------------------------


def _patients(folder: Path) -> list[Path]:
    places = [folder, *(folder / one for one in ("training", "testing") if (folder / one).is_dir())]
    return [
        path
        for place in places
        for path in sorted(place.iterdir())
        if path.is_dir() and re.fullmatch(r"patient\d+", path.name) and any(path.glob("patient*_frame*.nii*"))
    ]


def is_acdc(folder: Path) -> bool:
    return bool(_patients(folder))


def read_acdc(folder: Path, args: SegmentDataConfig) -> Corpus:
    """patient001/{Info.cfg, patient001_frame01.nii.gz, patient001_frame01_gt.nii.gz}, in training/ and testing/ or not.

    A case is a frame; Info.cfg says which is the end of diastole (ED) and which of systole (ES): so it is named.
    """
    cases: list[Case] = []
    notes: list[str] = []
    for patient in _patients(folder):
        phases = _phases(patient / "Info.cfg", notes)
        files = {stem(path): path for path in sorted(patient.glob("patient*_frame*.nii*"))}
        images = {name: path for name, path in files.items() if not name.endswith("_gt")}
        labels = {name.removesuffix("_gt"): path for name, path in files.items() if name.endswith("_gt")}
        notes += unmatched(images, labels, f"{patient.name}: ")
        part: Part = PARTS.get(patient.parent.name, "") if patient.parent != folder else ""
        for name in sorted(set(images) & set(labels)):
            phase = phases.get(int(name.rpartition("frame")[2] or -1), "")
            cases.append(
                Case(
                    name=f"{name}_{phase}" if phase else name,
                    patient=patient.name,
                    image=(images[name],),
                    label=labels[name],
                    part=part,
                    slices=2,
                )
            )
    if not cases:
        raise UserError(f"{folder} has patients of ACDC but no frame with its _gt: {notes[0] if notes else ''}")
    return finish(
        cases,
        ("right ventricle", "myocardium", "left ventricle"),
        notes,
        defaults={"size": (224, 224), "spacing": (1.5, 1.5, 0.0), "normalise": "zscore"},
    )


def _phases(path: Path, notes: list[str]) -> dict[int, str]:
    """Number of a frame -> "ED" or "ES"."""
    if not path.is_file():
        notes.append(f"{path.parent.name} has no Info.cfg: which frame is ED and which ES is not known")
        return {}
    told = dict(re.findall(r"^\s*(\w+)\s*:\s*(\S+)", path.read_text(encoding="utf-8", errors="replace"), re.MULTILINE))
    return {int(told[phase]): phase for phase in ("ED", "ES") if told.get(phase, "").isdigit()}


# -- Synapse ----------------------------------------------------------------------------------------------------------


def is_synapse(folder: Path) -> bool:
    return any((folder / one).is_dir() for one in ("train_npz", "test_vol_h5"))


def read_synapse(folder: Path, args: SegmentDataConfig) -> Corpus:
    """train_npz/case0005_slice000.npz and test_vol_h5/case0001.npy.h5, of arrays `image` and `label`, and lists in
    lists/lists_Synapse/{train,test_vol}.txt or beside them, where there are any.

    Slices of a patient are one case, a stack along its last axis. Intensities are cut to [-125, 275] and brought to 0
    to 1 in the files; spacings are not kept, so that distances are in voxels, as in the papers.
    """
    notes = ["spacings are not in the files: distances are in voxels, as in the papers on this preparation"]
    listed = {one: _list(folder, one) for one in ("train", "test_vol")}
    stacks: dict[str, dict[int, Path]] = {}
    for path in sorted((folder / "train_npz").glob("*.npz")) if (folder / "train_npz").is_dir() else ():
        match = re.fullmatch(r"(.+)_slice(\d+)", path.stem)
        if match and (listed["train"] is None or path.stem in listed["train"]):
            stacks.setdefault(match.group(1), {})[int(match.group(2))] = path
    if listed["train"]:
        found = {path.stem for one in stacks.values() for path in one.values()}
        if absent := sorted(set(listed["train"]) - found):
            notes.append(f"{len(absent)} slices of train.txt have no file: {', '.join(absent[:3])}")
    cases = [
        Case(
            name=name,
            patient=name,
            image=partial(_npz, tuple(files[one] for one in sorted(files)), "image"),
            label=partial(_npz, tuple(files[one] for one in sorted(files)), "label"),
            part="train",
            slices=2,
        )
        for name, files in sorted(stacks.items())
    ]
    volumes = sorted((folder / "test_vol_h5").glob("*.h5")) if (folder / "test_vol_h5").is_dir() else []
    if volumes:
        try:
            import h5py  # noqa: F401
        except ImportError:
            raise UserError(
                f"{volumes[0].name} needs h5py: `pip install attn-medseg[synapse]`, or leave out test_vol_h5"
            ) from None
    for path in volumes:
        name = path.name.removesuffix(".h5").removesuffix(".npy")
        if listed["test_vol"] is None or name in listed["test_vol"]:
            cases.append(
                Case(
                    name=name,
                    patient=name,
                    image=partial(_h5, path, "image"),
                    label=partial(_h5, path, "label"),
                    part="test",
                    slices=2,
                )
            )
    if not cases:
        raise UserError(f"{folder} holds no slices such as train_npz/case0005_slice000.npz")
    return Corpus(
        cases=tuple(sorted(cases, key=lambda case: case.name)),
        structures=SYNAPSE,
        ndim=2,
        channels=1,
        values={one: one if one <= len(SYNAPSE) else 0 for one in range(14)},
        unit="px",
        defaults={"size": (224, 224), "resize": "whole", "normalise": "none"},
        notes=tuple(notes),
        exact=False,
    )


def _list(folder: Path, name: str) -> list[str] | None:
    for place in (folder / "lists" / "lists_Synapse", folder / "lists_Synapse", folder / "lists", folder):
        if (file := place / f"{name}.txt").is_file():
            return [line.strip() for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
    return None


def _npz(paths: tuple[Path, ...], name: str) -> Image:
    slices = []
    for path in paths:
        try:
            with np.load(path, allow_pickle=False) as arrays:
                slices.append(np.asarray(arrays[name]))
        except (OSError, EOFError, ValueError, KeyError) as error:
            raise UserError(f"{path.name} is damaged or has no array {name!r}: {str(error).splitlines()[0]}") from None
    if len({one.shape for one in slices}) > 1:
        raise UserError(f"the slices of {paths[0].name} and those of its volume differ in size")
    return _volume(np.stack(slices, -1), name, paths[0].name)


def _h5(path: Path, name: str) -> Image:
    import h5py

    try:
        with h5py.File(path, "r") as file:
            array = np.asarray(file[name])
    except (OSError, KeyError) as error:
        raise UserError(f"{path.name} is damaged or has no array {name!r}: {str(error).splitlines()[0]}") from None
    return _volume(np.moveaxis(array, 0, -1), name, path.name)  # slices come first in the files


def _volume(array: np.ndarray[Any, Any], name: str, file: str) -> Image:
    if name == "image":
        values = array[None].astype(np.float32)
        if not np.isfinite(values).all():
            raise UserError(f"{file} holds values that are no numbers (NaN or infinite)")
        return Image(values=values)
    return Image(values=as_labels(array, file))


# -- ISIC and PH2 -----------------------------------------------------------------------------------------------------

_ISIC_INPUT = re.compile(
    r"ISIC2018_Task1-2_(Training|Validation|Test)_Input|ISBI2016_ISIC_Part1_(Training|Test)_Data"
    r"|ISIC-2017_(Training|Validation|Test)(?:_v2)?_Data"
)
_ISIC_TRUTH = re.compile(
    r"ISIC2018_Task1_(Training|Validation|Test)_GroundTruth|ISBI2016_ISIC_Part1_(Training|Test)_GroundTruth"
    r"|ISIC-2017_(Training|Validation|Test)(?:_v2)?_Part1_GroundTruth"
)


def _isic(folder: Path, pattern: re.Pattern[str]) -> dict[str, Path]:
    found = {}
    for path in sorted(folder.iterdir()):
        if path.is_dir() and (match := pattern.fullmatch(path.name)):
            found[next(one for one in match.groups() if one)] = path
    return found


def is_isic(folder: Path) -> bool:
    return bool(set(_isic(folder, _ISIC_INPUT)) & set(_isic(folder, _ISIC_TRUTH)))


def read_isic(folder: Path, args: SegmentDataConfig) -> Corpus:
    """ISIC 2016, 2017 and 2018: ISIC2018_Task1-2_Training_Input/ISIC_0000000.jpg and
    ISIC2018_Task1_Training_GroundTruth/ISIC_0000000_segmentation.png, and likewise Validation and Test."""
    inputs, truths = _isic(folder, _ISIC_INPUT), _isic(folder, _ISIC_TRUTH)
    cases: list[Case] = []
    notes = ["patients are not known: each picture counts as one"]
    for word in sorted(set(inputs) & set(truths)):
        images = {
            stem(path): path
            for path in sorted(inputs[word].iterdir())
            if is_picture(path) and not stem(path).endswith("_superpixels")
        }
        labels = {
            stem(path).removesuffix("_segmentation").removesuffix("_Segmentation"): path
            for path in sorted(truths[word].iterdir())
            if is_picture(path)
        }
        notes += unmatched(images, labels, f"{word}: ")
        part = PARTS[word.lower()]
        cases += [
            Case(name=name, patient=name, image=(images[name],), label=labels[name], part=part)
            for name in sorted(set(images) & set(labels))
        ]
    if {case.part for case in cases} == {"train"}:
        cases = [replace(case, part="") for case in cases]
    return finish(cases, ("lesion",), notes, values={0: 0, 1: 1, 255: 1}, defaults=_SKIN)


_SKIN: dict[str, object] = {"size": (192, 256), "resize": "whole", "normalise": "zscore", "flips": (0, 1)}


def _ph2_root(folder: Path) -> Path | None:
    for place in (folder, folder / "PH2 Dataset images", folder / "PH2_Dataset_images"):
        if place.is_dir() and any(place.glob("IMD*/IMD*_Dermoscopic_Image")):
            return place
    return None


def is_ph2(folder: Path) -> bool:
    return _ph2_root(folder) is not None


def read_ph2(folder: Path, args: SegmentDataConfig) -> Corpus:
    """PH2 Dataset images/IMD002/{IMD002_Dermoscopic_Image/IMD002.bmp, IMD002_lesion/IMD002_lesion.bmp}."""
    root = _ph2_root(folder)
    assert root is not None
    notes = ["patients are not known: each picture counts as one"]
    names = [path.name for path in sorted(root.iterdir()) if path.is_dir() and path.name.startswith("IMD")]
    images: dict[str, Path] = {}
    labels: dict[str, Path] = {}
    for name in names:
        for found, sub, file in (
            (images, f"{name}_Dermoscopic_Image", name),
            (labels, f"{name}_lesion", f"{name}_lesion"),
        ):
            path = root / name / sub / f"{file}.bmp"
            if path.is_file():
                found[name] = path
    notes += unmatched(images, labels)
    cases = [
        Case(name=name, patient=name, image=(images[name],), label=labels[name])
        for name in sorted(set(images) & set(labels))
    ]
    return finish(cases, ("lesion",), notes, values={0: 0, 1: 1, 255: 1}, defaults=_SKIN)


# -- DRIVE ------------------------------------------------------------------------------------------------------------


def is_drive(folder: Path) -> bool:
    return any((folder / part / "1st_manual").is_dir() for part in ("training", "test"))


def read_drive(folder: Path, args: SegmentDataConfig) -> Corpus:
    """training/{images/21_training.tif, 1st_manual/21_manual1.gif, mask/21_training_mask.gif} and test/ likewise.

    What lies outside of the field of view (mask/) counts nowhere.
    """
    cases: list[Case] = []
    notes = ["each photograph is of another patient"]
    seen = False
    for word in ("training", "test"):
        if not (folder / word).is_dir():
            continue
        images: dict[str, Path] = {}
        labels: dict[str, Path] = {}
        views: dict[str, Path] = {}
        for found, sub in ((images, "images"), (labels, "1st_manual"), (views, "mask")):
            place = folder / word / sub
            for path in sorted(place.iterdir()) if place.is_dir() else ():
                if is_picture(path):
                    found[path.name.partition("_")[0]] = path
        notes += unmatched(images, labels, f"{word}: ")
        seen = seen or bool(views)
        for number in sorted(set(images) & set(labels)):
            label = partial(_vessels, labels[number], views.get(number))
            one = Case(name=f"{number}_{word}", patient=number, image=(images[number],), label=label, part=PARTS[word])
            cases.append(one)
    if seen:
        notes.append("what lies outside of the field of view counts nowhere")
    if {case.part for case in cases} == {"train"}:
        cases = [replace(case, part="") for case in cases]
    return finish(
        cases,
        ("vessel",),
        notes,
        defaults={"size": (64, 64), "resize": "none", "normalise": "zscore", "flips": (0, 1), "patches": 32},
    )


def _vessels(label: Path, view: Path | None) -> Image:
    mask = read_mask(label, {0: 0, 1: 1, 255: 1}).values.copy()
    if view is not None:
        outside = read_image(view).values[0] == 0
        if outside.shape != mask.shape:
            raise UserError(f"{view.name} and {label.name} are of different sizes")
        mask[outside] = IGNORE
    return Image(values=mask)


LAYOUTS: tuple[tuple[Callable[[Path], bool], Callable[[Path, SegmentDataConfig], Corpus]], ...] = (
    (is_acdc, read_acdc),
    (is_synapse, read_synapse),
    (is_isic, read_isic),
    (is_ph2, read_ph2),
    (is_drive, read_drive),
)
