"""The classification task: data, loss, scores, baselines, pictures."""

from __future__ import annotations

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
from attn_timeseries.classification import baselines as simple
from attn_timeseries.classification import metrics
from attn_timeseries.classification.cards import DATASETS, NAME, ClassifyDataConfig, ClassifyTaskConfig
from attn_timeseries.classification.data import SeriesSet, Splits, check_channels, fit_state, read_splits
from attn_timeseries.classification.metrics import Predictions
from attn_timeseries.config import MODELS
from attn_timeseries.models.classifier import ClassifyShape, SeriesClassifier

_BATCH = 256
# Published with these sets' own train and test files. How the epoch was chosen stands in the source.
_PUBLISHED = {
    "japanese_vowels": [
        {"model": "flowformer", "source": "published, best test epoch", "accuracy": 0.989},
    ],
}


class ClassifyTask(Task):
    """Tell the class of every series, by cross entropy."""

    primary: ClassVar[str] = "accuracy"
    maximize: ClassVar[bool] = True
    chooser: ClassVar[str] = "log_loss"  # a few dozen series are soon all right, and that says little
    metric_format: ClassVar[Mapping[str, str]] = metrics.FORMAT

    def __init__(self, config: RunConfig, data_state: Mapping[str, Any]) -> None:
        super().__init__(config, data_state)
        self.shape = ClassifyShape(
            length=data_state["max_len"],
            channels=len(data_state["channels"]),
            classes=len(data_state["classes"]),
            ragged=data_state["ragged"],
        )
        card = MODELS[config.model]
        try:
            self.network: SeriesClassifier = load(card.targets.get(NAME, card.target))(
                config.model_args, self.shape, config.task_args, mixer=config.mixer, mixer_args=dict(config.mixer_args)
            )
        except ValueError as error:
            raise UserError(f"model {config.model!r}: {error}") from None

    @property
    def model(self) -> SeriesClassifier:
        return self.network

    # -- data ---------------------------------------------------------------------------------------------------------

    @classmethod
    def load_data(cls, config: RunConfig, *, state: Mapping[str, Any] | None = None) -> DataBundle:
        args: ClassifyDataConfig = config.data_args
        splits = read_splits(config.data, args, config.seed, state)
        if state is None:
            state = fit_state(config.data, splits, args)
        parts = {"train": splits.train if len(splits.train) else None, "val": splits.val, "test": splits.test}
        sets: dict[str, SeriesSet | None] = {}
        for name, cases in parts.items():
            if cases is not None:
                check_channels(cases, state)
            sets[name] = SeriesSet(cases, state) if cases is not None else None
        return DataBundle(
            train=sets["train"],
            val=sets["val"],
            test=sets["test"],
            state=dict(state),
            facts=_facts(splits, state, sets),
            protocol=_protocol(config.data, splits, sets),
        )

    # -- training -----------------------------------------------------------------------------------------------------

    def forward_batch(self, batch: Mapping[str, Tensor]) -> Tensor:
        """(B, K) logits."""
        logits: Tensor = self.network(batch["x"], batch["mask"])
        return logits

    def training_loss(self, batch: Mapping[str, Tensor]) -> Tensor:
        args: ClassifyTaskConfig = self.config.task_args
        if args.noise:
            noise = args.noise * torch.randn_like(batch["x"])
            batch = {**batch, "x": batch["x"] + noise * batch["mask"].unsqueeze(-1)}
        return F.cross_entropy(self.forward_batch(batch), batch["y"], label_smoothing=args.label_smoothing)

    # -- scores -------------------------------------------------------------------------------------------------------

    def update_metrics(self, split: str, batch: Mapping[str, Tensor]) -> None:
        probability = self.forward_batch(batch).double().softmax(dim=-1)
        self.gathered[split] |= metrics.pack(batch["index"], batch["y"], probability)

    def compute_metrics(self, split: str, sums: Mapping[str, Tensor]) -> dict[str, float]:
        found = metrics.unpack(sums)
        return metrics.figures(found, self.data_state["classes"]) if found is not None else {}

    @torch.no_grad()
    def predictions(self, series: SeriesSet, split: str = "test") -> Predictions:
        """What the model says of every series: from the last evaluation of `split` if it was whole, else anew."""
        found = metrics.unpack(self.gathered.get(split) or {})
        if found is not None and len(found.index) == len(series):
            return found
        entries: dict[str, Tensor] = {}
        for batch, probability in self.probabilities(series):
            entries |= metrics.pack(batch["index"], batch["y"], probability)
        found = metrics.unpack(entries)
        assert found is not None
        return found

    @torch.no_grad()
    def probabilities(self, series: SeriesSet) -> Iterator[tuple[dict[str, Tensor], Tensor]]:
        """Batches in order, each with its (B, K) probabilities, float64."""
        self.eval()
        weight = next(self.network.parameters())
        for first in range(0, len(series), _BATCH):
            batch = series.__getitems__(range(first, min(first + _BATCH, len(series))))
            here = {**batch, "x": batch["x"].to(weight.device, weight.dtype), "mask": batch["mask"].to(weight.device)}
            yield batch, self.forward_batch(here).double().softmax(dim=-1).cpu()

    # -- beside the model ---------------------------------------------------------------------------------------------

    @classmethod
    def baselines(cls, config: RunConfig, bundle: DataBundle) -> list[dict[str, Any]]:
        found = simple_predictions(config, bundle)
        classes = bundle.state["classes"]
        return [
            {"model": name, "note": simple.NOTES[name], **metrics.figures(one, classes)} for name, one in found.items()
        ]

    def published(self) -> list[dict[str, Any]]:
        return [dict(row) for row in _PUBLISHED.get(self.config.data, [])]

    # -- pictures -----------------------------------------------------------------------------------------------------

    def pictures(self, bundle: DataBundle) -> Iterable[Picture]:
        from attn_timeseries.classification.plots import pictures

        return pictures(self, bundle)

    # -- files --------------------------------------------------------------------------------------------------------

    def predict_files(self, inputs: Sequence[Path], output: Path, options: Mapping[str, Any]) -> list[Path]:
        from attn_timeseries.classification.predict import predict_files

        return predict_files(self, inputs, output, options)


