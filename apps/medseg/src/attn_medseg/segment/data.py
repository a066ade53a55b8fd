"""From a corpus to training patches and whole cases."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from attn_medseg.segment.corpus import Case, Corpus, Image
from attn_medseg.segment.options import SegmentDataConfig
from attn_medseg.segment.readers import load_corpus
from attn_medseg.segment.readers.files import IGNORE, Header, as_labels, read_header, read_image, read_mask, spacing_of
from attn_medseg.segment.splits import split
from attn_medseg.segment.transforms import (
    Prepared,
    Restore,
    cut,
    label_on_grid,
    orientation,
    place,
    plan,
    prepare,
)
from attn_shared.bundle import DataBundle
from attn_shared.errors import UserError
from attn_shared.seeding import derive

_MULTIPLE = 16
_MOST_VOXELS = 4096  # of each structure that are kept to draw patches around
_MOST_CACHED = 6 * 2**30  # bytes of decoded cases, about
_SAME = 1e-3  # spacings and places within this share of a millimetre are the same


@dataclass(kw_only=True)
class Example:
    """A case on the model's grid.

    Attributes:
        image: (C, *S) float32.
        label: (*S) uint8 labels that train: full ones, or scribbles with `IGNORE`.
        full: (*S) uint8 full labels.
        spots: for each slice, or for the image as one, for each structure that is there, (N, axes) voxels of it.
    """

    image: Tensor
    label: Tensor
    full: Tensor
    spots: list[list[np.ndarray]]


@dataclass(kw_only=True)
class Whole:
    """A case to evaluate.

    Attributes:
        prepared: its image on the model's grid, and the way back.
        label: (*file axes) uint8 labels; `IGNORE` counts nowhere.
    """

    prepared: Prepared
    label: np.ndarray


class _Cached:
    """What `load` gives of the first `share` of `count` cases is kept in memory, by MONAI's cache."""

    def __init__(self, load: Callable[[int], Any], count: int, share: float) -> None:
        from monai.data import CacheDataset
        from monai.transforms import Lambda

        self.load, self.kept = load, round(share * count)
        self.cache = CacheDataset(
            range(count),
            transform=Lambda(load, track_meta=False),  # what is no transform of MONAI's own is not cached
            cache_num=self.kept,
            num_workers=None,
            progress=False,
            copy_cache=False,
            as_contiguous=False,
            runtime_cache=True,
        )

    def __getitem__(self, index: int) -> Any:
        if not self.kept:
            return self.load(index)
        try:
            return self.cache[index]
        except RuntimeError as error:  # of MONAI, around what was wrong
            cause: BaseException | None = error
            while cause is not None and not isinstance(cause, UserError):
                cause = cause.__cause__
            raise cause or error from None


