"""The linear Titans memory in pieces of tokens: products of matrices instead of a loop over tokens.

"Titans: Learning to Memorize at Test Time" (S127), section 3.2, and for gradients of every token the WY form of
"Parallelizing Linear Transformers with the Delta Rule over Sequence Length" (Yang et al., NeurIPS 2024), carried over
to a memory with momentum. In a piece of C tokens that starts with the memory M and the momentum S, all that the tokens
write is given by U (C, Dv), one row a token:

    S_t = m_t S + Σ_j N_tj k_j u_jᵀ,           m_t = η_1 … η_t, N_tj = η_(j+1) … η_t for j <= t
    M_t = β_t M + f_t S + Σ_j G_tj k_j u_jᵀ,   β and P as m and N, of the factors 1 - α; f = P m, G = P N

as the momentum of a token goes on into the memory at all later ones. With r the tokens before the chunk of gradients
that a token belongs to, u_t = 2 θ_t (v_t - M_rᵀ k_t), which is a triangular system in U:

    (I + A) U = 2 θ ⊙ (V - β_r ⊙ K M - f_r ⊙ K S),   A_tj = 2 θ_t G_rj k_t·k_j
    O = β ⊙ Q M + f ⊙ Q S + (G ⊙ Q Kᵀ) U

A chunk of gradients longer than a piece makes it simple: U = 2 θ ⊙ (V - K W) with W the memory that the chunk started
with. P and N are products, never quotients, so that no strength of the gates can overflow or lose digits. Backward goes
through the pieces from the last on and remembers the states before them: memory is linear in L.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from core_attn.ops.delta.chunked import falls
from core_attn.ops.delta.reference import state_dtype
from core_attn.ops.titans.reference import TitansState, begin, end

PIECE = 64
# Elements of one tensor of keys that are worked on at once: what belongs to them stays in the cache.
_AT_ONCE = 1 << 17


def piece_length(length: int, chunk: int = 1) -> int:
    """Tokens of a piece: about 64, whole chunks of gradients where those fit, else whole pieces in a chunk."""
    most = PIECE // chunk * chunk if chunk <= PIECE else PIECE
    if length > chunk > PIECE:
        most = -(-chunk // -(-chunk // PIECE))
    return max(1, min(length, most))


class _Call:
    """Sizes of one call, and the way between (B, H, L, ·) and pieces (T, R, C, ·) of the R = B·H rows."""

    def __init__(self, q: Tensor, chunk: int, anchored: bool) -> None:
        self.length = int(q.shape[2])
        self.dtype = state_dtype(q)
        self.rows = q.shape[0] * q.shape[1]
        # In a piece there are whole chunks of gradients, or it belongs to one that began before it.
        self.inside = not anchored and chunk <= PIECE
        self.chunk = chunk if self.inside else max(chunk, PIECE + 1)
        self.piece = piece_length(self.length, self.chunk)
        self.pieces = -(-self.length // self.piece)
        self.per_chunk = self.pieces if self.length <= self.chunk else self.chunk // self.piece
        self.many = max(1, _AT_ONCE // max(1, self.rows * self.piece * q.shape[3]))

    def ranges(self) -> list[tuple[int, int]]:
        """Ranges of pieces that are worked on at once."""
        return [(t, min(t + self.many, self.pieces)) for t in range(0, self.pieces, self.many)]

    def cut(self, x: Tensor, t0: int, t1: int) -> Tensor:
        """Pieces t0 to t1 of (B, H, L, N), zeros behind the last token -> ((t1 - t0)·R, C, N)."""
        first, last = t0 * self.piece, t1 * self.piece
        part = x[:, :, first : min(last, self.length)].flatten(0, 1)
        out = part.new_empty(t1 - t0, self.rows, self.piece, x.shape[3], dtype=self.dtype)
        whole = part.shape[1] // self.piece
        full = whole * self.piece
        out[:whole] = part[:, :full].unflatten(1, (whole, self.piece)).transpose(0, 1)
        if whole < t1 - t0:
            out[whole] = 0.0
            out[whole, :, : part.shape[1] - full] = part[:, full:]
        return out.flatten(0, 1)

    def put(self, x: Tensor, part: Tensor, t0: int, t1: int) -> None:
        """The inverse of `cut`: write ((t1 - t0)·R, C, N) into (B, H, L, N)."""
        first, last = t0 * self.piece, min(t1 * self.piece, self.length)
        flat = part.view(t1 - t0, *x.shape[:2], self.piece, x.shape[3]).permute(1, 2, 0, 3, 4).flatten(2, 3)
        x[:, :, first:last] = flat[:, :, : last - first]

    def apart(self, pieces: int, *xs: Tensor) -> list[Tensor]:
        """(T·R, ·, ·) -> (T, R, ·, ·)."""
        return [x.unflatten(0, (pieces, self.rows)) for x in xs]


def _products(g: Tensor) -> tuple[Tensor, Tensor]:
    """Logarithms (N, C) -> the products of j + 1 … t for j <= t, 0 elsewhere (N, C, C), and of 1 … t (N, C, 1)."""
    c = g.shape[1]
    size = 1 << max(c - 1, 0).bit_length()
    found, start = falls(F.pad(g, (0, size - c)))
    return found[:, :c, :c], start[:, :c]


def _sums(y: Tensor, start: Tensor) -> Tensor:
    """Gradients of the logarithms (N, C), from those of the products' own (N, C, C) and (N, C) of `_products`.

    The products that hold a logarithm are summed up one by one: sums of all less those without it would lose digits.
    """
    found = start.flip(1).cumsum(1).flip(1)
    found[:, 1:] += y.tril_(-1).cumsum(2).tril_(-1).sum(1)[:, :-1]
    return found


class _Piece:
    """Some pieces, flattened to N = T·R of them, and what the formulas above call by these names."""

    def __init__(self, call: _Call, given: _Given, t0: int, t1: int) -> None:
        self.q, self.k, self.v = (call.cut(x, t0, t1) for x in (given.q, given.k, given.v))
        self.step = call.cut(given.rate.unsqueeze(-1), t0, t1).mul_(2.0)
        # 1 for a token, 0 for padding and behind the last token: there the momentum does not reach the memory.
        self.real = call.cut(given.real, t0, t1)
        self.decays, self.beta = _products(call.cut(given.log_decay.unsqueeze(-1), t0, t1).squeeze(-1))
        self.momenta, self.m = _products(call.cut(given.log_momentum.unsqueeze(-1), t0, t1).squeeze(-1))
        # Of P real(N) and P real(m): also needed in backward.
        self.real_momenta, self.real_m = self.real * self.momenta, self.real * self.m
        self.g, self.f = torch.bmm(self.decays, self.real_momenta), torch.bmm(self.decays, self.real_m)
        if call.inside:
            c = call.piece
            self.starts = torch.arange(0, c, call.chunk, device=self.q.device).repeat_interleave(call.chunk)[:c]
            self.every = call.chunk
            self.g_before, self.f_before = self.before(self.g, 0.0), self.before(self.f, 0.0)
            self.beta_before = self.before(self.beta, 1.0)

    def before(self, x: Tensor, start: float) -> Tensor:
        """Rows (N, C, ·) of the last token before each token's chunk of gradients; `start` where there is none."""
        rows = F.pad(x, (0, 0, 1, 0), value=start)
        return rows[:, :-1] if self.every == 1 else rows.index_select(1, self.starts)

    def add_before(self, x: Tensor, d: Tensor) -> None:
        """Add to x (N, C, ·) the gradient that `before` hands on from d."""
        if self.every == 1:
            x[:, :-1] += d[:, 1:]
        else:
            rows = torch.zeros_like(F.pad(x, (0, 0, 1, 0))).index_add_(1, self.starts, d)
            x += rows[:, 1:]

    def inverse(self) -> Tensor:
        """(I + A)^-1 (N, C, C)."""
        a = torch.bmm(self.k, self.k.transpose(1, 2)).mul_(self.g_before).mul_(self.step)
        eye = torch.eye(a.shape[1], dtype=a.dtype, device=a.device)
        return torch.linalg.solve_triangular(a, eye.expand_as(a), upper=False, unitriangular=True)

    def reads(self, inverse: Tensor | None) -> Tensor:
        """What U takes from M and S below each other (N, C, 2 D); with chunks longer than a piece, from W (N, C, D)."""
        k = self.step * self.k
        if inverse is None:
            return k
        return torch.bmm(inverse, torch.cat([self.beta_before * k, self.f_before * k], dim=2))

    def queries(self) -> Tensor:
        """What the outputs read from M and S below each other (N, C, 2 D)."""
        return torch.cat([self.beta * self.q, self.f * self.q], dim=2)

    def last(self) -> tuple[Tensor, Tensor]:
        """What is left at the end of a token's write in M, and in S: (N, C, 1) each."""
        return self.g[:, -1].unsqueeze(-1), self.momenta[:, -1].unsqueeze(-1)

    def keys(self) -> Tensor:
        """What is written to M and S below each other (N, C, 2 D)."""
        return torch.cat([x * self.k for x in self.last()], dim=2)

    def whole(self) -> tuple[Tensor, Tensor]:
        """What a whole piece leaves of M and S below each other (N, 2 D, 1), and how much of S goes to M (N, 1, 1)."""
        ends = torch.cat([self.beta[:, -1:], self.m[:, -1:]], dim=1)
        return ends.repeat_interleave(self.k.shape[2], 1), self.f[:, -1:]

    def of_gates(self, dg: Tensor, dbeta: Tensor, df: Tensor, dfresh: Tensor, dm: Tensor) -> tuple[Tensor, Tensor]:
        """Gradients of the log-momenta and log-decays (N, C), from those of G, β, f, the last row of N, and m_C."""
        dg = dg.tril()
        ddecays = torch.bmm(dg, self.real_momenta.transpose(1, 2)).addcmul_(df, self.real_m.transpose(1, 2))
        dmomenta = torch.bmm(self.decays.transpose(1, 2), dg).mul_(self.real)
        dstart = torch.bmm(self.decays.transpose(1, 2), df).mul_(self.real)
        dmomenta[:, -1] += dfresh
        dstart[:, -1, 0] += dm
        return (
            _sums(dmomenta.mul_(self.momenta), dstart.mul_(self.m).squeeze(-1)),
            _sums(ddecays.mul_(self.decays), dbeta.mul(self.beta).squeeze(-1)),
        )


