"""The ranking task: data, loss, full ranking, baselines, pictures."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor

from attn_recsys.config import MODELS
from attn_recsys.items import metrics
from attn_recsys.items.baselines import Baseline, baselines, evaluate, rows
from attn_recsys.items.data import Restored, UserSet, load_corpus, prepare, restored
from attn_recsys.items.options import ItemsTaskConfig
from attn_recsys.models.base import ItemModel
from attn_shared.app import load
from attn_shared.config import RunConfig
from attn_shared.errors import UserError
from attn_shared.task import DataBundle, Picture, Task


class ItemsTask(Task):
    """Rank, for each user, the items that he did not have."""

    primary: ClassVar[str] = "ndcg@10"
    maximize: ClassVar[bool] = True
    metric_format: ClassVar[Mapping[str, str]] = metrics.formats((10, 20))

    def __init__(self, config: RunConfig, data_state: Mapping[str, Any]) -> None:
        super().__init__(config, data_state)
        self.options = options(config)
        sampled = bool(self.options.sampled)
        self.primary = metrics.primary(self.options.k, sampled=sampled)  # type: ignore[misc]
        self.metric_format = metrics.formats(self.options.k, sampled=sampled)  # type: ignore[misc]
        self.known: Restored = restored(data_state)
        try:
            self.network: ItemModel = load(MODELS[config.model].target)(
                config.model_args,
                self.known.shape,
                self.known.tensors(),
                mixer=config.mixer,
                mixer_args=dict(config.mixer_args),
            )
        except ValueError as error:
            raise UserError(f"model {config.model!r}: {error}") from None
        counts = np.bincount(self.known.train.number, minlength=len(self.known.items))
        self.surprise = metrics.surprise(counts, len(self.known.users))
        # The epoch that the model was told of last; saved, so that a resumed epoch is not begun twice.
        self.begun: Tensor
        self.register_buffer("begun", torch.tensor(-1))
        self._vectors: tuple[Tensor, Tensor] | None = None

    @property
    def model(self) -> ItemModel:
        return self.network

    # -- data ---------------------------------------------------------------------------------------------------------

    @classmethod
    def load_data(cls, config: RunConfig, *, state: Mapping[str, Any] | None = None) -> DataBundle:
        prepared = prepare(load_corpus(config.data, config.data_args), config.data_args, options(config), state)
        return DataBundle(
            train=prepared.train_set,
            val=prepared.val_set,
            test=prepared.test_set,
            state=prepared.state,
            facts=prepared.facts,
            protocol=prepared.protocol,
        )

    # -- training -----------------------------------------------------------------------------------------------------

    def training_step(self, batch: Mapping[str, Tensor], batch_idx: int) -> Tensor:
        if int(self.begun) != self.current_epoch:
            self.begun.fill_(self.current_epoch)
            with torch.no_grad():
                self.network.start_epoch(self.current_epoch)
        return self.training_loss(batch)

    def training_loss(self, batch: Mapping[str, Tensor]) -> Tensor:
        return self.network.loss(batch, self.global_step)

    def forward_batch(self, batch: Mapping[str, Tensor]) -> Tensor:
        """(B, I) scores of all items for the users of the batch."""
        return self.network.scores(batch["user"])

    # -- scores -------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def scores(self, users: Tensor) -> Tensor:
        """(B, I); the vectors of a model that multiplies two are computed once an evaluation."""
        if type(self.network).scores is not ItemModel.scores:
            return self.network.scores(users)
        if self._vectors is None:
            left, right = self.network.embeddings()
            self._vectors = left.detach(), right.detach()
        left, right = self._vectors
        return left[users] @ right.T

    def forget(self) -> None:
        """The weights may have changed: vectors are computed anew."""
        self._vectors = None

    def reset_metrics(self, split: str) -> None:
        if split == "train":
            raise UserError("a ranking leaves training items out, so it has no figures on the training split")
        super().reset_metrics(split)
        self.forget()

    def update_metrics(self, split: str, batch: Mapping[str, Tensor]) -> None:
        block = metrics.rank(
            self.scores(batch["user"]).float() if self.dtype != torch.float64 else self.scores(batch["user"]),
            batch["wanted"].cpu().numpy(),
            batch["seen"].cpu().numpy(),
            self.options.k,
            self.surprise,
            batch["candidates"].cpu().numpy() if "candidates" in batch else None,
        )
        entries = metrics.pack(
            batch["index"], batch["activity"], batch["wanted"], block, len(self.known.items), self.options.k
        )
        metrics.add(self.gathered[split], entries)

    def compute_metrics(self, split: str, sums: Mapping[str, Tensor]) -> dict[str, float]:
        self.forget()
        found = metrics.unpack(sums, self.options.k, sampled=bool(self.options.sampled))
        if found is None:
            return {}
        return metrics.figures(found, self.options.k, groups=self.options.groups, intervals=split == "test")

    def rankings(self, users: UserSet, split: str = "test") -> metrics.Users:
        """All users' figures: from the last evaluation of `split` if it was whole, else anew."""
        found = metrics.unpack(self.gathered.get(split) or {}, self.options.k, sampled=bool(self.options.sampled))
        if found is not None and len(found.activity) == len(users):
            return found
        self.eval()
        self.forget()
        device = next(iter(self.network.parameters()), torch.empty(0)).device

        def scores(chosen: np.ndarray) -> np.ndarray:
            return np.asarray(self.scores(torch.from_numpy(chosen).to(device)).cpu().numpy())

        return evaluate(scores, users, self.options)

    # -- beside the model ---------------------------------------------------------------------------------------------

    @classmethod
    def baselines(cls, config: RunConfig, bundle: DataBundle) -> list[dict[str, Any]]:
        return rows(simple_rankings(config, bundle), options(config))

    # -- pictures -----------------------------------------------------------------------------------------------------

    def pictures(self, bundle: DataBundle) -> Iterable[Picture]:
        from attn_recsys.items.plots import pictures

        return pictures(self, bundle)

    # -- files --------------------------------------------------------------------------------------------------------

    def predict_files(self, inputs: Sequence[Path], output: Path, options: Mapping[str, Any]) -> list[Path]:
        from attn_recsys.items.recommend import predict_files

        return predict_files(self, inputs, output, options)


def options(config: RunConfig) -> ItemsTaskConfig:
    """The task's options, checked."""
    found: ItemsTaskConfig = config.task_args
    if not found.k or min(found.k) < 1 or list(found.k) != sorted(set(found.k)):
        raise UserError(f"--task_args.k takes lengths of lists, each 1 or more, ascending; got {list(found.k)}")
    if found.sampled < 0:
        raise UserError(f"--task_args.sampled must be 0 or more, got {found.sampled}")
    return found


_SIMPLE: WeakKeyDictionary[UserSet, list[tuple[Baseline, metrics.Users]]] = WeakKeyDictionary()


def simple_rankings(config: RunConfig, bundle: DataBundle) -> list[tuple[Baseline, metrics.Users]]:
    """The baselines and their figures on the test users."""
    test, val = bundle.test, bundle.val
    if not isinstance(test, UserSet):
        return []
    if test not in _SIMPLE:
        task = options(config)
        fitted = baselines(test.train, val if isinstance(val, UserSet) else None, task)
        _SIMPLE[test] = [(one, evaluate(one.scores, test, task)) for one in fitted]
    return _SIMPLE[test]
