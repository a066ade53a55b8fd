"""Linear attention with scalar decay by Triton kernels of our own: CUDA cards, forward and backward, packed sequences.

Time and memory go with the number of tokens. Kept for the backward are the inputs and the state before each chunk; the
weights inside chunks are made again. All gradients are summed in a fixed order, without atomics.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from core_attn import kernels
from core_attn.ops.gated_linear.triton import (
    Call,
    Table,
    leave_out_states,
    new_states,
    or_zeros,
    pass_over,
    why_not,
)

__all__ = ["examples", "pass_over", "run", "why_not"]

_OPTIONS = "Tensor q, Tensor k, Tensor v, Tensor g, Tensor? initial, Tensor? offsets, int longest, float scale"

# As in `core_attn.ops.gated_linear.triton`.
_STATES: Table = {2: ((32, 64, 4, 2), (64, 64, 4, 2)), 4: ((32, 32, 4, 2),)}
_OUTPUT: Table = {2: ((64, 64, 4, 2), (32, 128, 8, 2)), 4: ((32, 32, 8, 2),)}
# All of one number of channels of keys, since the gradient of the decays has a part for each block of them.
_KEYS: Table = {2: ((32, 64, 4, 2), (32, 64, 8, 2), (32, 32, 4, 2)), 4: ((32, 32, 8, 1),)}


def _call(q: Tensor, k: Tensor, v: Tensor, g: Tensor, *options: Any, **constants: bool) -> Call:
    fixed = g.dim() == 1
    decay = g[None, :, None].expand(v.shape[:3]) if fixed else g
    return Call({"q": q, "k": k, "v": v, "g": decay}, *options, constants={"FIXED": fixed, **constants})


def _forward(q: Tensor, k: Tensor, v: Tensor, g: Tensor, *options: Any) -> tuple[Tensor, Tensor, Tensor]:
    from core_attn.ops.scalar_decay import triton_kernels

    call = _call(q, k, v, g, *options)
    states, final = call.new_states()
    call.launch(triton_kernels.states_forward, _STATES, split="kv", per_chunk=False, states=states, final=final)
    out = v.new_empty(v.shape)
    call.launch(triton_kernels.output_forward, _OUTPUT, split="v", states=states, out=out)
    return out, final, states


def _backward(
    dout: Tensor,
    dfinal: Tensor,
    states: Tensor,
    of_decay: bool,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    *options: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    from core_attn.ops.scalar_decay import triton_kernels

    call = _call(q, k, v, g, *options, OF_DECAY=of_decay)
    dout = dout.contiguous()
    dstates, dinitial = call.new_states()
    call.launch(
        triton_kernels.states_backward,
        _STATES,
        split="kv",
        per_chunk=False,
        dout=dout,
        dfinal=dfinal.contiguous(),
        dstates=dstates,
        dinitial=dinitial,
    )
    dv = v.new_empty(v.shape)
    call.launch(triton_kernels.values_backward, _OUTPUT, split="v", dout=dout, dstates=dstates, dv=dv)
    shared = v.shape[1] // q.shape[1]
    # Heads that share queries and keys each have their part of the gradient.
    dq, dk = (q.new_empty(*v.shape[:3], q.shape[3], dtype=torch.float32 if shared > 1 else q.dtype) for _ in "qk")
    block = 16 if kernels.interpreted() else _KEYS[q.dtype.itemsize][0][0]
    dg = q.new_empty(-(-q.shape[3] // block) if of_decay else 0, *v.shape[:3], dtype=torch.float32)
    call.launch(
        triton_kernels.keys_backward,
        _KEYS,
        split="k",
        dout=dout,
        states=states,
        dstates=dstates,
        dq=dq,
        dk=dk,
        dg=dg,
    )
    if shared > 1:
        dq, dk = (x.unflatten(1, (-1, shared)).sum(2).to(q.dtype) for x in (dq, dk))
    of_gates = dg.sum((0, 1, 3) if g.dim() == 1 else 0).to(g.dtype) if of_decay else g.new_empty(0)
    return dq, dk, dv, of_gates, dinitial


_op = torch.library.custom_op(
    "core_attn::scalar_decay_triton", _forward, mutates_args=(), schema=f"({_OPTIONS}) -> (Tensor, Tensor, Tensor)"
)
_backward_op = torch.library.custom_op(
    "core_attn::scalar_decay_triton_backward",
    _backward,
    mutates_args=(),
    schema=f"(Tensor dout, Tensor dfinal, Tensor states, bool of_decay, {_OPTIONS}) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor)",
)


@_op.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, g: Tensor, *options: Any) -> tuple[Tensor, Tensor, Tensor]:
    states, final = new_states(q, v, options[1])
    return v.new_empty(v.shape), final, states


@_backward_op.register_fake
def _(
    dout: Tensor,
    dfinal: Tensor,
    states: Tensor,
    of_decay: bool,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    *options: Any,
) -> tuple[Tensor, ...]:
    dg = g.new_empty(g.shape if of_decay else (0,))
    return *(x.new_empty(x.shape) for x in (q, k, v)), dg, dfinal.new_empty(dfinal.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    q, k, v, g, initial, offsets, *ctx.options = inputs
    ctx.initial = initial is not None
    ctx.save_for_backward(q, k, v, g, offsets, output[2])
    leave_out_states(ctx, output[2])


def _differentiate(ctx: Any, dout: Tensor | None, dfinal: Tensor | None, _: Tensor | None) -> tuple[Any, ...]:
    q, k, v, g, offsets, states = ctx.saved_tensors
    upstream = or_zeros(dout, dfinal, v, states, offsets)
    of_decay = ctx.needs_input_grad[3]
    # The state before the first chunk is among the states.
    dq, dk, dv, dg, dinitial = _backward_op(*upstream, states, of_decay, q, k, v, g, None, offsets, *ctx.options)
    return (
        *(dq, dk, dv, dg if of_decay else None, dinitial if ctx.initial else None, None),
        *(None for _ in ctx.options),
    )


def _no_second_derivative(ctx: Any, *grads: Tensor) -> None:
    raise RuntimeError(
        "attention with scalar decay in Triton has no second derivative; use backend='reference' for gradients of "
        "gradients"
    )


_op.register_autograd(_differentiate, setup_context=_save)
_backward_op.register_autograd(_no_second_derivative)


def run(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    log_decay: Tensor,
    scale: float,
    initial_state: Tensor | None,
    offsets: Tensor | None = None,
    longest: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Arguments as `core_attn.ops.scalar_decay_attention` hands them on -> outputs and final state.

    Packed sequences have `offsets` and the length of the `longest`.
    """
    g = log_decay.float() if log_decay.dtype is torch.float64 else log_decay
    initial = None if initial_state is None else initial_state.float()
    length = q.shape[2] if longest is None else longest
    found = _op(q, k, v, g, initial, offsets, length, scale)
    return found[0], found[1]


