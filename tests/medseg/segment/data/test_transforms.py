"""Images on the model's grid and back: places exactly, intensities by their own statistics, augmentation as drawn."""

from __future__ import annotations

from typing import Any

import nibabel
import numpy as np
import pytest
import torch
from scipy.ndimage import center_of_mass

from attn_medseg.segment.corpus import Image
from attn_medseg.segment.readers.files import IGNORE
from attn_medseg.segment.transforms import (
    crop,
    cut,
    label_on_grid,
    normalised,
    orientation,
    place,
    plan,
    prepare,
)
from attn_shared.errors import UserError


def state(**options: Any) -> dict[str, Any]:
    return {
        "axes": 3,
        "ndim": 3,
        "slices": -1,
        "channels": 1,
        "unit": "mm",
        "orientation": "RAS",
        "spacing": [],
        "resize": "none",
        "size": [16, 16, 16],
        "normalise": "none",
        "clip": [-125.0, 275.0],
        "structures": ["a", "b"],
    } | options


def ball(size: tuple[int, ...], affine: np.ndarray, centre: np.ndarray, radius: float) -> np.ndarray:
    """1 in a ball around a place in millimetres."""
    grid = np.stack(np.meshgrid(*(np.arange(one) for one in size), indexing="ij"), -1)
    world = grid @ affine[:3, :3].T + affine[:3, 3]
    return (((world - centre) ** 2).sum(-1) < radius**2).astype(np.uint8)


def some_affine(code: str, spacing: tuple[float, ...], tilt: float = 0.0) -> np.ndarray:
    """An affine of an orientation, turned about the last axis by `tilt`."""
    moves = nibabel.orientations.axcodes2ornt(code)
    affine = np.eye(4)
    affine[:3, :3] = 0
    for axis in range(3):
        affine[int(moves[axis, 0]), axis] = moves[axis, 1] * spacing[axis]
    turn = np.eye(4)
    turn[:2, :2] = [[np.cos(tilt), -np.sin(tilt)], [np.sin(tilt), np.cos(tilt)]]
    affine[:3, 3] = (-20.0, 11.0, 5.0)
    return turn @ affine


@pytest.mark.parametrize("code", ["RAS", "LPS", "SAR", "PIL", "ASR"])
@pytest.mark.parametrize("tilt", [0.0, 0.4])
def test_other_orientations_are_undone_exactly(code: str, tilt: float) -> None:
    affine = some_affine(code, (1.0, 2.0, 3.0), tilt)
    assert orientation(affine) == code
    values = np.random.default_rng(0).random((1, 5, 6, 7), np.float32)
    prepared = prepare(Image(values=values, affine=affine), state())
    undo = prepared.undo
    assert (prepared.restore(prepared.values).numpy() == values).all()
    assert prepared.spacing == pytest.approx((1.0, 2.0, 3.0))
    # The first axis of what a model reads grows to the right, the second to the front, the third upwards.
    for axis in range(3):
        step = affine[:3, undo.order[axis]] * (-1 if undo.order[axis] in undo.turned else 1)
        assert np.argmax(np.abs(step)) == axis
        assert step[axis] > 0
    labels = (values[0] > 0.5).astype(np.uint8)
    on = label_on_grid(labels, undo)
    assert (prepared.labels(torch.stack([1.0 - on, on.float()])) == labels).all()
    assert (prepared.labels(on) == labels).all()


@pytest.mark.parametrize("spacing", [(1.0, 1.0, 1.0), (0.5, 0.5, 3.0), (2.0, 1.5, 0.8)])
@pytest.mark.parametrize("code", ["RAS", "LIP"])
def test_resampling_keeps_places_in_millimetres(spacing: tuple[float, ...], code: str) -> None:
    size = (33, 28, 25)
    affine = some_affine(code, spacing, 0.3)
    centre = affine[:3, :3] @ (np.array(size) / 2 - 0.5) + affine[:3, 3] + (0.7, -1.1, 0.4)
    mask = ball(size, affine, centre, 8.0)
    image = Image(values=mask[None].astype(np.float32), affine=affine)
    options = state(spacing=[1.0, 1.2, 1.5])
    prepared = prepare(image, options)
    undo = prepared.undo
    extent = [size[axis] * spacing[axis] for axis in undo.order]
    assert undo.grid == tuple(round(one / wanted) for one, wanted in zip(extent, (1.0, 1.2, 1.5)))
    back = prepared.labels(torch.cat([1 - prepared.values, prepared.values]))
    assert back.shape == size
    overlap = 2 * (back & mask).sum() / (back.sum() + mask.sum())
    assert overlap > 0.93
    found = np.array(center_of_mass(back)) - np.array(center_of_mass(mask))
    assert np.abs(found * spacing).max() < 0.15
    on = label_on_grid(mask, undo).numpy()
    again = prepared.labels(torch.from_numpy(on))
    assert 2 * (again & mask).sum() / (again.sum() + mask.sum()) > 0.85


