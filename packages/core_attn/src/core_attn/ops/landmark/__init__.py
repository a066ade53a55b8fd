"""Landmark attention: how much of a block is read is decided by its landmark, in every form this library has of it.

Shapes: B batch, H query heads, Hkv key heads, L queries, M keys, D channels of a head, Dv channels of a value, nb
blocks of keys.
"""

from __future__ import annotations

from torch import Tensor

from core_attn.dispatch import Backend, Operator
from core_attn.ops.arguments import check_qkv, default_scale, prepare_qkv
from core_attn.ops.landmark import blocked, reference

OPERATOR = Operator(
    "landmark_attention",
    [
        Backend("torch", blocked.run),
        Backend("reference", reference.run, pass_over=reference.pass_over),
    ],
)


def landmark_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    landmarks: Tensor,
    block_size: int,
    causal: bool = False,
    top: int | None = None,
    key_padding_mask: Tensor | None = None,
    scale: float | None = None,
    backend: str = "auto",
) -> Tensor:
    """Softmax over the own block's tokens and the other blocks' landmarks; a landmark's share goes to its block.

    "Random-Access Infinite Context Length for Transformers" (S124), section 3.1: grouped softmax. The keys are cut into
    nb = ⌈M / block_size⌉ blocks. Query i stands at position i + M - L and reads the tokens of the block around it
    directly. A token of another block gets P(landmark) · P(token), the first from the softmax over the own tokens and
    all the landmarks, the second from a softmax within its block. With `causal` the query reads its own block up to its
    position, and the blocks before it. A query that may read nothing gives zeros, with zero gradients.

    Args:
        q: (B, H, L, D), floating point.
        k: (B, Hkv, M, D); Hkv divides H, and query heads g·H/Hkv … read key head g.
        v: (B, Hkv, M, Dv).
        landmarks: (B, Hkv, nb, D), the landmarks' keys; differentiable.
        block_size: keys of a block; the last block may be shorter.
        causal: see above.
        top: each query reads only so many other blocks, those with the largest landmark scores; all by default.
        key_padding_mask: (B, M) bool, True = may be read. Keys and values under False never matter, NaN there included;
            a block without any key has no landmark.
        scale: factor of the scores; 1/√D by default.
        backend: "auto", "torch" (memory linear in L and M) or "reference".

    Returns:
        (B, H, L, Dv), dtype of q (under autocast, of autocast).

    Raises:
        ValueError: shapes or dtypes that do not fit; a block size or a number of blocks out of range.
        BackendError: the backend asked for cannot run for these inputs, and why.
        UnknownNameError: no such backend.
    """
    check_qkv(q, k, v, key_padding_mask)
    if block_size < 1:
        raise ValueError(f"block_size must be a positive integer, got {block_size}")
    if top is not None and top < 0:
        raise ValueError(f"top must be at least 0, or None for all blocks, got {top}")
    whole = (*k.shape[:2], -(-k.shape[2] // block_size), k.shape[3])
    if landmarks.shape != whole or landmarks.dtype != k.dtype:
        raise ValueError(
            f"landmarks must have shape (B, Hkv, nb, D) = {whole} and dtype {k.dtype}, "
            f"got {tuple(landmarks.shape)} and {landmarks.dtype}"
        )
    q, k, v = prepare_qkv(q, k, v, key_padding_mask)
    shared = q.shape[1] // k.shape[1] if k.shape[1] else 1
    k, v, landmarks = (x.repeat_interleave(shared, 1) if shared > 1 else x for x in (k, v, landmarks.to(k.dtype)))
    out: Tensor = OPERATOR(
        q,
        k,
        v,
        landmarks=landmarks,
        block_size=block_size,
        causal=causal,
        top=top,
        key_padding_mask=key_padding_mask,
        scale=default_scale(q, scale),
        backend=backend,
    )
    return out
