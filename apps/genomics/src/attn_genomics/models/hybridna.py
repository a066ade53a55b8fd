"""HybriDNA: A Hybrid Transformer-Mamba2 Long-Range DNA Language Model (S64).

Blocks of Mamba-2, some of them grouped-query attention instead, each followed by a gated feed-forward layer, all on
normalised input (RMSNorm) and added to it; single bases are the tokens. For classes, a sequence may be read twice
("echo"), so that in the second reading every base has seen all. Shapes: B sequences, L bases, C channels.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import core_attn
from attn_genomics.config import HybriDNAConfig
from attn_genomics.models.base import Backbone, Shape
from attn_genomics.models.blocks import Block, Blocks
from attn_genomics.tokens import MASK, N
from attn_shared.layers import Dropout
from core_attn.mechanisms.softmax.exact import SoftmaxAttention
from core_attn.positions.rotary import rotary
from core_attn.state import FullCache

_EPS = 1e-5


class RotaryAttention(SoftmaxAttention):
    """Grouped-query attention whose queries and keys are turned by their positions.

    Args:
        turned: share of a head's channels that turn.
        others: as in `SoftmaxAttention`, causal.
    """

    def __init__(self, dim: int, *, heads: int, kv_heads: int, window: int | None, turned: float = 1.0) -> None:
        super().__init__(dim, heads=heads, kv_heads=kv_heads, window=window, causal=True, bias=False)
        self.turned = round(turned * self.head_dim)

    def prepare(
        self, q: Tensor, k: Tensor, v: Tensor, *, key_padding_mask: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        return *self._turn(q, k, 0), v

    def step(self, x: Tensor, state: FullCache) -> tuple[Tensor, FullCache]:
        self.check_inputs(x)
        q, k = self._turn(self.split_heads(self.q_proj(x)), self.split_heads(self.k_proj(x)), state.seen)
        k, v = state.append(k, self.split_heads(self.v_proj(x)))
        return self.out_proj(self.merge_heads(self.attend(q, k, v, key_padding_mask=None, aux=None))), state

    def _turn(self, q: Tensor, k: Tensor, first: int) -> tuple[Tensor, Tensor]:
        places = torch.arange(first, first + q.shape[2], device=q.device)
        return rotary(q, places, channels=self.turned), rotary(k, places, channels=self.turned)


class GatedFeedForward(nn.Module):
    """W₃ (swish(W₁ x) ⊙ W₂ x); W₁ and W₂ are one matrix, in that order."""

    def __init__(self, dim: int, inner: int) -> None:
        super().__init__()
        self.up = nn.Linear(dim, 2 * inner, bias=False)
        self.down = nn.Linear(inner, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gate, value = self.up(x).chunk(2, dim=-1)
        return self.down(F.silu(gate) * value)


class HybriDNA(Backbone):
    """The decoder of the paper; `--mixer` replaces the blocks of Mamba-2.

    The paper gives no code: a block's form (norms, gated feed-forward layer, rotary positions) is that of other hybrids
    of Mamba-2 and grouped-query attention.
    """

    def __init__(
        self,
        config: HybriDNAConfig,
        shape: Shape,
        *,
        mixer: str | None = None,
        mixer_args: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(config, shape, mixer=mixer, mixer_args=mixer_args)
        self.width = dim = config.dim
        if config.every < 1 or not -1 <= config.attention_at < config.every:
            raise ValueError(
                f"attention_at is the place of attention among every={config.every} blocks, from 0, or -1 for the "
                f"last, got {config.attention_at}"
            )
        name, heads, own = mixer or "mamba2", config.heads, {}
        if name == "mamba2":
            heads = config.expand * dim // config.head_dim
            own = {"expand": config.expand, "d_state": config.state}
        options = {**own, **(mixer_args or {})}
        self.embeddings = nn.Embedding(MASK + 1, dim)
        nn.init.normal_(self.embeddings.weight, std=0.02)

        def made(index: int) -> nn.Module:
            if self._attends(index):
                return RotaryAttention(dim, heads=config.heads, kv_heads=config.kv_heads, window=config.window or None)
            return core_attn.build(name, dim=dim, heads=heads, causal=True, **options)

        self.blocks = Blocks(
            [
                Block(
                    made(index),
                    norms=(nn.RMSNorm(dim, eps=_EPS), nn.RMSNorm(dim, eps=_EPS)),
                    ffn=GatedFeedForward(dim, round(config.ffn * dim)) if config.ffn else None,
                    dropout=config.dropout,
                )
                for index in range(config.layers)
            ],
            recompute=config.checkpoint,
        )
        self.dropout = Dropout(config.dropout)
        self.norm = nn.RMSNorm(dim, eps=_EPS)

    def _attends(self, index: int) -> bool:
        """Whether a block is attention."""
        return index % self.config.every == self.config.attention_at % self.config.every

    @property
    def causal(self) -> bool:
        return not self.config.echo

    @property
    def streams(self) -> bool:
        """Not where attention reads everything before: its keys and values, and the cost of a base, grow."""
        return self.decodes and (self.config.window > 0 or not any(self._attends(i) for i in range(self.config.layers)))

    @property
    def decodes(self) -> bool:
        return self.causal and self.blocks.decodes()

    def forward(self, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
        if not self.config.echo:
            return self._read(tokens)
        length = tokens.shape[1]
        if mask is None:
            return self._read(torch.cat([tokens, tokens], dim=1))[:, length:]
        counts = mask.sum(dim=1, keepdim=True)
        place = torch.arange(2 * length, device=tokens.device)
        twice = tokens.gather(1, torch.where(place < counts, place, place - counts) % length)
        read = self._read(torch.where(place < 2 * counts, twice, N))
        second = (counts + place[:length])[..., None]
        return read.gather(1, second.expand(-1, -1, read.shape[2]))

    def _read(self, tokens: Tensor) -> Tensor:
        return self.norm(self.blocks(self.dropout(self.embeddings(tokens))))

    def init_state(self, batch: int, *, device: torch.device | None = None, dtype: torch.dtype | None = None) -> Any:
        if not self.decodes:
            return super().init_state(batch)
        weight = self.embeddings.weight
        return self.blocks.init_state(batch, device=device or weight.device, dtype=dtype or weight.dtype)

    def step(self, tokens: Tensor, state: Any) -> tuple[Tensor, Any]:
        x, state = self.blocks.step(self.embeddings(tokens), state)
        return self.norm(x), state
