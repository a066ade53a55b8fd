"""Band differential entropy of windows.

RBTransformer (S19), section on preprocessing: each window is standardised, filtered into bands by Butterworth filters,
and each band of each electrode becomes one number, the differential entropy of a Gaussian of that variance.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import signal

from attn_shared.errors import UserError

#: Least variance that enters the logarithm, so that a flat electrode gives -11.2 instead of minus infinity. Real bands
#: of a standardised window, whose whole variance is 1, lie above 1e-5.
VARIANCE_FLOOR = 1e-8

_ROWS = 1 << 23  # samples filtered at a time, so that memory does not grow with the recording


@dataclass(frozen=True)
class Band:
    """A band of frequencies, Hz."""

    name: str
    low: float
    high: float


def parse_bands(text: str, sfreq: float | None = None) -> list[Band]:
    """Bands from "name:low-high,...".

    Args:
        text: such as "theta:4-8,alpha:8-14".
        sfreq: sampling rate, Hz; None = do not compare the edges with it.

    Raises:
        UserError: not of that form, no band, two of one name, or edges that are no band at this sampling rate.
    """
    bands = []
    for part in filter(None, (piece.strip() for piece in text.split(","))):
        name, _, edges = part.partition(":")
        low, _, high = edges.partition("-")
        try:
            band = Band(name.strip(), float(low), float(high))
        except ValueError:
            raise UserError(f'band {part!r} is not of the form "name:low-high" in Hz, such as "alpha:8-14"') from None
        if not (band.name and 0 < band.low < band.high < math.inf):
            raise UserError(f"band {part!r} needs a name and edges with 0 < low < high")
        if sfreq is not None and band.high >= sfreq / 2:
            raise UserError(
                f"band {part!r} reaches above half the sampling rate, {sfreq / 2:g} Hz; lower data_args.bands "
                "or raise data_args.resample"
            )
        bands.append(band)
    if not bands:
        raise UserError('data_args.bands names no band; give some, such as "alpha:8-14,beta:14-31"')
    if len({band.name for band in bands}) < len(bands):
        raise UserError(f"data_args.bands names a band twice: {text}")
    return bands


def standardise(x: np.ndarray, how: str) -> np.ndarray:
    """Windows (…, C, T) less their mean, by their population deviation; one without deviation is only centred.

    Args:
        how: "array" = one mean and deviation for all electrodes of a window, "channel" = each electrode its own,
            "none" = as they are.
    """
    if how == "none":
        return x
    axes = (-2, -1) if how == "array" else (-1,)
    centred = x - x.mean(axis=axes, keepdims=True)
    deviation = np.sqrt(np.square(centred).mean(axis=axes, keepdims=True))
    # Rounding leaves a constant electrode a deviation of about 1e-16 times its level, which must not become noise.
    flat = deviation <= 1e-10 * np.abs(x).max(axis=axes, keepdims=True, initial=0.0)
    return centred / np.where(flat, 1.0, deviation)


def band_differential_entropy(
    x: np.ndarray,
    sfreq: float,
    bands: Sequence[Band],
    *,
    order: int = 5,
    causal: bool = True,
    base: float = 2.0,
    floor: float = VARIANCE_FLOOR,
) -> np.ndarray:
    """½·log(2πe·var) of each band of each electrode.

    Args:
        x: (…, C, T) windows.
        sfreq: sampling rate, Hz.
        bands: F bands.
        order: order of the Butterworth filters.
        causal: forward only from rest, as published (its start-up transient is part of the window); False = forward
            and backward, without phase shift.
        base: of the logarithm; 2 as published, `math.e` for nats.
        floor: least variance.

    Returns:
        (…, C, F) float64.
    """
    lead, length = x.shape[:-1], x.shape[-1]
    rows = x.reshape(math.prod(lead), length)  # not -1, which an empty batch leaves undecided
    variance = np.empty((len(rows), len(bands)))
    # Second-order sections: the one-piece transfer function of the official code loses digits in narrow, low bands
    # (2e-7 in the features for 4-8 Hz, 1e-3 for 0.5-4 Hz).
    filters = [_band_filter(order, band.low, band.high, sfreq) for band in bands]
    step = max(1, _ROWS // max(1, length))
    for first, (f, sos) in itertools.product(range(0, len(rows), step), enumerate(filters)):
        piece = rows[first : first + step].astype(np.float64, copy=False)
        if causal:
            filtered = signal.sosfilt(sos, piece)
        else:
            filtered = signal.sosfiltfilt(sos, piece, padlen=min(length - 1, 3 * (2 * len(sos) + 1)))
        variance[first : first + step, f] = filtered.var(axis=-1)
    entropy = 0.5 * np.log2(2 * math.pi * math.e * np.maximum(variance, floor))
    if base != 2.0:
        entropy *= math.log(2) / math.log(base)
    return entropy.reshape(*lead, len(bands))


@functools.lru_cache(maxsize=256)
def _band_filter(order: int, low: float, high: float, sfreq: float) -> np.ndarray:
    """Second-order sections; designing them anew for each recording would take longer than filtering it."""
    return np.asarray(signal.butter(order, [low, high], btype="band", fs=sfreq, output="sos"))


def window_features(
    x: np.ndarray, sfreq: float, bands: Sequence[Band], *, normalize: str, order: int, causal: bool
) -> np.ndarray:
    """(…, C, F) features of windows (…, C, T), in the published order: standardise, filter, entropy."""
    return band_differential_entropy(
        standardise(x.astype(np.float64, copy=False), normalize), sfreq, bands, order=order, causal=causal
    )


def baseline_features(
    baseline: np.ndarray, sfreq: float, bands: Sequence[Band], *, normalize: str, order: int, causal: bool
) -> np.ndarray | None:
    """(C, F) features of the rest before a trial, (C, Tb), to be taken from those of its windows.

    As the official code has it: the chunks of one second are averaged sample by sample, and the mean chunk is treated
    like a window. Seconds with samples that are no numbers are left out; without a whole second there is None.
    """
    chunk = round(sfreq)
    count = baseline.shape[-1] // chunk
    chunks = baseline[:, : count * chunk].astype(np.float64).reshape(len(baseline), count, chunk)
    chunks = chunks[:, np.isfinite(chunks).all(axis=(0, 2))]
    if not chunks.shape[1]:
        return None
    return window_features(chunks.mean(axis=1), sfreq, bands, normalize=normalize, order=order, causal=causal)
