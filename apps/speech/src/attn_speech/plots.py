"""Figures of separation: how much better voices became, for whom, and three mixtures to see and hear."""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np
import soundfile
import torch
from matplotlib.figure import Figure

from attn_shared import plotting
from attn_shared.task import DataBundle, Picture, Sound
from attn_speech import metrics
from attn_speech.audio_backend import spectrogram
from attn_speech.data.mixing import Mixtures
from attn_speech.metrics import Scores

if TYPE_CHECKING:
    from attn_speech.task import SpeechTask

_SECONDS = 6.0
_RANGE_DB = 60.0


def pictures(task: SpeechTask, bundle: DataBundle) -> Iterator[Picture]:
    """Everything that the report of a run shows, of the test part."""
    mixtures = bundle.test
    if not isinstance(mixtures, Mixtures) or not len(mixtures):
        return
    found = task.scores(mixtures)
    pairs = [sexes_of(mixtures.piece(int(index)).sexes) for index in found.index]
    told = (
        ""
        if len(set(pairs)) < 2
        else " Right: by the sexes of the voices in a mixture, with the medians and how many mixtures they are."
    )
    yield Picture(
        name="gains",
        caption="Left: SI-SDR improvement of every voice of every test mixture. Middle: against how loud the voice was "
        f"in its mixture.{told}",
        figure=gains(found, pairs),
    )
    yield from examples(task, mixtures, found)


def sexes_of(sexes: Sequence[str]) -> str:
    """Of the voices of a mixture, such as "F+M"; "" where one is not known."""
    return "+".join(sorted(sexes)) if all(sexes) else ""


def gains(found: Scores, pairs: Sequence[str]) -> Figure:
    """Distribution of SI-SDRi: over all, against the voice's level, and by `pairs`, one name a mixture."""
    gain, before = found.of("si_sdri"), found.of("si_sdr_mixture")
    names = sorted(set(pairs) - {""})
    fig = plotting.figure(9.6, 3.2)
    flat = gain[np.isfinite(gain)]
    with plotting.style():
        grid = fig.subplots(1, 3 if len(names) > 1 else 2)
        low, high = (float(flat.min()), float(flat.max())) if flat.size else (0.0, 1.0)
        grid[0].hist(flat, bins=np.arange(np.floor(low), np.ceil(high) + 1.5, 1.0), color=plotting.COLOURS[0])
        for value, style, label in ((np.mean, "-", "mean"), (np.median, "--", "median")):
            if flat.size:
                middle = float(value(flat))
                grid[0].axvline(middle, color=plotting.COLOURS[1], linestyle=style, label=f"{label} {middle:.1f} dB")
        grid[0].set(xlabel="SI-SDRi, dB", ylabel="voices")
        grid[0].legend()
        kept = np.isfinite(gain) & np.isfinite(before)
        grid[1].plot(
            before[kept], gain[kept], linestyle="none", marker="o", markersize=3, alpha=0.6, color=plotting.COLOURS[0]
        )
        grid[1].axhline(0, color=plotting.MUTED, linewidth=1)
        grid[1].set(xlabel="SI-SDR in the mixture, dB", ylabel="SI-SDRi, dB")
        if len(names) > 1:
            groups = [gain[[pair == name for pair in pairs]] for name in names]
            groups = [one[np.isfinite(one)] for one in groups]
            grid[2].boxplot(
                groups,
                widths=0.5,
                showfliers=False,
                medianprops={"color": plotting.COLOURS[1], "linewidth": 2},
            )
            counts = [sum(pair == name for pair in pairs) for name in names]
            grid[2].set_xticks(range(1, len(names) + 1), [f"{n}\n{c} of {len(pairs)}" for n, c in zip(names, counts)])
            for place, one in enumerate(groups, 1):
                if one.size:
                    grid[2].annotate(f"{np.median(one):.1f}", (place + 0.28, np.median(one)), fontsize=9, va="center")
            grid[2].set(ylabel="SI-SDRi, dB")
    return fig


