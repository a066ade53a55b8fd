"""HyenaDNA: Long-Range Genomic Sequence Modeling at Single Nucleotide Resolution (S55), section 3.

Blocks of a Hyena operator and a feed-forward layer, both on normalised input and added to it; embeddings of single
bases, which are also the language model's output layer. Shapes: B sequences, L bases, C channels.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import core_attn
from attn_genomics.config import HyenaDNAConfig
from attn_genomics.models import convert
from attn_genomics.models.base import Backbone, Shape
from attn_genomics.models.blocks import Block, Blocks, FeedForward
from attn_shared.layers import Dropout
from core_attn.mechanisms.conv.hyena import Hyena

SHORTEST = 1024
"""Places of the filters at least, where `l_max` follows the data."""
HEAD = 32
"""Channels of a head of a mixer that is not Hyena."""
_STD = 0.02
_VOCABULARY = 16
# Published ids of A, C, G, T, N and of a hidden base.
_IDS = (7, 8, 9, 10, 11, 3)


def length_of_filters(l_max: int, shape: Shape) -> int:
    """Places that filters are functions of, where the option is `l_max`."""
    return l_max or max(SHORTEST, shape.length)


class HyenaDNA(Backbone):
    """The decoder of the paper. Bases go in as the published ids, so that published weights fit."""

    def __init__(
        self,
        config: HyenaDNAConfig,
        shape: Shape,
        *,
        mixer: str | None = None,
        mixer_args: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(config, shape, mixer=mixer, mixer_args=mixer_args)
        self.width = dim = config.d_model
        self.l_max = length_of_filters(config.l_max, shape)
        self.hyena = mixer in (None, "hyena")
        own: dict[str, Any] = {
            "order": config.order,
            "l_max": self.l_max,
            "filter_order": config.filter_order,
            "emb_dim": config.emb_dim,
            "w": config.w,
            "short_size": config.short_filter_order,
        }
        options = {**(own if self.hyena else {}), **(mixer_args or {})}
        name, heads = mixer or "hyena", max(1, dim // HEAD)
        self.embeddings = nn.Embedding(_VOCABULARY, dim)
        self.register_buffer("ids", torch.tensor(_IDS), persistent=False)
        self.dropout = Dropout(config.embed_dropout)
        self.blocks = Blocks(
            [
                Block(
                    core_attn.build(name, dim=dim, heads=heads, causal=True, **options),
                    norms=(nn.LayerNorm(dim), nn.LayerNorm(dim)),
                    ffn=FeedForward(dim, config.d_inner or 4 * dim),
                    dropout=config.resid_dropout,
                )
                for _ in range(config.n_layer)
            ],
            recompute=config.checkpoint,
        )
        self.norm = nn.LayerNorm(dim)
        self._initialize()
        self.register_load_state_dict_pre_hook(_make_offsets)

    def _initialize(self) -> None:
        """As the published code: normal weights, what is added to the residual divided by √(2 blocks)."""
        nn.init.normal_(self.embeddings.weight, std=_STD)
        added = _STD / math.sqrt(2 * max(1, self.config.n_layer))
        for block in self.blocks:
            for name, module in block.named_modules():
                if isinstance(module, nn.Linear):
                    nn.init.normal_(module.weight, std=added if name in ("mixer.out_proj", "ffn.fc2") else _STD)
                    if module.bias is not None:
                        nn.init.zeros_(module.bias)

    @property
    def causal(self) -> bool:
        return True

    @property
    def streams(self) -> bool:
        return not self.hyena and self.blocks.decodes(constant=True)

    @property
    def decodes(self) -> bool:
        return self.blocks.decodes()

    @property
    def longest(self) -> int | None:
        return self.l_max if self.hyena else None

    def forward(self, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
        return self.norm(self.blocks(self.dropout(self._embed(tokens)), mask))

    def _embed(self, tokens: Tensor) -> Tensor:
        ids: Any = self.ids
        return self.embeddings(ids[tokens])

    def bases(self, features: Tensor) -> Tensor:
        """Scores by the embeddings of A, C, G and T, which the published model's output layer is tied to."""
        return F.linear(features, self.embeddings.weight[_IDS[0] : _IDS[0] + 4])

    def init_state(self, batch: int, *, device: torch.device | None = None, dtype: torch.dtype | None = None) -> Any:
        if not self.decodes:
            return super().init_state(batch)
        weight = self.embeddings.weight
        return self.blocks.init_state(batch, device=device or weight.device, dtype=dtype or weight.dtype)

    def step(self, tokens: Tensor, state: Any) -> tuple[Tensor, Any]:
        x, state = self.blocks.step(self._embed(tokens), state)
        return self.norm(x), state

    def load_official(self, tensors: Mapping[str, Tensor]) -> None:
        if not self.hyena:
            raise ValueError("published weights of hyenadna are of its own operator; leave --mixer out")
        mixers: list[Any] = [block.mixer for block in self.blocks]
        filters = [mixer.filter for mixer in mixers]
        self.load_state_dict(convert.hyenadna(tensors, filters=filters, ours=self.state_dict()))


def _make_offsets(module: nn.Module, state: Mapping[str, Tensor], prefix: str, *_: Any) -> None:
    """Room for the trained positions of published weights, which models trained here do not have.

    They are not trained any further: the published training rate for them is 1e-5.
    """
    assert isinstance(module, HyenaDNA)
    for index, block in enumerate(module.blocks):
        found = state.get(f"{prefix}blocks.{index}.mixer.filter.offsets")
        if found is not None and isinstance(block.mixer, Hyena) and block.mixer.filter.offsets is None:
            block.mixer.filter.offsets = nn.Parameter(
                torch.zeros_like(found, device=block.mixer.skip.device), requires_grad=False
            )
