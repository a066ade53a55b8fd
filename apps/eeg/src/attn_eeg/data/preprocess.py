"""The chain that every recording goes through before it is cut into windows; it is stored with the checkpoint.

Electrodes are chosen, re-referenced, resampled, band-passed, in this order. Names, rates and options decide all of it:
nothing here is fitted to values.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from fractions import Fraction
from typing import Any, Literal

import numpy as np
from scipy import signal

from attn_eeg.data.channels import electrode, standard_montage
from attn_eeg.data.options import EegDataConfig
from attn_eeg.data.recording import Recording
from attn_shared.errors import UserError

_MOST_INTERPOLATED = 1 / 3


def place(name: str) -> str:
    """Where an electrode sits: "T3" and "EEG t7" are one place."""
    return electrode(name).lower()


@dataclass(frozen=True, kw_only=True)
class Chain:
    """Preprocessing of a recording.

    Attributes:
        channels: names of the electrodes, in the order of the result.
        sfreq: sampling rate of the result, Hz.
        low: lower edge of the band-pass, Hz; 0 = none.
        high: upper edge, Hz; 0 = none.
        order: of the Butterworth filter.
        causal: filter forward only. Resampling has an anti-alias filter of linear phase in either case, which looks
            ahead by ten samples of the lower rate.
        reference: "average" = less the mean of `channels` at each sample; "none".
    """

    channels: tuple[str, ...]
    sfreq: float
    low: float = 0.0
    high: float = 0.0
    order: int = 5
    causal: bool = False
    reference: Literal["none", "average"] = "none"

    def __post_init__(self) -> None:
        if self.low < 0 or self.high < 0 or (0 < self.high <= self.low):
            raise UserError(
                f"data_args.low is {self.low:g} and data_args.high {self.high:g}; give 0 <= low < high, 0 for no edge"
            )
        if max(self.low, self.high) >= self.sfreq / 2:
            raise UserError(
                f"the band-pass reaches {max(self.low, self.high):g} Hz, and half the sampling rate is "
                f"{self.sfreq / 2:g} Hz; lower data_args.high or raise data_args.resample"
            )

    @classmethod
    def plan(cls, recordings: Sequence[Recording], args: EegDataConfig) -> Chain:
        """The chain for these recordings.

        Raises:
            UserError: no electrode in common, one asked for that a recording lacks, or several sampling rates where
                `resample` is 0.
        """
        if not recordings:
            raise UserError("there is no recording to read")
        if args.resample < 0:
            raise UserError(f"data_args.resample is {args.resample:g}; give a sampling rate in Hz, or 0 to keep it")
        rates = sorted({recording.sfreq for recording in recordings})
        if args.resample == 0 and len(rates) > 1:
            raise UserError(
                f"the recordings have several sampling rates ({', '.join(f'{r:g}' for r in rates)} Hz); "
                "name one by data_args.resample"
            )
        if args.channels:
            channels = list(args.channels)
        else:
            shared = set.intersection(*({place(name) for name in recording.channels} for recording in recordings))
            channels = [name for name in recordings[0].channels if place(name) in shared]
            if not channels:
                raise UserError("the recordings have no electrode in common; name them by data_args.channels")
        if len({place(name) for name in channels}) < len(channels):
            raise UserError(f"an electrode is named twice: {', '.join(channels)}")
        chain = cls(
            channels=tuple(channels),
            sfreq=args.resample or rates[0],
            low=args.low,
            high=args.high,
            order=args.order,
            causal=args.causal,
            reference=args.reference,
        )
        for recording in recordings:
            chain.missing(recording, refuse=True)
        return chain

    def state(self) -> dict[str, Any]:
        return {**asdict(self), "channels": list(self.channels)}

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> Chain:
        return cls(**{**state, "channels": tuple(state["channels"])})

    def missing(self, recording: Recording, *, refuse: bool = False) -> list[str]:
        """Electrodes of the chain that the recording lacks."""
        here = {place(name) for name in recording.channels}
        lacking = [name for name in self.channels if place(name) not in here]
        if lacking and refuse:
            raise UserError(
                f"{_name(recording)} lacks the electrode{'s' if len(lacking) > 1 else ''} {', '.join(lacking)}; it has "
                f"{', '.join(recording.channels)}"
            )
        return lacking

    def apply(self, recording: Recording, *, interpolate: bool = False) -> Recording:
        """The recording after the chain; the given one stays as it is.

        Samples that are no numbers are bridged by a straight line for the filters and are NaN again afterwards, with
        what resampling mixes of them, so that no window is made of them.

        Args:
            interpolate: electrodes that the recording lacks are computed from their neighbours by spherical splines,
                up to a third of all; False = refuse.

        Raises:
            UserError: an electrode is missing (or too many are), or there is no sample.
        """
        if recording.data.shape[-1] == 0:
            raise UserError(f"{_name(recording)} has no samples")
        lacking = self.missing(recording, refuse=not interpolate)
        notes = list(recording.notes)
        signals = {"data": recording.data, "baseline": recording.baseline}
        if lacking:
            notes.append(f"electrodes computed from their neighbours: {', '.join(lacking)}")
        done: dict[str, np.ndarray | None] = {}
        for name, values in signals.items():
            if values is None or values.shape[-1] == 0:
                done[name] = None
                continue
            chosen = self._choose(values, recording, lacking)
            done[name] = self._filter(chosen, recording.sfreq)
        data = done["data"]
        assert data is not None
        labels = recording.labels
        if labels is not None and recording.sfreq != self.sfreq:
            nearest = np.rint(np.arange(data.shape[-1]) * recording.sfreq / self.sfreq).astype(np.int64)
            labels = labels[np.minimum(nearest, len(labels) - 1)]
        return dataclasses.replace(
            recording,
            data=data,
            baseline=done["baseline"],
            labels=labels,
            sfreq=self.sfreq,
            channels=list(self.channels),
            notes=notes,
        )

    # -- steps --------------------------------------------------------------------------------------------------------

    def _choose(self, values: np.ndarray, recording: Recording, lacking: Sequence[str]) -> np.ndarray:
        """Rows of the chain's electrodes, float64."""
        rows = {place(name): row for row, name in enumerate(recording.channels)}
        if not lacking:
            return values[[rows[place(name)] for name in self.channels]].astype(np.float64)
        chosen = np.zeros((len(self.channels), values.shape[-1]))
        for i, name in enumerate(self.channels):
            if place(name) in rows:
                chosen[i] = values[rows[place(name)]]
        others = [name for name in recording.channels if place(name) not in {place(own) for own in self.channels}]
        extra = values[[rows[place(name)] for name in others]].astype(np.float64)
        return _interpolate(chosen, list(self.channels), list(lacking), extra, others, recording)

    def _filter(self, values: np.ndarray, sfreq: float) -> np.ndarray:
        known = np.isfinite(values)
        whole = bool(known.all())
        if not whole:
            values = _bridge(values, known)
        if self.reference == "average":
            values = values - values.mean(axis=0)
            if not whole:  # the mean of that moment is no number either
                known = np.broadcast_to(known.all(axis=0), known.shape)
        if sfreq != self.sfreq:
            ratio = Fraction(self.sfreq / sfreq).limit_denominator(10_000)
            values = signal.resample_poly(values, ratio.numerator, ratio.denominator, axis=-1, padtype="line")
            if not whole:
                known = _resampled_mask(known, values.shape[-1], sfreq, self.sfreq)
        if self.low or self.high:
            values = self._band_pass(values)
        if not whole:
            values = np.where(known, values, np.nan)
        return values.astype(np.float32)

    def _band_pass(self, values: np.ndarray) -> np.ndarray:
        edges, kind = {
            (True, True): ([self.low, self.high], "bandpass"),
            (True, False): (self.low, "highpass"),
            (False, True): (self.high, "lowpass"),
        }[bool(self.low), bool(self.high)]
        sos = signal.butter(self.order, edges, btype=kind, fs=self.sfreq, output="sos")
        if self.causal:
            # As if the first sample had been there for ever: otherwise an offset rings at the start.
            settled = signal.sosfilt_zi(sos)[:, None, :] * values[None, :, :1]
            return np.asarray(signal.sosfilt(sos, values, axis=-1, zi=settled)[0])
        pad = min(values.shape[-1] - 1, int(3 * self.sfreq / self.low) if self.low else 3 * (2 * len(sos) + 1))
        return np.asarray(signal.sosfiltfilt(sos, values, axis=-1, padlen=pad))


