"""The chain of preprocessing: electrodes, reference, rate, band-pass, gaps."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest

from attn_eeg.data.options import EegDataConfig
from attn_eeg.data.preprocess import Chain
from attn_eeg.data.recording import Recording
from attn_shared.errors import UserError

NAMES = ["Fp1", "Fp2", "F3", "F4", "C3", "C4", "P3", "P4", "O1", "O2", "T7", "T8"]


def recording(
    seconds: float = 8.0, sfreq: float = 128.0, seed: int = 0, names: list[str] = NAMES, **more: Any
) -> Recording:
    rng = np.random.default_rng(seed)
    data = rng.normal(size=(len(names), round(seconds * sfreq))).cumsum(axis=1).astype(np.float32)
    return Recording(subject="a", data=data, sfreq=sfreq, channels=list(names), source="a.edf", **more)


def chain(**args: Any) -> Chain:
    return Chain(**{"channels": tuple(NAMES), "sfreq": 128.0, **args})


def sine(frequency: float, sfreq: float, seconds: float) -> Recording:
    wave = np.sin(2 * np.pi * frequency * np.arange(round(seconds * sfreq)) / sfreq).astype(np.float32)
    return Recording(subject="a", data=wave[None], sfreq=sfreq, channels=["Cz"])


def test_nothing_to_do_changes_nothing() -> None:
    one = recording()
    done = chain().apply(one)
    np.testing.assert_array_equal(done.data, one.data)
    assert done.channels == NAMES


def test_electrodes_are_found_by_place_whatever_order_and_name() -> None:
    one = recording()
    order = np.random.default_rng(1).permutation(len(NAMES))
    other = {"T7": "T3", "T8": "EEG T4", "Fp1": "FP1"}
    mixed = Recording(
        subject="a",
        data=np.concatenate([one.data[order], one.data[:1] * 7]),
        sfreq=128.0,
        channels=[*(other.get(NAMES[i], NAMES[i]) for i in order), "X9"],
    )
    np.testing.assert_array_equal(chain(reference="average").apply(mixed).data,
                                  chain(reference="average").apply(one).data)  # fmt: skip


def test_average_reference() -> None:
    done = chain(reference="average").apply(recording()).data
    np.testing.assert_allclose(done.mean(axis=0), 0, atol=1e-5)


@pytest.mark.parametrize("sfreq", [100.0, 160.0, 250.0, 500.0, 512.0])
def test_resampling_keeps_a_slow_wave_and_its_time(sfreq: float) -> None:
    done = Chain(channels=("Cz",), sfreq=128.0).apply(sine(10.0, sfreq, 4.0))
    expected = np.sin(2 * np.pi * 10.0 * np.arange(done.data.shape[1]) / 128.0)
    assert done.sfreq == 128.0
    assert abs(done.data.shape[1] - 512) <= 1
    np.testing.assert_allclose(done.data[0, 64:-64], expected[64:-64], atol=0.01)


def test_resampling_lets_nothing_fold_back() -> None:
    done = Chain(channels=("Cz",), sfreq=128.0).apply(sine(110.0, 500.0, 4.0))
    assert np.abs(done.data[0, 64:-64]).max() < 0.01


def test_labels_and_baseline_follow_the_rate() -> None:
    one = recording(sfreq=256.0, labels=np.repeat([0, 1], 1024), baseline=np.ones((len(NAMES), 512), np.float32))
    done = chain().apply(one)
    assert done.labels is not None
    assert done.baseline is not None
    np.testing.assert_array_equal(done.labels, np.repeat([0, 1], 512))
    assert done.baseline.shape == (len(NAMES), 256)
    np.testing.assert_allclose(done.baseline, 1.0, atol=1e-5)


@pytest.mark.parametrize(("low", "high"), [(1.0, 40.0), (1.0, 0.0), (0.0, 40.0)])
def test_band_pass_zero_phase_and_causal(low: float, high: float) -> None:
    time = np.arange(20 * 128) / 128
    kept, cut = np.sin(2 * np.pi * 10 * time), 0.0
    if low:
        cut = cut + 30 + np.sin(2 * np.pi * 0.1 * time)
    if high:
        cut = cut + np.sin(2 * np.pi * 58 * time)
    one = Recording(subject="a", data=(kept + cut)[None].astype(np.float32), sfreq=128.0, channels=["Cz"])
    zero_phase = Chain(channels=("Cz",), sfreq=128.0, low=low, high=high).apply(one).data[0]
    np.testing.assert_allclose(zero_phase[640:-640], kept[640:-640], atol=0.03)
    causal = Chain(channels=("Cz",), sfreq=128.0, low=low, high=high, causal=True)
    later = Recording(subject="a", data=one.data.copy(), sfreq=128.0, channels=["Cz"])
    later.data[:, 1000:] = 1e3
    np.testing.assert_array_equal(causal.apply(one).data[:, :1000], causal.apply(later).data[:, :1000])
    assert np.abs(zero_phase[:900] - causal.apply(one).data[0, :900]).max() > 0.1  # the phases do differ


def test_causal_filter_does_not_ring_from_an_offset() -> None:
    flat = Recording(subject="a", data=np.full((1, 512), 4200, np.float32), sfreq=128.0, channels=["Cz"])
    done = Chain(channels=("Cz",), sfreq=128.0, low=1.0, high=40.0, causal=True).apply(flat).data
    assert np.abs(done).max() < 1e-3


def test_gaps_stay_gaps_and_do_not_spread() -> None:
    one = recording(seconds=20)
    holed = Recording(subject="a", data=one.data.copy(), sfreq=128.0, channels=NAMES)
    holed.data[3, 1000:1010] = np.nan
    done = chain(low=1.0, high=40.0).apply(holed).data
    assert np.isnan(done[3, 1000:1010]).all()
    assert np.isfinite(np.delete(done, np.arange(1000, 1010), axis=1)).all()
    referenced = chain(reference="average").apply(holed).data
    assert np.isnan(referenced[:, 1000:1010]).all()
    assert np.isfinite(np.delete(referenced, np.arange(1000, 1010), axis=1)).all()
    halved = chain(sfreq=64.0).apply(holed).data[3]
    assert np.isnan(halved[500:505]).all()
    assert np.isfinite(halved[:480]).all()
    assert np.isfinite(halved[530:]).all()


def test_the_given_recording_is_left_alone() -> None:
    one = recording(notes=["flat: Fp1"])
    before = one.data.copy()
    done = chain(low=1.0, high=40.0, reference="average", sfreq=100.0).apply(one)
    np.testing.assert_array_equal(one.data, before)
    assert (one.sfreq, done.sfreq) == (128.0, 100.0)
    assert done.notes == ["flat: Fp1"]


def test_state_goes_through_json() -> None:
    ours = chain(low=1.0, high=40.0, reference="average", causal=True)
    assert Chain.from_state(json.loads(json.dumps(ours.state()))) == ours


class TestMissing:
    def test_refused_in_a_sentence(self) -> None:
        short = recording(names=[n for n in NAMES if n not in ("C3", "O2")])
        with pytest.raises(UserError, match=r"a\.edf lacks the electrodes C3, O2; it has Fp1"):
            chain().apply(short)

    def test_computed_from_neighbours(self) -> None:
        """A field that varies smoothly over the head is computed back to a few percent of its range."""
        import mne

        montage = mne.channels.make_standard_montage("biosemi64").get_positions()["ch_pos"]
        place = np.stack([montage[name] for name in NAMES])
        wave = np.sin(np.arange(512) / 9.0)
        data = (place @ np.array([3.0, 5.0, 2.0]))[:, None] * wave * 100 + 10 * wave
        whole = Recording(subject="a", data=data.astype(np.float32), sfreq=128.0, channels=list(NAMES))
        keep = [i for i, name in enumerate(NAMES) if name != "C3"]
        less = Recording(subject="a", data=whole.data[keep], sfreq=128.0, channels=[NAMES[i] for i in keep])
        done = chain().apply(less, interpolate=True)
        c3 = NAMES.index("C3")
        error = np.abs(done.data[c3] - whole.data[c3]).max()
        assert error < 0.05 * np.ptp(whole.data, axis=0).max()
        assert error < 0.2 * np.abs(less.data.mean(axis=0) - whole.data[c3]).max()
        np.testing.assert_array_equal(np.delete(done.data, c3, axis=0), less.data)
        assert done.notes == ["electrodes computed from their neighbours: C3"]

    def test_too_many_or_unknown_places_are_refused(self) -> None:
        with pytest.raises(UserError, match="too many"):
            chain().apply(recording(names=NAMES[:6]), interpolate=True)
        odd = Chain(channels=(*NAMES, "Left"), sfreq=128.0)
        with pytest.raises(UserError, match="Left, whose place on the head is unknown"):
            odd.apply(recording(), interpolate=True)


class TestPlan:
    def test_shared_electrodes_in_the_first_recordings_order(self) -> None:
        two = recording(names=["O1", "T3", "C3", "Fp1"])
        assert Chain.plan([recording(), two], EegDataConfig()).channels == ("Fp1", "C3", "O1", "T7")

    def test_named_electrodes(self) -> None:
        assert Chain.plan([recording()], EegDataConfig(channels=["O2", "t3"])).channels == ("O2", "t3")

    def test_rate_as_recorded(self) -> None:
        assert Chain.plan([recording(sfreq=200.0)], EegDataConfig(resample=0)).sfreq == 200.0

    @pytest.mark.parametrize(
        ("args", "says"),
        [
            ({"resample": 0}, "several sampling rates"),
            ({"channels": ["Cz"]}, "lacks the electrode Cz"),
            ({"channels": ["C3", "c3"]}, "twice"),
            ({"low": 40, "high": 8}, "0 <= low < high"),
            ({"high": 64}, "half the sampling rate"),
            ({"resample": -1}, "sampling rate in Hz"),
        ],
    )
    def test_what_cannot_be_is_refused(self, args: dict[str, Any], says: str) -> None:
        with pytest.raises(UserError, match=says):
            Chain.plan([recording(), recording(sfreq=250.0)], EegDataConfig(**args))

    def test_nothing_in_common(self) -> None:
        with pytest.raises(UserError, match="no electrode in common"):
            Chain.plan([recording(names=["C3"]), recording(names=["C4"])], EegDataConfig())


def test_empty_recording_is_refused() -> None:
    with pytest.raises(UserError, match="has no samples"):
        chain().apply(recording(seconds=0))


def test_short_recordings_pass_every_filter() -> None:
    for seconds in (0.01, 0.1, 0.5):
        done = chain(low=0.5, high=40.0).apply(recording(seconds=seconds))
        assert np.isfinite(done.data).all()
