"""The task of segmenting images and volumes: data, loss, scores, baselines, pictures."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from attn_medseg.config import MODELS
from attn_medseg.models.base import IGNORE, ImageShape, Segmenter
from attn_medseg.segment import metrics
from attn_medseg.segment.data import CaseSet, load_bundle
from attn_medseg.segment.inference import probabilities
from attn_medseg.segment.losses import criterion
from attn_medseg.segment.options import SegmentTaskConfig
from attn_medseg.segment.transforms import Prepared
from attn_shared.app import load
from attn_shared.config import RunConfig
from attn_shared.errors import UserError
from attn_shared.task import DataBundle, Picture, Task


class SegmentTask(Task):
    """Tell the structure at each voxel."""

    primary: ClassVar[str] = "dice"
    maximize: ClassVar[bool] = True
    metric_format: ClassVar[Mapping[str, str]] = metrics.FORMAT

    def __init__(self, config: RunConfig, data_state: Mapping[str, Any]) -> None:
        super().__init__(config, data_state)
        self.options = options(config)
        self.policy = policy(self.options)
        self.structures: tuple[str, ...] = tuple(data_state["structures"])
        self.window: tuple[int, ...] = tuple(int(one) for one in data_state["size"])
        self.network: Segmenter = load(MODELS[config.model].target)(
            config.model_args,
            ImageShape(
                ndim=int(data_state["ndim"]),
                channels=int(data_state["channels"]),
                classes=len(self.structures) + 1,
                size=self.window,
            ),
            mixer=config.mixer,
            mixer_args=dict(config.mixer_args),
        )
        self.criterion = criterion(self.options)

    @property
    def model(self) -> Segmenter:
        return self.network

    @classmethod
    def load_data(cls, config: RunConfig, *, state: Mapping[str, Any] | None = None) -> DataBundle:
        chosen = options(config)
        masks = bool(load(MODELS[config.model].target).wants_masks)
        bundle = load_bundle(config.data, config.data_args, state=state, masks=masks)
        bundle.protocol = f"{bundle.protocol}; {told(chosen)}"
        return bundle

    # -- training -----------------------------------------------------------------------------------------------------

    def training_loss(self, batch: Mapping[str, Tensor]) -> Tensor:
        return self.network.loss(batch, self.criterion)

    def forward_batch(self, batch: Mapping[str, Tensor]) -> Tensor:
        """(B, K, *S) logits of patches."""
        found: Tensor = self.network(batch["image"])
        return found

    # -- whole images -------------------------------------------------------------------------------------------------

    def scores(
        self,
        prepared: Prepared,
        *,
        overlap: float | None = None,
        flips: bool | None = None,
        window: Sequence[int] = (),
    ) -> Tensor:
        """(K, *S) probabilities on the model's grid.

        Args:
            overlap, flips: other than the task's own.
            window: another than that of training.
        """
        turned = self.options.flips if flips is None else flips
        return probabilities(
            self.network,
            prepared.values,
            classes=len(self.structures) + 1,
            window=tuple(window) or self.window,
            overlap=self.options.overlap if overlap is None else overlap,
            flips=self.data_state["flips"] if turned else (),
            slices=prepared.slices,
            batch=max(1, self.config.trainer.batch_size),
        )

    def labels(self, prepared: Prepared) -> NDArray[np.uint8]:
        """(*file axes) predicted labels."""
        return prepared.labels(self.scores(prepared))

    # -- scores -------------------------------------------------------------------------------------------------------

    def update_metrics(self, split: str, batch: Mapping[str, Any]) -> None:
        for index, case in zip(batch["index"].tolist(), batch["cases"]):
            predicted = self.labels(case["prepared"])
            # Validation comes after every epoch and needs overlaps only.
            parts = self.score(predicted, case, surfaces=split == "test")
            self.gathered[split] |= metrics.pack(index, int(case["patient"]), parts)

    def score(
        self, predicted: NDArray[np.uint8], case: Mapping[str, Any], *, surfaces: bool = True
    ) -> list[NDArray[np.float64]]:
        """Scores of a case, or of each slice of it."""
        return score_case(
            predicted, case["label"].cpu().numpy(), case["prepared"], self.data_state, self.options, surfaces=surfaces
        )

    def compute_metrics(self, split: str, sums: Mapping[str, Tensor]) -> dict[str, float]:
        rows = metrics.unpack(sums)
        if rows is None:
            return {}
        self.gathered[split] = dict(sums)  # those of all processes, for the pictures
        resamples = self.options.bootstrap if split == "test" else 0
        return metrics.figures(rows, self.structures, self.policy, resamples=resamples)

    def rows(self, split: str = "test") -> metrics.Rows | None:
        """The rows of the last evaluation of a split."""
        return metrics.unpack(self.gathered.get(split) or {})

    # -- beside the model ---------------------------------------------------------------------------------------------

    @classmethod
    def baselines(cls, config: RunConfig, bundle: DataBundle) -> list[dict[str, Any]]:
        from attn_medseg.segment.baselines import rows

        return rows(bundle, options(config))

    def pictures(self, bundle: DataBundle) -> Iterable[Picture]:
        from attn_medseg.segment.plots import pictures

        return pictures(self, bundle)

    def predict_files(self, inputs: Sequence[Path], output: Path, options: Mapping[str, Any]) -> list[Path]:
        from attn_medseg.segment.predict import predict_files

        return predict_files(self, inputs, output, options)


def score_case(
    predicted: NDArray[np.uint8],
    truth: NDArray[np.uint8],
    prepared: Prepared,
    state: Mapping[str, Any],
    chosen: SegmentTaskConfig,
    *,
    surfaces: bool = True,
) -> list[NDArray[np.float64]]:
    """Scores of a case, or of each of its slices where `case` says so."""
    count, spacing = len(state["structures"]), list(prepared.spacing)
    known: dict[str, Any] = {"surfaces": surfaces, "ignore": IGNORE, "unit": state["unit"]}
    if chosen.case != "slice" or prepared.slices < 0:
        return [metrics.score(predicted, truth, count, spacing, **known)]
    axis = prepared.undo.order[prepared.slices]
    del spacing[axis]
    return [
        metrics.score(one, other, count, spacing, **known)
        for one, other in zip(np.moveaxis(predicted, axis, 0), np.moveaxis(truth, axis, 0))
    ]


def units(state: Mapping[str, Any]) -> tuple[str, str]:
    """Of distances and of volumes."""
    known = state["unit"] == "mm"
    return ("mm" if known else "px"), ("ml" if known and int(state["axes"]) == 3 else "voxels")


def policy(chosen: SegmentTaskConfig) -> metrics.Policy:
    """What stands for scores that do not exist."""
    return metrics.Policy(empty=chosen.empty, missed=chosen.missed, hd95=chosen.hd95)


def told(chosen: SegmentTaskConfig) -> str:
    """The definitions of the scores, in words."""
    empty = {"none": "not counted", "one": "counted as 1", "zero": "counted as 0"}[chosen.empty]
    missed = {"none": "have no distance and are counted beside it", "diagonal": "count as the image's diagonal"}
    return (
        f"means over {'slices' if chosen.case == 'slice' else 'cases'}, then structures; Dice of structures neither "
        f"there nor predicted {empty}; HD95 {chosen.hd95}; missed and invented structures {missed[chosen.missed]}"
    )


def options(config: RunConfig) -> SegmentTaskConfig:
    """The task's options, checked."""
    found: SegmentTaskConfig = config.task_args
    if not 0 <= found.overlap < 1:
        raise UserError(f"--task_args.overlap must be 0 or more and below 1, got {found.overlap:g}")
    if found.bootstrap < 0:
        raise UserError(f"--task_args.bootstrap must be 0 or more, got {found.bootstrap}")
    return found


def case_set(bundle: DataBundle, split: str) -> CaseSet | None:
    """A part of whole cases, where there is one."""
    found = bundle.split(split)
    return found if isinstance(found, CaseSet) and len(found) else None
