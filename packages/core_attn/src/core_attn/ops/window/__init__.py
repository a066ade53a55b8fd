"""Sliding-window softmax attention, with dilation, sinks and global tokens, in every form this library has of it.

The window, its dilation and the global tokens are those of "Longformer: The Long-Document Transformer" (2020), section
3.1; sinks are those of "Efficient Streaming Language Models with Attention Sinks" (S27), section 3.2. Shapes: B batch,
H query heads, Hkv key heads, L queries, M keys, D channels of a head, Dv channels of a value.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from core_attn.dispatch import Backend, Operator, Request
from core_attn.ops import softmax
from core_attn.ops.arguments import check_qkv, default_scale, prepare_qkv
from core_attn.ops.window import blocked, reference

_OWN = {"torch": blocked.run, "reference": reference.run}


def _more_than_a_band(dilation: int, sinks: int, global_tokens: int) -> bool:
    return dilation > 1 or sinks > 0 or global_tokens > 0


def _backend(plain: Backend) -> Backend:
    """A form of softmax attention, which computes the band alone, and our own of that name, which does the rest."""
    own = _OWN.get(plain.name)

    def run(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        dilation: int,
        sinks: int,
        global_tokens: int,
        sink_q: Tensor | None,
        **options: Any,
    ) -> Tensor:
        if own is not None and _more_than_a_band(dilation, sinks, global_tokens):
            return own(q, k, v, dilation=dilation, sinks=sinks, global_tokens=global_tokens, sink_q=sink_q, **options)
        out: Tensor = plain.run(q, k, v, mask=None, bias=None, dropout=0.0, **options)
        return out

    def more(request: Request) -> bool:
        options = request.options or {}
        return _more_than_a_band(options.get("dilation", 1), options.get("sinks", 0), options.get("global_tokens", 0))

    def why_not(request: Request) -> str | None:
        if more(request):
            return None if own is not None else "it computes windows without dilation, sinks and global tokens only"
        return plain.why_not(request._replace(options=None))

    def pass_over(request: Request) -> str | None:
        if more(request):
            return softmax.reference.pass_over(request) if plain.name == "reference" else None
        return plain.pass_over(request._replace(options=None))

    return Backend(plain.name, run, why_not, pass_over)


OPERATOR = Operator("window_attention", [_backend(b) for b in softmax.OPERATOR.backends])


def window_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    window: int | tuple[int | None, int | None] | None,
    causal: bool = False,
    dilation: int = 1,
    sinks: int = 0,
    global_tokens: int = 0,
    key_padding_mask: Tensor | None = None,
    scale: float | None = None,
    sink_q: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """softmax(q kᵀ · scale) v over a window around each query, the sinks and the global tokens, in one softmax.

    Query i stands at position i + M - L, so that the last query is aligned with the last key (lower right). A query
    that may read no key at all gives zeros, with zero gradients. Time O(L·w) and memory O(L).

    Args:
        q: (B, H, L, D), floating point.
        k: (B, Hkv, M, D); Hkv divides H, and query heads g·H/Hkv … read key head g.
        v: (B, Hkv, M, Dv).
        window: w reads the keys nearer than w steps (itself and w - 1 on each side, with `causal` w - 1 before);
            (left, right) reads that many keys on each side besides itself, None = all. Padding counts as positions.
        causal: a query reads the keys up to its own position, sinks and global tokens included.
        dilation: step of the window, at least 1: with 3 it holds the keys 0, 3, 6, … positions away.
        sinks: the first so many keys are read by every query.
        global_tokens: the tokens at the first so many positions read every key and are read by every query.
        key_padding_mask: (B, M) bool, True = real token. Keys and values under False never matter, NaN there included.
        scale: factor of the scores; 1/√D by default.
        sink_q: (B, H, L, D), the queries that read the sinks, where those are not q: position embeddings may put the
            sinks elsewhere than the window. Excludes global tokens.
        backend: "auto", "torch" (blocked) or "reference"; for a window without dilation, sinks and global tokens any
            backend of `core_attn.ops.softmax_attention`.

    Returns:
        (B, H, L, Dv), dtype of q (under autocast, of autocast).

    Raises:
        ValueError: shapes or dtypes that do not fit; an option out of its range.
        BackendError: the backend asked for cannot run for these inputs, and why.
        UnknownNameError: no such backend.
    """
    check_qkv(q, k, v, key_padding_mask)
    if dilation < 1:
        raise ValueError(f"dilation must be at least 1, got {dilation}")
    if sinks < 0 or global_tokens < 0:
        raise ValueError(f"sinks and global_tokens must be at least 0, got {sinks} and {global_tokens}")
    if sink_q is not None:
        if global_tokens:
            raise ValueError("sink_q tells how sinks are read; with global_tokens it must be None")
        if sink_q.shape != q.shape or sink_q.dtype != q.dtype:
            raise ValueError(
                f"sink_q must have the shape {tuple(q.shape)} and dtype {q.dtype} of q, "
                f"got {tuple(sink_q.shape)} and {sink_q.dtype}"
            )
    sides = softmax.span(window, causal=causal)
    if sink_q is not None:
        sink_q = prepare_qkv(sink_q, k, v)[0]
    q, k, v = prepare_qkv(q, k, v, key_padding_mask)
    out: Tensor = OPERATOR(
        q,
        k,
        v,
        causal=causal,
        key_padding_mask=key_padding_mask,
        window=sides,
        scale=default_scale(q, scale),
        dilation=dilation,
        sinks=sinks,
        global_tokens=global_tokens,
        sink_q=sink_q if sinks else None,
        backend=backend,
    )
    return out
