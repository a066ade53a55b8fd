"""Softmax attention over chosen blocks of keys, in every form this library has of it.

"FlashAttention" (S66), section 3.3: block-sparse attention. Shapes: B batch, H query heads, Hkv key heads, L queries,
M keys, D channels of a head, Dv channels of a value, nq and nk blocks of queries and keys.
"""

from __future__ import annotations

import torch
from torch import Tensor

from core_attn.dispatch import Backend, Operator
from core_attn.ops.arguments import check_qkv, default_scale, prepare_qkv
from core_attn.ops.block_sparse import blocked, reference, triton

OPERATOR = Operator(
    "block_sparse_attention",
    [
        Backend("triton", triton.run, triton.why_not, triton.pass_over),
        Backend("torch", blocked.run),
        Backend("reference", reference.run, pass_over=reference.pass_over),
    ],
)


def block_sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    blocks: Tensor,
    block_size: int | tuple[int, int] = 64,
    causal: bool = False,
    key_padding_mask: Tensor | None = None,
    scale: float | None = None,
    backend: str = "auto",
) -> Tensor:
    """softmax(q kᵀ · scale) v over the keys of the blocks that each block of queries may read.

    The queries are cut into nq = ⌈L / block⌉ blocks from the first on, the keys into nk = ⌈M / block⌉; the last may be
    shorter. With `causal`, query i stands at position i + M - L (lower right) and of the blocks it may read it reads
    the keys up to there. A query that may read no key gives zeros, with zero gradients.

    Args:
        q: (B, H, L, D), floating point.
        k: (B, Hkv, M, D); Hkv divides H, and query heads g·H/Hkv … read key head g.
        v: (B, Hkv, M, Dv).
        blocks: bool, (nq, nk), (H, nq, nk) or (B, H, nq, nk), where B and H may be 1; True = may be read. Index data:
            no gradient flows into what chose it.
        block_size: tokens of a block, or (of queries, of keys).
        causal: a query reads the keys up to its own position.
        key_padding_mask: (B, M) bool, True = real token. Keys and values under False never matter, NaN there included.
        scale: factor of the scores; 1/√D by default.
        backend: "auto", "triton", "torch" (only the blocks that are read are computed) or "reference".

    Returns:
        (B, H, L, Dv), dtype of q (under autocast, of autocast).

    Raises:
        ValueError: shapes or dtypes that do not fit; a block size below 1.
        BackendError: the backend asked for cannot run for these inputs, and why.
        UnknownNameError: no such backend.
    """
    check_qkv(q, k, v, key_padding_mask)
    size = (block_size, block_size) if isinstance(block_size, int) else tuple(block_size)
    if len(size) != 2 or min(size) < 1:
        raise ValueError(f"block_size must be a positive integer or (query, key), got {block_size}")
    if blocks.dtype is not torch.bool:
        raise ValueError(f"blocks must be boolean (True = may be read), got {blocks.dtype}")
    whole = (q.shape[0], q.shape[1], -(-q.shape[2] // size[0]), -(-k.shape[2] // size[1]))
    if blocks.dim() not in (2, 3, 4) or not all(
        n == m or (n == 1 and axis < 2)
        for axis, (n, m) in enumerate(zip((1,) * (4 - blocks.dim()) + tuple(blocks.shape), whole))
    ):
        raise ValueError(
            f"blocks must have shape (nq, nk), (H, nq, nk) or (B, H, nq, nk) with (B, H, nq, nk) = {whole}, "
            f"got {tuple(blocks.shape)}"
        )
    q, k, v = prepare_qkv(q, k, v, key_padding_mask)
    out: Tensor = OPERATOR(
        q,
        k,
        v,
        blocks=blocks[(None,) * (4 - blocks.dim())],
        block_size=size,
        causal=causal,
        key_padding_mask=key_padding_mask,
        scale=default_scale(q, scale),
        backend=backend,
    )
    return out
