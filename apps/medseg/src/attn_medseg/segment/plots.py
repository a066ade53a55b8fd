"""Figures of segmentation: scores of each structure, worst and best cases, what attention looks at."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from numpy.typing import NDArray

from attn_medseg.segment import metrics
from attn_medseg.segment.data import CaseSet, Whole
from attn_medseg.segment.overlays import Shown, colour, overlay
from attn_shared import plotting
from attn_shared.task import DataBundle, Picture

if TYPE_CHECKING:
    from attn_medseg.segment.task import SegmentTask

_EACH = 2  # worst and best cases
_MAPS = 6


def pictures(task: SegmentTask, bundle: DataBundle) -> Iterator[Picture]:
    """Everything that the report of a run shows, of the test part."""
    from attn_medseg.segment.task import units

    test, rows = bundle.test, task.rows()
    if not isinstance(test, CaseSet) or rows is None or len(np.unique(rows.key("case"))) != len(test):
        return
    unit, _ = units(task.data_state)
    yield Picture(
        name="scores",
        caption="Dice and HD95 of each structure in every test case: boxes span the middle half, the line is the "
        "median, dots are cases. Missed and invented structures have Dice 0 and, unless a penalty is chosen, no "
        "distance; below each box stands how many they are.",
        figure=boxes(rows, task.structures, task.policy, unit),
    )
    order = ranked(rows, task.policy)
    worst, best = order[:_EACH], order[::-1][:_EACH]
    for title, chosen in (("worst", worst), ("best", best)):
        for number, (case, dice) in enumerate(chosen, 1):
            yield Picture(
                name=f"{title}-{number}",
                caption=f"{title.capitalize()} case {number}: {test.cases[case].name}, Dice {dice:.3f}. Filled: "
                "predicted; dashed white: true.",
                figure=example(task, test, case),
            )
    maps = attention(task, test, order[len(order) // 2][0]) if order else None
    if maps is not None:
        yield Picture(
            name="attention",
            caption="What the attention of the model looks at in a middling test case, brighter being more, each map "
            "by itself; the first picture is the image.",
            figure=maps,
        )


def ranked(rows: metrics.Rows, policy: metrics.Policy) -> list[tuple[int, float]]:
    """Cases with their mean Dice, the worst first; cases without any are left out."""
    dice, case = rows.score("dice", policy), rows.key("case")
    found = []
    for number in np.unique(case).tolist():
        own = dice[case == number]
        if not np.isnan(own).all():
            found.append((int(number), float(np.nanmean(own))))
    return sorted(found, key=lambda one: one[1])


def boxes(rows: metrics.Rows, structures: Sequence[str], policy: metrics.Policy, unit: str) -> Figure:
    """Box plots of Dice and HD95, a box for each structure."""
    which = rows.key("structure")
    fig = plotting.figure(max(6.4, 2.0 + 1.5 * len(structures)), 3.6)
    rng = np.random.default_rng(0)
    with plotting.style():
        axes = fig.subplots(1, 2)
        for ax, name, label in zip(axes, ("dice", "hd95"), ("Dice", f"HD95 ({policy.hd95}), {unit}")):
            values = rows.score(name, policy)
            groups = [values[(which == number) & ~np.isnan(values)] for number in range(1, len(structures) + 1)]
            ax.boxplot(
                groups,
                widths=0.55,
                showfliers=False,
                medianprops={"color": plotting.INK, "linewidth": 1.6},
                boxprops={"color": plotting.MUTED},
                whiskerprops={"color": plotting.MUTED},
                capprops={"color": plotting.MUTED},
            )
            for number, group in enumerate(groups, 1):
                place = number + rng.uniform(-0.16, 0.16, len(group))
                ax.plot(place, group, "o", markersize=3, alpha=0.6, color=colour(number), markeredgewidth=0)
            ticks = [_tick(rows, number, structure) for number, structure in enumerate(structures, 1)]
            ax.set_xticks(range(1, len(structures) + 1), ticks)
            ax.set(ylabel=label)
            if name == "dice":
                ax.set_ylim(-0.02, 1.02)
            else:
                ax.set_ylim(bottom=0)
    return fig


def _tick(rows: metrics.Rows, number: int, structure: str) -> str:
    own = rows.key("structure") == number
    missed, invented = int(rows.missed[own].sum()), int(rows.invented[own].sum())
    notes = [f"{count} {name}" for count, name in ((missed, "missed"), (invented, "invented")) if count]
    return "\n".join([structure, *notes])


@torch.no_grad()
def example(task: SegmentTask, test: CaseSet, case: int) -> Figure:
    """A test case with predicted and true contours."""
    whole = test.whole(case)
    task.eval()
    labels = task.labels(whole.prepared)
    return overlay(_shown(test, case, whole, labels), task.structures)


def _shown(test: CaseSet, case: int, whole: Whole, labels: NDArray[np.uint8]) -> Shown:
    from attn_medseg.models.base import IGNORE
    from attn_medseg.segment.data import load_image

    image = load_image(test.cases[case])
    slices = whole.prepared.slices
    return Shown(
        image=image.values,
        labels=labels,
        truth=np.where(whole.label == IGNORE, 0, whole.label),
        affine=image.affine,
        slices=whole.prepared.undo.order[slices] if slices >= 0 else -1,
    )


@torch.no_grad()
def attention(task: SegmentTask, test: CaseSet, case: int) -> Figure | None:
    """The model's attention maps over a window in the middle of a case; None where it has none to read."""
    prepared = test.whole(case).prepared
    values = prepared.values
    if prepared.slices >= 0:
        values = values.select(1 + prepared.slices, values.shape[1 + prepared.slices] // 2)
    for axis, one in enumerate(task.window, 1):
        wide = min(one, values.shape[axis])
        values = values.narrow(axis, (values.shape[axis] - wide) // 2, wide)
    weight = next(task.network.parameters())
    task.eval()
    maps = task.network.attention(values[None].to(weight.device, weight.dtype))
    if not maps:
        return None
    chosen = list(maps.items())[-_MAPS:]
    shown: list[tuple[str, NDArray[Any]]] = [("image", _middle(values.mean(dim=0)))]
    for name, found in chosen:
        mode = "trilinear" if values.ndim == 4 else "bilinear"
        fine = F.interpolate(found[:1, None].float(), tuple(values.shape[1:]), mode=mode)[0, 0]
        shown.append((name, _middle(fine)))
    fig = plotting.figure(min(12.0, 2.4 * len(shown)), 2.7)
    with plotting.style():
        for ax, (name, plane) in zip(np.atleast_1d(fig.subplots(1, len(shown))), shown):
            ax.imshow(plane, cmap="gray" if name == "image" else plotting.SEQUENTIAL)
            ax.set(xticks=[], yticks=[], title=name)
            ax.grid(visible=False)
    return fig


def _middle(values: torch.Tensor) -> NDArray[Any]:
    """A picture, or the middle plane of a volume."""
    plane = values[..., values.shape[-1] // 2].T.flip(0) if values.ndim == 3 else values
    return np.asarray(plane.cpu().numpy())
