"""The separation task: data, loss, scores, baselines, pictures."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from attn_shared.app import load
from attn_shared.config import RunConfig
from attn_shared.errors import UserError
from attn_shared.task import DataBundle, Picture, Task
from attn_speech import metrics
from attn_speech.baselines import BASELINES
from attn_speech.config import MODELS
from attn_speech.data.bundle import load_bundle
from attn_speech.data.mixing import Mixtures
from attn_speech.losses import pit_si_sdr
from attn_speech.metrics import Scores
from attn_speech.models.base import Separator

_BATCH = 4


class SpeechTask(Task):
    """Give every voice of a mixture by itself, by negative SI-SDR under the best permutation."""

    primary: ClassVar[str] = "si_sdri"
    maximize: ClassVar[bool] = True
    metric_format: ClassVar[Mapping[str, str]] = metrics.FORMAT

    def __init__(self, config: RunConfig, data_state: Mapping[str, Any]) -> None:
        super().__init__(config, data_state)
        self.rate, self.speakers = int(data_state["rate"]), int(data_state["speakers"])
        if not config.task_args.limit > 0:
            raise UserError(f"task_args.limit must be above 0 decibels, got {config.task_args.limit:g}")
        try:
            self.network: Separator = load(MODELS[config.model].target)(
                config.model_args, self.speakers, mixer=config.mixer, mixer_args=dict(config.mixer_args)
            )
        except ValueError as error:
            raise UserError(f"model {config.model!r}: {error}") from None

    @property
    def model(self) -> Separator:
        return self.network

    # -- data ---------------------------------------------------------------------------------------------------------

    @classmethod
    def load_data(cls, config: RunConfig, *, state: Mapping[str, Any] | None = None) -> DataBundle:
        return load_bundle(config.data, config.data_args, state=state)

    # -- training -----------------------------------------------------------------------------------------------------

    def forward_batch(self, batch: Mapping[str, Tensor]) -> Tensor:
        """(B, C, T) voices."""
        voices: Tensor = self.network(batch["mixture"], batch["lengths"])
        return voices

    def training_loss(self, batch: Mapping[str, Tensor]) -> Tensor:
        voices = self.forward_batch(batch)
        with torch.autocast(voices.device.type, enabled=False):
            # Shares of energy near 1 need more digits than half precision has.
            precise = voices if voices.dtype == torch.float64 else voices.float()
            mixture, sources = batch["mixture"].to(precise.dtype), batch["sources"].to(precise.dtype)
            return pit_si_sdr(precise, sources, mixture, batch["lengths"], limit=self.config.task_args.limit)

    # -- scores -------------------------------------------------------------------------------------------------------

    def update_metrics(self, split: str, batch: Mapping[str, Tensor]) -> None:
        values = metrics.score(
            self.forward_batch(batch),
            batch["sources"],
            batch["mixture"],
            batch["lengths"],
            self.rate,
            # Validation comes after every epoch and needs one figure only.
            measures=self.config.task_args.measures if split == "test" else "si_sdr",
        )
        self.gathered[split] |= metrics.pack(batch["index"], values)

    def compute_metrics(self, split: str, sums: Mapping[str, Tensor]) -> dict[str, float]:
        found = metrics.unpack(sums)
        return metrics.figures(found, self.rate) if found is not None else {}

    @torch.no_grad()
    def scores(self, mixtures: Mixtures, split: str = "test") -> Scores:
        """The scores of every mixture: from the last evaluation of `split` if it was whole, else SI-SDR anew."""
        found = metrics.unpack(self.gathered.get(split) or {})
        if found is not None and len(found.index) == len(mixtures):
            return found
        self.eval()
        entries: dict[str, Tensor] = {}
        for first in range(0, len(mixtures), _BATCH):
            batch = mixtures.__getitems__(range(first, min(first + _BATCH, len(mixtures))))
            voices = self.forward_batch(self.here(batch))
            values = metrics.score(
                voices, batch["sources"], batch["mixture"], batch["lengths"], self.rate, measures="si_sdr"
            )
            entries |= metrics.pack(batch["index"], values)
        found = metrics.unpack(entries)
        assert found is not None
        return found

    def here(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The batch where the model is, and in its precision."""
        weight = next(self.network.parameters())
        return {
            name: value.to(weight.device, weight.dtype if value.is_floating_point() else None)
            for name, value in batch.items()
        }

    # -- beside the model ---------------------------------------------------------------------------------------------

    @classmethod
    def baselines(cls, config: RunConfig, bundle: DataBundle) -> list[dict[str, Any]]:
        if not isinstance(bundle.test, Mixtures):
            return []
        kinds = {one.name: {"note": one.note, "oracle": one.oracle} for one in BASELINES}
        rate = int(bundle.state["rate"])
        found = baseline_scores(bundle.test, rate, config.task_args.measures)
        return [{"model": name, **kinds[name], **metrics.figures(one, rate)} for name, one in found.items()]

    # -- pictures -----------------------------------------------------------------------------------------------------

    def pictures(self, bundle: DataBundle) -> Iterable[Picture]:
        from attn_speech.plots import pictures

        return pictures(self, bundle)

    # -- files --------------------------------------------------------------------------------------------------------

    def predict_files(self, inputs: Sequence[Path], output: Path, options: Mapping[str, Any]) -> list[Path]:
        from attn_speech.predict import predict_files

        return predict_files(self, inputs, output, options)


_BASELINES: WeakKeyDictionary[Mixtures, dict[str, Scores]] = WeakKeyDictionary()


def baseline_scores(mixtures: Mixtures, rate: int, measures: metrics.Measures) -> dict[str, Scores]:
    """The scores of each baseline on every mixture."""
    if mixtures not in _BASELINES:
        entries: dict[str, dict[str, Tensor]] = {one.name: {} for one in BASELINES}
        for index in range(len(mixtures)):
            batch = mixtures.__getitems__([index])
            for one in BASELINES:
                voices = one.voices(batch["mixture"], batch["sources"], rate)
                values = metrics.score(voices, batch["sources"], batch["mixture"], None, rate, measures=measures)
                entries[one.name] |= metrics.pack(batch["index"], values)
        unpacked = {name: metrics.unpack(found) for name, found in entries.items()}
        _BASELINES[mixtures] = {name: found for name, found in unpacked.items() if found is not None}
    return _BASELINES[mixtures]
