"""Gated linear attention in chunks: plain PyTorch, any device, memory and time linear in L.

"Gated Linear Attention Transformers with Hardware-Efficient Training" (S196), section 4. In a chunk of C tokens with
the running sum b of the log-gates since its start, token i reads token j <= i with the weight q_i · (k_j e^(b_i -
b_j)) and the state S before the chunk with q_i e^(b_i).

The product of q e^(b - r) and k e^(r - b) gives all pairs of a chunk in one matrix product, but its factors leave the
range of floats where gates are strong. So it is used only over spans in which b falls by no more than a bound, with r
in the middle. A chunk in which it falls further is put together from halves: with u the sum of the gates of a block's
second half up to a token, and w that of the first half behind a token, the weights between the halves are products of
q e^u and k e^w, and no exponent is ever positive. The sums are made level by level and stay as exact as the gates.
What is needed is seen from the gates of each piece of the sequence.

Backward recomputes the weights and needs no gradient of the exponentials: d log_gate follows from q·dq - k·dk inside
the chunk and from state · dstate at its end.

A piece is what is worked on at once: some chunks of one head, or of several heads where sequences are short, small
enough for the cache of a core. What is left of the sequence behind the last whole chunk is a shorter chunk. Running
sums are products with a triangle of ones, many times faster than `cumsum` over a dimension that is not the last.

Shapes: N = B·H, R chunks of a piece, C tokens of a chunk, K and V channels of a key and a value.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from core_attn.ops.gated_linear.reference import state_dtype

CHUNK = 64
# How far b may fall over a span computed with e^(r - b): its factors then stay within e^40, in float64 within e^300.
_BOUND = {torch.float32: 80.0, torch.float64: 600.0}
# A log-gate below this is a gate of 0, in float64 too; it keeps minus infinity out of differences.
_CLOSED = -1e4
# Elements of one tensor of a piece: the dozen of them that are alive fit the cache of a core.
_PIECE = {"cpu": 2**17}
_PIECE_ELSEWHERE = 2**24


class _Piece(NamedTuple):
    """Heads n0 … n1 - 1 and their chunks t0 … t1 - 1, of `chunk` tokens each from the token `start` on."""

    n0: int
    n1: int
    t0: int
    t1: int
    start: int
    chunk: int

    @property
    def states(self) -> tuple[slice, slice]:
        """Where the states before its chunks and behind the last are, in (N, T + 1, K, V)."""
        return slice(self.n0, self.n1), slice(self.t0, self.t1 + 1)

    def rows(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """(B, H, L, D) -> (R, C, D); a view wherever there can be one."""
        view = self._view(x)
        return (self._places(x).flatten(0, 1) if view is None else view).to(dtype)

    def place(self, x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
        """Where to write (R, C, D) of `dtype` for a contiguous (B, H, L, D): there or, given second, at first aside."""
        view = self._view(x) if x.dtype is dtype else None
        if view is not None:
            return view, None
        places = self._places(x)
        return torch.empty(places.shape, dtype=dtype, device=x.device).flatten(0, 1), places

    def _view(self, x: Tensor) -> Tensor | None:
        (_, h, _, d), (batch, head, token, channel) = x.shape, x.stride()
        heads, times = self.n1 - self.n0, self.t1 - self.t0
        start, step = self.start * token, self.chunk * token
        if heads == 1:
            start += self.n0 // h * batch + self.n0 % h * head
        elif (batch == h * head or len(x) == 1) and (times == 1 or head == times * step):
            start += self.n0 * head
            step = head if times == 1 else step
        else:
            return None
        return x.as_strided((heads * times, self.chunk, d), (step, token, channel), x.storage_offset() + start)

    def _places(self, x: Tensor) -> Tensor:
        times = self.t1 - self.t0
        part = x[:, :, self.start : self.start + times * self.chunk].flatten(0, 1)[self.n0 : self.n1]
        return part.unflatten(1, (times, self.chunk))


class _Room:
    """Tensors for what is needed in a piece only, used again by the next: new ones would not be in the cache."""

    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        self.options: dict[str, Any] = {"dtype": dtype, "device": device}
        self.held: dict[str, Tensor] = {}

    def __call__(self, name: str, *shape: int) -> Tensor:
        held = self.held.get(name)
        if held is None or held.numel() < math.prod(shape):
            with torch.inference_mode(False):  # a tensor of inference mode could not be written to outside it
                held = self.held[name] = torch.empty(math.prod(shape), **self.options)
        return held[: math.prod(shape)].view(shape)


_thread = threading.local()


@contextmanager
def _room(x: Tensor, dtype: torch.dtype) -> Iterator[_Room]:
    """On the CPU a thread keeps its room, a few MB, from call to call: to take memory anew costs a tenth of the time.

    While in use it is nobody else's, not even a call's that comes in between, from a hook or a finaliser.
    """
    kept: dict[torch.dtype, _Room] = _thread.__dict__.setdefault("rooms", {})
    room = kept.pop(dtype, None) if x.device.type == "cpu" else None
    room = room or _Room(x.device, dtype)
    yield room
    if x.device.type == "cpu":
        kept[dtype] = room


def _count(length: int) -> int:
    """How many chunks a sequence has."""
    return -(-length // CHUNK)


def _pieces(q: Tensor, v: Tensor) -> list[_Piece]:
    rows, (whole, rest) = q.shape[0] * q.shape[1], divmod(q.shape[2], CHUNK)
    widest = max(CHUNK * max(CHUNK, q.shape[3], v.shape[3]), q.shape[3] * v.shape[3])
    step = max(1, _PIECE.get(q.device.type, _PIECE_ELSEWHERE) // widest)
    heads, times = max(1, step // max(1, whole)), min(step, max(1, whole))
    found = [
        _Piece(n, min(n + heads, rows), t, min(t + times, whole), t * CHUNK, CHUNK)
        for n in range(0, rows, heads)
        for t in range(0, whole, times)
    ]
    if rest:
        heads = max(1, step * CHUNK // rest)
        found += [_Piece(n, min(n + heads, rows), whole, whole + 1, whole * CHUNK, rest) for n in range(0, rows, heads)]
    return found


def _together(x: Tensor) -> Tensor:
    """Heads of short sequences are taken together, which needs them side by side."""
    return x if x.shape[2] >= 16 * CHUNK else x.contiguous()


class _Weights:
    """What of the queries and keys of a piece meets the state, and what its chunks' tokens read from each other.

    Attributes:
        read: (R, C, K) queries as they read the state `into` · S before their chunk.
        kept: (R, C, K) keys as they enter the state behind it: fall · S + outof · keptᵀ v.
        into, outof: (R, K, 1) factors, None for 1.
        fall: (R, K, 1) what is left of the state over the chunk.
        strong: whether the chunk is put together from halves.
    """

    def __init__(self, q: Tensor, k: Tensor, g: Tensor, ones: Tensor, room: _Room) -> None:
        self.q, self.k, self.room = q, k, room
        b = torch.bmm(ones.expand(len(q), -1, -1), g, out=room("up", *q.shape))
        last = b[:, -1:]
        deepest = -float(last.amin())
        bound = _BOUND[q.dtype]
        self.into: Tensor | None = None
        self.outof: Tensor | None = None
        # Not "greater", so that a sum that is no number counts as strong.
        self.strong = not deepest <= bound
        if self.strong:
            self._halves(g.clamp(min=_CLOSED), bound)
            return
        self.fall = last.transpose(1, 2).exp()
        if deepest > bound / 2:
            middle = last / 2
            b -= middle
            self.into = middle.transpose(1, 2).exp()
            self.outof = self.into
        else:
            self.outof = self.fall
        self.up = b.exp_()
        self.read = torch.mul(q, self.up, out=room("read", *q.shape))
        self.kept = torch.div(k, self.up, out=room("kept", *q.shape))

    def _halves(self, g: Tensor, bound: float) -> None:
        """Factors of the halves of every size, from the gates themselves."""
        count, chunk, width = g.shape
        size = 2 ** max(0, chunk - 1).bit_length()
        if size != chunk:  # halves of halves need a power of two; tokens of zeros change nothing
            self.q, self.k, g = (F.pad(x, (0, 0, 0, size - chunk)) for x in (self.q, self.k, g))
        self.chunk = chunk
        self.shape = (count, size, width)
        half = _block(g, bound)
        blocks = g.unflatten(1, (-1, half)).cumsum(2)
        # Between tokens of a block, the gate of its first plays no part.
        self.inner = (blocks - (blocks[:, :, :1] + blocks[:, :, -1:]) / 2).exp_()
        behind = blocks[:, :, -1:] - blocks
        ahead = blocks.view(self.shape)
        self.block = half
        self.levels: list[tuple[int, Tensor, Tensor]] = []
        while half < size:
            pairs = (count, size // (2 * half), 2, half, width)
            u, w = ahead.view(pairs), behind.view(pairs)
            self.levels.append((half, _power(u[:, :, 1]), _power(w[:, :, 0])))
            w[:, :, 0] += u[:, :, 1, -1:]
            u[:, :, 1] += u[:, :, 0, -1:]
            half *= 2
        self.up, self.down = _power(ahead)[:, :chunk], _power(behind.view(self.shape))[:, :chunk]
        self.fall = self.up[:, -1:].transpose(1, 2)
        self.read, self.kept = self.q[:, :chunk] * self.up, self.k[:, :chunk] * self.down

    def _parts(self, x: Tensor, size: int) -> tuple[Tensor, Tensor]:
        """First and second halves of the blocks of 2 · size tokens: (R, C / 2 size, size, K) each."""
        pairs = x.unflatten(1, (-1, 2, size))
        return pairs[:, :, 0], pairs[:, :, 1]

    def _spans(self) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor, bool, int]]:
        """(queries, keys, their factors, whether on the diagonal, size) for all blocks and all pairs of halves."""
        up = self.inner
        down = up.reciprocal()
        yield (
            self.q.unflatten(1, up.shape[1:3]) * up,
            self.k.unflatten(1, up.shape[1:3]) * down,
            up,
            down,
            True,
            self.block,
        )
        for size, u, w in self.levels:
            yield self._parts(self.q, size)[1] * u, self._parts(self.k, size)[0] * w, u, w, False, size

    def inside(self) -> Tensor:
        """(R, C, C) what token i of a chunk reads from its token j <= i."""
        if not self.strong:
            count, chunk, _ = self.q.shape
            return torch.bmm(self.read, self.kept.transpose(1, 2), out=self.room("inside", count, chunk, chunk)).tril_()
        count, size, _ = self.shape
        a = self.read.new_zeros(count, size, size)
        for qs, ks, _, _, diagonal, part in self._spans():
            weights = qs @ ks.transpose(-1, -2)
            _window(a, part, diagonal=diagonal).copy_(weights.tril_() if diagonal else weights)
        return a[:, : self.chunk, : self.chunk]

    def gradients(self, da: Tensor, dq: Tensor, dk: Tensor) -> Tensor:
        """Turn gradients of `read` and `kept` by the states into those of q and k, and return q · dq - k · dk.

        Args:
            da: (R, C, C) gradients of `inside()`; used up.
            dq, dk: (R, C, K) gradients of `read` and `kept` by the states; replaced.
        """
        if not self.strong:
            da.tril_()
            dq.baddbmm_(da, self.kept)
            dk.baddbmm_(da.transpose(1, 2), self.read)
            db = self.read.mul_(dq).addcmul_(self.kept, dk, value=-1.0)
            dq *= self.up
            dk /= self.up
            return db
        _, size, _ = self.shape
        if size != self.chunk:
            da = F.pad(da, (0, size - self.chunk, 0, size - self.chunk))
        whole_q, whole_k = (da.new_zeros(self.shape) for _ in range(2))
        for qs, ks, u, w, diagonal, part in self._spans():
            some = _window(da, part, diagonal=diagonal)
            some = some.tril() if diagonal else some.contiguous()
            if diagonal:
                to_q, to_k = whole_q.view_as(u), whole_k.view_as(w)
            else:
                to_q, to_k = self._parts(whole_q, part)[1], self._parts(whole_k, part)[0]
            to_q.addcmul_(some @ ks, u)
            to_k.addcmul_(some.transpose(-1, -2) @ qs, w)
        dq.mul_(self.up).add_(whole_q[:, : self.chunk])
        dk.mul_(self.down).add_(whole_k[:, : self.chunk])
        return (dq * self.q[:, : self.chunk]).addcmul_(dk, self.k[:, : self.chunk], value=-1.0)


def _power(x: Tensor) -> Tensor:
    """e^x for x <= 0, with zero for what is nothing beside 1: numbers too small for a normal float are slow."""
    least = -346.0 if x.dtype is torch.float64 else -44.0
    # The exponential itself is fifty times slower where its results are so small.
    return F.threshold(x.clamp(min=least).exp_(), math.exp(least), 0.0)


def _block(g: Tensor, bound: float) -> int:
    """The largest power of two of tokens over which, the gate of the first aside, b falls by no more than the bound."""
    sums = g.cumsum(1)
    size = g.shape[1]
    while size > 1:
        blocks = sums.unflatten(1, (-1, size))
        if float((blocks[:, :, 0] - blocks[:, :, -1]).amax()) <= bound:
            break
        size //= 2
    return size


def _window(a: Tensor, size: int, *, diagonal: bool) -> Tensor:
    """View of the blocks on the diagonal of (R, C, C), or of the lower left quarters of those twice the size."""
    (r, c, _), (s, down, right) = a.shape, a.stride()
    step = size if diagonal else 2 * size
    start = a.storage_offset() + (0 if diagonal else size * down)
    return a.as_strided((r, c // step, size, size), (s, step * (down + right), down, right), start)


def _forward(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, initial: Tensor | None, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    dtype = state_dtype(q.dtype)
    with torch.autocast(q.device.type, enabled=False), _room(q, dtype) as room:
        out = q.new_empty(*q.shape[:3], v.shape[3])
        # The state before each chunk, and behind the last.
        heads = q.shape[0] * q.shape[1]
        states = torch.empty(heads, _count(q.shape[2]) + 1, q.shape[3], v.shape[3], dtype=dtype, device=q.device)
        states[:, 0] = 0.0 if initial is None else initial.flatten(0, 1)
        ones = torch.ones(CHUNK, CHUNK, dtype=dtype, device=q.device).tril_()
        q, k, v, g = (_together(x) for x in (q, k, v, g))
        for p in _pieces(q, v):
            value = p.rows(v, dtype)
            w = _Weights(p.rows(q, dtype), p.rows(k, dtype), p.rows(g, dtype), ones[: p.chunk, : p.chunk], room)
            own = states[p.states]
            added = own[0, 1:] if len(own) == 1 else room("added", len(value), *own.shape[2:])
            torch.bmm(w.kept.transpose(1, 2), value, out=added)
            if w.outof is not None:
                added *= w.outof
            _recur(own, added, w.fall)
            before = own[:, :-1].flatten(0, 1)
            here, aside = p.place(out, dtype)
            torch.bmm(w.read, before if w.into is None else before * w.into, out=here)
            here.baddbmm_(w.inside(), value, beta=scale, alpha=scale)
            if aside is not None:
                aside.copy_(here.view(aside.shape))
        return out, states[:, -1].unflatten(0, out.shape[:2]).clone(), states


def _recur(states: Tensor, new: Tensor, fall: Tensor, *, back: bool = False) -> None:
    """states[t + 1] = fall[t] · states[t] + new[t], or from the end states[t] = fall[t] · states[t + 1] + new[t].

    states are (heads, T + 1, K, V), the others (heads · T, …). Of a single head, `new` lies in its place already.
    """
    if len(states) > 1:
        place = states[:, :-1] if back else states[:, 1:]
        place.copy_(new.view(place.shape))
    order = -1 if back else 1
    places, left = states.unbind(1)[::order], fall.unflatten(0, (len(states), -1)).unbind(1)[::order]
    for before, after, factor in zip(places, places[1:], left):
        after.addcmul_(before, factor)


def _backward(
    dout: Tensor, dfinal: Tensor, q: Tensor, k: Tensor, v: Tensor, g: Tensor, states: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    dtype = states.dtype
    with torch.autocast(q.device.type, enabled=False), _room(q, dtype) as room:
        found = [torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v, g)]
        dstate = dfinal.to(dtype, copy=True).flatten(0, 1)
        ones = torch.ones(CHUNK, CHUNK, dtype=dtype, device=q.device).tril_()
        q, k, v, g, dout = (_together(x) for x in (q, k, v, g, dout))
        for p in reversed(_pieces(q, v)):
            d, value, lower = p.rows(dout, dtype), p.rows(v, dtype), ones[: p.chunk, : p.chunk]
            w = _Weights(p.rows(q, dtype), p.rows(k, dtype), p.rows(g, dtype), lower, room)
            places = [p.place(x, dtype) for x in found]
            dq, dk, dv, dg = (here for here, _ in places)
            # Gradients of the states behind the chunks, from the last to the first.
            own = states[p.states]
            rows, chunk, _ = w.read.shape
            ends = room("ends", *own.shape)
            reads = ends[0, :-1] if len(own) == 1 else room("reads", rows, *own.shape[2:])
            _scaled(w.read.transpose(1, 2), d, scale, reads)
            if w.into is not None:
                reads *= w.into
            ends[:, -1] = dstate[p.n0 : p.n1]
            _recur(ends, reads, w.fall, back=True)
            dstate[p.n0 : p.n1] = ends[:, 0]
            behind, before = ends[:, 1:].flatten(0, 1), own[:, :-1].flatten(0, 1)
            spare = room("spare", *behind.shape)
            at_end = torch.mul(behind, own[:, 1:].flatten(0, 1), out=spare).sum(-1)
            if w.into is not None:
                before = torch.mul(before, w.into, out=spare)
            if w.outof is not None:
                behind *= w.outof
            _scaled(w.inside().transpose(1, 2), d, scale, dv).baddbmm_(w.kept, behind)
            da = _scaled(d, value.transpose(1, 2), scale, room("inside", rows, chunk, chunk))
            _scaled(d, before.transpose(1, 2), scale, dq)
            torch.bmm(value, behind.transpose(1, 2), out=dk)
            db = w.gradients(da, dq, dk)
            # Everything behind a token feels its gate: the rest of the chunk, and the state at its end.
            db[:, -1] += at_end
            torch.bmm(lower.t().expand(rows, -1, -1), db, out=dg)
            for here, aside in places:
                if aside is not None:
                    aside.copy_(here.view(aside.shape))
        return *found, dstate.unflatten(0, dfinal.shape[:2])


def _scaled(a: Tensor, b: Tensor, scale: float, out: Tensor) -> Tensor:
    """scale · a @ b, without a pass for the scale: with beta = 0 what is in `out` is not read."""
    return out.baddbmm_(a, b, beta=0, alpha=scale)


_op = torch.library.custom_op(
    "core_attn::gated_linear",
    _forward,
    mutates_args=(),
    schema="(Tensor q, Tensor k, Tensor v, Tensor g, Tensor? initial, float scale) -> (Tensor, Tensor, Tensor)",
)
_backward_op = torch.library.custom_op(
    "core_attn::gated_linear_backward",
    _backward,
    mutates_args=(),
    schema="(Tensor dout, Tensor dfinal, Tensor q, Tensor k, Tensor v, Tensor g, Tensor states, float scale) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor)",
)


@_op.register_fake
def _(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, initial: Tensor | None, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    dtype, state = state_dtype(q.dtype), (q.shape[3], v.shape[3])
    return (
        q.new_empty(*q.shape[:3], v.shape[3]),
        q.new_empty(*q.shape[:2], *state, dtype=dtype),
        q.new_empty(q.shape[0] * q.shape[1], _count(q.shape[2]) + 1, *state, dtype=dtype),
    )


@_backward_op.register_fake
def _(
    dout: Tensor, dfinal: Tensor, q: Tensor, k: Tensor, v: Tensor, g: Tensor, states: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    return (
        q.new_empty(q.shape),
        k.new_empty(k.shape),
        v.new_empty(v.shape),
        g.new_empty(g.shape),
        dfinal.new_empty(dfinal.shape, dtype=states.dtype),
    )


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    q, k, v, g, initial, ctx.scale = inputs
    ctx.initial = None if initial is None else initial.dtype
    ctx.save_for_backward(q, k, v, g, output[2])
    ctx.mark_non_differentiable(output[2])
    # Else the states would get gradients of zeros, as large as they are.
    ctx.set_materialize_grads(False)


def _differentiate(ctx: Any, dout: Tensor | None, dfinal: Tensor | None, _: Tensor | None) -> tuple[Any, ...]:
    q, k, v, g, states = ctx.saved_tensors
    if dout is None:
        dout = v.new_zeros(*q.shape[:3], v.shape[3])
    if dfinal is None:
        dfinal = states.new_zeros(*q.shape[:2], *states.shape[2:])
    *found, dinitial = _backward_op(dout, dfinal, q, k, v, g, states, ctx.scale)
    return *found, None if ctx.initial is None else dinitial.to(ctx.initial), None


def _no_second_derivative(ctx: Any, *grads: Tensor) -> None:
    raise RuntimeError(
        "chunked gated linear attention has no second derivative; use backend='reference' for gradients of gradients"
    )


_op.register_autograd(_differentiate, setup_context=_save)
_backward_op.register_autograd(_no_second_derivative)


def run(
    q: Tensor, k: Tensor, v: Tensor, *, log_gate: Tensor, scale: float, initial_state: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Arguments as `core_attn.ops.gated_linear_attention` hands them on -> outputs and final state."""
    found = _op(q, k, v, log_gate, initial_state, scale)
    return found[0], found[1]
