"""How good separated voices are: SI-SDR, BSS-eval's SDR, STOI, PESQ, and which voice is whose.

- si_sdr: scale-invariant signal-to-distortion ratio, decibels: 10·log10(|αs|²/|ŝ-αs|²) with αs the projection of the
  estimate ŝ on the source s, both less their mean (as SI-SNR; "SDR - half-baked or well done?", Le Roux et al. 2019).
- sdr: the SDR of BSS-eval (Vincent et al. 2006): as above, but s may be filtered by any 512 taps, and means stay.
- si_sdri, sdri: that of the estimate less that of the mixture, against the same source.
- stoi: short-time objective intelligibility, 0 to 1 (Taal et al. 2011), by pystoi.
- pesq: perceptual evaluation of speech quality (ITU-T P.862), about 1 to 4.5, by the optional package pesq: narrowband
  at 8 kHz, wideband at 16 kHz; not defined at other rates.

Which estimate is which voice is decided once an utterance, over the whole of it: the permutation of highest mean
SI-SDR, all being tried. A silent source has no score and counts nowhere. Every source of every utterance weighs the
same in a mean.

Shapes: B batch, C voices, T samples. Scores of pairs are (B, C, C): estimate by row, source by column.
"""

from __future__ import annotations

import functools
import importlib.util
import itertools
import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

FORMAT = {
    "si_sdri": ".2f",
    "sdri": ".2f",
    "si_sdr": ".2f",
    "sdr": ".2f",
    "stoi": ".3f",
    "pesq": ".2f",
    "pesq_wb": ".2f",
    "si_sdr_mixture": ".2f",
    "below_0_db": ".1%",
    "mixtures": ",.0f",
}
TAPS = 512
_COLUMNS = ("si_sdr", "si_sdr_mixture", "sdr", "sdr_mixture", "stoi", "pesq")
Measures = Literal["si_sdr", "sdr", "all"]


def has_pesq() -> bool:
    """Whether the optional package is installed."""
    return importlib.util.find_spec("pesq") is not None


# -- SI-SDR and permutations ------------------------------------------------------------------------------------------


def valid(lengths: Tensor, size: int) -> Tensor:
    """(B, size) bool: which samples exist."""
    return torch.arange(size, device=lengths.device) < lengths[:, None]


def centred(x: Tensor, lengths: Tensor | None) -> Tensor:
    """(B, …, T) less the mean over each one's own samples; 0 behind them, whatever stood there."""
    if lengths is None:
        return x - x.mean(dim=-1, keepdim=True)
    mask = valid(lengths, x.shape[-1]).view(len(x), *[1] * (x.dim() - 2), -1)
    count = lengths.clamp(min=1).to(x.dtype).view(len(x), *[1] * (x.dim() - 1))
    x = torch.where(mask, x, 0.0)
    return torch.where(mask, x - x.sum(dim=-1, keepdim=True) / count, 0.0)


def pairwise_si_sdr(estimates: Tensor, sources: Tensor, lengths: Tensor | None = None) -> Tensor:
    """(B, E, C) decibels of every estimate against every source.

    Limited by the precision of the numbers: to about 150 in float64. A silent source has NaN; a silent estimate of
    another -inf.

    Args:
        estimates: (B, E, T).
        sources: (B, C, T).
        lengths: (B,) samples of each utterance; None = all.
    """
    share = similarity(centred(estimates, lengths), centred(sources, lengths))
    left = (1 - share).clamp(min=torch.finfo(share.dtype).eps)
    return 10 * torch.log10(share / left)


def similarity(estimates: Tensor, sources: Tensor) -> Tensor:
    """(B, E, C) share of the estimate's energy that lies along the source: the square of their cosine.

    Of silent estimates 0, of silent sources NaN.
    """
    along = torch.einsum("bit,bjt->bij", estimates, sources).square()
    energy = estimates.square().sum(dim=-1)[:, :, None] * sources.square().sum(dim=-1)[:, None, :]
    share = along / torch.where(energy > 0, energy, 1.0)
    return torch.where((sources.abs().amax(dim=-1) > 0)[:, None, :], share, torch.nan)


def si_sdr(estimate: Tensor, source: Tensor) -> Tensor:
    """(…) decibels of (…, T) against (…, T)."""
    shape = estimate.shape[:-1]
    return pairwise_si_sdr(estimate.reshape(-1, 1, estimate.shape[-1]), source.reshape(-1, 1, source.shape[-1])).view(
        shape
    )


