"""Attention over edges by products with sparse matrices.

Gathering a row of values for every edge moves E·D numbers three times and more; a product of a compressed sparse
matrix with the values reads each once where it is used and keeps the sum in registers. The gradient of the values is
the same product with the transpose, whose order is known beforehand; that of the weights is a dense product sampled at
the edges.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor

from core_attn.ops.edge.edges import Edges


def softmax(scores: Tensor, edges: Edges) -> Tensor:
    """(E,) -> (E,); plain autograd, everything of size E or N."""
    working = scores if scores.dtype is torch.float64 else scores.float()
    with torch.no_grad():
        top = working.new_full((edges.heads,), -torch.inf).scatter_reduce_(0, edges.head, working, "amax")
        top.masked_fill_(top == -torch.inf, 0.0)
    raised = (working - top[edges.head]).exp()
    total = torch.zeros_like(top).index_add(0, edges.head, raised)
    # A head without an open edge has a sum of 0 and nothing to share out.
    return (raised / total.masked_fill(total == 0, 1.0)[edges.head]).to(scores.dtype)


def weighted_sum(weights: Tensor, values: Tensor, edges: Edges) -> Tensor:
    """(E,), (M, D) -> (N, D)."""
    out: Tensor = _op(
        weights,
        values,
        edges.by_head,
        edges.head_starts,
        edges.tail_of,
        edges.by_tail,
        edges.tail_starts,
        edges.head_of,
    )
    return out


def _matrix(starts: Tensor, columns: Tensor, entries: Tensor, count: int) -> Tensor:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta", category=UserWarning)
        warnings.filterwarnings("ignore", message="Sparse invariant checks", category=UserWarning)
        return torch.sparse_csr_tensor(starts, columns, entries, (len(starts) - 1, count), check_invariants=False)


def _working(x: Tensor) -> Tensor:
    return x if x.dtype is torch.float64 else x.float()


def _product(starts: Tensor, columns: Tensor, entries: Tensor, values: Tensor) -> Tensor:
    if not len(columns) or not values.numel():
        return values.new_zeros(len(starts) - 1, values.shape[1])
    return _matrix(starts, columns, entries, len(values)) @ values.contiguous()


def _sampled(starts: Tensor, columns: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """(E,) dot products of row h of `left` and row t of `right` for every edge, in the order of the heads."""
    if len(columns) > len(left) * len(right):  # more edges than pairs, where torch's own sampling gives up
        rows = torch.repeat_interleave(starts.diff())
        return (left @ right.T)[rows, columns]
    entries = left.new_zeros(len(columns))
    if not len(columns) or not left.shape[1]:
        return entries
    # beta = 0 still reads the entries, so they must be numbers.
    matrix = _matrix(starts, columns, entries, len(right))
    return torch.sparse.sampled_addmm(matrix, left, right.T.contiguous(), beta=0.0).values()


def _forward(
    weights: Tensor,
    values: Tensor,
    by_head: Tensor,
    head_starts: Tensor,
    tail_of: Tensor,
    by_tail: Tensor,
    tail_starts: Tensor,
    head_of: Tensor,
) -> Tensor:
    with torch.autocast(values.device.type, enabled=False):
        entries = _working(weights[by_head] if len(by_head) else weights.contiguous())
        return _product(head_starts, tail_of, entries, _working(values)).to(values.dtype)


def _backward(
    dout: Tensor,
    weights_grad: bool,
    values_grad: bool,
    weights: Tensor,
    values: Tensor,
    by_head: Tensor,
    head_starts: Tensor,
    tail_of: Tensor,
    by_tail: Tensor,
    tail_starts: Tensor,
    head_of: Tensor,
) -> tuple[Tensor, Tensor]:
    dweights, dvalues = weights.new_empty(0), values.new_empty(0)
    with torch.autocast(values.device.type, enabled=False):
        dout = _working(dout).contiguous()
        if values_grad:
            entries = _working(weights[by_tail])
            dvalues = _product(tail_starts, head_of, entries, dout).to(values.dtype)
        if weights_grad:
            found = _sampled(head_starts, tail_of, dout, _working(values))
            dweights = torch.empty_like(found).index_copy_(0, by_head, found) if len(by_head) else found
            dweights = dweights.to(weights.dtype)
    return dweights, dvalues


_EDGES = "Tensor by_head, Tensor head_starts, Tensor tail_of, Tensor by_tail, Tensor tail_starts, Tensor head_of"
_op = torch.library.custom_op(
    "core_attn::edge_sum", _forward, mutates_args=(), schema=f"(Tensor weights, Tensor values, {_EDGES}) -> Tensor"
)
_backward_op = torch.library.custom_op(
    "core_attn::edge_sum_backward",
    _backward,
    mutates_args=(),
    schema="(Tensor dout, bool weights_grad, bool values_grad, Tensor weights, Tensor values, "
    f"{_EDGES}) -> (Tensor, Tensor)",
)


@_op.register_fake
def _(weights: Tensor, values: Tensor, by_head: Tensor, head_starts: Tensor, *edges: Tensor) -> Tensor:
    return values.new_empty(head_starts.shape[0] - 1, values.shape[1])


@_backward_op.register_fake
def _(
    dout: Tensor, weights_grad: bool, values_grad: bool, weights: Tensor, values: Tensor, *edges: Tensor
) -> tuple[Tensor, Tensor]:
    return (
        weights.new_empty(weights.shape if weights_grad else 0),
        values.new_empty(values.shape if values_grad else 0),
    )


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.wanted = ctx.needs_input_grad[:2]
    ctx.save_for_backward(*inputs)


def _differentiate(ctx: Any, dout: Tensor) -> tuple[Any, ...]:
    dweights, dvalues = _backward_op(dout, *ctx.wanted, *ctx.saved_tensors)
    return (dweights if ctx.wanted[0] else None, dvalues if ctx.wanted[1] else None, *[None] * 6)


def _no_second_derivative(ctx: Any, *grads: Tensor) -> None:
    raise RuntimeError(
        "the sum over edges by sparse products has no second derivative; use backend='reference' for gradients of "
        "gradients"
    )


_op.register_autograd(_differentiate, setup_context=_save)
_backward_op.register_autograd(_no_second_derivative)
