"""Figures of predictions from records: curves, calibration, the gate, and what time attention reads."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

import numpy as np
import torch
from matplotlib.figure import Figure

from attn_shared import plotting
from attn_shared.task import DataBundle, Picture
from attn_timeseries.records.data import RecordSet
from attn_timeseries.records.metrics import Predictions, calibration_bins, curve

if TYPE_CHECKING:
    from attn_timeseries.records.task import RecordsTask

_MOST_STAYS = 256


def pictures(task: RecordsTask, bundle: DataBundle) -> Iterator[Picture]:
    """Everything that the report of a run shows, of the test part."""
    from attn_timeseries.records.task import simple_predictions

    held = bundle.test
    if not isinstance(held, RecordSet):
        return
    found = {task.config.model: task.predictions(held, "test")}
    if bundle.train is not None:
        found |= {name: one for name, one in simple_predictions(bundle).items() if name != "majority"}
    first = task.data_state["labels"][0]
    others = " (the first label)" if len(task.data_state["labels"]) > 1 else ""
    yield Picture(
        name="curves",
        caption=f"Test stays, {first}{others}: receiver operating characteristic, and precision against recall; the "
        "dotted lines are what chance gives.",
        figure=curves(found),
    )
    yield Picture(
        name="calibration",
        caption="Ten groups of equally many test stays by predicted probability: the share that was positive. On the "
        "diagonal a probability means what it says.",
        figure=calibration(found),
    )
    yield Picture(
        name="stay",
        caption="The test stay with the most observations: each dot an observation, scaled; the line is the regular "
        "grid that imputation makes of it.",
        figure=one_stay(held, int(np.argmax([(~np.isnan(x)).sum() for x in held.x]))),
    )
    shares = gate_by_hour(task, held)
    if shares is not None:
        yield Picture(
            name="gate",
            caption="Share that the gate gives to learned time attention rather than to the imputed grid, by hour: "
            "mean over channels and test stays, and over the stays that are positive and negative.",
            figure=gate(shares, float(task.data_state["hours"])),
        )


@torch.no_grad()
def gate_by_hour(task: RecordsTask, held: RecordSet) -> dict[str, np.ndarray] | None:
    """Mean gate (T,) of all stays, and of those with and without the first label; None where there is no gate."""
    task.eval()
    chosen = np.unique(np.linspace(0, len(held) - 1, min(len(held), _MOST_STAYS)).astype(np.int64)).tolist()
    batch = task.here(held.__getitems__(chosen))
    _, share = task.network.embed_series(*(batch[name] for name in ("x", "observed", "time", "regular")))
    if share is None:
        return None
    steps = share.mean(dim=-1).expand(-1, task.shape.steps).double().cpu().numpy()
    truth = batch["y"][:, 0].cpu().numpy()
    groups = {"all": np.ones(len(truth), bool), "positive": truth == 1, "negative": truth == 0}
    return {name: steps[members].mean(axis=0) for name, members in groups.items() if members.any()}


def curves(models: Mapping[str, Predictions]) -> Figure:
    """Both curves of the first label, a line a model."""
    fig = plotting.figure(9.0, 3.8)
    with plotting.style():
        left, right = fig.subplots(1, 2)
        for number, (name, found) in enumerate(models.items()):
            truth, probability, _ = found.label(0)
            hit, false = curve(truth, probability)
            style = {
                "color": plotting.COLOURS[number % len(plotting.COLOURS)],
                "linewidth": 1.8 if number == 0 else 1.1,
            }
            left.plot(
                np.r_[0, false] / max((~truth).sum(), 1), np.r_[0, hit] / max(truth.sum(), 1), label=name, **style
            )
            right.plot(hit / max(truth.sum(), 1), hit / (hit + false), **style)
        left.plot([0, 1], [0, 1], color=plotting.MUTED, linestyle=":", linewidth=1)
        right.axhline(truth.mean(), color=plotting.MUTED, linestyle=":", linewidth=1)
        left.set(xlabel="false alarms", ylabel="found", xlim=(0, 1), ylim=(0, 1))
        right.set(xlabel="found (recall)", ylabel="precision", xlim=(0, 1), ylim=(0, 1.02))
        left.legend()
    return fig


def calibration(models: Mapping[str, Predictions]) -> Figure:
    fig = plotting.figure(4.8, 4.2)
    with plotting.style():
        axes = fig.subplots()
        axes.plot([0, 1], [0, 1], color=plotting.MUTED, linestyle=":", linewidth=1)
        for number, (name, found) in enumerate(models.items()):
            truth, probability, _ = found.label(0)
            mean, share, _ = calibration_bins(truth, probability)
            axes.plot(mean, share, marker="o", markersize=4, label=name, linewidth=1.8 if number == 0 else 1.1,
                      color=plotting.COLOURS[number % len(plotting.COLOURS)])  # fmt: skip
        axes.set(xlabel="predicted probability", ylabel="share positive", xlim=(0, 1), ylim=(0, 1))
        axes.legend()
    return fig


def one_stay(held: RecordSet, index: int) -> Figure:
    """Observations and imputed grid of a stay, a row a variable."""
    many = min(len(held.variables), 12)
    fig = plotting.figure(8.0, 0.6 + 0.62 * many)
    hours = np.arange(held.regular.shape[1]) / held.regular.shape[1]
    with plotting.style():
        rows = fig.subplots(many, 1, sharex=True, squeeze=False)[:, 0]
        for v, axes in enumerate(rows):
            x = held.x[index][:, v]
            seen = ~np.isnan(x)
            axes.step(hours, held.regular[index, :, v], where="post", color=plotting.MUTED, linewidth=1.0)
            axes.plot(held.time[index][seen], x[seen], ".", color=plotting.COLOURS[0], markersize=5)
            axes.set_ylabel(held.variables[v], rotation=0, ha="right", va="center", fontsize=8)
            axes.set_yticks([])
        rows[-1].set_xlabel("share of the period")
        for note in held.note_time[index] if held.text else ():
            for axes in rows:
                axes.axvline(note, color=plotting.COLOURS[1], linewidth=0.8, linestyle="--")
    return fig


def gate(shares: Mapping[str, np.ndarray], hours: float) -> Figure:
    fig = plotting.figure(6.4, 3.0)
    with plotting.style():
        axes = fig.subplots()
        for number, (name, values) in enumerate(shares.items()):
            axes.plot(np.arange(len(values)) * hours / len(values), values, label=name, color=plotting.COLOURS[number])
        axes.set(xlabel="hours", ylabel="share of time attention", ylim=(0, 1))
        axes.legend()
    return fig
