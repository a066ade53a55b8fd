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

Backward makes weights and states again. The gradient of the log-decays needs none of the exponentials: a decay of token
t has its part in every weight of i >= t for j < t, and in what is left of the state.

Shapes: pieces of n heads and T chunks of C tokens, R = n·T; K and V channels of a key and a value; G heads of queries
and keys.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

CHUNK = 64
# Chunks of a segment: the states at the segments' starts are kept for backward, the others made again.
SEGMENT = 16
# How far b may fall over a chunk that is computed with e^(e - b) alone.
_BOUND = {torch.float32: 40.0, torch.float64: 300.0}
# Log-decays below this are a factor of 0 all the same; with it sums of them stay exact.
# Factors below the least are zeros: with denormal numbers, exponentials and products take many times as long.
_LOWEST = {torch.float32: -80.0, torch.float64: -700.0}
_LEAST = {torch.float32: 1e-30, torch.float64: 1e-290}
_FLOOR = {torch.float32: -120.0, torch.float64: -800.0}


class _Place(NamedTuple):
    """Heads h0 … h1 - 1 of sample b, `chunks` chunks of segment s from token `start` on, of which `pad` are missing."""

    b: int
    h0: int
    h1: int
    s: int
    start: int
    chunks: int
    pad: int


class _Decay:
    """What the tokens of chunks make of their log-decays g (n, T, C), or (n, 1, C) where all chunks are the same.

    Attributes:
        mask: (n, T or 1, C, C) factors of the weights; None where the rows have them already.
        up, down: (n, T or 1, C, 1) factors of queries and keys for the state.
        fall: (n, T or 1, 1) what is left of the state over a chunk; None where `between` has it already.
        between: (n, T + 1, T + 1) what is left at the start of chunk t, or at the end, of the first state (column 0)
            and of what chunk s - 1 added. Without a mask its rows are multiplied by what `up` lacks.
    """

    def __init__(self, g: Tensor, count: int, scale: float) -> None:
        g = g.clamp(min=_FLOOR[g.dtype])
        coarse = (g * 16).round_().div_(16)
        sums = coarse.cumsum(-1), (g - coarse).cumsum(-1)
        ends = tuple(x[..., -1:] for x in sums)
        self.between = _falls(*(F.pad(x.squeeze(-1).expand(-1, count).cumsum(-1), (1, 0)) for x in ends))
        self.down = _exp(*(e - x for e, x in zip(ends, sums))).unsqueeze(-1)
        deepest = -float(ends[0].amin()) if g.numel() else 0.0
        if deepest <= _BOUND[g.dtype]:
            self.mask = self.fall = None
            self.up = _exp(*(x - e for e, x in zip(ends, sums))).unsqueeze(-1) * scale
            self.between[:, :-1] *= _exp(*ends)
        else:
            self.mask, self.fall = _falls(*sums).mul_(scale), _exp(*ends)
            self.up = _exp(*sums).unsqueeze(-1) * scale


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
    """The inputs of one call, cut into pieces that fit the cache of a core."""

    def __init__(self, q: Tensor, v: Tensor, g: Tensor, scale: float) -> None:
        self.dtype = torch.float64 if q.dtype is torch.float64 else torch.float32
        self.batch, self.heads, self.length, _ = v.shape
        self.shared = self.heads // max(1, q.shape[1])
        self.g, self.scale = g, scale
        # A short sequence is one short chunk.
        self.chunk = min(CHUNK, max(1, self.length))
        self.segments = -(-self.length // (CHUNK * SEGMENT))
        count = min(SEGMENT, -(-self.length // self.chunk))
        pieces = (SEGMENT if q.device.type == "cpu" else 2**12) // max(1, count)
        self.rows = max(1, pieces // self.shared * self.shared)
        self._buffers: dict[str, Tensor] = {}

    def buffer(self, name: str, like: Tensor, *shape: int) -> Tensor:
        """Memory that every piece uses again under this name, so that it stays in the cache."""
        size = math.prod(shape)
        held = self._buffers.get(name)
        if held is None or held.numel() < size:
            self._buffers[name] = held = torch.empty(size, dtype=self.dtype, device=like.device)
        return held[:size].view(shape)

    def product(self, name: str, a: Tensor, b: Tensor) -> Tensor:
        """(R, X, Y) times (R, Y, Z) in the memory of this name."""
        return torch.bmm(a, b, out=self.buffer(name, a, a.shape[0], a.shape[1], b.shape[2]))

    def places(self, *, backwards: bool = False) -> Iterator[_Place]:
        """All pieces: of one group of heads after the other, the segments in order."""
        span = CHUNK * SEGMENT
        for b in range(self.batch):
            for h0 in range(0, self.heads, self.rows):
                self.kept: dict[tuple[int, int], _Decay] = {}
                for s in reversed(range(self.segments)) if backwards else range(self.segments):
                    tokens = min(span, self.length - s * span)
                    count = -(-tokens // self.chunk)
                    yield _Place(
                        b, h0, min(h0 + self.rows, self.heads), s, s * span, count, count * self.chunk - tokens
                    )

    def decay(self, p: _Place) -> _Decay:
        stop = p.start + p.chunks * self.chunk - p.pad
        if self.g.dim() == 3:
            g = F.pad(self.g[p.b, p.h0 : p.h1, p.start : stop].to(self.dtype), (0, p.pad))
            return _Decay(g.unflatten(1, (p.chunks, self.chunk)), p.chunks, self.scale)
        if (p.chunks, p.pad) not in self.kept:
            g = self.g[p.h0 : p.h1, None].to(self.dtype).expand(-1, self.chunk)
            if p.pad:
                g = F.pad(g.repeat(1, p.chunks)[:, : stop - p.start], (0, p.pad)).unflatten(1, (p.chunks, self.chunk))
            else:
                g = g.unsqueeze(1)
            self.kept[p.chunks, p.pad] = _Decay(g, p.chunks, self.scale)
        return self.kept[p.chunks, p.pad]

    def cut(self, x: Tensor, p: _Place) -> Tensor:
        """(B, H or G, L, D) -> (n, T, C, D); tokens past the end are zeros, which change nothing."""
        shared = self.heads // x.shape[1]
        h1 = max(p.h0 // shared + 1, p.h1 // shared)
        part = x[p.b, p.h0 // shared : h1, p.start : p.start + p.chunks * self.chunk].to(self.dtype)
        if p.h1 - p.h0 != part.shape[0]:
            part = part.repeat_interleave(shared, dim=0)
        if p.pad:
            part = F.pad(part, (0, 0, 0, p.pad))
        return part.unflatten(1, (p.chunks, self.chunk))

    def flat(self, x: Tensor, p: _Place) -> Tensor:
        """(B, H or G, L, D) -> (R, C, D)."""
        return self.cut(x, p).flatten(0, 1)

    def _direct(self, whole: Tensor, p: _Place) -> bool:
        rows = p.h1 - p.h0 == 1 or p.chunks * self.chunk == self.length
        return rows and not p.pad and whole.dtype is self.dtype and whole.shape[1] == self.heads

    def room(self, name: str, whole: Tensor, p: _Place) -> Tensor:
        """(R, C, D) to be filled and then `put`: the place in `whole` (B, H or G, L, D) itself, where that can be."""
        if self._direct(whole, p):
            return self.flat(whole, p)
        return self.buffer(name, whole, (p.h1 - p.h0) * p.chunks, self.chunk, whole.shape[-1])

    def put(self, whole: Tensor, part: Tensor, p: _Place) -> None:
        """Write what `room` gave to its place; heads that share one are added up."""
        if self._direct(whole, p):
            return
        tokens = p.chunks * self.chunk - p.pad
        part = part.view(p.h1 - p.h0, -1, part.shape[-1])[:, :tokens]
        if whole.shape[1] == self.heads:
            whole[p.b, p.h0 : p.h1, p.start : p.start + tokens] = part
            return
        first = p.h0 // self.shared
        part = part.unflatten(0, (-1, min(self.shared, p.h1 - p.h0))).sum(1)
        whole[p.b, first : first + part.shape[0], p.start : p.start + tokens] += part


class _Piece:
    """How the tokens of one piece meet the state and each other.

    Attributes:
        read: (R, C, K) queries as they read the state before their chunk.
        kept: (R, C, K) keys as they enter the state behind it.
        x, y: (R, C, K) queries and keys whose products are the weights, before the mask.
    """

    def __init__(self, call: _Call, q: Tensor, k: Tensor, p: _Place) -> None:
        self.call, self.decay = call, call.decay(p)
        self.rows, self.count = p.h1 - p.h0, p.chunks
        queries, keys = call.cut(q, p), call.cut(k, p)
        self.read, self.kept = self._times("read", queries, self.decay.up), self._times("kept", keys, self.decay.down)
        self.x, self.y = self.read, self.kept
        if self.decay.mask is not None:
            self.x, self.y = queries.flatten(0, 1), keys.flatten(0, 1)

    def _times(self, name: str, x: Tensor, factor: Tensor) -> Tensor:
        """(n, T, C, K) times factors (n, T or 1, C, 1) as (R, C, K), whatever the strides of x."""
        return torch.mul(x, factor, out=self.call.buffer(name, x, *x.shape)).flatten(0, 1)

    def meet(self, x: Tensor, y: Tensor) -> Tensor:
        """x · y, element by element, until the next call."""
        return torch.mul(x, y, out=self.call.buffer("met", x, *x.shape))

    def scale(self, x: Tensor, factor: Tensor) -> Tensor:
        """(R, C, …) times factors (n, T or 1, C, …), in place."""
        x.view(self.rows, self.count, *x.shape[1:]).mul_(factor)
        return x

    def masked(self, pairs: Tensor) -> Tensor:
        """(R, C, C) products of all pairs, in place: those read, with the mask's factors."""
        return pairs.tril_() if self.decay.mask is None else self.scale(pairs, self.decay.mask)

    def weights(self) -> Tensor:
        """(R, C, C) what token i of a chunk reads from its token j <= i."""
        return self.masked(self.call.product("weights", self.x, self.y.transpose(1, 2)))

    def states(self, first: Tensor, value: Tensor) -> Tensor:
        """(n, T + 1, K, V) the state (n, K, V) as each chunk reads it, and behind the last."""
        added = self.call.product("added", self.kept.transpose(1, 2), value)
        left = self.decay.between
        return self._carried("states", left[:, :, :1], first, left[:, :, 1:], added)

    def ends(self, last: Tensor, d: Tensor) -> Tensor:
        """(n, T + 1, K, V) gradients of the state before the piece and behind each chunk, from that of the last."""
        reads = self.call.product("added", self.read.transpose(1, 2), d)
        left = self.decay.between.transpose(1, 2)
        return self._carried("ends", left[:, :, -1:], last, left[:, :, :-1], reads)

    def _carried(self, name: str, far: Tensor, edge: Tensor, left: Tensor, new: Tensor) -> Tensor:
        rows, count = self.rows, self.count
        found = self.call.buffer(name, new, rows, count + 1, edge[0].numel())
        torch.mul(far, edge.reshape(rows, 1, -1), out=found)
        found.baddbmm_(left, new.view(rows, count, -1))
        return found.view(rows, count + 1, *edge.shape[1:])


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
        call = _Call(q, v, g, scale)
        out = v.new_empty(v.shape)
        starts = torch.empty(call.segments, *v.shape[:2], q.shape[3], v.shape[3], dtype=call.dtype, device=q.device)
        final = torch.empty(starts.shape[1:], dtype=call.dtype, device=q.device)
        final.copy_(torch.zeros_like(final) if initial is None else initial)
        for place in call.places():
            state = final[place.b, place.h0 : place.h1]
            starts[place.s, place.b, place.h0 : place.h1] = state
            p, value = _Piece(call, q, k, place), call.flat(v, place)
            states = p.states(state, value)
            here = torch.bmm(p.weights(), value, out=call.room("out", out, place))
            here.baddbmm_(p.read, states[:, :-1].flatten(0, 1))
            call.put(out, here, place)
            state.copy_(states[:, -1])
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
        call = _Call(q, v, g, scale)
        new = torch.empty if call.shared == 1 else torch.zeros
        dq, dk = (new(x.shape, dtype=x.dtype, device=x.device) for x in (q, k))
        dv = torch.empty(v.shape, dtype=v.dtype, device=v.device)
        dg = torch.empty(v.shape[:3] if of_decay else (0,), dtype=call.dtype, device=q.device)
        dstate = torch.zeros(starts.shape[1:], dtype=call.dtype, device=q.device)
        if dfinal is not None:
            dstate.copy_(dfinal)
        for place in call.places(backwards=True):
            at = (place.b, slice(place.h0, place.h1))
            p = _Piece(call, q, k, place)
            value, d = call.flat(v, place), call.flat(dout, place)
            before = p.states(starts[place.s][at], value)[:, :-1].flatten(0, 1)
            ends = p.ends(dstate[at], d)
            dstate[at] = ends[:, 0]
            behind = ends[:, 1:].flatten(0, 1)
            a, da = p.weights(), call.product("dweights", d, value.transpose(1, 2))
            dvalue = torch.bmm(a.transpose(1, 2), d, out=call.room("dv", dv, place))
            call.put(dv, dvalue.baddbmm_(p.kept, behind), place)
            dread = torch.bmm(d, before.transpose(1, 2), out=call.room("dq", dq, place))
            dkept = torch.bmm(value, behind.transpose(1, 2), out=call.room("dk", dk, place))
            if of_decay:
                weighed = a.mul_(da)
                # A token's own pair has no decay in it.
                weighed.diagonal(dim1=1, dim2=2).zero_()
                later = weighed.sum(2).sub_(weighed.sum(1)).add_(p.meet(p.read, dread).sum(2))
                earlier = F.pad(p.meet(p.kept, dkept).sum(2)[:, :-1], (1, 0))
                through = p.meet(before, behind).sum((1, 2)).unsqueeze(1)
                if p.decay.fall is not None:
                    p.scale(through, p.decay.fall)
                part = later.flip(1).cumsum(1).flip(1).add_(earlier.cumsum(1)).add_(through)
                room = call.room("dg", dg.unsqueeze(-1), place).copy_(part.unsqueeze(-1))
                call.put(dg.unsqueeze(-1), room, place)
            p.masked(da)
            for dx, of, left, factor in ((dread, p.y, da, p.decay.up), (dkept, p.x, da.transpose(1, 2), p.decay.down)):
                if p.decay.mask is not None:
                    p.scale(dx, factor)
                dx.baddbmm_(left, of)
                if p.decay.mask is None:
                    p.scale(dx, factor)
            call.put(dq, dread, place)
            call.put(dk, dkept, place)
        if of_decay and fixed:
            dg = dg.view(shapes[2][:3]).sum((0, 2))
        found = (dq, dk, dv, dg.to(g.dtype), dstate)
        return tuple(x.view(shape) for x, shape in zip(found, shapes))  # type: ignore[return-value]


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
