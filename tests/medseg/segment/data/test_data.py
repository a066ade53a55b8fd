"""Training patches and whole cases: their shapes, what decides them, and what a checkpoint's state decides."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
import torch

from attn_medseg.segment.corpus import Case, Corpus, Image
from attn_medseg.segment.data import CaseSet, TrainSet, build, load_bundle
from attn_medseg.segment.options import SegmentDataConfig
from attn_medseg.segment.readers.files import IGNORE
from attn_shared.bundle import DataBundle
from attn_shared.errors import UserError

PLAIN = SegmentDataConfig(augment="none")


def _image(values: np.ndarray, affine: np.ndarray | None) -> Image:
    return Image(values=values, affine=affine)


def made(
    sizes: list[tuple[int, ...]], *, slices: int = -1, affine: np.ndarray | None = None, scribbles: bool = True
) -> Corpus:
    """Cases of two frames a patient: the image's brightness is 10 times the label, plus the case's own number."""
    cases = []
    for number, size in enumerate(sizes):
        label = np.random.default_rng(number).integers(0, 3, size).astype(np.uint8)
        label[(0,) * len(size)] = 1
        drawn = np.where(np.random.default_rng(number).random(size) < 0.2, label, 9).astype(np.uint8)
        cases.append(
            Case(
                name=f"p{number // 2:02d}_frame{number % 2}",
                patient=f"p{number // 2:02d}",
                image=partial(_image, (label * 10.0 + number)[None].astype(np.float32), affine),
                label=partial(_image, label, affine),
                scribble=partial(_image, drawn, affine) if scribbles else None,
                slices=slices,
            )
        )
    return Corpus(
        cases=tuple(cases),
        structures=("x", "y"),
        ndim=2 if slices >= 0 else len(sizes[0]),
        channels=1,
        unlabelled=9,
        unit="px" if affine is None else "mm",
        exact=affine is not None,
        defaults={"normalise": "none"},
    )


def bundle(corpus: Corpus, args: SegmentDataConfig = PLAIN, **options: Any) -> DataBundle:
    return build(corpus, args, "test", **options)


def train_of(found: DataBundle) -> TrainSet:
    assert isinstance(found.train, TrainSet)
    return found.train


def test_of(found: DataBundle) -> CaseSet:
    assert isinstance(found.test, CaseSet)
    return found.test


test_of.__test__ = False  # type: ignore[attr-defined]


VOLUMES: Callable[[], Corpus] = partial(made, [(9, 8, 7), (8, 10, 7)] * 6)
STACKS: Callable[[], Corpus] = partial(made, [(9, 8, 4), (10, 8, 3)] * 6, slices=2)


@pytest.mark.parametrize("corpus", [VOLUMES, STACKS], ids=["volumes", "stacks"])
def test_batches_of_patches(corpus: Callable[[], Corpus]) -> None:
    data = corpus()
    size = (8, 6) if data.ndim == 2 else (8, 6, 10)
    found = bundle(data, replace(PLAIN, size=size, patches=2), masks=True)
    train = train_of(found)
    per = [3 + (case.name.endswith("0")) if data.ndim == 2 else 1 for case in train.cases]
    assert len(train) == 2 * sum(per)
    batch = train.__getitems__(list(range(len(train))))
    assert batch["image"].shape == (len(train), 1, *size)
    assert batch["image"].dtype == torch.float32
    for name in ("label", "masks"):
        assert batch[name].shape == (len(train), *size)
        assert batch[name].dtype == torch.int64
    assert batch["index"].tolist() == list(range(len(train)))
    label, image = batch["label"], batch["image"][:, 0]
    there = label != IGNORE
    assert there.any()
    assert (image[~there] == 0).all()
    # An image is 10 times its label and its number: no patch mixes cases, none is moved against its label.
    number = image - 10 * label
    for row, mask in zip(number, there):
        assert len(row[mask].unique()) == 1
    assert set(batch["masks"].unique().tolist()) <= {0, 1, 2}
    one = train[3]
    assert one["image"].equal(batch["image"][3])


def test_an_epoch_takes_every_slice_of_every_training_case() -> None:
    found = bundle(STACKS(), replace(PLAIN, size=(10, 8)))
    train = train_of(found)
    batch = train.__getitems__(list(range(len(train))))
    wanted = []
    for case in train.cases:
        volume = case.image().values[0]  # type: ignore[operator]
        wanted += [float(volume[:, :, one].sum()) for one in range(volume.shape[2])]
    found_sums = [float(one.sum()) for one in batch["image"]]
    assert found_sums == pytest.approx(wanted)


def test_patches_follow_from_seed_epoch_and_index() -> None:
    corpus, args = VOLUMES(), SegmentDataConfig(size=(6, 6, 6), augment="full", flips=(0, 1), patches=3)
    one, other = train_of(bundle(corpus, args, masks=True)), train_of(bundle(corpus, args, masks=True))
    rows = list(range(12))

    def batch(train: TrainSet, seed: int, epoch: int, order: list[int]) -> dict[str, torch.Tensor]:
        train.set_epoch(seed, epoch)
        return train.__getitems__(order)

    first = batch(one, 3, 1, rows)
    batch(other, 3, 2, rows)
    again = batch(other, 3, 1, rows[::-1])
    assert all(first[name].equal(again[name].flip(0)) for name in first)
    for seed, epoch in ((3, 2), (4, 1)):
        changed = batch(one, seed, epoch, rows)
        assert (changed["image"] != first["image"]).flatten(1).any(dim=1).sum() > 8


def test_scribbles_train_and_full_masks_test() -> None:
    corpus, size = STACKS(), (10, 8)
    found = bundle(corpus, replace(PLAIN, size=size, supervision="scribble"), masks=True)
    full = train_of(bundle(corpus, replace(PLAIN, size=size)))
    train = train_of(found)
    rows = list(range(len(train)))
    drawn, whole = train.__getitems__(rows), full.__getitems__(rows)
    there = drawn["label"] != IGNORE
    inside = whole["label"] != IGNORE
    assert 0.1 < float(there[inside].float().mean()) < 0.3
    assert (drawn["label"][there] == whole["label"][there]).all()
    assert (drawn["masks"] != IGNORE).all()
    case = test_of(found).__getitems__([0])["cases"][0]
    assert set(case["label"].unique().tolist()) == {0, 1, 2}
    assert "scored on full masks" in found.protocol
    with pytest.raises(UserError, match=r"test has no scribbles; --data_args.supervision full takes masks"):
        bundle(made([(8, 8)] * 8, scribbles=False), replace(PLAIN, supervision="scribble"))


def test_masks_are_of_other_patients() -> None:
    corpus = VOLUMES()
    train = train_of(bundle(corpus, replace(PLAIN, size=(8, 8, 7)), masks=True))
    full = {}
    for number, case in enumerate(train.cases):
        full[number] = torch.from_numpy(case.label().values)  # type: ignore[operator,misc,union-attr]
    for epoch in range(3):
        train.set_epoch(0, epoch)
        for index in range(len(train)):
            mask = train[index]["masks"]
            patient = train.cases[index].patient
            own = [full[one] for one, case in enumerate(train.cases) if case.patient == patient]
            for label in own:
                pieces = label.unfold(0, 8, 1).unfold(1, 8, 1)[:, :, :7].permute(0, 1, 3, 4, 2)
                assert not (pieces == mask).flatten(2).all(dim=2).any()


@pytest.mark.parametrize("augment", ["none", "full"])
def test_masks_are_of_training_patients_alone(augment: str) -> None:
    """Of every case's own mask one value alone: each mask tells whose it is."""
    cases = []
    for number in range(24):
        label = np.full((8, 8), 1 + number // 2, np.uint8)
        cases.append(
            Case(
                name=f"p{number // 2:02d}_frame{number % 2}",
                patient=f"p{number // 2:02d}",
                image=partial(_image, label[None].astype(np.float32), None),
                label=partial(_image, label, None),
                scribble=partial(_image, label, None),
            )
        )
    structures = tuple(f"p{number:02d}" for number in range(12))
    corpus = Corpus(cases=tuple(cases), structures=structures, ndim=2, channels=1, unit="px", exact=False)
    chosen: dict[str, Any] = {"augment": augment, "supervision": "scribble"}
    args = replace(PLAIN, size=(8, 8), **chosen)
    train = train_of(bundle(corpus, args, masks=True))
    patients = {case.patient for case in train.cases}
    assert len(patients) < 12
    seen: dict[str, set[str]] = {one: set() for one in patients}
    for epoch in range(40):
        train.set_epoch(0, epoch)
        for index, mask in enumerate(train.__getitems__(range(len(train)))["masks"]):
            of = {structures[value - 1] for value in mask.unique().tolist() if value}
            seen[train.cases[index].patient] |= of
    for own, of in seen.items():
        assert of == patients - {own}


def test_masks_turn_as_images_do() -> None:
    label = np.zeros((16, 16), np.uint8)
    label[4:12, 7:9] = 1
    cases = tuple(
        Case(
            name=f"p{one}",
            patient=f"p{one}",
            image=partial(_image, label[None].astype(np.float32), None),
            label=partial(_image, label, None),
        )
        for one in range(6)
    )
    corpus = Corpus(cases=cases, structures=("x",), ndim=2, channels=1, unit="px", exact=False)
    chosen: dict[str, Any]
    for chosen, turned in (({"augment": "none"}, False), ({"augment": "full"}, True)):
        train = train_of(bundle(corpus, replace(PLAIN, size=(16, 16), patches=20, **chosen), masks=True))
        masks = train.__getitems__(range(len(train)))["masks"]
        assert ((masks - torch.from_numpy(label)).abs().flatten(1).sum(dim=1) > 4).any() == turned
        assert set(masks.unique().tolist()) == {0, 1}


def test_masks_need_two_training_patients() -> None:
    corpus = made([(8, 8)] * 6)
    with pytest.raises(UserError, match="there is one training patient alone"):
        bundle(corpus, replace(PLAIN, size=(8, 8), max_train=1), masks=True)
    bundle(corpus, replace(PLAIN, size=(8, 8), max_train=1))


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_patches_are_drawn_around_structures(share: float) -> None:
    label = np.zeros((64, 64), np.uint8)
    label[40:43, 20:23] = 1
    image = label[None].astype(np.float32)
    cases = tuple(
        Case(name=f"p{one}", patient=f"p{one}", image=partial(_image, image, None), label=partial(_image, label, None))
        for one in range(8)
    )
    corpus = Corpus(cases=cases, structures=("x",), ndim=2, channels=1, unit="px", exact=False)
    train = train_of(bundle(corpus, replace(PLAIN, size=(16, 16), patches=40, foreground=share)))
    batch = train.__getitems__(list(range(len(train))))
    with_it = float((batch["label"] == 1).flatten(1).any(dim=1).float().mean())
    assert with_it == 1 if share else 0.02 < with_it < 0.35


# -- whole cases ----------------------------------------------------------------------------------------------------


def test_whole_cases_keep_their_files_grid() -> None:
    affine = np.diag([-1.0, 2.0, 1.5, 1.0])
    found = bundle(made([(9, 8, 7), (8, 10, 7)] * 6, affine=affine), replace(PLAIN, spacing=(1.5,)))
    assert found.state["orientation"] == "LAS"
    batch = test_of(found).__getitems__([0, 1])
    assert batch["index"].tolist() == [0, 1]
    for case, item in zip(test_of(found).cases, batch["cases"]):
        label = case.label().values  # type: ignore[operator,misc,union-attr]
        assert (item["label"].numpy() == label).all()
        assert item["spacing"].tolist() == [1.0, 2.0, 1.5]
        assert item["image"].shape[1:] == item["prepared"].undo.grid
        assert item["image"].shape[1:] == tuple(round(n * mm / 1.5) for n, mm in zip(label.shape, (1, 2, 1.5)))
        assert item["prepared"].restore(item["image"]).shape[1:] == label.shape
    assert test_of(found).whole(0) is test_of(found).whole(0)
    uncached = test_of(bundle(made([(9, 8, 7)] * 12, affine=affine), replace(PLAIN, cache=0)))
    assert uncached.whole(0) is not uncached.whole(0)


def test_state_is_plain_and_decides_other_data() -> None:
    affine = np.diag([1.0, 1.0, 2.0, 1.0])
    found = bundle(made([(9, 8, 7), (8, 10, 7)] * 6, affine=affine), replace(PLAIN, size=(8,), flips=(1,)))
    state = json.loads(json.dumps(found.state))
    assert state == found.state
    assert (state["size"], state["flips"], state["structures"], state["axes"]) == ([8, 8, 8], [1], ["x", "y"], 3)
    other = made([(5, 6, 7)] * 4, affine=np.diag([3.0, 3.0, 3.0, 1.0]))
    again = bundle(replace(other, structures=("y", "x")), replace(PLAIN, test=1), state=state)
    assert again.state == state
    assert again.train is None
    # Structures go by their names.
    label = other.cases[0].label().values  # type: ignore[operator,misc,union-attr]
    assert (test_of(again).whole(0).label == np.array([0, 2, 1])[label]).all()
    with pytest.raises(UserError, match="test has the structures x, z; the model knows x, y"):
        bundle(replace(other, structures=("x", "z")), PLAIN, state=state)


def test_sizes_and_spacings_of_training_cases() -> None:
    def files(folder: Path, spacings: list[tuple[float, ...]]) -> Path:
        for number, spacing in enumerate(spacings):
            for sub, kind in (("images", np.int16), ("labels", np.uint8)):
                (folder / sub).mkdir(parents=True, exist_ok=True)
                values = np.random.default_rng(number).integers(0, 2, (20, 30, 10)).astype(kind)
                name = folder / sub / f"c{number}.nii.gz"
                nibabel.save(nibabel.Nifti1Image(values, np.diag([*spacing, 1.0])), name)
        return folder

    import tempfile

    with tempfile.TemporaryDirectory() as place:
        same = files(Path(place) / "same", [(1.0, 1.0, 3.0)] * 5)
        found = load_bundle(str(same), PLAIN)
        assert (found.state["spacing"], found.state["size"]) == ([], [32, 32, 16])
        assert found.state["exact"]
        other = files(Path(place) / "other", [(1.0, 1.0, 3.0)] * 4 + [(2.0, 2.0, 3.0)] * 3)
        found = load_bundle(str(other), replace(PLAIN, val=0.0, test=0.2))
        assert found.state["spacing"][2] == 3.0
        assert found.state["spacing"][0] in (1.0, 1.5, 2.0)
        asked = load_bundle(str(other), replace(PLAIN, spacing=(2.0, 2.0, 0.0), size=(16, 16, 8)))
        assert (asked.state["spacing"], asked.state["size"]) == ([2.0, 2.0, 0.0], [16, 16, 8])
        sliced = load_bundle(str(same), replace(PLAIN, slices=2))
        assert (sliced.state["ndim"], sliced.state["size"]) == (2, [32, 32])
        assert len(train_of(sliced)) == 10 * len(train_of(sliced).cases)
        assert train_of(sliced)[0]["image"].shape == (1, 32, 32)
        assert "resampled to mm" in asked.facts
        assert asked.facts["resampled to mm"] == "2 x 2 x as it is"


def test_other_orientations_among_the_files() -> None:
    """Slices are of the same axis of the body whatever the axes of a file."""
    usual = made([(9, 8, 4)] * 10, slices=2, affine=np.diag([1.0, 1.0, 5.0, 1.0]))
    turned = np.array([[0.0, 1, 0, 0], [0, 0, 1, 0], [5, 0, 0, 0], [0, 0, 0, 1]])  # axes: up, right, front
    cases = list(usual.cases)
    label = cases[0].label().values  # type: ignore[operator,misc,union-attr]
    moved = np.ascontiguousarray(label.transpose(2, 0, 1))
    for number in range(4):
        cases[number] = replace(
            cases[number],
            image=partial(_image, moved[None].astype(np.float32), turned),
            label=partial(_image, moved, turned),
            scribble=None,
        )
    found = bundle(replace(usual, cases=tuple(cases)), replace(PLAIN, test=0.2, val=0.0, size=(9, 8)))
    assert found.state["orientation"] == "RAS"
    train = train_of(found)
    assert len(train) == 4 * len(train.cases)
    names = [case.name for case in train.cases]
    assert any(name in names for name in ("p00_frame0", "p01_frame0"))
    row = next(one for one, name in enumerate(names) if name in ("p00_frame0", "p01_frame0", "p00_frame1"))
    assert train[4 * row + 2]["label"].equal(torch.from_numpy(label[:, :, 2]).long())


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"size": (0,)}, "size is 1 or more along each axis"),
        ({"size": (8, 8)}, "size has 2 numbers; patches have 3 axes"),
        ({"spacing": (1.0, 1.0)}, "spacing has 2 numbers; the images have 3 axes"),
        ({"spacing": (-1.0,)}, "spacing is 0 or more"),
        ({"flips": (3,)}, "flips are axes from 0 to 2"),
        ({"patches": 0}, "patches is 1 or more"),
        ({"foreground": 2.0}, "foreground is a share"),
        ({"cache": -1.0}, "cache is a share"),
        ({"clip_low": 300.0}, "clip_low lies below clip_high"),
        ({"slices": 4}, "slices is an axis from 0 to 2, or -1"),
        ({"patient": "("}, "patient is no regular expression"),
        ({"patient": "p"}, "patient needs a group"),
    ],
)
def test_options_that_cannot_be(options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        load_bundle("synthetic", SegmentDataConfig(**options))


def test_millimetres_are_not_asked_of_pictures() -> None:
    with pytest.raises(UserError, match="spacing is in millimetres, which these images do not know"):
        load_bundle("synthetic_2d", SegmentDataConfig(spacing=(1.0,)))
    with pytest.raises(UserError, match=r"--data_args.slices is for volumes; these are pictures"):
        load_bundle("synthetic_2d", SegmentDataConfig(slices=1))


def test_an_image_and_a_label_of_different_sizes() -> None:
    corpus = made([(8, 8)] * 8)
    cases = [replace(case, label=partial(_image, np.zeros((8, 9), np.uint8), None)) for case in corpus.cases]
    found = bundle(replace(corpus, cases=tuple(cases)))
    with pytest.raises(UserError, match=r"p\d+_frame\d: the image is of size 8 x 8, its label of 8 x 9"):
        train_of(found)[0]


def test_memory_is_bounded() -> None:
    from attn_medseg.segment import data

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data, "_MOST_CACHED", 8 * 9 * 8 * 7 * 5)
        found = bundle(made([(9, 8, 7)] * 16))
    assert train_of(found).args.cache == pytest.approx(0.5)
