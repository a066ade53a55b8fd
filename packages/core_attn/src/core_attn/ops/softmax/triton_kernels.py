# mypy: allow-untyped-defs, allow-incomplete-defs
"""The Triton kernels of exact softmax attention. Imported on first use only, as Triton may be absent.

"FlashAttention-2" (2023), algorithms 1 and 2, written from its equations: the forward walks over keys with a running
maximum and sum and keeps each row's log-sum-exp; the backward computes the weights again from it, once over keys for
the gradient of the queries and once over queries for those of keys and values, which therefore need no atomic adds.
Grouped heads are summed inside the latter. Blocks of keys that a window or causality forbids are never visited; those
that it allows whole are not masked.

Exponentials are of base 2, so `scale` and bias are multiplied with log2(e). Offsets of a sequence, head or block are
64-bit, those inside a block 32-bit. KEEP says how the boolean mask is read: 0 there is none, 1 one flag a key, 2 one a
query and key. Packed sequences (VARLEN) lie one after the other along the rows; `queries` and `keys` are then the
longest lengths, and each program looks its sequence's own up.
"""

from __future__ import annotations

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
INF = tl.constexpr(float("inf"))


@triton.jit
def _load(
    base, stride, start, stop, BLOCK: tl.constexpr, WIDTH: tl.constexpr, PADDED: tl.constexpr, UPCAST: tl.constexpr
):
    """Rows start … start + BLOCK - 1 of a matrix of `stop` rows and WIDTH columns; zeros beyond either."""
    row = tl.arange(0, BLOCK)
    column = tl.arange(0, PADDED)
    at = base + tl.cast(start, tl.int64) * stride + (row[:, None] * stride + column[None, :])
    inside = (start + row < stop)[:, None]
    if WIDTH != PADDED:
        inside = inside & (column < WIDTH)[None, :]
    x = tl.load(at, mask=inside, other=0.0)
    return x.to(tl.float32) if UPCAST else x


@triton.jit
def _store(
    x, base, stride, start, stop, BLOCK: tl.constexpr, WIDTH: tl.constexpr, PADDED: tl.constexpr, UPCAST: tl.constexpr
):
    """Write what `_load` reads."""
    row = tl.arange(0, BLOCK)
    column = tl.arange(0, PADDED)
    at = base + tl.cast(start, tl.int64) * stride + (row[:, None] * stride + column[None, :])
    inside = (start + row < stop)[:, None] & (column < WIDTH)[None, :]
    if UPCAST:
        x = _nearest(x)
    tl.store(at, x.to(base.dtype.element_ty), mask=inside)


@triton.jit
def _nearest(x):
    """The nearest bfloat16, ties to even, as float32: the interpreter's own conversion cuts the last bits off."""
    bits = x.to(tl.uint32, bitcast=True)
    bits = (bits + (0x7FFF + ((bits >> 16) & 1))) & 0xFFFF0000
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def _operand(x, base, UPCAST: tl.constexpr):
    """Round a float32 block to the tensors' dtype, as an operand of `tl.dot`."""
    return _nearest(x) if UPCAST else x.to(base.dtype.element_ty)


@triton.jit
def _place(programs_per_sequence, heads):
    """Block, head and batch entry of this program; neighbouring programs share a head."""
    program = tl.program_id(0)
    rest = program // programs_per_sequence
    return program % programs_per_sequence, rest % heads, rest // heads


@triton.jit
def _sequence(offsets, entry, length, VARLEN: tl.constexpr):
    """First row of a sequence among the packed ones, and its length."""
    first = tl.cast(0, tl.int64)
    if VARLEN:
        first = tl.load(offsets + entry).to(tl.int64)
        length = (tl.load(offsets + entry + 1) - first).to(tl.int32)
    return first, length


