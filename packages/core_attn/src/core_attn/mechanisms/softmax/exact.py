"""Multi-head softmax attention, "Attention Is All You Need" (2017), section 3.2.

Shapes: B batch, L queries, M keys, C channels, H query heads, Hkv key heads, D = C / H.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from core_attn.contract import Growth, Pattern
from core_attn.einsums import Cascade, pairs_read
from core_attn.mechanisms.heads import MultiHeadMixer
from core_attn.ops.softmax import reference, softmax_attention, span
from core_attn.registry import register
from core_attn.state import FullCache, WindowCache


@register(
    name="softmax",
    title="Attention Is All You Need",
    source="",
    year=2017,
    patterns=frozenset(Pattern),
    time=Growth.QUADRATIC,
    memory=Growth.LINEAR,
    decodes=True,
    padding=True,
    maps=True,
    double_backward=False,
    cascade=Cascade(
        einsums=(
            "S[b,h,l,m] = scale * Q[b,h,l,d] * K[b,g,m,d]",
            "top[b,h,l] = max[m] S[b,h,l,m]",
            "W[b,h,l,m] = exp(S[b,h,l,m] - top[b,h,l])",
            "sum[b,h,l] = W[b,h,l,m]",
            "Y[b,h,l,d] = W[b,h,l,m] * V[b,g,m,d]",
            "O[b,h,l,d] = Y[b,h,l,d] / sum[b,h,l]",
        ),
        passes=1,
        flops="4*B*L*C**2 + 4*B*M*C*G*D + 4*B*H*P*D",
        bytes="E*(B*(2*L + X)*C + 2*C**2 + 2*C*G*D)",
    ),
)
class SoftmaxAttention(MultiHeadMixer):
    """Each token reads a weighted mean of all tokens: softmax(q kᵀ / √D) v in every head (eq. 1).

    MultiHead(x) = concat(head_1 … head_H) W_O with head_i = attention(x W_q, x W_k, x W_v) (section 3.2.2). Fewer key
    heads than query heads give multi-query (Hkv = 1) and grouped-query attention; a window gives local attention, in
    time O(L·w).

    Args:
        dim: channels C.
        heads: number of query heads H; must divide dim.
        causal: token i reads tokens <= i.
        bias: whether the four projections have a bias.
        kv_heads: number of key and value heads Hkv, which divides H; H by default.
        dropout: probability in [0, 1) of dropping a weight of the map in train mode.
        window: w reads the tokens nearer than w positions, (left, right) so many on each side; all by default.
        scale: factor of the scores, 1/√D by default.
        backend: see `core_attn.ops.softmax_attention`. Gradients of gradients need "reference".

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
        kv_heads: int | None = None,
        dropout: float = 0.0,
        window: int | tuple[int | None, int | None] | None = None,
        scale: float | None = None,
        backend: str = "auto",
    ) -> None:
        super().__init__(dim, heads=heads, causal=causal, bias=bias)
        self.kv_heads = heads if kv_heads is None else kv_heads
        if self.kv_heads < 1 or heads % self.kv_heads:
            raise ValueError(f"kv_heads must divide heads, got kv_heads={kv_heads} and heads={heads}")
        if self.kv_heads != heads:
            self.k_proj = nn.Linear(dim, self.kv_heads * self.head_dim, bias=bias)
            self.v_proj = nn.Linear(dim, self.kv_heads * self.head_dim, bias=bias)
        if not 0.0 <= dropout < 1.0:
            raise ValueError(f"dropout must lie in [0, 1), got {dropout}")
        self.dropout = dropout
        self.window = span(window, causal=causal)
        self.scale = self.head_dim**-0.5 if scale is None else scale
        self.backend = backend

    def attend(self, q: Tensor, k: Tensor, v: Tensor, *, key_padding_mask: Tensor | None, aux: Any) -> Tensor:
        return softmax_attention(
            q,
            k,
            v,
            causal=self.causal,
            key_padding_mask=key_padding_mask,
            window=self.window,
            scale=self.scale,
            dropout=self.dropout if self.training else 0.0,
            backend=self.backend,
        )

    def attention_scores(self, q: Tensor, k: Tensor, *, key_padding_mask: Tensor | None) -> Tensor:
        return reference.scores(
            q,
            k,
            causal=self.causal,
            mask=None,
            bias=None,
            key_padding_mask=key_padding_mask,
            window=self.window,
            scale=self.scale,
        )

    def attention_map(self, q: Tensor, k: Tensor, *, key_padding_mask: Tensor | None, aux: Any) -> Tensor:
        return reference.weights(self.attention_scores(q, k, key_padding_mask=key_padding_mask))

    def sizes(
        self, *, batch: int, length: int, context: int | None = None, grid: tuple[int, ...] | None = None
    ) -> dict[str, float]:
        sizes = super().sizes(batch=batch, length=length, context=context, grid=grid)
        if self.window is not None:
            left, right = self.window
            sizes["P"] = pairs_read(length, int(sizes["M"]), left=left, right=0 if self.causal else right)
        return sizes

    def init_state(
        self, batch: int, *, device: torch.device | None = None, dtype: torch.dtype | None = None
    ) -> FullCache:
        """An empty cache of keys and values; of constant size where there is a window.

        Raises:
            ValueError: this module is not causal.
        """
        if not self.causal:
            raise ValueError("softmax decodes token by token only when it is built with causal=True")
        weight = self.k_proj.weight
        sizes = (batch, self.kv_heads, self.head_dim)
        device, dtype = device or weight.device, dtype or weight.dtype
        if self.window is None or self.window[0] is None:
            return FullCache(*sizes, device=device, dtype=dtype)
        return WindowCache(*sizes, left=self.window[0], device=device, dtype=dtype)

    def step(self, x: Tensor, state: FullCache) -> tuple[Tensor, FullCache]:
        """The next T tokens (B, T, C) -> their outputs (B, T, C); `state` is updated in place and returned.

        T is 1 while generating; a prompt goes in as one piece.
        """
        self.check_inputs(x)
        q = self.split_heads(self.q_proj(x))
        k, v = state.append(self.split_heads(self.k_proj(x)), self.split_heads(self.v_proj(x)))
        if x.shape[1] == 1:
            # The cache holds just what the one new token may read, so that nothing is left to mask.
            out = softmax_attention(q, k, v, scale=self.scale, backend=self.backend)
        else:
            out = self.attend(q, k, v, key_padding_mask=None, aux=None)
        return self.out_proj(self.merge_heads(out)), state

    def extra_repr(self) -> str:
        given = [f"heads={self.heads}", f"causal={self.causal}"]
        if self.kv_heads != self.heads:
            given.append(f"kv_heads={self.kv_heads}")
        if self.window is not None:
            given.append(f"window={self.window}")
        return ", ".join(given)