class _Given:
    """The inputs of a call, gates that are not given filled in."""

    def __init__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        rate: Tensor,
        log_momentum: Tensor | None,
        log_decay: Tensor | None,
        padding_mask: Tensor | None,
    ) -> None:
        self.q, self.k, self.v, self.rate = q, k, v, rate
        self.log_momentum = torch.full_like(rate, -torch.inf) if log_momentum is None else log_momentum
        self.log_decay = torch.zeros_like(rate) if log_decay is None else log_decay
        ones = torch.ones_like(rate) if padding_mask is None else padding_mask[:, None].to(rate.dtype).expand_as(rate)
        self.real = ones.unsqueeze(-1)


def _anchors(call: _Call, states: Tensor, anchor: Tensor | None, t0: int, t1: int, d: int) -> Tensor:
    """The memories W ((t1 - t0)·R, D, Dv) that pieces t0 to t1 take their gradients at."""
    if anchor is not None:
        return anchor.to(call.dtype).flatten(0, 1).repeat(t1 - t0, 1, 1)
    starts = torch.arange(t0, t1, device=states.device) // call.per_chunk * call.per_chunk
    return states[:, :, :d].index_select(0, starts).flatten(0, 1)


def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rate: Tensor,
    log_momentum: Tensor | None,
    log_decay: Tensor | None,
    padding_mask: Tensor | None,
    memory: Tensor | None,
    surprise: Tensor | None,
    anchor: Tensor | None,
    chunk: int,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    with torch.autocast(q.device.type, enabled=False):
        call = _Call(q, chunk, anchor is not None)
        given = _Given(q, k, v, rate, log_momentum, log_decay, padding_mask)
        width, c = q.shape[3], call.piece
        out = q.new_empty(*q.shape[:3], v.shape[3])
        # M and S below each other, before each piece, and behind the last.
        states = q.new_empty(call.pieces + 1, call.rows, 2 * width, v.shape[3], dtype=call.dtype)
        for part, x in ((states[0, :, :width], memory), (states[0, :, width:], surprise)):
            part.copy_(part.new_zeros(()) if x is None else x.to(call.dtype).flatten(0, 1))
        inverses = q.new_empty(call.pieces if call.inside else 0, call.rows, c, c, dtype=call.dtype)
        for t0, t1 in call.ranges():
            p = _Piece(call, given, t0, t1)
            inverse = None
            if call.inside:
                inverse = p.inverse()
                inverses[t0:t1] = inverse.unflatten(0, (t1 - t0, call.rows))
            right = p.step * p.v
            whole, over = p.whole()
            writes, reads, keys, whole, over = call.apart(
                t1 - t0,
                right if inverse is None else torch.bmm(inverse, right),
                p.reads(inverse),
                p.keys(),
                whole,
                over,
            )
            for t in range(t1 - t0):
                state, after = states[t0 + t], states[t0 + t + 1]
                if call.inside:
                    read = state
                elif anchor is None:
                    read = states[(t0 + t) // call.per_chunk * call.per_chunk, :, :width]
                else:
                    read = anchor.to(call.dtype).flatten(0, 1)
                writes[t].baddbmm_(reads[t], read, alpha=-1)
                torch.mul(state, whole[t], out=after)
                after[:, :width].addcmul_(state[:, width:], over[t])
                after.baddbmm_(keys[t].transpose(1, 2), writes[t])
            here = torch.bmm(p.queries(), states[t0:t1].flatten(0, 1))
            weights = torch.bmm(p.q, p.k.transpose(1, 2)).mul_(p.g)
            call.put(out, here.baddbmm_(weights, writes.flatten(0, 1), beta=scale, alpha=scale), t0, t1)
        last = states[-1].unflatten(0, q.shape[:2])
        return out, last[:, :, :width].clone(), last[:, :, width:].clone(), states, inverses


def _backward(
    dout: Tensor,
    dmemory: Tensor,
    dsurprise: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rate: Tensor,
    log_momentum: Tensor | None,
    log_decay: Tensor | None,
    padding_mask: Tensor | None,
    anchor: Tensor | None,
    states: Tensor,
    inverses: Tensor,
    chunk: int,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    with torch.autocast(q.device.type, enabled=False):
        call = _Call(q, chunk, anchor is not None)
        given = _Given(q, k, v, rate, log_momentum, log_decay, padding_mask)
        width = q.shape[3]
        dq, dk, dv, drate = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v, rate))
        gates = (log_momentum, log_decay)
        dgates = [None if x is None else torch.empty_like(x, memory_format=torch.contiguous_format) for x in gates]
        dstate = torch.cat([dmemory, dsurprise], dim=2).to(call.dtype).flatten(0, 1)
        # Of the memory that the chunk of gradients in hand started with.
        danchor = states.new_zeros(call.rows, width, v.shape[3])
        for t0, t1 in reversed(call.ranges()):
            p = _Piece(call, given, t0, t1)
            d = call.cut(dout, t0, t1).mul_(scale)
            before = states[t0:t1].flatten(0, 1)
            memory, surprise = before[:, :width], before[:, width:]
            inverse = read = None
            if call.inside:
                inverse = inverses[t0:t1].flatten(0, 1)
                known = p.beta_before * torch.bmm(p.k, memory) + p.f_before * torch.bmm(p.k, surprise)
            else:
                read = _anchors(call, states, anchor, t0, t1, width)
                known = torch.bmm(p.k, read)
            missing = p.v - known
            writes = p.step * missing
            if inverse is not None:
                writes = torch.bmm(inverse, writes)
            alike_q = torch.bmm(p.q, p.k.transpose(1, 2))
            # From the last piece to the first: gradients of what is written, and of the states.
            dwrites = torch.bmm((alike_q * p.g).transpose(1, 2), d)
            ends = states.new_empty(t1 - t0 + 1, *states.shape[1:])
            ends[-1] = dstate
            whole, over = p.whole()
            parts = call.apart(
                t1 - t0, dwrites, torch.bmm(p.queries().transpose(1, 2), d), p.keys(), p.reads(inverse), whole, over
            )
            for t in range(t1 - t0 - 1, -1, -1):
                dwrite, dbefore, keys, reads, kept, moved = (x[t] for x in parts)
                dwrite.baddbmm_(keys, ends[t + 1])
                torch.addcmul(dbefore, ends[t + 1], kept, out=ends[t])
                ends[t][:, width:].addcmul_(ends[t + 1][:, :width], moved)
                if call.inside:
                    ends[t].baddbmm_(reads.transpose(1, 2), dwrite, alpha=-1)
                else:
                    danchor.baddbmm_(reads.transpose(1, 2), dwrite, alpha=-1)
                    if anchor is None and (t0 + t) % call.per_chunk == 0:
                        ends[t][:, :width] += danchor
                        danchor.zero_()
            dstate, behind = ends[0], ends[1:].flatten(0, 1)
            dwritten = torch.bmm(d, writes.transpose(1, 2))
            dg = dwritten * alike_q
            dwritten *= p.g
            dqm, dqs = torch.bmm(d, memory.transpose(1, 2)), torch.bmm(d, surprise.transpose(1, 2))
            dbeta, df = ((p.q * x).sum(-1, keepdim=True) for x in (dqm, dqs))
            call.put(dq, (p.beta * dqm).addcmul_(p.f, dqs).baddbmm_(dwritten, p.k), t0, t1)
            dkm, dks = (torch.bmm(writes, x.transpose(1, 2)) for x in behind.split(width, dim=1))
            left, fresh = p.last()
            dkey = (left * dkm).addcmul_(fresh, dks).baddbmm_(dwritten.transpose(1, 2), p.q)
            dg[:, -1] += (p.k * dkm).sum(-1)
            dfresh = (p.k * dks).sum(-1)
            dbeta[:, -1, 0] += (memory * behind[:, :width]).sum((1, 2))
            df[:, -1, 0] += (surprise * behind[:, :width]).sum((1, 2))
            dm = (surprise * behind[:, width:]).sum((1, 2))
            if inverse is None:
                assert read is not None
                dstep = (dwrites * missing).sum(-1, keepdim=True)
                dvalue = dwrites * p.step
                dkey.baddbmm_(dvalue, read.transpose(1, 2), alpha=-1)
            else:
                dright = torch.bmm(inverse.transpose(1, 2), dwrites)
                da = torch.bmm(dright, writes.transpose(1, 2)).neg_()
                along = da * torch.bmm(p.k, p.k.transpose(1, 2))
                da *= p.g_before
                dstep = (dright * missing).sum(-1, keepdim=True) + (along * p.g_before).sum(-1, keepdim=True)
                dvalue = dright * p.step
                da *= p.step
                dkm, dks = torch.bmm(dvalue, memory.transpose(1, 2)), torch.bmm(dvalue, surprise.transpose(1, 2))
                dkey.addcmul_(p.beta_before, dkm, value=-1).addcmul_(p.f_before, dks, value=-1)
                dkey.baddbmm_(da + da.transpose(1, 2), p.k)
                p.add_before(dg, along.mul_(p.step))
                p.add_before(dbeta, (p.k * dkm).sum(-1, keepdim=True).neg_())
                p.add_before(df, (p.k * dks).sum(-1, keepdim=True).neg_())
            call.put(dk, dkey, t0, t1)
            call.put(dv, dvalue, t0, t1)
            call.put(drate.unsqueeze(-1), dstep.mul_(2.0), t0, t1)
            for dgate, x in zip(dgates, p.of_gates(dg, dbeta, df, dfresh, dm), strict=True):
                if dgate is not None:
                    call.put(dgate.unsqueeze(-1), x.unsqueeze(-1), t0, t1)
        start = dstate.unflatten(0, q.shape[:2])
        none = q.new_empty(0)
        return (
            dq,
            dk,
            dv,
            drate,
            none if dgates[0] is None else dgates[0],
            none.clone() if dgates[1] is None else dgates[1],
            start[:, :, :width].clone(),
            start[:, :, width:].clone(),
            danchor.unflatten(0, q.shape[:2]),
        )


