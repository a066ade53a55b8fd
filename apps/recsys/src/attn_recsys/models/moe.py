"""A plain mixture of experts over what DIN reads, the other control of AW-MoE.

"Adaptive Mixtures of Local Experts" (Jacobs et al. 1991): a gate over the same input as the experts', normalised by
softmax, all experts used.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from attn_recsys.models.behaviour import BehaviourInput, Inputs, PairUnit, Tower
from attn_recsys.models.clicks import ClickModel, ClicksShape


class Experts(nn.Module):
    """Towers side by side, (B, width) -> (B, experts): one score each."""

    def __init__(self, width: int, hidden: Sequence[int], experts: int, dropout: float) -> None:
        super().__init__()
        if experts < 1:
            raise ValueError(f"experts must be 1 or more, got {experts}")
        sizes = [width, *hidden, 1]
        self.weights, self.biases = nn.ParameterList(), nn.ParameterList()
        for fan_in, fan_out in pairwise(sizes):
            bound = fan_in**-0.5  # as nn.Linear starts
            self.weights.append(nn.Parameter(torch.empty(experts, fan_in, fan_out).uniform_(-bound, bound)))
            self.biases.append(nn.Parameter(torch.empty(experts, 1, fan_out).uniform_(-bound, bound)))
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        x = x.expand(self.weights[0].shape[0], *x.shape)
        last = len(self.weights) - 1
        for i, (weight, bias) in enumerate(zip(self.weights, self.biases)):
            x = torch.baddbmm(bias, x, weight)
            if i < last:
                x = self.dropout(torch.relu(x))
        return x.squeeze(-1).T


class ExpertModel(ClickModel):
    """Input network and experts as AW-MoE has them; a subclass adds the gate.

    The item, earlier items and the rest go through a layer each; earlier items are summed with the weights of an
    activation unit; experts score the item's, the user's and the other vector side by side.
    """

    def __init__(
        self,
        config: Any,
        shape: ClicksShape,
        *,
        mixer: str | None = None,
        mixer_args: Mapping[str, Any] | None = None,
        reader: str,
    ) -> None:
        super().__init__(config, shape, mixer=mixer, mixer_args=mixer_args)
        self.inputs = BehaviourInput(shape, config.embed_dim, reader)
        self.item_layer = Tower(self.inputs.target_width, (config.input_hidden,), "relu")
        other = self.inputs.other_width
        self.other_layer = Tower(other, (config.input_hidden,), "relu") if other else None
        self.unit = PairUnit(config.input_hidden, config.attention_hidden, 1, "relu")
        self.width = config.input_hidden * (2 if self.other_layer is None else 3)
        self.experts = Experts(self.width, config.hidden, config.experts, config.dropout)

    def read(self, batch: Mapping[str, Tensor]) -> tuple[Inputs, Tensor]:
        """The batch after the input network, and (B, width) what the experts are given."""
        x = self.inputs(batch)
        other = x.other if self.other_layer is None else self.other_layer(x.other)
        x = replace(x, target=self.item_layer(x.target), past=self.item_layer(x.past), other=other)
        user = x.total(x.weights(self.unit(x), x.there, self.config.attention_softmax) * x.past)
        return x, torch.cat([x.target, user] if self.other_layer is None else [x.target, user, other], -1)


class MoE(ExpertModel):
    """score = Σ_k softmax(W x)_k E_k(x)."""

    def __init__(
        self,
        config: Any,
        shape: ClicksShape,
        *,
        mixer: str | None = None,
        mixer_args: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(config, shape, mixer=mixer, mixer_args=mixer_args, reader="moe")
        self.gate = nn.Sequential(
            Tower(self.width, config.gate_hidden, "relu"),
            nn.Linear([self.width, *config.gate_hidden][-1], config.experts),
        )

    def forward(self, batch: Mapping[str, Tensor]) -> Tensor:
        _, v = self.read(batch)
        return (self.gate(v).softmax(-1) * self.experts(v)).sum(-1)
