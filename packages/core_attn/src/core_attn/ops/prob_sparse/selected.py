"""ProbSparse attention in O(L log L): sampled products, a few attending queries, and the mean for the rest."""

from __future__ import annotations

import torch
from torch import Tensor

from core_attn.ops.prob_sparse.reference import doubling_blocks, key_counts
from core_attn.ops.prob_sparse.sampling import budget

# With fewer keys than this many times the samples, all products as one matrix product are faster than the sampled.
_DENSE_KEYS_PER_SAMPLE = 8


def prob_sparse_selected(
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
    """As `core_attn.ops.prob_sparse_attention`."""
    length = q.shape[2]
    scale = scale or q.shape[-1] ** -0.5
    count = budget(length, factor)
    prefix = causal and selection == "causal"
    with torch.no_grad():
        measure = _measure(q, k, index, prefix)
    if prefix:
        return _by_blocks(q, k, v, measure, count, scale)
    top = measure.topk(count, dim=-1, sorted=False).indices
    context = v.cumsum(2) if causal else v.mean(2, keepdim=True).expand(-1, -1, length, -1)
    attended = _attend(_take(q, top), k, v, top if causal else None, scale)
    return context.scatter(2, _rows(top, v.shape[-1]), attended)


def _measure(q: Tensor, k: Tensor, index: Tensor, prefix: bool) -> Tensor:
    """M(q_i) = max - sum / L_K over the sampled keys: (B, H, L)."""
    if q.dtype in (torch.float16, torch.bfloat16):
        q, k = q.float(), k.float()
    keys = k.shape[2]
    few = keys <= _DENSE_KEYS_PER_SAMPLE * index.shape[1] or q.numel() == 0
    most, total = (_by_all_products if few else _by_sampled_products)(q, k, index)
    return most - total / key_counts(q.shape[2], keys, index, prefix=prefix)


def _by_all_products(q: Tensor, k: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
    """Largest and sum of the sampled products, picked from all of them: (B, H, L) each."""
    (batch, heads, length), keys = q.shape[:3], k.shape[2]
    places = (index + keys * torch.arange(length, device=q.device).unsqueeze(-1)).flatten()
    scores = (q @ k.transpose(-2, -1)).reshape(batch * heads, length * keys).index_select(1, places)
    scores = scores.view(batch, heads, *index.shape)
    return scores.amax(-1), scores.sum(-1)


def _by_sampled_products(q: Tensor, k: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
    """The same from the sampled products alone, without the (L, U, D) copy of the keys that gathering them makes."""
    length, samples = index.shape
    bags = torch.arange(length, device=q.device)
    places = index.flatten(), bags * samples, bags.repeat_interleave(samples), 0
    most, total = [], []
    # Head by head: the indices would otherwise be repeated for each.
    for queries, keys in zip(q.reshape(-1, *q.shape[2:]), k.reshape(-1, *k.shape[2:]), strict=True):
        # Products of rows by index are what embedding_bag computes for the gradient of its weights.
        products = torch.ops.aten._embedding_bag_per_sample_weights_backward(
            queries.contiguous(), keys.contiguous(), *places
        )
        scores = products.view(length, samples)
        most.append(scores.amax(-1))
        total.append(scores.sum(-1))
    return torch.stack(most).view(q.shape[:3]), torch.stack(total).view(q.shape[:3])


def _by_blocks(q: Tensor, k: Tensor, v: Tensor, measure: Tensor, count: int, scale: float) -> Tensor:
    """The selection that knows the past only; see `core_attn.ops.prob_sparse_attention`.

    A block's queries read the keys up to its end: with u queries in each block of doubling size that is O(u L).
    """
    chosen, attended, valid = [], [], []
    for start, end in doubling_blocks(q.shape[2], count):
        place = torch.arange(start, end, device=q.device)
        if start == 0:
            top = place.expand(*measure.shape[:2], end)
            active = torch.ones_like(top, dtype=torch.bool)
        else:
            threshold = measure[..., :start].topk(count, dim=-1).values[..., -1:]
            over = measure[..., start:end] > threshold
            # The first of them in time, then as many others as make up a fixed number, which are put aside below.
            late = torch.where(over, place, place + q.shape[2])
            late = late.topk(min(count, end - start), dim=-1, largest=False, sorted=False).values
            top, active = late % q.shape[2], late < q.shape[2]
        chosen.append(top)
        valid.append(active)
        attended.append(_attend(_take(q, top), k[:, :, :end], v[:, :, :end], top, scale))
    context = v.cumsum(2)
    rows = _rows(torch.cat(chosen, dim=-1), v.shape[-1])
    found = torch.where(torch.cat(valid, dim=-1).unsqueeze(-1), torch.cat(attended, dim=2), context.gather(2, rows))
    return context.scatter(2, rows, found)


def _attend(q: Tensor, k: Tensor, v: Tensor, place: Tensor | None, scale: float) -> Tensor:
    """Softmax attention of the chosen queries; with their places (B, H, u), to keys up to there."""
    scores = (q * scale) @ k.transpose(-2, -1)
    if place is not None:
        future = torch.arange(k.shape[2], device=k.device) > place.unsqueeze(-1)
        scores = scores.masked_fill(future, float("-inf"))
    return torch.softmax(scores, dim=-1) @ v


def _rows(place: Tensor, width: int) -> Tensor:
    return place.unsqueeze(-1).expand(*place.shape, width)


def _take(x: Tensor, place: Tensor) -> Tensor:
    return x.gather(2, _rows(place, x.shape[-1]))