@functools.cache
def permutations(voices: int) -> tuple[tuple[int, ...], ...]:
    """Every way to give each source an estimate of its own."""
    return tuple(itertools.permutations(range(voices)))


def permuted_means(pairs: Tensor) -> Tensor:
    """(B, P) mean over the sources of (B, C, C) pair scores, for each of `permutations(C)`."""
    voices = pairs.shape[-1]
    index = torch.tensor(permutations(voices), device=pairs.device)
    return pairs[:, index, torch.arange(voices, device=pairs.device)].mean(dim=-1)


def best_permutation(pairs: Tensor) -> Tensor:
    """(B, C): the estimate of each source, so that the mean score is highest; the first of equals.

    Args:
        pairs: (B, C, C) scores, more being better; those of silent sources (NaN) decide nothing.
    """
    # The limits keep means finite, so that a perfect or empty estimate does not make all permutations equal.
    pairs = pairs.nan_to_num(nan=0.0, posinf=1e4, neginf=-1e4)
    index = torch.tensor(permutations(pairs.shape[-1]), device=pairs.device)
    return index[permuted_means(pairs).argmax(dim=1)]


def reorder(estimates: Tensor, order: Tensor) -> Tensor:
    """(B, C, T) estimates in the order of the sources."""
    return estimates.gather(1, order[:, :, None].expand(-1, -1, estimates.shape[-1]))


# -- BSS-eval ---------------------------------------------------------------------------------------------------------


def bss_sdr(estimates: np.ndarray, sources: np.ndarray, *, taps: int = TAPS) -> np.ndarray:
    """BSS-eval's SDR of every estimate against every source, (E, C) decibels, in float64.

    The target is the projection of the estimate on the source and its delays of 1 to `taps` - 1 samples; all else is
    distortion. A silent source has NaN, a silent estimate of another -inf.

    Args:
        estimates: (E, T).
        sources: (C, T).
    """
    from scipy.fft import irfft, next_fast_len, rfft
    from scipy.linalg import LinAlgError, LinAlgWarning, lstsq, solve, toeplitz

    estimates, sources = np.asarray(estimates, np.float64), np.asarray(sources, np.float64)
    size = next_fast_len(sources.shape[-1] + taps - 1, real=True)
    spectra, own = rfft(sources, size), rfft(estimates, size)
    energy = np.square(estimates).sum(axis=-1)
    found = np.full((len(estimates), len(sources)), np.nan)
    for j, spectrum in enumerate(spectra):
        if not sources[j].any():
            continue
        gram = toeplitz(irfft(np.square(np.abs(spectrum)), size)[:taps])
        right = irfft(spectrum.conj() * own, size)[:, :taps].T
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("error", LinAlgWarning)
                weights = solve(gram, right, assume_a="pos")
        except (LinAlgError, LinAlgWarning):  # a source of few frequencies, such as a tone
            weights = lstsq(gram, right)[0]
        along = np.clip((right * weights).sum(axis=0), 0.0, energy)
        left = np.maximum(energy - along, energy * np.finfo(np.float64).eps)
        with np.errstate(divide="ignore", invalid="ignore"):
            found[:, j] = np.where(energy > 0, 10 * np.log10(along / left), -np.inf)
    return found


# -- intelligibility and quality --------------------------------------------------------------------------------------


def stoi(estimate: np.ndarray, source: np.ndarray, rate: int) -> float:
    """STOI of (T,) against (T,); NaN where the speech is shorter than it needs (about 0.4 s)."""
    from pystoi import stoi as measure

    if not source.any() or len(source) < rate // 10:
        return math.nan
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        try:
            return float(measure(source, estimate, rate))
        except RuntimeWarning:
            return math.nan


def pesq(estimate: np.ndarray, source: np.ndarray, rate: int) -> float:
    """PESQ of (T,) against (T,); NaN at other rates than 8 and 16 kHz, without the package, and without speech."""
    if rate not in (8000, 16000) or not has_pesq() or not source.any() or not estimate.any():
        return math.nan
    import pesq as package

    try:
        # Levels are aligned inside, but on 16-bit numbers: both get the same peak, so that neither loses digits.
        source, estimate = (x * (0.5 / np.abs(x).max()) for x in (source, estimate))
        return float(package.pesq(rate, source, estimate, "nb" if rate == 8000 else "wb"))
    except package.PesqError:
        return math.nan