def _name(recording: Recording) -> str:
    return recording.source or f"the recording {recording.subject}/{recording.session}/{recording.trial}"


def _bridge(values: np.ndarray, known: np.ndarray) -> np.ndarray:
    """Gaps filled by a straight line over time; a row without any number becomes zero."""
    filled = values.copy()
    moments = np.arange(values.shape[-1])
    for row in np.flatnonzero(~known.all(axis=-1)):
        here = known[row]
        filled[row] = np.interp(moments, moments[here], values[row, here]) if here.any() else 0.0
    return filled


def _resampled_mask(known: np.ndarray, length: int, old: float, new: float) -> np.ndarray:
    """Which samples of the new rate are made of known ones only."""
    reach = int(np.ceil(10 * max(1.0, old / new)))
    moments = np.arange(length) * old / new
    first = np.clip(np.floor(moments).astype(np.int64) - reach, 0, known.shape[-1])
    last = np.clip(np.ceil(moments).astype(np.int64) + reach + 1, 0, known.shape[-1])
    gaps = np.concatenate([np.zeros((len(known), 1), np.int64), np.cumsum(~known, axis=-1)], axis=-1)
    return np.asarray(gaps[:, last] == gaps[:, first])


def _interpolate(
    values: np.ndarray,
    names: list[str],
    lacking: list[str],
    extra: np.ndarray,
    others: list[str],
    recording: Recording,
) -> np.ndarray:
    """`values` with the rows of the electrodes `lacking` computed by spherical splines from all that have a place."""
    import mne

    if len(lacking) > _MOST_INTERPOLATED * len(names):
        raise UserError(
            f"{_name(recording)} lacks {len(lacking)} of the {len(names)} electrodes ({', '.join(lacking)}): "
            "too many to compute from their neighbours"
        )
    montage = standard_montage()
    spelling = {name.lower(): name for name in montage.ch_names}
    unplaced = [name for name in lacking if place(name) not in spelling]
    if unplaced:
        raise UserError(
            f"{_name(recording)} lacks {', '.join(unplaced)}, whose place on the head is unknown, so that it cannot be "
            "computed from its neighbours"
        )
    places = [place(name) for name in (*names, *others)]
    kept = [i for i, where in enumerate(places) if where in spelling]
    spelt = [spelling[places[i]] for i in kept]
    signals = np.concatenate([values, extra])
    known = np.isfinite(signals)
    info = mne.create_info(spelt, 100.0, "eeg")
    raw = mne.io.RawArray(_bridge(signals, known)[kept], info, verbose="error")
    raw.set_montage(montage, verbose="error")
    raw.info["bads"] = [spelling[place(name)] for name in lacking]
    raw.interpolate_bads(verbose="error")
    result = values.copy()
    for name in lacking:
        result[names.index(name)] = raw.get_data(picks=[spelling[place(name)]], verbose="error")[0]
    if not known.all():
        result[:, ~known.all(axis=0)] = np.nan
    return result
