"""BiGLA: gated linear attention (S196) over DNA in both directions, by the mixer of ViG (S220).

Not a published DNA model. A convolution finds motifs, then come blocks of attention and a feed-forward layer, both on
normalised input and added to it. Shapes: B sequences, L bases, C channels.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attn_genomics.config import BiGLAConfig
from attn_genomics.models.base import Backbone, Shape
from attn_genomics.models.blocks import LETTERS, Block, Blocks, FeedForward, build_mixer, letters, strongest
from attn_shared.layers import Dropout


class BiGLAState(NamedTuple):
    """`past` (B, 5, kernel - 1) what the convolution still reads, and what every block's mixer carries."""

    past: Tensor
    blocks: list[Any]


class BiGLA(Backbone):
    """Gated linear attention both ways; with `causal` from the left only (the mixer is then `gla`).

    `--mixer` takes any other mechanism. One that reads in one direction only does so in both, each with one half of the
    channels (`BothWays`).
    """

    def __init__(
        self,
        config: BiGLAConfig,
        shape: Shape,
        *,
        mixer: str | None = None,
        mixer_args: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(config, shape, mixer=mixer, mixer_args=mixer_args)
        if config.kernel < 1:
            raise ValueError(f"kernel must be at least 1, got {config.kernel}")
        if config.pool < 1 or (config.causal and config.pool > 1):
            raise ValueError(f"pool must be at least 1, and 1 for a causal model, got {config.pool}")
        self.width, self.strides = config.dim, config.pool
        dim = config.dim
        # One spelling of ViG is given where nobody chose: it cannot be causal, and GLA is what it is made of.
        name = "gla" if config.causal and mixer in (None, "vig") else mixer or "vig"
        self.stem = nn.Conv1d(LETTERS, dim, config.kernel)
        self.dropout = Dropout(config.dropout)
        self.blocks = Blocks(
            [
                Block(
                    build_mixer(name, dim=dim, heads=config.heads, causal=config.causal, options=mixer_args),
                    norms=(nn.LayerNorm(dim), nn.LayerNorm(dim)),
                    ffn=FeedForward(dim, round(config.ffn * dim)) if config.ffn else None,
                    dropout=config.dropout,
                )
                for _ in range(config.layers)
            ],
            recompute=config.checkpoint,
        )
        self.norm = nn.LayerNorm(dim)

    @property
    def causal(self) -> bool:
        return bool(self.config.causal)

    @property
    def streams(self) -> bool:
        return self.causal and self.blocks.decodes(constant=True)

    @property
    def decodes(self) -> bool:
        return self.causal and self.blocks.decodes()

    def forward(self, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
        x = letters(tokens, self.stem.weight.dtype)
        if mask is not None:
            x = x.masked_fill(~mask.unsqueeze(-1), 0.0)
        around = self.config.kernel - 1
        left = around if self.causal else around // 2
        x, mask = strongest(self._found(F.pad(x.mT, (left, around - left))), mask, self.strides)
        return self.norm(self.blocks(self.dropout(x.mT), mask))

    def _found(self, x: Tensor) -> Tensor:
        """(B, 5, L + kernel - 1) -> (B, C, L)."""
        return F.gelu(self.stem(x))

    def init_state(
        self, batch: int, *, device: torch.device | None = None, dtype: torch.dtype | None = None
    ) -> BiGLAState:
        if not self.decodes:
            return super().init_state(batch)
        weight = self.stem.weight
        device, dtype = device or weight.device, dtype or weight.dtype
        past = torch.zeros(batch, LETTERS, self.config.kernel - 1, device=device, dtype=dtype)
        return BiGLAState(past, self.blocks.init_state(batch, device=device, dtype=dtype))

    def step(self, tokens: Tensor, state: BiGLAState) -> tuple[Tensor, BiGLAState]:
        x = torch.cat([state.past, letters(tokens, state.past.dtype).mT], dim=2)
        past = x[:, :, tokens.shape[1] :].clone()
        x, blocks = self.blocks.step(self._found(x).mT, state.blocks)
        return self.norm(x), BiGLAState(past, blocks)
