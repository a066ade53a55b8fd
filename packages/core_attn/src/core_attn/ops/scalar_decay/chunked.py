"""Linear attention with scalar decay in chunks: plain PyTorch, any device, memory and time linear in L.

"Lightning Attention-2: A Free Lunch for Handling Unlimited Sequence Lengths in Large Language Models" (S215), section
3.2, and "Transformers are SSMs" (Dao and Gu, 2024), section 6. In a chunk of C tokens with the running sum b of the
log-decays since its start, and its end e, token i reads token j <= i with the weight q_i · k_j e^(b_i - b_j), and the
state S before the chunk with q_i e^(b_i); token j enters the state behind it with k_j e^(e - b_j). The states of
consecutive chunks are one product of a triangular matrix of decays with what each chunk adds.

Where b falls little over a chunk, q e^(b - e) and k e^(e - b) serve for the weights and for the state. Where it falls
more, the first would leave the range of floats, and the weights take the matrix e^(b_i - b_j), whose exponents are
never positive. The sums of the log-decays are kept as multiples of 1/16, which are exact, and small rests, so that
differences of large sums have all their digits.

Backward makes weights and states again.

Shapes: pieces of n heads and T chunks of C tokens, R = n·T; K and V channels of a key and a value; G heads of queries
and keys.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

CHUNK = 64
# Chunks of a segment: the states at the segments' starts are kept for backward, the others made again.
SEGMENT = 8
# How far b may fall over a chunk that is computed with e^(e - b) alone.
_BOUND = {torch.float32: 40.0, torch.float64: 300.0}
# Log-decays below this are a factor of 0 all the same; with it sums of them stay exact.
# Factors below the least are zeros: with denormal numbers, exponentials and products take many times as long.
_LOWEST = {torch.float32: -80.0, torch.float64: -700.0}
_LEAST = {torch.float32: 1e-30, torch.float64: 1e-290}
_FLOOR = {torch.float32: -120.0, torch.float64: -800.0}


def _views(x: Tensor) -> list[Tensor]:
    """(B, H, S, …) -> its B·H·S parts, all at once: many times cheaper than one by one."""
    if x.is_contiguous():
        return [*x.flatten(0, 2).unbind()]
    return [part for b in x.unbind() for h in b.unbind() for part in h.unbind()]


class _Place(NamedTuple):
    """Heads h0 … h1 - 1 of sample b, `chunks` chunks of segment s from token `start` on, of which `pad` are missing."""

    b: int
    h0: int
    h1: int
    s: int
    start: int
    chunks: int
    pad: int


class _Decay(NamedTuple):
    """What the tokens of one piece make of their log-decays.

    Attributes:
        up, down: (R, C, 1) factors of queries and keys for the state.
        between: (n, T + 1, T + 1) what is left at the start of chunk t, or at the end, of the first state (column 0)
            and of what chunk s - 1 added. Without a mask its rows are multiplied by what `up` lacks.
        mask: (n, T or 1, C, C) factors of the weights; None where the rows have them already.
    """

    up: Tensor
    down: Tensor
    between: Tensor
    mask: Tensor | None


class _Decays:
    """The decays of all pieces of a call: small beside its tokens, so they are made at once."""

    def __init__(self, g: Tensor, call: _Call) -> None:
        self.fixed, self.rows = g.dim() == 1, call.rows
        if self.fixed:
            g = g[None, :, None].expand(-1, -1, call.length)
        g = F.pad(g.to(call.dtype), (0, call.segments * call.span - call.length)).clamp(min=_FLOOR[call.dtype])
        g = g.unflatten(2, (call.segments, call.count, call.chunk))
        coarse = (g * 16).round_().div_(16)
        self.sums = coarse.cumsum(-1), (g - coarse).cumsum(-1)
        ends = tuple(x[..., -1:] for x in self.sums)
        deep = ends[0].amin((-1, -2)) < -_BOUND[call.dtype]
        if self.rows > 1:  # heads of one piece are computed alike
            deep = deep.any(1, keepdim=True).expand_as(deep)
        kept = tuple(x.masked_fill(deep[..., None, None], 0.0) for x in ends)
        up = _exp(*(x - e for x, e in zip(self.sums, kept))).mul_(call.scale).unsqueeze(-1)
        down = _exp(*(e - x for x, e in zip(self.sums, ends))).unsqueeze(-1)
        between = _falls(*(F.pad(x.squeeze(-1).cumsum(-1), (1, 0)) for x in ends))
        between[..., :-1, :] *= _exp(*kept)
        self.deep: list[list[list[bool]]] = deep.tolist()
        # What is left of the state over a chunk, where `between` does not have it already.
        self.fall = _exp(*(e - x for e, x in zip(ends, kept))) if deep.any() else None
        self.scale = call.scale
        self.masks: dict[int, Tensor] = {}
        self.parts = (up, down, between.unsqueeze(-3))
        self.stride = call.heads, call.segments
        self.views = [*zip(*(_views(x) for x in self.parts))] if self.rows == 1 else []

    def at(self, p: _Place) -> _Decay:
        b = 0 if self.fixed else p.b
        if self.rows == 1:
            up, down, between = self.views[(b * self.stride[0] + p.h0) * self.stride[1] + p.s]
        else:
            up, down, between = (x[b, p.h0 : p.h1, p.s] for x in self.parts)
            between = between.squeeze(1)
        if p.chunks != between.shape[-1] - 1:
            up, down = (x.narrow(-3, 0, p.chunks) for x in (up, down))
            between = between[:, : p.chunks + 1, : p.chunks + 1]
        if self.rows > 1:
            up, down = up.flatten(0, 1), down.flatten(0, 1)
        if self.fall is None or not self.deep[b][p.h0][p.s]:
            return _Decay(up, down, between, None)
        # A fixed decay makes all whole chunks alike.
        one = self.fixed and not p.pad
        mask = self.masks.get(p.h0) if one else None
        if mask is None:
            mask = _falls(*(x[b, p.h0 : p.h1, p.s, : 1 if one else p.chunks] for x in self.sums)).mul_(self.scale)
        if one:
            self.masks[p.h0] = mask
        return _Decay(up, down, between, mask)


def _exp(coarse: Tensor, fine: Tensor) -> Tensor:
    return _kept(coarse.clamp(min=_LOWEST[coarse.dtype]).exp_().mul_(fine.exp()))


def _kept(x: Tensor) -> Tensor:
    """Zeros in place of factors below the least."""
    return torch.threshold_(x, _LEAST[x.dtype], 0.0)


def _falls(coarse: Tensor, fine: Tensor) -> Tensor:
    """(…, C) sums -> (…, C, C) lower triangle of e^(b_i - b_j)."""
    found = coarse.unsqueeze(-1) - coarse.unsqueeze(-2)
    found.add_(fine.unsqueeze(-1)).sub_(fine.unsqueeze(-2))
    return _kept(found.clamp_(_LOWEST[found.dtype], 0.0).exp_()).tril_()


class _Call:
    """The sizes of one call, cut into pieces that fit the cache of a core, and memory that all pieces use again."""

    def __init__(self, q: Tensor, v: Tensor, scale: float) -> None:
        self.dtype = torch.float64 if q.dtype is torch.float64 else torch.float32
        self.batch, self.heads, self.length, _ = v.shape
        self.shared = self.heads // max(1, q.shape[1])
        self.scale = scale
        # A short sequence is one short chunk.
        self.chunk = min(CHUNK, max(1, self.length))
        self.count = max(1, min(SEGMENT, -(-self.length // self.chunk)))
        self.span = self.count * self.chunk
        self.segments = -(-self.length // self.span)
        pieces = (SEGMENT if q.device.type == "cpu" else 2**12) // self.count
        self.rows = max(1, pieces // self.shared * self.shared)
        self._buffers: dict[tuple[str, tuple[int, ...]], Tensor] = {}
        self._rooms: dict[tuple[int, int], _Room] = {}

    def buffer(self, name: str, like: Tensor, *shape: int) -> Tensor:
        """Memory that every piece uses again under this name, so that it stays in the cache."""
        held = self._buffers.get((name, shape))
        if held is None:
            self._buffers[name, shape] = held = torch.empty(shape, dtype=self.dtype, device=like.device)
        return held

    def room(self, q: Tensor, v: Tensor, p: _Place) -> _Room:
        key = (p.h1 - p.h0, p.chunks)
        if key not in self._rooms:
            self._rooms[key] = _Room(self, q, v, *key)
        return self._rooms[key]

    def places(self, *, backwards: bool = False) -> Iterator[_Place]:
        """All pieces: of one group of heads after the other, the segments in order."""
        for b in range(self.batch):
            for h0 in range(0, self.heads, self.rows):
                for s in reversed(range(self.segments)) if backwards else range(self.segments):
                    tokens = min(self.span, self.length - s * self.span)
                    chunks = -(-tokens // self.chunk)
                    pad = chunks * self.chunk - tokens
                    yield _Place(b, h0, min(h0 + self.rows, self.heads), s, s * self.span, chunks, pad)


class _Tokens:
    """A tensor (B, H or G, L, D) of tokens by pieces (R, C, D)."""

    def __init__(self, call: _Call, whole: Tensor, name: str = "") -> None:
        self.call, self.whole, self.name = call, whole, name
        self.direct = whole.dtype is call.dtype and whole.shape[1] == call.heads
        # Where a piece is one head, its whole segments.
        self.full = call.length // call.span if self.direct and call.rows == 1 else 0
        if self.full:
            cut = whole[:, :, : self.full * call.span].unflatten(2, (self.full, call.count, call.chunk))
            self.views = _views(cut)

    def at(self, p: _Place) -> Tensor:
        """Its tokens; those past the end are zeros, which change nothing."""
        if p.s < self.full:
            return self.views[(p.b * self.call.heads + p.h0) * self.full + p.s]
        call, x = self.call, self.whole
        shared = call.heads // x.shape[1]
        h1 = max(p.h0 // shared + 1, p.h1 // shared)
        tokens = p.chunks * call.chunk - p.pad
        part = x[p.b, p.h0 // shared : h1, p.start : p.start + tokens].to(call.dtype)
        if p.h1 - p.h0 != part.shape[0]:
            part = part.repeat_interleave(shared, dim=0)
        if p.pad:
            part = F.pad(part, (0, 0, 0, p.pad))
        return part.unflatten(1, (p.chunks, call.chunk)).flatten(0, 1)

    def room(self, p: _Place) -> Tensor:
        """(R, C, D) to be filled and then `put`: the place in the tensor itself, where that can be."""
        if p.s < self.full or self._whole_rows(p):
            return self.at(p)
        return self.call.buffer(self.name, self.whole, (p.h1 - p.h0) * p.chunks, self.call.chunk, self.whole.shape[-1])

    def _whole_rows(self, p: _Place) -> bool:
        return self.direct and not p.pad and (p.h1 - p.h0 == 1 or p.chunks * self.call.chunk == self.call.length)

    def put(self, part: Tensor, p: _Place) -> None:
        """Write what `room` gave to its place; heads that share one are added up."""
        if p.s < self.full or self._whole_rows(p):
            return
        tokens = p.chunks * self.call.chunk - p.pad
        part = part.view(p.h1 - p.h0, -1, part.shape[-1])[:, :tokens]
        if self.whole.shape[1] == self.call.heads:
            self.whole[p.b, p.h0 : p.h1, p.start : p.start + tokens] = part
            return
        first = p.h0 // self.call.shared
        part = part.unflatten(0, (-1, min(self.call.shared, p.h1 - p.h0))).sum(1)
        self.whole[p.b, first : first + part.shape[0], p.start : p.start + tokens] += part


class _Room:
    """What is made of n heads and T chunks, in memory that every such piece uses again, with its views at hand.

    Attributes:
        read: (R, C, K) queries as they read the state before their chunk.
        kept: (R, C, K) keys as they enter the state behind it.
        a, da: (R, C, C) weights and their gradients.
        new: (n, T + 1, K, V) what each chunk adds to the state, and the state it is added to.
        states: (n, T + 1, K, V) the state as each chunk reads it, and behind the last.
        ends: (n, T + 1, K, V) gradients of the state before the piece and behind each chunk.
    """

    def __init__(self, call: _Call, q: Tensor, v: Tensor, n: int, count: int) -> None:
        rows, chunk, width = n * count, call.chunk, q.shape[3]
        self.n, self.count = n, count
        self.read, self.kept = (call.buffer(name, v, rows, chunk, width) for name in ("read", "kept"))
        self.pairs = call.buffer("pairs", v, 2, rows, chunk, chunk)
        self.a, self.da = self.pairs.unbind()
        size = (n, count + 1, width, v.shape[3])
        self.states, self.ends = (call.buffer(name, v, *size) for name in ("states", "ends"))
        self.new = call.buffer("new", v, *size)
        self.spare = call.buffer("spare", v, max(self.states.numel(), self.read.numel()))
        reads = self.spare[: self.states.numel()].view(size)
        self.turned = {name: getattr(self, name).mT for name in ("read", "kept", "a", "da")}
        self.last, self.first = self.states[:, -1], self.ends[:, 0]
        self.forth = _Way(self.new[:, 0], self.new[:, 1:], self.new.flatten(2), self.states.flatten(2))
        self.back = _Way(reads[:, -1], reads[:, :-1], reads.flatten(2), self.ends.flatten(2))
        self.chunks = self.states[:, :-1], self.ends[:, 1:], self.new[:, 1:]
        # Of one head they are no copies.
        self.flat = tuple(x.flatten(0, 1) for x in self.chunks) if n == 1 else None

    def meet(self, x: Tensor, y: Tensor) -> Tensor:
        """x · y, element by element, until the next call or piece."""
        return torch.mul(x, y, out=self.place(x))

    def place(self, x: Tensor) -> Tensor:
        """Memory for something like x, until the next call or piece."""
        return self.spare[: x.numel()].view_as(x)

    def before(self) -> Tensor:
        """(R, K, V) the state as each chunk reads it."""
        return self.chunks[0].flatten(0, 1) if self.flat is None else self.flat[0]

    def behind(self) -> Tensor:
        """(R, K, V) gradients of the state behind each chunk."""
        return self.chunks[1].flatten(0, 1) if self.flat is None else self.flat[1]

    def added(self) -> Tensor:
        """(R, K, V) what each chunk adds to the state."""
        return self.chunks[2].flatten(0, 1) if self.flat is None else self.flat[2]

    def carry(self, way: _Way, left: Tensor, edge: Tensor, a: Tensor, b: Tensor) -> None:
        """`states` or `ends`: left times the chunks' products of a and b, with the edge beside them."""
        way.edge.copy_(edge)
        if self.n == 1:
            torch.bmm(a, b, out=way.new[0])
        else:
            way.new.copy_(torch.bmm(a, b).view_as(way.new))
        torch.bmm(left, way.all, out=way.out)