# -- all scores of a mixture ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Scores:
    """The scores of N mixtures of C voices; each (N, C) in the order of the sources.

    Attributes:
        index: (N,) numbers of the mixtures in their set, ascending.
        values: (N, C, 6); columns si_sdr and sdr, each followed by that of the mixture, stoi and pesq.
    """

    index: np.ndarray
    values: np.ndarray

    def of(self, name: str) -> np.ndarray:
        """(N, C) of a column; "si_sdri" and "sdri" are differences to the mixture."""
        if name in ("si_sdri", "sdri"):
            own = name.removesuffix("i")
            return np.asarray(self.of(own) - self.of(f"{own}_mixture"))
        return np.asarray(self.values[..., _COLUMNS.index(name)])


def score(
    estimates: Tensor,
    sources: Tensor,
    mixture: Tensor,
    lengths: Tensor | None,
    rate: int,
    *,
    measures: Measures = "all",
) -> np.ndarray:
    """(B, C, 6) scores of a batch, columns as in `Scores`; NaN where there is none.

    Args:
        estimates: (B, C, T) in any order.
        sources: (B, C, T).
        mixture: (B, T).
        measures: "si_sdr" only, also "sdr", or "all".
    """
    estimates, sources, mixture = (x.detach().double().cpu() for x in (estimates, sources, mixture))
    lengths = None if lengths is None else lengths.cpu()
    pairs = pairwise_si_sdr(estimates, sources, lengths)
    order = best_permutation(pairs)
    values = np.full((*sources.shape[:2], len(_COLUMNS)), np.nan)
    column = {name: i for i, name in enumerate(_COLUMNS)}
    values[..., column["si_sdr"]] = pairs.gather(1, order[:, None, :])[:, 0].numpy()
    values[..., column["si_sdr_mixture"]] = pairwise_si_sdr(mixture[:, None], sources, lengths)[:, 0].numpy()
    if measures == "si_sdr":
        return values
    ordered = reorder(estimates, order).numpy()
    for b in range(len(values)):
        size = sources.shape[-1] if lengths is None else int(lengths[b])
        own, true, mixed = ordered[b, :, :size], sources[b, :, :size].numpy(), mixture[b, :size].numpy()
        sdr = bss_sdr(np.concatenate([own, mixed[None]]), true)
        values[b, :, column["sdr"]], values[b, :, column["sdr_mixture"]] = sdr.diagonal(), sdr[-1]
        if measures == "all":
            for c, source in enumerate(true):
                values[b, c, column["stoi"]] = stoi(own[c], source, rate)
                values[b, c, column["pesq"]] = pesq(own[c], source, rate)
    return values


def pack(index: Tensor, values: np.ndarray) -> dict[str, Tensor]:
    """The scores of a batch as an entry of the metric state.

    Each batch has an entry of its own, named by its first mixture, so that adding states up over processes joins them.
    """
    # Digits that rounding made would let the mixture be better or worse than itself.
    values = np.round(values, 9).reshape(len(values), -1)
    rows = np.concatenate([index.cpu().numpy().astype(np.float64)[:, None], values], axis=1)
    return {f"mixture {int(index[0])}": torch.from_numpy(rows)}


def unpack(sums: Mapping[str, Tensor]) -> Scores | None:
    """All scores of a metric state in the order of the mixtures; None where there are none."""
    if not sums:
        return None
    rows = torch.cat(list(sums.values())).numpy()
    rows = rows[rows[:, 0].argsort(kind="stable")]
    return Scores(rows[:, 0].astype(np.int64), rows[:, 1:].reshape(len(rows), -1, len(_COLUMNS)))


def figures(found: Scores, rate: int) -> dict[str, float]:
    """Means over all sources, see the module; "below_0_db" = share of sources whose SI-SDR the model made worse."""
    gain = found.of("si_sdri")
    done = {
        "si_sdri": _mean(gain),
        "sdri": _mean(found.of("sdri")),
        "si_sdr": _mean(found.of("si_sdr")),
        "sdr": _mean(found.of("sdr")),
        "stoi": _mean(found.of("stoi")),
        "pesq" if rate == 8000 else "pesq_wb": _mean(found.of("pesq")),
        "si_sdr_mixture": _mean(found.of("si_sdr_mixture")),
        "below_0_db": _mean(np.where(np.isfinite(gain), gain < 0, np.nan)),
        "mixtures": float(len(found.index)),
    }
    # What was not measured has no row rather than a row of no number.
    return {name: value for name, value in done.items() if name == "si_sdri" or not math.isnan(value)}


def _mean(values: np.ndarray) -> float:
    """Mean without NaN; an estimate that is silent counts as -100 dB, a perfect one as its precision allows."""
    kept = values[~np.isnan(values)].clip(min=-100.0)
    return float(kept.mean()) if kept.size else math.nan