_op = torch.library.custom_op(
    "core_attn::titans_memory",
    _forward,
    mutates_args=(),
    schema="(Tensor q, Tensor k, Tensor v, Tensor rate, Tensor? log_momentum, Tensor? log_decay, Tensor? padding_mask, "
    "Tensor? memory, Tensor? surprise, Tensor? anchor, int chunk, float scale) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor)",
)
_backward_op = torch.library.custom_op(
    "core_attn::titans_memory_backward",
    _backward,
    mutates_args=(),
    schema="(Tensor dout, Tensor dmemory, Tensor dsurprise, Tensor q, Tensor k, Tensor v, Tensor rate, "
    "Tensor? log_momentum, Tensor? log_decay, Tensor? padding_mask, Tensor? anchor, Tensor states, Tensor inverses, "
    "int chunk, float scale) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)


@_op.register_fake
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rate: Tensor,
    log_momentum: Tensor | None,
    log_decay: Tensor | None,
    padding_mask: Tensor | None,
    memory: Tensor | None,
    surprise: Tensor | None,
    anchor: Tensor | None,
    chunk: int,
    scale: float,
) -> tuple[Tensor, ...]:
    call = _Call(q, chunk, anchor is not None)
    width, values = q.shape[3], v.shape[3]
    return (
        q.new_empty(*q.shape[:3], values),
        q.new_empty(*q.shape[:2], width, values, dtype=call.dtype),
        q.new_empty(*q.shape[:2], width, values, dtype=call.dtype),
        q.new_empty(call.pieces + 1, call.rows, 2 * width, values, dtype=call.dtype),
        q.new_empty(call.pieces if call.inside else 0, call.rows, call.piece, call.piece, dtype=call.dtype),
    )


