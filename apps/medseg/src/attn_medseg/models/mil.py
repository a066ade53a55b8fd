"""Classifiers of bags: gated attention pooling, and ACMIL's several branches with masked attention.

"Attention-based Deep Multiple Instance Learning" (Ilse et al., 2018), eq. 8-9; "Attention-Challenging Multiple Instance
Learning for Whole Slide Image Classification" (S142). Shapes: B bags, N instances, C features, K classes, M branches.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attn_medseg.config import ABMILConfig, ACMILConfig
from core_attn.mechanisms.pooling.gated import GatedAttentionPooling


@dataclass(frozen=True)
class BagShape:
    """A problem of bags: features of an instance, and classes."""

    features: int
    classes: int


@dataclass(frozen=True)
class BagOutput:
    """What a classifier says of bags.

    Attributes:
        logits: (B, K).
        attention: (B, N) of the bag's score on its instances; sums to 1.
        branches: (B, M, K) logits of each branch.
        weights: (B, M, N) attention of each branch.
        scores: (B, M, N) attention before the softmax, -inf at padding and masked instances.
    """

    logits: Tensor
    attention: Tensor
    branches: Tensor
    weights: Tensor
    scores: Tensor


class BagClassifier(nn.Module):
    """An encoder of instances, gated attention in M branches, a classifier of each branch and one of the bag.

    Args:
        config: the model's options.
        shape: the problem.
    """

    def __init__(
        self,
        config: ABMILConfig,
        shape: BagShape,
        *,
        branches: int = 1,
        top: int = 0,
        drop: float = 0.0,
        mixer: str | None = None,
        mixer_args: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        if not config.channels or min(config.channels) < 1 or config.hidden < 1:
            raise ValueError(f"channels and hidden must be 1 or more, got {list(config.channels)} and {config.hidden}")
        if not 0 <= config.dropout < 1:
            raise ValueError(f"dropout must be 0 or more and below 1, got {config.dropout:g}")
        layers: list[nn.Module] = []
        for ins, outs in itertools.pairwise((shape.features, *config.channels)):
            layers += [nn.Linear(ins, outs, bias=config.bias), nn.ReLU(), nn.Dropout(config.dropout)]
        self.shape = shape
        self.encoder = nn.Sequential(*layers)
        width = config.channels[-1]
        self.pooling = GatedAttentionPooling(width, hidden=config.hidden, branches=branches, top=top, drop=drop)
        self.heads = nn.ModuleList(nn.Linear(width, shape.classes) for _ in range(branches if branches > 1 else 0))
        self.bag = nn.Linear(width, shape.classes)

    def forward(self, x: Tensor, mask: Tensor, *, generator: torch.Generator | None = None) -> BagOutput:
        """Classify bags.

        Args:
            x: (B, N, C) instances.
            mask: (B, N) bool, True = an instance.
            generator: where the draw of masked instances comes from in training; the global one where None.
        """
        pooled = self.pooling(self.encoder(x), mask=mask, generator=generator)
        branches = [head(pooled.features[:, i]) for i, head in enumerate(self.heads)]
        logits = self.bag(pooled.bag)
        return BagOutput(
            logits=logits,
            attention=pooled.weights.mean(dim=1),
            branches=torch.stack(branches, dim=1) if branches else logits[:, None],
            weights=pooled.weights,
            scores=pooled.scores,
        )

    def losses(self, output: BagOutput, label: Tensor, *, weight: Tensor | None = None) -> dict[str, Tensor]:
        """The terms whose sum is lowered.

        Args:
            label: (B,) numbers of classes.
            weight: (K,) of the classes; None = all the same.
        """
        return {"bag": F.cross_entropy(output.logits, label, weight=weight)}


class ABMIL(BagClassifier):
    """One gated attention branch, ABMIL: eq. 9, with a softmax over classes in place of one probability."""

    def __init__(
        self,
        config: ABMILConfig,
        shape: BagShape,
        *,
        mixer: str | None = None,
        mixer_args: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(config, shape, mixer=mixer, mixer_args=mixer_args)


class ACMIL(BagClassifier):
    """Several branches that must look at different instances, none of which may live on a few (S142, section 3).

    The loss is the sum of the bag's cross-entropy, the branches' mean cross-entropy, and the mean cosine similarity of
    the attention of every two branches, as in the official code; in training `drop` of the `top` instances of each
    branch are masked.
    """

    def __init__(
        self,
        config: ACMILConfig,
        shape: BagShape,
        *,
        mixer: str | None = None,
        mixer_args: Mapping[str, Any] | None = None,
    ) -> None:
        if config.branches < 2:
            raise ValueError(f"branches must be 2 or more, got {config.branches}; one branch is the model abmil")
        super().__init__(config, shape, branches=config.branches, top=config.top, drop=config.drop)
        self.diversity = config.diversity

    def losses(self, output: BagOutput, label: Tensor, *, weight: Tensor | None = None) -> dict[str, Tensor]:
        """ "bag", "branch" and "diversity"."""
        count = output.branches.shape[1]
        pairs = list(itertools.combinations(range(count), 2))
        alike = [F.cosine_similarity(output.weights[:, i], output.weights[:, j], dim=-1).mean() for i, j in pairs]
        return {
            "bag": F.cross_entropy(output.logits, label, weight=weight),
            "branch": F.cross_entropy(output.branches.flatten(0, 1), label.repeat_interleave(count), weight=weight),
            "diversity": self.diversity * torch.stack(alike).mean(),
        }


def from_official(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The official ACMIL_GA's parameters under our names."""
    names = {
        "dimreduction.fc1.": "encoder.0.",
        "attention.attention_V.0.": "pooling.value.",
        "attention.attention_U.0.": "pooling.gate.",
        "attention.attention_weights.": "pooling.score.",
        "Slide_classifier.fc.": "bag.",
        "classifier.": "heads.",
    }
    found = {}
    for name, value in weights.items():
        start = next((one for one in names if name.startswith(one)), None)
        if start is None:
            raise ValueError(f"{name} is no parameter of ACMIL_GA")
        found[(names[start] + name.removeprefix(start)).replace(".fc.", ".")] = value
    return found