class _Way(NamedTuple):
    """Places in the memory of a room, from the first chunk to the last or back."""

    edge: Tensor
    new: Tensor
    all: Tensor
    out: Tensor


class _Piece:
    """How the tokens of one piece meet the state and each other.

    Attributes:
        x, y: (R, C, K) queries and keys whose products are the weights, before the mask.
    """

    def __init__(self, call: _Call, q: _Tokens, k: _Tokens, v: _Tokens, decays: _Decays, p: _Place) -> None:
        self.room, self.decay, self.value = call.room(q.whole, v.whole, p), decays.at(p), v.at(p)
        queries, keys = q.at(p), k.at(p)
        torch.mul(queries, self.decay.up, out=self.room.read)
        torch.mul(keys, self.decay.down, out=self.room.kept)
        self.x, self.y = (self.room.read, self.room.kept) if self.decay.mask is None else (queries, keys)

    def masked(self, pairs: Tensor) -> Tensor:
        """(R, C, C) products of all pairs, in place: those read, with the mask's factors."""
        if self.decay.mask is None:
            return pairs.tril_()
        pairs.view(self.room.n, self.room.count, *pairs.shape[1:]).mul_(self.decay.mask)
        return pairs

    def weights(self) -> Tensor:
        """(R, C, C) what token i of a chunk reads from its token j <= i."""
        return self.masked(self.products())

    def products(self) -> Tensor:
        """(R, C, C) of all queries with all keys of a chunk."""
        turned = self.room.turned["kept"] if self.decay.mask is None else self.y.mT
        return torch.bmm(self.x, turned, out=self.room.a)

    def states(self, first: Tensor) -> Tensor:
        """(R, K, V) the state as each chunk reads it, from that before the piece, (n, K, V)."""
        room = self.room
        room.carry(room.forth, self.decay.between, first, room.turned["kept"], self.value)
        return room.before()

    def ends(self, last: Tensor, d: Tensor) -> Tensor:
        """(R, K, V) gradients of the state behind each chunk, from that of the state behind the piece, (n, K, V)."""
        room = self.room
        room.carry(room.back, self.decay.between.mT, last, room.turned["read"], d)
        return room.behind()


