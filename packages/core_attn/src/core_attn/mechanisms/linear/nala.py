"""NaLaFormer: linear attention whose feature map knows the norm of the query.

"Norm × Direction: Restoring the Missing Query Norm in Vision Linear Attention" (S16), section 4.
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
from core_attn.registry import register


@register(
    name="nala",
    title="Norm x Direction: Restoring the Missing Query Norm in Vision Linear Attention",
    source="S16",
    year=2025,
    patterns=frozenset({Pattern.NONCAUSAL_SELF}),
    grid_ranks=frozenset({1, 2}),
    time=Growth.LINEAR,
    memory=Growth.LINEAR,
    maps=True,
    double_backward=False,
    operator="kernel_attention",
    cascade=Cascade(
        einsums=(
            "n[b,h,l] = sqrt(Q[b,h,l,d]**2)",
            "p[b,h,l] = power * (1/2 + tanh(n[b,h,l]))",
            "P[b,h,l,f] = concat(relu(Q[b,h,l,d] / n[b,h,l]), relu(-Q[b,h,l,d] / n[b,h,l]))**p[b,h,l]",
            "R[b,h,m,f] = concat(relu(K[b,h,m,d]**3), relu(-K[b,h,m,d]**3))",
            "z[b,h,f] = R[b,h,m,f]",
            "sum[b,h,l] = P[b,h,l,f] * z[b,h,f]",
            "S[b,h,f,e] = rotated(R)[b,h,m,f] * V[b,h,m,e]",
            "Y[b,h,l,e] = rotated(P)[b,h,l,f] * S[b,h,f,e] / sum[b,h,l]",
            "N[b,l,c] = layernorm[c] (Y[b,l,c] + W[c,w] * V[b,window(l,w),c])",
            "O[b,l,c] = N[b,l,c] * silu(G[b,l,c])",
        ),
        passes=1,
        flops="10*B*L*C**2 + 8*B*H*L*D**2 + 4*B*H*L*D + 50*Z*B*L*C",
        bytes="E*(2*B*L*C + 5*C**2 + (7 + 26*Z)*C)",
        symbols={"Z": "1 with the convolution of the values, else 0"},
    ),
)
class NormAwareLinearAttention(MultiHeadMixer):
    """Linear attention in which the norm of a query makes its weights spiky, as the temperature does in softmax.

    The features of a query are the directions [relu(q / ‖q‖), relu(-q / ‖q‖)] to the power 3 (1/2 + tanh ‖q‖), those of
    a key [relu(k³), relu(-k³)]. The numerator's are turned by their place on the grid, the denominator's are not, so
    that it stays positive. To the output comes a 5 × 5 depthwise convolution of the values (LEPE), then a layer norm
    and the gate silu(W_g x). A plain sequence is an image of one row.

    Args:
        dim, heads, bias: see `MultiHeadMixer`.
        causal: must be False.
        power: λ of the queries' power λ (1/2 + tanh ‖q‖), positive; 3 in the paper.
        local: whether there is the convolution of the values.
        eps: added to the mean product of a query's features with those of the keys.
        backend: see `core_attn.ops.kernel_attention`.

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
        power: float = 3.0,
        local: bool = True,
        eps: float = 1e-6,
        backend: str = "auto",
    ) -> None:
        super().__init__(dim, heads=heads, causal=causal, bias=bias)
        if causal:
            raise ValueError("nala has no causal form; build it with causal=False")
        if power <= 0:
            raise ValueError(f"power must be positive, got {power}")
        self.power = power
        self.eps = eps
        self.backend = backend
        self.gate_proj = nn.Linear(dim, dim, bias=bias)
        self.local = nn.Conv2d(dim, dim, 5, padding=2, groups=dim) if local else None
        self.norm = nn.LayerNorm(dim)

    def features(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """(B, H, L, D), (B, H, M, D) -> their features (B, H, L, 2D), (B, H, M, 2D)."""
        norm = q.norm(dim=-1, keepdim=True)
        direction = q / norm.clamp(min=torch.finfo(q.dtype).tiny)
        power = self.power * (0.5 + norm.tanh())
        cube = k**3
        return torch.cat([direction.relu(), (-direction).relu()], -1) ** power, torch.cat(
            [cube.relu(), (-cube).relu()], -1
        )

    def turn(self, features: Tensor, grid: tuple[int, ...]) -> Tensor:
        """Both halves of the features (B, H, L, 2D) turned: half of the pairs of channels by row, half by column."""
        rows, columns = (1, *grid) if len(grid) == 1 else grid
        pairs = self.head_dim // 4
        rates = 10000.0 ** -torch.linspace(0, 1, pairs, dtype=features.dtype, device=features.device)
        at = torch.arange(rows * columns, device=features.device)
        angles = torch.cat([(at // columns)[:, None] * rates, (at % columns)[:, None] * rates], dim=-1)
        cos, sin = angles.cos(), angles.sin()
        halves = features.unflatten(-1, (2, self.head_dim)).transpose(2, 3)
        turned = halves[..., : 4 * pairs].unflatten(-1, (2 * pairs, 2))
        a, b = turned.unbind(-1)
        turned = torch.stack([a * cos - b * sin, a * sin + b * cos], dim=-1).flatten(-2)
        return torch.cat([turned, halves[..., 4 * pairs :]], dim=-1).transpose(2, 3).flatten(-2)

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
        return (q.shape[2],) if grid is None else tuple(grid)

    def _parts(self, q: Tensor, k: Tensor, grid: tuple[int, ...]) -> tuple[Tensor, Tensor, Tensor]:
        """Turned features of queries and keys, and the denominators (B, H, L, 1)."""
        precise = torch.promote_types(q.dtype, torch.float32)
        with torch.autocast(q.device.type, enabled=False):
            q_features, k_features = self.features(q.to(precise), k.to(precise))
            total = q_features @ k_features.sum(2, keepdim=True).mT + k.shape[2] * self.eps
            return self.turn(q_features, grid), self.turn(k_features, grid), total

    def attend(self, q: Tensor, k: Tensor, v: Tensor, *, key_padding_mask: Tensor | None, aux: Any) -> Tensor:
        q_features, k_features, total = self._parts(q, k, aux)
        read = ops.kernel_attention(q_features, k_features, v.to(total.dtype), normalize=False, backend=self.backend)
        assert isinstance(read, Tensor)
        return (read / total).to(v.dtype)

    def attention_map(self, q: Tensor, k: Tensor, *, key_padding_mask: Tensor | None, aux: Any) -> Tensor:
        q_features, k_features, total = self._parts(q, k, aux)
        return q_features @ k_features.mT / total

    def finish(self, out: Tensor, *, x: Tensor, v: Tensor, grid: tuple[int, ...] | None) -> Tensor:
        if self.local is not None:
            out = out + on_grid(self.merge_heads(v), grid, self.local)
        normed: Tensor = self.norm(out)
        return normed * F.silu(self.gate_proj(x))

    def sizes(
        self, *, batch: int, length: int, context: int | None = None, grid: tuple[int, ...] | None = None
    ) -> dict[str, float]:
        sizes = super().sizes(batch=batch, length=length, context=context, grid=grid)
        return sizes | {"Z": int(self.local is not None)}

    def extra_repr(self) -> str:
        return f"heads={self.heads}, power={self.power}"


def on_grid(x: Tensor, grid: tuple[int, ...] | None, convolve: Callable[[Tensor], Tensor]) -> Tensor:
    """A convolution of images (B, C, rows, columns) on tokens (B, L, C); a plain sequence is an image of one row."""
    if not x.numel():
        return x
    shape = (1, x.shape[1]) if grid is None or len(grid) == 1 else tuple(grid)
    found = convolve(x.mT.unflatten(-1, shape))
    return found.flatten(-2).mT
