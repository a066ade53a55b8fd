"""RAT in two sweeps: the recurrence of all chunks side by side, then softmax over their ends in blocks of tokens.

Both are operators of their own with a backward of their own. The recurrence takes C steps, each on one token of every
chunk. Attention computes its weights again in backward, from the saved log-sum-exp ("FlashAttention", S66, algorithm
4), so that no L × N matrix is ever there.

Shapes: B batch, H heads, L tokens, D channels of a head, C tokens of a chunk, M ends of chunks.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from core_attn.ops.rat import reference
from core_attn.ops.rat.reference import RatState, chunks_with_tokens, rotated, state_dtype

# Scores of a block of tokens in all heads, and its fewest tokens. The blocks of one call are at least so many, because
# all tokens of one are multiplied with all ends that its last may read.
_AT_ONCE, _FEWEST, _BLOCKS = 1 << 17, 64, 8


# --- the recurrence -------------------------------------------------------------------------------------------------


def _laid_out(x: Tensor, offset: int, chunk: int) -> Tensor:
    """(B, H, L, D) -> (B·H, chunks, C, D) with zeros before the first token of its chunk and behind the last."""
    length = x.shape[2]
    chunks = -(-(length + offset) // chunk)
    out = x.new_empty(x.shape[0] * x.shape[1], chunks * chunk, x.shape[3])
    out[:, :offset] = 0.0
    out[:, offset + length :] = 0.0
    out[:, offset : offset + length].view(x.shape).copy_(x)
    return out.unflatten(1, (chunks, chunk))


def _tokens(x: Tensor, like: Tensor, offset: int) -> Tensor:
    """The way back: (B·H, chunks, C, D) -> (B, H, L, D), contiguous."""
    return x.flatten(1, 2)[:, offset : offset + like.shape[2]].contiguous().view(like.shape)


def _scan(k: Tensor, v: Tensor, log_gate: Tensor, key: Tensor, value: Tensor, chunk: int, offset: int) -> list[Tensor]:
    gate = _laid_out(log_gate, offset, chunk).exp_()
    found = []
    share = torch.expm1(log_gate).neg_()
    for x, start in ((k, key), (v, value)):
        h = _laid_out(share * x, offset, chunk)
        if offset:  # tokens before the first do nothing: their gates are 1
            h[:, 0, 0] = start.flatten(0, 1)
        for t in range(1, chunk):
            h[:, :, t].addcmul_(gate[:, :, t], h[:, :, t - 1])
        found.append(_tokens(h, k, offset))
    return found


def _scan_backward(
    dkeys: Tensor,
    dvalues: Tensor,
    k: Tensor,
    v: Tensor,
    log_gate: Tensor,
    keys: Tensor,
    values: Tensor,
    key: Tensor,
    value: Tensor,
    chunk: int,
    offset: int,
) -> list[Tensor]:
    gate = _laid_out(log_gate, offset, chunk).exp_()
    share = torch.expm1(log_gate).neg_()
    dgate = torch.zeros_like(log_gate, memory_format=torch.contiguous_format)
    found, starts = [], []
    for x, dh, h, start in ((k, dkeys, keys, key), (v, dvalues, values, value)):
        d = _laid_out(dh, offset, chunk)
        for t in range(chunk - 1, 0, -1):
            d[:, :, t - 1].addcmul_(gate[:, :, t], d[:, :, t])
        starts.append(d[:, 0, 0].view(start.shape).clone() if offset else torch.zeros_like(start))
        d = _tokens(d, k, offset)
        before = torch.empty_like(h, memory_format=torch.contiguous_format)
        before[:, :, 1:] = h[:, :, :-1]
        before[:, :, (chunk - offset) % chunk :: chunk] = 0.0
        if offset:
            before[:, :, 0] = start
        dgate.addcmul_(d, before.sub_(x))
        found.append(d.mul_(share))
    return [*found, dgate.mul_(log_gate.exp()), *starts]


# --- softmax across chunks ------------------------------------------------------------------------------------------


def _blocks(q: Tensor, ends: int, chunk: int, seen: int) -> Iterator[tuple[int, int, int, int]]:
    """Tokens from … to, how many ends all of them read, and how many the last of them reads."""
    rows = min(_AT_ONCE // max(1, q.shape[0] * q.shape[1] * ends), -(-q.shape[2] // _BLOCKS))
    rows = max(_FEWEST, rows)
    for r0 in range(0, q.shape[2], rows):
        r1 = min(r0 + rows, q.shape[2])
        yield r0, r1, (seen + r0) // chunk, (seen + r1 - 1) // chunk


class _Scores:
    """Masked scores of blocks: (B, H, rows, ends)."""

    def __init__(self, q: Tensor, ends: Tensor, real: Tensor | None, scale: float, chunk: int, seen: int) -> None:
        self.q, self.ends = q, ends
        self.scale, self.chunk, self.seen = scale, chunk, seen
        inf = torch.full((), torch.inf, dtype=q.dtype, device=q.device)
        self.ceiling = None if real is None else torch.where(real, inf, -inf)[:, None, None]

    def of(self, r0: int, r1: int, every: int, most: int) -> Tensor:
        scores = torch.matmul(self.q[:, :, r0:r1] * self.scale, self.ends[:, :, :most].mT)
        if most > every:  # the ends of chunks of this block are for its later tokens only
            own = (self.seen + torch.arange(r0, r1, device=scores.device)) // self.chunk
            later = torch.arange(every, most, device=scores.device) >= own[:, None]
            scores[..., every:] += torch.zeros(later.shape, dtype=scores.dtype, device=scores.device).masked_fill_(
                later, -torch.inf
            )
        if self.ceiling is not None:
            scores = torch.minimum(scores, self.ceiling[..., :most])
        return scores


def _attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    ends_k: Tensor,
    ends_v: Tensor,
    real: Tensor | None,
    scale: float,
    chunk: int,
    seen: int,
) -> tuple[Tensor, Tensor]:
    out = torch.empty_like(v, memory_format=torch.contiguous_format)
    own = (q * k).sum(-1, keepdim=True).mul_(scale)
    lse = own.clone()
    made = _Scores(q, ends_k, real, scale, chunk, seen)
    for r0, r1, every, most in _blocks(q, ends_k.shape[2], chunk, seen):
        if not most:
            out[:, :, r0:r1] = v[:, :, r0:r1]
            continue
        scores = made.of(r0, r1, every, most)
        self = own[:, :, r0:r1]
        top = torch.maximum(scores.amax(-1, keepdim=True), self)
        weights = scores.sub_(top).exp_()
        mine = (self - top).exp_()
        total = weights.sum(-1, keepdim=True).add_(mine)
        read = torch.matmul(weights, ends_v[:, :, :most]).addcmul_(mine, v[:, :, r0:r1])
        torch.div(read, total, out=out[:, :, r0:r1])
        lse[:, :, r0:r1] = total.log_().add_(top)
    return out, lse


def _attend_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    ends_k: Tensor,
    ends_v: Tensor,
    real: Tensor | None,
    out: Tensor,
    lse: Tensor,
    scale: float,
    chunk: int,
    seen: int,
) -> list[Tensor]:
    delta = (dout * out).sum(-1, keepdim=True)
    mine = ((q * k).sum(-1, keepdim=True).mul_(scale) - lse).exp_()
    dmine = (dout * v).sum(-1, keepdim=True).sub_(delta).mul_(mine).mul_(scale)
    dq, dk, dv = dmine * k, dmine * q, mine * dout
    dends_k, dends_v = (torch.zeros_like(x, memory_format=torch.contiguous_format) for x in (ends_k, ends_v))
    made = _Scores(q, ends_k, real, scale, chunk, seen)
    for r0, r1, every, most in _blocks(q, ends_k.shape[2], chunk, seen):
        if not most:
            continue
        rows = slice(r0, r1)
        weights = made.of(r0, r1, every, most).sub_(lse[:, :, rows]).exp_()
        up = dout[:, :, rows]
        dends_v[:, :, :most] += torch.matmul(weights.mT, up)
        dscores = torch.matmul(up, ends_v[:, :, :most].mT).sub_(delta[:, :, rows]).mul_(weights).mul_(scale)
        dq[:, :, rows] += torch.matmul(dscores, ends_k[:, :, :most])
        dends_k[:, :, :most] += torch.matmul(dscores.mT, q[:, :, rows])
    return [dq, dk, dv, dends_k, dends_v]


# --- as operators of torch ------------------------------------------------------------------------------------------

_SCAN = "Tensor k, Tensor v, Tensor log_gate, Tensor key, Tensor value, int chunk, int offset"
_scan_op = torch.library.custom_op("core_attn::rat_scan", _scan, mutates_args=(), schema=f"({_SCAN}) -> Tensor[]")
_scan_backward_op = torch.library.custom_op(
    "core_attn::rat_scan_backward",
    _scan_backward,
    mutates_args=(),
    schema="(Tensor dkeys, Tensor dvalues, Tensor k, Tensor v, Tensor log_gate, Tensor keys, Tensor values, "
    "Tensor key, Tensor value, int chunk, int offset) -> Tensor[]",
)
_READ = "Tensor q, Tensor k, Tensor v, Tensor ends_k, Tensor ends_v, Tensor? real"
_HOW = "float scale, int chunk, int seen"
_attend_op = torch.library.custom_op(
    "core_attn::rat_attend", _attend, mutates_args=(), schema=f"({_READ}, {_HOW}) -> (Tensor, Tensor)"
)
_attend_backward_op = torch.library.custom_op(
    "core_attn::rat_attend_backward",
    _attend_backward,
    mutates_args=(),
    schema=f"(Tensor dout, {_READ}, Tensor out, Tensor lse, {_HOW}) -> Tensor[]",
)


def _new(*tensors: Tensor) -> list[Tensor]:
    return [t.new_empty(t.shape) for t in tensors]


@_scan_op.register_fake
def _(k: Tensor, v: Tensor, log_gate: Tensor, key: Tensor, value: Tensor, chunk: int, offset: int) -> list[Tensor]:
    return _new(k, v)


@_scan_backward_op.register_fake
def _(dkeys: Tensor, dvalues: Tensor, k: Tensor, v: Tensor, log_gate: Tensor, *rest: Any) -> list[Tensor]:
    return _new(k, v, log_gate, *rest[2:4])


@_attend_op.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    return v.new_empty(v.shape), q.new_empty(*q.shape[:3], 1)


@_attend_backward_op.register_fake
def _(dout: Tensor, q: Tensor, k: Tensor, v: Tensor, ends_k: Tensor, ends_v: Tensor, *rest: Any) -> list[Tensor]:
    return _new(q, k, v, ends_k, ends_v)


def _save_scan(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    *tensors, ctx.chunk, ctx.offset = inputs
    ctx.save_for_backward(*tensors, *output)


def _differentiate_scan(ctx: Any, grads: list[Tensor | None]) -> tuple[Any, ...]:
    k, v, log_gate, key, value, keys, values = ctx.saved_tensors
    dkeys, dvalues = (torch.zeros_like(h) if d is None else d for d, h in zip(grads, (keys, values), strict=True))
    found = _scan_backward_op(dkeys, dvalues, k, v, log_gate, keys, values, key, value, ctx.chunk, ctx.offset)
    return *found, None, None


def _save_attend(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.scale, ctx.chunk, ctx.seen = inputs
    ctx.save_for_backward(*tensors, *output)
    ctx.mark_non_differentiable(output[1])


def _differentiate_attend(ctx: Any, dout: Tensor, unused: Any) -> tuple[Any, ...]:
    found = _attend_backward_op(dout, *ctx.saved_tensors, ctx.scale, ctx.chunk, ctx.seen)
    return *found, None, None, None, None


def _no_second_derivative(ctx: Any, *grads: Any) -> None:
    raise RuntimeError("RAT in chunks has no second derivative; use backend='reference' for gradients of gradients")


_scan_op.register_autograd(_differentiate_scan, setup_context=_save_scan)
_attend_op.register_autograd(_differentiate_attend, setup_context=_save_attend)
_scan_backward_op.register_autograd(_no_second_derivative)
_attend_backward_op.register_autograd(_no_second_derivative)


def run(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    log_gate: Tensor,
    chunk_size: int,
    scale: float,
    rotary_base: float | None,
    real: Tensor | None,
    state: RatState,
) -> tuple[Tensor, RatState]:
    """Arguments as `core_attn.ops.rat_attention` hands them on -> outputs and final state."""
    dtype, length = state_dtype(q), q.shape[2]
    if not length:
        options = {"log_gate": log_gate, "chunk_size": chunk_size, "scale": scale, "rotary_base": rotary_base}
        return reference.run(q, k, v, real=real, state=state, **options)  # type: ignore[arg-type]
    with torch.autocast(q.device.type, enabled=False):
        q_, k_, v_, gate, key, value, ends_k, ends_v = (x.to(dtype) for x in (q, k, v, log_gate, *state[:4]))
        offset = state.seen % chunk_size
        # A chunk longer than the sequence is as one that ends with it.
        chunk = min(chunk_size, offset + length)
        keys, values = _scan_op(k_, v_, gate, key, value, chunk, offset)
        last_k, last_v = keys[:, :, -1], values[:, :, -1]
        chunks = (state.seen + torch.arange(length, device=q.device)) // chunk_size
        q_, keys = (rotated(x, chunks, rotary_base) for x in (q_, keys))
        first = chunk_size - 1 - offset
        ends_k, ends_v = (
            torch.cat([ends, x[:, :, first::chunk_size]], dim=2) for ends, x in ((ends_k, keys), (ends_v, values))
        )
        some = None if real is None else chunks_with_tokens(real, chunk_size)
        out, _ = _attend_op(q_, keys, values, ends_k, ends_v, some, scale, chunk_size, state.seen)
        return out.to(q.dtype), RatState(last_k, last_v, ends_k, ends_v, state.seen + length)
