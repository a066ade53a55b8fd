"""Fused neighbourhood attention.

"Faster Neighborhood Attention: Reducing the O(n²) Cost of Self Attention at the Threadblock Level" (S165), section 2.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from core_attn.contract import Growth, Pattern
from core_attn.einsums import Cascade
from core_attn.mechanisms.local.neighborhood import NeighborhoodMixer
from core_attn.ops import window_attention
from core_attn.ops.softmax.reference import weights
from core_attn.ops.window import reference
from core_attn.registry import register
from core_attn.state import WindowCache

CASCADE = Cascade(
    einsums=(
        "S[b,h,l,w] = scale * Q[b,h,l,d] * K[b,h,window(l,w),d]",
        "top[b,h,l] = max[w] S[b,h,l,w]",
        "W[b,h,l,w] = exp(S[b,h,l,w] - top[b,h,l])",
        "sum[b,h,l] = W[b,h,l,w]",
        "Y[b,h,l,d] = W[b,h,l,w] * V[b,h,window(l,w),d]",
        "O[b,h,l,d] = Y[b,h,l,d] / sum[b,h,l]",
    ),
    passes=1,
    flops="8*B*L*C**2 + 4*B*H*L*K*D",
    bytes="E*(2*B*L*C + 4*C**2)",
    symbols={"K": "keys of a window, those that causality cuts included"},
)


@register(
    name="fna",
    title="Faster Neighborhood Attention: Reducing the O(n^2) Cost of Self Attention at the Threadblock Level",
    source="S165",
    year=2024,
    patterns=frozenset({Pattern.NONCAUSAL_SELF, Pattern.CAUSAL_SELF}),
    grid_ranks=frozenset({1, 2, 3}),
    time=Growth.LINEAR,
    memory=Growth.LINEAR,
    decodes=True,
    constant_state=True,
    maps=True,
    double_backward=False,
    operator="neighborhood_attention",
    cascade=CASCADE,
)
class FusedNeighborhoodAttention(NeighborhoodMixer):
    """Each token of a grid reads the window of its nearest tokens, computed in tiles of queries and their halos.

    The window is `kernel_size` keys on every axis, moved inwards at borders instead of cut (section 2); with dilation
    its keys lie that far apart, and on causal axes it ends at the token itself. The paper's contribution is how it is
    computed: tiles of queries against the box of keys that they read together, softmax and both products in one pass.

    On a causal line (no grid, or one axis) the window is never moved: it is cut at the start, whatever the length, so
    that tokens can also be read one by one.

    Args:
        dim, heads, causal, bias, kernel_size, dilation, causal_axes, backend: see `NeighborhoodMixer`.

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
        kernel_size: int | Sequence[int] = 7,
        dilation: int | Sequence[int] = 1,
        causal_axes: Sequence[bool] | None = None,
        backend: str = "auto",
    ) -> None:
        super().__init__(
            dim,
            heads=heads,
            causal=causal,
            bias=bias,
            kernel_size=kernel_size,
            dilation=dilation,
            causal_axes=causal_axes,
            backend=backend,
        )

    @property
    def line(self) -> dict[str, Any]:
        """The window of a causal line, as `window_attention` takes it."""
        (size, dilation) = (n if isinstance(n, int) else n[0] for n in (self.kernel_size, self.dilation))
        return {"window": (size - 1, 0), "dilation": dilation, "causal": True}

    def is_line(self, grid: Sequence[int]) -> bool:
        return len(grid) == 1 and (self.causal or self.causal_axes == (True,))

    def attend(self, q: Tensor, k: Tensor, v: Tensor, *, key_padding_mask: Tensor | None, aux: Any) -> Tensor:
        if self.is_line(aux["grid"]):
            return window_attention(q, k, v, **self.line, backend=self.backend)
        return super().attend(q, k, v, key_padding_mask=key_padding_mask, aux=aux)

    def attention_map(self, q: Tensor, k: Tensor, *, key_padding_mask: Tensor | None, aux: Any) -> Tensor:
        if self.is_line(aux["grid"]):
            scale = self.head_dim**-0.5
            return weights(reference.scores(q, k, **self.line, key_padding_mask=None, scale=scale))
        return super().attention_map(q, k, key_padding_mask=key_padding_mask, aux=aux)

    def sizes(
        self, *, batch: int, length: int, context: int | None = None, grid: tuple[int, ...] | None = None
    ) -> dict[str, float]:
        sizes = super().sizes(batch=batch, length=length, context=context, grid=grid)
        if self.is_line((length,) if grid is None else grid):
            size, dilation = self.line["window"][0] + 1, self.line["dilation"]
            sizes["P"] = sum(min(i // dilation + 1, size) for i in range(length))
            sizes["K"] = size
        return sizes

    def init_state(
        self, batch: int, *, device: torch.device | None = None, dtype: torch.dtype | None = None
    ) -> WindowCache:
        """An empty cache of what a window holds: (kernel_size - 1) · dilation tokens of a line.

        Raises:
            ValueError: this module is not causal, or was built for grids of several axes.
        """
        if not self.causal or self.axes not in (None, 1):
            raise ValueError(
                "fna decodes token by token only when it is built with causal=True and options for one axis"
            )
        weight = self.k_proj.weight
        left = self.line["window"][0] * self.line["dilation"]
        sizes = (batch, self.heads, self.head_dim)
        return WindowCache(*sizes, left=left, device=device or weight.device, dtype=dtype or weight.dtype)

    def step(self, x: Tensor, state: WindowCache) -> tuple[Tensor, WindowCache]:
        """The next T tokens (B, T, C) -> their outputs (B, T, C); `state` is updated in place and returned."""
        self.check_inputs(x)
        q = self.split_heads(self.q_proj(x))
        k, v = state.append(self.split_heads(self.k_proj(x)), self.split_heads(self.v_proj(x)))
        out = window_attention(q, k, v, **self.line, backend=self.backend)
        return self.out_proj(self.merge_heads(out)), state
