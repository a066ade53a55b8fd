"""Planes through volumes as radiologists see them, and the figures of a report."""

from __future__ import annotations

import math

import nibabel
import numpy as np
import pytest
import torch

from attn_medseg.cli import APP
from attn_medseg.segment import data, metrics, plots
from attn_medseg.segment.metrics import Policy
from attn_medseg.segment.options import SegmentDataConfig
from attn_medseg.segment.overlays import Shown, overlay, planes
from attn_medseg.segment.task import SegmentTask
from attn_shared import options, plotting, trainer


def body() -> tuple[np.ndarray, np.ndarray]:
    """A volume of axes to the right, front and head with a spot at the right, front and head of its middle."""
    label = np.zeros((12, 20, 9), np.uint8)
    label[9:11, 14:18, 6:8] = 1
    return label.astype(np.float32)[None], label


@pytest.mark.parametrize("codes", ["RAS", "LPS", "PIR", "SAL"])
def test_planes_are_shown_as_radiologists_see_them(codes: str) -> None:
    label = body()[1]
    affine = np.diag([1.0, 2.0, 3.0, 1.0])
    turn = nibabel.orientations.axcodes2ornt(tuple(codes))
    moved = nibabel.Nifti1Image(label, affine).as_reoriented(turn)
    labels = np.asanyarray(moved.dataobj)
    found = planes(Shown(image=labels[None].astype(np.float32), labels=labels, affine=moved.affine))
    axial, coronal, sagittal = found
    assert [one.title.split()[0] for one in found] == ["axial", "coronal", "sagittal"]
    assert axial.labels.shape == (20, 12)
    assert coronal.labels.shape == (9, 12)
    assert sagittal.labels.shape == (9, 20)
    # The patient's right is on the left, front and head are up; in the sagittal plane the front is on the right.
    for one, up, left in ((axial, True, True), (coronal, True, True), (sagittal, True, False)):
        rows, columns = np.nonzero(one.labels)
        assert bool(rows.mean() < one.labels.shape[0] / 2) is up
        assert bool(columns.mean() < one.labels.shape[1] / 2) is left
    assert [round(one.aspect, 6) for one in found] == [2.0, 3.0, 1.5]


def test_stacks_and_pictures() -> None:
    image, label = body()
    found = planes(Shown(image=image, labels=label, slices=2))
    assert [one.title for one in found] == ["slice 7", "slice 8"]
    assert all(np.array_equal(one.labels, label[:, :, 6]) for one in found)
    (one,) = planes(Shown(image=np.repeat(image[:, :, :, 6], 3, axis=0), labels=label[:, :, 6]))
    assert one.values.shape == (12, 20, 3)
    empty = planes(Shown(image=image, labels=np.zeros_like(label), slices=1))
    assert len(empty) == 3


def test_overlays_are_drawn() -> None:
    image, label = body()
    truth = np.roll(label, 1, axis=1) * 2
    for shown in (
        Shown(image=image, labels=label, truth=truth, affine=np.eye(4)),
        Shown(image=image, labels=np.zeros_like(label), affine=np.eye(4)),
        Shown(image=image[:, :, :, 6], labels=label[:, :, 6]),
        Shown(image=image[:, :, :1, :1], labels=label[:, :1, :1]),
    ):
        fig = overlay(shown, ["one", "two"], "title")
        assert len(plotting.png(fig, dpi=40)) > 500


def test_box_plots_tell_what_is_missing() -> None:
    truth = np.zeros((10, 10), np.uint8)
    truth[:4], truth[6:] = 1, 2
    missed = np.where(truth == 2, 0, truth)
    sums: dict[str, torch.Tensor] = {}
    for case, (predicted, true) in enumerate(((truth, truth), (missed, truth), (truth, missed))):
        sums |= metrics.pack(case, case, [metrics.score(predicted, true, 2, (1.0, 1.0))])
    rows = metrics.unpack(sums)
    assert rows is not None
    fig = plots.boxes(rows, ["a", "b"], Policy(), "mm")
    ticks = [text.get_text() for text in fig.axes[0].get_xticklabels()]
    assert ticks == ["a", "b\n1 missed\n1 invented"]
    assert [case for case, _ in plots.ranked(rows, Policy())][-1] == 0
    assert plots.ranked(rows, Policy())[0][1] == pytest.approx(0.5)
    assert math.isnan(rows.score("hd95", Policy())[3])


def test_attention_of_a_model_that_shows_it(monkeypatch: pytest.MonkeyPatch) -> None:
    args = SegmentDataConfig()
    bundle = data.load_bundle("synthetic_2d", args)
    config = options.config_from_dict(
        APP, {"app": "medseg", "model": "unet", "data": "synthetic_2d", "model_args": {"channels": [4, 8]}}
    )
    task = trainer.build_task(APP, config, bundle.state)
    assert isinstance(task, SegmentTask)
    test = bundle.test
    assert isinstance(test, data.CaseSet)
    assert plots.attention(task, test, 0) is None
    monkeypatch.setattr(type(task.network), "attention", lambda self, x: {"gate": x[:, 0, ::4, ::4].abs()})
    fig = plots.attention(task, test, 0)
    assert fig is not None
    assert [ax.get_title(loc="left") for ax in fig.axes] == ["image", "gate"]
