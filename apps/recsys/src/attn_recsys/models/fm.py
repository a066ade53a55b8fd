"""FM: the names' vectors multiplied in pairs.

"Factorization Machines" (Rendle, ICDM 2010), equations (1) and (5).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from attn_recsys.models.clicks import ClickModel, ClicksShape
from attn_recsys.models.fields import FieldVectors, refuse_mixer
from attn_recsys.models.logistic import Linear


class FM(ClickModel):
    """log odds = b + Σ w + Σ_{i<j} v_i · v_j, the pairs as half of (Σ v)² - Σ v²."""

    def __init__(
        self,
        config: Any,
        shape: ClicksShape,
        *,
        mixer: str | None = None,
        mixer_args: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(config, shape)
        refuse_mixer("fm", mixer, mixer_args)
        self.linear = Linear(shape)
        self.vectors = FieldVectors(shape, config.embed_dim)

    def forward(self, batch: Mapping[str, Tensor]) -> Tensor:
        vectors = self.vectors(batch)
        pairs = (vectors.sum(1).square() - vectors.square().sum(1)).sum(-1) / 2
        found: Tensor = self.linear(batch) + pairs
        return found