class TrainSet(Dataset[dict[str, Tensor]]):
    """Patches of training cases: {"image" (B, C, *S), "label" (B, *S) with `IGNORE`, "index" (B,)} and, where wanted,
    "masks" (B, *S): full labels of other training patients.

    An epoch has `patches` of every case, or of every slice of a case that is read slice by slice.

    Args:
        cases: of the part.
        corpus: that they are of.
        state: `DataBundle.state`.
        args: the options.
        slices: slices of each case; 1 where it is read as a whole.
        masks: whether batches hold "masks".
    """

    def __init__(
        self,
        cases: Sequence[Case],
        corpus: Corpus,
        state: Mapping[str, Any],
        args: SegmentDataConfig,
        slices: Sequence[int],
        *,
        masks: bool = False,
    ) -> None:
        self.cases, self.corpus, self.state, self.args, self.masks = tuple(cases), corpus, dict(state), args, masks
        if masks and len({case.patient for case in cases}) < 2:
            raise UserError("masks of other training patients are wanted, and there is one training patient alone")
        self.size: tuple[int, ...] = tuple(state["size"])
        self.axis = int(state["slices"])
        self.items = [
            (case, number) for case, count in enumerate(slices) for number in range(count) for _ in range(args.patches)
        ]
        self._examples = _Cached(self._load, len(self.cases), args.cache)
        self.set_epoch(0, 0)

    def __len__(self) -> int:
        return len(self.items)

    def set_epoch(self, seed: int, epoch: int) -> None:
        """From now on patches and their augmentation follow from `seed`, `epoch` and index."""
        self.seed, self.epoch = seed, epoch

    def example(self, case: int) -> Example:
        """A case on the model's grid."""
        found: Example = self._examples[case]
        return found

    def _load(self, number: int) -> Example:
        case = self.cases[number]
        prepared, label = load_case(case, self.corpus, self.state)
        full = label_on_grid(label, prepared.undo)
        used = full
        if self.args.supervision == "scribble":
            used = label_on_grid(load_scribble(case, self.corpus, label.shape), prepared.undo)
        return Example(image=prepared.values, label=used, full=full, spots=self._spots(used, number))

    def _spots(self, label: Tensor, number: int) -> list[list[np.ndarray]]:
        rng = np.random.default_rng(derive("spots", number))
        if self.axis >= 0:
            return [self._voxels(one, rng) for one in label.unbind(self.axis)]
        return [self._voxels(label, rng)]

    def _voxels(self, label: Tensor, rng: np.random.Generator) -> list[np.ndarray]:
        """A part of the voxels of each structure, drawn where there are many."""
        found = []
        for structure in range(1, len(self.state["structures"]) + 1):
            where = (label == structure).nonzero().numpy()
            if len(where) > _MOST_VOXELS:
                where = where[np.sort(rng.choice(len(where), _MOST_VOXELS, replace=False))]
            if len(where):
                found.append(where.astype(np.int32))
        return found

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {name: value[0] for name, value in self.__getitems__([index]).items()}

    def __getitems__(self, indices: Sequence[int]) -> dict[str, Tensor]:
        rows = [self._patch(int(index)) for index in indices]
        batch = {name: torch.stack([row[name] for row in rows]) for name in rows[0]}
        return batch | {"index": torch.as_tensor(list(indices), dtype=torch.int64)}

    def _patch(self, index: int) -> dict[str, Tensor]:
        case, number = self.items[index]
        rng = np.random.default_rng(derive(self.seed, "patch", self.epoch, index))
        example = self.example(case)
        image, label, spots = example.image, example.label, example.spots[number]
        if self.axis >= 0:
            image, label = image.select(self.axis + 1, number), label.select(self.axis, number)
        around = None
        if spots and rng.random() < self.args.foreground:
            chosen = spots[int(rng.integers(len(spots)))]
            around = chosen[int(rng.integers(len(chosen)))]
        start = place(label.shape, self.size, around, rng)
        patch, labels = cut(image, [label], start, self.size, rng, augment=self.args.augment, flips=self.state["flips"])
        found = {"image": patch, "label": labels[0].long()}
        if self.masks:
            found["masks"] = self._mask(case, rng)
        return found

    def _mask(self, case: int, rng: np.random.Generator) -> Tensor:
        """The full labels of a patch of another patient, augmented as images are; outside of its image is
        background."""
        own = self.cases[case].patient
        others = [number for number, one in enumerate(self.cases) if one.patient != own]
        full = self.example(others[int(rng.integers(len(others)))]).full
        if self.axis >= 0:
            full = full.select(self.axis, int(rng.integers(full.shape[self.axis])))
        start = place(full.shape, self.size, None, rng)
        augment, flips = self.args.augment, self.state["flips"]
        _, [patch] = cut(full[None].float(), [full], start, self.size, rng, augment=augment, flips=flips)
        return patch.where(patch != IGNORE, 0).long()


class CaseSet(Dataset[dict[str, Any]]):
    """Whole cases. A batch is {"index" (B,), "cases": a list with, for each, "image" (C, *S) on the model's grid,
    "label" (*file axes) uint8 with `IGNORE`, "spacing" (file axes,) float64, "patient" its number, "prepared" the
    `Prepared` that undoes}.

    Attributes:
        cases: in order of the index.
        patients: number of each one's patient.
    """

    def __init__(self, cases: Sequence[Case], corpus: Corpus, state: Mapping[str, Any], cache: float) -> None:
        self.cases, self.corpus, self.state = tuple(cases), corpus, dict(state)
        number = {name: one for one, name in enumerate(dict.fromkeys(case.patient for case in cases))}
        self.patients = [number[case.patient] for case in cases]
        self._wholes = _Cached(self._load, len(self.cases), cache)

    def __len__(self) -> int:
        return len(self.cases)

    def whole(self, index: int) -> Whole:
        """A case, prepared, and its label in the grid of its file."""
        found: Whole = self._wholes[index]
        return found

    def _load(self, index: int) -> Whole:
        prepared, label = load_case(self.cases[index], self.corpus, self.state)
        return Whole(prepared=prepared, label=label)

    def __getitem__(self, index: int) -> dict[str, Any]:
        whole = self.whole(index)
        return {
            "image": whole.prepared.values,
            "label": torch.from_numpy(whole.label),
            "spacing": torch.tensor(whole.prepared.spacing, dtype=torch.float64),
            "patient": self.patients[index],
            "prepared": whole.prepared,
        }

    def __getitems__(self, indices: Sequence[int]) -> dict[str, Any]:
        return {
            "index": torch.as_tensor(list(indices), dtype=torch.int64),
            "cases": [self[int(index)] for index in indices],
        }


