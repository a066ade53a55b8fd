"""The definition of block-sparse attention: every score is written down. O(L·M) time and memory, exact in float64."""

from __future__ import annotations

from torch import Tensor

from core_attn.dispatch import Request
from core_attn.ops.softmax import reference


def expand(blocks: Tensor, block_size: tuple[int, int], queries: int, keys: int) -> Tensor:
    """(…, nq, nk) of blocks -> (…, L, M) of single queries and keys."""
    rows, columns = block_size
    return blocks.repeat_interleave(rows, -2)[..., :queries, :].repeat_interleave(columns, -1)[..., :keys]


def run(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    blocks: Tensor,
    block_size: tuple[int, int],
    causal: bool,
    key_padding_mask: Tensor | None,
    scale: float,
) -> Tensor:
    """softmax(q kᵀ · scale) v with every block written out; `blocks` is 4-D."""
    return reference.run(
        q,
        k,
        v,
        causal=causal,
        mask=expand(blocks, block_size, q.shape[2], k.shape[2]),
        bias=None,
        key_padding_mask=key_padding_mask,
        window=None,
        scale=scale,
        dropout=0.0,
    )


def pass_over(request: Request) -> str | None:
    return "the definition, which writes every score down; for checking and reading maps"
