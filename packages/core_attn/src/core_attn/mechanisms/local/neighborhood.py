"""The frame of the mechanisms that read neighbourhoods of a grid: the window fits itself to the grid it is given.

Shapes: B batch, H heads, L tokens of the grid, D channels of a head.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from core_attn.mechanisms.heads import MultiHeadMixer
from core_attn.ops import neighborhood_attention
from core_attn.ops.neighborhood import reference
from core_attn.ops.softmax.reference import weights


class NeighborhoodMixer(MultiHeadMixer):
    """Softmax attention over the window around each token of a grid; see `core_attn.ops.neighborhood_attention`.

    Whatever fits no grid of the call is made to fit, so that one module takes grids of any size: on each axis of n
    tokens the window shrinks to n keys, the dilation to what n leaves room for, and the stride to the window. NATTEN
    refuses such grids. Without `grid`, tokens are a line.

    Args:
        dim, heads, bias: see `MultiHeadMixer`.
        causal: a token reads no token behind itself on any axis; so none after itself in the order of the sequence.
        kernel_size: keys of the window on every axis, or one number for each.
        dilation: distance of the window's keys, likewise.
        stride: neighbouring queries that share a window, likewise; at most kernel_size.
        causal_axes: the axes on which a token reads nothing behind itself, as one bool for each; such as
            (True, False, False) for video. None where `causal` says it for all.
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
        kernel_size: int | Sequence[int] = 7,
        dilation: int | Sequence[int] = 1,
        stride: int | Sequence[int] = 1,
        causal_axes: Sequence[bool] | None = None,
        backend: str = "auto",
    ) -> None:
        super().__init__(dim, heads=heads, causal=causal, bias=bias)
        self.kernel_size = _option("kernel_size", kernel_size)
        self.dilation = _option("dilation", dilation)
        self.stride = _option("stride", stride)
        self.causal_axes = None if causal_axes is None else tuple(causal_axes)
        self.backend = backend
        given = [x for x in (self.kernel_size, self.dilation, self.stride, self.causal_axes) if isinstance(x, tuple)]
        if any(len(x) != len(given[0]) for x in given):
            raise ValueError("kernel_size, dilation, stride and causal_axes must be given for one number of axes")
        self.axes = len(given[0]) if given else None
        rank = self.axes or 1
        if any(s > k for s, k in zip(_spread(self.stride, rank), _spread(self.kernel_size, rank))):
            raise ValueError(f"stride must be at most kernel_size, got {stride} and {kernel_size}")

    def window(self, grid: Sequence[int]) -> dict[str, Any]:
        """The options of `neighborhood_attention` for this grid, made to fit."""
        if self.axes is not None and self.axes != len(grid):
            raise ValueError(
                f"{self.info.name} was built with options for {self.axes} axes; it cannot take the grid {tuple(grid)}"
            )
        rank = len(grid)
        kernel = tuple(max(1, min(k, n)) for k, n in zip(_spread(self.kernel_size, rank), grid))
        return {
            "grid": tuple(grid),
            "kernel_size": kernel,
            "dilation": tuple(max(1, min(d, n // k)) for d, n, k in zip(_spread(self.dilation, rank), grid, kernel)),
            "stride": tuple(min(s, k) for s, k in zip(_spread(self.stride, rank), kernel)),
            "causal": (self.causal,) * rank if self.causal or self.causal_axes is None else self.causal_axes,
        }

    def bias_of(self, window: dict[str, Any]) -> Tensor | None:
        """The relative positional bias (H, 2k - 1, …) of that window; None without."""
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
    ) -> dict[str, Any]:
        return self.window((q.shape[2],) if grid is None else grid)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, *, key_padding_mask: Tensor | None, aux: Any) -> Tensor:
        return neighborhood_attention(q, k, v, **aux, rpb=self.bias_of(aux), backend=self.backend)

    def attention_map(self, q: Tensor, k: Tensor, *, key_padding_mask: Tensor | None, aux: Any) -> Tensor:
        window = dict(aux)
        causal = window.pop("causal")
        scale = self.head_dim**-0.5
        rpb = self.bias_of(aux)
        return weights(reference.scores(q, k, **window, causal_axes=causal, rpb=rpb, extra_k=None, scale=scale))

    def sizes(
        self, *, batch: int, length: int, context: int | None = None, grid: tuple[int, ...] | None = None
    ) -> dict[str, float]:
        window = self.window((length,) if grid is None else grid)
        causal = window.pop("causal")
        sizes = super().sizes(batch=batch, length=length, context=context, grid=grid)
        return sizes | {"P": reference.pairs(**window, causal_axes=causal), "K": math.prod(window["kernel_size"])}

    def extra_repr(self) -> str:
        given = [f"heads={self.heads}", f"causal={self.causal_axes or self.causal}", f"kernel_size={self.kernel_size}"]
        given += [f"{name}={value}" for name in ("dilation", "stride") if (value := getattr(self, name)) != 1]
        return ", ".join(given)


def _option(name: str, value: int | Sequence[int]) -> int | tuple[int, ...]:
    values = (value,) if isinstance(value, int) else tuple(value)
    if not values or any(not isinstance(n, int) or n < 1 for n in values):
        raise ValueError(f"{name} must be a positive integer or one for each axis of the grid, got {value}")
    return value if isinstance(value, int) else values


def _spread(value: int | tuple[int, ...], rank: int) -> tuple[int, ...]:
    return (value,) * rank if isinstance(value, int) else value