# -- cases ------------------------------------------------------------------------------------------------------------


def load_image(case: Case) -> Image:
    """The image of a case, its files' channels together.

    Raises:
        UserError: a file that cannot be read, or files of different sizes.
    """
    if callable(case.image):
        return case.image()
    images = [read_image(path) for path in case.image]
    for path, image in zip(case.image, images):
        if image.values.shape[1:] != images[0].values.shape[1:]:
            raise UserError(f"{path.name} and {case.image[0].name} are of different sizes")
    if len(images) == 1:
        return images[0]
    return Image(values=np.concatenate([one.values for one in images]), affine=images[0].affine)


def load_label(case: Case, corpus: Corpus) -> np.ndarray:
    """(*file axes) labels of a case.

    Raises:
        UserError: a file that cannot be read, or that holds what is no label.
    """
    return _labels(case, case.label, "label", corpus.values, len(corpus.structures) + 1)


def load_scribble(case: Case, corpus: Corpus, shape: tuple[int, ...]) -> np.ndarray:
    """(*file axes) labels where somebody drew, `IGNORE` elsewhere."""
    if case.scribble is None:
        raise UserError(f"{case.name} has no scribble; --data_args.supervision full takes masks")
    classes = len(corpus.structures) + 1
    values = {one: one for one in range(classes)} | dict(corpus.values) | {corpus.unlabelled: IGNORE}
    found = _labels(case, case.scribble, "scribble", values, classes)
    if found.shape != shape:
        raise UserError(f"{case.name}: its scribble is of another size than its label")
    return found


def _labels(
    case: Case, source: Path | Callable[[], Image] | None, what: str, values: Mapping[int, int], classes: int
) -> np.ndarray:
    if source is None:
        raise UserError(f"{case.name} has no {what}")
    if isinstance(source, Path):
        return np.asarray(read_mask(source, values, classes).values)
    found = source().values
    values = dict(values) | {IGNORE: IGNORE} if values else values
    return as_labels(found, f"the {what} of {case.name}", values, classes)


def load_case(case: Case, corpus: Corpus, state: Mapping[str, Any]) -> tuple[Prepared, np.ndarray]:
    """A case on the model's grid, and its labels in its file's.

    Raises:
        UserError: what cannot be read, or an image and a label that do not fit.
    """
    image, label = load_image(case), load_label(case, corpus)
    if image.values.shape[1:] != label.shape:
        sizes = (" x ".join(map(str, one)) for one in (image.values.shape[1:], label.shape))
        raise UserError(f"{case.name}: the image is of size {next(sizes)}, its label of {next(sizes)}")
    try:
        return prepare(image, state), label
    except UserError as error:
        raise UserError(f"{case.name}: {error}") from None


def measure(case: Case) -> Header:
    """Size, spacing and channels of a case.

    Raises:
        UserError: a file that cannot be read.
    """
    if not callable(case.image):
        found = [read_header(path) for path in case.image]
        return replace(found[0], channels=sum(one.channels for one in found))
    image = case.image()
    size = tuple(image.values.shape[1:])
    return Header(
        size=size,
        spacing=spacing_of(image.affine, len(size)),
        channels=image.values.shape[0],
        affine=image.affine,
    )


# -- the parts of a run -----------------------------------------------------------------------------------------------


def load_bundle(
    data: str, args: SegmentDataConfig, *, state: Mapping[str, Any] | None = None, masks: bool = False
) -> DataBundle:
    """The parts of a run.

    Args:
        data: name of a data set, or path of a folder.
        args: the options of the data.
        state: of a checkpoint: nothing is fitted anew.
        masks: training batches hold "masks".

    Returns:
        `train` is a `TrainSet`, `val` and `test` are `CaseSet`s. `state` holds all that `prepare` needs, and
        "structures", "unit", "exact", "data" and "flips".

    Raises:
        UserError: data that cannot be used, in one sentence.
    """
    check_options(args)
    return build(load_corpus(data, args), args, data, state=state, masks=masks)


