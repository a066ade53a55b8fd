"""InLine attention: linear attention that is injective and knows its surroundings.

"Bridging the Divide: Reconsidering Softmax and Linear Attention" (S77), section 4.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from core_attn import ops
from core_attn.contract import Growth, Pattern
from core_attn.einsums import Cascade
from core_attn.mechanisms.heads import MultiHeadMixer
from core_attn.mechanisms.linear.nala import on_grid
from core_attn.naming import unknown
from core_attn.registry import register

FEATURE_MAPS: dict[str, Callable[[Tensor], Tensor]] = {
    "identity": lambda x: x,
    "relu": F.relu,
    "leaky_relu": F.leaky_relu,
    "exp": lambda x: torch.exp(0.2 * x),
}


@register(
    name="inline",
    title="Bridging the Divide: Reconsidering Softmax and Linear Attention",
    source="S77",
    year=2024,
    patterns=frozenset({Pattern.NONCAUSAL_SELF}),
    grid_ranks=frozenset({1, 2}),
    time=Growth.LINEAR,
    memory=Growth.LINEAR,
    maps=True,
    operator="kernel_attention",
    cascade=Cascade(
        einsums=(
            "k[b,h,d] = K[b,h,m,d] / M",
            "v[b,h,e] = V[b,h,m,e] / M",
            "S[b,h,d,e] = phi(K)[b,h,m,d] * V[b,h,m,e] / M",
            "Y[b,h,l,e] = scale * phi(Q)[b,h,l,d] * S[b,h,d,e]",
            "a[b,h,l] = scale * phi(Q)[b,h,l,d] * k[b,h,d]",
            "x[b,c] = X[b,l,c] / L",
            "W[b,c,w] = W2[h,c,w,d] * gelu(W1[h,c,d] * x[b,h,d])",
            "O[b,l,c] = Y[b,l,c] + (1 - a[b,h,l]) * v[b,c] + W[b,c,w] * V[b,window(l,w),c]",
        ),
        passes=1,
        flops="8*B*L*C**2 + 4*B*H*L*D**2 + 2*B*H*L*D + Z*(18*B*L*C + 20*B*C*D)",
        bytes="E*(2*B*L*C + 4*C**2 + 10*Z*C*D)",
        symbols={"Z": "1 with the convolution of the values, else 0"},
    ),
)
class InLineAttention(MultiHeadMixer):
    """Weights s φ(q_i)·φ(k_j) / N − mean over j of them + 1 / N with s = 1/√D: normalised by subtraction, in linear
    time.

    Dividing by the sum, as linear attention does, gives queries of one direction the same weights whatever their
    length; subtracting the mean does not (section 4.1). Weights may be negative and sum to 1. To the output comes a 3 ×
    3 depthwise convolution of the values whose weights an MLP of each head makes from the mean token (section 4.2). A
    plain sequence is an image of one row.

    Args:
        dim, heads, bias: see `MultiHeadMixer`.
        causal: must be False.
        feature_map: φ: "identity" (the paper's choice), "relu", "leaky_relu" or "exp" of a fifth of its argument.
        local: whether there is the convolution of the values.
        backend: see `core_attn.ops.kernel_attention`.

    Raises:
        ValueError: an option out of its range.
        UnknownNameError: no such feature map.
    """

    def __init__(
        self,
        dim: int,
        *,
        heads: int = 8,
        causal: bool = False,
        bias: bool = True,
        feature_map: str = "identity",
        local: bool = True,
        backend: str = "auto",
    ) -> None:
        super().__init__(dim, heads=heads, causal=causal, bias=bias)
        if causal:
            raise ValueError("inline has no causal form; build it with causal=False")
        if feature_map not in FEATURE_MAPS:
            raise unknown("feature map", feature_map, FEATURE_MAPS)
        self.feature_map = feature_map
        self.backend = backend
        self.local: nn.Sequential | None = None
        if local:
            self.local = nn.Sequential(
                nn.Conv1d(dim, dim, 1, groups=heads), nn.GELU(), nn.Conv1d(dim, 9 * dim, 1, groups=heads)
            )

    def prepare(
        self, q: Tensor, k: Tensor, v: Tensor, *, key_padding_mask: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        feature_map = FEATURE_MAPS[self.feature_map]
        return feature_map(q) * self.head_dim**-0.5, feature_map(k), v

    def attend(self, q: Tensor, k: Tensor, v: Tensor, *, key_padding_mask: Tensor | None, aux: Any) -> Tensor:
        precise = torch.promote_types(q.dtype, torch.float32)
        q, k, values = q.to(precise), k.to(precise), v.to(precise)
        read = ops.kernel_attention(q / max(1, k.shape[2]), k, values, normalize=False, backend=self.backend)
        assert isinstance(read, Tensor)
        share = 1 - q @ k.mean(2, keepdim=True).mT
        return (read + share * values.mean(2, keepdim=True)).to(v.dtype)

    def attention_map(self, q: Tensor, k: Tensor, *, key_padding_mask: Tensor | None, aux: Any) -> Tensor:
        scores = q @ k.mT
        return (scores - scores.mean(-1, keepdim=True) + 1) / k.shape[2]

    def finish(self, out: Tensor, *, x: Tensor, v: Tensor, grid: tuple[int, ...] | None) -> Tensor:
        if self.local is None or not x.shape[0]:
            return out
        weight: Tensor = self.local(x.mean(1).unsqueeze(-1))
        weight = weight.reshape(-1, 1, 3, 3)

        def convolve(images: Tensor) -> Tensor:
            # The weights are a sample's own, so that channels of samples are channels of one image.
            found = F.conv2d(images.flatten(0, 1).unsqueeze(0), weight, padding=1, groups=weight.shape[0])
            return found.view(images.shape)

        return out + on_grid(self.merge_heads(v), grid, convolve)

    def sizes(
        self, *, batch: int, length: int, context: int | None = None, grid: tuple[int, ...] | None = None
    ) -> dict[str, float]:
        sizes = super().sizes(batch=batch, length=length, context=context, grid=grid)
        return sizes | {"Z": int(self.local is not None)}

    def extra_repr(self) -> str:
        return f"heads={self.heads}, feature_map={self.feature_map!r}"
