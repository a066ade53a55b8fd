"""Exact softmax attention over sequences of different lengths packed one after the other, without padding.

Shapes: T queries of all sequences together, S keys, H query heads, Hkv key heads, D channels of a head, Dv of a value.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor

from core_attn.dispatch import Backend, Operator, Request
from core_attn.ops.arguments import autocast_dtype, check_dtypes
from core_attn.ops.packed import longest_sequence
from core_attn.ops.softmax import blocked, reference, triton


def _one_by_one(form: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """A form of attention over (B, H, L, D), run on one sequence after the other."""

    def run(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        offsets_q: Tensor,
        offsets_k: Tensor,
        longest: tuple[int, int],
        causal: bool,
        window: tuple[int | None, int | None] | None,
        scale: float,
    ) -> Tensor:
        queries, keys = ([b - a for a, b in pairwise(x.tolist())] for x in (offsets_q, offsets_k))
        # Split, not slices: the gradient of a slice is as large as the whole.
        parts = (x.transpose(0, 1).split(n, dim=1) for x, n in ((q, queries), (k, keys), (v, keys)))
        outs = [
            form(
                *(part.unsqueeze(0) for part in one),
                causal=causal,
                mask=None,
                bias=None,
                key_padding_mask=None,
                window=window,
                scale=scale,
                dropout=0.0,
            ).squeeze(0)
            for one in zip(*parts)
        ]
        return torch.cat(outs, dim=1).transpose(0, 1)

    return run


def _triton_passed_over(request: Request) -> str | None:
    return None if request.device == "cuda" else "the interpreter is for tests"


OPERATOR = Operator(
    "softmax_attention_varlen",
    [
        Backend("triton", triton.run_varlen, triton.why_not, _triton_passed_over),
        Backend("torch", _one_by_one(blocked.run)),
        Backend("reference", _one_by_one(reference.run), pass_over=reference.pass_over),
    ],
)


def softmax_attention_varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    offsets_q: Tensor,
    offsets_k: Tensor,
    causal: bool = False,
    window: int | tuple[int | None, int | None] | None = None,
    scale: float | None = None,
    backend: str = "auto",
) -> Tensor:
    """softmax(q kᵀ · scale) v within each of N packed sequences; nothing is read across their borders.

    Sequence n has the queries offsets_q[n] … offsets_q[n + 1] - 1 and the keys offsets_k[n] … offsets_k[n + 1] - 1; it
    may have none of either. Within it everything is as `softmax_attention` has it: with L queries and M keys,
    query i stands at position i + M - L, and a query that may read no key gives zeros with zero gradients.

    Args:
        q: (T, H, D), floating point.
        k: (S, Hkv, D); Hkv divides H.
        v: (S, Hkv, Dv).
        offsets_q: (N + 1,) int32 or int64: 0, then where each sequence ends; the last is T. They are read by the host,
            which on a GPU waits for it once a call.
        offsets_k: (N + 1,) likewise; the last is S.
        causal: a query reads the keys up to its own position.
        window: as in `softmax_attention`.
        scale: factor of the scores; 1/√D by default.
        backend: "auto", "triton", "torch" (a loop of the blocked form) or "reference".

    Returns:
        (T, H, Dv), dtype of q (under autocast, of autocast).

    Raises:
        ValueError: shapes, dtypes or offsets that do not fit; a window out of range.
        BackendError: the backend asked for cannot run for these inputs, and why.
        UnknownNameError: no such backend.
    """
    from core_attn.ops.softmax import span

    if q.dim() != 3 or k.dim() != 3 or v.dim() != 3 or k.shape[:2] != v.shape[:2] or q.shape[2] != k.shape[2]:
        shapes = f"{tuple(q.shape)}, {tuple(k.shape)}, {tuple(v.shape)}"
        raise ValueError(f"packed q, k and v must have shapes (T, H, D), (S, Hkv, D) and (S, Hkv, Dv), got {shapes}")
    if k.shape[1] == 0 or q.shape[1] % k.shape[1]:
        raise ValueError(f"the {k.shape[1]} heads of k and v must divide the {q.shape[1]} heads of q")
    check_dtypes(q=q, k=k, v=v)
    longest = (
        longest_sequence("offsets_q", offsets_q, q.shape[0]),
        longest_sequence("offsets_k", offsets_k, k.shape[0]),
    )
    if offsets_q.shape != offsets_k.shape:
        raise ValueError(
            f"offsets_q and offsets_k must name as many sequences, got {len(offsets_q) - 1} and {len(offsets_k) - 1}"
        )
    q, k, v = autocast_dtype(q, k, v)
    out: Tensor = OPERATOR(
        q,
        k,
        v,
        offsets_q=offsets_q.to(q.device),
        offsets_k=offsets_k.to(q.device),
        longest=longest,
        causal=causal,
        window=span(window, causal=causal),
        scale=q.shape[-1] ** -0.5 if scale is None and q.shape[-1] else 1.0 if scale is None else scale,
        backend=backend,
    )
    return out