def build(
    corpus: Corpus,
    args: SegmentDataConfig,
    name: str,
    *,
    state: Mapping[str, Any] | None = None,
    masks: bool = False,
) -> DataBundle:
    """`load_bundle` of a corpus that was read."""
    notes = list(corpus.notes)
    labelled = [case for case in corpus.cases if case.label is not None]
    if len(labelled) < len(corpus.cases):
        notes.append(f"{len(corpus.cases) - len(labelled)} cases without a label are left out")
    if not labelled:
        raise UserError(f"{name} has no case with a label")
    corpus = _sliced(replace(corpus, cases=tuple(labelled), notes=tuple(notes)), args, state)
    args = _defaults(corpus, args)
    if args.supervision == "scribble" and all(case.scribble is None for case in corpus.cases):
        raise UserError(f"{name} has no scribbles; --data_args.supervision full takes masks")
    parts, how = split(corpus, args, name)
    if args.supervision == "scribble" and parts["train"]:
        drawn = [case for case in parts["train"] if case.scribble is not None]
        if not drawn:
            raise UserError(f"no training case of {name} has a scribble; --data_args.supervision full takes masks")
        if len(drawn) < len(parts["train"]):
            how += f", {len(parts['train']) - len(drawn)} training cases without a scribble left out"
        parts["train"] = drawn
    train = parts["train"] or [case for part in parts.values() for case in part]
    headers = {case.name: measure(case) for case in train}
    if state is None:
        state = fit(corpus, args, [headers[case.name] for case in train], name)
    else:
        corpus = _renamed(corpus, state, name)
    args = replace(args, cache=min(args.cache, _affordable(list(headers.values()), state, len(corpus.cases))))
    axis = state["slices"]
    slices = [_grid(headers[case.name], state).grid[axis] if axis >= 0 else 1 for case in parts["train"]]
    sets = {part: CaseSet(cases, corpus, state, args.cache) if cases else None for part, cases in parts.items()}
    return DataBundle(
        train=TrainSet(parts["train"], corpus, state, args, slices, masks=masks) if parts["train"] else None,
        val=sets["val"],
        test=sets["test"],
        state=dict(state),
        facts=_facts(corpus, state, parts, list(headers.values()), how, args),
        protocol=_protocol(corpus, state, parts, how, args),
    )


def _affordable(headers: Sequence[Header], state: Mapping[str, Any], count: int) -> float:
    """Share of `count` cases like these that memory is taken for."""
    whole = [
        float(np.prod(one.size)) + 4 * state["channels"] * float(np.prod(_grid(one, state).grid)) for one in headers
    ]
    return min(1.0, _MOST_CACHED / max(1.0, float(np.mean(whole)) * count))


def _grid(header: Header, state: Mapping[str, Any]) -> Restore:
    """Where the axes of an image go, and to how many voxels, before it is read."""
    return plan(Image(values=np.broadcast_to(np.float32(0), (1, *header.size)), affine=header.affine), state)


def check_options(args: SegmentDataConfig) -> None:
    """Refuse options that mean nothing.

    Raises:
        UserError: which one, and what it may be.
    """
    wrong = [
        (any(one < 1 for one in args.size), "size is 1 or more along each axis", args.size),
        (len(args.size) > 3, "size has one number, or one for each axis", args.size),
        (any(one < 0 for one in args.spacing), "spacing is 0 or more along each axis", args.spacing),
        (len(args.spacing) > 3, "spacing has one number, or one for each axis", args.spacing),
        (args.slices not in (-1, 0, 1, 2), "slices is an axis from 0 to 2, or -1", args.slices),
        (not args.clip_low < args.clip_high, "clip_low lies below clip_high", args.clip_low),
        (args.patches < 1, "patches is 1 or more", args.patches),
        (not 0 <= args.foreground <= 1, "foreground is a share from 0 to 1", args.foreground),
        (not 0 <= args.cache <= 1, "cache is a share from 0 to 1", args.cache),
        (any(not 0 <= one <= 2 for one in args.flips), "flips are axes from 0 to 2", args.flips),
    ]
    for bad, rule, got in wrong:
        if bad:
            raise UserError(f"--data_args.{rule}, got {got}")
    if args.patient:
        try:
            groups = re.compile(args.patient).groups
        except re.error as error:
            raise UserError(f"--data_args.patient is no regular expression: {error}") from None
        if not groups:
            raise UserError("--data_args.patient needs a group in parentheses, which is the patient")


