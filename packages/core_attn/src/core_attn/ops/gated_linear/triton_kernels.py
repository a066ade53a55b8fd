"""The Triton kernels of gated linear attention. Imported on first use only, as Triton may be absent.

"Gated Linear Attention Transformers with Hardware-Efficient Training" (S196), section 4, in two levels: chunks, between
which a state is handed on, and sub-chunks of SUB tokens inside them. Whatever is in an exponent is a sum of log-gates
from one token to another, added up from those gates and never the difference of two longer sums: exponents are never
positive, and are as exact as the gates however strong those before them are. So queries meet keys of earlier sub-chunks
in a matrix product with the border between them as the reference; inside a sub-chunk, where no reference is safe, each
pair has an exponential of its own.

`ahead` is the sum of the gates from the start of the chunk or sub-chunk up to a token and with it, `behind` of those
behind a token up to the end. Weights and their gradients hold `scale`, and lie as (B, H, T, CHUNK).
"""

# mypy: allow-untyped-defs, allow-incomplete-defs
from __future__ import annotations

import triton
import triton.language as tl

from core_attn.triton_chunks import dot, given, load_row, load_tile, operand, place, state_dot, store_tile

# A log-gate below this is a gate of 0; it keeps minus infinity out of sums.
_CLOSED = tl.constexpr(-1e4)
SUB = tl.constexpr(16)


@triton.jit
def _gates(base, stride, start, stop, column, ROWS: tl.constexpr, COLUMNS: tl.constexpr, WIDTH: tl.constexpr):
    return tl.maximum(load_tile(base, stride, start, stop, column, ROWS, COLUMNS, WIDTH).to(tl.float32), _CLOSED)


@triton.jit
def _ahead(base, stride, start, stop, column, ROWS: tl.constexpr, COLUMNS: tl.constexpr, WIDTH: tl.constexpr):
    """(ROWS, COLUMNS): sums from row `start` up to a row and with it."""
    return tl.cumsum(_gates(base, stride, start, stop, column, ROWS, COLUMNS, WIDTH), 0)


@triton.jit
def _behind(base, stride, start, stop, column, ROWS: tl.constexpr, COLUMNS: tl.constexpr, WIDTH: tl.constexpr):
    """(ROWS, COLUMNS): sums over the rows behind a row, before `stop`."""
    return tl.cumsum(_gates(base, stride, start + 1, stop, column, ROWS, COLUMNS, WIDTH), 0, reverse=True)


@triton.jit
def _total(base, stride, start, stop, column, ROWS: tl.constexpr, COLUMNS: tl.constexpr, WIDTH: tl.constexpr):
    """(COLUMNS,): sum over all rows."""
    return tl.sum(_gates(base, stride, start, stop, column, ROWS, COLUMNS, WIDTH), 0)


