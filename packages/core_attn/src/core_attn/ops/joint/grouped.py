"""Joint attention group by group: products of matrices only, any device, forward and explicit backward.

Both parts are summed where the output lies: the linear part writes it, and a group's quadratic part is added by the
product itself. What backward needs of the quadratic part, its L × P scores, is kept; it is little beside the values.

Shapes: N = B·H sequences, L tokens, P tokens of a group, D, D' and Dv channels.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor


class _Span(NamedTuple):
    """Whole groups of one length that lie one after the other: of sequence `n`, or of all where it is None."""

    n: int | None
    start: int
    stop: int
    size: int

    def cut(self, x: Tensor) -> Tensor:
        """(N, L, C) -> (groups, size, C), a view."""
        if self.n is None:
            return x.view(-1, self.size, x.shape[-1])
        return x[self.n, self.start : self.stop].unflatten(0, (-1, self.size))

    def square(self, x: Tensor) -> Tensor:
        """(N, L, P) -> (groups, size, size), a view."""
        if self.n is None:
            return x.view(-1, self.size, x.shape[-1])
        return x[self.n, self.start : self.stop, : self.size].unflatten(0, (-1, self.size))


def _spans(n: int, length: int, group: int, *, together: bool) -> Iterator[_Span]:
    whole = length - length % group
    if together and whole == length:
        yield _Span(None, 0, length, group)
        return
    for i in range(n):
        if whole:
            yield _Span(i, 0, whole, group)
        if whole < length:
            yield _Span(i, whole, length, length - whole)


def _states(lin_k: Tensor, v: Tensor, group: int) -> Tensor:
    """(N, G, D', Dv) sums of lin_k vᵀ / P over the groups before each."""
    n, length = v.shape[:2]
    count = -(-length // group)
    states = v.new_zeros(n, count, lin_k.shape[-1], v.shape[-1])
    for g in range(count - 1):
        at = slice(g * group, (g + 1) * group)
        torch.baddbmm(states[:, g], lin_k[:, at].mT, v[:, at], alpha=1 / group, out=states[:, g + 1])
    return states


def _flat(x: Tensor) -> Tensor:
    """(B, H, L, C) -> (N, L, C) with the channels next to each other."""
    x = x.flatten(0, 1)
    return x if x.stride(-1) == 1 else x.contiguous()


def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lin_q: Tensor,
    lin_k: Tensor,
    share: Tensor | None,
    keep: Tensor | None,
    group: int,
) -> tuple[Tensor, Tensor]:
    """Output (N, L, Dv), and relu(q kᵀ / P) (N, L, P), of which the last group fills the columns it has."""
    n, length = v.shape[:2]
    with torch.autocast(q.device.type, enabled=False):
        out = v.new_empty(v.shape)
        scores = q.new_zeros(n, length, min(group, length))
        if share is None:
            states = _states(lin_k, v, group)
            for g in range(states.shape[1]):
                at = slice(g * group, (g + 1) * group)
                torch.bmm(lin_q[:, at], states[:, g], out=out[:, at])
        else:
            # Divided before it is read: sums over many tokens must fit into 16 bits.
            torch.bmm(lin_q, torch.bmm(lin_k.mT * share[:, None, None].to(v.dtype), v), out=out)
        for span in _spans(n, length, scores.shape[-1], together=_whole(q, k, v)) if scores.numel() else ():
            weights = span.square(scores)
            torch.baddbmm(weights, span.cut(q), span.cut(k).mT, beta=0, alpha=1 / group, out=weights)
            weights.relu_()
            if share is None:
                weights.tril_()
            weights = weights.square()
            if keep is not None:
                weights *= span.square(keep)
            to = span.cut(out)
            torch.baddbmm(to, weights, span.cut(v), out=to)
        return out, scores


def _whole(*tensors: Tensor) -> bool:
    """Whether groups of all sequences can be one batch without a copy."""
    return all(x.shape[0] == 1 or x.stride(0) == x.shape[1] * x.stride(1) for x in tensors)


def _backward(
    dout: Tensor,
    scores: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lin_q: Tensor,
    lin_k: Tensor,
    share: Tensor | None,
    keep: Tensor | None,
    group: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    n, length = v.shape[:2]
    with torch.autocast(q.device.type, enabled=False):
        dout = dout if dout.stride(-1) == 1 else dout.contiguous()
        dq, dk, dv, dlin_q, dlin_k = (x.new_empty(x.shape) for x in (q, k, v, lin_q, lin_k))
        if share is None:
            states, later = _states(lin_k, v, group), v.new_zeros(n, lin_k.shape[-1], v.shape[-1])
            for g in reversed(range(states.shape[1])):
                at = slice(g * group, (g + 1) * group)
                torch.bmm(dout[:, at], states[:, g].mT, out=dlin_q[:, at])
                torch.bmm(v[:, at], later.mT, out=dlin_k[:, at])
                torch.bmm(lin_k[:, at], later, out=dv[:, at])
                torch.baddbmm(later, lin_q[:, at].mT, dout[:, at], alpha=1 / group, out=later)
        else:
            factor = share[:, None, None].to(v.dtype)
            torch.bmm(dout, torch.bmm(lin_k.mT * factor, v).mT, out=dlin_q)
            dstate = torch.bmm(lin_q.mT * factor, dout)
            torch.bmm(v, dstate.mT, out=dlin_k)
            torch.bmm(lin_k, dstate, out=dv)
        for span in _spans(n, length, scores.shape[-1], together=_whole(q, k, v, dout)) if scores.numel() else ():
            kept, there, values = span.square(scores), span.cut(dout), span.cut(v)
            weights = kept.square()
            dweights = torch.bmm(there, values.mT)
            if keep is not None:
                weights *= span.square(keep)
                dweights *= span.square(keep)
            to = span.cut(dv)
            torch.baddbmm(to, weights.mT, there, out=to)
            # d relu(s)² = 2 relu(s) ds: what relu or the mask closed is zero here too.
            dweights *= kept
            for found, one, other in ((dq, dweights, k), (dk, dweights.mT, q)):
                to = span.cut(found)
                torch.baddbmm(to, one, span.cut(other), beta=0, alpha=2 / group, out=to)
        return dq, dk, dv, dlin_q, dlin_k


_INPUTS = "Tensor q, Tensor k, Tensor v, Tensor lin_q, Tensor lin_k, Tensor? share, Tensor? keep, int group"
_op = torch.library.custom_op(
    "core_attn::joint_grouped", _forward, mutates_args=(), schema=f"({_INPUTS}) -> (Tensor, Tensor)"
)
_backward_op = torch.library.custom_op(
    "core_attn::joint_grouped_backward",
    _backward,
    mutates_args=(),
    schema=f"(Tensor dout, Tensor scores, {_INPUTS}) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
)


@_op.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, lin_q: Tensor, lin_k: Tensor, *options: Any) -> tuple[Tensor, Tensor]:
    length, group = v.shape[1], options[-1]
    return v.new_empty(v.shape), q.new_empty(v.shape[0], length, min(group, length))


@_backward_op.register_fake
def _(dout: Tensor, scores: Tensor, *inputs: Any) -> tuple[Tensor, ...]:
    return tuple(x.new_empty(x.shape) for x in inputs[:5])


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.group = inputs
    ctx.save_for_backward(output[1], *tensors)
    ctx.mark_non_differentiable(output[1])


def _differentiate(ctx: Any, dout: Tensor, dscores: Tensor | None) -> tuple[Any, ...]:
    return (*_backward_op(dout, *ctx.saved_tensors, ctx.group), None, None, None)


def _no_second_derivative(ctx: Any, *grads: Tensor) -> None:
    raise RuntimeError(
        "grouped joint attention has no second derivative; use backend='reference' for gradients of gradients"
    )


_op.register_autograd(_differentiate, setup_context=_save)
_backward_op.register_autograd(_no_second_derivative)


def run(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    lin_q: Tensor,
    lin_k: Tensor,
    share: Tensor | None,
    keep: Tensor | None,
    group: int,
    causal: bool,
) -> Tensor:
    """Arguments as `core_attn.ops.joint_attention` gives them, padding set to zero; `share` is None where causal."""
    if share is not None:
        share = share.repeat_interleave(q.shape[1])
    flat = [_flat(x) for x in (q, k, v, lin_q, lin_k)]
    out: Tensor = _op(*flat, share, None if keep is None else keep.flatten(0, 1), group)[0]
    return out.unflatten(0, v.shape[:2])
