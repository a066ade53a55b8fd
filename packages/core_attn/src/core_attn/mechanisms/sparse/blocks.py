"""The frame of mechanisms that read a fixed pattern of blocks of keys: subclasses say which.

Shapes: B batch, H heads, L queries, M keys, D channels of a head, nq and nk blocks of queries and of keys.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from core_attn import ops
from core_attn.mechanisms.heads import MultiHeadMixer
from core_attn.ops.block_sparse.patterns import count_pairs
from core_attn.ops.block_sparse.reference import expand
from core_attn.ops.softmax import reference
from core_attn.state import FullCache


class BlockPatternMixer(MultiHeadMixer):
    """Softmax attention over the blocks of keys that `pattern` allows; blocks are counted from the first token.

    Args:
        dim, heads, causal, bias: see `MultiHeadMixer`.
        block_size: tokens of a block.
        backend: see `core_attn.ops.block_sparse_attention`. Gradients of gradients need "reference".

    Raises:
        ValueError: an option out of its range.
    """

    def __init__(
        self,
        dim: int,
        *,
        heads: int = 8,
        causal: bool = False,
        bias: bool = True,
        block_size: int = 64,
        backend: str = "auto",
    ) -> None:
        super().__init__(dim, heads=heads, causal=causal, bias=bias)
        if block_size < 1:
            raise ValueError(f"block_size must be a positive integer, got {block_size}")
        self.block_size = block_size
        self.backend = backend

    def pattern(self, rows: Tensor, columns: int) -> Tensor:
        """Which of `columns` key blocks the query blocks with the numbers `rows` (nq,) read: (H or 1, nq, columns)."""
        raise NotImplementedError

    def blocks(self, queries: int, keys: int, device: torch.device | None = None) -> Tensor:
        """(H or 1, nq, nk) for queries that are the last of the keys, cut where the blocks of keys are."""
        first = (keys - queries) // self.block_size
        columns = -(-keys // self.block_size)
        return self.pattern(torch.arange(first, columns, device=device), columns)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, *, key_padding_mask: Tensor | None, aux: Any) -> Tensor:
        queries, keys = q.shape[2], k.shape[2]
        size: int | tuple[int, int] = self.block_size
        front = 0
        if queries == 1:
            size = (1, self.block_size)
        else:
            # The blocks of a piece that goes on inside a block begin before it.
            front = (keys - queries) % self.block_size
            q = F.pad(q, (0, 0, front, 0)) if front else q
        out = ops.block_sparse_attention(
            q,
            k,
            v,
            blocks=self.blocks(queries, keys, q.device),
            block_size=size,
            causal=self.causal,
            key_padding_mask=key_padding_mask,
            backend=self.backend,
        )
        return out[:, :, front:] if front else out

    def attention_scores(self, q: Tensor, k: Tensor, *, key_padding_mask: Tensor | None) -> Tensor:
        queries, keys = q.shape[2], k.shape[2]
        front = (keys - queries) % self.block_size
        mask = expand(self.blocks(queries, keys, q.device), (self.block_size,) * 2, queries + front, keys)
        return reference.scores(
            q,
            k,
            causal=self.causal,
            mask=mask[None, :, front:],
            bias=None,
            key_padding_mask=key_padding_mask,
            window=None,
            scale=self.head_dim**-0.5,
        )

    def attention_map(self, q: Tensor, k: Tensor, *, key_padding_mask: Tensor | None, aux: Any) -> Tensor:
        return reference.weights(self.attention_scores(q, k, key_padding_mask=key_padding_mask))

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
        q = self.split_heads(self.q_proj(x))
        k, v = state.append(self.split_heads(self.k_proj(x)), self.split_heads(self.v_proj(x)))
        out = self.attend(q, k, v, key_padding_mask=None, aux=None)
        return self.out_proj(self.merge_heads(out)), state

    def sizes(
        self, *, batch: int, length: int, context: int | None = None, grid: tuple[int, ...] | None = None
    ) -> dict[str, float]:
        sizes = super().sizes(batch=batch, length=length, context=context, grid=grid)
        pairs = count_pairs(self.blocks(length, length), self.block_size, length, length, causal=self.causal)
        return {**sizes, "P": pairs}

    def extra_repr(self) -> str:
        return f"heads={self.heads}, causal={self.causal}, block_size={self.block_size}"
