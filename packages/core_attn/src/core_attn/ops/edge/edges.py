"""The edges of a graph, sorted once by head and once by tail."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

_MOST = 2**31 - 1


class Edges(NamedTuple):
    """Edges as sparse products need them; made by `sort_edges`.

    Attributes:
        head, tail: (E,) int64, as given.
        heads, tails: numbers N and M of nodes.
        by_head: (E,) int64, the edges in the order of their heads; empty where they were given so.
        head_starts, tail_of: (N + 1,) and (E,) int32, rows and columns of the (N, M) matrix of edges.
        by_tail: (E,) int64, the edges in the order of their tails.
        tail_starts, head_of: (M + 1,) and (E,) int32, rows and columns of its transpose.
    """

    head: Tensor
    tail: Tensor
    heads: int
    tails: int
    by_head: Tensor
    head_starts: Tensor
    tail_of: Tensor
    by_tail: Tensor
    tail_starts: Tensor
    head_of: Tensor

    def to(self, device: torch.device | str) -> Edges:
        """The same edges on another device."""
        moved: dict[str, Any] = {name: x.to(device) for name, x in self.tensors().items()}
        return self._replace(**moved)

    def tensors(self) -> dict[str, Tensor]:
        """Its tensors by name."""
        return {name: x for name, x in self._asdict().items() if isinstance(x, Tensor)}


def sort_edges(head: Tensor, tail: Tensor, *, heads: int, tails: int | None = None) -> Edges:
    """Edges from nodes that read to nodes that are read.

    Args:
        head: (E,) integers in [0, heads).
        tail: (E,) integers in [0, tails). The same pair may come several times.
        heads: number N of nodes that read.
        tails: number M of nodes that are read; None = N, the nodes of one graph.

    Raises:
        ValueError: shapes that differ, or numbers outside their range.
    """
    tails = heads if tails is None else tails
    if head.dim() != 1 or head.shape != tail.shape:
        raise ValueError(f"head and tail must both have shape (E,), got {tuple(head.shape)} and {tuple(tail.shape)}")
    for name, nodes, count in (("head", head, heads), ("tail", tail, tails)):
        if nodes.is_floating_point() or nodes.is_complex() or nodes.dtype is torch.bool:
            raise ValueError(f"{name} must hold integers, got {nodes.dtype}")
        if len(nodes) and not 0 <= int(nodes.min()) <= int(nodes.max()) < count:
            raise ValueError(
                f"{name} must hold numbers of nodes from 0 to {count - 1}, got {int(nodes.min())} to {int(nodes.max())}"
            )
    if max(len(head), heads, tails) > _MOST:
        raise ValueError(f"a graph may have up to {_MOST} nodes and edges")
    head, tail = head.long(), tail.long()
    sorted_already = bool((head[1:] >= head[:-1]).all())
    by_head = head.new_empty(0) if sorted_already else torch.argsort(head, stable=True)
    by_tail = torch.argsort(tail, stable=True)
    return Edges(
        head,
        tail,
        heads,
        tails,
        by_head,
        _starts(head, heads),
        (tail if sorted_already else tail[by_head]).int(),
        by_tail,
        _starts(tail, tails),
        head[by_tail].int(),
    )


def _starts(nodes: Tensor, count: int) -> Tensor:
    starts = torch.zeros(count + 1, dtype=torch.int32, device=nodes.device)
    starts[1:] = torch.bincount(nodes, minlength=count).cumsum(0)
    return starts
