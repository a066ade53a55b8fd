"""Kernelised attention with the keys summed first: plain PyTorch, any device, memory and time linear in L.

The causal sum over j <= i of (q_i k_j) v_j is taken in chunks of C tokens: q_i reads the state S = sum of k_j v_jᵀ
before its chunk, and the keys of its chunk one by one. Backward is the same sum three times: with the gradient g of the
outputs, dq_i = sum over j <= i of (g_i v_j) k_j, dk_j = sum over i >= j of (g_i v_j) q_i and dv_j = sum over i >= j of
(q_i k_j) g_i, of which the last two run from the end.

Shapes: N = B·H, T chunks of C tokens, F features, V channels of a value.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

# Tokens of a chunk: their C x C pairs cost about as much as the F x V state for the usual widths.
_CHUNK = 64
# Elements of the largest tensor of a piece of chunks that are worked on together: what is alive fits a core's cache.
_PIECE = 2**16


def chunk_length(length: int) -> int:
    """Tokens of a chunk of the causal product; a short sequence is one short chunk."""
    return max(1, min(_CHUNK, length))


def _pieces(q: Tensor, v: Tensor) -> list[tuple[int, int]]:
    """Ranges of chunks."""
    length, chunk = q.shape[1], chunk_length(q.shape[1])
    wide = max(q.shape[2], v.shape[2], chunk)
    most = _PIECE if q.device.type == "cpu" else 2**24
    step = max(1, most // max(1, q.shape[0] * chunk * wide))
    chunks = -(-length // chunk)
    return [(t, min(t + step, chunks)) for t in range(0, chunks, step)]


def _cut(x: Tensor, t0: int, t1: int, chunk: int) -> Tensor:
    """Chunks t0 … t1 - 1 of (N, L, D) as (N·T, C, D); zeros past the end change nothing."""
    part = x[:, t0 * chunk : t1 * chunk]
    short = (t1 - t0) * chunk - part.shape[1]
    return (F.pad(part, (0, 0, 0, short)) if short else part).reshape(-1, chunk, x.shape[2])


def _put(whole: Tensor, part: Tensor, t0: int, t1: int, chunk: int) -> None:
    """Write (N·T, C, D) to its place in (N, L, D)."""
    place = whole[:, t0 * chunk : t1 * chunk]
    place.copy_(part.view(whole.shape[0], (t1 - t0) * chunk, whole.shape[2])[:, : place.shape[1]])


def _states(added: Tensor, first: Tensor) -> tuple[Tensor, Tensor]:
    """(N, T, F, V) what each chunk adds and (N, F, V) what was before -> (N, T, F, V) before each, and after all."""
    sums = added.cumsum(1)
    sums += first.unsqueeze(1)
    before = torch.cat([first.unsqueeze(1), sums[:, :-1]], dim=1)
    return before, sums[:, -1]


def _forward(q: Tensor, k: Tensor, v: Tensor, initial: Tensor) -> tuple[Tensor, Tensor]:
    rows, chunk = q.shape[0], chunk_length(q.shape[1])
    out, state = torch.empty_like(v, memory_format=torch.contiguous_format), initial
    for t0, t1 in _pieces(q, v):
        qs, ks, vs = (_cut(x, t0, t1, chunk) for x in (q, k, v))
        before, state = _states(torch.bmm(ks.mT, vs).unflatten(0, (rows, t1 - t0)), state)
        here = torch.bmm(torch.bmm(qs, ks.mT).tril_(), vs)
        here.baddbmm_(qs, before.flatten(0, 1))
        _put(out, here, t0, t1, chunk)
    return out, state.clone()


def _backward(
    dout: Tensor, dstate: Tensor, q: Tensor, k: Tensor, v: Tensor, initial: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    rows, chunk = q.shape[0], chunk_length(q.shape[1])
    dq, dk, dv = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))
    pieces, state = _pieces(q, v), initial
    # The states before the chunks are summed anew: keeping them would cost more memory than q, k and v themselves.
    for t0, t1 in pieces:
        ks, vs, ds = (_cut(x, t0, t1, chunk) for x in (k, v, dout))
        before, state = _states(torch.bmm(ks.mT, vs).unflatten(0, (rows, t1 - t0)), state)
        here = torch.bmm(torch.bmm(ds, vs.mT).tril_(), ks)
        here.baddbmm_(ds, before.flatten(0, 1).mT)
        _put(dq, here, t0, t1, chunk)
    for t0, t1 in reversed(pieces):
        qs, ks, vs, ds = (_cut(x, t0, t1, chunk) for x in (q, k, v, dout))
        added = torch.bmm(qs.mT, ds).unflatten(0, (rows, t1 - t0))
        behind, dstate = _states(added.flip(1), dstate)
        behind = behind.flip(1).flatten(0, 1)
        to_k = torch.bmm(torch.bmm(ds, vs.mT).tril_().mT, qs)
        _put(dk, to_k.baddbmm_(vs, behind.mT), t0, t1, chunk)
        to_v = torch.bmm(torch.bmm(qs, ks.mT).tril_().mT, ds)
        _put(dv, to_v.baddbmm_(ks, behind), t0, t1, chunk)
    return dq, dk, dv, dstate.clone()


_op = torch.library.custom_op(
    "core_attn::kernel_causal",
    _forward,
    mutates_args=(),
    schema="(Tensor q, Tensor k, Tensor v, Tensor initial) -> (Tensor, Tensor)",
)
_backward_op = torch.library.custom_op(
    "core_attn::kernel_causal_backward",
    _backward,
    mutates_args=(),
    schema="(Tensor dout, Tensor dstate, Tensor q, Tensor k, Tensor v, Tensor initial) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
)


@_op.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, initial: Tensor) -> tuple[Tensor, Tensor]:
    return v.new_empty(v.shape), initial.new_empty(initial.shape)


@_backward_op.register_fake
def _(
    dout: Tensor, dstate: Tensor, q: Tensor, k: Tensor, v: Tensor, initial: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape), initial.new_empty(initial.shape)


def _save(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs)


def _differentiate(ctx: Any, dout: Tensor, dstate: Tensor) -> tuple[Tensor, ...]:
    found: tuple[Tensor, ...] = _backward_op(dout, dstate, *ctx.saved_tensors)
    return found


def _no_second_derivative(ctx: Any, *grads: Tensor) -> None:
    raise RuntimeError(
        "causal kernel attention in chunks has no second derivative; use backend='reference' for gradients of gradients"
    )


_op.register_autograd(_differentiate, setup_context=_save)
_backward_op.register_autograd(_no_second_derivative)


def _read(q: Tensor, k: Tensor, v: Tensor, initial: Tensor | None, causal: bool) -> tuple[Tensor, Tensor]:
    if not causal:
        state = k.mT @ v
        state = state if initial is None else state + initial
        return q @ state, state
    ahead = k.shape[2] - q.shape[2]
    if ahead:
        # Keys before the first query are a state; queries before the first key read only that.
        old = k[:, :, : max(ahead, 0)].mT @ v[:, :, : max(ahead, 0)]
        initial = old if initial is None else initial + old
        k, v = (F.pad(x, (0, 0, -ahead, 0)) for x in (k, v))
    if initial is None:
        initial = q.new_zeros(*q.shape[:2], k.shape[3], v.shape[3])
    out, state = _op(q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1), initial.flatten(0, 1))
    return out.unflatten(0, q.shape[:2]), state.unflatten(0, q.shape[:2])


def run(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool,
    normalize: bool,
    eps: float,
    key_padding_mask: Tensor | None,
    initial_state: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Arguments as `core_attn.ops.kernel_attention` hands them on -> outputs and state."""
    if normalize:
        # The denominator is one more value, which is 1 for every token.
        v = F.pad(v, (0, 1), value=1.0)
    if key_padding_mask is not None:
        k = k.masked_fill(~key_padding_mask[:, None, :, None], 0.0)
    read, state = _read(q, k, v, initial_state, causal)
    if normalize:
        read = read[..., :-1] / (read[..., -1:] + eps)
    return read, state