@triton.jit
def _band(first, last, ahead, length, before, after, BEFORE: tl.constexpr, AFTER: tl.constexpr, BLOCK: tl.constexpr):
    """Which of the other side's blocks the rows first … last meet: start, whole_start, whole_stop, stop.

    Row i meets i + ahead - before … i + ahead + after, of `length`. Blocks in [whole_start, whole_stop) are met whole
    by every row; the others in [start, stop) need a mask. All but stop are multiples of BLOCK.
    """
    start = 0
    whole_start = 0
    stop = length
    whole_stop = length
    if BEFORE:
        start = tl.maximum(0, first + ahead - before)
        whole_start = tl.maximum(0, last + ahead - before)
    if AFTER:
        stop = tl.minimum(length, last + ahead + after + 1)
        whole_stop = tl.minimum(length, first + ahead + after + 1)
    start = start // BLOCK * BLOCK
    whole_start = (whole_start + BLOCK - 1) // BLOCK * BLOCK
    whole_stop = tl.maximum(tl.maximum(0, whole_stop) // BLOCK * BLOCK, whole_start)
    return start, whole_start, whole_stop, stop


@triton.jit
def _edges(start, whole_start, whole_stop, stop, BLOCK: tl.constexpr):
    """How many blocks need a mask: those before the whole ones, and those before and after."""
    left = tl.cdiv(tl.maximum(0, tl.minimum(whole_start, stop) - start), BLOCK)
    return left, left + tl.cdiv(tl.maximum(0, stop - tl.maximum(whole_stop, start)), BLOCK)


@triton.jit
def _restrict(
    s,
    row,
    column,
    queries,
    keys,
    bias,
    bias_l,
    bias_m,
    keep,
    keep_l,
    keep_m,
    left,
    right,
    HAS_BIAS: tl.constexpr,
    KEEP: tl.constexpr,
    HAS_LEFT: tl.constexpr,
    HAS_RIGHT: tl.constexpr,
    MASKED: tl.constexpr,
):
    """Scores plus bias, -inf where reading is not allowed. `row` and `column` have the shape of s in one axis each."""
    inside = (row < queries) & (column < keys)
    if HAS_BIAS:
        at = bias + row.to(tl.int64) * bias_l + column.to(tl.int64) * bias_m
        s += tl.load(at, mask=inside, other=0.0).to(tl.float32) * LOG2E
    if KEEP == 1:
        flag = tl.load(keep + column.to(tl.int64) * keep_m, mask=column < keys, other=0)
        s = tl.where(flag != 0, s, -INF)
    if KEEP == 2:
        at = keep + row.to(tl.int64) * keep_l + column.to(tl.int64) * keep_m
        s = tl.where(tl.load(at, mask=inside, other=0) != 0, s, -INF)
    if MASKED:
        allowed = inside
        if HAS_RIGHT:
            allowed = allowed & (column <= row + (keys - queries + right))
        if HAS_LEFT:
            allowed = allowed & (column >= row + (keys - queries - left))
        s = tl.where(allowed, s, -INF)
    return s


@triton.jit
def _forward_step(
    q,
    acc,
    total,
    top,
    row,
    start,
    k,
    k_l,
    v,
    v_l,
    queries,
    keys,
    scale,
    bias,
    bias_l,
    bias_m,
    keep,
    keep_l,
    keep_m,
    left,
    right,
    D: tl.constexpr,
    DV: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    KEEP: tl.constexpr,
    HAS_LEFT: tl.constexpr,
    HAS_RIGHT: tl.constexpr,
    UPCAST: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    BLOCK_N: tl.constexpr,
    MASKED: tl.constexpr,
):
    """One block of keys: the running sum of weighted values, the sum of weights and the maximum."""
    keys_block = _load(k, k_l, start, keys, BLOCK_N, D, BLOCK_D, UPCAST)
    s = tl.dot(q, tl.trans(keys_block), input_precision=PRECISION) * (scale * LOG2E)
    column = start + tl.arange(0, BLOCK_N)
    s = _restrict(
        s, row[:, None], column[None, :], queries, keys, bias, bias_l, bias_m, keep, keep_l, keep_m, left, right,
        HAS_BIAS, KEEP, HAS_LEFT, HAS_RIGHT, MASKED,
    )  # fmt: skip
    new = tl.maximum(top, tl.max(s, 1))
    base = tl.where(new == -INF, 0.0, new)
    p = tl.exp2(s - base[:, None])
    shrink = tl.exp2(top - base)
    values_block = _load(v, v_l, start, keys, BLOCK_N, DV, BLOCK_DV, UPCAST)
    acc = acc * shrink[:, None]
    acc += tl.dot(_operand(p, v, UPCAST), values_block, input_precision=PRECISION)
    return acc, total * shrink + tl.sum(p, 1), new


@triton.jit
def softmax_forward(
    q,
    k,
    v,
    bias,
    keep,
    out,
    lse,
    offsets_q,
    offsets_k,
    queries,
    keys,
    heads,
    group,
    scale,
    left,
    right,
    q_b,
    q_h,
    q_l,
    k_b,
    k_h,
    k_l,
    v_b,
    v_h,
    v_l,
    bias_b,
    bias_h,
    bias_l,
    bias_m,
    keep_b,
    keep_h,
    keep_l,
    keep_m,
    out_b,
    out_h,
    out_l,
    lse_b,
    lse_h,
    D: tl.constexpr,
    DV: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    KEEP: tl.constexpr,
    HAS_LEFT: tl.constexpr,
    HAS_RIGHT: tl.constexpr,
    VARLEN: tl.constexpr,
    UPCAST: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Output and log-sum-exp of BLOCK_M queries of one head; rows that may read nothing give 0 and +inf."""
    blocks = tl.cdiv(queries, BLOCK_M)
    block, head, entry = _place(blocks, heads)
    # With causality the last blocks are the longest: they start first.
    first = (blocks - 1 - block) * BLOCK_M
    first_q, queries = _sequence(offsets_q, entry, queries, VARLEN)
    first_k, keys = _sequence(offsets_k, entry, keys, VARLEN)
    if first >= queries:
        return
    b = tl.cast(0 if VARLEN else entry, tl.int64)
    h = head.to(tl.int64)
    g = (head // group).to(tl.int64)
    q += b * q_b + h * q_h + first_q * q_l
    k += b * k_b + g * k_h + first_k * k_l
    v += b * v_b + g * v_h + first_k * v_l
    out += b * out_b + h * out_h + first_q * out_l
    lse += b * lse_b + h * lse_h + first_q
    bias += b * bias_b + h * bias_h
    keep += b * keep_b + h * keep_h

    row = first + tl.arange(0, BLOCK_M)
    query_block = _load(q, q_l, first, queries, BLOCK_M, D, BLOCK_D, UPCAST)
    acc = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    top = tl.full([BLOCK_M], -INF, tl.float32)
    last = tl.minimum(first + BLOCK_M, queries) - 1
    start, whole_start, whole_stop, stop = _band(
        first, last, keys - queries, keys, left, right, HAS_LEFT, HAS_RIGHT, BLOCK_N
    )
    before, edges = _edges(start, whole_start, whole_stop, stop, BLOCK_N)
    for n in range(whole_start, whole_stop, BLOCK_N):
        acc, total, top = _forward_step(
            query_block, acc, total, top, row, n, k, k_l, v, v_l, queries, keys, scale,
            bias, bias_l, bias_m, keep, keep_l, keep_m, left, right,
            D, DV, HAS_BIAS, KEEP, HAS_LEFT, HAS_RIGHT, UPCAST, PRECISION, BLOCK_D, BLOCK_DV, BLOCK_N, False,
        )  # fmt: skip
    for i in range(0, edges):
        n = tl.where(i < before, start + i * BLOCK_N, tl.maximum(whole_stop, start) + (i - before) * BLOCK_N)
        acc, total, top = _forward_step(
            query_block, acc, total, top, row, n, k, k_l, v, v_l, queries, keys, scale,
            bias, bias_l, bias_m, keep, keep_l, keep_m, left, right,
            D, DV, HAS_BIAS, KEEP, HAS_LEFT, HAS_RIGHT, UPCAST, PRECISION, BLOCK_D, BLOCK_DV, BLOCK_N, True,
        )  # fmt: skip
    empty = total == 0.0
    divisor = tl.where(empty, 1.0, total)
    _store(acc / divisor[:, None], out, out_l, first, queries, BLOCK_M, DV, BLOCK_DV, UPCAST)
    statistics = tl.where(empty, INF, (top + tl.log2(divisor)) * LN2)
    tl.store(lse + row, statistics, mask=row < queries)


@triton.jit
def _queries_step(
    query_block,
    gradient_block,
    dq,
    statistics,
    mean,
    row,
    start,
    k,
    k_l,
    v,
    v_l,
    queries,
    keys,
    scale,
    bias,
    bias_l,
    bias_m,
    keep,
    keep_l,
    keep_m,
    left,
    right,
    D: tl.constexpr,
    DV: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    KEEP: tl.constexpr,
    HAS_LEFT: tl.constexpr,
    HAS_RIGHT: tl.constexpr,
    UPCAST: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    BLOCK_N: tl.constexpr,
    MASKED: tl.constexpr,
):
    """What one block of keys adds to the gradient of the queries, without the factor `scale`."""
    keys_block = _load(k, k_l, start, keys, BLOCK_N, D, BLOCK_D, UPCAST)
    values_block = _load(v, v_l, start, keys, BLOCK_N, DV, BLOCK_DV, UPCAST)
    s = tl.dot(query_block, tl.trans(keys_block), input_precision=PRECISION) * (scale * LOG2E)
    column = start + tl.arange(0, BLOCK_N)
    s = _restrict(
        s, row[:, None], column[None, :], queries, keys, bias, bias_l, bias_m, keep, keep_l, keep_m, left, right,
        HAS_BIAS, KEEP, HAS_LEFT, HAS_RIGHT, MASKED,
    )  # fmt: skip
    p = tl.exp2(s - statistics[:, None])
    dp = tl.dot(gradient_block, tl.trans(values_block), input_precision=PRECISION)
    ds = p * (dp - mean[:, None])
    return dq + tl.dot(_operand(ds, k, UPCAST), keys_block, input_precision=PRECISION)


@triton.jit
def softmax_backward_queries(
    q,
    k,
    v,
    bias,
    keep,
    out,
    lse,
    dout,
    delta,
    dq,
    offsets_q,
    offsets_k,
    queries,
    keys,
    heads,
    group,
    scale,
    left,
    right,
    q_b,
    q_h,
    q_l,
    k_b,
    k_h,
    k_l,
    v_b,
    v_h,
    v_l,
    bias_b,
    bias_h,
    bias_l,
    bias_m,
    keep_b,
    keep_h,
    keep_l,
    keep_m,
    out_b,
    out_h,
    out_l,
    dout_b,
    dout_h,
    dout_l,
    dq_b,
    dq_h,
    dq_l,
    lse_b,
    lse_h,
    D: tl.constexpr,
    DV: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    KEEP: tl.constexpr,
    HAS_LEFT: tl.constexpr,
    HAS_RIGHT: tl.constexpr,
    VARLEN: tl.constexpr,
    UPCAST: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Gradient of BLOCK_M queries of one head, and delta = rowsum(dO · O), which the other kernel needs."""
    blocks = tl.cdiv(queries, BLOCK_M)
    block, head, entry = _place(blocks, heads)
    first = (blocks - 1 - block) * BLOCK_M
    first_q, queries = _sequence(offsets_q, entry, queries, VARLEN)
    first_k, keys = _sequence(offsets_k, entry, keys, VARLEN)
    if first >= queries:
        return
    b = tl.cast(0 if VARLEN else entry, tl.int64)
    h = head.to(tl.int64)
    g = (head // group).to(tl.int64)
    q += b * q_b + h * q_h + first_q * q_l
    k += b * k_b + g * k_h + first_k * k_l
    v += b * v_b + g * v_h + first_k * v_l
    out += b * out_b + h * out_h + first_q * out_l
    dout += b * dout_b + h * dout_h + first_q * dout_l
    dq += b * dq_b + h * dq_h + first_q * dq_l
    lse += b * lse_b + h * lse_h + first_q
    delta += b * lse_b + h * lse_h + first_q
    bias += b * bias_b + h * bias_h
    keep += b * keep_b + h * keep_h

    row = first + tl.arange(0, BLOCK_M)
    gradient_block = _load(dout, dout_l, first, queries, BLOCK_M, DV, BLOCK_DV, UPCAST)
    out_block = _load(out, out_l, first, queries, BLOCK_M, DV, BLOCK_DV, UPCAST)
    mean = tl.sum(gradient_block.to(tl.float32) * out_block.to(tl.float32), 1)
    tl.store(delta + row, mean, mask=row < queries)
    statistics = tl.load(lse + row, mask=row < queries, other=INF) * LOG2E
    query_block = _load(q, q_l, first, queries, BLOCK_M, D, BLOCK_D, UPCAST)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    last = tl.minimum(first + BLOCK_M, queries) - 1
    start, whole_start, whole_stop, stop = _band(
        first, last, keys - queries, keys, left, right, HAS_LEFT, HAS_RIGHT, BLOCK_N
    )
    before, edges = _edges(start, whole_start, whole_stop, stop, BLOCK_N)
    for n in range(whole_start, whole_stop, BLOCK_N):
        acc = _queries_step(
            query_block, gradient_block, acc, statistics, mean, row, n, k, k_l, v, v_l, queries, keys, scale,
            bias, bias_l, bias_m, keep, keep_l, keep_m, left, right,
            D, DV, HAS_BIAS, KEEP, HAS_LEFT, HAS_RIGHT, UPCAST, PRECISION, BLOCK_D, BLOCK_DV, BLOCK_N, False,
        )  # fmt: skip
    for i in range(0, edges):
        n = tl.where(i < before, start + i * BLOCK_N, tl.maximum(whole_stop, start) + (i - before) * BLOCK_N)
        acc = _queries_step(
            query_block, gradient_block, acc, statistics, mean, row, n, k, k_l, v, v_l, queries, keys, scale,
            bias, bias_l, bias_m, keep, keep_l, keep_m, left, right,
            D, DV, HAS_BIAS, KEEP, HAS_LEFT, HAS_RIGHT, UPCAST, PRECISION, BLOCK_D, BLOCK_DV, BLOCK_N, True,
        )  # fmt: skip
    _store(acc * scale, dq, dq_l, first, queries, BLOCK_M, D, BLOCK_D, UPCAST)


@triton.jit
def _keys_step(
    keys_block,
    values_block,
    dk,
    dv,
    column,
    start,
    q,
    q_l,
    dout,
    dout_l,
    lse,
    delta,
    queries,
    keys,
    scale,
    bias,
    bias_l,
    bias_m,
    keep,
    keep_l,
    keep_m,
    left,
    right,
    D: tl.constexpr,
    DV: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    KEEP: tl.constexpr,
    HAS_LEFT: tl.constexpr,
    HAS_RIGHT: tl.constexpr,
    UPCAST: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr,
    MASKED: tl.constexpr,
):
    """What one block of queries adds to the gradients of keys (without the factor `scale`) and values.

    Scores are transposed, (BLOCK_N, BLOCK_M): both products then take them as they come out of `tl.dot`.
    """
    query_block = _load(q, q_l, start, queries, BLOCK_M, D, BLOCK_D, UPCAST)
    gradient_block = _load(dout, dout_l, start, queries, BLOCK_M, DV, BLOCK_DV, UPCAST)
    row = start + tl.arange(0, BLOCK_M)
    # +inf beyond the last query: its weights are zero without a mask.
    statistics = tl.load(lse + row, mask=row < queries, other=INF) * LOG2E
    mean = tl.load(delta + row, mask=row < queries, other=0.0)
    s = tl.dot(keys_block, tl.trans(query_block), input_precision=PRECISION) * (scale * LOG2E)
    s = _restrict(
        s, row[None, :], column[:, None], queries, keys, bias, bias_l, bias_m, keep, keep_l, keep_m, left, right,
        HAS_BIAS, KEEP, HAS_LEFT, HAS_RIGHT, MASKED,
    )  # fmt: skip
    p = tl.exp2(s - statistics[None, :])
    dv += tl.dot(_operand(p, dout, UPCAST), gradient_block, input_precision=PRECISION)
    dp = tl.dot(values_block, tl.trans(gradient_block), input_precision=PRECISION)
    ds = p * (dp - mean[None, :])
    dk += tl.dot(_operand(ds, q, UPCAST), query_block, input_precision=PRECISION)
    return dk, dv


@triton.jit
def softmax_backward_keys(
    q,
    k,
    v,
    bias,
    keep,
    lse,
    dout,
    delta,
    dk,
    dv,
    offsets_q,
    offsets_k,
    queries,
    keys,
    heads,
    group,
    scale,
    left,
    right,
    q_b,
    q_h,
    q_l,
    k_b,
    k_h,
    k_l,
    v_b,
    v_h,
    v_l,
    bias_b,
    bias_h,
    bias_l,
    bias_m,
    keep_b,
    keep_h,
    keep_l,
    keep_m,
    dout_b,
    dout_h,
    dout_l,
    dk_b,
    dk_h,
    dk_l,
    dv_b,
    dv_h,
    dv_l,
    lse_b,
    lse_h,
    D: tl.constexpr,
    DV: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    KEEP: tl.constexpr,
    HAS_LEFT: tl.constexpr,
    HAS_RIGHT: tl.constexpr,
    VARLEN: tl.constexpr,
    UPCAST: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Gradients of BLOCK_N keys and values of one key head, summed over the query heads that read it."""
    block, key_head, entry = _place(tl.cdiv(keys, BLOCK_N), heads // group)
    first = block * BLOCK_N
    first_q, queries = _sequence(offsets_q, entry, queries, VARLEN)
    first_k, keys = _sequence(offsets_k, entry, keys, VARLEN)
    if first >= keys:
        return
    b = tl.cast(0 if VARLEN else entry, tl.int64)
    g = key_head.to(tl.int64)
    k += b * k_b + g * k_h + first_k * k_l
    v += b * v_b + g * v_h + first_k * v_l
    dk += b * dk_b + g * dk_h + first_k * dk_l
    dv += b * dv_b + g * dv_h + first_k * dv_l
    q += b * q_b + first_q * q_l
    dout += b * dout_b + first_q * dout_l
    lse += b * lse_b + first_q
    delta += b * lse_b + first_q
    bias += b * bias_b
    keep += b * keep_b

    column = first + tl.arange(0, BLOCK_N)
    keys_block = _load(k, k_l, first, keys, BLOCK_N, D, BLOCK_D, UPCAST)
    values_block = _load(v, v_l, first, keys, BLOCK_N, DV, BLOCK_DV, UPCAST)
    key_acc = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    value_acc = tl.zeros([BLOCK_N, BLOCK_DV], tl.float32)
    last = tl.minimum(first + BLOCK_N, keys) - 1
    # The band read the other way round: key j is read by the queries j - ahead - right … j - ahead + left.
    start, whole_start, whole_stop, stop = _band(
        first, last, queries - keys, queries, right, left, HAS_RIGHT, HAS_LEFT, BLOCK_M
    )
    before, edges = _edges(start, whole_start, whole_stop, stop, BLOCK_M)
    for member in range(0, group):
        h = g * group + member
        for m in range(whole_start, whole_stop, BLOCK_M):
            key_acc, value_acc = _keys_step(
                keys_block, values_block, key_acc, value_acc, column, m, q + h * q_h, q_l, dout + h * dout_h, dout_l,
                lse + h * lse_h, delta + h * lse_h, queries, keys, scale,
                bias + h * bias_h, bias_l, bias_m, keep + h * keep_h, keep_l, keep_m, left, right,
                D, DV, HAS_BIAS, KEEP, HAS_LEFT, HAS_RIGHT, UPCAST, PRECISION, BLOCK_D, BLOCK_DV, BLOCK_M, False,
            )  # fmt: skip
        for i in range(0, edges):
            m = tl.where(i < before, start + i * BLOCK_M, tl.maximum(whole_stop, start) + (i - before) * BLOCK_M)
            key_acc, value_acc = _keys_step(
                keys_block, values_block, key_acc, value_acc, column, m, q + h * q_h, q_l, dout + h * dout_h, dout_l,
                lse + h * lse_h, delta + h * lse_h, queries, keys, scale,
                bias + h * bias_h, bias_l, bias_m, keep + h * keep_h, keep_l, keep_m, left, right,
                D, DV, HAS_BIAS, KEEP, HAS_LEFT, HAS_RIGHT, UPCAST, PRECISION, BLOCK_D, BLOCK_DV, BLOCK_M, True,
            )  # fmt: skip
    _store(key_acc * scale, dk, dk_l, first, keys, BLOCK_N, D, BLOCK_D, UPCAST)
    _store(value_acc, dv, dv_l, first, keys, BLOCK_N, DV, BLOCK_DV, UPCAST)