class _OfDecay:
    """Gradients of the log-decays: that of token t is of all that is read or kept across it.

    With the products P_i of a token's query and Q_i of its key with their gradients, it is the sum of P_i - Q_i from t
    to the end of the chunk, and the product of the state there with its gradient. In P_i - Q_i a token's own weight,
    which has no decay in it, cancels but for its rounding. Where decays are strong that would be all there is: there
    each pair of tokens is counted by itself.

    Attributes:
        later: (B, H, S, T, C) P_i - Q_i; or of what the token reads, less what is read from it, in its chunk.
        earlier: (B, H, S, T, C) zeros; or of what is kept of the token behind its chunk.
        through: (B, H, S, T) of the state behind the chunk; or of what is left of the state over the chunk.
    """

    def __init__(self, call: _Call, like: Tensor, decays: _Decays) -> None:
        self.length, self.fall = call.length, decays.fall
        shape = (call.batch, call.heads, call.segments, call.count)
        make = partial(torch.zeros, dtype=call.dtype, device=like.device)
        self.later, self.through = make((*shape, call.chunk)), make((*shape, 1))
        self.earlier = None if self.fall is None else make((*shape, call.chunk))
        self.single = call.rows == 1
        self.stride = call.heads, call.segments
        self.views = [*zip(_views(self.later), _views(self.through))] if self.single else []

    def near(self, piece: _Piece, p: _Place, dx: Tensor, dy: Tensor) -> None:
        """Where decays are weak, from the gradients of x and y."""
        room = piece.room
        difference = room.meet(room.read, dx).addcmul_(room.kept, dy, value=-1)
        if self.single:
            place = (p.b * self.stride[0] + p.h0) * self.stride[1] + p.s
            later, through = (x[: p.chunks] for x in self.views[place])
            torch.sum(difference, 2, out=later)
        else:
            later, through = (x[p.b, p.h0 : p.h1, p.s, : p.chunks] for x in (self.later, self.through))
            later.copy_(difference.sum(2).view_as(later))
        before = room.before()
        state = torch.add(before, room.added(), out=room.place(before)).mul_(room.behind()).flatten(1)
        if self.single:
            torch.sum(state, 1, keepdim=True, out=through)
        else:
            through.copy_(state.sum(1).view_as(through))

    def far(self, piece: _Piece, p: _Place, dread: Tensor, dkept: Tensor) -> None:
        """Where decays are strong, from the gradients of what is read and kept."""
        assert self.earlier is not None
        room = piece.room
        weighed = room.a.mul_(room.da)
        weighed.diagonal(dim1=1, dim2=2).zero_()
        later = weighed.sum(2).sub_(weighed.sum(1)).add_(room.meet(room.read, dread).sum(2))
        earlier = room.meet(room.kept, dkept).sum(2)
        through = room.meet(room.before(), room.behind()).sum((1, 2))
        for whole, part in ((self.later, later), (self.earlier, earlier), (self.through, through)):
            place = whole[p.b, p.h0 : p.h1, p.s, : p.chunks]
            place.copy_(part.view_as(place))

    def whole(self) -> Tensor:
        """(B, H, L)."""
        found = self.later.flip(-1).cumsum(-1).flip(-1)
        if self.earlier is not None:
            found += F.pad(self.earlier[..., :-1], (1, 0)).cumsum(-1)
        found += self.through if self.fall is None else self.through * self.fall
        return found.flatten(2)[..., : self.length]


