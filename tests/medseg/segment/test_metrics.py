"""Scores of masks against MONAI live, MedPy (live where it is installed, and its kept numbers) and closed forms."""

from __future__ import annotations

import csv
import io
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from attn_medseg.segment import metrics
from attn_medseg.segment.metrics import Policy

GOLDEN = Path(__file__).parents[2] / "golden" / "medseg_metrics"
CLOSE = 1e-4


def pairs() -> list[tuple[np.ndarray, np.ndarray, tuple[float, ...]]]:
    """The kept mask pairs with their spacings."""
    stored = load_file(GOLDEN.with_suffix(".safetensors"))
    found, at = [], 0
    bits = np.unpackbits(stored["masks"]).astype(bool)
    for shape, spacing in zip(stored["shapes"], stored["spacings"]):
        axes = int((shape > 0).sum())
        size = math.prod(shape[:axes].tolist())
        a, b = (bits[at + i * size : at + (i + 1) * size].reshape(shape[:axes]) for i in range(2))
        at += 2 * size
        found.append((a, b, tuple(spacing[:axes].tolist())))
    return found


def scored(a: np.ndarray, b: np.ndarray, spacing: tuple[float, ...], **chosen: object) -> dict[str, float]:
    values = metrics.score(a.astype(np.uint8), b.astype(np.uint8), 1, spacing)
    rows = metrics.unpack(metrics.pack(0, 0, [values]))
    assert rows is not None
    policy = Policy(**chosen)  # type: ignore[arg-type]
    return {name: float(rows.score(name, policy)[0]) for name in ("dice", "iou", "hd95_pooled", "hd95_maximum", "assd")}


def test_scores_are_those_of_medpy_kept() -> None:
    kept = load_file(GOLDEN.with_suffix(".safetensors"))["medpy"]
    assert len(kept) == 100
    empty = np.isnan(kept[:, 2])
    assert 10 <= empty.sum() <= 50
    for (a, b, spacing), right in zip(pairs(), kept):
        found = scored(a, b, spacing)
        own = [found[name] for name in ("dice", "iou", "hd95_pooled", "assd")]
        assert own == pytest.approx(right.tolist(), abs=CLOSE, nan_ok=True)


def test_scores_are_those_of_medpy_where_it_is() -> None:
    binary = pytest.importorskip("medpy.metric.binary", reason="MedPy is not installed; its kept numbers are compared")
    for a, b, spacing in pairs():
        found = scored(a, b, spacing)
        assert found["dice"] == pytest.approx(float(binary.dc(a, b)), abs=CLOSE, nan_ok=True)
        if a.any() and b.any():
            assert found["hd95_pooled"] == pytest.approx(float(binary.hd95(a, b, spacing)), abs=CLOSE)
            assert found["assd"] == pytest.approx(float(binary.assd(a, b, spacing)), abs=CLOSE)


def test_scores_are_those_of_monai() -> None:
    from monai.metrics import compute_average_surface_distance, compute_dice, compute_hausdorff_distance, compute_iou

    seen = {"hd95": 0, "empty": 0}
    for a, b, spacing in pairs():
        found = scored(a, b, spacing)
        x, y = (torch.from_numpy(one)[None, None].float() for one in (a, b))
        dice = float(compute_dice(x, y, ignore_empty=False))
        iou = float(compute_iou(x, y, ignore_empty=False))
        other = scored(a, b, spacing, empty="one")
        assert (other["dice"], other["iou"]) == pytest.approx((dice, iou), abs=CLOSE)
        if not (a.any() and b.any()):
            seen["empty"] += 1
            assert math.isnan(found["hd95_maximum"])
            assert math.isnan(found["assd"])
            continue
        seen["hd95"] += found["hd95_maximum"] > found["hd95_pooled"] + 0.1
        far = compute_hausdorff_distance(x, y, include_background=True, percentile=95, spacing=list(spacing))
        mean = compute_average_surface_distance(x, y, include_background=True, symmetric=True, spacing=list(spacing))
        assert found["hd95_maximum"] == pytest.approx(float(far), abs=CLOSE)
        assert found["assd"] == pytest.approx(float(mean), abs=CLOSE)
    # Both definitions differ, and every kind of empty mask was there.
    assert seen["hd95"] > 20
    assert seen["empty"] >= 10


def test_what_stands_for_scores_that_do_not_exist() -> None:
    full, none = np.ones((4, 5), bool), np.zeros((4, 5), bool)
    nan = math.nan
    for a, b, expected in (
        (none, none, {"none": nan, "one": 1.0, "zero": 0.0}),
        (full, none, {"none": 0.0, "one": 0.0, "zero": 0.0}),
        (none, full, {"none": 0.0, "one": 0.0, "zero": 0.0}),
        (full, full, {"none": 1.0, "one": 1.0, "zero": 1.0}),
    ):
        for empty, value in expected.items():
            found = scored(a, b, (1.0, 1.0), empty=empty)
            assert (found["dice"], found["iou"]) == pytest.approx((value, value), nan_ok=True)
        far = scored(a, b, (2.0, 3.0), missed="diagonal")
        both, neither = a.any() and b.any(), not a.any() and not b.any()
        expect = 0.0 if both else nan if neither else math.hypot(6.0, 12.0)
        for name in ("hd95_pooled", "hd95_maximum", "assd"):
            assert far[name] == pytest.approx(expect, nan_ok=True)
        assert math.isnan(scored(a, b, (1.0, 1.0))["hd95_pooled"]) is not both