_SIMPLE: WeakKeyDictionary[SeriesSet, dict[str, Predictions]] = WeakKeyDictionary()


def simple_predictions(config: RunConfig, bundle: DataBundle) -> dict[str, Predictions]:
    """What each baseline says of the test series; nothing where there is no training or no test part."""
    train, val, test = bundle.train, bundle.val, bundle.test
    if not isinstance(train, SeriesSet) or not isinstance(test, SeriesSet):
        return {}
    if train not in _SIMPLE:
        parts = [part for part in (train, val) if isinstance(part, SeriesSet)]
        _SIMPLE[train] = simple.predictions(parts, test, seed=config.seed)
    return _SIMPLE[train]


def _facts(splits: Splits, state: Mapping[str, Any], sets: Mapping[str, SeriesSet | None]) -> dict[str, Any]:
    facts: dict[str, Any] = {
        "files": ", ".join(
            dict.fromkeys(Path(part.source).name for part in (splits.train, splits.test) if part is not None)
        ),
        "series": ", ".join(f"{name} {len(one) if one is not None else 0:,}" for name, one in sets.items()),
        "channels": len(state["channels"]),
        "splits": splits.rule,
    }
    there = [one for one in sets.values() if one is not None]
    lengths = torch.cat([one.length for one in there])
    shortest, longest = int(lengths.min()), int(lengths.max())
    facts["steps"] = f"{shortest}" if shortest == longest else f"{shortest} to {longest}"
    for name, cases in (("train", splits.train), ("val", splits.val), ("test", splits.test)):
        if cases is not None and cases.labels:
            counts = ", ".join(f"{label} {cases.labels.count(label):,}" for label in state["classes"])
            facts[f"classes ({name})"] = counts
    parts = [part for part in (splits.train, splits.val, splits.test) if part is not None]
    long = sum(len(values) > state["max_len"] for part in parts for values in part.values)
    if long:
        facts["found"] = f"{long:,} series are longer than {state['max_len']} steps and keep their first ones"
    return facts


def _protocol(data: str, splits: Splits, sets: Mapping[str, SeriesSet | None]) -> str:
    name = DATASETS[data].name if data in DATASETS else Path(data).name
    test = sets["test"]
    return f"{name}, {splits.rule}, all {len(test) if test is not None else 0:,} test series"
