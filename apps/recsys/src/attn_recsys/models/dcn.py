"""DCN-v2: layers that multiply the input by a linear map of themselves.

"DCN V2: Improved Deep & Cross Network and Practical Lessons for Web-scale Learning to Rank Systems" (Wang et al., WWW
2021), equations (1) and (2), the parallel form of figure 1.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from attn_recsys.models.clicks import ClickModel, ClicksShape
from attn_recsys.models.fields import FieldVectors, refuse_mixer, tower


class DCNv2(ClickModel):
    """Cross layers x_{l+1} = x_0 ⊙ (W x_l + b) + x_l beside a tower, joined by a linear map.

    W has full rank, or is a product of two of `rank`.
    """

    def __init__(
        self,
        config: Any,
        shape: ClicksShape,
        *,
        mixer: str | None = None,
        mixer_args: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(config, shape)
        refuse_mixer("dcnv2", mixer, mixer_args)
        self.vectors = FieldVectors(shape, config.embed_dim, numeric=False)
        width = len(self.vectors) * config.embed_dim + len(shape.numeric)
        rank = config.rank

        def square() -> nn.Module:
            if rank:
                return nn.Sequential(nn.Linear(width, rank, bias=False), nn.Linear(rank, width))
            return nn.Linear(width, width)

        self.cross = nn.ModuleList(square() for _ in range(config.layers))
        self.deep, deep_width = tower(width, config.hidden, config.dropout)
        self.score = nn.Linear(width + (deep_width if config.hidden else 0), 1)

    def forward(self, batch: Mapping[str, Tensor]) -> Tensor:
        start = torch.cat([self.vectors(batch).flatten(1), batch["numbers"]], dim=1)
        x = start
        for layer in self.cross:
            x = start * layer(x) + x
        if self.config.hidden:
            x = torch.cat([x, self.deep(start)], dim=1)
        found: Tensor = self.score(x).squeeze(-1)
        return found
