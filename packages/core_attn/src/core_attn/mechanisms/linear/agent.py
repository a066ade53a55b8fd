"""Agent attention as a token mixer, with the agents pooled from the queries.

"Agent Attention: On the Integration of Softmax and Linear Attention" (S183), section 3.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from core_attn import ops
from core_attn.contract import Growth, Pattern
from core_attn.einsums import Cascade
from core_attn.mechanisms.heads import MultiHeadMixer
from core_attn.mechanisms.linear.nala import on_grid
from core_attn.ops.agent import agent_map
from core_attn.registry import register

# Sides of the small tables of biases, which are stretched to the grid.
_TABLE = 7


@register(
    name="agent",
    title="Agent Attention: On the Integration of Softmax and Linear Attention",
    source="S183",
    year=2023,
    patterns=frozenset({Pattern.NONCAUSAL_SELF}),
    grid_ranks=frozenset({1, 2}),
    time=Growth.LINEAR,
    memory=Growth.LINEAR,
    maps=True,
    operator="agent_attention",
    cascade=Cascade(
        einsums=(
            "A[b,h,n,d] = mean[l in patch(n)] Q[b,h,l,d]",
            "S[b,h,n,m] = scale * A[b,h,n,d] * K[b,h,m,d] + B1[h,n,m]",
            "R[b,h,n,e] = softmax[m] S[b,h,n,m] * V[b,h,m,e]",
            "T[b,h,l,n] = scale * Q[b,h,l,d] * A[b,h,n,d] + B2[h,l,n]",
            "Y[b,h,l,e] = softmax[n] T[b,h,l,n] * R[b,h,n,e]",
            "O[b,l,c] = Y[b,l,c] + W[c,w] * V[b,window(l,w),c]",
        ),
        # The softmax over the keys: largest score, sum, weighted sum.
        passes=3,
        flops="8*B*L*C**2 + 8*B*H*L*N*D + 18*Z*B*L*C",
        bytes="E*(2*B*L*C + 4*C**2 + 10*Z*C + H*N*(98 + 4*W))",
        symbols={
            "N": "agents",
            "W": "entries of the tables of biases of rows and of columns",
            "Z": "1 with the convolution of the values, else 0",
        },
    ),
)
class AgentAttention(MultiHeadMixer):
    """A few agents, means of the queries of a patch, read all tokens; the queries read the agents: O(L·N) for N agents.

    softmax(q Aᵀ/√D + B2) softmax(A kᵀ/√D + B1) v, plus a 3 × 3 depthwise convolution of the values (eq. 5-6). B1 and B2
    are learned for each agent: a 7 × 7 table stretched to the grid, and a table of rows and one of columns of `window`
    entries, which are stretched where the grid has another number of them. A plain sequence is an image of one row, and
    its agents are means of N pieces of it.

    Args:
        dim, heads, bias: see `MultiHeadMixer`.
        causal: must be False.
        agents: N, the square of an integer; 49 in the paper for images.
        window: entries of the tables of rows and columns: the side of the images that they are made for, 14 in the
            paper.
        local: whether there is the convolution of the values.
        backend: see `core_attn.ops.agent_attention`.

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
        agents: int = 49,
        window: int = 14,
        local: bool = True,
        backend: str = "auto",
    ) -> None:
        super().__init__(dim, heads=heads, causal=causal, bias=bias)
        if causal:
            raise ValueError("agent has no causal form; build it with causal=False")
        if agents < 1 or math.isqrt(agents) ** 2 != agents:
            raise ValueError(f"agents must be the square of a positive integer, got {agents}")
        if window < 1:
            raise ValueError(f"window must be a positive integer, got {window}")
        self.agents = agents
        self.window = window
        self.backend = backend
        self.local = nn.Conv2d(dim, dim, 3, padding=1, groups=dim) if local else None
        self.key_table, self.query_table = (_table(heads, agents, _TABLE, _TABLE) for _ in range(2))
        self.key_rows, self.query_rows = (_table(heads, agents, window, 1) for _ in range(2))
        self.key_columns, self.query_columns = (_table(heads, agents, 1, window) for _ in range(2))

    def pool(self, q: Tensor, grid: tuple[int, ...]) -> Tensor:
        """(B, H, L, D) -> agents (B, H, N, D)."""
        if not q.numel():
            return q.new_zeros(*q.shape[:2], self.agents, q.shape[3])
        images = q.mT.flatten(0, 1)
        if len(grid) == 1:
            pooled = F.adaptive_avg_pool1d(images, self.agents)
        else:
            side = math.isqrt(self.agents)
            pooled = F.adaptive_avg_pool2d(images.unflatten(-1, grid), side).flatten(-2)
        return pooled.mT.unflatten(0, q.shape[:2])

    def biases(self, grid: tuple[int, ...]) -> tuple[Tensor, Tensor]:
        """B1 (H, N, L) of agents that read keys, and B2 (H, L, N) of queries that read agents."""
        shape = (1, *grid) if len(grid) == 1 else grid
        found = []
        for table, rows, columns in (
            (self.key_table, self.key_rows, self.key_columns),
            (self.query_table, self.query_rows, self.query_columns),
        ):
            lines = _stretch(rows, (shape[0], 1)) + _stretch(columns, (1, shape[1]))
            found.append((_stretch(table, shape) + lines).flatten(-2))
        return found[0], found[1].mT

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

    def attend(self, q: Tensor, k: Tensor, v: Tensor, *, key_padding_mask: Tensor | None, aux: Any) -> Tensor:
        key_bias, query_bias = self.biases(aux)
        return ops.agent_attention(
            q, k, v, agents=self.pool(q, aux), query_bias=query_bias, key_bias=key_bias, backend=self.backend
        )  # type: ignore[no-any-return]

    def attention_map(self, q: Tensor, k: Tensor, *, key_padding_mask: Tensor | None, aux: Any) -> Tensor:
        key_bias, query_bias = self.biases(aux)
        scale = self.head_dim**-0.5
        return agent_map(q, k, self.pool(q, aux), query_bias=query_bias, key_bias=key_bias, scale=scale)

    def finish(self, out: Tensor, *, x: Tensor, v: Tensor, grid: tuple[int, ...] | None) -> Tensor:
        return out if self.local is None else out + on_grid(self.merge_heads(v), grid, self.local)

    def sizes(
        self, *, batch: int, length: int, context: int | None = None, grid: tuple[int, ...] | None = None
    ) -> dict[str, float]:
        sizes = super().sizes(batch=batch, length=length, context=context, grid=grid)
        return sizes | {"N": self.agents, "W": self.window, "Z": int(self.local is not None)}

    def extra_repr(self) -> str:
        return f"heads={self.heads}, agents={self.agents}, window={self.window}"


def _table(*shape: int) -> nn.Parameter:
    return nn.Parameter(nn.init.trunc_normal_(torch.empty(shape), std=0.02, a=-2.0, b=2.0))


def _stretch(table: Tensor, shape: tuple[int, ...]) -> Tensor:
    """(H, N, rows, columns) interpolated to another shape."""
    if table.shape[-2:] == shape:
        return table
    return F.interpolate(table, size=shape, mode="bilinear")
