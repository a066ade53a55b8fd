"""Attention over the edges of a graph: every node reads the nodes its edges lead to, and no others.

Shapes: N heads (the nodes that read), M tails (the nodes that are read), E edges, D channels. An edge counts for
itself: two edges between the same two nodes (say, of different relations) have a score and a weight each. Sparse
softmaxes on a matrix that was made one entry a pair add the two scores first, which is another function.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from core_attn.dispatch import Backend, Operator
from core_attn.naming import unknown
from core_attn.ops.edge import csr, reference
from core_attn.ops.edge.edges import Edges, sort_edges

__all__ = ["Edges", "edge_attention", "edge_softmax", "edge_sum", "sort_edges"]


class _OverEdges(Operator):
    """`Operator` for tensors that are no q, k and v."""

    def __call__(self, *args: Any, backend: str = "auto", **options: Any) -> Tensor:
        named = {b.name: b for b in self.backends}
        if backend != "auto" and backend not in named:
            raise unknown(f"backend of {self.name}", backend, ["auto", *named])
        out: Tensor = named["torch" if backend == "auto" else backend].run(*args, **options)
        return out


SOFTMAX = _OverEdges("edge_softmax", [Backend("torch", csr.softmax), Backend("reference", reference.softmax)])
SUM = _OverEdges("edge_sum", [Backend("torch", csr.weighted_sum), Backend("reference", reference.weighted_sum)])


def edge_softmax(scores: Tensor, edges: Edges, *, backend: str = "auto") -> Tensor:
    """Softmax of the scores of each head's edges: "KGAT" (S32), eq. (5).

    Args:
        scores: (E,), floating point, in the order in which `sort_edges` was given the edges; -inf closes an edge.
        edges: from `sort_edges`.
        backend: "auto", "torch" or "reference".

    Returns:
        (E,) weights, dtype of the scores; of every head with an open edge they sum to one. Half precision is computed
        in float32.

    Raises:
        ValueError: shapes or dtypes that do not fit.
        UnknownNameError: no such backend.
    """
    _check_per_edge("scores", scores, edges)
    return SOFTMAX(scores, edges, backend=backend)


def edge_sum(weights: Tensor, values: Tensor, edges: Edges, *, backend: str = "auto") -> Tensor:
    """out_h = sum over the edges from h of weight · values[tail]: "KGAT" (S32), eq. (3).

    Args:
        weights: (E,), floating point, in the order in which `sort_edges` was given the edges.
        values: (M, D), dtype of the weights.
        edges: from `sort_edges`.
        backend: "auto", "torch" (products with sparse matrices, forward and backward; memory O(E + (N + M)·D)) or
            "reference".

    Returns:
        (N, D), zeros for heads without edges. Half precision is summed in float32.

    Raises:
        ValueError: shapes or dtypes that do not fit.
        UnknownNameError: no such backend.
    """
    _check_per_edge("weights", weights, edges)
    if values.dim() != 2 or values.shape[0] != edges.tails:
        raise ValueError(f"values must have shape (M, D) with M = {edges.tails} tails, got {tuple(values.shape)}")
    if values.dtype != weights.dtype:
        raise ValueError(f"weights and values must have one dtype, got {weights.dtype} and {values.dtype}")
    return SUM(weights, values, edges, backend=backend)


def edge_attention(scores: Tensor, values: Tensor, edges: Edges, *, backend: str = "auto") -> Tensor:
    """Softmax of the scores of each head's edges, then the sum of the tails' values with these weights.

    `edge_sum(edge_softmax(scores, edges), values, edges)`, whose arguments, result and errors it has.
    """
    return edge_sum(edge_softmax(scores, edges, backend=backend).to(values.dtype), values, edges, backend=backend)


def _check_per_edge(name: str, given: Tensor, edges: Edges) -> None:
    if given.dim() != 1 or given.shape[0] != len(edges.head):
        raise ValueError(f"{name} must have shape (E,) with E = {len(edges.head)} edges, got {tuple(given.shape)}")
    if not given.is_floating_point():
        raise ValueError(f"{name} must be floating point, got {given.dtype}")
    if given.device != edges.head.device:
        raise ValueError(f"{name} and edges must be on one device, got {given.device} and {edges.head.device}")
