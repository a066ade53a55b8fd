"""Steps that the Triton kernels of attention share: reading rows, the online softmax, the weights' gradient.

It imports Triton, so only modules of kernels import it. Scores are counted in powers of two: q kᵀ · scale · log2(e).

The online softmax is that of "Online normalizer calculation for softmax" (2018), the gradient that of "FlashAttention"
(S66), algorithm 4.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs
from __future__ import annotations

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)
_LN_2 = tl.constexpr(0.6931471805599453)


@triton.jit
def load_rows(pointer, stride, rows, keep, WIDTH: tl.constexpr, BLOCK: tl.constexpr, UPCAST: tl.constexpr):
    """(rows, BLOCK): the rows of a matrix of WIDTH columns, zeros outside and where `keep` is False."""
    columns = tl.arange(0, BLOCK)
    places = pointer + rows.to(tl.int64)[:, None] * stride + columns[None, :]
    x = tl.load(places, mask=keep[:, None] & (columns < WIDTH)[None, :], other=0.0)
    # Triton's interpreter multiplies the bit patterns of bfloat16 in tl.dot.
    return x.to(tl.float32) if UPCAST else x


@triton.jit
def store_rows(pointer, stride, rows, keep, x, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """Write what `load_rows` would read."""
    columns = tl.arange(0, BLOCK)
    places = pointer + rows.to(tl.int64)[:, None] * stride + columns[None, :]
    tl.store(places, x.to(pointer.dtype.element_ty), mask=keep[:, None] & (columns < WIDTH)[None, :])


@triton.jit
def dot(a, b):
    """a b in float32; float32 operands are not rounded to tf32."""
    return tl.dot(a, b, input_precision="ieee")


@triton.jit
def absorb(s, v, top, total, summed):
    """One block of masked scores (rows, keys) and its values into the running maximum, sum and weighted sum."""
    new = tl.maximum(top, tl.max(s, 1))
    # A row that has read nothing yet has the maximum -inf, and -inf - -inf is NaN.
    base = tl.where(new == float("-inf"), 0.0, new)
    p = tl.exp2(s - base[:, None])
    shrink = tl.exp2(top - base)
    total = total * shrink + tl.sum(p, 1)
    summed = summed * shrink[:, None] + dot(p.to(v.dtype), v)
    return new, total, summed


@triton.jit
def finish(top, total, summed):
    """Output and log-sum-exp (natural) of the rows; zeros and +inf where nothing was read."""
    empty = total == 0.0
    safe = tl.where(empty, 1.0, total)
    return summed / safe[:, None], tl.where(empty, float("inf"), (top + tl.log2(safe)) * _LN_2)
