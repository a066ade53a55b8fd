"""Attention over edges by its definition: head by head, and a dense matrix of weights."""

from __future__ import annotations

import torch
from torch import Tensor

from core_attn.ops.edge.edges import Edges


def softmax(scores: Tensor, edges: Edges) -> Tensor:
    """(E,) -> (E,): each head's open edges by themselves."""
    working = scores if scores.dtype is torch.float64 else scores.float()
    open_edges = scores > -torch.inf
    weights = working.masked_fill(torch.ones_like(open_edges), 0.0)
    for head in edges.head.unique():
        own = (edges.head == head) & open_edges
        weights = weights.masked_scatter(own, working[own].softmax(dim=0))
    return weights.to(scores.dtype)


def weighted_sum(weights: Tensor, values: Tensor, edges: Edges) -> Tensor:
    """(E,), (M, D) -> (N, D)."""
    dtype = torch.float64 if values.dtype is torch.float64 else torch.float32
    matrix = torch.zeros(edges.heads, edges.tails, dtype=dtype, device=values.device)
    matrix = matrix.index_put((edges.head, edges.tail), weights.to(dtype), accumulate=True)
    return (matrix @ values.to(dtype)).to(values.dtype)
