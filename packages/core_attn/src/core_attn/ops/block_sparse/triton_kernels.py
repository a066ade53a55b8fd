"""Block-sparse attention on the GPU: the kernels in Triton.

"FlashAttention" (S66), section 3.3 and algorithm 5. A mask of blocks becomes lists: for each block of queries the
blocks of keys that it reads, and for each block of keys the blocks of queries that read it. A program owns BLOCK_M
queries (for the gradient of the keys, BLOCK_N keys) of one block and walks over its list in pieces of BLOCK_N keys
(BLOCK_M queries).

Names: L queries, M keys, `rows` queries and `columns` keys of a block, `row_blocks` and `column_blocks` their numbers,
`ahead` = M - L, by which a query's position exceeds its number.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs
from __future__ import annotations

import triton
import triton.language as tl

from core_attn.triton_steps import LOG2_E, absorb, dot, finish, load_rows, store_rows


@triton.jit
def list_blocks(
    blocks, places, counts,
    own, other, own_stride, other_stride, rows, columns, ahead,
    CAUSAL: tl.constexpr, QUERIES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """`places` (tables, own, other): what each line of `blocks` (tables, …) holds, in order; `counts`: how much.

    Lines are blocks of queries where QUERIES, else blocks of keys. Blocks that lie wholly in the future are left out.
    """
    pid = tl.program_id(0).to(tl.int64)
    line = pid % own
    blocks += pid // own * own * other + line * own_stride
    places += pid * other
    found = 0
    for step in range(0, tl.cdiv(other, BLOCK)):
        at = step * BLOCK + tl.arange(0, BLOCK)
        keep = tl.load(blocks + at * other_stride, mask=at < other, other=0) != 0
        if CAUSAL:
            if QUERIES:
                keep &= at * columns <= (line + 1) * rows - 1 + ahead
            else:
                keep &= (at + 1) * rows - 1 + ahead >= line * columns
        number = tl.cumsum(keep.to(tl.int32), 0)
        tl.store(places + found + number - 1, at, mask=keep)
        found += tl.sum(keep.to(tl.int32), 0)
    tl.store(counts + pid, found)


@triton.jit
def _allowed(rows, keys, padding, L, M, ahead, CAUSAL: tl.constexpr, PADDING: tl.constexpr):
    """Which of the keys each row may read; `rows` and `keys` broadcast against each other."""
    keep = (rows < L) & (keys < M)
    if CAUSAL:
        keep &= keys <= rows + ahead
    if PADDING:
        keep &= tl.load(padding + keys, mask=keys < M, other=0) != 0
    return keep


@triton.jit
def forward(
    q, k, v, padding, places, counts, out, lse,
    q_batch, q_head, q_row, k_batch, k_head, k_row, v_batch, v_head, v_row, table_batch, table_head,
    heads, shared, L, M, row_blocks, column_blocks, rows, columns, ahead, scale,
    CAUSAL: tl.constexpr, PADDING: tl.constexpr,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    UPCAST: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """`out` (B, H, L, DV) and `lse` (B, H, L), both contiguous."""
    pid = tl.program_id(0)
    tiles = row_blocks * (rows // BLOCK_M)
    tile, bh = pid % tiles, (pid // tiles).to(tl.int64)
    batch, head = bh // heads, bh % heads
    q += batch * q_batch + head * q_head
    k += batch * k_batch + head // shared * k_head
    v += batch * v_batch + head // shared * v_head
    padding += batch * M
    line = (batch * table_batch + head * table_head) * row_blocks + tile * BLOCK_M // rows

    row = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    real = row < L
    queries = load_rows(q, q_row, row, real, D, BLOCK_D, UPCAST)
    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    summed = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)
    pieces = columns // BLOCK_N
    for step in range(0, tl.load(counts + line) * pieces):
        block = tl.load(places + line * column_blocks + step // pieces)
        key = block * columns + step % pieces * BLOCK_N + tl.arange(0, BLOCK_N)
        keys = load_rows(k, k_row, key, key < M, D, BLOCK_D, UPCAST)
        s = dot(queries, tl.trans(keys)) * (scale * LOG2_E)
        s = tl.where(_allowed(row[:, None], key[None, :], padding, L, M, ahead, CAUSAL, PADDING), s, float("-inf"))
        values = load_rows(v, v_row, key, key < M, DV, BLOCK_DV, UPCAST)
        top, total, summed = absorb(s, values, top, total, summed)

    result, statistics = finish(top, total, summed)
    store_rows(out + bh * L * DV, DV, row, real, result, DV, BLOCK_DV)
    tl.store(lse + bh * L + row, statistics, mask=real)


@triton.jit
def backward_queries(
    q, k, v, padding, places, counts, out, lse, dout, delta, dq,
    q_batch, q_head, q_row, k_batch, k_head, k_row, v_batch, v_head, v_row, table_batch, table_head,
    heads, shared, L, M, row_blocks, column_blocks, rows, columns, ahead, scale,
    CAUSAL: tl.constexpr, PADDING: tl.constexpr,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    UPCAST: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """`dq` (B, H, L, D) and `delta` (B, H, L), the sum over channels of out · dout; all but q, k, v are contiguous."""
    pid = tl.program_id(0)
    tiles = row_blocks * (rows // BLOCK_M)
    tile, bh = pid % tiles, (pid // tiles).to(tl.int64)
    batch, head = bh // heads, bh % heads
    q += batch * q_batch + head * q_head
    k += batch * k_batch + head // shared * k_head
    v += batch * v_batch + head // shared * v_head
    padding += batch * M
    line = (batch * table_batch + head * table_head) * row_blocks + tile * BLOCK_M // rows

    row = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    real = row < L
    queries = load_rows(q, q_row, row, real, D, BLOCK_D, UPCAST)
    gradient = load_rows(dout + bh * L * DV, DV, row, real, DV, BLOCK_DV, UPCAST)
    result = load_rows(out + bh * L * DV, DV, row, real, DV, BLOCK_DV, UPCAST)
    mean = tl.sum(gradient.to(tl.float32) * result.to(tl.float32), 1)
    tl.store(delta + bh * L + row, mean, mask=real)
    base = tl.load(lse + bh * L + row, mask=real, other=float("inf")) * LOG2_E
    total = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    pieces = columns // BLOCK_N
    for step in range(0, tl.load(counts + line) * pieces):
        block = tl.load(places + line * column_blocks + step // pieces)
        key = block * columns + step % pieces * BLOCK_N + tl.arange(0, BLOCK_N)
        keys = load_rows(k, k_row, key, key < M, D, BLOCK_D, UPCAST)
        values = load_rows(v, v_row, key, key < M, DV, BLOCK_DV, UPCAST)
        s = dot(queries, tl.trans(keys)) * (scale * LOG2_E)
        keep = _allowed(row[:, None], key[None, :], padding, L, M, ahead, CAUSAL, PADDING)
        p = tl.where(keep, tl.exp2(s - base[:, None]), 0.0)
        ds = p * (dot(gradient, tl.trans(values)) - mean[:, None])
        total += dot(ds.to(keys.dtype), keys)
    store_rows(dq + bh * L * D, D, row, real, total * scale, D, BLOCK_D)


@triton.jit
def backward_keys(
    q, k, v, padding, places, counts, lse, dout, delta, dk, dv,
    q_batch, q_head, q_row, k_batch, k_head, k_row, v_batch, v_head, v_row, table_batch, table_head,
    heads, shared, L, M, row_blocks, column_blocks, rows, columns, ahead, scale,
    CAUSAL: tl.constexpr, PADDING: tl.constexpr,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    UPCAST: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """`dk` (B, Hkv, M, D) and `dv` (B, Hkv, M, DV), contiguous; a program walks over the `shared` query heads too."""
    pid = tl.program_id(0)
    tiles = column_blocks * (columns // BLOCK_N)
    tile, group = pid % tiles, (pid // tiles).to(tl.int64)
    groups = heads // shared
    batch = group // groups
    k += batch * k_batch + group % groups * k_head
    v += batch * v_batch + group % groups * v_head
    padding += batch * M

    key = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    real = key < M
    keys = load_rows(k, k_row, key, real, D, BLOCK_D, UPCAST)
    values = load_rows(v, v_row, key, real, DV, BLOCK_DV, UPCAST)
    key_total = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    value_total = tl.zeros([BLOCK_N, BLOCK_DV], tl.float32)
    pieces = rows // BLOCK_M
    for member in range(0, shared):
        head = group % groups * shared + member
        bh = batch * heads + head
        line = (batch * table_batch + head * table_head) * column_blocks + tile * BLOCK_N // columns
        for step in range(0, tl.load(counts + line) * pieces):
            block = tl.load(places + line * row_blocks + step // pieces)
            row = block * rows + step % pieces * BLOCK_M + tl.arange(0, BLOCK_M)
            inside = row < L
            queries = load_rows(q + batch * q_batch + head * q_head, q_row, row, inside, D, BLOCK_D, UPCAST)
            gradient = load_rows(dout + bh * L * DV, DV, row, inside, DV, BLOCK_DV, UPCAST)
            base = tl.load(lse + bh * L + row, mask=inside, other=float("inf")) * LOG2_E
            mean = tl.load(delta + bh * L + row, mask=inside, other=0.0)
            s = dot(keys, tl.trans(queries)) * (scale * LOG2_E)
            keep = _allowed(row[None, :], key[:, None], padding, L, M, ahead, CAUSAL, PADDING)
            p = tl.where(keep, tl.exp2(s - base[None, :]), 0.0)
            value_total += dot(p.to(gradient.dtype), gradient)
            ds = p * (dot(values, tl.trans(gradient)) - mean[None, :])
            key_total += dot(ds.to(queries.dtype), queries)
    store_rows(dk + group * M * D, D, key, real, key_total * scale, D, BLOCK_D)
    store_rows(dv + group * M * DV, DV, key, real, value_total, DV, BLOCK_DV)
