"""Folders of the user's own: which layout they have; nnU-Net, the Decathlon, and images beside masks."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from attn_medseg.segment.corpus import Case, Corpus, Image, Part
from attn_medseg.segment.options import SegmentDataConfig
from attn_medseg.segment.readers.files import (
    IGNORE,
    Header,
    is_image,
    is_picture,
    read_header,
    read_image,
    read_mask,
    stem,
    suffix,
)
from attn_shared.errors import UserError

IMAGES = ("images", "image", "imgs", "img")
MASKS = ("masks", "mask", "labels", "label", "segmentations", "segmentation", "gt")
SCRIBBLES = ("scribbles", "scribble")
PARTS: dict[str, Part] = {
    "train": "train",
    "training": "train",
    "val": "val",
    "valid": "val",
    "validation": "val",
    "test": "test",
    "testing": "test",
}
_MASK_ENDINGS = ("_mask", "_masks", "_segmentation", "_seg", "_label", "_labels", "_gt", "_lesion")
_MOST_KINDS = 64  # values in masks, to be structures
_FEW = 3  # names in a sentence
_ENDING = re.compile(r"[_\-. ]?(?:frame|time|phase|slice|visit|slc|ed|es)[_\-]?\d*$", re.IGNORECASE)


def read_folder(path: Path, args: SegmentDataConfig) -> Corpus:
    """A folder of the user's own, or the dataset.json in it.

    Raises:
        UserError: none of the known layouts, or nothing in it; one sentence.
    """
    from attn_medseg.segment.readers import layouts

    if path.is_file():
        if path.suffix.lower() != ".json":
            raise UserError(f"{path.name} is one image; to train or evaluate, name a folder with images and masks")
        path = path.parent
    if (path / "dataset.json").is_file():
        return read_described(path, args)
    for fits, read in layouts.LAYOUTS:
        if fits(path):
            found = read(path, args)
            return found
    if plain_folders(path):
        return read_plain(path, args)
    raise UserError(
        f"{path} holds no data set: there is no dataset.json, no folder images beside masks or labels, and none of the "
        "layouts of ACDC, Synapse, ISIC, PH2 and DRIVE"
    )


def patient_of(name: str, pattern: str) -> str:
    """The patient in the name of a case. See `SegmentDataConfig.patient`.

    Raises:
        UserError: a pattern that is none, or does not fit.
    """
    if pattern:
        try:
            match = re.search(pattern, name)
        except re.error as error:
            raise UserError(f"--data_args.patient is no regular expression: {error}") from None
        if match is None or not match.groups():
            raise UserError(f"--data_args.patient {pattern!r} with one group does not fit the name {name!r}")
        return match.group(1)
    shorter = name
    while (match := _ENDING.search(shorter)) is not None and match.start() > 0:
        shorter = shorter[: match.start()]
    return shorter


def by_patient(cases: Sequence[Case], pattern: str, notes: list[str]) -> list[Case]:
    """The cases with the patients that their names tell; all names of one patient tell none."""
    patients = [patient_of(case.name, pattern) for case in cases]
    if not pattern and len(set(patients)) == 1:
        return list(cases)
    if len(set(patients)) < len(cases):
        example = next(number for number, case in enumerate(cases) if case.name != patients[number])
        notes.append(
            f"{len(cases)} cases are of {len(set(patients))} patients by their names, such as {cases[example].name} of "
            f"{patients[example]}"
        )
    return [replace(case, patient=patient) for case, patient in zip(cases, patients)]


def few(names: Sequence[str]) -> str:
    """Names for a sentence."""
    return ", ".join(names[:_FEW]) + (f" and {len(names) - _FEW} more" if len(names) > _FEW else "")


def unmatched(images: Mapping[str, Any], labels: Mapping[str, Any], where: str = "") -> list[str]:
    """Sentences that name the labels without an image and the images without a label."""
    notes = []
    if alone := sorted(set(labels) - set(images)):
        notes.append(f"{where}{len(alone)} labels have no image and are left out: {few(alone)}")
    if alone := sorted(set(images) - set(labels)):
        notes.append(f"{where}{len(alone)} images have no label and are left out: {few(alone)}")
    return notes


def readable(cases: Sequence[Case], notes: list[str]) -> tuple[list[Case], list[Header]]:
    """The cases whose headers can be read, image and mask of one size; the rest are named in `notes`.

    Raises:
        UserError: none can.
    """
    kept, headers = [], []
    for case in cases:
        assert isinstance(case.image, tuple)
        try:
            found = [read_header(path) for path in case.image]
            files = list(zip(case.image, found))
            if isinstance(case.label, Path):
                files.append((case.label, read_header(case.label)))
            for path, one in files[1:]:
                if one.size != found[0].size:
                    sizes = [" x ".join(map(str, size)) for size in (one.size, found[0].size)]
                    raise UserError(f"{path.name} is of size {sizes[0]}, {case.image[0].name} of {sizes[1]}")
        except UserError as error:
            notes.append(f"{error}; {case.name} is left out")
            continue
        kept.append(case)
        header = found[0]
        headers.append(
            Header(
                size=header.size,
                spacing=header.spacing,
                channels=sum(one.channels for one in found),
                affine=header.affine,
            )
        )
    if not kept:
        raise UserError("no case can be read: " + (notes[-1] if cases else "there is none"))
    return kept, headers


def finish(
    cases: Sequence[Case],
    structures: Sequence[str],
    notes: list[str],
    *,
    values: Mapping[int, int] | None = None,
    defaults: Mapping[str, object] | None = None,
    channels: int = 0,
) -> Corpus:
    """A corpus of the cases that can be read, of the number of axes and of channels that most have.

    Raises:
        UserError: no case can be read, or axes or channels differ.
    """
    kept, headers = readable(cases, notes)
    ndim = len(headers[0].size)
    counts = sorted(one.channels for one in headers)
    channels = channels or counts[len(counts) // 2]
    for case, header in zip(kept, headers):
        if len(header.size) != ndim:
            raise UserError(f"{case.name} has {len(header.size)} axes where {kept[0].name} has {ndim}")
        if header.channels != channels and (header.channels, channels) not in ((1, 3), (3, 1)):
            raise UserError(f"{case.name} has {header.channels} channels where most images have {channels}")
    stacked = all(case.slices >= 0 for case in kept)
    pictures = all(header.affine is None for header in headers)
    return Corpus(
        cases=tuple(sorted(kept, key=lambda case: case.name)),
        structures=tuple(structures),
        ndim=2 if stacked else ndim,
        channels=channels,
        values=dict(values or {}),
        unit="px" if pictures else "mm",
        defaults=dict(defaults or {}),
        notes=tuple(notes),
        exact=not pictures,
    )


# -- dataset.json -----------------------------------------------------------------------------------------------------


def read_described(folder: Path, args: SegmentDataConfig) -> Corpus:
    """nnU-Net ("channel_names", "file_ending") and the Decathlon ("modality", "training").

    Raises:
        UserError: no JSON, or no labels in it; nothing that can be read.
    """
    try:
        told = json.loads((folder / "dataset.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"dataset.json in {folder.name} cannot be read: {error}") from None
    if not isinstance(told, dict) or not isinstance(told.get("labels"), dict):
        raise UserError(f'dataset.json in {folder.name} has no "labels"')
    notes: list[str] = []
    structures, values = _labels(told["labels"], notes)
    if isinstance(told.get("training"), list) and told["training"] and isinstance(told["training"][0], dict):
        pairs = _decathlon(folder, told, notes)
    else:
        pairs = _nnunet(folder, told, notes)
    cases = [Case(name=name, patient=name, image=images, label=label, part=part) for name, images, label, part in pairs]
    if any(case.part == "test" for case in cases):
        cases = [replace(case, part=case.part or "train") for case in cases]
    cases = by_patient(cases, args.patient, notes)
    modality = told.get("channel_names") or told.get("modality") or {}
    scans = [str(one).lower() for one in (modality.values() if isinstance(modality, dict) else modality)]
    defaults: dict[str, object] = {}
    if scans and all(one == "ct" for one in scans):
        notes.append(
            "CT: Hounsfield units are cut to --data_args.clip_low and clip_high unless normalise says otherwise"
        )
        defaults["normalise"] = "clip"
    return finish(cases, structures, notes, values=values, defaults=defaults)


def _labels(told: Mapping[str, Any], notes: list[str]) -> tuple[list[str], dict[int, int]]:
    """Names of the structures, and value in the files -> label. The Decathlon has value -> name, nnU-Net name -> value
    or values."""
    if all(str(key).isdigit() for key in told):
        names = {int(key): str(name) for key, name in told.items()}
    else:
        names = {}
        regions = {name: value for name, value in told.items() if isinstance(value, (list, tuple))}
        # Regions lie within one another: a value is called after the smallest that holds it.
        for name, region in sorted(regions.items(), key=lambda item: -len(item[1])):
            names |= dict.fromkeys((int(one) for one in region), str(name))
        names |= {int(value): str(name) for name, value in told.items() if name not in regions}
        if regions:
            notes.append("regions that overlap are taken apart: each voxel is of the smallest region that holds it")
    background = {value for value, name in names.items() if name.lower() == "background"} | {0}
    ignored = {value for value, name in names.items() if name.lower() == "ignore"}
    values = dict.fromkeys(background, 0) | dict.fromkeys(ignored, IGNORE)
    structures: list[str] = []
    for value in sorted(set(names) - background - ignored):
        if names[value] not in structures:
            structures.append(names[value])
        values[value] = structures.index(names[value]) + 1
    if not structures:
        raise UserError("dataset.json names no structure beside the background")
    return structures, dict(sorted(values.items()))


_Pair = tuple[str, tuple[Path, ...], Path, Part]


def _decathlon(folder: Path, told: Mapping[str, Any], notes: list[str]) -> list[_Pair]:
    pairs: list[_Pair] = []
    absent: dict[str, list[str]] = {"image": [], "label": []}
    for entry in told["training"]:
        image, label = (folder / str(entry.get(one, "")) for one in ("image", "label"))
        name = stem(image)
        lacks = [one for one, path in (("image", image), ("label", label)) if not path.is_file()]
        for one in lacks:
            absent[one].append(name)
        if not lacks:
            pairs.append((name, (image,), label, ""))
    for one, names in absent.items():
        if names:
            notes.append(f"{len(names)} cases of dataset.json have no {one} and are left out: {few(names)}")
    told_of = {label for _, _, label, _ in pairs} | {image[0] for _, image, _, _ in pairs}
    for sub in ("imagesTr", "labelsTr"):
        extra = [stem(path) for path in _images(folder / sub).values() if path.resolve() not in _resolved(told_of)]
        extra = [name for name in extra if name not in absent["image"] + absent["label"]]
        if extra:
            notes.append(f"{len(extra)} files of {sub} are not named in dataset.json and are left out: {few(extra)}")
    return pairs


def _resolved(paths: set[Path]) -> set[Path]:
    return {path.resolve() for path in paths}


def _nnunet(folder: Path, told: Mapping[str, Any], notes: list[str]) -> list[_Pair]:
    ending = str(told.get("file_ending") or ".nii.gz")
    channels = told.get("channel_names") or told.get("modality") or {"0": ""}
    pairs: list[_Pair] = []
    if isinstance(told.get("dataset"), dict):
        for name, entry in told["dataset"].items():
            files = tuple((folder / str(one)) for one in entry.get("images", ()))
            label = folder / str(entry.get("label", ""))
            if not files or not all(one.is_file() for one in (*files, label)):
                notes.append(f"{name} lacks a file that dataset.json names and is left out")
            else:
                pairs.append((name, files, label, ""))
        return pairs
    for number, (images, labels) in enumerate((("imagesTr", "labelsTr"), ("imagesTs", "labelsTs"))):
        if not (folder / images).is_dir() or (number and not (folder / labels).is_dir()):
            if not number:
                raise UserError(f"{folder.name} has a dataset.json but no folder {images}")
            continue
        found: dict[str, dict[int, Path]] = {}
        for path in sorted((folder / images).iterdir()):
            match = re.fullmatch(rf"(.+)_(\d{{4}}){re.escape(ending)}", path.name)
            if match:
                found.setdefault(match.group(1), {})[int(match.group(2))] = path
        masks = {
            path.name[: -len(ending)]: path for path in sorted((folder / labels).glob(f"*{ending}")) if path.is_file()
        }
        whole: dict[str, tuple[Path, ...]] = {}
        for name, channel in found.items():
            lacking = sorted(set(range(len(channels))) - set(channel))
            if lacking and not (len(channel) == 1 and 0 in channel and is_picture(channel[0])):
                notes.append(f"{name} lacks channel {lacking[0]:04d} and is left out")
                masks.pop(name, None)
            else:
                whole[name] = tuple(channel[one] for one in sorted(channel))
        if not whole and not found:
            raise UserError(f"{images} in {folder.name} holds no file such as case_0000{ending}")
        notes += unmatched(whole, masks, f"{images}: ")
        part: Part = "test" if number else ""
        pairs += [(name, whole[name], masks[name], part) for name in sorted(set(whole) & set(masks))]
    return pairs


# -- images beside masks ----------------------------------------------------------------------------------------------


def _subfolder(folder: Path, names: Sequence[str]) -> Path | None:
    there = {path.name.lower(): path for path in folder.iterdir() if path.is_dir()}
    return next((there[name] for name in names if name in there), None)


def plain_folders(folder: Path) -> dict[Part, tuple[Path, Path, Path | None]]:
    """Part -> folders of images, masks and scribbles; the part "" where there is no train, val, test."""
    found: dict[Part, tuple[Path, Path, Path | None]] = {}
    places: list[tuple[Part, Path]] = [("", folder)]
    places += [(PARTS[path.name.lower()], path) for path in sorted(folder.iterdir()) if path.name.lower() in PARTS]
    for part, place in places:
        if place.is_dir():
            images, masks = _subfolder(place, (*IMAGES, "imagestr")), _subfolder(place, (*MASKS, "labelstr"))
            if images and masks:
                found[part] = (images, masks, _subfolder(place, SCRIBBLES))
    if images_root := _subfolder(folder, IMAGES):
        masks_root = _subfolder(folder, MASKS)
        for path in sorted(images_root.iterdir()):
            if masks_root and path.is_dir() and path.name.lower() in PARTS and (masks_root / path.name).is_dir():
                found.pop("", None)
                found[PARTS[path.name.lower()]] = (path, masks_root / path.name, None)
    return found


def _images(folder: Path) -> dict[str, Path]:
    """Stem -> file or DICOM series of a folder."""
    if not folder.is_dir():
        return {}
    return {stem(path): path for path in sorted(folder.iterdir()) if is_image(path)}


def _bare(name: str) -> str:
    for ending in _MASK_ENDINGS:
        if name.lower().endswith(ending):
            return name[: -len(ending)]
    return name


def read_plain(folder: Path, args: SegmentDataConfig) -> Corpus:
    """Images beside masks whose files have the same names (a mask's may end in _mask, _segmentation and the like).

    Raises:
        UserError: no pair, or masks that are none.
    """
    cases: list[Case] = []
    notes: list[str] = []
    several = plain_folders(folder)
    for part, (images, masks, scribbles) in several.items():
        where = f"{part}: " if part else ""
        pictures = _images(images)
        files = _images(masks)
        labels = {name if name in pictures else _bare(name): path for name, path in files.items()}
        strokes = _images(scribbles) if scribbles else {}
        drawn = {name if name in pictures else _bare(name): path for name, path in strokes.items()}
        notes += unmatched(pictures, labels, where)
        for name in sorted(set(pictures) & set(labels)):
            unique = name if sum(name == case.name for case in cases) == 0 else f"{part}_{name}"
            cases.append(
                Case(
                    name=unique,
                    patient=unique,
                    image=(pictures[name],),
                    label=labels[name],
                    scribble=drawn.get(name),
                    part=part,
                )
            )
    if not cases:
        raise UserError(f"no image in {folder} has a mask of the same name" + (f": {notes[0]}" if notes else ""))
    cases = by_patient(cases, args.patient, notes)
    if all(suffix(case.label) in (".jpg", ".jpeg") for case in cases if isinstance(case.label, Path)):
        cases = [lossy(case) for case in cases]
        notes.append("masks are JPEG, which blurs: what is brighter than half is structure 1")
        return finish(cases, args.structures or ("structure 1",), notes)
    cases, structures, values = scan(cases, notes, args.structures)
    return finish(cases, structures, notes, values=values)


def lossy(case: Case) -> Case:
    """The case with a mask that is cut at half of 255."""
    assert isinstance(case.label, Path)
    return replace(case, label=partial(half, case.label))


def half(path: Path) -> Image:
    """What of a picture is brighter than half, as a mask."""
    values = read_image(path).values
    return Image(values=(values.mean(axis=0) > 127).astype(np.uint8))


def scan(
    cases: Sequence[Case], notes: list[str], names: Sequence[str] = ()
) -> tuple[list[Case], tuple[str, ...], dict[int, int]]:
    """The cases with whole masks, and the structures of masks that nothing describes: the values that they hold.

    Raises:
        UserError: more values than structures can be, none, or another number of `names`.
    """
    kinds: set[int] = set()
    kept = []
    for case in cases:
        assert isinstance(case.label, Path)
        try:
            kinds |= set(np.unique(read_mask(case.label).values).tolist())
        except UserError as error:
            notes.append(f"{error}; {case.name} is left out")
            continue
        kept.append(case)
        if len(kinds) > _MOST_KINDS:
            raise UserError(f"the masks hold more than {_MOST_KINDS} values ({case.label.name}); are they masks?")
    found = sorted(kinds - {0})
    if not found:
        raise UserError("the masks hold nothing but 0: no structure" if kinds else f"no mask is whole: {notes[-1]}")
    if names and len(names) < len(found):
        raise UserError(f"--data_args.structures has {len(names)} names for {len(found)} values in the masks: {found}")
    if names and found[-1] <= len(names):
        return kept, tuple(names), {}
    structures = tuple(names) or tuple(f"structure {number + 1}" for number in range(len(found)))
    return kept, structures, {0: 0} | {value: number + 1 for number, value in enumerate(found)}