def examples(task: SpeechTask, mixtures: Mixtures, found: Scores) -> Iterator[Picture]:
    """A mixture that came out badly, a middling one and a good one: spectrograms and players."""
    gain = np.nanmean(np.where(np.isfinite(found.of("si_sdri")), found.of("si_sdri"), np.nan), axis=1)
    order = np.argsort(np.nan_to_num(gain, nan=-np.inf), kind="stable")
    places = dict.fromkeys(int(order[round(share * (len(order) - 1))]) for share in (0.1, 0.5, 0.9))
    titles = ("one of the worst tenth", "a middling one", "one of the best tenth")
    for number, (place, title) in enumerate(zip(places, titles), 1):
        index = int(found.index[place])
        mixture, sources = mixtures.samples(index)
        voices = estimated(task, mixture, sources)
        said = ", ".join(f"{value:.1f}" for value in found.of("si_sdri")[place])
        piece = mixtures.piece(index)
        who = ", ".join(f"{name or '?'}{f' ({sex})' if sex else ''}" for name, sex in zip(piece.speakers, piece.sexes))
        size = min(len(mixture), round(_SECONDS * task.rate))
        yield Picture(
            name=f"example-{number}",
            caption=f"{title.capitalize()}: SI-SDRi {said} dB; speakers {who}. Above the mixture, in the middle the "
            f"true voices, below what the model gives{_cut(mixture, task.rate)}.",
            figure=spectrograms(mixture[:size], sources[:, :size], voices[:, :size], task.rate),
            sounds=[
                _sound("mixture", mixture[:size], task.rate),
                *(_sound(f"true voice {i}", one[:size], task.rate) for i, one in enumerate(sources, 1)),
                *(_sound(f"separated {i}", one[:size], task.rate) for i, one in enumerate(voices, 1)),
            ],
        )


def _cut(mixture: np.ndarray, rate: int) -> str:
    return f"; the first {_SECONDS:g} of {len(mixture) / rate:.1f} s" if len(mixture) > _SECONDS * rate else ""


@torch.no_grad()
def estimated(task: SpeechTask, mixture: np.ndarray, sources: np.ndarray) -> np.ndarray:
    """(C, T) what the model makes of a mixture, in the order of the sources and at their levels."""
    task.eval()
    batch = task.here({"mixture": torch.from_numpy(mixture)[None]})
    voices = task.network(batch["mixture"]).double().cpu()
    true = torch.from_numpy(sources)[None].double()
    voices = metrics.reorder(voices, metrics.best_permutation(metrics.pairwise_si_sdr(voices, true)))[0].numpy()
    # SI-SDR leaves the level open; each voice gets the one that is nearest to the true voice.
    energy = np.square(voices).sum(axis=1)
    level = (voices * sources).sum(axis=1) / np.where(energy > 0, energy, 1.0)
    return np.asarray(voices * level[:, None], dtype=np.float32)


def spectrograms(mixture: np.ndarray, sources: np.ndarray, voices: np.ndarray, rate: int) -> Figure:
    """The mixture (T,), the true voices (C, T) and the separated ones, on one scale of decibels."""
    count = len(sources)
    fig = plotting.figure(9.4, 5.4)
    shown = [decibels(one, rate) for one in (mixture, *sources, *voices)]
    top = max(float(one.max()) for one in shown)
    extent = (0.0, len(mixture) / rate, 0.0, rate / 2000)
    with plotting.style():
        outer = fig.subplot_mosaic(
            [["mixture"] * count, [f"true {i}" for i in range(count)], [f"own {i}" for i in range(count)]]
        )
        names = ["mixture", *(f"true {i}" for i in range(count)), *(f"own {i}" for i in range(count))]
        titles = ["mixture"]
        titles += [f"{what} {i + 1}" for what in ("true voice", "separated") for i in range(count)]
        for name, title, values in zip(names, titles, shown):
            axes = outer[name]
            image = axes.imshow(
                values,
                origin="lower",
                aspect="auto",
                extent=extent,
                cmap=plotting.SEQUENTIAL,
                vmin=top - _RANGE_DB,
                vmax=top,
                interpolation="nearest",
            )
            axes.grid(False)
            axes.set_title(title)
            axes.set_ylabel("kHz" if name in ("mixture", "true 0", "own 0") else "")
            axes.set_xlabel("s" if name.startswith("own") else "")
        fig.colorbar(image, ax=list(outer.values()), shrink=0.6, label="dB")
    return fig


def decibels(samples: np.ndarray, rate: int) -> np.ndarray:
    """(F, N) spectrogram of (T,) samples: Hann windows of 32 ms every 8 ms."""
    size, hop = max(4, round(0.032 * rate)), max(1, round(0.008 * rate))
    found = spectrogram(torch.from_numpy(np.ascontiguousarray(samples, dtype=np.float32)), size, hop)
    return np.asarray((10 * torch.log10(found.square() + 1e-10)).numpy())


def _sound(name: str, samples: np.ndarray, rate: int) -> Sound:
    out = io.BytesIO()
    peak = max(float(np.abs(samples).max(initial=0.0)), 1.0)
    soundfile.write(out, samples / peak, rate, format="FLAC", subtype="PCM_16")
    return Sound(name=name, data=out.getvalue(), kind="audio/flac")
