"""The task on records: data, loss, scores, baselines, pictures."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.nn import functional as F

from attn_shared.app import load
from attn_shared.config import RunConfig
from attn_shared.errors import UserError
from attn_shared.task import DataBundle, Picture, Task
from attn_timeseries.config import MODELS
from attn_timeseries.models.utde import UTDE, RecordsShape
from attn_timeseries.records import metrics
from attn_timeseries.records.baselines import BASELINES, predictions
from attn_timeseries.records.cards import NAME, RecordsTaskConfig
from attn_timeseries.records.corpus import load_corpus
from attn_timeseries.records.data import RecordSet, prepare
from attn_timeseries.records.metrics import Predictions

_BATCH = 256
INPUTS = ("x", "observed", "time", "regular", "notes", "note_time", "note_mask")


class RecordsTask(Task):
    """Tell each label of every stay, by binary cross entropy."""

    primary: ClassVar[str] = "auroc"
    maximize: ClassVar[bool] = True
    metric_format: ClassVar[Mapping[str, str]] = metrics.FORMAT

    def __init__(self, config: RunConfig, data_state: Mapping[str, Any]) -> None:
        super().__init__(config, data_state)
        self.shape = RecordsShape(
            variables=len(data_state["variables"]),
            steps=data_state["steps"],
            text=data_state["text"],
            labels=len(data_state["labels"]),
        )
        card = MODELS[config.model]
        try:
            self.network: UTDE = load(card.targets.get(NAME, card.target))(
                config.model_args, self.shape, mixer=config.mixer, mixer_args=dict(config.mixer_args)
            )
        except ValueError as error:
            raise UserError(f"model {config.model!r}: {error}") from None
        self.options: RecordsTaskConfig = config.task_args
        share = torch.tensor(data_state["prevalence"])
        self.weight: Tensor | None
        balanced = self.options.class_weight == "balanced"
        self.register_buffer("weight", (1 - share) / share if balanced else None, persistent=False)

    @property
    def model(self) -> UTDE:
        return self.network

    # -- data ---------------------------------------------------------------------------------------------------------

    @classmethod
    def load_data(cls, config: RunConfig, *, state: Mapping[str, Any] | None = None) -> DataBundle:
        corpus = load_corpus(config.data, config.data_args, **known_variables(state))
        found = prepare(config.data_args, corpus, state=state)
        return DataBundle(
            train=found.train,
            val=found.val,
            test=found.test,
            state=found.state,
            facts=found.facts,
            protocol=found.protocol,
        )

    # -- training -----------------------------------------------------------------------------------------------------

    def forward_batch(self, batch: Mapping[str, Tensor]) -> Tensor:
        """(B, K) logits."""
        logits: Tensor = self.network(**{name: batch[name] for name in INPUTS if name in batch})
        return logits

    def training_loss(self, batch: Mapping[str, Tensor]) -> Tensor:
        logits, target = self.forward_batch(batch), batch["y"]
        known = ~target.isnan()
        weight = None if self.weight is None else self.weight.to(logits.dtype)
        loss = F.binary_cross_entropy_with_logits(
            logits, target.nan_to_num().to(logits.dtype), pos_weight=weight, reduction="none"
        )
        return (loss * known).sum() / known.sum().clamp(min=1)

    # -- scores -------------------------------------------------------------------------------------------------------

    def update_metrics(self, split: str, batch: Mapping[str, Tensor]) -> None:
        self.gathered[split] |= self._entry(batch)

    def _entry(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        probability = self.forward_batch(batch).double().sigmoid()
        return metrics.pack(batch["index"], batch["patient"], batch["y"], probability)

    def compute_metrics(self, split: str, sums: Mapping[str, Tensor]) -> dict[str, float]:
        found = metrics.unpack(sums)
        if found is None:
            return {}
        return metrics.figures(found, bootstrap=self.options.bootstrap if split == "test" else 0)

    @torch.no_grad()
    def predictions(self, held: RecordSet, split: str = "") -> Predictions:
        """What the model says of every stay: from the last evaluation of `split` if it was whole, else anew."""
        found = metrics.unpack(self.gathered.get(split) or {})
        if found is not None and len(found.index) == len(held):
            return found
        self.eval()
        entries: dict[str, Tensor] = {}
        for batch in batches(held):
            entries |= self._entry(self.here(batch))
        found = metrics.unpack(entries)
        assert found is not None
        return found

    def here(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The batch where the model is, and in its precision."""
        weight = next(iter(self.network.parameters()))
        return {
            name: value.to(weight.device, weight.dtype if value.is_floating_point() else None)
            for name, value in batch.items()
        }

    # -- beside the model ---------------------------------------------------------------------------------------------

    @classmethod
    def baselines(cls, config: RunConfig, bundle: DataBundle) -> list[dict[str, Any]]:
        if bundle.train is None or bundle.test is None:
            return []
        notes = {one.name: one.note for one in BASELINES}
        count = config.task_args.bootstrap
        return [
            {"model": name, "note": notes[name], **metrics.figures(found, bootstrap=count)}
            for name, found in simple_predictions(bundle).items()
        ]

    # -- pictures and files -------------------------------------------------------------------------------------------

    def pictures(self, bundle: DataBundle) -> Iterable[Picture]:
        from attn_timeseries.records.plots import pictures

        return pictures(self, bundle)

    def predict_files(self, inputs: Sequence[Path], output: Path, options: Mapping[str, Any]) -> list[Path]:
        from attn_timeseries.records.predict import predict_files

        return predict_files(self, inputs, output, options)


def known_variables(state: Mapping[str, Any] | None) -> dict[str, Any]:
    """Which variables a checkpoint's state knows as categories, and which as numbers."""
    if state is None:
        return {}
    kinds = set(state["categorical"])
    numeric = {name for name in state["variables"] if name.partition("=")[0] not in kinds}
    return {"categorical": kinds, "numeric": numeric}


def batches(held: RecordSet) -> Iterator[dict[str, Tensor]]:
    """All stays in order."""
    for first in range(0, len(held), _BATCH):
        yield held.__getitems__(range(first, min(first + _BATCH, len(held))))


_SIMPLE: WeakKeyDictionary[RecordSet, dict[str, Predictions]] = WeakKeyDictionary()


def simple_predictions(bundle: DataBundle) -> dict[str, Predictions]:
    """What each baseline says of the test part."""
    train, test = bundle.train, bundle.test
    assert isinstance(train, RecordSet)
    assert isinstance(test, RecordSet)
    if train not in _SIMPLE:
        _SIMPLE[train] = {one.name: predictions(one, train, test) for one in BASELINES}
    return _SIMPLE[train]


def say(notes: Iterable[str], name: str) -> None:
    """Tell on stderr what was found in a file."""
    for note in notes:
        print(f"{name}: {note}", file=sys.stderr)
