"""Long Short-attention: some heads read what is near, the others everything.

"Short-Range Dependency Effects on Transformer Instability and a Decomposed Attention Solution" (S49). Shapes: B batch,
L queries, M keys, H heads, D channels of a head.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from core_attn.contract import Growth, Pattern
from core_attn.einsums import Cascade, pairs_read
from core_attn.mechanisms.heads import MultiHeadMixer
from core_attn.ops import window_attention
from core_attn.ops.softmax.reference import weights
from core_attn.ops.window import reference
from core_attn.registry import register
from core_attn.state import FullCache, MixedCache, WindowCache


@register(
    name="ls",
    title="Short-Range Dependency Effects on Transformer Instability and a Decomposed Attention Solution",
    source="S49",
    year=2025,
    patterns=frozenset(Pattern),
    time=Growth.QUADRATIC,
    memory=Growth.LINEAR,
    decodes=True,
    padding=True,
    maps=True,
    double_backward=False,
    operator="window_attention",
    cascade=Cascade(
        einsums=(
            "S[b,h,l,m] = scale * Q[b,h,l,d] * K[b,h,m,d] for m in the window of l where h is short",
            "top[b,h,l] = max[m] S[b,h,l,m]",
            "W[b,h,l,m] = exp(S[b,h,l,m] - top[b,h,l])",
            "sum[b,h,l] = W[b,h,l,m]",
            "Y[b,h,l,d] = W[b,h,l,m] * V[b,h,m,d]",
            "O[b,h,l,d] = Y[b,h,l,d] / sum[b,h,l]",
        ),
        passes=1,
        flops="4*B*L*C**2 + 4*B*M*C**2 + 4*B*D*(N*W + (H - N)*P)",
        bytes="E*(B*(2*L + X)*C + 4*C**2)",
        symbols={"N": "short heads", "W": "pairs of a query and a key that a short head reads"},
    ),
)
class LongShortAttention(MultiHeadMixer):
    """Softmax attention whose first heads read a window (short range) and whose other heads read all (long range).

    Short range then has heads of its own, in O(L·w), and the logits of the long heads need not grow to single out the
    neighbours; the paper's abstract gives the decomposition. How many heads are short and how far they see is not to
    be had without the full text: the defaults are ours.

    Args:
        dim, heads, causal, bias: see `MultiHeadMixer`.
        window: short heads read the tokens nearer than so many positions, at least 1.
        short_heads: number of short heads, 0 to heads; half of the heads by default.
        backend: of both kinds of heads, see `core_attn.ops.softmax_attention`. Gradients of gradients need "reference".

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
        window: int = 128,
        short_heads: int | None = None,
        backend: str = "auto",
    ) -> None:
        super().__init__(dim, heads=heads, causal=causal, bias=bias)
        if window < 1:
            raise ValueError(f"window must be at least 1 (the token itself), got {window}")
        short_heads = heads // 2 if short_heads is None else short_heads
        if not 0 <= short_heads <= heads:
            raise ValueError(f"short_heads must lie between 0 and heads = {heads}, got {short_heads}")
        self.window, self.short_heads = window, short_heads
        self.backend = backend

    def groups(self) -> list[tuple[range, tuple[int, int] | None]]:
        """The heads that read alike, and their window; None reads all."""
        side = self.window - 1
        short, long = range(self.short_heads), range(self.short_heads, self.heads)
        kinds = [(short, (side, 0 if self.causal else side)), (long, None)]
        return [(heads, window) for heads, window in kinds if len(heads)]

    def attend(self, q: Tensor, k: Tensor, v: Tensor, *, key_padding_mask: Tensor | None, aux: Any) -> Tensor:
        outs = []
        for heads, window in self.groups():
            own = slice(heads.start, heads.stop)
            outs.append(self._read(q[:, own], k[:, own], v[:, own], window, key_padding_mask))
        return torch.cat(outs, dim=1)

    def _read(
        self, q: Tensor, k: Tensor, v: Tensor, window: tuple[int, int] | None, key_padding_mask: Tensor | None
    ) -> Tensor:
        return window_attention(
            q, k, v, window=window, causal=self.causal, key_padding_mask=key_padding_mask, backend=self.backend
        )

    def attention_scores(self, q: Tensor, k: Tensor, *, key_padding_mask: Tensor | None) -> Tensor:
        scores = []
        for heads, window in self.groups():
            own = slice(heads.start, heads.stop)
            scores.append(
                reference.scores(
                    q[:, own],
                    k[:, own],
                    window=window,
                    causal=self.causal,
                    key_padding_mask=key_padding_mask,
                    scale=self.head_dim**-0.5,
                )
            )
        return torch.cat(scores, dim=1)

    def attention_map(self, q: Tensor, k: Tensor, *, key_padding_mask: Tensor | None, aux: Any) -> Tensor:
        return weights(self.attention_scores(q, k, key_padding_mask=key_padding_mask))

    def sizes(
        self, *, batch: int, length: int, context: int | None = None, grid: tuple[int, ...] | None = None
    ) -> dict[str, float]:
        sizes = super().sizes(batch=batch, length=length, context=context, grid=grid)
        side = self.window - 1
        near = pairs_read(length, int(sizes["M"]), left=side, right=0 if self.causal else side)
        return sizes | {"N": self.short_heads, "W": near}

    def init_state(
        self, batch: int, *, device: torch.device | None = None, dtype: torch.dtype | None = None
    ) -> MixedCache:
        """An empty cache: the last w - 1 tokens in the short heads, all tokens in the others.

        Raises:
            ValueError: this module is not causal.
        """
        if not self.causal:
            raise ValueError("ls decodes token by token only when it is built with causal=True")
        weight = self.k_proj.weight
        device, dtype = device or weight.device, dtype or weight.dtype
        parts: list[tuple[range, FullCache]] = []
        for heads, window in self.groups():
            sizes = (batch, len(heads), self.head_dim)
            if window is None:
                parts.append((heads, FullCache(*sizes, device=device, dtype=dtype)))
            else:
                parts.append((heads, WindowCache(*sizes, left=window[0], device=device, dtype=dtype)))
        return MixedCache(parts)

    def step(self, x: Tensor, state: MixedCache) -> tuple[Tensor, MixedCache]:
        """The next T tokens (B, T, C) -> their outputs (B, T, C); `state` is updated in place and returned."""
        self.check_inputs(x)
        q = self.split_heads(self.q_proj(x))
        remembered = state.append(self.split_heads(self.k_proj(x)), self.split_heads(self.v_proj(x)))
        outs = [
            self._read(q[:, heads.start : heads.stop], k, v, window, None)
            for (heads, window), (k, v) in zip(self.groups(), remembered, strict=True)
        ]
        return self.out_proj(self.merge_heads(torch.cat(outs, dim=1))), state

    def extra_repr(self) -> str:
        kinds = f"window={self.window}, short_heads={self.short_heads}"
        return f"heads={self.heads}, causal={self.causal}, {kinds}"