def _defaults(corpus: Corpus, args: SegmentDataConfig) -> SegmentDataConfig:
    """The options, where empty or "auto" as the data set has them best."""
    told = dict(corpus.defaults)
    chosen: dict[str, Any] = {}
    for field in ("size", "spacing", "flips"):
        if not getattr(args, field) and field in told:
            chosen[field] = told[field]
    for field in ("normalise", "resize"):
        if getattr(args, field) == "auto" and field in told:
            chosen[field] = told[field]
    if args.patches == 1 and "patches" in told:
        chosen["patches"] = told["patches"]
    return replace(args, **chosen)


def _sliced(corpus: Corpus, args: SegmentDataConfig, state: Mapping[str, Any] | None) -> Corpus:
    """The corpus with its volumes taken slice by slice, where that is asked for."""
    axis = int(state["slices"]) if state is not None else args.slices
    now = corpus.cases[0].slices
    if axis == now or (axis < 0 and state is None):
        return corpus
    if axis >= 0 and corpus.ndim == 2 and now < 0:
        if state is not None:
            raise UserError("the model was trained on slices of volumes; these are pictures")
        raise UserError("--data_args.slices is for volumes; these are pictures")
    cases = tuple(replace(case, slices=axis) for case in corpus.cases)
    defaults = {name: value for name, value in corpus.defaults.items() if name in ("normalise",)}
    return replace(corpus, cases=cases, ndim=2 if axis >= 0 else 3, defaults=defaults)


def _renamed(corpus: Corpus, state: Mapping[str, Any], name: str) -> Corpus:
    """The corpus with its structures numbered as the model numbers them."""
    known, here = list(state["structures"]), list(corpus.structures)
    if known == here:
        return corpus
    if sorted(known) == sorted(here):
        number = {0: 0, IGNORE: IGNORE} | {here.index(one) + 1: known.index(one) + 1 for one in known}
        before = dict(corpus.values) or {one: one for one in range(len(here) + 1)}
        values = {value: number[label] for value, label in before.items()}
        return replace(corpus, structures=tuple(known), values=values)
    if len(known) == len(here) and all(one.startswith("structure ") for one in here):
        return replace(corpus, structures=tuple(known))
    raise UserError(f"{name} has the structures {', '.join(here)}; the model knows {', '.join(known)}")


