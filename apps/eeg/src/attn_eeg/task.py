"""The classification task: data, loss, scores, baselines, pictures."""

from __future__ import annotations

import dataclasses
import math
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.nn import functional as F

from attn_eeg import metrics
from attn_eeg.baselines import BASELINES, predictions
from attn_eeg.config import MODELS
from attn_eeg.data.corpus import load_corpus
from attn_eeg.data.options import EegDataConfig
from attn_eeg.data.pipeline import Prepared, prepare
from attn_eeg.data.windows import WindowSet
from attn_eeg.metrics import Predictions
from attn_eeg.models.base import EegModel, EegShape
from attn_eeg.published import published
from attn_shared.app import load
from attn_shared.config import RunConfig
from attn_shared.errors import UserError
from attn_shared.task import DataBundle, Picture, Task

_READ_SAMPLES = ("eegnet",)
_BATCH = 512


class EegTask(Task):
    """Tell the class of every window, by cross entropy."""

    primary: ClassVar[str] = "accuracy"
    maximize: ClassVar[bool] = True
    metric_format: ClassVar[Mapping[str, str]] = metrics.FORMAT

    def __init__(self, config: RunConfig, data_state: Mapping[str, Any]) -> None:
        super().__init__(config, data_state)
        channels = data_state["chain"]["channels"]
        raw = data_args(config).features == "raw"
        self.shape = EegShape(
            channels=len(channels),
            features=0 if raw else len(data_state["features"]),
            samples=data_state["samples"] if raw else 0,
            classes=len(data_state["classes"]),
            channel_names=tuple(channels),
        )
        try:
            self.network: EegModel = load(MODELS[config.model].target)(
                config.model_args, self.shape, mixer=config.mixer, mixer_args=dict(config.mixer_args)
            )
        except ValueError as error:
            raise UserError(f"model {config.model!r}: {error}") from None
        self.smoothing = float(getattr(config.model_args, "label_smoothing", 0.0))
        if not 0 <= self.smoothing < 1:
            raise UserError(f"model_args.label_smoothing must be at least 0 and below 1, got {self.smoothing:g}")
        self.mixup = float(getattr(config.model_args, "mixup", 0.0))
        if not 0 <= self.mixup < math.inf:
            raise UserError(f"model_args.mixup must be 0 or more, got {self.mixup:g}")
        weights = data_state["class_weights"]
        self.class_weights: Tensor | None
        self.register_buffer("class_weights", None if weights is None else torch.tensor(weights), persistent=False)

    @property
    def model(self) -> EegModel:
        return self.network

    # -- data ---------------------------------------------------------------------------------------------------------

    @classmethod
    def load_data(cls, config: RunConfig, *, state: Mapping[str, Any] | None = None) -> DataBundle:
        args = data_args(config)
        corpus = load_corpus(config.data, args)
        prepared = prepare(args, corpus, state=state, seed=config.seed)
        if prepared.warning and state is None:
            print(f"WARNING, this split leaks: {prepared.warning}", file=sys.stderr)
        return DataBundle(
            train=prepared.train,
            val=prepared.val,
            test=prepared.test,
            state=prepared.state,
            facts=prepared.facts,
            protocol=prepared.protocol,
        )

    # -- training -----------------------------------------------------------------------------------------------------

    def forward_batch(self, batch: Mapping[str, Tensor]) -> Tensor:
        """(B, K) logits."""
        logits: Tensor = self.network(batch["x"])
        return logits

    def training_loss(self, batch: Mapping[str, Tensor]) -> Tensor:
        target = batch["y"]
        if self.mixup:
            x, target = mixed(batch["x"], F.one_hot(target, self.shape.classes).to(batch["x"].dtype), self.mixup)
            batch = {**batch, "x": x}
        logits = self.forward_batch(batch)
        weight = None if self.class_weights is None else self.class_weights.to(logits.dtype)
        return F.cross_entropy(logits, target, weight=weight, label_smoothing=self.smoothing)

    # -- scores -------------------------------------------------------------------------------------------------------

    def update_metrics(self, split: str, batch: Mapping[str, Tensor]) -> None:
        probability = self.forward_batch(batch).double().softmax(dim=-1)
        self.gathered[split] |= metrics.pack(batch["index"], batch["y"], batch["subject"], probability)

    def compute_metrics(self, split: str, sums: Mapping[str, Tensor]) -> dict[str, float]:
        found = metrics.unpack(sums)
        return metrics.figures(found) if found is not None else {}

    @torch.no_grad()
    def predictions(self, windows: WindowSet, split: str = "test") -> Predictions:
        """What the model says of every window: from the last evaluation of `split` if it was whole, else anew."""
        found = metrics.unpack(self.gathered.get(split) or {})
        if found is not None and len(found.index) == len(windows):
            return found
        self.eval()
        entries: dict[str, Tensor] = {}
        for batch in batches(windows):
            probability = self.forward_batch(self.here(batch)).double().softmax(dim=-1)
            entries |= metrics.pack(batch["index"], batch["y"], batch["subject"], probability)
        found = metrics.unpack(entries)
        assert found is not None
        return found

    def here(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The batch where the model is, and in its precision."""
        weight = next(iter(self.network.parameters()), torch.empty(0))
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
        found = simple_predictions(config, bundle)
        return [{"model": name, "note": notes[name], **metrics.figures(one)} for name, one in found.items()]

    def published(self) -> list[dict[str, Any]]:
        state, args = self.data_state, data_args(self.config)
        return published(self.config.data, state["label"], len(state["classes"]), args.split)

    # -- pictures -----------------------------------------------------------------------------------------------------

    def pictures(self, bundle: DataBundle) -> Iterable[Picture]:
        from attn_eeg.plots import pictures

        return pictures(self, bundle)

    # -- files --------------------------------------------------------------------------------------------------------

    def predict_files(self, inputs: Sequence[Path], output: Path, options: Mapping[str, Any]) -> list[Path]:
        from attn_eeg.predict import predict_files

        return predict_files(self, inputs, output, options)


def data_args(config: RunConfig) -> EegDataConfig:
    """The options of the data as the model needs them: a model that reads samples gets samples."""
    args: EegDataConfig = config.data_args
    if config.model in _READ_SAMPLES and args.features != "raw":
        balance = "none" if args.balance == "smote" else args.balance
        return dataclasses.replace(args, features="raw", balance=balance)
    return args


def mixed(x: Tensor, target: Tensor, alpha: float) -> tuple[Tensor, Tensor]:
    """Each window with another of the batch, and their targets (B, K) alike; the larger share stays with the window."""
    share = torch.distributions.Beta(alpha, alpha).sample((len(x),)).to(x)
    share = torch.maximum(share, 1 - share)
    other = torch.randperm(len(x), device=x.device)
    return (
        torch.lerp(x[other], x, share.view(-1, *[1] * (x.dim() - 1))),
        torch.lerp(target[other], target, share.unsqueeze(1)),
    )


def batches(windows: WindowSet) -> Iterator[dict[str, Tensor]]:
    """All windows in order."""
    for first in range(0, len(windows), _BATCH):
        yield windows.__getitems__(range(first, min(first + _BATCH, len(windows))))


_SIMPLE: WeakKeyDictionary[WindowSet, dict[str, Predictions]] = WeakKeyDictionary()


def simple_predictions(config: RunConfig, bundle: DataBundle) -> dict[str, Predictions]:
    """What each baseline says of the test part; they read band features also where the model reads samples."""
    train, test = bundle.train, bundle.test
    assert isinstance(train, WindowSet)
    assert isinstance(test, WindowSet)
    if train not in _SIMPLE:
        fitted, tested = train, test
        if not train.features:
            prepared = band_features(config)
            assert prepared.train is not None
            assert prepared.test is not None
            fitted, tested = prepared.train, prepared.test
        _SIMPLE[train] = {one.name: predictions(one, fitted, tested) for one in BASELINES}
    return _SIMPLE[train]


def band_features(config: RunConfig) -> Prepared:
    """The same fold with band features in place of samples."""
    args = dataclasses.replace(config.data_args, features="bde")
    return prepare(args, load_corpus(config.data, args), seed=config.seed)
