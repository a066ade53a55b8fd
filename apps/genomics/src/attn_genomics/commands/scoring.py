"""How much a trained model likes a stretch of DNA: one number, whose difference is what a change does."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import torch
from torch import Tensor

from attn_genomics.tokens import N, reverse_complement
from attn_shared.errors import UserError

Strand = Literal["forward", "reverse", "both"]
DEFAULT_CONTEXT = 512
BATCH_BASES = 65_536
"""Bases that go through a model at once."""


class Scorer(Protocol):
    """What the commands need of a model.

    Attributes:
        context: bases of a window where the user names none.
        says: what a difference of two scores is, for headers: "log-likelihood, in bits".
    """

    @property
    def context(self) -> int: ...

    @property
    def says(self) -> str: ...

    def score(self, tokens: Tensor, lengths: Tensor) -> Tensor:
        """(B, L) codes, (B,) real bases of each row -> (B,) float64."""


@dataclass
class LikelihoodScorer:
    """log2 of the probability that a language model gives a window."""

    model: Any
    context: int
    strand: Strand

    @property
    def says(self) -> str:
        kind = "log-likelihood" if self.model.objective == "next" else "pseudo-log-likelihood"
        return f"{kind} in bits, {_strands(self.strand)}"

    def score(self, tokens: Tensor, lengths: Tensor) -> Tensor:
        # Models that are read on both strands by themselves need no second reading.
        if self.strand == "forward" or (self.strand == "both" and self.model.rc in ("average", "equivariant")):
            return self._forward(tokens, lengths)
        other = self._forward(reverse_complement(tokens, lengths), lengths)
        return other if self.strand == "reverse" else (self._forward(tokens, lengths) + other) / 2

    def _forward(self, tokens: Tensor, lengths: Tensor) -> Tensor:
        return -self.model.bits(tokens, lengths).double().sum(dim=1)


@dataclass
class ClassScorer:
    """Log-odds that a classifier gives one of its classes.

    Args:
        classes: names.
        chosen: number of the class.
        average: read both strands and take the mean of their probabilities, as the model was trained to be read.
    """

    model: Any
    classes: Sequence[str]
    chosen: int
    context: int
    strand: Strand

    @property
    def says(self) -> str:
        return f"natural log-odds of the class {self.classes[self.chosen]}, {_strands(self.strand)}"

    def score(self, tokens: Tensor, lengths: Tensor) -> Tensor:
        logs = []
        if self.strand in ("forward", "both"):
            logs.append(self.model(tokens, lengths).double().log_softmax(dim=1))
        if self.strand in ("reverse", "both"):
            logs.append(self.model(reverse_complement(tokens, lengths), lengths).double().log_softmax(dim=1))
        # The mean of probabilities, as logarithms: a probability near 1 would lose what distinguishes it from 1.
        mean = torch.stack(logs).logsumexp(dim=0) - math.log(len(logs))
        others = [number for number in range(mean.shape[1]) if number != self.chosen]
        return mean[:, self.chosen] - mean[:, others].logsumexp(dim=1)


def _strands(strand: Strand) -> str:
    return {"forward": "forward strand", "reverse": "reverse strand", "both": "mean of both strands"}[strand]


def score_all(scorer: Scorer, windows: Sequence[np.ndarray], device: torch.device | None = None) -> np.ndarray:
    """The score of every window, in order: (len(windows),) float64. Equal windows go through the model once."""
    unique: dict[bytes, int] = {}
    where = np.array([unique.setdefault(window.tobytes(), len(unique)) for window in windows], dtype=np.int64)
    rows = [np.frombuffer(raw, dtype=np.uint8) for raw in unique]
    # Windows of like length together, so that little is filled up.
    order = sorted(range(len(rows)), key=lambda row: len(rows[row]))
    scores = np.zeros(len(rows))
    at = 0
    while at < len(order):
        longest = len(rows[order[min(at + 255, len(order) - 1)]])
        batch = order[at : at + max(1, min(256, BATCH_BASES // max(1, longest)))]
        tokens, lengths = pad([rows[row] for row in batch], device)
        try:
            with torch.no_grad():
                scores[batch] = scorer.score(tokens, lengths).cpu().numpy()
        except ValueError as error:
            raise UserError(f"the model cannot read a window of {longest} bases: {error}; see --context") from None
        at += len(batch)
    return scores[where]


def pad(rows: Sequence[np.ndarray], device: torch.device | None = None) -> tuple[Tensor, Tensor]:
    """Rows of codes -> (B, L) int64 filled up with N, (B,) lengths."""
    lengths = torch.tensor([len(row) for row in rows])
    tokens = torch.full((len(rows), int(lengths.max())), N)
    for number, row in enumerate(rows):
        tokens[number, : len(row)] = torch.from_numpy(row.astype(np.int64))
    return tokens.to(device), lengths.to(device)


def device() -> torch.device:
    """Where models run: a GPU if PyTorch sees one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def load_scorer(run: Path, *, context: int | None, strand: Strand | None, of_class: str | None) -> Scorer:
    """The model of a run as a scorer.

    Args:
        run: run or checkpoint folder, of either kind of task.
        context: bases of a window; None = 512 for language models, or their training window where that is shorter;
            the length of training sequences for classifiers.
        strand: None = both for language models and for classifiers that were trained to be read on both, else forward.
        of_class: class whose log-odds count, by name; None = the last one.

    Raises:
        UserError: nothing to load, or a class that the model does not know.
    """
    from attn_genomics.cli import APP
    from attn_shared import trainer

    task, config = trainer.load_task(APP, run)
    model = task.model.to(device()).eval()
    trained = int(task.data_state["length"])
    if config.kind == "genome":
        if of_class is not None:
            raise UserError(f"{run} is a language model, which has no classes: leave --of_class out")
        return LikelihoodScorer(model, context or min(DEFAULT_CONTEXT, trained), strand or "both")
    classes = [str(name) for name in task.data_state["classes"]]
    if of_class is not None and of_class not in classes:
        raise UserError(f"{run} knows no class {of_class}; its classes are: {', '.join(classes)}")
    chosen = classes.index(of_class) if of_class is not None else len(classes) - 1
    average = config.task_args.rc == "average"
    return ClassScorer(model, classes, chosen, context or trained, strand or ("both" if average else "forward"))
