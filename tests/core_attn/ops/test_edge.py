"""Attention over the edges of a graph: sparse products are the definition, in values and gradients."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from torch import Tensor

from core_attn.ops import edge_attention, edge_softmax, edge_sum, sort_edges
from core_attn.ops.edge import Edges, csr
from core_attn.testing import growth

LIMIT = {torch.float64: 1e-12, torch.float32: 1e-5}


def graph(heads: int, tails: int, edges: int, *, seed: int = 0, in_order: bool = False) -> Edges:
    g = torch.Generator().manual_seed(seed)
    head = torch.randint(max(heads, 1), (edges,), generator=g)
    tail = torch.randint(max(tails, 1), (edges,), generator=g)
    return sort_edges(head.sort().values if in_order else head, tail, heads=heads, tails=tails)


def leaves(edges: Edges, width: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    scores = 3 * torch.randn(len(edges.head), generator=g, dtype=torch.float64)
    values = torch.randn(edges.tails, width, generator=g, dtype=torch.float64)
    return scores.to(dtype).requires_grad_(), values.to(dtype).requires_grad_()


def with_gradients(scores: Tensor, values: Tensor, edges: Edges, backend: str) -> list[Tensor]:
    out = edge_attention(scores, values, edges, backend=backend)
    # Weights that every type holds exactly.
    weight = torch.arange(out.numel(), dtype=torch.float64).cos().bfloat16().to(out.dtype).view(out.shape)
    found = torch.autograd.grad((out * weight).sum(), (scores, values))
    return [out.detach(), *found]


def exact(scores: Tensor, values: Tensor, edges: Edges) -> list[Tensor]:
    """The definition of the rounded inputs in float64."""
    return with_gradients(*(x.detach().double().requires_grad_() for x in (scores, values)), edges, "reference")


def error(a: Tensor, b: Tensor) -> float:
    """Largest difference, relative to the largest element where that is above 1."""
    a, b = a.detach().double(), b.detach().double()
    return float((a - b).abs().max() / b.abs().max().clamp(min=1.0)) if a.numel() else 0.0


@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_by_hand(backend: str) -> None:
    """Node 0 reads 1 twice and 2 once, node 2 reads itself, node 1 reads nobody."""
    edges = sort_edges(torch.tensor([0, 2, 0, 0]), torch.tensor([1, 2, 2, 1]), heads=3)
    scores = torch.tensor([1.0, 7.0, 2.0, 3.0], dtype=torch.float64)
    e = scores.exp()
    total = e[0] + e[2] + e[3]
    weights = edge_softmax(scores, edges, backend=backend)
    assert error(weights, torch.stack([e[0] / total, torch.ones_like(total), e[2] / total, e[3] / total])) < 1e-15
    values = torch.tensor([[1.0, 0.0], [0.0, 1.0], [5.0, 5.0]], dtype=torch.float64)
    out = edge_attention(scores, values, edges, backend=backend)
    first = ((e[0] + e[3]) * values[1] + e[2] * values[2]) / total
    assert error(out, torch.stack([first, torch.zeros(2, dtype=torch.float64), values[2]])) < 1e-15


@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_parallel_edges_count_one_by_one(backend: str) -> None:
    """A softmax after their scores were added, as on a matrix with an entry a pair, is another function."""
    head, tail = torch.tensor([0, 0, 0]), torch.tensor([1, 1, 2])
    scores = torch.tensor([1.0, 2.0, 0.5], dtype=torch.float64)
    edges = sort_edges(head, tail, heads=3)
    weights = edge_softmax(scores, edges, backend=backend)
    assert error(weights, scores.softmax(0)) < 1e-15
    pairs = torch.sparse_coo_tensor(torch.stack([head, tail]), scores, (3, 3), check_invariants=True)
    added = torch.sparse.softmax(pairs, dim=1).to_dense()
    ours = edge_sum(weights, torch.eye(3, dtype=torch.float64), edges, backend=backend)
    assert (ours[0] - added[0]).abs().max() > 0.05
    assert float(ours[0].sum()) == pytest.approx(1.0)


@pytest.mark.parametrize("dtype", LIMIT, ids=str)
@pytest.mark.parametrize("in_order", [True, False])
def test_forms_are_the_definition(dtype: torch.dtype, in_order: bool) -> None:
    for heads, tails, count, width in ((1, 1, 0, 3), (1, 1, 1, 1), (7, 5, 40, 3), (31, 64, 300, 17), (50, 3, 20, 4)):
        edges = graph(heads, tails, count, in_order=in_order)
        given = leaves(edges, width, dtype)
        for a, b in zip(with_gradients(*given, edges, "torch"), exact(*given, edges), strict=True):
            assert a.dtype is dtype
            assert error(a, b) < LIMIT[dtype]


def test_weights_of_every_head_sum_to_one() -> None:
    edges = graph(40, 40, 400)
    scores = 100 * torch.randn(400)  # far outside exp's range without the maximum taken off
    sums = torch.zeros(40).index_add(0, edges.head, edge_softmax(scores, edges))
    assert (sums - 1).abs().max() < 1e-5


def test_200_draws() -> None:
    """Random graphs, strides, closed edges and types: finite, and equal to the definition."""
    draw = random.Random(0)
    for turn in range(200):
        dtype = draw.choice([torch.float64, torch.float32, torch.bfloat16])
        edges = graph(
            draw.choice([1, 2, 3, 7, 31, 64]),
            draw.choice([1, 2, 5, 13, 64]),
            draw.choice([0, 1, 2, 17, 64, 150]),
            seed=turn,
            in_order=draw.random() < 0.5,
        )
        scores, values = leaves(edges, draw.choice([0, 1, 3, 8, 17]), dtype, turn)
        if draw.random() < 0.4:  # every second of a longer vector; a transposed matrix
            scores = scores.detach().repeat_interleave(2)[::2].requires_grad_()
            values = values.detach().T.contiguous().T.requires_grad_()
        if draw.random() < 0.4:  # closed edges, and sometimes all of a head
            closed = torch.rand(len(scores), generator=torch.Generator().manual_seed(turn)) < 0.5
            closed |= edges.head == 0
            scores = scores.detach().masked_fill(closed, -torch.inf).requires_grad_()
        for a, b in zip(with_gradients(scores, values, edges, "torch"), exact(scores, values, edges), strict=True):
            assert a.dtype is dtype
            assert a.isfinite().all(), turn
            # bfloat16: weights are rounded to 8 bits, and their gradients likewise before the softmax's own.
            assert error(a, b) < LIMIT.get(a.dtype, 3e-2), turn


def test_closed_heads_give_zeros_and_zero_gradients() -> None:
    edges = graph(5, 5, 30)
    scores, values = leaves(edges, 3)
    scores = scores.detach().masked_fill(edges.head == 2, -torch.inf).requires_grad_()
    out = edge_attention(scores, values, edges)
    out[2].sum().backward()
    assert (out[2] == 0).all()
    assert (scores.grad == 0).all()
    assert (values.grad == 0).all()


def test_only_the_gradient_asked_for() -> None:
    edges = graph(9, 9, 60)
    scores, values = leaves(edges, 4)
    weights = edge_softmax(scores, edges)
    full = torch.autograd.grad(edge_sum(weights, values, edges).sum(), (weights, values), retain_graph=True)
    for i, given in enumerate(((weights, values.detach()), (weights.detach(), values))):
        (alone,) = torch.autograd.grad(edge_sum(*given, edges).sum(), given[i], retain_graph=True)
        assert torch.equal(alone, full[i])


def test_gradients_by_finite_differences() -> None:
    edges = graph(4, 5, 12)
    given = leaves(edges, 2)
    torch.autograd.gradcheck(lambda s, v: edge_attention(s, v, edges), given)
    torch.autograd.gradgradcheck(lambda s, v: edge_attention(s, v, edges, backend="reference"), given)


def test_second_derivatives_are_refused() -> None:
    edges = graph(4, 5, 12)
    _, values = leaves(edges, 2)
    weights = torch.rand(12, dtype=torch.float64, requires_grad=True)
    (first,) = torch.autograd.grad(edge_sum(weights, values, edges).sum(), weights, create_graph=True)
    with pytest.raises(RuntimeError, match="backend='reference'"):
        first.sum().backward()


def test_operator_rules() -> None:
    for in_order in (True, False):
        edges = graph(6, 7, 20, in_order=in_order)
        parts = (
            edges.by_head,
            edges.head_starts,
            edges.tail_of,
            edges.by_tail,
            edges.tail_starts,
            edges.head_of,
        )
        weights, values = leaves(edges, 3, torch.float32)
        torch.library.opcheck(csr._op._opoverload, (weights, values, *parts))
        torch.library.opcheck(csr._op._opoverload, (weights.detach(), values, *parts))


def test_compiles_and_autocasts() -> None:
    edges = graph(20, 20, 90)
    scores, values = leaves(edges, 6, torch.float32)
    right = with_gradients(scores, values, edges, "torch")
    compiled: Any = torch.compile(
        lambda s, v: edge_attention(s, v, edges), backend="aot_eager", fullgraph=True, dynamic=False
    )
    out = compiled(scores, values)
    weight = torch.arange(out.numel(), dtype=torch.float64).cos().bfloat16().to(out.dtype).view(out.shape)
    found = torch.autograd.grad((out * weight).sum(), (scores, values))
    for a, b in zip([out, *found], right, strict=True):
        assert error(a, b) < 1e-6
    with torch.autocast("cpu", torch.bfloat16):
        assert error(edge_attention(scores, values, edges), right[0]) < 1e-6


def test_memory_is_linear_in_edges() -> None:
    counts = []
    for size in (2_000, 32_000):
        edges = graph(size // 20, size // 20, size, in_order=True)
        scores, values = leaves(edges, 16, torch.float32)
        counts.append(
            growth.count(lambda s=scores, v=values, e=edges: edge_attention(s, v, e).sum().backward()).peak_bytes
        )
    assert counts[1] / counts[0] < 17
    # Not a row of values for every edge.
    assert counts[1] < 32_000 * 16 * 4


def test_sorting_keeps_the_order_of_equals() -> None:
    edges = sort_edges(torch.tensor([2, 0, 2, 1]), torch.tensor([1, 1, 0, 1]), heads=3, tails=2)
    assert edges.by_head.tolist() == [1, 3, 0, 2]
    assert edges.head_starts.tolist() == [0, 1, 2, 4]
    assert edges.tail_of.tolist() == [1, 1, 1, 0]
    assert edges.by_tail.tolist() == [2, 0, 1, 3]
    assert edges.tail_starts.tolist() == [0, 1, 4]
    assert edges.head_of.tolist() == [2, 2, 0, 1]
    assert sort_edges(torch.tensor([0, 1]), torch.tensor([1, 0]), heads=2).by_head.numel() == 0
    assert edges.to("cpu").heads == 3


EDGES = graph(3, 4, 5)


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: sort_edges(torch.zeros(2).long(), torch.zeros(3).long(), heads=1), r"shape \(E,\)"),
        (lambda: sort_edges(torch.zeros(2), torch.zeros(2).long(), heads=1), "head must hold integers"),
        (lambda: sort_edges(torch.tensor([3]), torch.tensor([0]), heads=3), "head must hold numbers of nodes from 0"),
        (lambda: sort_edges(torch.tensor([0]), torch.tensor([-1]), heads=3), "tail must hold numbers of nodes"),
        (lambda: edge_softmax(torch.zeros(4), EDGES), r"scores must have shape \(E,\) with E = 5"),
        (lambda: edge_softmax(torch.zeros(5).long(), EDGES), "scores must be floating point"),
        (lambda: edge_sum(torch.zeros(5), torch.zeros(3, 2), EDGES), r"\(M, D\) with M = 4"),
        (lambda: edge_sum(torch.zeros(5), torch.zeros(4, 2).double(), EDGES), "one dtype"),
        (lambda: edge_sum(torch.zeros(5, device="meta"), torch.zeros(4, 2), EDGES), "one device"),
        (lambda: edge_sum(torch.zeros(5), torch.zeros(4, 2), EDGES, backend="fast"), "backend"),
    ],
)
def test_errors(call: Any, says: str) -> None:
    with pytest.raises(ValueError, match=says) as caught:
        call()
    assert "\n" not in str(caught.value)
