"""Band differential entropy against scipy, window by window, and against its own formula."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import load_file
from scipy import signal

from attn_eeg.data.features import (
    VARIANCE_FLOOR,
    Band,
    band_differential_entropy,
    baseline_features,
    parse_bands,
    standardise,
    window_features,
)
from attn_eeg.data.options import PAPER_BANDS
from attn_shared.errors import UserError

GOLDEN = Path(__file__).parent.parent / "golden"
BANDS = parse_bands(PAPER_BANDS)


def published(eeg: np.ndarray, sfreq: float = 128.0) -> np.ndarray:
    """The formula one electrode and band at a time, with the one-piece filters of the official code and torcheeg."""
    found = np.empty((len(eeg), len(BANDS)))
    for f, band in enumerate(BANDS):
        b, a = signal.butter(5, [band.low / (sfreq / 2), band.high / (sfreq / 2)], btype="band")
        for c, row in enumerate(eeg):
            found[c, f] = 0.5 * np.log2(2 * np.pi * np.e * np.var(signal.lfilter(b, a, row)))
    return found


def walk(*shape: int, seed: int = 0) -> np.ndarray:
    """Noise with more power at low frequencies, microvolt."""
    rng = np.random.default_rng(seed)
    return signal.lfilter([1.0], [1.0, -0.95], 10 * rng.normal(size=shape), axis=-1)


def test_equals_the_published_formula() -> None:
    x = walk(5, 6, 512)
    ours = band_differential_entropy(x, 128.0, BANDS)
    assert ours.shape == (5, 6, 4)
    for window, found in zip(x, ours):
        np.testing.assert_allclose(found, published(window), atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    ("name", "bands"), [("paper", PAPER_BANDS), ("review", "theta:4-8,alpha:8-13,beta:13-30,gamma:30-45")]
)
def test_equals_torcheeg(name: str, bands: str) -> None:
    """Numbers that torcheeg's BandDifferentialEntropy gave; see the .json beside them."""
    kept = load_file(GOLDEN / "eeg_bde.safetensors")
    found = band_differential_entropy(kept["x"].numpy(), 128.0, parse_bands(bands))
    np.testing.assert_allclose(found, kept[name].numpy(), atol=1e-6, rtol=0)


def test_whole_published_order_with_baseline() -> None:
    """Standardise, filter, entropy, less the entropy of the mean second of the rest before the trial."""
    x, rest = walk(3, 32, 512, seed=1), walk(32, 384, seed=2)
    ours = window_features(x, 128.0, BANDS, normalize="array", order=5, causal=True)
    base = baseline_features(rest, 128.0, BANDS, normalize="array", order=5, causal=True)
    assert base is not None
    mean_second = rest.reshape(32, 3, 128).mean(axis=1)
    expected_base = published((mean_second - mean_second.mean()) / mean_second.std())
    for window, found in zip(x, ours - base):
        np.testing.assert_allclose(
            found, published((window - window.mean()) / window.std()) - expected_base, atol=2e-6, rtol=0
        )


def test_narrow_low_bands_keep_their_digits() -> None:
    """A steady sine of amplitude A in the middle of a narrow band has variance A²/2: no digit is lost to the filter."""
    time = np.arange(60 * 128) / 128
    x = np.sin(2 * np.pi * math.sqrt(0.5 * 4) * time)[None]
    found = band_differential_entropy(x, 128.0, [Band("delta", 0.5, 4)], causal=False)
    assert found.item() == pytest.approx(0.5 * math.log2(2 * math.pi * math.e * 0.5), abs=0.02)


@pytest.mark.parametrize("base", [2.0, math.e, 10.0])
def test_base_of_the_logarithm(base: float) -> None:
    x = walk(2, 256)
    in_bits = band_differential_entropy(x, 128.0, BANDS)
    found = band_differential_entropy(x, 128.0, BANDS, base=base)
    np.testing.assert_allclose(found, in_bits * math.log(2) / math.log(base), rtol=1e-12)


@pytest.mark.parametrize("level", [0.0, 1.0, -4200.0, 1e-9])
@pytest.mark.parametrize("how", ["array", "channel", "none"])
def test_flat_electrodes_give_the_floor_and_never_infinity(level: float, how: str) -> None:
    x = np.full((2, 3, 512), level)
    found = window_features(x, 128.0, BANDS, normalize=how, order=5, causal=True)
    assert np.isfinite(found).all()
    if how != "none":
        np.testing.assert_allclose(found, 0.5 * np.log2(2 * np.pi * np.e * VARIANCE_FLOOR))
    x[:, 1:] += walk(2, 2, 512)  # one electrode fell off
    found = window_features(x, 128.0, BANDS, normalize="channel", order=5, causal=True)
    np.testing.assert_allclose(found[:, 0], 0.5 * np.log2(2 * np.pi * np.e * VARIANCE_FLOOR))
    assert (found[:, 1:] > -8).all()


def test_standardise() -> None:
    x = walk(4, 3, 100).astype(np.float64) * np.array([1, 10, 100])[:, None] + 5
    whole, each = standardise(x, "array"), standardise(x, "channel")
    np.testing.assert_allclose(whole.mean(axis=(1, 2)), 0, atol=1e-12)
    np.testing.assert_allclose(whole.std(axis=(1, 2)), 1)
    np.testing.assert_allclose(each.std(axis=2), 1)
    np.testing.assert_allclose(each.mean(axis=2), 0, atol=1e-12)
    assert standardise(x, "none") is x


def test_any_leading_shape_and_one_row_at_a_time() -> None:
    x = walk(2, 3, 4, 200)
    found = band_differential_entropy(x, 128.0, BANDS, causal=False)
    np.testing.assert_allclose(found[1, 2, 3], band_differential_entropy(x[1, 2, 3], 128.0, BANDS, causal=False))
    assert band_differential_entropy(np.zeros((0, 3, 200)), 128.0, BANDS).shape == (0, 3, 4)


def test_a_rest_without_a_whole_second_of_numbers_gives_none() -> None:
    rest = walk(3, 300)
    how = {"normalize": "array", "order": 5, "causal": True}
    assert baseline_features(rest[:, :100], 128.0, BANDS, **how) is None
    broken = rest.copy()
    broken[1, 5] = np.nan
    np.testing.assert_array_equal(
        baseline_features(broken, 128.0, BANDS, **how), baseline_features(rest[:, 128:], 128.0, BANDS, **how)
    )
    broken[2, 200] = np.nan
    assert baseline_features(broken, 128.0, BANDS, **how) is None


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "names no band"),
        ("alpha", "not of the form"),
        ("alpha:8-x", "not of the form"),
        ("alpha:14-8", "0 < low < high"),
        ("delta:0-4", "0 < low < high"),
        (":8-14", "needs a name"),
        ("a:4-8,a:8-14", "twice"),
        ("gamma:31-64", "half the sampling rate"),
    ],
)
def test_bands_that_are_none_are_refused_in_a_sentence(text: str, says: str) -> None:
    with pytest.raises(UserError, match=says):
        parse_bands(text, 128.0)


def test_bands() -> None:
    assert parse_bands(" alpha:8-14, beta:14.5-31 ") == [Band("alpha", 8, 14), Band("beta", 14.5, 31)]
