"""The delta rule in chunks of tokens: products of matrices instead of a loop over tokens.

"Parallelizing Linear Transformers with the Delta Rule over Sequence Length" (Yang et al., NeurIPS 2024), section 3, and
"Gated Delta Networks" (Yang et al., ICLR 2025), section 3.3. In a chunk that starts in the state S, with b the running
sums of the log-decays, all that the tokens write is given by N (C, Dv), one row a token:

    (I + A) N = β ⊙ (V - e^b ⊙ K S),   A_ij = β_i e^(b_i - b_j) k_i·k_j for j < i
    O = e^b ⊙ Q S + P N,               P_ij = e^(b_i - b_j) q_i·k_j for j <= i
    S' = e^(b_C) S + (e^(b_C - b) ⊙ K)ᵀ N

With T = (I + A)^-1 only N depends on S: two small products a chunk are in sequence, the rest is done for many chunks at
once. Factors e^(b_i - b_j) are never quotients, so that no strength of the decay can overflow or lose digits. Backward
goes through the chunks from the last on and remembers the states before them and T: memory is linear in L.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from core_attn.ops.delta.reference import state_dtype

CHUNK = 64
# Elements of one tensor of keys that are worked on at once: what belongs to them stays in the cache.
_AT_ONCE = 1 << 17


def chunk_length(length: int) -> int:
    """Tokens of a chunk: 64, for shorter sequences the power of two that holds them."""
    return min(CHUNK, 1 << max(length - 1, 0).bit_length())


class _Call:
    """Sizes of one call, and the way between (B, H, L, ·) and chunks (T, R, C, ·) of the R = B·H rows."""

    def __init__(self, q: Tensor) -> None:
        self.length = q.shape[2]
        self.dtype = state_dtype(q)
        self.rows = q.shape[0] * q.shape[1]
        self.chunk = chunk_length(self.length)
        self.chunks = -(-self.length // self.chunk)
        self.many = max(1, _AT_ONCE // max(1, self.rows * self.chunk * q.shape[3]))

    def pieces(self) -> list[tuple[int, int]]:
        """Ranges of chunks that are worked on at once."""
        return [(t, min(t + self.many, self.chunks)) for t in range(0, self.chunks, self.many)]

    def cut(self, x: Tensor, t0: int, t1: int) -> Tensor:
        """Chunks t0 to t1 of (B, H, L, N), zeros behind the last token -> (t1 - t0, R, C, N)."""
        first, last = t0 * self.chunk, t1 * self.chunk
        part = x[:, :, first : min(last, self.length)].flatten(0, 1)
        out = part.new_empty(t1 - t0, self.rows, self.chunk, x.shape[3], dtype=self.dtype)
        whole = part.shape[1] // self.chunk
        full = whole * self.chunk
        out[:whole] = part[:, :full].unflatten(1, (whole, self.chunk)).transpose(0, 1)
        if whole < t1 - t0:
            out[whole] = 0.0
            out[whole, :, : part.shape[1] - full] = part[:, full:]
        return out

    def put(self, x: Tensor, part: Tensor, t0: int, t1: int) -> None:
        """The inverse of `cut`: write (t1 - t0, R, C, N) into (B, H, L, N)."""
        first, last = t0 * self.chunk, min(t1 * self.chunk, self.length)
        flat = part.view(t1 - t0, *x.shape[:2], self.chunk, x.shape[3]).permute(1, 2, 0, 3, 4).flatten(2, 3)
        x[:, :, first:last] = flat[:, :, : last - first]


def falls(g: Tensor) -> tuple[Tensor, Tensor]:
    """(N, C) log-decays -> e^(b_i - b_j) for j <= i and 0 elsewhere (N, C, C), and e^b (N, C, 1).

    Every factor is a product of two that end and start at one place between j and i, each e to a sum of log-decays of
    one sign: exact to rounding, whatever the decays before j.
    """
    n, c = g.shape
    out = g.new_zeros(n, c, c)
    out.diagonal(dim1=1, dim2=2).fill_(1.0)
    size = 1
    while size < c:
        halves = g.view(n, c // (2 * size), 2, size)
        rows = halves[:, :, 1].cumsum(-1).exp_().unsqueeze(-1)
        columns = torch.ones_like(halves[:, :, 0])
        if size > 1:
            columns[..., :-1] = halves[:, :, 0, 1:].flip(-1).cumsum(-1).exp_().flip(-1)
        # The lower left quarters of the blocks of twice the size on the diagonal.
        place = out.as_strided((n, c // (2 * size), size, size), (c * c, 2 * size * (c + 1), c, 1), size * c)
        torch.mul(rows, columns.unsqueeze(-2), out=place)
        size *= 2
    return out, g.cumsum(1).exp_().unsqueeze(-1)


class _Piece:
    """Some chunks, flattened to N = T·R of them, and what the formulas above call by these names."""

    def __init__(self, call: _Call, q: Tensor, k: Tensor, beta: Tensor, g: Tensor | None, t0: int, t1: int) -> None:
        self.q, self.k = (call.cut(x, t0, t1).flatten(0, 1) for x in (q, k))
        self.beta = call.cut(beta.unsqueeze(-1), t0, t1).flatten(0, 1)
        self.falls = self.up = self.down = self.whole = None
        if g is not None:
            self.falls, self.up = falls(call.cut(g.unsqueeze(-1), t0, t1).flatten(0, 1).squeeze(-1))
            self.down, self.whole = self.falls[:, -1].unsqueeze(-1), self.up[:, -1:]

    def products(self, x: Tensor) -> Tensor:
        """e^(b_i - b_j) x_i·k_j for j <= i, 0 elsewhere (N, C, C)."""
        part = torch.bmm(x, self.k.transpose(1, 2))
        return part.tril_() if self.falls is None else part.mul_(self.falls)

    def inverse(self) -> Tensor:
        """T (N, C, C)."""
        a = self.products(self.k).mul_(self.beta)
        eye = torch.eye(a.shape[1], dtype=a.dtype, device=a.device)
        # Only what is below the diagonal is read of a.
        return torch.linalg.solve_triangular(a, eye.expand_as(a), upper=False, unitriangular=True)


def _raised(x: Tensor, factor: Tensor | None) -> Tensor:
    return x if factor is None else x * factor


def _forward(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor, g: Tensor | None, initial: Tensor | None, scale: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    with torch.autocast(q.device.type, enabled=False):
        call = _Call(q)
        many, c = (call.chunks, call.rows), call.chunk
        out = q.new_empty(*q.shape[:3], v.shape[3])
        # The state before each chunk, and behind the last.
        states = q.new_empty(call.chunks + 1, call.rows, q.shape[3], v.shape[3], dtype=call.dtype)
        states[0] = 0.0 if initial is None else initial.to(call.dtype).flatten(0, 1)
        inverses = q.new_empty(*many, c, c, dtype=call.dtype)
        for t0, t1 in call.pieces():
            p = _Piece(call, q, k, beta, g, t0, t1)
            inverse = p.inverse()
            inverses[t0:t1] = inverse.view(t1 - t0, call.rows, c, c)
            value = call.cut(v, t0, t1).flatten(0, 1)
            writes = torch.bmm(inverse, p.beta * value).unflatten(0, (t1 - t0, call.rows))
            reads = torch.bmm(inverse, _raised(p.beta * p.k, p.up)).unflatten(0, (t1 - t0, call.rows))
            keys = _raised(p.k, p.down).transpose(1, 2).unflatten(0, (t1 - t0, call.rows))
            whole = None if p.whole is None else p.whole.unflatten(0, (t1 - t0, call.rows))
            for t in range(t1 - t0):
                state = states[t0 + t]
                writes[t].baddbmm_(reads[t], state, alpha=-1)
                torch.baddbmm(state if whole is None else state * whole[t], keys[t], writes[t], out=states[t0 + t + 1])
            before = states[t0:t1].flatten(0, 1)
            here = torch.bmm(_raised(p.q, p.up), before)
            here.baddbmm_(p.products(p.q), writes.flatten(0, 1), beta=scale, alpha=scale)
            call.put(out, here, t0, t1)
        return out, states[-1].unflatten(0, q.shape[:2]).clone(), states, inverses


def _backward(
    dout: Tensor,
    dfinal: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    g: Tensor | None,
    states: Tensor,
    inverses: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    with torch.autocast(q.device.type, enabled=False):
        call = _Call(q)
        dq, dk, dv, dbeta = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v, beta))
        dg = None if g is None else torch.empty_like(g, memory_format=torch.contiguous_format)
        dstate = dfinal.to(call.dtype).flatten(0, 1)
        for t0, t1 in reversed(call.pieces()):
            p = _Piece(call, q, k, beta, g, t0, t1)
            d = call.cut(dout, t0, t1).flatten(0, 1).mul_(scale)
            before, inverse = states[t0:t1].flatten(0, 1), inverses[t0:t1].flatten(0, 1)
            known = _raised(torch.bmm(p.k, before), p.up)
            missing = call.cut(v, t0, t1).flatten(0, 1).sub_(known)
            writes = torch.bmm(inverse, p.beta * missing)
            reads = torch.bmm(inverse, _raised(p.beta * p.k, p.up))
            read, kept = _raised(p.q, p.up), _raised(p.k, p.down)
            weights = p.products(p.q)
            # From the last chunk to the first: gradients of what is written, and of the states.
            dwrites = torch.bmm(weights.transpose(1, 2), d)
            ends = torch.empty(t1 - t0 + 1, *states.shape[1:], dtype=call.dtype, device=q.device)
            ends[-1] = dstate
            befores = torch.bmm(read.transpose(1, 2), d)
            cut = (t1 - t0, call.rows)
            parts = [x.unflatten(0, cut) for x in (dwrites, befores, kept, reads)]
            whole = None if p.whole is None else p.whole.unflatten(0, cut)
            for t in range(t1 - t0 - 1, -1, -1):
                dwrite, dbefore, keys, reading = (x[t] for x in parts)
                dwrite.baddbmm_(keys, ends[t + 1])
                dbefore += ends[t + 1] if whole is None else ends[t + 1] * whole[t]
                torch.baddbmm(dbefore, reading.transpose(1, 2), dwrite, alpha=-1, out=ends[t])
            dstate, behind = ends[0], ends[1:].flatten(0, 1)
            # Of the right-hand side, and of A and P.
            dright = torch.bmm(inverse.transpose(1, 2), dwrites)
            da = torch.bmm(dright, writes.transpose(1, 2)).tril_(-1).neg_()
            dweights = torch.bmm(d, writes.transpose(1, 2)).tril_()
            if p.falls is not None:
                da *= p.falls
                dweights *= p.falls
            alike = torch.bmm(p.k, p.k.transpose(1, 2))
            dstrength = (dright * missing).sum(-1, keepdim=True) + (da * alike).sum(-1, keepdim=True)
            dmissing = dright.mul_(p.beta)
            da *= p.beta
            dread = torch.bmm(d, before.transpose(1, 2))
            dkept = torch.bmm(writes, behind.transpose(1, 2))
            dknown = torch.bmm(dmissing, before.transpose(1, 2)).neg_()
            if g is not None and dg is not None:
                assert p.falls is not None
                assert p.up is not None
                assert p.down is not None
                assert p.whole is not None
                held = (dkept * kept).sum(-1)
                # Of b: as the end of e^(b_i - b_j), e^b_i, e^b_C, less as the start.
                y = da.mul(alike).addcmul_(dweights, torch.bmm(p.q, p.k.transpose(1, 2)))
                db = y.sum(2).sub_(y.sum(1)).sub_(held)
                db += (dread * read).sum(-1) - (dmissing * known).sum(-1)
                db[:, -1] += held.sum(-1) + p.whole[:, 0, 0] * (behind * before).sum((1, 2))
                sums = db.cumsum(1)
                call.put(dg.unsqueeze(-1), db.sub_(sums).add_(sums[:, -1:]).unsqueeze(-1), t0, t1)
                dread *= p.up
                dknown *= p.up
                dkept *= p.down
            call.put(dq, dread.baddbmm_(dweights, p.k), t0, t1)
            dkept += dknown
            dkept.baddbmm_(dweights.transpose(1, 2), p.q)
            dkept.baddbmm_(da + da.transpose(1, 2), p.k)
            call.put(dk, dkept, t0, t1)
            call.put(dv, dmissing, t0, t1)
            call.put(dbeta.unsqueeze(-1), dstrength, t0, t1)
        dinitial = dstate.unflatten(0, q.shape[:2]).clone()
        return dq, dk, dv, dbeta, q.new_empty(0) if dg is None else dg, dinitial


_op = torch.library.custom_op(
    "core_attn::delta_rule",
    _forward,
    mutates_args=(),
    schema="(Tensor q, Tensor k, Tensor v, Tensor beta, Tensor? g, Tensor? initial, float scale) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
)
_backward_op = torch.library.custom_op(
    "core_attn::delta_rule_backward",
    _backward,
    mutates_args=(),
    schema="(Tensor dout, Tensor dfinal, Tensor q, Tensor k, Tensor v, Tensor beta, Tensor? g, Tensor states, "
    "Tensor inverses, float scale) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)


@_op.register_fake
def _(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor, g: Tensor | None, initial: Tensor | None, scale: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dtype = state_dtype(q)
    state = (q.shape[3], v.shape[3])
    chunk = chunk_length(int(q.shape[2]))
    count, rows = -(-int(q.shape[2]) // chunk), q.shape[0] * q.shape[1]
    return (
        q.new_empty(*q.shape[:3], v.shape[3]),
        q.new_empty(*q.shape[:2], *state, dtype=dtype),
        q.new_empty(count + 1, rows, *state, dtype=dtype),
        q.new_empty(count, rows, chunk, chunk, dtype=dtype),
    )


@_backward_op.register_fake
def _(
    dout: Tensor,
    dfinal: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    g: Tensor | None,
    states: Tensor,
    inverses: Tensor,
    scale: float,
) -> tuple[Tensor, ...]:
    found = [x.new_empty(x.shape) for x in (q, k, v, beta)]
    dg = q.new_empty(0) if g is None else g.new_empty(g.shape)
    return *found, dg, dfinal.new_empty(dfinal.shape, dtype=states.dtype)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor, Tensor]) -> None:
    q, k, v, beta, g, initial, ctx.scale = inputs
    ctx.initial = None if initial is None else initial.dtype
    ctx.save_for_backward(q, k, v, beta, g, output[2], output[3])
    ctx.mark_non_differentiable(output[2], output[3])


def _differentiate(ctx: Any, dout: Tensor, dfinal: Tensor, *unused: Tensor | None) -> tuple[Any, ...]:
    q, k, v, beta, g, states, inverses = ctx.saved_tensors
    dq, dk, dv, dbeta, dg, dinitial = _backward_op(dout, dfinal, q, k, v, beta, g, states, inverses, ctx.scale)
    return (
        dq,
        dk,
        dv,
        dbeta,
        None if g is None else dg,
        None if ctx.initial is None else dinitial.to(ctx.initial),
        None,
    )


def _no_second_derivative(ctx: Any, *grads: Tensor) -> None:
    raise RuntimeError(
        "the chunked delta rule has no second derivative; use backend='reference' for gradients of gradients"
    )


_op.register_autograd(_differentiate, setup_context=_save)
_backward_op.register_autograd(_no_second_derivative)


def run(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    beta: Tensor,
    log_decay: Tensor | None,
    scale: float,
    initial_state: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Arguments as `core_attn.ops.delta_rule` hands them on -> outputs and final state."""
    found = _op(q, k, v, beta, log_decay, initial_state, scale)
    return found[0], found[1]
