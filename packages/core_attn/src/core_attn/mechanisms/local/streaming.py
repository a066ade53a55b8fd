"""Attention over sinks and a window, with positions inside the cache, for streams without end.

"Efficient Streaming Language Models with Attention Sinks" (S27), sections 3.2 and 4. Shapes: B batch, L tokens, H
heads, D channels of a head, S sinks, N tokens in the cache.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from core_attn.contract import Growth, Pattern
from core_attn.einsums import Cascade
from core_attn.mechanisms.heads import MultiHeadMixer
from core_attn.ops import window_attention
from core_attn.ops.softmax.reference import weights
from core_attn.ops.window import reference
from core_attn.positions.rotary import rotary
from core_attn.registry import register
from core_attn.state import SinkCache


@register(
    name="streaming",
    title="Efficient Streaming Language Models with Attention Sinks",
    source="S27",
    year=2023,
    patterns=frozenset({Pattern.CAUSAL_SELF, Pattern.NONCAUSAL_SELF}),
    time=Growth.LINEAR,
    memory=Growth.LINEAR,
    decodes=True,
    constant_state=True,
    padding=True,
    maps=True,
    double_backward=False,
    operator="window_attention",
    cascade=Cascade(
        einsums=(
            "near[b,h,l,m] = scale * rotate(Q[b,h,l,d], l) * rotate(K[b,h,m,d], m)",
            "far[b,h,l,s] = scale * rotate(Q[b,h,l,d], min(l, N - 1)) * rotate(K[b,h,s,d], s)",
            "top[b,h,l] = max[m,s] (near[b,h,l,m], far[b,h,l,s])",
            "W[b,h,l,m] = exp(near[b,h,l,m] - top[b,h,l])",
            "U[b,h,l,s] = exp(far[b,h,l,s] - top[b,h,l])",
            "sum[b,h,l] = W[b,h,l,m] + U[b,h,l,s]",
            "Y[b,h,l,d] = W[b,h,l,m] * V[b,h,m,d] + U[b,h,l,s] * V[b,h,s,d]",
            "O[b,h,l,d] = Y[b,h,l,d] / sum[b,h,l]",
        ),
        passes=1,
        flops="8*B*L*C**2 + 4*B*H*P*D",
        bytes="E*(2*B*L*C + 4*C**2)",
    ),
)
class StreamingAttention(MultiHeadMixer):
    """Each token reads the first `sinks` tokens and the last `window`, itself included.

    The definition is the rolling cache of section 3.2: it holds S sinks and the last w tokens, keys before their
    rotation, and a token's position is its place in the cache. With S + w tokens there, the newest stands at S + w - 1.
    So a token i reads the window at its true distances, and sink j at the distance min(i, S + w - 1) - j: what the
    stream forgot does not count. The parallel form rotates the queries of the sinks apart, and equals the rolling cache
    for every token. In an encoder (`causal=False`) the window reaches to both sides, and distances to the sinks end
    there too.

    Args:
        dim, heads, causal, bias: see `MultiHeadMixer`.
        window: w, the tokens read besides the sinks, the token itself included, at least 1. The official code's
            `recent_size` is w - 1, what the cache holds between two tokens.
        sinks: S, the first tokens that are read always; 4 in the paper.
        rotary: rotate queries and keys by those positions; without, `sinks` and `window` only choose what is read.
        base: the rotation's period, see `core_attn.positions.rotary`.
        backend: see `core_attn.ops.window_attention`. Gradients of gradients need "reference".

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
        window: int = 256,
        sinks: int = 4,
        rotary: bool = True,
        base: float = 10000.0,
        backend: str = "auto",
    ) -> None:
        super().__init__(dim, heads=heads, causal=causal, bias=bias)
        if window < 1:
            raise ValueError(f"window must be at least 1 (the token itself), got {window}")
        if sinks < 0:
            raise ValueError(f"sinks must be at least 0, got {sinks}")
        if base <= 0:
            raise ValueError(f"base must be positive, got {base}")
        self.window, self.sinks = window, sinks
        self.rotary, self.base = rotary, base
        self.backend = backend

    @property
    def sides(self) -> tuple[int, int]:
        """Keys of the window before and after a token."""
        return self.window - 1, 0 if self.causal else self.window - 1

    def positioned(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """q and k for the window, and q for the sinks; q belongs to the last of the keys' tokens."""
        if not self.rotary:
            return q, k, None
        channels = self.head_dim - self.head_dim % 2
        place = torch.arange(k.shape[2], device=k.device)
        own = place[k.shape[2] - q.shape[2] :]

        def turned(x: Tensor, positions: Tensor) -> Tensor:
            return rotary(x, positions, base=self.base, channels=channels)

        far = turned(q, own.clamp(max=self.sinks + self.window - 1)) if self.sinks else None
        return turned(q, own), turned(k, place), far

    def attend(self, q: Tensor, k: Tensor, v: Tensor, *, key_padding_mask: Tensor | None, aux: Any) -> Tensor:
        q, k, far = self.positioned(q, k)
        return window_attention(
            q,
            k,
            v,
            window=self.sides,
            causal=self.causal,
            sinks=self.sinks,
            sink_q=far,
            key_padding_mask=key_padding_mask,
            backend=self.backend,
        )

    def attention_scores(self, q: Tensor, k: Tensor, *, key_padding_mask: Tensor | None) -> Tensor:
        q, k, far = self.positioned(q, k)
        return reference.scores(
            q,
            k,
            window=self.sides,
            causal=self.causal,
            key_padding_mask=key_padding_mask,
            scale=self.head_dim**-0.5,
            sinks=self.sinks,
            sink_q=far,
        )

    def attention_map(self, q: Tensor, k: Tensor, *, key_padding_mask: Tensor | None, aux: Any) -> Tensor:
        return weights(self.attention_scores(q, k, key_padding_mask=key_padding_mask))

    def sizes(
        self, *, batch: int, length: int, context: int | None = None, grid: tuple[int, ...] | None = None
    ) -> dict[str, float]:
        left, right = self.sides
        sizes = super().sizes(batch=batch, length=length, context=context, grid=grid)
        return sizes | {"P": reference.pairs(length, length, left=left, right=right, sinks=self.sinks)}

    def init_state(
        self, batch: int, *, device: torch.device | None = None, dtype: torch.dtype | None = None
    ) -> SinkCache:
        """An empty rolling cache: S sinks and the last w - 1 tokens, whatever comes.

        Raises:
            ValueError: this module is not causal.
        """
        if not self.causal:
            raise ValueError("streaming decodes token by token only when it is built with causal=True")
        weight = self.k_proj.weight
        device, dtype = device or weight.device, dtype or weight.dtype
        sizes = (batch, self.heads, self.head_dim)
        return SinkCache(*sizes, sinks=self.sinks, left=self.window - 1, device=device, dtype=dtype)

    def step(self, x: Tensor, state: SinkCache) -> tuple[Tensor, SinkCache]:
        """The next T tokens (B, T, C) -> their outputs (B, T, C); `state` is updated in place and returned.

        What the cache gives back is short by all that was forgotten, so that places in it are the positions.
        """
        self.check_inputs(x)
        q = self.split_heads(self.q_proj(x))
        k, v = state.append(self.split_heads(self.k_proj(x)), self.split_heads(self.v_proj(x)))
        out = self.attend(q, k, v, key_padding_mask=None, aux=None)
        return self.out_proj(self.merge_heads(out)), state

    def extra_repr(self) -> str:
        return f"heads={self.heads}, causal={self.causal}, window={self.window}, sinks={self.sinks}"