def _folded(x: Tensor) -> Tensor:
    return x.flatten(0, 1).unsqueeze(0)


def _few(q: Tensor, v: Tensor) -> bool:
    """Whether the heads of one sample are less than one piece, so that samples are better taken together."""
    return v.shape[0] > 1 and v.shape[1] * -(-v.shape[2] // CHUNK) < SEGMENT


def _forward(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, initial: Tensor | None, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    shape = (*v.shape[:2], q.shape[3], v.shape[3])
    if _few(q, v):
        g = g.repeat(v.shape[0]) if g.dim() == 1 else _folded(g)
        initial = None if initial is None else _folded(initial)
        q, k, v = _folded(q), _folded(k), _folded(v)
    with torch.autocast(q.device.type, enabled=False):
        call = _Call(q, v, scale)
        decays = _Decays(g, call)
        out = v.new_empty(v.shape)
        starts = torch.empty(call.segments, *v.shape[:2], q.shape[3], v.shape[3], dtype=call.dtype, device=q.device)
        final = torch.empty(starts.shape[1:], dtype=call.dtype, device=q.device)
        final.copy_(torch.zeros_like(final) if initial is None else initial)
        queries, keys, values, outs = _Tokens(call, q), _Tokens(call, k), _Tokens(call, v), _Tokens(call, out, "out")
        for place in call.places():
            state = final[place.b, place.h0 : place.h1]
            starts[place.s, place.b, place.h0 : place.h1] = state
            p = _Piece(call, queries, keys, values, decays, place)
            before = p.states(state)
            here = torch.bmm(p.weights(), p.value, out=outs.room(place)).baddbmm_(p.room.read, before)
            outs.put(here, place)
            state.copy_(p.room.last)
        return out.view(*shape[:2], *out.shape[2:]), final.view(shape), starts.view(call.segments, *shape)


def _backward(
    dout: Tensor,
    dfinal: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    starts: Tensor,
    scale: float,
    of_decay: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    shapes = q.shape, k.shape, v.shape, g.shape if of_decay else (0,), (*v.shape[:2], q.shape[3], v.shape[3])
    fixed = g.dim() == 1
    if _few(q, v):
        g = g.repeat(v.shape[0]) if fixed else _folded(g)
        dfinal = None if dfinal is None else _folded(dfinal)
        starts = starts.flatten(1, 2).unsqueeze(1)
        dout, q, k, v = _folded(dout), _folded(q), _folded(k), _folded(v)
    with torch.autocast(q.device.type, enabled=False):
        call = _Call(q, v, scale)
        decays = _Decays(g, call)
        new = torch.empty if call.shared == 1 else torch.zeros
        dq, dk = (new(x.shape, dtype=x.dtype, device=x.device) for x in (q, k))
        dv = torch.empty(v.shape, dtype=v.dtype, device=v.device)
        dstate = torch.zeros(starts.shape[1:], dtype=call.dtype, device=q.device)
        if dfinal is not None:
            dstate.copy_(dfinal)
        queries, keys, values, douts = (_Tokens(call, x) for x in (q, k, v, dout))
        dqs, dks, dvs = (_Tokens(call, x, name) for x, name in ((dq, "dq"), (dk, "dk"), (dv, "dv")))
        dgs = _OfDecay(call, v, decays) if of_decay else None
        for place in call.places(backwards=True):
            heads = slice(place.h0, place.h1)
            p, d = _Piece(call, queries, keys, values, decays, place), douts.at(place)
            room, turned = p.room, p.room.turned
            before, edge = p.states(starts[place.s, place.b, heads]), dstate[place.b, heads]
            behind = p.ends(edge, d)
            edge.copy_(room.first)
            p.products()
            torch.bmm(d, p.value.mT, out=room.da)
            if p.decay.mask is None:
                room.pairs.tril_()
            else:
                p.masked(room.a)
            dvalue = torch.bmm(turned["a"], d, out=dvs.room(place))
            dvs.put(dvalue.baddbmm_(room.kept, behind), place)
            dread = torch.bmm(d, before.mT, out=dqs.room(place))
            dkept = torch.bmm(p.value, behind.mT, out=dks.room(place))
            if p.decay.mask is None:
                dread.baddbmm_(room.da, room.kept)
                dkept.baddbmm_(turned["da"], room.read)
                if dgs is not None:
                    dgs.near(p, place, dread, dkept)
                dread.mul_(p.decay.up)
                dkept.mul_(p.decay.down)
            else:
                if dgs is not None:
                    dgs.far(p, place, dread, dkept)
                dread.mul_(p.decay.up).baddbmm_(p.masked(room.da), p.y)
                dkept.mul_(p.decay.down).baddbmm_(turned["da"], p.x)
            dqs.put(dread, place)
            dks.put(dkept, place)
        dg = g.new_empty(0) if dgs is None else dgs.whole()
        if dgs is not None and fixed:
            dg = dg.reshape(shapes[2][:3]).sum((0, 2))
        found = (dq, dk, dv, dg.to(g.dtype), dstate)
        return tuple(x.reshape(shape) for x, shape in zip(found, shapes))  # type: ignore[return-value]


_op = torch.library.custom_op(
    "core_attn::scalar_decay",
    _forward,
    mutates_args=(),
    schema="(Tensor q, Tensor k, Tensor v, Tensor g, Tensor? initial, float scale) -> (Tensor, Tensor, Tensor)",
)
_backward_op = torch.library.custom_op(
    "core_attn::scalar_decay_backward",
    _backward,
    mutates_args=(),
    schema="(Tensor dout, Tensor? dfinal, Tensor q, Tensor k, Tensor v, Tensor g, Tensor starts, float scale, "
    "bool of_decay) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
)


@_op.register_fake
def _(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, initial: Tensor | None, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    dtype = torch.float64 if q.dtype is torch.float64 else torch.float32
    state = (*v.shape[:2], q.shape[3], v.shape[3])
    count = (v.shape[2] + CHUNK * SEGMENT - 1) // (CHUNK * SEGMENT)
    return v.new_empty(v.shape), v.new_empty(state, dtype=dtype), v.new_empty((count, *state), dtype=dtype)


@_backward_op.register_fake
def _(
    dout: Tensor,
    dfinal: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    starts: Tensor,
    scale: float,
    of_decay: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    dg = g.new_empty(g.shape if of_decay else (0,))
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape), dg, starts.new_empty(starts.shape[1:])


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    q, k, v, g, initial, ctx.scale = inputs
    ctx.initial = None if initial is None else initial.dtype
    ctx.save_for_backward(q, k, v, g, output[2])
    ctx.mark_non_differentiable(output[2])
    # Gradients of outputs that nobody used would be zeros as large as the outputs.
    ctx.set_materialize_grads(False)


def _differentiate(ctx: Any, dout: Tensor | None, dfinal: Tensor | None, dstarts: Tensor | None) -> tuple[Any, ...]:
    *inputs, starts = ctx.saved_tensors
    of_decay = ctx.needs_input_grad[3]
    if dout is None:
        dout = torch.zeros_like(inputs[2])
    dq, dk, dv, dg, dinitial = _backward_op(dout, dfinal, *inputs, starts, ctx.scale, of_decay)
    return dq, dk, dv, dg if of_decay else None, None if ctx.initial is None else dinitial.to(ctx.initial), None


def _no_second_derivative(ctx: Any, *grads: Tensor) -> None:
    raise RuntimeError(
        "chunked attention with scalar decay has no second derivative; use backend='reference' for gradients of "
        "gradients"
    )


_op.register_autograd(_differentiate, setup_context=_save)
_backward_op.register_autograd(_no_second_derivative)


def run(
    q: Tensor, k: Tensor, v: Tensor, *, log_decay: Tensor, scale: float, initial_state: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Arguments as `core_attn.ops.scalar_decay_attention` hands them on -> outputs and final state."""
    found = _op(q, k, v, log_decay, initial_state, scale)
    return found[0], found[1]