def test_figures_of_cases_and_structures() -> None:
    truth = np.zeros((6, 6, 4), np.uint8)
    truth[:2], truth[4:] = 1, 2
    missed = np.where(truth == 2, 0, truth)
    half = truth.copy()
    half[:, :, 2:] = 0
    none = np.zeros_like(truth)
    sums: dict[str, torch.Tensor] = {}
    for case, (patient, predicted, true) in enumerate(
        [(0, truth, truth), (0, missed, truth), (1, half, truth), (2, none, none), (2, truth, missed)]
    ):
        sums |= metrics.pack(case, patient, [metrics.score(predicted, true, 2, (1.0, 2.0, 5.0))])
    rows = metrics.unpack(dict(reversed(sums.items())))
    assert rows is not None
    assert rows.key("case").tolist() == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4]
    found = metrics.figures(rows, ["a", "b"], Policy(), resamples=500)
    two = 2 / 3
    assert found["dice a"] == pytest.approx((1 + 1 + two + 1) / 4)
    assert found["dice b"] == pytest.approx((1 + 0 + two + 0) / 4)
    assert found["dice"] == pytest.approx((found["dice a"] + found["dice b"]) / 2)
    assert (found["missed"], found["invented"], found["cases"]) == (1, 1, 5)
    assert (found["missed a"], found["missed b"], found["invented b"]) == (0, 1, 1)
    one = 2 * 6 * 4 * 10 / 1000  # ml of a structure
    assert found["volume_difference"] == pytest.approx((one / 2 / 5 + (one + one / 2 + one) / 5) / 2)
    assert found["dice, 95% from"] <= found["dice"] <= found["dice, 95% to"]
    counted = metrics.figures(rows, ["a", "b"], Policy(empty="zero"))
    assert counted["dice a"] == pytest.approx((1 + 1 + two + 0 + 1) / 5)
    far = metrics.figures(rows, ["a", "b"], Policy(missed="diagonal"))
    diagonal = math.hypot(5 * 1.0, 5 * 2.0, 3 * 5.0)
    assert far["hd95 b"] == pytest.approx((0 + diagonal + 10.0 + diagonal) / 4)
    assert metrics.figures(rows, ["a", "b"], Policy())["hd95 b"] == pytest.approx((0 + 10.0) / 2)


def test_intervals_resample_patients() -> None:
    rng = np.random.default_rng(0)
    values = rng.uniform(0, 1, 12)
    truth = np.ones((100,), np.uint8)
    sums: dict[str, torch.Tensor] = {}
    for case in range(60):
        # Cases of a patient are alike, so intervals are as wide as those of twelve patients.
        predicted = (np.arange(100) < 100 * values[case // 5]).astype(np.uint8)
        sums |= metrics.pack(case, case // 5, [metrics.score(predicted, truth, 1, (1.0,), surfaces=False)])
    rows = metrics.unpack(sums)
    assert rows is not None
    found = metrics.figures(rows, ["one"], Policy(), resamples=2000)
    dice = rows.score("dice", Policy()).reshape(12, 5)[:, 0]
    drawn = dice[np.random.default_rng(1).integers(0, 12, (20000, 12))].mean(axis=1)
    low, high = np.quantile(drawn, (0.025, 0.975))
    assert found["dice, 95% from"] == pytest.approx(low, abs=0.02)
    assert found["dice, 95% to"] == pytest.approx(high, abs=0.02)


def test_table_of_cases() -> None:
    a = np.zeros((5, 5, 5), np.uint8)
    a[1:3, 1:3, 1:3] = 1
    sums = metrics.pack(0, 0, [metrics.score(a, a, 2, (2.0, 2.0, 5.0))])
    rows = metrics.unpack(sums)
    assert rows is not None
    lines = list(csv.DictReader(io.StringIO(metrics.table(rows, {0: "x"}, ["a", "b"], Policy(), "mm", "ml"))))
    assert [line["structure"] for line in lines] == ["a", "b"]
    assert (lines[0]["case"], lines[0]["dice"], lines[0]["true_volume_ml"]) == ("x", "1", "0.16")
    assert (lines[1]["dice"], lines[1]["hd95_pooled_mm"], lines[1]["missed"]) == ("", "", "0")


def test_masks_that_do_not_fit() -> None:
    a = np.zeros((4, 4), np.uint8)
    with pytest.raises(ValueError, match="does not fit"):
        metrics.score(a, np.zeros((4, 5), np.uint8), 1, (1.0, 1.0))
    with pytest.raises(ValueError, match="as many spacings"):
        metrics.score(a, a, 1, (1.0, 1.0, 1.0))


def test_golden_facts_are_told() -> None:
    told = json.loads(GOLDEN.with_suffix(".json").read_text(encoding="utf-8"))
    assert "MedPy 0.5.2" in told["oracle"]
