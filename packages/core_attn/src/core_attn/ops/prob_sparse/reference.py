"""ProbSparse attention by its definition: all scores, a map of attending and of lazy rows, and one product.

Informer: Beyond Efficient Transformer for Long Sequence Time-Series Forecasting (S83), section 3.1.
"""

from __future__ import annotations

import torch
from torch import Tensor

from core_attn.ops.prob_sparse.sampling import budget


def sparsity_measure(scores: Tensor, index: Tensor, *, prefix: bool = False) -> Tensor:
    """M(q_i) = max - sum / L_K over the sampled keys, eq. (4) as the paper's code estimates it: (B, H, L).

    Args:
        scores: (B, H, L, M) products q k, not scaled.
        index: (L, U) sampled keys.
        prefix: L_K of query i is the number of keys it sees, i + 1 (but no less than the number of samples).
    """
    length, keys = scores.shape[-2:]
    sampled = scores.gather(-1, index.expand(*scores.shape[:2], *index.shape))
    return sampled.amax(-1) - sampled.sum(-1) / key_counts(length, keys, index, prefix=prefix)


def key_counts(length: int, keys: int, index: Tensor, *, prefix: bool) -> Tensor:
    """L_K for every query: (L,)."""
    if not prefix:
        return torch.full((length,), keys, device=index.device)
    return torch.arange(1, length + 1, device=index.device).clamp(min=index.shape[-1])


def doubling_blocks(length: int, first: int) -> list[tuple[int, int]]:
    """[0, u), [u, 2u), [2u, 4u), ... up to L."""
    blocks, start, end = [], 0, first
    while start < length:
        blocks.append((start, min(end, length)))
        start, end = end, 2 * end
    return blocks


def active_queries(measure: Tensor, count: int, *, prefix: bool) -> Tensor:
    """(B, H, L) bool: the queries that attend."""
    if not prefix:
        top = measure.topk(count, dim=-1).indices
        return torch.zeros_like(measure, dtype=torch.bool).scatter(-1, top, True)
    active = torch.zeros_like(measure, dtype=torch.bool)
    for start, end in doubling_blocks(measure.shape[-1], count):
        for i in range(start, end):
            if start == 0:
                active[..., i] = True
                continue
            threshold = measure[..., :start].sort(-1, descending=True).values[..., count - 1]
            room = active[..., start:i].sum(-1) < count
            active[..., i] = (measure[..., i] > threshold) & room
    return active


def prob_sparse_map(
    q: Tensor,
    k: Tensor,
    *,
    index: Tensor,
    causal: bool = False,
    factor: int = 5,
    selection: str = "causal",
    scale: float | None = None,
) -> Tensor:
    """(B, H, L, M) matrix A with `prob_sparse_attention(q, k, v, index=index) = A @ v`."""
    length, keys = q.shape[-2], k.shape[-2]
    prefix = causal and selection == "causal"
    # In half precision, rounded scores would tie, and the ranking would depend on the order of ties.
    exact = torch.promote_types(q.dtype, torch.float32)
    scores = q.to(exact) @ k.to(exact).transpose(-2, -1)
    seen = torch.ones(length, keys, dtype=torch.bool, device=q.device)
    seen = seen.tril() if causal else seen
    # A query that does not attend reads the mean of the values or, causally, their sum so far.
    lazy = seen.to(exact) if causal else seen.to(exact) / keys
    with torch.no_grad():
        measure = sparsity_measure(scores, index, prefix=prefix)
        active = active_queries(measure, budget(length, factor), prefix=prefix)
    weights = torch.softmax((scores * (scale or q.shape[-1] ** -0.5)).masked_fill(~seen, float("-inf")), dim=-1)
    return torch.where(active.unsqueeze(-1), weights, lazy).to(q.dtype)


def prob_sparse_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    index: Tensor,
    causal: bool = False,
    factor: int = 5,
    selection: str = "causal",
    scale: float | None = None,
) -> Tensor:
    """As `core_attn.ops.prob_sparse_attention`, O(L M)."""
    return prob_sparse_map(q, k, index=index, causal=causal, factor=factor, selection=selection, scale=scale) @ v
