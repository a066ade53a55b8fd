"""Masks of blocks that several mechanisms use, and the pairs of tokens that they stand for.

A mask is bool (…, nq, nk), True = may be read. Query blocks are named by their place among the key blocks, so that the
few queries of a decoding step ask for their own rows only.
"""

from __future__ import annotations

import torch
from torch import Tensor


def local(rows: Tensor, columns: int, left: int, right: int) -> Tensor:
    """Blocks at most `left` before or `right` after the query's: rows (nq,) -> (nq, columns)."""
    distance = torch.arange(columns, device=rows.device) - rows[:, None]
    return (distance >= -left) & (distance <= right)


def butterfly(rows: Tensor, columns: int) -> Tensor:
    """Blocks whose number differs from the query's in at most one binary digit: rows (nq,) -> (nq, columns).

    The support of the sum of all factors of a butterfly matrix, about log2(columns) + 1 blocks a row.
    """
    differing = rows[:, None] ^ torch.arange(columns, device=rows.device)
    return (differing & (differing - 1)) == 0


def count_pairs(blocks: Tensor, block: int, queries: int, keys: int, *, causal: bool) -> float:
    """Pairs of a query and a key that a head reads on average, where query i stands at position i + keys - queries.

    Args:
        blocks: (H, nq, nk) with the blocks of queries cut where those of keys are, counted from key 0.
        block: tokens of a block.
        queries, keys: L and M.
        causal: queries read keys up to their own position.
    """
    total = 0
    offset = keys - queries
    first = torch.arange(blocks.shape[-1]) * block
    for row in range(blocks.shape[-2]):
        start = max(row * block + offset // block * block, offset)
        stop = min((row + 1) * block + offset // block * block, keys)
        last = torch.arange(start, stop)[:, None] + 1 if causal else torch.full((stop - start, 1), keys)
        read = (torch.minimum(last.clamp(max=keys), first + block) - first).clamp(min=0)
        total += int((read.sum(0) * blocks[:, row].sum(0)).sum())
    return total / blocks.shape[0]
