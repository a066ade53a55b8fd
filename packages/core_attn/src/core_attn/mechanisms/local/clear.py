"""CLEAR: attention of an image's tokens within a circle, and to all text.

"CLEAR: Conv-Like Linearization Revs Pre-Trained Diffusion Transformers Up" (S186), section 3.2, eq. 5-6.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from core_attn.contract import Growth, Pattern
from core_attn.einsums import Cascade
from core_attn.mechanisms.heads import MultiHeadMixer
from core_attn.ops import neighborhood_attention, softmax_attention
from core_attn.ops.softmax.reference import weights
from core_attn.registry import register


@register(
    name="clear",
    title="CLEAR: Conv-Like Linearization Revs Pre-Trained Diffusion Transformers Up",
    source="S186",
    year=2024,
    patterns=frozenset({Pattern.NONCAUSAL_SELF}),
    grid_ranks=frozenset({1, 2, 3}),
    time=Growth.LINEAR,
    memory=Growth.LINEAR,
    maps=True,
    double_backward=False,
    operator="neighborhood_attention",
    cascade=Cascade(
        einsums=(
            "S[b,h,l,m] = scale * Q[b,h,l,d] * K[b,h,m,d] where distance(l,m) < r or m < T",
            "top[b,h,l] = max[m] S[b,h,l,m]",
            "W[b,h,l,m] = exp(S[b,h,l,m] - top[b,h,l])",
            "sum[b,h,l] = W[b,h,l,m]",
            "Y[b,h,l,d] = W[b,h,l,m] * V[b,h,m,d]",
            "O[b,h,l,d] = Y[b,h,l,d] / sum[b,h,l]",
        ),
        passes=1,
        flops="8*B*L*C**2 + 4*B*H*(L*T + (L - T)*(T + K))*D",
        bytes="E*(2*B*L*C + 4*C**2)",
        symbols={"K": "tokens of a whole circle, at most the image's", "T": "tokens of text"},
    ),
)
class ClearAttention(MultiHeadMixer):
    """An image's token reads the tokens nearer than `radius` on the grid and all text; text reads everything.

    The circle is cut at borders, not moved inwards as in neighbourhood attention. Distances are Euclidean; like the
    official code, a token at exactly `radius` is outside.

    Args:
        dim, heads, bias: see `MultiHeadMixer`.
        causal: must be False.
        radius: r > 0; 8, 16 and 32 in the paper.
        text: T, number of tokens in front of the grid's that read and are read by all; the grid holds the other L - T.
        backend: see `core_attn.ops.neighborhood_attention`. Gradients of gradients need "reference".

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
        radius: float = 8,
        text: int = 0,
        backend: str = "auto",
    ) -> None:
        super().__init__(dim, heads=heads, causal=causal, bias=bias)
        if causal:
            raise ValueError("clear has no causal form; build it with causal=False")
        if not 0 < radius < math.inf:
            raise ValueError(f"radius must be positive and finite, got {radius}")
        if text < 0:
            raise ValueError(f"text must be at least 0, got {text}")
        self.radius, self.text = radius, text
        self.backend = backend

    def check_inputs(self, x: Tensor, *, grid: tuple[int, ...] | None = None, **options: Any) -> None:
        if x.dim() == 3 and x.shape[1] < self.text:
            raise ValueError(f"clear was built for {self.text} tokens of text, x has {x.shape[1]} tokens in all")
        # The base class knows no text: it checks the grid against the tokens of the image.
        super().check_inputs(x, **options)
        if grid is not None:
            super().check_inputs(x[:, self.text :], grid=grid)

    def circle(self, grid: Sequence[int], like: Tensor) -> tuple[tuple[int, ...], Tensor]:
        """The box around the circle that fits the grid, and (2k - 1, …) 0 inside of the circle, -inf outside."""
        reach = math.ceil(self.radius) - 1
        sizes = tuple(max(1, min(2 * reach + 1, n)) for n in grid)
        offsets = [torch.arange(1 - n, n, device=like.device) for n in sizes]
        square = torch.zeros((), device=like.device, dtype=torch.int64)
        for offset in offsets:
            square = square[..., None] + offset**2
        return sizes, torch.where(square < self.radius**2, 0.0, -math.inf).to(like.dtype)

    def side_input(
        self,
        q: Tensor,
        k: Tensor,
        *,
        x: Tensor,
        query_padding_mask: Tensor | None,
        grid: tuple[int, ...] | None,
        generator: torch.Generator | None,
    ) -> tuple[int, ...]:
        return (q.shape[2] - self.text,) if grid is None else tuple(grid)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, *, key_padding_mask: Tensor | None, aux: Any) -> Tensor:
        sizes, circle = self.circle(aux, q)
        text, image = [x[:, :, : self.text] for x in (q, k, v)], [x[:, :, self.text :] for x in (q, k, v)]
        out = neighborhood_attention(
            image[0],
            image[1],
            image[2],
            grid=aux,
            kernel_size=sizes,
            rpb=circle.expand(self.heads, *circle.shape),
            extra_k=text[1] if self.text else None,
            extra_v=text[2] if self.text else None,
            backend=self.backend,
        )
        if not self.text:
            return out
        return torch.cat([softmax_attention(text[0], k, v), out], dim=2)

    def allowed(self, grid: Sequence[int], device: torch.device) -> Tensor:
        """(L, L) bool: the query reads the key."""
        axes = [torch.arange(n, device=device) for n in grid]
        at = torch.stack([x.flatten() for x in torch.meshgrid(*axes, indexing="ij")], dim=-1)
        near = (at[:, None] - at).square().sum(dim=-1) < self.radius**2
        keep = torch.ones(self.text + len(at), self.text + len(at), dtype=torch.bool, device=device)
        keep[self.text :, self.text :] = near
        return keep

    def attention_map(self, q: Tensor, k: Tensor, *, key_padding_mask: Tensor | None, aux: Any) -> Tensor:
        precise = torch.promote_types(q.dtype, torch.float32)
        scores = q.to(precise) @ k.to(precise).mT * self.head_dim**-0.5
        return weights(scores.masked_fill(~self.allowed(aux, q.device), -math.inf))

    def sizes(
        self, *, batch: int, length: int, context: int | None = None, grid: tuple[int, ...] | None = None
    ) -> dict[str, float]:
        shape = (length - self.text,) if grid is None else grid
        reach = math.ceil(self.radius) - 1
        near = circle = 0
        for offset in itertools.product(*(range(-min(reach, n), min(reach, n) + 1) for n in shape)):
            if sum(o * o for o in offset) < self.radius**2:
                circle += 1
                near += math.prod(n - abs(o) for n, o in zip(shape, offset))
        sizes = super().sizes(batch=batch, length=length, context=context, grid=grid)
        pairs = near + self.text * (2 * length - self.text)
        return sizes | {"P": pairs, "K": min(circle, math.prod(shape)), "T": self.text}

    def extra_repr(self) -> str:
        return f"heads={self.heads}, radius={self.radius}, text={self.text}"