@_backward_op.register_fake
def _(
    dout: Tensor,
    dmemory: Tensor,
    dsurprise: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rate: Tensor,
    log_momentum: Tensor | None,
    log_decay: Tensor | None,
    padding_mask: Tensor | None,
    anchor: Tensor | None,
    states: Tensor,
    inverses: Tensor,
    chunk: int,
    scale: float,
) -> tuple[Tensor, ...]:
    found = [x.new_empty(x.shape) for x in (q, k, v, rate)]
    gates = [q.new_empty(0) if x is None else x.new_empty(x.shape) for x in (log_momentum, log_decay)]
    return *found, *gates, *(dmemory.new_empty(dmemory.shape, dtype=states.dtype) for _ in range(3))


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *given, memory, surprise, anchor, ctx.chunk, ctx.scale = inputs
    ctx.starts = [None if x is None else x.dtype for x in (memory, surprise, anchor)]
    ctx.save_for_backward(*given, anchor, output[3], output[4])
    ctx.mark_non_differentiable(output[3], output[4])


def _differentiate(
    ctx: Any, dout: Tensor, dmemory: Tensor, dsurprise: Tensor, *unused: Tensor | None
) -> tuple[Any, ...]:
    saved = ctx.saved_tensors
    found = _backward_op(dout, dmemory, dsurprise, *saved, ctx.chunk, ctx.scale)
    gates = [None if x is None else d for x, d in zip(saved[4:6], found[4:6], strict=True)]
    starts = [None if dtype is None else d.to(dtype) for dtype, d in zip(ctx.starts, found[6:], strict=True)]
    return *found[:4], *gates, None, *starts, None, None


