"""The Triton kernels of linear attention with scalar decay. Imported on first use only, as Triton may be absent.

"Lightning Attention-2" (S215), algorithms 1 and 2, and "Transformers are SSMs" (Dao and Gu, 2024), section 6: inside a
chunk the scores of all pairs take factors from a mask, between chunks a state is handed on. Exponents are sums of
log-decays from one token to another, added up from those and never the difference of two longer sums: they are never
positive, and as exact as the log-decays however strong those before them are.

Head h of the values has the queries and keys of head h // shared. FIXED says that a head's log-decay is the same for
all tokens. `ahead` is the factor of the decays from the start of the chunk up to a token and with it, `behind` of those
behind a token up to the end.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs
from __future__ import annotations

import triton
import triton.language as tl

from core_attn.triton_chunks import dot, given, load_tile, operand, place, state_dot, store_tile

# A log-decay below this is a factor of 0; it keeps minus infinity out of sums.
_CLOSED = tl.constexpr(-1e4)


@triton.jit
def _gates(g, g_row, start, stop, CHUNK: tl.constexpr):
    """(CHUNK,) log-decays from token `start` on; zeros from `stop` on."""
    at = start + tl.arange(0, CHUNK)
    return tl.maximum(tl.load(g + at.to(tl.int64) * g_row, mask=at < stop, other=0.0).to(tl.float32), _CLOSED)


@triton.jit
def _factors(g, g_row, start, stop, CHUNK: tl.constexpr, FIXED: tl.constexpr):
    """`ahead` and `behind`, (CHUNK,), and what the whole chunk leaves of a state."""
    if FIXED:
        i = tl.arange(0, CHUNK)
        gate = tl.maximum(tl.load(g).to(tl.float32), _CLOSED)
        count = stop - start
        ahead = (i + 1).to(tl.float32) * gate
        behind = tl.maximum(count - 1 - i, 0).to(tl.float32) * gate
        total = count.to(tl.float32) * gate
    else:
        gates = _gates(g, g_row, start, stop, CHUNK)
        ahead = tl.cumsum(gates, 0)
        behind = tl.cumsum(_gates(g, g_row, start + 1, stop, CHUNK), 0, reverse=True)
        total = tl.sum(gates, 0)
    return tl.exp(ahead), tl.exp(behind), tl.exp(total)


@triton.jit
def _mask(g, g_row, start, stop, CHUNK: tl.constexpr, FIXED: tl.constexpr):
    """(CHUNK, CHUNK) what the decays leave of key j at token i; zeros above the diagonal."""
    i = tl.arange(0, CHUNK)
    if FIXED:
        gate = tl.maximum(tl.load(g).to(tl.float32), _CLOSED)
        falls = tl.maximum(i[:, None] - i[None, :], 0).to(tl.float32) * gate
    else:
        gates = _gates(g, g_row, start, stop, CHUNK)
        falls = tl.cumsum(tl.where(i[:, None] > i[None, :], gates[:, None], 0.0), 0)
    return tl.where(i[:, None] >= i[None, :], tl.exp(falls), 0.0)


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
    shared,
    tokens,
    length,
    CHUNK: tl.constexpr,
    D: tl.constexpr,
    DV: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr,
    FIXED: tl.constexpr,
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
    k += batch * k_batch + head // shared * k_head + first * k_row
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
        _ahead, behind, fall = _factors(g, g_row, start, stop, CHUNK, FIXED)
        kept = load_tile(k, k_row, start, stop, key, CHUNK, BLOCK_K, D).to(tl.float32) * behind[:, None]
        values = given(load_tile(v, v_row, start, stop, value, CHUNK, BLOCK_V, DV), UPCAST)
        state = state * fall + dot(tl.trans(operand(kept, k, UPCAST)), values)
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
    shared,
    tokens,
    length,
    scale,
    CHUNK: tl.constexpr,
    D: tl.constexpr,
    DV: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr,
    FIXED: tl.constexpr,
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
    q += batch * q_batch + head // shared * q_head + first * q_row
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
        ahead, _behind, fall = _factors(g, g_row, start, stop, CHUNK, FIXED)
        read = load_tile(q, q_row, start, stop, key, CHUNK, BLOCK_K, D).to(tl.float32) * ahead[:, None]
        d = given(load_tile(dout, DV, start, stop, value, CHUNK, BLOCK_V, DV), UPCAST)
        dstate = dstate * fall + dot(tl.trans(operand(read, q, UPCAST)), d) * scale
    store_tile(dinitial + whole, DV, key, D, value, dstate, BLOCK_K, BLOCK_V, DV, UPCAST)


@triton.jit
def output_forward(
    q,
    k,
    v,
    g,
    offsets,
    states,
    out,
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
    shared,
    tokens,
    length,
    chunks,
    scale,
    CHUNK: tl.constexpr,
    D: tl.constexpr,
    DV: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr,
    FIXED: tl.constexpr,
    PACKED: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """Outputs from the state before the chunk and from its own tokens; a program owns a block of values."""
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
    q += batch * q_batch + head // shared * q_head + first * q_row
    k += batch * k_batch + head // shared * k_head + first * k_row
    v += batch * v_batch + head * v_head + first * v_row
    g += batch * g_batch + head * g_head + first * g_row
    states += ((chunk + t) * heads + head) * (D * DV)
    summed = tl.zeros((CHUNK, BLOCK_V), tl.float32)
    weights = tl.zeros((CHUNK, CHUNK), tl.float32)
    for key in range(0, D, BLOCK_K):
        queries = given(load_tile(q, q_row, start, stop, key, CHUNK, BLOCK_K, D), UPCAST)
        keys = given(load_tile(k, k_row, start, stop, key, CHUNK, BLOCK_K, D), UPCAST)
        state = load_tile(states, DV, key, D, value, BLOCK_K, BLOCK_V, DV)
        summed += state_dot(queries.to(tl.float32), state, q, UPCAST)
        weights += dot(queries, tl.trans(keys))
    ahead, _behind, _fall = _factors(g, g_row, start, stop, CHUNK, FIXED)
    summed *= ahead[:, None] * scale
    weights *= _mask(g, g_row, start, stop, CHUNK, FIXED) * scale
    values = given(load_tile(v, v_row, start, stop, value, CHUNK, BLOCK_V, DV), UPCAST)
    summed += dot(operand(weights, v, UPCAST), values)
    store_tile(out + row * DV, DV, start, stop, value, summed, CHUNK, BLOCK_V, DV, UPCAST)


@triton.jit
def values_backward(
    q,
    k,
    g,
    dout,
    offsets,
    dstates,
    dv,
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
    shared,
    tokens,
    length,
    chunks,
    scale,
    CHUNK: tl.constexpr,
    D: tl.constexpr,
    DV: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr,
    FIXED: tl.constexpr,
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
    q += batch * q_batch + head // shared * q_head + first * q_row
    k += batch * k_batch + head // shared * k_head + first * k_row
    g += batch * g_batch + head * g_head + first * g_row
    dstates += ((chunk + t) * heads + head) * (D * DV)
    summed = tl.zeros((CHUNK, BLOCK_V), tl.float32)
    weights = tl.zeros((CHUNK, CHUNK), tl.float32)
    for key in range(0, D, BLOCK_K):
        queries = given(load_tile(q, q_row, start, stop, key, CHUNK, BLOCK_K, D), UPCAST)
        keys = given(load_tile(k, k_row, start, stop, key, CHUNK, BLOCK_K, D), UPCAST)
        dstate = load_tile(dstates, DV, key, D, value, BLOCK_K, BLOCK_V, DV)
        summed += state_dot(keys.to(tl.float32), dstate, k, UPCAST)
        weights += dot(queries, tl.trans(keys))
    _ahead, behind, _fall = _factors(g, g_row, start, stop, CHUNK, FIXED)
    summed *= behind[:, None]
    weights *= _mask(g, g_row, start, stop, CHUNK, FIXED) * scale
    d = given(load_tile(dout + row * DV, DV, start, stop, value, CHUNK, BLOCK_V, DV), UPCAST)
    summed += dot(tl.trans(operand(weights, q, UPCAST)), d)
    store_tile(dv + row * DV, DV, start, stop, value, summed, CHUNK, BLOCK_V, DV, UPCAST)


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
    shared,
    tokens,
    rows,
    length,
    chunks,
    scale,
    CHUNK: tl.constexpr,
    D: tl.constexpr,
    DV: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr,
    FIXED: tl.constexpr,
    OF_DECAY: tl.constexpr,
    PACKED: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """Gradients of queries, keys and log-decays; a program owns a block of channels in a chunk.

    A decay is felt by every token at or behind it that reads one before it: pairs inside the chunk, tokens at or behind
    it that read the state before the chunk, tokens before it that wrote to the state behind the chunk, and the state
    that crosses the whole chunk. `dg` is (blocks of channels, B, H, T): what each block adds to it.
    """
    key_blocks: tl.constexpr = (D + BLOCK_K - 1) // BLOCK_K
    program = tl.program_id(0)
    part = program % key_blocks
    key = part * BLOCK_K
    t = program // key_blocks % chunks
    _entry, head, batch, first, length, row, chunk = place(
        program // key_blocks // chunks, heads, tokens, length, offsets, CHUNK, PACKED
    )
    start = t * CHUNK
    if start >= length:
        return
    stop = tl.minimum(start + CHUNK, length)
    q += batch * q_batch + head // shared * q_head + first * q_row
    k += batch * k_batch + head // shared * k_head + first * k_row
    v += batch * v_batch + head * v_head + first * v_row
    g += batch * g_batch + head * g_head + first * g_row
    states += ((chunk + t) * heads + head) * (D * DV)
    dstates += ((chunk + t) * heads + head) * (D * DV)
    to_q = tl.zeros((CHUNK, BLOCK_K), tl.float32)
    to_k = tl.zeros((CHUNK, BLOCK_K), tl.float32)
    dweights = tl.zeros((CHUNK, CHUNK), tl.float32)
    crossing = tl.zeros((BLOCK_K,), tl.float32)
    for value in range(0, DV, BLOCK_V):
        state = load_tile(states, DV, key, D, value, BLOCK_K, BLOCK_V, DV)
        dstate = load_tile(dstates, DV, key, D, value, BLOCK_K, BLOCK_V, DV)
        if OF_DECAY:
            crossing += tl.sum(state * dstate, 1)
        d = given(load_tile(dout + row * DV, DV, start, stop, value, CHUNK, BLOCK_V, DV), UPCAST)
        values = given(load_tile(v, v_row, start, stop, value, CHUNK, BLOCK_V, DV), UPCAST)
        dweights += dot(d, tl.trans(values))
        to_q += state_dot(d.to(tl.float32), tl.trans(state), q, UPCAST)
        to_k += state_dot(values.to(tl.float32), tl.trans(dstate), k, UPCAST)
    ahead, behind, fall = _factors(g, g_row, start, stop, CHUNK, FIXED)
    to_q *= ahead[:, None] * scale
    to_k *= behind[:, None]
    dweights *= _mask(g, g_row, start, stop, CHUNK, FIXED) * scale
    queries = given(load_tile(q, q_row, start, stop, key, CHUNK, BLOCK_K, D), UPCAST)
    keys = given(load_tile(k, k_row, start, stop, key, CHUNK, BLOCK_K, D), UPCAST)
    if OF_DECAY:
        i = tl.arange(0, CHUNK)
        # Of the pairs inside, those read at or behind a token without those written there.
        pairs = tl.where(i[:, None] > i[None, :], dot(queries, tl.trans(keys)) * dweights, 0.0)
        read = tl.sum(queries.to(tl.float32) * to_q, 1) + tl.sum(pairs, 1) - tl.sum(pairs, 0)
        written = tl.sum(keys.to(tl.float32) * to_k, 1)
        felt = tl.cumsum(read, 0, reverse=True) + tl.cumsum(written, 0) - written + tl.sum(crossing, 0) * fall
        tl.store(dg + part.to(tl.int64) * rows + row + start + i, felt, mask=start + i < stop)
    rounded = operand(dweights, q, UPCAST)
    to_q += dot(rounded, keys)
    store_tile(dq + row * D, D, start, stop, key, to_q, CHUNK, BLOCK_K, D, UPCAST)
    to_k += dot(tl.trans(rounded), queries)
    store_tile(dk + row * D, D, start, stop, key, to_k, CHUNK, BLOCK_K, D, UPCAST)