def test_the_labels_of_scores_are_their_largest() -> None:
    affine = some_affine("LPS", (1.0, 1.0, 2.5))
    image = Image(values=np.random.default_rng(0).random((1, 9, 8, 7), np.float32), affine=affine)
    prepared = prepare(image, state(spacing=[1.3, 0.9, 1.0]))
    scores = torch.randn(4, *prepared.undo.grid, generator=torch.Generator().manual_seed(0))
    assert (prepared.labels(scores) == prepared.restore(scores).argmax(0).numpy()).all()
    with pytest.raises(ValueError, match="scores of a grid of"):
        prepared.restore(scores[:, :2])


def test_whole_images_come_to_one_size_and_back() -> None:
    options = state(axes=2, ndim=2, channels=3, size=[24, 32], resize="whole", unit="px", orientation="")
    values = np.random.default_rng(0).random((3, 51, 47), np.float32)
    prepared = prepare(Image(values=values), options)
    assert prepared.values.shape == (3, 24, 32)
    assert prepared.restore(torch.randn(2, 24, 32)).shape == (2, 51, 47)
    stack = state(slices=2, ndim=2, size=[24, 32], resize="whole", unit="px")
    prepared = prepare(Image(values=values[:1, :, :, None].repeat(5, 3)), stack)
    assert prepared.values.shape == (1, 24, 32, 5)
    assert prepared.slices == 2
    grey = prepare(Image(values=values[:1]), options)
    assert grey.values.shape == (3, 24, 32)


def test_smaller_images_are_smoothed_first() -> None:
    """A pattern finer than the coarse grid comes to its mean, not to stripes."""
    options = state(axes=2, ndim=2, size=[8, 8], resize="whole", unit="px", orientation="")
    stripes = np.tile(np.array([0.0, 1.0], np.float32), 32)[None, None].repeat(64, 1)
    prepared = prepare(Image(values=stripes), options)
    assert prepared.values.numpy() == pytest.approx(0.5, abs=0.05)


def test_smaller_images_are_monais_but_for_the_edges() -> None:
    from monai.transforms import Resize

    volume = np.random.default_rng(0).random((1, 40, 30, 24)).astype(np.float32)
    options = state(spacing=[2.0, 1.5, 0.5])
    right = Resize((20, 20, 48), mode="trilinear", anti_aliasing=True, anti_aliasing_sigma=[0.5, 0.25, 0.0])(volume)
    found = prepare(Image(values=volume, affine=np.eye(4)), options).values.numpy()
    assert found.shape == right.shape
    assert found[:, 2:-2, 2:-2] == pytest.approx(right[:, 2:-2, 2:-2].numpy(), abs=1e-4)
    # MONAI's smoothing mixes in 0 at the edges: a constant image would have a dark rim.
    flat = prepare(Image(values=np.ones_like(volume), affine=np.eye(4)), options).values
    assert (flat - 1).abs().max() < 1e-6


def test_images_that_do_not_fit() -> None:
    image = Image(values=np.zeros((2, 4, 4, 4), np.float32), affine=np.eye(4))
    with pytest.raises(UserError, match="the image has 2 channels, the model reads 1"):
        prepare(image, state())
    with pytest.raises(UserError, match="the image has 3 axes, the model was trained on images of 2"):
        prepare(image, state(axes=2))


def test_an_image_without_millimetres_stays_as_it_is() -> None:
    image = Image(values=np.zeros((1, 4, 5, 6), np.float32))
    assert plan(image, state(spacing=[2.0, 2.0, 2.0])).grid == (4, 5, 6)


# -- intensities ----------------------------------------------------------------------------------------------------


def test_each_image_is_normalised_by_itself() -> None:
    values = torch.rand(2, 6, 7, generator=torch.Generator().manual_seed(0)) * 900 + 100
    values[1] *= 1000
    values[:, :2] = 0
    there = values != 0
    scored = normalised(values, "zscore", (0, 1), nonzero=True)
    for channel in range(2):
        inside = scored[channel][there[channel]]
        assert float(inside.mean()) == pytest.approx(0, abs=1e-5)
        assert float(inside.std(unbiased=False)) == pytest.approx(1, abs=1e-4)
    assert (scored[~there] == 0).all()
    whole = normalised(values, "zscore", (0, 1), nonzero=False)
    assert whole.mean(dim=(1, 2)).tolist() == pytest.approx([0, 0], abs=1e-5)
    assert (whole[~there] < 0).all()
    for how in ("minmax", "percentile"):
        found = normalised(values, how, (0, 1), nonzero=True)
        assert float(found.min()) == 0
        assert float(found.amax(dim=(1, 2)).min()) == pytest.approx(1)
    clipped = normalised(torch.tensor([[-1000.0, -125, 75, 275, 3000]]), "clip", (-125, 275), nonzero=True)
    assert clipped.tolist() == [pytest.approx([0, 0, 0.5, 1, 1])]
    assert normalised(values, "none", (0, 1), nonzero=True).equal(values)
    assert normalised(torch.zeros(1, 3, 3), "zscore", (0, 1), nonzero=True).equal(torch.zeros(1, 3, 3))


