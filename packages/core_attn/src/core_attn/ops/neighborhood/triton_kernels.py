"""Neighbourhood attention on the GPU: the kernels in Triton, for grids of one and two axes.

A line is a plane whose first axis has one token.

A program owns one tile of Q0 × Q1 queries of one residue class modulo the dilation, in which the window is dense again,
and walks in tiles of K0 × K1 over the box of keys that its queries read together ("Faster Neighborhood Attention",
S165, section 3). Which key belongs to which query follows from coordinates alone. The gradient of the keys has tiles of
keys for owners, and walks over the box of queries that can read them.

Names: per axis, n tokens, m tokens of the residue's line, k kernel size, d dilation, r residue, s stride.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs
from __future__ import annotations

import triton
import triton.language as tl

from core_attn.triton_steps import LOG2_E, absorb, dot, finish, load_rows, store_rows


@triton.jit
def _first(i, m, k, s, CAUSAL: tl.constexpr):
    """The first key of query i: that of the leader of its stride group, moved inwards at a border."""
    if CAUSAL:
        leader = tl.minimum(i // s * s + s - 1, m - 1)
        return tl.maximum(leader - k + 1, 0)
    else:
        leader = tl.minimum(i // s * s + s // 2, m - 1)
        return tl.minimum(tl.maximum(leader - k // 2, 0), m - k)


@triton.jit
def _stop(i, m, k, s, CAUSAL: tl.constexpr):
    """One past the last key of query i."""
    if CAUSAL:
        return i + 1
    else:
        return _first(i, m, k, s, CAUSAL) + k


@triton.jit
def _readers(a, b, m, k, s, CAUSAL: tl.constexpr):
    """A range that holds every query of the line that reads one of the keys a … b - 1, and few others."""
    if CAUSAL:
        return a, tl.minimum(b - 1 + k, m)
    else:
        # Windows moved inwards are those that begin with the first or end with the last key.
        low = tl.where(a < k, 0, tl.maximum(a - k + k // 2 + 1 - s // 2, 0))
        high = tl.where(b > m - k, m, tl.minimum(b - 1 + k // 2 + s - s // 2, m))
        return low, high


@triton.jit
def _place(n0, n1, d0, d1, T0: tl.constexpr, T1: tl.constexpr):
    """Of this program: first coordinates of its tile, residues, lengths of the lines, number of its head."""
    pid = tl.program_id(0)
    tiles0 = tl.cdiv(tl.cdiv(n0, d0), T0)
    tiles1 = tl.cdiv(tl.cdiv(n1, d1), T1)
    a1 = pid % tiles1 * T1
    pid = pid // tiles1
    a0 = pid % tiles0 * T0
    pid = pid // tiles0
    r1 = pid % d1
    pid = pid // d1
    r0 = pid % d0
    head = pid // d0
    return a0, a1, r0, r1, tl.cdiv(n0 - r0, d0), tl.cdiv(n1 - r1, d1), head.to(tl.int64)


@triton.jit
def _bias(rpb, i0, i1, j0, j1, k0, k1, keep):
    """The relative bias of pairs of queries (i0, i1) and keys (j0, j1), in powers of two."""
    offset = (j0 - i0 + k0 - 1) * (2 * k1 - 1) + j1 - i1 + k1 - 1
    return tl.load(rpb + offset, mask=keep, other=0.0) * LOG2_E


@triton.jit
def forward(
    q, k, v, rpb, out, lse,
    q_batch, q_head, q_row, k_batch, k_head, k_row, v_batch, v_head, v_row,
    heads, shared, n0, n1, k0, k1, d0, d1, s0, s1, scale,
    CAUSAL0: tl.constexpr, CAUSAL1: tl.constexpr, BIAS: tl.constexpr,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    UPCAST: tl.constexpr, Q0: tl.constexpr, Q1: tl.constexpr, K0: tl.constexpr, K1: tl.constexpr,
):  # fmt: skip
    """`out` (B, H, L, DV) and `lse` (B, H, L), both contiguous."""
    a0, a1, r0, r1, m0, m1, bh = _place(n0, n1, d0, d1, Q0, Q1)
    batch, head = bh // heads, bh % heads
    q += batch * q_batch + head * q_head
    k += batch * k_batch + head // shared * k_head
    v += batch * v_batch + head // shared * v_head
    rpb += head * (2 * k0 - 1) * (2 * k1 - 1)

    tokens = tl.arange(0, Q0 * Q1)
    i0, i1 = a0 + tokens // Q1, a1 + tokens % Q1
    real = (i0 < m0) & (i1 < m1)
    rows = (i0 * d0 + r0) * n1 + i1 * d1 + r1
    f0, f1 = _first(i0, m0, k0, s0, CAUSAL0), _first(i1, m1, k1, s1, CAUSAL1)
    e0, e1 = _stop(i0, m0, k0, s0, CAUSAL0), _stop(i1, m1, k1, s1, CAUSAL1)
    low0, low1 = _first(a0, m0, k0, s0, CAUSAL0), _first(a1, m1, k1, s1, CAUSAL1)
    high0 = _stop(tl.minimum(a0 + Q0, m0) - 1, m0, k0, s0, CAUSAL0)
    high1 = _stop(tl.minimum(a1 + Q1, m1) - 1, m1, k1, s1, CAUSAL1)
    across = tl.cdiv(high1 - low1, K1)

    queries = load_rows(q, q_row, rows, real, D, BLOCK_D, UPCAST)
    top = tl.full([Q0 * Q1], float("-inf"), tl.float32)
    total = tl.zeros([Q0 * Q1], tl.float32)
    summed = tl.zeros([Q0 * Q1, BLOCK_DV], tl.float32)
    columns = tl.arange(0, K0 * K1)
    for step in range(0, tl.cdiv(high0 - low0, K0) * across):
        j0 = low0 + step // across * K0 + columns // K1
        j1 = low1 + step % across * K1 + columns % K1
        inside = (j0 < high0) & (j1 < high1)
        keys = (j0 * d0 + r0) * n1 + j1 * d1 + r1
        s = dot(queries, tl.trans(load_rows(k, k_row, keys, inside, D, BLOCK_D, UPCAST)))
        s *= scale * LOG2_E
        keep = (j0[None, :] >= f0[:, None]) & (j0[None, :] < e0[:, None])
        keep &= (j1[None, :] >= f1[:, None]) & (j1[None, :] < e1[:, None])
        if BIAS:
            keep &= real[:, None]
            s += _bias(rpb, i0[:, None], i1[:, None], j0[None, :], j1[None, :], k0, k1, keep)
        s = tl.where(keep, s, float("-inf"))
        values = load_rows(v, v_row, keys, inside, DV, BLOCK_DV, UPCAST)
        top, total, summed = absorb(s, values, top, total, summed)

    result, statistics = finish(top, total, summed)
    start = bh * n0 * n1
    store_rows(out + start * DV, DV, rows, real, result, DV, BLOCK_DV)
    tl.store(lse + start + rows, statistics, mask=real)


@triton.jit
def backward_queries(
    q, k, v, rpb, out, lse, dout, delta, dq,
    q_batch, q_head, q_row, k_batch, k_head, k_row, v_batch, v_head, v_row,
    heads, shared, n0, n1, k0, k1, d0, d1, s0, s1, scale,
    CAUSAL0: tl.constexpr, CAUSAL1: tl.constexpr, BIAS: tl.constexpr,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    UPCAST: tl.constexpr, Q0: tl.constexpr, Q1: tl.constexpr, K0: tl.constexpr, K1: tl.constexpr,
):  # fmt: skip
    """`dq` (B, H, L, D) and `delta` (B, H, L), the sum over channels of out · dout; all but q, k, v are contiguous."""
    a0, a1, r0, r1, m0, m1, bh = _place(n0, n1, d0, d1, Q0, Q1)
    batch, head = bh // heads, bh % heads
    start = bh * n0 * n1
    q += batch * q_batch + head * q_head
    k += batch * k_batch + head // shared * k_head
    v += batch * v_batch + head // shared * v_head
    rpb += head * (2 * k0 - 1) * (2 * k1 - 1)

    tokens = tl.arange(0, Q0 * Q1)
    i0, i1 = a0 + tokens // Q1, a1 + tokens % Q1
    real = (i0 < m0) & (i1 < m1)
    rows = (i0 * d0 + r0) * n1 + i1 * d1 + r1
    f0, f1 = _first(i0, m0, k0, s0, CAUSAL0), _first(i1, m1, k1, s1, CAUSAL1)
    e0, e1 = _stop(i0, m0, k0, s0, CAUSAL0), _stop(i1, m1, k1, s1, CAUSAL1)
    low0, low1 = _first(a0, m0, k0, s0, CAUSAL0), _first(a1, m1, k1, s1, CAUSAL1)
    high0 = _stop(tl.minimum(a0 + Q0, m0) - 1, m0, k0, s0, CAUSAL0)
    high1 = _stop(tl.minimum(a1 + Q1, m1) - 1, m1, k1, s1, CAUSAL1)
    across = tl.cdiv(high1 - low1, K1)

    queries = load_rows(q, q_row, rows, real, D, BLOCK_D, UPCAST)
    gradient = load_rows(dout + start * DV, DV, rows, real, DV, BLOCK_DV, UPCAST)
    result = load_rows(out + start * DV, DV, rows, real, DV, BLOCK_DV, UPCAST)
    mean = tl.sum(gradient.to(tl.float32) * result.to(tl.float32), 1)
    tl.store(delta + start + rows, mean, mask=real)
    base = tl.load(lse + start + rows, mask=real, other=float("inf")) * LOG2_E
    total = tl.zeros([Q0 * Q1, BLOCK_D], tl.float32)
    columns = tl.arange(0, K0 * K1)
    for step in range(0, tl.cdiv(high0 - low0, K0) * across):
        j0 = low0 + step // across * K0 + columns // K1
        j1 = low1 + step % across * K1 + columns % K1
        inside = (j0 < high0) & (j1 < high1)
        places = (j0 * d0 + r0) * n1 + j1 * d1 + r1
        keys = load_rows(k, k_row, places, inside, D, BLOCK_D, UPCAST)
        values = load_rows(v, v_row, places, inside, DV, BLOCK_DV, UPCAST)
        s = dot(queries, tl.trans(keys)) * (scale * LOG2_E)
        keep = (j0[None, :] >= f0[:, None]) & (j0[None, :] < e0[:, None])
        keep &= (j1[None, :] >= f1[:, None]) & (j1[None, :] < e1[:, None]) & real[:, None]
        if BIAS:
            s += _bias(rpb, i0[:, None], i1[:, None], j0[None, :], j1[None, :], k0, k1, keep)
        p = tl.where(keep, tl.exp2(s - base[:, None]), 0.0)
        dp = dot(gradient, tl.trans(values))
        ds = p * (dp - mean[:, None])
        total += dot(ds.to(keys.dtype), keys)
    store_rows(dq + start * D, D, rows, real, total * scale, D, BLOCK_D)


@triton.jit
def backward_keys(
    q, k, v, rpb, lse, dout, delta, dk, dv,
    q_batch, q_head, q_row, k_batch, k_head, k_row, v_batch, v_head, v_row,
    heads, shared, n0, n1, k0, k1, d0, d1, s0, s1, scale,
    CAUSAL0: tl.constexpr, CAUSAL1: tl.constexpr, BIAS: tl.constexpr,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    UPCAST: tl.constexpr, Q0: tl.constexpr, Q1: tl.constexpr, K0: tl.constexpr, K1: tl.constexpr,
):  # fmt: skip
    """`dk` (B, Hkv, L, D) and `dv` (B, Hkv, L, DV), contiguous; a program walks over the `shared` query heads too."""
    a0, a1, r0, r1, m0, m1, group = _place(n0, n1, d0, d1, K0, K1)
    groups = heads // shared
    batch, first_head = group // groups, group % groups * shared
    k += batch * k_batch + group % groups * k_head
    v += batch * v_batch + group % groups * v_head

    tokens = tl.arange(0, K0 * K1)
    j0, j1 = a0 + tokens // K1, a1 + tokens % K1
    real = (j0 < m0) & (j1 < m1)
    places = (j0 * d0 + r0) * n1 + j1 * d1 + r1
    low0, high0 = _readers(a0, tl.minimum(a0 + K0, m0), m0, k0, s0, CAUSAL0)
    low1, high1 = _readers(a1, tl.minimum(a1 + K1, m1), m1, k1, s1, CAUSAL1)
    across = tl.cdiv(high1 - low1, Q1)
    each = tl.cdiv(high0 - low0, Q0) * across

    keys = load_rows(k, k_row, places, real, D, BLOCK_D, UPCAST)
    values = load_rows(v, v_row, places, real, DV, BLOCK_DV, UPCAST)
    key_total = tl.zeros([K0 * K1, BLOCK_D], tl.float32)
    value_total = tl.zeros([K0 * K1, BLOCK_DV], tl.float32)
    columns = tl.arange(0, Q0 * Q1)
    for step in range(0, shared * each):
        head = first_head + step // each
        start = (batch * heads + head) * n0 * n1
        i0 = low0 + step % each // across * Q0 + columns // Q1
        i1 = low1 + step % each % across * Q1 + columns % Q1
        inside = (i0 < high0) & (i1 < high1)
        rows = (i0 * d0 + r0) * n1 + i1 * d1 + r1
        queries = load_rows(q + batch * q_batch + head * q_head, q_row, rows, inside, D, BLOCK_D, UPCAST)
        gradient = load_rows(dout + start * DV, DV, rows, inside, DV, BLOCK_DV, UPCAST)
        base = tl.load(lse + start + rows, mask=inside, other=float("inf")) * LOG2_E
        mean = tl.load(delta + start + rows, mask=inside, other=0.0)
        s = dot(keys, tl.trans(queries)) * (scale * LOG2_E)
        f0, f1 = _first(i0, m0, k0, s0, CAUSAL0), _first(i1, m1, k1, s1, CAUSAL1)
        e0, e1 = _stop(i0, m0, k0, s0, CAUSAL0), _stop(i1, m1, k1, s1, CAUSAL1)
        keep = (j0[:, None] >= f0[None, :]) & (j0[:, None] < e0[None, :])
        keep &= (j1[:, None] >= f1[None, :]) & (j1[:, None] < e1[None, :])
        keep &= inside[None, :] & real[:, None]
        if BIAS:
            table = rpb + head * (2 * k0 - 1) * (2 * k1 - 1)
            s += _bias(table, i0[None, :], i1[None, :], j0[:, None], j1[:, None], k0, k1, keep)
        p = tl.where(keep, tl.exp2(s - base[None, :]), 0.0)
        value_total += dot(p.to(gradient.dtype), gradient)
        dp = dot(values, tl.trans(gradient))
        ds = p * (dp - mean[None, :])
        key_total += dot(ds.to(queries.dtype), queries)
    start = group * n0 * n1
    store_rows(dk + start * D, D, places, real, key_total * scale, D, BLOCK_D)
    store_rows(dv + start * DV, DV, places, real, value_total, DV, BLOCK_DV)


@triton.jit
def backward_bias(
    q, k, v, rpb, lse, dout, delta, drpb,
    q_batch, q_head, q_row, k_batch, k_head, k_row, v_batch, v_head, v_row,
    heads, shared, n0, n1, k0, k1, d0, d1, s0, s1, scale,
    CAUSAL0: tl.constexpr, CAUSAL1: tl.constexpr,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    UPCAST: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """`drpb` (B, H, 2·k0 - 1, 2·k1 - 1), contiguous: a program sums over all pairs of one offset, in a fixed order."""
    pid = tl.program_id(0)
    o1 = pid % (2 * k1 - 1) - k1 + 1
    o0 = pid // (2 * k1 - 1) % (2 * k0 - 1) - k0 + 1
    table = pid // (2 * k1 - 1) // (2 * k0 - 1)
    bh = table.to(tl.int64)
    batch, head = bh // heads, bh % heads
    start = bh * n0 * n1
    q += batch * q_batch + head * q_head
    k += batch * k_batch + head // shared * k_head
    v += batch * v_batch + head // shared * v_head
    bias = tl.load(rpb + head * (2 * k0 - 1) * (2 * k1 - 1) + (o0 + k0 - 1) * (2 * k1 - 1) + o1 + k1 - 1) * LOG2_E

    total = tl.zeros([ROWS], tl.float32)
    for step in range(0, tl.cdiv(n0 * n1, ROWS)):
        rows = step * ROWS + tl.arange(0, ROWS)
        x0, x1 = rows // n1, rows % n1
        i0, i1, r0, r1 = x0 // d0, x1 // d1, x0 % d0, x1 % d1
        m0, m1 = tl.cdiv(n0 - r0, d0), tl.cdiv(n1 - r1, d1)
        j0, j1 = i0 + o0, i1 + o1
        keep = (j0 >= _first(i0, m0, k0, s0, CAUSAL0)) & (j0 < _stop(i0, m0, k0, s0, CAUSAL0))
        keep &= (j1 >= _first(i1, m1, k1, s1, CAUSAL1)) & (j1 < _stop(i1, m1, k1, s1, CAUSAL1))
        keep &= rows < n0 * n1
        keys = rows + o0 * d0 * n1 + o1 * d1
        s = tl.sum(
            load_rows(q, q_row, rows, keep, D, BLOCK_D, UPCAST).to(tl.float32)
            * load_rows(k, k_row, keys, keep, D, BLOCK_D, UPCAST).to(tl.float32),
            1,
        )
        dp = tl.sum(
            load_rows(dout + start * DV, DV, rows, keep, DV, BLOCK_DV, UPCAST).to(tl.float32)
            * load_rows(v, v_row, keys, keep, DV, BLOCK_DV, UPCAST).to(tl.float32),
            1,
        )
        base = tl.load(lse + start + rows, mask=keep, other=float("inf")) * LOG2_E
        mean = tl.load(delta + start + rows, mask=keep, other=0.0)
        total += tl.where(keep, tl.exp2(s * (scale * LOG2_E) + bias - base) * (dp - mean), 0.0)
    tl.store(drpb + pid, tl.sum(total, 0))