def examples(dtype: torch.dtype) -> Iterator[tuple[str, Callable[[], object]]]:
    """Calls that launch every kernel, on tensors of the meta device."""
    for channels, packed in ((64, True), (128, False), (256, False)):
        q = torch.empty(1, 2, 1000, channels, dtype=dtype, device="meta")
        v = torch.empty(1, 4, 1000, channels, dtype=dtype, device="meta")
        g = torch.empty(1, 4, 1000, device="meta") if packed else torch.empty(4, device="meta")
        offsets = torch.empty(4, dtype=torch.int32, device="meta") if packed else None
        initial = torch.empty(3, 4, channels, channels, device="meta") if packed else None
        name = f"{'packed' if packed else 'fixed'}{channels}"
        yield name, functools.partial(_both, q, v, g, (initial, offsets, 500 if packed else 1000, 0.1))
    # Triton makes constants of numbers that are 1.
    single = torch.empty(1, 1, 1, 1, dtype=dtype, device="meta")
    yield "single", functools.partial(_both, single, single, single[..., 0], (None, None, 1, 1.0))


def _both(q: Tensor, v: Tensor, g: Tensor, options: tuple[Any, ...]) -> None:
    out, final, states = _forward(q, q, v, g, *options)
    _backward(out, final, states, True, q, q, v, g, *options)
