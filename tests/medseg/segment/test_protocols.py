"""Published evaluations against the numbers of their own code."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from attn_medseg.segment.protocols import PROTOCOLS, CaseScores, Pair, nnunet_summary, told_phase
from attn_shared.errors import UserError

GOLDEN = Path(__file__).parents[2] / "golden" / "medseg_metrics.safetensors"


@pytest.fixture(scope="module")
def kept() -> dict[str, np.ndarray]:
    return load_file(GOLDEN)


@pytest.fixture(scope="module")
def pairs(kept: dict[str, np.ndarray]) -> list[Pair]:
    found, at = [], 0
    bits = np.unpackbits(kept["masks"])
    for i, (shape, spacing) in enumerate(zip(kept["shapes"], kept["spacings"])):
        axes = int((shape > 0).sum())
        size = math.prod(shape[:axes].tolist())
        a, b = (bits[at + j * size : at + (j + 1) * size].reshape(shape[:axes]) for j in range(2))
        at += 2 * size
        steps = tuple(spacing[:axes].tolist())
        found.append(Pair(name=f"case{i}", patient=f"p{i // 2}", predicted=a, truth=b, spacing=steps))
    return found


def scores(name: str, pairs: list[Pair], structures: tuple[str, ...] = ("x",)) -> list[CaseScores]:
    return [PROTOCOLS[name].case(pair, structures) for pair in pairs]


def test_synapse_is_transunets_function(pairs: list[Pair], kept: dict[str, np.ndarray]) -> None:
    cases = scores("synapse", pairs)
    found = np.array([[case.scores["x"]["dice"], case.scores["x"]["hd95"]] for case in cases])
    assert np.abs(found - kept["transunet"]).max() < 1e-6
    whole = PROTOCOLS["synapse"].figures(cases, ["x"])
    assert (whole["dice"], whole["hd95"]) == pytest.approx(tuple(kept["transunet"].mean(0)), abs=1e-6)


def test_isic_is_the_challenges_code(pairs: list[Pair], kept: dict[str, np.ndarray]) -> None:
    cases = scores("isic", pairs)
    names = ("accuracy", "sensitivity", "specificity", "jaccard", "threshold_jaccard", "dice")
    found = np.array([[case.scores["x"][name] for name in names] for case in cases])
    assert np.abs(found - kept["isic"]).max() < 1e-12
    assert ((kept["isic"][:, 4] == 0) & (kept["isic"][:, 3] > 0)).any()
    whole = PROTOCOLS["isic"].figures(cases, ["x"])
    assert [whole[name] for name in names] == pytest.approx(kept["isic"].mean(0).tolist(), abs=1e-12)
    with pytest.raises(UserError, match="ISIC scores one structure"):
        scores("isic", pairs, ("x", "y"))


def test_nnunet_is_its_own_code(pairs: list[Pair], kept: dict[str, np.ndarray]) -> None:
    cases = scores("nnunet", pairs)
    names = ("Dice", "IoU", "FP", "TP", "FN", "TN", "n_pred", "n_ref")
    found = np.array([[case.scores["x"][name] for name in names] for case in cases])
    np.testing.assert_allclose(found, kept["nnunet"], atol=1e-12)
    assert np.isnan(found[:, 0]).any()
    whole = PROTOCOLS["nnunet"].figures(cases, ["x"])
    assert whole["foreground_mean Dice"] == pytest.approx(np.nanmean(kept["nnunet"][:, 0]), abs=1e-12)
    summary = nnunet_summary(cases, ["x"])
    assert summary["foreground_mean"]["n_ref"] == pytest.approx(kept["nnunet"][:, 7].mean())  # type: ignore[index]
    assert summary["mean"]["1"]["TP"] == pytest.approx(kept["nnunet"][:, 3].mean())  # type: ignore[index]


def heart(shift: int) -> np.ndarray:
    made = np.zeros((12, 12, 3), np.uint8)
    made[2 + shift : 5 + shift, 3:6], made[7:9, 2:9], made[3:6, 8:11] = 1, 2, 3
    return made


def test_acdc_scores_each_phase() -> None:
    spacing = (1.5, 1.5, 10.0)
    pairs = [
        Pair(name="p1_frame01", patient="p1", predicted=heart(0), truth=heart(0), spacing=spacing),
        Pair(name="p1_frame12", patient="p1", predicted=heart(1), truth=heart(0), spacing=spacing),
        Pair(name="p2_frame04", patient="p2", predicted=heart(2), truth=heart(0), spacing=spacing, phase="ES"),
        Pair(name="p2_frame11", patient="p2", predicted=heart(0), truth=heart(0), spacing=spacing, phase="ED"),
    ]
    structures = ["rv", "myo", "lv"]
    found = PROTOCOLS["acdc"].figures(scores("acdc", pairs, tuple(structures)), structures)
    assert (found["dice rv ED"], found["dice lv ES"], found["hd rv ED"]) == (1, 1, 0)
    assert found["dice rv ES"] == pytest.approx((2 / 3 + 1 / 3) / 2)
    assert found["hd rv ES"] == pytest.approx((1.5 + 3.0) / 2)
    assert (found["cases ED"], found["cases ES"]) == (2, 2)
    assert found["error_ml rv ED"] == 0
    assert found["without hd"] == 0
    assert [told_phase(one) for one in scores("acdc", pairs, tuple(structures))] == ["", "", "ES", "ED"]
    assert found["dice"] == pytest.approx((5 + found["dice rv ES"]) / 6)


def test_phases_by_name_or_not_at_all() -> None:
    one = heart(0)
    make = lambda name: Pair(name=name, patient="p1", predicted=one, truth=one, spacing=(1.0, 1.0, 1.0))  # noqa: E731
    named = scores("acdc", [make("p1_ES"), make("p1_ED")], ("a", "b", "c"))
    assert PROTOCOLS["acdc"].figures(named, ["a", "b", "c"])["cases ED"] == 1
    with pytest.raises(UserError, match="the phase is not known"):
        PROTOCOLS["acdc"].figures(scores("acdc", [make("p1_frame01")], ("a", "b", "c")), ["a", "b", "c"])
    empty = Pair(name="p1_ED", patient="p1", predicted=one * 0, truth=one, spacing=(1.0, 1.0, 1.0))
    found = scores("acdc", [empty], ("a", "b", "c"))[0].scores["a"]
    assert found["dice"] == 0
    assert math.isnan(found["hd"])