def fit(corpus: Corpus, args: SegmentDataConfig, headers: Sequence[Header], name: str) -> dict[str, Any]:
    """What the training cases decide: orientation, spacing and size.

    Raises:
        UserError: options that do not fit the number of axes.
    """
    axes = len(headers[0].size)
    slices = corpus.cases[0].slices
    ndim = 2 if slices >= 0 else axes
    if ndim != corpus.ndim or slices >= axes:
        raise UserError(f"{name} has images of {axes} axes, which cannot be read as {corpus.ndim}-D")
    codes = Counter(orientation(one.affine) for one in headers if axes == 3)
    state: dict[str, Any] = {
        "data": name,
        "structures": list(corpus.structures),
        "axes": axes,
        "ndim": ndim,
        "slices": slices,
        "channels": corpus.channels,
        "unit": corpus.unit,
        "exact": corpus.exact,
        "orientation": codes.most_common(1)[0][0] if codes else "",
        "normalise": "zscore" if args.normalise == "auto" else args.normalise,
        "clip": [args.clip_low, args.clip_high],
        "flips": sorted(set(args.flips)),
    }
    if state["flips"] and state["flips"][-1] >= ndim:
        raise UserError(f"--data_args.flips has the axis {state['flips'][-1]}; a patch has {ndim}, counted from 0")
    # Spacings in the axes of the model, whatever the orientation of a file.
    bare = state | {"resize": "none", "spacing": [], "size": []}
    spacings = [[one.spacing[axis] for axis in _grid(one, bare).order] for one in headers]
    state["spacing"] = _spacing(args.spacing, np.array(spacings), slices, corpus.unit)
    state["resize"] = args.resize
    if args.resize == "auto":
        different = corpus.unit == "px" and axes == 2 and len({one.size for one in headers}) > 1
        state["resize"] = "whole" if different else "none"
    median = np.median([_grid(one, bare | {"spacing": state["spacing"]}).grid for one in headers], axis=0)
    if slices >= 0:
        median = np.delete(median, slices)
    size = args.size or tuple(int(-(-one // _MULTIPLE) * _MULTIPLE) for one in median)
    if len(size) == 1:
        size = size * ndim
    if len(size) != ndim:
        raise UserError(f"--data_args.size has {len(size)} numbers; patches have {ndim} axes")
    state["size"] = [int(one) for one in size]
    return state


def _spacing(wanted: Sequence[float], found: np.ndarray, slices: int, unit: str) -> list[float]:
    """Millimetres to resample to along each axis, 0 = as it is; empty where nothing is resampled."""
    axes = found.shape[1]
    if unit == "px":
        if any(wanted):
            raise UserError("--data_args.spacing is in millimetres, which these images do not know")
        return []
    if wanted:
        if len(wanted) == 1:
            return [0.0 if axis == slices else float(wanted[0]) for axis in range(axes)]
        if len(wanted) != axes:
            raise UserError(f"--data_args.spacing has {len(wanted)} numbers; the images have {axes} axes")
        return [float(one) for one in wanted] if any(wanted) else []
    if np.ptp(found, axis=0).max() <= _SAME * found.max():
        return []
    middle = np.median(found, axis=0)
    return [0.0 if axis == slices else round(float(middle[axis]), 4) for axis in range(axes)]


# -- what the report says of the data ---------------------------------------------------------------------------------


def _facts(
    corpus: Corpus,
    state: Mapping[str, Any],
    parts: Mapping[str, Sequence[Case]],
    headers: Sequence[Header],
    how: str,
    args: SegmentDataConfig,
) -> dict[str, Any]:
    sizes = np.array([one.size for one in headers])
    spacings = np.array([one.spacing for one in headers])
    names = ("train", "val", "test")
    facts: dict[str, Any] = {
        "structures": ", ".join(corpus.structures),
        "patients (train / val / test)": " / ".join(str(len({case.patient for case in parts[one]})) for one in names),
        "cases (train / val / test)": " / ".join(str(len(parts[one])) for one in names),
        "size of an image": _range(sizes, "{:d}"),
        "a model reads": f"{' x '.join(map(str, state['size']))} voxels"
        + (f", slices of axis {state['slices']}" if state["slices"] >= 0 else "")
        + (", every image resized to it" if state["resize"] == "whole" else ""),
        "normalised": state["normalise"]
        + (f" {args.clip_low:g} to {args.clip_high:g}" if state["normalise"] == "clip" else " of each image by itself"),
        "split": how,
    }
    if corpus.unit == "mm":
        facts["spacing in mm"] = _range(spacings, "{:.3g}")
        if state["spacing"]:
            facts["resampled to mm"] = " x ".join(f"{one:g}" if one else "as it is" for one in state["spacing"])
    if args.supervision == "scribble":
        facts["supervision"] = "scribbles: the loss is on drawn voxels alone; figures are of full masks"
    return facts | {f"note {number + 1}": note for number, note in enumerate(corpus.notes)}


def _range(rows: np.ndarray, form: str) -> str:
    low, middle, high = rows.min(axis=0), np.median(rows, axis=0), rows.max(axis=0)

    def words(row: np.ndarray) -> str:
        return " x ".join(form.format(one.item() if form != "{:d}" else int(one)) for one in row)

    if (low == high).all():
        return words(low)
    return f"{words(low)} to {words(high)}, median {words(middle)}"


def _protocol(
    corpus: Corpus,
    state: Mapping[str, Any],
    parts: Mapping[str, Sequence[Case]],
    how: str,
    args: SegmentDataConfig,
) -> str:
    """One sentence: what is tested, and how it was split."""
    part = "test" if parts["test"] else "val" if parts["val"] else "train"
    cases = parts[part]
    patients = len({case.patient for case in cases})
    kind = "volumes" if state["axes"] == 3 else "pictures"
    text = f"{len(cases)} {kind} of {patients} patients who are in no other part; split: {how}"
    if not corpus.exact:
        text += "; distances in voxels" if state["axes"] == 3 else "; distances in pixels"
    if args.supervision == "scribble":
        text += "; trained on scribbles, scored on full masks"
    return text
