"""Backbones with what reads them: classes of sequences, and the language of genomes; both with reverse complements.

Shapes: B sequences, L bases, P places, C channels, K classes.
"""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attn_genomics.models.base import Backbone
from attn_genomics.models.blocks import turn
from attn_genomics.models.heads import ClassHead
from attn_genomics.tokens import MASK, N, reverse_complement
from attn_shared.layers import Dropout

RC = Literal["none", "augment", "average", "equivariant"]
_HIDDEN, _REPLACED = 0.8, 0.9  # of the bases to be told: hidden so many, then up to here replaced, the rest left


def real(lengths: Tensor | None, length: int) -> Tensor | None:
    """(B, L) True = a base; None where every row is full."""
    if lengths is None or bool((lengths == length).all()):
        return None
    return torch.arange(length, device=lengths.device) < lengths[:, None]


class Classifier(nn.Module):
    """Which class a sequence is of.

    Args:
        backbone: what reads the sequence.
        head: what reads the backbone.
        rc: see `SequencesTaskConfig`. Sequences are turned at random where they are drawn, not here.
    """

    def __init__(self, backbone: Backbone, head: ClassHead, rc: RC = "none") -> None:
        super().__init__()
        self.backbone, self.head, self.rc = backbone, head, rc

    def forward(self, tokens: Tensor, lengths: Tensor | None = None) -> Tensor:
        """(B, L), lengths (B,) -> logits (B, K)."""
        mask = real(lengths, tokens.shape[1])
        if mask is None:
            lengths = None
        places = None if mask is None else mask[:, :: self.backbone.strides]
        if self.rc != "equivariant":
            return self.head(self.backbone(tokens, mask), places)
        both = torch.cat([tokens, reverse_complement(tokens, lengths)])
        one, other = self.backbone(both, None if mask is None else torch.cat([mask, mask])).chunk(2)
        counts = None if places is None else places.sum(dim=1)
        summed = one + turn(other, counts)
        # From both ends, as some heads know places, and no sum of rounded numbers is quite the same from its end.
        logits = self.head(torch.cat([summed, turn(summed, counts)]), None if places is None else places.repeat(2, 1))
        return (logits[: len(tokens)] + logits[len(tokens) :]) / 2

    def probabilities(self, tokens: Tensor, lengths: Tensor | None = None) -> Tensor:
        """(B, L), lengths (B,) -> (B, K); of "average" the mean of both strands'."""
        given = self(tokens, lengths).softmax(dim=-1)
        if self.rc != "average" or self.training:
            return given
        if real(lengths, tokens.shape[1]) is None:
            lengths = None
        return (given + self(reverse_complement(tokens, lengths), lengths).softmax(dim=-1)) / 2


