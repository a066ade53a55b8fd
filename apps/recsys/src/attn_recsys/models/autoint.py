"""AutoInt: fields attend to fields.

"AutoInt: Automatic Feature Interaction Learning via Self-Attentive Neural Networks" (Song et al., CIKM 2019), sec. 4.
The control of Hiformer: the same matrices serve every field.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from attn_recsys.models.clicks import ClickModel, ClicksShape
from attn_recsys.models.fields import FieldVectors, tower
from attn_shared.layers import Dropout
from core_attn import build
from core_attn.mechanisms.heads import MultiHeadMixer
from core_attn.mechanisms.softmax.exact import SoftmaxAttention


class AutoInt(ClickModel):
    """e ← ReLU(attention(e) + W_res e) in every layer (eqs. 5 to 8), then a linear map of all fields (eq. 9).

    Heads are joined as they are, without a matrix behind them. A mechanism of another kind keeps its own.

    Raises:
        ValueError: heads that do not divide embed_dim; a mechanism that cannot mix a sequence with itself.
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
        self.vectors = FieldVectors(shape, config.embed_dim)
        dim, name = config.embed_dim, mixer or "softmax"
        options = dict(mixer_args or {})
        if name == "softmax":
            options = {"bias": False, "scale": None if config.scale else 1.0, **options}
        self.mixers = nn.ModuleList(build(name, dim=dim, heads=config.heads, **options) for _ in range(config.layers))
        for one in self.mixers:
            if type(one) is SoftmaxAttention:
                one.out_proj = nn.Identity()  # type: ignore[assignment]
        self.residuals = nn.ModuleList(nn.Linear(dim, dim, bias=False) for _ in range(config.layers))
        self.dropout = Dropout(config.dropout)
        self.score = nn.Linear(dim * len(self.vectors), 1)
        self.deep, width = tower(dim * len(self.vectors), config.hidden, config.dropout)
        self.deep_score = nn.Linear(width, 1, bias=False) if config.hidden else None

    def forward(self, batch: Mapping[str, Tensor]) -> Tensor:
        x = start = self.dropout(self.vectors(batch))
        for mixer, residual in zip(self.mixers, self.residuals):
            x = torch.relu(mixer(x) + residual(x))
        odds: Tensor = self.score(x.flatten(1))
        if self.deep_score is not None:
            odds = odds + self.deep_score(self.deep(start.flatten(1)))
        return odds.squeeze(-1)


def head_mixer(name: str, dim: int, heads: int, options: Mapping[str, Any]) -> MultiHeadMixer:
    """A mechanism whose queries, keys and values a model may make itself.

    Raises:
        ValueError: it makes none, or of other widths.
    """
    mixer = build(name, dim=dim, heads=heads, **options)
    wanted = ("q_proj", "k_proj", "v_proj", "out_proj")
    if not isinstance(mixer, MultiHeadMixer) or not all(
        isinstance(getattr(mixer, one, None), nn.Linear) and getattr(mixer, one).in_features == dim for one in wanted
    ):
        raise ValueError(
            f"{name} does not read plain queries, keys and values, so they cannot be made from all fields; "
            "--model_args.projection shared takes it"
        )
    return mixer