def _no_second_derivative(ctx: Any, *grads: Tensor) -> None:
    raise RuntimeError(
        "the chunked Titans memory has no second derivative; use backend='reference' for gradients of gradients"
    )


_op.register_autograd(_differentiate, setup_context=_save)
_backward_op.register_autograd(_no_second_derivative)


def run(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    rate: Tensor,
    log_momentum: Tensor | None,
    log_decay: Tensor | None,
    chunk: int,
    key_padding_mask: Tensor | None,
    scale: float,
    initial_state: TitansState | None,
    return_state: bool,
) -> tuple[Tensor, TitansState]:
    """Arguments as `core_attn.ops.titans_memory` hands them on -> outputs and final state."""
    state = begin(q, v, initial_state)
    length = q.shape[2]
    # What is left of a chunk that has begun, whole chunks, and the chunk that the next tokens go on with.
    head = min(length, chunk - state.seen) if state.seen else 0
    tail = (length - head) % chunk if return_state else 0
    outs = []
    for first, last in ((0, head), (head, length - tail), (length - tail, length)):
        if first == last and (length or first):
            continue
        part = [
            None if x is None else x[:, :, first:last] if x.dim() > 2 else x[:, first:last]
            for x in (q, k, v, rate, log_momentum, log_decay, key_padding_mask)
        ]
        # A chunk longer than a piece is cut into pieces of one length.
        room = piece_length(last - first, chunk) * -(-chunk // PIECE)
        filled = chunk > PIECE and last - first > chunk and room > chunk
        if filled:
            part = _fill(part, chunk, room)
        out, memory, surprise = _op(
            *part, state.memory, state.surprise, state.anchor, chunk if not filled else room, scale
        )[:3]
        if filled:
            out = out.unflatten(2, (-1, room))[:, :, :, :chunk].flatten(2, 3)[:, :, : last - first]
        outs.append(out)
        seen = (state.seen + last - first) % chunk
        begun = state.anchor if state.seen else state.memory
        state = TitansState(memory, surprise, begun if seen else None, seen)
        if not length:
            break
    return outs[0] if len(outs) == 1 else torch.cat(outs, dim=2), end(*state, chunk)


def _fill(part: list[Any], chunk: int, room: int) -> list[Any]:
    """Inputs with every chunk filled up to `room` tokens, with padding."""
    q, k, v, rate, log_momentum, log_decay, mask = part
    length = q.shape[2]
    if log_momentum is None:
        log_momentum = torch.full_like(rate, -torch.inf)
    if mask is None:
        mask = torch.ones(q.shape[0], length, dtype=torch.bool, device=q.device)

    def fill(x: Tensor | None, dim: int) -> Tensor | None:
        if x is None:
            return None
        behind = [0, 0] * (x.dim() - 1 - dim)
        x = F.pad(x, (*behind, 0, -length % chunk)).unflatten(dim, (-1, chunk))
        return F.pad(x, (*behind, 0, room - chunk)).flatten(dim, dim + 1)

    return [*(fill(x, 2) for x in (q, k, v, rate, log_momentum, log_decay)), fill(mask, 1)]