class LanguageModel(nn.Module):
    """Which base stands where.

    Args:
        backbone: one without strides.
        rc: see `GenomeTaskConfig`. Windows are turned at random where they are drawn, not here.
        objective: see `GenomeTaskConfig`; "auto" is resolved here.
        dropout: of what the head reads.
        mask: share of the bases that are to be told, for "masked".

    Attributes:
        objective: "next" or "masked".

    Raises:
        ValueError: an objective that the backbone cannot have, or a strand form that the objective cannot have.
    """

    objective: Literal["next", "masked"]

    def __init__(
        self,
        backbone: Backbone,
        rc: RC = "none",
        objective: Literal["auto", "next", "masked"] = "auto",
        dropout: float = 0.0,
        mask: float = 0.15,
    ) -> None:
        super().__init__()
        if backbone.strides != 1:
            raise ValueError("a language model needs a place for every base, and this model has strides")
        self.objective = ("next" if backbone.causal else "masked") if objective == "auto" else objective
        if self.objective == "next" and not backbone.causal:
            raise ValueError(
                "this model reads what comes after a base too, so it learns by objective masked, or is made causal"
            )
        if self.objective == "next" and rc == "equivariant":
            raise ValueError("the next base has no equivariant form: take rc average, or objective masked")
        if not 0 < mask < 1:
            raise ValueError(f"mask must lie between 0 and 1, got {mask}")
        self.backbone, self.rc, self.mask = backbone, rc, mask
        self.dropout = Dropout(dropout)
        self.out = nn.Linear(backbone.width, 4) if type(backbone).bases is Backbone.bases else None

    @property
    def passes(self) -> int:
        """Forward passes of `bits`: of "masked" each hides every so-many-th base."""
        return 1 if self.objective == "next" else max(1, round(1 / self.mask))

    def scores(self, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
        """(B, L), mask (B, L) True = a base -> (B, L, 4) logits: of "next" row i is of base i + 1, else of base i."""
        if self.rc != "equivariant":
            return self._bases(self.backbone(tokens, mask))
        lengths = None if mask is None else mask.sum(dim=1)
        both = torch.cat([tokens, reverse_complement(tokens, lengths)])
        one, other = self._bases(self.backbone(both, None if mask is None else mask.repeat(2, 1))).chunk(2)
        # The other strand's scores, read backwards, of the complements: 3 - code.
        return (one + turn(other, lengths).flip(-1)) / 2

    def _bases(self, features: Tensor) -> Tensor:
        features = self.dropout(features)
        if self.out is not None:
            return self.out(features)
        found = self.backbone.bases(features)
        assert found is not None
        return found

    def loss(self, tokens: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """(B, L) full rows -> mean cross-entropy in nats of the bases that are to be told.

        Args:
            tokens: (B, L).
            generator: of what is hidden; None = torch's global one.
        """
        if self.objective == "next":
            scores, asked = self.scores(tokens)[:, :-1], tokens[:, 1:]
        else:
            shown, chosen = self.hide(tokens, generator)
            scores, asked = self.scores(shown), torch.where(chosen, tokens, N)
        losses = F.cross_entropy(
            scores.reshape(-1, 4), torch.where(asked < N, asked, -100).reshape(-1), reduction="sum"
        )
        return losses / (asked < N).sum().clamp(min=1)

    def hide(self, tokens: Tensor, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
        """(B, L) -> what is shown in their place, and (B, L) True = to be told."""
        device = generator.device if generator else tokens.device
        drawn = torch.rand(2, *tokens.shape, generator=generator, device=device).to(tokens.device)
        other = torch.randint(0, 4, tokens.shape, generator=generator, device=device).to(tokens.device)
        chosen = (drawn[0] < self.mask) & (tokens < N)
        shown = torch.where(drawn[1] < _HIDDEN, MASK, torch.where(drawn[1] < _REPLACED, other, tokens))
        return torch.where(chosen, shown, tokens), chosen

    @torch.no_grad()
    def bits(self, tokens: Tensor, lengths: Tensor | None = None) -> Tensor:
        """(B, L), lengths (B,) -> (B, L) bits of every base, given what the objective lets the model see.

        The first base of "next" costs 2 bits; N and what fills up cost 0 and are not to be counted.
        """
        known = tokens < N
        found = self.log_probabilities(tokens, lengths).gather(2, tokens.clamp(max=3)[..., None])[..., 0]
        mask = real(lengths, tokens.shape[1])
        return torch.where(known if mask is None else known & mask, -found, 0.0)

    @torch.no_grad()
    def log_probabilities(self, tokens: Tensor, lengths: Tensor | None = None) -> Tensor:
        """(B, L), lengths (B,) -> (B, L, 4) base-2 logarithms of what every base might be.

        Of "average" and "masked" the mean of both strands' probabilities; of "average" and "next" the mean of both
        strands' logarithms, which see different sides of a base and whose probabilities do not sum to 1.
        """
        mask = real(lengths, tokens.shape[1])
        if mask is None:
            lengths = None
        one = self._strand(tokens, mask)
        if self.rc != "average":
            return one
        other = turn(self._strand(reverse_complement(tokens, lengths), mask), lengths).flip(-1)
        return (one + other) / 2 if self.objective == "next" else torch.logaddexp2(one, other) - 1

    def _strand(self, tokens: Tensor, mask: Tensor | None) -> Tensor:
        if self.objective == "next":
            later = _log2(self.scores(tokens, mask)[:, :-1])
            return torch.cat([later.new_full((len(tokens), 1, 4), -2.0), later], dim=1)
        place = torch.arange(tokens.shape[1], device=tokens.device)
        found = None
        for rest in range(min(self.passes, tokens.shape[1])):
            here = place % self.passes == rest
            told = _log2(self.scores(torch.where(here & (tokens < N), MASK, tokens), mask))
            found = told if found is None else torch.where(here[:, None], told, found)
        assert found is not None
        return found

    @property
    def streams(self) -> bool:
        """Whether `init_state` and `step` carry a state over any length: of "next" where the backbone does."""
        return self.objective == "next" and self.backbone.streams

    @property
    def decodes(self) -> bool:
        """Whether `init_state` and `step` work, up to `backbone.longest` bases."""
        return self.objective == "next" and self.backbone.decodes

    def init_state(self, batch: int) -> Any:
        """The state before the first base; only where `decodes`."""
        return self.backbone.init_state(batch)

    def step(self, tokens: Tensor, state: Any) -> tuple[Tensor, Any]:
        """(B, T) further bases and the state so far -> logits (B, T, 4), row i of the base after it, and the state."""
        features, state = self.backbone.step(tokens, state)
        return self._bases(features), state


def _log2(scores: Tensor) -> Tensor:
    return scores.float().log_softmax(dim=-1) / math.log(2)