@triton.jit
def states_forward(
    k,
    v,
    g,
    initial,
    offsets,
    states,
    final,
    k_batch,
    k_head,
    k_row,
    v_batch,
    v_head,
    v_row,
    g_batch,
    g_head,
    g_row,
    heads,
    tokens,
    length,
    CHUNK: tl.constexpr,
    D: tl.constexpr,
    DV: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr,
    INITIAL: tl.constexpr,
    PACKED: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """The state before every chunk and behind the last; a program owns a block of it, for one sequence and head."""
    key_blocks: tl.constexpr = (D + BLOCK_K - 1) // BLOCK_K
    value_blocks: tl.constexpr = (DV + BLOCK_V - 1) // BLOCK_V
    program = tl.program_id(0)
    value = program % value_blocks * BLOCK_V
    key = program // value_blocks % key_blocks * BLOCK_K
    entry, head, batch, first, length, _row, chunk = place(
        program // value_blocks // key_blocks, heads, tokens, length, offsets, CHUNK, PACKED
    )
    k += batch * k_batch + head * k_head + first * k_row
    v += batch * v_batch + head * v_head + first * v_row
    g += batch * g_batch + head * g_head + first * g_row
    states += (chunk * heads + head) * (D * DV)
    whole = (entry * heads + head) * (D * DV)
    if INITIAL:
        state = load_tile(initial + whole, DV, key, D, value, BLOCK_K, BLOCK_V, DV)
    else:
        state = tl.zeros((BLOCK_K, BLOCK_V), tl.float32)
    for start in range(0, length, CHUNK):
        store_tile(states, DV, key, D, value, state, BLOCK_K, BLOCK_V, DV, UPCAST)
        states += heads * (D * DV)
        stop = tl.minimum(start + CHUNK, length)
        fall = tl.exp(_total(g, g_row, start, stop, key, CHUNK, BLOCK_K, D))
        keep = tl.exp(_behind(g, g_row, start, stop, key, CHUNK, BLOCK_K, D))
        kept = load_tile(k, k_row, start, stop, key, CHUNK, BLOCK_K, D).to(tl.float32) * keep
        values = given(load_tile(v, v_row, start, stop, value, CHUNK, BLOCK_V, DV), UPCAST)
        state = state * fall[:, None] + dot(tl.trans(operand(kept, k, UPCAST)), values)
    store_tile(final + whole, DV, key, D, value, state, BLOCK_K, BLOCK_V, DV, UPCAST)


@triton.jit
def states_backward(
    q,
    g,
    dout,
    dfinal,
    offsets,
    dstates,
    dinitial,
    q_batch,
    q_head,
    q_row,
    g_batch,
    g_head,
    g_row,
    heads,
    tokens,
    length,
    scale,
    CHUNK: tl.constexpr,
    D: tl.constexpr,
    DV: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr,
    PACKED: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """The gradient of the state behind every chunk and before the first, from the last chunk on."""
    key_blocks: tl.constexpr = (D + BLOCK_K - 1) // BLOCK_K
    value_blocks: tl.constexpr = (DV + BLOCK_V - 1) // BLOCK_V
    program = tl.program_id(0)
    value = program % value_blocks * BLOCK_V
    key = program // value_blocks % key_blocks * BLOCK_K
    entry, head, batch, first, length, row, chunk = place(
        program // value_blocks // key_blocks, heads, tokens, length, offsets, CHUNK, PACKED
    )
    q += batch * q_batch + head * q_head + first * q_row
    g += batch * g_batch + head * g_head + first * g_row
    dout += row * DV
    dstates += (chunk * heads + head) * (D * DV)
    whole = (entry * heads + head) * (D * DV)
    dstate = load_tile(dfinal + whole, DV, key, D, value, BLOCK_K, BLOCK_V, DV)
    chunks = tl.cdiv(length, CHUNK)
    for turn in range(0, chunks):
        t = chunks - 1 - turn
        start = t * CHUNK
        stop = tl.minimum(start + CHUNK, length)
        at = dstates + t.to(tl.int64) * heads * (D * DV)
        store_tile(at, DV, key, D, value, dstate, BLOCK_K, BLOCK_V, DV, UPCAST)
        fall = tl.exp(_total(g, g_row, start, stop, key, CHUNK, BLOCK_K, D))
        ahead = tl.exp(_ahead(g, g_row, start, stop, key, CHUNK, BLOCK_K, D))
        read = load_tile(q, q_row, start, stop, key, CHUNK, BLOCK_K, D).to(tl.float32) * ahead
        d = given(load_tile(dout, DV, start, stop, value, CHUNK, BLOCK_V, DV), UPCAST)
        dstate = dstate * fall[:, None] + dot(tl.trans(operand(read, q, UPCAST)), d) * scale
    store_tile(dinitial + whole, DV, key, D, value, dstate, BLOCK_K, BLOCK_V, DV, UPCAST)


@triton.jit
def weights_forward(
    q,
    k,
    g,
    offsets,
    weights,
    q_batch,
    q_head,
    q_row,
    k_batch,
    k_head,
    k_row,
    g_batch,
    g_head,
    g_row,
    heads,
    tokens,
    length,
    chunks,
    scale,
    CHUNK: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PACKED: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """What every token reads from those of its chunk up to itself; a program owns a sub-chunk of queries."""
    program = tl.program_id(0)
    subs: tl.constexpr = CHUNK // SUB
    sub = program % subs
    t = program // subs % chunks
    _entry, head, batch, first, length, row, _chunk = place(
        program // subs // chunks, heads, tokens, length, offsets, CHUNK, PACKED
    )
    start = t * CHUNK
    own = start + sub * SUB
    if own >= length:
        return
    stop = tl.minimum(own + SUB, length)
    q += batch * q_batch + head * q_head + first * q_row
    k += batch * k_batch + head * k_head + first * k_row
    g += batch * g_batch + head * g_head + first * g_row
    weights += row * CHUNK
    queries = load_tile(q, q_row, own, stop, 0, SUB, BLOCK_D, D).to(tl.float32) * scale
    read = operand(queries * tl.exp(_ahead(g, g_row, own, stop, 0, SUB, BLOCK_D, D)), q, UPCAST)
    between = tl.zeros((BLOCK_D,), tl.float32)
    for turn in range(0, sub):
        other = own - (turn + 1) * SUB
        behind = _behind(g, g_row, other, other + SUB, 0, SUB, BLOCK_D, D) + between[None, :]
        kept = load_tile(k, k_row, other, other + SUB, 0, SUB, BLOCK_D, D).to(tl.float32) * tl.exp(behind)
        part = dot(read, tl.trans(operand(kept, k, UPCAST)))
        store_tile(weights, CHUNK, own, stop, other - start, part, SUB, SUB, CHUNK, UPCAST)
        between += _total(g, g_row, other, other + SUB, 0, SUB, BLOCK_D, D)
    # Keys of the own sub-chunk from the last to the first: of token i, `falls` sums the gates behind key j.
    i = tl.arange(0, SUB)
    falls = tl.zeros((SUB, BLOCK_D), tl.float32)
    part = tl.zeros((SUB, SUB), tl.float32)
    for turn in range(0, SUB):
        j = SUB - 1 - turn
        gate = tl.maximum(load_row(g, g_row, own + j + 1, stop, 0, BLOCK_D, D), _CLOSED)
        falls = tl.where((i > j)[:, None], falls + gate[None, :], 0.0)
        key = load_row(k, k_row, own + j, stop, 0, BLOCK_D, D)
        weight = tl.sum(queries * key[None, :] * tl.exp(falls), 1)
        part = tl.where((i >= j)[:, None] & (i == j)[None, :], weight[:, None], part)
    store_tile(weights, CHUNK, own, stop, sub * SUB, part, SUB, SUB, CHUNK, UPCAST)
    for other in range(sub + 1, subs):
        store_tile(weights, CHUNK, own, stop, other * SUB, tl.zeros((SUB, SUB), tl.float32), SUB, SUB, CHUNK, UPCAST)


@triton.jit
def output_forward(
    q,
    v,
    g,
    offsets,
    weights,
    states,
    out,
    q_batch,
    q_head,
    q_row,
    v_batch,
    v_head,
    v_row,
    g_batch,
    g_head,
    g_row,
    heads,
    tokens,
    length,
    chunks,
    scale,
    CHUNK: tl.constexpr,
    D: tl.constexpr,
    DV: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr,
    PACKED: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """Outputs from the state before the chunk and from the weights inside it; a program owns a block of values."""
    value_blocks: tl.constexpr = (DV + BLOCK_V - 1) // BLOCK_V
    program = tl.program_id(0)
    value = program % value_blocks * BLOCK_V
    t = program // value_blocks % chunks
    _entry, head, batch, first, length, row, chunk = place(
        program // value_blocks // chunks, heads, tokens, length, offsets, CHUNK, PACKED
    )
    start = t * CHUNK
    if start >= length:
        return
    stop = tl.minimum(start + CHUNK, length)
    q += batch * q_batch + head * q_head + first * q_row
    v += batch * v_batch + head * v_head + first * v_row
    g += batch * g_batch + head * g_head + first * g_row
    states += ((chunk + t) * heads + head) * (D * DV)
    summed = tl.zeros((CHUNK, BLOCK_V), tl.float32)
    for key in range(0, D, BLOCK_K):
        ahead = tl.exp(_ahead(g, g_row, start, stop, key, CHUNK, BLOCK_K, D))
        read = load_tile(q, q_row, start, stop, key, CHUNK, BLOCK_K, D).to(tl.float32) * ahead
        state = load_tile(states, DV, key, D, value, BLOCK_K, BLOCK_V, DV)
        summed += state_dot(read, state, q, UPCAST)
    summed *= scale
    inside = given(load_tile(weights + row * CHUNK, CHUNK, start, stop, 0, CHUNK, CHUNK, CHUNK), UPCAST)
    values = given(load_tile(v, v_row, start, stop, value, CHUNK, BLOCK_V, DV), UPCAST)
    summed += dot(inside, values)
    store_tile(out + row * DV, DV, start, stop, value, summed, CHUNK, BLOCK_V, DV, UPCAST)


@triton.jit
def weights_backward(
    v,
    dout,
    offsets,
    dweights,
    v_batch,
    v_head,
    v_row,
    heads,
    tokens,
    length,
    chunks,
    scale,
    CHUNK: tl.constexpr,
    DV: tl.constexpr,
    BLOCK_V: tl.constexpr,
    PACKED: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """Gradients of the weights of a chunk."""
    program = tl.program_id(0)
    t = program % chunks
    _entry, head, batch, first, length, row, _chunk = place(
        program // chunks, heads, tokens, length, offsets, CHUNK, PACKED
    )
    start = t * CHUNK
    if start >= length:
        return
    stop = tl.minimum(start + CHUNK, length)
    v += batch * v_batch + head * v_head + first * v_row
    summed = tl.zeros((CHUNK, CHUNK), tl.float32)
    for value in range(0, DV, BLOCK_V):
        d = given(load_tile(dout + row * DV, DV, start, stop, value, CHUNK, BLOCK_V, DV), UPCAST)
        values = given(load_tile(v, v_row, start, stop, value, CHUNK, BLOCK_V, DV), UPCAST)
        summed += dot(d, tl.trans(values))
    i = tl.arange(0, CHUNK)
    summed = tl.where(i[:, None] >= i[None, :], summed * scale, 0.0)
    store_tile(dweights + row * CHUNK, CHUNK, start, stop, 0, summed, CHUNK, CHUNK, CHUNK, UPCAST)


@triton.jit
def values_backward(
    k,
    g,
    dout,
    offsets,
    weights,
    dstates,
    dv,
    k_batch,
    k_head,
    k_row,
    g_batch,
    g_head,
    g_row,
    heads,
    tokens,
    length,
    chunks,
    CHUNK: tl.constexpr,
    D: tl.constexpr,
    DV: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr,
    PACKED: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """Gradients of the values; a program owns a block of them in a chunk."""
    value_blocks: tl.constexpr = (DV + BLOCK_V - 1) // BLOCK_V
    program = tl.program_id(0)
    value = program % value_blocks * BLOCK_V
    t = program // value_blocks % chunks
    _entry, head, batch, first, length, row, chunk = place(
        program // value_blocks // chunks, heads, tokens, length, offsets, CHUNK, PACKED
    )
    start = t * CHUNK
    if start >= length:
        return
    stop = tl.minimum(start + CHUNK, length)
    k += batch * k_batch + head * k_head + first * k_row
    g += batch * g_batch + head * g_head + first * g_row
    dstates += ((chunk + t) * heads + head) * (D * DV)
    inside = given(load_tile(weights + row * CHUNK, CHUNK, start, stop, 0, CHUNK, CHUNK, CHUNK), UPCAST)
    d = given(load_tile(dout + row * DV, DV, start, stop, value, CHUNK, BLOCK_V, DV), UPCAST)
    summed = dot(tl.trans(inside), d)
    for key in range(0, D, BLOCK_K):
        keep = tl.exp(_behind(g, g_row, start, stop, key, CHUNK, BLOCK_K, D))
        kept = load_tile(k, k_row, start, stop, key, CHUNK, BLOCK_K, D).to(tl.float32) * keep
        dstate = load_tile(dstates, DV, key, D, value, BLOCK_K, BLOCK_V, DV)
        summed += state_dot(kept, dstate, k, UPCAST)
    store_tile(dv + row * DV, DV, start, stop, value, summed, CHUNK, BLOCK_V, DV, UPCAST)


@triton.jit
def inside_backward(
    q,
    k,
    g,
    offsets,
    dweights,
    dq_inside,
    dk_inside,
    q_batch,
    q_head,
    q_row,
    k_batch,
    k_head,
    k_row,
    g_batch,
    g_head,
    g_row,
    heads,
    tokens,
    length,
    chunks,
    CHUNK: tl.constexpr,
    D: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PACKED: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """Gradients of queries and keys by the weights of their chunk; a program owns a sub-chunk of both."""
    key_blocks: tl.constexpr = (D + BLOCK_K - 1) // BLOCK_K
    subs: tl.constexpr = CHUNK // SUB
    program = tl.program_id(0)
    key = program % key_blocks * BLOCK_K
    sub = program // key_blocks % subs
    t = program // key_blocks // subs % chunks
    _entry, head, batch, first, length, row, _chunk = place(
        program // key_blocks // subs // chunks, heads, tokens, length, offsets, CHUNK, PACKED
    )
    start = t * CHUNK
    own = start + sub * SUB
    if own >= length:
        return
    stop = tl.minimum(own + SUB, length)
    q += batch * q_batch + head * q_head + first * q_row
    k += batch * k_batch + head * k_head + first * k_row
    g += batch * g_batch + head * g_head + first * g_row
    dweights += row * CHUNK
    i = tl.arange(0, SUB)

    dq = tl.zeros((SUB, BLOCK_K), tl.float32)
    between = tl.zeros((BLOCK_K,), tl.float32)
    for turn in range(0, sub):
        other = own - (turn + 1) * SUB
        behind = _behind(g, g_row, other, other + SUB, key, SUB, BLOCK_K, D) + between[None, :]
        kept = load_tile(k, k_row, other, other + SUB, key, SUB, BLOCK_K, D).to(tl.float32) * tl.exp(behind)
        d = given(load_tile(dweights, CHUNK, own, stop, other - start, SUB, SUB, CHUNK), UPCAST)
        dq += dot(d, operand(kept, k, UPCAST))
        between += _total(g, g_row, other, other + SUB, key, SUB, BLOCK_K, D)
    dq *= tl.exp(_ahead(g, g_row, own, stop, key, SUB, BLOCK_K, D))
    # As the weights of a sub-chunk are made: keys j from the last to the first, whose gates add up in `falls`.
    falls = tl.zeros((SUB, BLOCK_K), tl.float32)
    for turn in range(0, SUB):
        j = SUB - 1 - turn
        gate = tl.maximum(load_row(g, g_row, own + j + 1, stop, key, BLOCK_K, D), _CLOSED)
        falls = tl.where((i > j)[:, None], falls + gate[None, :], 0.0)
        at = dweights + tl.cast(own, tl.int64) * CHUNK + i * CHUNK + (sub * SUB + j)
        d = tl.load(at, mask=(i >= j) & (own + i < stop), other=0.0).to(tl.float32)
        dq += d[:, None] * load_row(k, k_row, own + j, stop, key, BLOCK_K, D)[None, :] * tl.exp(falls)
    store_tile(dq_inside + row * D, D, own, stop, key, dq, SUB, BLOCK_K, D, UPCAST)

    dk = tl.zeros((SUB, BLOCK_K), tl.float32)
    between = tl.zeros((BLOCK_K,), tl.float32)
    end = tl.minimum(start + CHUNK, length)
    for other in range(own + SUB, end, SUB):
        ahead = _ahead(g, g_row, other, end, key, SUB, BLOCK_K, D) + between[None, :]
        read = load_tile(q, q_row, other, end, key, SUB, BLOCK_K, D).to(tl.float32) * tl.exp(ahead)
        d = given(load_tile(dweights, CHUNK, other, end, sub * SUB, SUB, SUB, CHUNK), UPCAST)
        dk += dot(tl.trans(d), operand(read, q, UPCAST))
        between += _total(g, g_row, other, end, key, SUB, BLOCK_K, D)
    dk *= tl.exp(_behind(g, g_row, own, stop, key, SUB, BLOCK_K, D))
    # Queries from the first to the last: of key j, here in row i, the gates behind it up to the query add up.
    falls = tl.zeros((SUB, BLOCK_K), tl.float32)
    for reader in range(0, SUB):
        gate = tl.maximum(load_row(g, g_row, own + reader, stop, key, BLOCK_K, D), _CLOSED)
        falls = tl.where((i < reader)[:, None], falls + gate[None, :], 0.0)
        at = dweights + tl.cast(own + reader, tl.int64) * CHUNK + (sub * SUB + i)
        d = tl.load(at, mask=i <= tl.where(own + reader < stop, reader, -1), other=0.0).to(tl.float32)
        dk += d[:, None] * load_row(q, q_row, own + reader, stop, key, BLOCK_K, D)[None, :] * tl.exp(falls)
    store_tile(dk_inside + row * D, D, own, stop, key, dk, SUB, BLOCK_K, D, UPCAST)


@triton.jit
def keys_backward(
    q,
    k,
    v,
    g,
    dout,
    offsets,
    states,
    dstates,
    dq_inside,
    dk_inside,
    dq,
    dk,
    dg,
    q_batch,
    q_head,
    q_row,
    k_batch,
    k_head,
    k_row,
    v_batch,
    v_head,
    v_row,
    g_batch,
    g_head,
    g_row,
    heads,
    tokens,
    length,
    chunks,
    scale,
    CHUNK: tl.constexpr,
    D: tl.constexpr,
    DV: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr,
    PACKED: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """Gradients of queries, keys and gates; a program owns a block of their channels in a chunk.

    A gate is felt by every token at or behind it that reads one before it. Inside the chunk these are all pairs read at
    or behind it, q · dq, without those written there, k · dk. Of the tokens that read the state before the chunk, it is
    those at or behind the gate; of those that wrote to the state behind it, those before the gate; and the state that
    crosses the whole chunk feels every gate.
    """
    key_blocks: tl.constexpr = (D + BLOCK_K - 1) // BLOCK_K
    program = tl.program_id(0)
    key = program % key_blocks * BLOCK_K
    t = program // key_blocks % chunks
    _entry, head, batch, first, length, row, chunk = place(
        program // key_blocks // chunks, heads, tokens, length, offsets, CHUNK, PACKED
    )
    start = t * CHUNK
    if start >= length:
        return
    stop = tl.minimum(start + CHUNK, length)
    q += batch * q_batch + head * q_head + first * q_row
    k += batch * k_batch + head * k_head + first * k_row
    v += batch * v_batch + head * v_head + first * v_row
    g += batch * g_batch + head * g_head + first * g_row
    states += ((chunk + t) * heads + head) * (D * DV)
    dstates += ((chunk + t) * heads + head) * (D * DV)
    to_q = tl.zeros((CHUNK, BLOCK_K), tl.float32)
    to_k = tl.zeros((CHUNK, BLOCK_K), tl.float32)
    crossing = tl.zeros((BLOCK_K,), tl.float32)
    for value in range(0, DV, BLOCK_V):
        state = load_tile(states, DV, key, D, value, BLOCK_K, BLOCK_V, DV)
        dstate = load_tile(dstates, DV, key, D, value, BLOCK_K, BLOCK_V, DV)
        crossing += tl.sum(state * dstate, 1)
        d = load_tile(dout + row * DV, DV, start, stop, value, CHUNK, BLOCK_V, DV)
        to_q += state_dot(d.to(tl.float32), tl.trans(state), q, UPCAST)
        values = load_tile(v, v_row, start, stop, value, CHUNK, BLOCK_V, DV)
        to_k += state_dot(values.to(tl.float32), tl.trans(dstate), k, UPCAST)
    crossing *= tl.exp(_total(g, g_row, start, stop, key, CHUNK, BLOCK_K, D))

    to_k *= tl.exp(_behind(g, g_row, start, stop, key, CHUNK, BLOCK_K, D))
    keys = load_tile(k, k_row, start, stop, key, CHUNK, BLOCK_K, D).to(tl.float32)
    written = keys * to_k
    dgate = tl.cumsum(written, 0) - written + crossing[None, :]
    inside = load_tile(dk_inside + row * D, D, start, stop, key, CHUNK, BLOCK_K, D)
    store_tile(dk + row * D, D, start, stop, key, to_k + inside, CHUNK, BLOCK_K, D, UPCAST)
    felt = -keys * inside

    to_q *= tl.exp(_ahead(g, g_row, start, stop, key, CHUNK, BLOCK_K, D)) * scale
    to_q += load_tile(dq_inside + row * D, D, start, stop, key, CHUNK, BLOCK_K, D)
    store_tile(dq + row * D, D, start, stop, key, to_q, CHUNK, BLOCK_K, D, UPCAST)
    felt += load_tile(q, q_row, start, stop, key, CHUNK, BLOCK_K, D).to(tl.float32) * to_q
    dgate += tl.cumsum(felt, 0, reverse=True)
    store_tile(dg + row * D, D, start, stop, key, dgate, CHUNK, BLOCK_K, D, UPCAST)
