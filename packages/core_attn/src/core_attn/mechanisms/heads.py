"""The frame that most token mixers share: projections into heads, attention between heads' tokens, projection out.

Shapes: B batch, L queries, M keys, C channels, H heads, D = C / H, as in the paper each subclass names.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from core_attn.contract import TokenMixer


class MultiHeadMixer(TokenMixer):
    """Linear projections to q, k, v in H heads, `attend`, and an output projection.

    A subclass gives `attend` (the fast form) and, where `info.maps`, `attention_map` (the matrix A with
    `attend(q, k, v) = A @ v`, from the reference). Whatever is random is drawn once in `draw`, so that both see it.

    Args:
        dim: channels C.
        heads: number of heads H; must divide dim.
        causal: see `TokenMixer`.
        bias: whether the four projections have a bias.
    """

    def __init__(self, dim: int, *, heads: int = 8, causal: bool = False, bias: bool = True) -> None:
        super().__init__(dim, causal=causal)
        if heads < 1 or dim % heads:
            raise ValueError(f"heads must divide dim, got dim={dim} and heads={heads}")
        self.heads = heads
        self.head_dim = dim // heads
        self.q_proj = nn.Linear(dim, dim, bias=bias)
        self.k_proj = nn.Linear(dim, dim, bias=bias)
        self.v_proj = nn.Linear(dim, dim, bias=bias)
        self.out_proj = nn.Linear(dim, dim, bias=bias)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, *, key_padding_mask: Tensor | None, aux: Any) -> Tensor:
        """(B, H, L, D), (B, H, M, D), (B, H, M, D) -> (B, H, L, D)."""
        raise NotImplementedError

    def attention_scores(self, q: Tensor, k: Tensor, *, key_padding_mask: Tensor | None) -> Tensor | None:
        """(B, H, L, M) scores whose softmax over M is the map, masked with -inf; None where there are none."""
        return None

    def attention_map(self, q: Tensor, k: Tensor, *, key_padding_mask: Tensor | None, aux: Any) -> Tensor:
        """(B, H, L, M) matrix A with attend(q, k, v) = A @ v."""
        raise NotImplementedError

    def prepare(
        self, q: Tensor, k: Tensor, v: Tensor, *, key_padding_mask: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """What is done to the heads (B, H, L, D), (B, Hkv, M, D), (B, Hkv, M, D) before they attend; nothing here."""
        return q, k, v

    def draw(self, q: Tensor, k: Tensor, generator: torch.Generator | None) -> Any:
        """What `attend` and `attention_map` both need drawn at random; None for deterministic mechanisms."""
        return None

    def side_input(
        self,
        q: Tensor,
        k: Tensor,
        *,
        x: Tensor,
        query_padding_mask: Tensor | None,
        grid: tuple[int, ...] | None,
        generator: torch.Generator | None,
    ) -> Any:
        """The `aux` of `attend` and `attention_map`; `query_padding_mask` is the keys' in self attention, else None.

        `x` (B, L, C) is what the queries were made from, with zeros in place of padding.
        """
        return self.draw(q, k, generator)

    def finish(self, out: Tensor, *, x: Tensor, v: Tensor, grid: tuple[int, ...] | None) -> Tensor:
        """What is done to the heads' outputs (B, L, C) before the output projection; nothing here.

        `x` (B, L, C) is what the queries were made from, v (B, Hkv, M, D) what was read.
        """
        return out

    def split_heads(self, x: Tensor) -> Tensor:
        """(B, L, H·D) -> (B, H, L, D)."""
        return x.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)

    def merge_heads(self, x: Tensor) -> Tensor:
        """(B, H, L, D) -> (B, L, H·D)."""
        return x.transpose(1, 2).flatten(-2)

    def forward(
        self,
        x: Tensor,
        *,
        context: Tensor | None = None,
        key_padding_mask: Tensor | None = None,
        grid: tuple[int, ...] | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        self.check_inputs(x, context=context, key_padding_mask=key_padding_mask, grid=grid, generator=generator)
        source = x if context is None else context
        if key_padding_mask is not None:
            # Zeroed before the projections: 0 * NaN is NaN, so masking later could not stop a NaN under the mask.
            source = source.masked_fill(~key_padding_mask.unsqueeze(-1), 0.0)
        x = x if context is not None else source
        q = self.split_heads(self.q_proj(x))
        k = self.split_heads(self.k_proj(source))
        v = self.split_heads(self.v_proj(source))
        q, k, v = self.prepare(q, k, v, key_padding_mask=key_padding_mask)
        query_padding_mask = key_padding_mask if context is None else None
        aux = self.side_input(q, k, x=x, query_padding_mask=query_padding_mask, grid=grid, generator=generator)
        out = self.attend(q, k, v, key_padding_mask=key_padding_mask, aux=aux)
        if self._tap is not None:
            out = self._tap(self, q, k, v, out, key_padding_mask, aux)
        return self.out_proj(self.finish(self.merge_heads(out), x=x, v=v, grid=grid))