# -- patches --------------------------------------------------------------------------------------------------------


def test_crops_are_filled_outside() -> None:
    array = torch.arange(20.0).reshape(4, 5)
    assert crop(array, (1, 2), (2, 3), -1).equal(array[1:3, 2:5])
    found = crop(array, (-1, 3), (3, 4), -1)
    wanted = torch.full((3, 4), -1.0)
    wanted[1:, :2] = array[:2, 3:]
    assert found.equal(wanted)
    assert crop(array, (9, -9), (2, 3), -1).equal(torch.full((2, 3), -1.0))


def test_patches_hold_what_they_are_drawn_around() -> None:
    rng = np.random.default_rng(0)
    starts = set()
    for _ in range(300):
        around = rng.integers(0, (40, 30, 9))
        start = place((40, 30, 9), (16, 8, 12), around, rng)
        assert start[2] == -1  # an axis that is smaller lies in the middle
        for axis, (has, wants) in enumerate(((40, 16), (30, 8))):
            assert 0 <= start[axis] <= has - wants
            assert start[axis] <= around[axis] < start[axis] + wants
        starts.add(start)
    assert len(starts) > 100
    anywhere = [place((40,), (16,), None, rng)[0] for _ in range(500)]
    assert (min(anywhere), max(anywhere)) == (0, 24)


@pytest.mark.parametrize("ndim", [2, 3])
def test_augmentation_moves_image_and_label_together(ndim: int) -> None:
    size = (24, 20, 16)[:ndim]
    grid = np.stack(np.meshgrid(*(np.arange(one) for one in size), indexing="ij"), -1)
    label = torch.from_numpy((((grid - np.array(size) / 2 - 1) ** 2).sum(-1) < 30).astype(np.uint8))
    image = label.float()[None] * 2 - 1
    changed = 0
    for seed in range(40):
        rng = np.random.default_rng(seed)
        found, (moved,) = cut(image, [label], (0,) * ndim, size, rng, augment="full", flips=range(ndim))
        assert found.shape == image.shape
        assert moved.shape == label.shape
        assert set(moved.unique().tolist()) <= {0, 1, IGNORE}
        inside, outside = found[0][moved == 1], found[0][moved == 0]
        assert float(inside.mean()) > float(outside.mean()) + 1.0
        assert 0.4 < float((moved == 1).float().mean() / label.float().mean()) < 2.2
        changed += not moved.equal(label)
        rng = np.random.default_rng(seed)
        again, (same,) = cut(image, [label], (0,) * ndim, size, rng, augment="full", flips=range(ndim))
        assert again.equal(found)
        assert same.equal(moved)
    assert changed > 30


def test_what_augmentation_leaves_alone() -> None:
    image, label = torch.randn(1, 12, 10), torch.randint(0, 3, (12, 10), dtype=torch.uint8)
    for seed in range(10):
        found, (same,) = cut(
            image, [label], (0, 0), (12, 10), np.random.default_rng(seed), augment="none", flips=(0, 1)
        )
        assert found.equal(image)
        assert same.equal(label)
    seen = set()
    for seed in range(40):
        found, (turned,) = cut(
            image, [label], (0, 0), (12, 10), np.random.default_rng(seed), augment="flip", flips=(1,)
        )
        flipped = found.equal(image.flip(2))
        assert flipped or found.equal(image)
        assert turned.equal(label.flip(1) if flipped else label)
        seen.add(flipped)
    assert seen == {True, False}


def test_a_turned_patch_is_what_monai_makes_of_it() -> None:
    """Turn and zoom, which are written in torch for their speed, against MONAI's transform of the same matrix."""
    from monai.transforms import Affine

    from attn_medseg.segment import transforms

    image = torch.randn(1, 40, 44, generator=torch.Generator().manual_seed(0))
    image = torch.nn.functional.avg_pool2d(image, 5, 1, 2)
    angle, zoom = 0.37, 1.1

    class Fixed:
        drawn = iter([np.log(zoom), np.array([angle])])

        def uniform(self, *args: object) -> Any:
            return next(self.drawn)

    found, _ = transforms._turned(image, [], (8, 10), (24, 24), Fixed())  # type: ignore[arg-type]
    wanted = Affine(
        rotate_params=angle, scale_params=[zoom, zoom], spatial_size=(24, 24), padding_mode="zeros", image_only=True
    )(image[:, 2:38, 4:40])
    assert float((found - wanted.as_tensor()).abs().max()) < 1e-4
