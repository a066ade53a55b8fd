"""Gated linear attention in chunks: plain PyTorch, any device, memory and time linear in L.

"Gated Linear Attention Transformers with Hardware-Efficient Training" (S196), section 4. In a chunk of C tokens with
the running sum b of the log-gates since its start, token i reads token j <= i with the weight q_i · (k_j e^(b_i -
b_j)) and the state S before the chunk with q_i e^(b_i).

The product of q e^(b - r) and k e^(r - b) gives all pairs of a chunk in one matrix product, but its factors leave the
range of floats where gates are strong. So it is used only over spans in which b falls by no more than a bound, with r
in the middle. A chunk in which it falls further is put together from blocks in which it does not, and from pairs of
halves of larger blocks: with u the product of the gates of the second half up to a token, and w that of the first half
behind a token, the weights between the halves are products of q u and k w, and no factor is ever above 1. The products
are made level by level and stay as exact as the gates. What is needed is seen from the gates of each piece of the
sequence.

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
# The same for a block of a few tokens, whose gates are multiplied, with no running sums to lose digits.
_BOUND_OF_BLOCK = {torch.float32: 96.0, torch.float64: 600.0}
# A product of gates below e^this is nothing beside 1. Two that are above it have a product that is a normal number:
# others are slow.
_LEAST = {torch.float32: -43.0, torch.float64: -346.0}
# Products of blocks smaller than this are made as if they were as large: so many small ones are slow.
_TILE = 16
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
    """On the CPU a thread keeps its room, some MB, from call to call: to take memory anew costs a tenth of the time.

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
            self._halves(g)
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

    def _halves(self, g: Tensor) -> None:
        """Factors of the blocks and of the halves of every size, from the gates themselves."""
        chunk = g.shape[1]
        size = 2 ** max(0, chunk - 1).bit_length()
        if size != chunk:  # halves of halves need a power of two; tokens of zeros change nothing
            self.q, self.k, g = (F.pad(x, (0, 0, 0, size - chunk)) for x in (self.q, self.k, g))
        room, least, self.chunk, self.shape = self.room, _LEAST[g.dtype], chunk, g.shape
        self.block = self._largest_block(g)
        # Exponentials of numbers far below the least are slow.
        roots = torch.mul(g, 0.5, out=room("root", *g.shape)).clamp_(min=1.4 * least).exp_()
        self.up, self.down = room("up", *g.shape).copy_(roots), room("down", *g.shape).fill_(1.0)
        torch.threshold_(self.up, math.exp(least / 2), 0.0)
        self.up *= self.up
        self._of_blocks(roots)
        self.levels: list[tuple[int, Tensor, Tensor, Tensor, Tensor]] = []
        half = 1
        while half < size:
            if half >= self.block:
                u, w = self._pairs(self.up, half)[:, :, 1], self._pairs(self.down, half)[:, :, 0]
                q, k = self._pairs(self.q, half)[:, :, 1], self._pairs(self.k, half)[:, :, 0]
                u, w = (room(f"{name}{half}", *x.shape).copy_(x) for name, x in (("u", u), ("w", w)))
                read, kept = room(f"read{half}", *u.shape), room(f"kept{half}", *u.shape)
                self.levels.append((half, u, w, torch.mul(q, u, out=read), torch.mul(k, w, out=kept)))
            for part in self._join(self.up, self.down, half):
                torch.threshold_(part, math.exp(least), 0.0)
            half *= 2
        self.fall = self.up[:, -1:].transpose(1, 2)
        self.read = torch.mul(self.q, self.up, out=room("read", *g.shape))[:, :chunk]
        self.kept = torch.mul(self.k, self.down, out=room("kept", *g.shape))[:, :chunk]

    def _largest_block(self, g: Tensor) -> int:
        """The most tokens, a power of two, whose gates, that of the first aside, fall together by at most the bound."""
        (count, size, width), room, block = g.shape, self.room, 1
        whole = others = g
        while block < size:
            # For blocks of twice the size: the gates but the first, and all.
            first, second = whole.unflatten(1, (-1, 2)).unbind(2)
            some = room(f"read{block}", *second.shape)
            others = some.copy_(second) if block == 1 else torch.add(others[:, ::2], second, out=some)
            if not -float(others.amin()) <= _BOUND_OF_BLOCK[g.dtype]:
                break
            block *= 2
            whole = torch.add(first, second, out=room(f"kept{block}", count, size // block, width))
        return block

    def _of_blocks(self, roots: Tensor) -> None:
        """Factors of a block's tokens about its middle, in which the gate of its first plays no part."""
        room = self.room
        if self.block == 1:
            self.inner = None
            return
        roots.unflatten(1, (-1, self.block))[:, :, 0] = 1.0
        behind, half = room("behind", *roots.shape).fill_(1.0), 1
        while half < self.block:
            self._join(roots, behind, half)
            half *= 2
        up = torch.div(roots, behind, out=room("inner_up", *roots.shape))
        down = torch.div(behind, roots, out=behind)
        read, kept = room("inner_read", *roots.shape), room("inner_kept", *roots.shape)
        self.inner = (up, down, torch.mul(self.q, up, out=read), torch.mul(self.k, down, out=kept))

    @staticmethod
    def _pairs(x: Tensor, half: int) -> Tensor:
        """(R, C, ·) -> (R, C / 2 half, 2, half, ·), a view."""
        return x.unflatten(1, (-1, 2, half))

    def _join(self, up: Tensor, down: Tensor, half: int) -> tuple[Tensor, Tensor]:
        """Products of a block up to a token and behind it, in place, from those of its halves; what was changed."""
        ups, downs = self._pairs(up, half), self._pairs(down, half)
        first, second = downs[:, :, 0], ups[:, :, 1]
        first *= second[:, :, -1:]
        second *= ups[:, :, 0, -1:]
        return first, second

    def inside(self) -> Tensor:
        """(R, C, C) what token i of a chunk reads from its token j <= i."""
        if not self.strong:
            count, chunk, _ = self.q.shape
            return torch.bmm(self.read, self.kept.transpose(1, 2), out=self.room("inside", count, chunk, chunk)).tril_()
        count, size, _ = self.shape
        a = self.room("inside", count, size, size).zero_()
        if self.inner is None:
            a.diagonal(0, 1, 2).copy_(torch.mul(self.q, self.k, out=self.room("behind", *self.shape)).sum(-1))
        else:
            tiles = self._tiles("tiles")
            torch.bmm(self._tiled(self.inner[2]), self._tiled(self.inner[3]).transpose(1, 2), out=tiles)
            _blocks(a, size, tiles.shape[1], self.block).copy_(_blocks(tiles, size, tiles.shape[1], self.block).tril())
        for half, _, _, q, k in self.levels:
            _quarters(a, half).copy_(q @ k.mT if half > 1 else (q * k).sum(-1, keepdim=True))
        return a[:, : self.chunk, : self.chunk]

    def _tiles(self, name: str) -> Tensor:
        count, size, _ = self.shape
        tile = min(size, max(_TILE, self.block))
        return self.room(name, count * size // tile, tile, tile)

    def _tiled(self, x: Tensor) -> Tensor:
        return x.view(-1, min(x.shape[1], max(_TILE, self.block)), x.shape[2])

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
        size = self.shape[1]
        if size != self.chunk:
            more = size - self.chunk
            da, whole_q, whole_k = F.pad(da, (0, more, 0, more)), F.pad(dq, (0, 0, 0, more)), F.pad(dk, (0, 0, 0, more))
        else:
            whole_q, whole_k = dq, dk
        whole_q *= self.up
        whole_k *= self.down
        if self.inner is None:
            some = da.diagonal(0, 1, 2).unsqueeze(-1)
            whole_q.addcmul_(some, self.k)
            whole_k.addcmul_(some, self.q)
        else:
            up, down, q, k = self.inner
            tiles, product = self._tiles("tiles").zero_(), self.room("root", *self.shape)
            _blocks(tiles, size, tiles.shape[1], self.block).copy_(_blocks(da, size, tiles.shape[1], self.block).tril())
            torch.bmm(tiles, self._tiled(k), out=self._tiled(product))
            whole_q.addcmul_(product, up)
            torch.bmm(tiles.transpose(1, 2), self._tiled(q), out=self._tiled(product))
            whole_k.addcmul_(product, down)
        for half, u, w, q, k in self.levels:
            some, product = _quarters(da, half), self.room("root", *u.shape)
            self._pairs(whole_q, half)[:, :, 1].addcmul_(_product(some, k, product), u)
            self._pairs(whole_k, half)[:, :, 0].addcmul_(_product(some.mT, q, product), w)
        db = torch.mul(whole_q, self.q, out=self.room("root", *self.shape)).addcmul_(whole_k, self.k, value=-1.0)
        if size == self.chunk:
            return db
        dq.copy_(whole_q[:, : self.chunk])
        dk.copy_(whole_k[:, : self.chunk])
        return db[:, : self.chunk]


def _product(a: Tensor, b: Tensor, out: Tensor) -> Tensor:
    """a @ b; very small matrices are slow as such."""
    if a.shape[-1] >= 4:
        return torch.matmul(a, b, out=out)
    return torch.sum(a.unsqueeze(-1) * b.unsqueeze(-3), -2, out=out)


def _blocks(a: Tensor, size: int, tile: int, block: int) -> Tensor:
    """View of the blocks on the diagonals of (R, size, size), or of those of its tiles (R size / tile, tile, tile)."""
    count = a.shape[0] * a.shape[1] // size
    side, down, right = a.shape[1], a.stride(1), a.stride(2)
    between = a.stride(0) if side == tile else tile * (down + right)
    steps = (a.stride(0) * (size // side), between, block * (down + right), down, right)
    return a.as_strided((count, size // tile, tile // block, block, block), steps, a.storage_offset())


def _quarters(a: Tensor, half: int) -> Tensor:
    """View of the lower left quarters of the blocks of 2 · half on the diagonal of (R, C, C)."""
    (r, c, _), (s, down, right) = a.shape, a.stride()
    steps = (s, 2 * half * (down + right), down, right)
    return a.as_strided((r, c // (2 * half), half, half), steps, a.storage_offset() + half * down)


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
