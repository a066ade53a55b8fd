"""DIN: what a user had before is read in the light of the item that is scored.

"Deep Interest Network for Click-Through Rate Prediction" (Zhou et al., KDD 2018). The control of AW-MoE.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from attn_recsys.models.behaviour import BehaviourInput, PairUnit, Tower
from attn_recsys.models.clicks import ClickModel, ClicksShape


class DIN(ClickModel):
    """User vector = Σ a(e_j, e_target) e_j over earlier items (eq. 3), then a tower over everything.

    By default the weights are not normalised, as section 4.3 wants it, so that the strength of an interest is kept.
    """

    def __init__(
        self,
        config: Any,
        shape: ClicksShape,
        *,
        mixer: str | None = None,
        mixer_args: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(config, shape, mixer=mixer, mixer_args=mixer_args)
        self.inputs = BehaviourInput(shape, config.embed_dim, "din")
        width = self.inputs.target_width
        self.unit = PairUnit(width, config.attention_hidden, 1, config.activation)
        self.tower = Tower(self.inputs.other_width + 2 * width, config.hidden, config.activation, config.dropout)
        self.score = nn.Linear(self.tower.width, 1)

    def forward(self, batch: Mapping[str, Tensor]) -> Tensor:
        x = self.inputs(batch)
        user = x.total(x.weights(self.unit(x), x.there, self.config.attention_softmax) * x.past)
        logit: Tensor = self.score(self.tower(torch.cat([x.other, x.target, user], -1)))
        return logit.squeeze(-1)
