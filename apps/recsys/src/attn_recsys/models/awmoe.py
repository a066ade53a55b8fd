"""AW-MoE (S10): a gate that each earlier item of the user votes for, made robust by hiding some of them.

"Attention Weighted Mixture of Experts with Contrastive Learning for Personalized Ranking in E-commerce" (Gong et al.
2023).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from attn_recsys.models.behaviour import Inputs, PairUnit, columns
from attn_recsys.models.clicks import ClicksShape
from attn_recsys.models.moe import ExpertModel


class AWMoE(ExpertModel):
    """score = Σ_k g_k E_k(x) with g = Σ_j a(h_j, h_target) u(h_j, h_target).

    The gate unit u gives each earlier item a vote for every expert, the activation unit a its weight. Training adds
    InfoNCE between the gate and the gate that is left when earlier items are hidden at random, which makes an active
    user look like one of the long tail.

    A user without history has no vote: a learned vector takes the place of the sum, which starts as the mean of the
    experts.
    """

    def __init__(
        self,
        config: Any,
        shape: ClicksShape,
        *,
        mixer: str | None = None,
        mixer_args: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(config, shape, mixer=mixer, mixer_args=mixer_args, reader="awmoe")
        if not 0 <= config.mask < 1:
            raise ValueError(f"mask must be at least 0 and below 1, got {config.mask:g}")
        if config.temperature <= 0 or config.negatives < 1:
            raise ValueError("temperature must be above 0 and negatives at least 1")
        self.gate_unit = PairUnit(config.input_hidden, config.gate_hidden, config.experts, "relu")
        self.gate_attention = PairUnit(config.input_hidden, config.gate_hidden, 1, "relu")
        self.no_history = nn.Parameter(torch.full((config.experts,), 1 / config.experts))
        self.user_column = columns(shape).get(shape.user or "")

    def votes(self, x: Inputs) -> tuple[Tensor, Tensor]:
        """(n, 1) scores and (n, experts) votes of the earlier items."""
        return self.gate_attention(x), self.gate_unit(x)

    def gate(self, x: Inputs, scores: Tensor, votes: Tensor, there: Tensor) -> Tensor:
        """(B, experts) the experts' weights by the votes of the earlier items in `there`."""
        found = x.total(x.weights(scores, there, self.config.attention_softmax) * votes)
        some = x.total(there.unsqueeze(-1)) > 0
        return torch.where(some, found, self.no_history)

    def forward(self, batch: Mapping[str, Tensor]) -> Tensor:
        x, v = self.read(batch)
        return (self.gate(x, *self.votes(x), x.there) * self.experts(v)).sum(-1)

    def loss(self, batch: Mapping[str, Tensor]) -> Tensor:
        x, v = self.read(batch)
        scores, votes = self.votes(x)
        gate = self.gate(x, scores, votes, x.there)
        total = F.binary_cross_entropy_with_logits((gate * self.experts(v)).sum(-1), batch["label"])
        if not self.config.contrast:
            return total
        keep = kept(x.row, len(gate), self.config.mask).to(x.there.dtype)
        hidden = self.gate(x, scores, votes, keep)
        rows = torch.bincount(x.row, minlength=len(gate)).nonzero().squeeze(-1)
        user = None if self.user_column is None else batch["names"][rows, self.user_column]
        others = torch.randperm(len(rows), device=rows.device)[: self.config.negatives]
        return total + self.config.contrast * info_nce(gate[rows], hidden[rows], others, user, self.config.temperature)


def kept(row: Tensor, rows: int, probability: float) -> Tensor:
    """Which items stay when each is hidden with `probability`; the last of a row stays if all others went.

    Args:
        row: (n,) the row of each item, ascending.
        rows: how many there are.
        probability: at least 0 and below 1.
    """
    keep = torch.rand(len(row), device=row.device) >= probability
    left = torch.bincount(row[keep], minlength=rows)
    last = torch.ones_like(keep)
    last[:-1] = row[1:] != row[:-1]
    return keep | (last & (left[row] == 0))


def info_nce(gate: Tensor, hidden: Tensor, others: Tensor, user: Tensor | None, temperature: float) -> Tensor:
    """-log of the share that a row's own masked gate has among it and the masked gates of `others`, on average.

    Args:
        gate, hidden: (B, experts) gates of the whole and of the masked behaviour, compared by cosine.
        others: (n,) rows that serve as negatives; a row is none of itself, nor of other rows of the same user.
        user: (B,) whose the rows are; None = all different.
    """
    if len(gate) < 2:
        return gate.sum() * 0.0
    left, right = F.normalize(gate, dim=-1), F.normalize(hidden, dim=-1)
    own = (left * right).sum(-1, keepdim=True)
    apart = left @ right[others].T
    who = torch.arange(len(gate), device=gate.device) if user is None else user
    apart = apart.masked_fill(who.unsqueeze(1) == who[others], float("-inf"))
    return F.cross_entropy(
        torch.cat([own, apart], 1) / temperature, torch.zeros(len(gate), dtype=torch.int64, device=gate.device)
    )
