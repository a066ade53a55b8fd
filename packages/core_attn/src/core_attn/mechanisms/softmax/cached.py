"""Decoding for mixers whose past is the keys and values of earlier tokens.

Shapes: B batch, T new tokens, C channels, H heads.
"""

from __future__ import annotations

import torch
from torch import Tensor

from core_attn.mechanisms.heads import MultiHeadMixer
from core_attn.state import FullCache


class CachingMixer(MultiHeadMixer):
    """A `MultiHeadMixer` whose `attend` aligns the last query with the last key, so that it decodes with a cache."""

    def init_state(
        self, batch: int, *, device: torch.device | None = None, dtype: torch.dtype | None = None
    ) -> FullCache:
        """An empty cache of keys and values.

        Raises:
            ValueError: this module is not causal.
        """
        if not self.causal:
            raise ValueError(f"{self.info.name} decodes token by token only when it is built with causal=True")
        weight = self.k_proj.weight
        return FullCache(batch, self.heads, self.head_dim, device=device or weight.device, dtype=dtype or weight.dtype)

    def step(self, x: Tensor, state: FullCache) -> tuple[Tensor, FullCache]:
        """The next T tokens (B, T, C) -> their outputs (B, T, C); `state` is updated in place and returned."""
        self.check_inputs(x)
        q, k, v = (self.split_heads(project(x)) for project in (self.q_proj, self.k_proj, self.v_proj))
        aux = self.side_input(q, k, x=x, query_padding_mask=None, grid=None, generator=None)
        k, v = state.append(k, v)
        out = self.attend(q, k, v, key_padding_mask=None, aux=aux)
        return self.out_proj(self.merge_heads(out)), state

    def extra_repr(self) -> str:
        return f"heads={self.heads}, causal={self.causal}"
