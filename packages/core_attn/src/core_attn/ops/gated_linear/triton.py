"""Gated linear attention by Triton kernels of our own: CUDA cards, forward and backward, packed sequences.

Time and memory go with the number of tokens. Kept for the backward are the inputs and the state before each chunk; the
weights inside chunks are made again. All gradients are summed in a fixed order, without atomics.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from core_attn import kernels
from core_attn.dispatch import Request
from core_attn.kernels import Config, launch

_OPTIONS = "Tensor q, Tensor k, Tensor v, Tensor g, Tensor? initial, Tensor? offsets, int longest, float scale"
_SUB = 16

# Per bytes of an element: (channels of keys in a tile, channels of values, warps, stages), the first where nothing is
# measured. All fit into the shared memory of every card from Ampere on.
Table = dict[int, tuple[tuple[int, int, int, int], ...]]
_STATES: Table = {2: ((32, 64, 4, 2), (64, 64, 4, 2)), 4: ((32, 32, 4, 2),)}
_OUTPUT: Table = {2: ((64, 64, 4, 2), (32, 128, 8, 2)), 4: ((32, 32, 8, 2),)}
_WEIGHTS: Table = {2: ((0, 64, 4, 2),), 4: ((0, 32, 8, 2),)}
_INSIDE: Table = {2: ((32, 0, 1, 2), (64, 0, 2, 2)), 4: ((32, 0, 2, 1),)}
_KEYS: Table = {2: ((32, 64, 4, 2), (64, 32, 8, 2)), 4: ((32, 32, 8, 1),)}


def why_not(request: Request) -> str | None:
    if not 1 <= request.query[-1] <= 256 or not 1 <= request.value[-1] <= 256:
        return f"it needs head sizes from 1 to 256, got {request.query[-1]} and {request.value[-1]}"
    if 0 in request.query:
        return "it takes no empty tensors"
    return kernels.why_not(request)


def pass_over(request: Request) -> str | None:
    return None if request.device == "cuda" else "the interpreter is for tests"


def chunk_size() -> int:
    """Tokens of a chunk."""
    return 32 if kernels.interpreted() else 64


def new_states(q: Tensor, v: Tensor, offsets: Tensor | None) -> tuple[Tensor, Tensor]:
    """Room for the states of all chunks, (chunks, H, D, Dv), and for those of all sequences, (N, H, D, Dv)."""
    sequences = v.shape[0] if offsets is None else offsets.shape[0] - 1
    if offsets is None:
        chunks = sequences * ((v.shape[2] + chunk_size() - 1) // chunk_size())
    else:
        # How many chunks are not full is not known without looking: one of each sequence at most.
        chunks = v.shape[2] // chunk_size() + sequences
    shape = v.shape[1], q.shape[3], v.shape[3]
    return v.new_empty(chunks, *shape, dtype=torch.float32), v.new_empty(sequences, *shape, dtype=torch.float32)


def leave_out_states(ctx: Any, states: Tensor) -> None:
    """The states of all chunks, which only the backward reads, have no gradient."""
    ctx.mark_non_differentiable(states)
    # Else autograd would make one of zeros, as large as they are.
    ctx.set_materialize_grads(False)


def or_zeros(
    dout: Tensor | None, dfinal: Tensor | None, v: Tensor, states: Tensor, offsets: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Gradients of outputs and final states, zeros for one that nothing was made of."""
    sequences = v.shape[0] if offsets is None else offsets.shape[0] - 1
    if dfinal is None:
        dfinal = states.new_zeros(sequences, *states.shape[1:])
    return torch.zeros_like(v) if dout is None else dout, dfinal


class Call:
    """What all kernels of one call share: tensors, numbers and constants by name.

    Args:
        inputs: q, k, v and gates by name, each of axes batch, head, token and perhaps channel.
        initial: (N, H, D, Dv) float32, N sequences, or None.
        offsets: (N + 1,) where packed sequences start and end, or None.
        longest: length of the longest sequence.
        scale: factor of the outputs.
        constants: further constexpr arguments by name.
    """

    def __init__(
        self,
        inputs: Mapping[str, Tensor],
        initial: Tensor | None,
        offsets: Tensor | None,
        longest: int,
        scale: float,
        *,
        constants: Mapping[str, bool] | None = None,
    ) -> None:
        tensors = {n: x if x.dim() == 3 or x.stride(-1) == 1 else x.contiguous() for n, x in inputs.items()}
        q, v = tensors["q"], tensors["v"]
        self.batch, self.heads, self.tokens, self.values = v.shape
        self.channels = q.shape[3]
        self.sequences = self.batch if offsets is None else len(offsets) - 1
        self.chunks = -(-longest // chunk_size())
        # A kernel takes tensors and numbers only: where there is none it gets something else, and never reads it.
        self.arguments: dict[str, Any] = {
            **tensors,
            "initial": v if initial is None else initial.contiguous(),
            "offsets": v if offsets is None else offsets.contiguous(),
            "heads": self.heads,
            "shared": self.heads // q.shape[1],
            "tokens": self.tokens,
            "rows": self.batch * self.heads * self.tokens,
            "length": longest,
            "chunks": self.chunks,
            "scale": scale,
        }
        for name, x in tensors.items():
            self.arguments |= {f"{name}_batch": x.stride(0), f"{name}_head": x.stride(1), f"{name}_row": x.stride(2)}
        self.constants = {
            "CHUNK": chunk_size(),
            "D": self.channels,
            "DV": self.values,
            "BLOCK_D": kernels.padded(self.channels),
            "INITIAL": initial is not None,
            "PACKED": offsets is not None,
            "UPCAST": kernels.upcast(q.dtype),
            **(constants or {}),
        }
        self.dtype, self.offsets = q.dtype, offsets

    def new_states(self) -> tuple[Tensor, Tensor]:
        return new_states(self.arguments["q"], self.arguments["v"], self.offsets)

    def launch(
        self, kernel: Any, table: Table, *, each: int = 1, split: str = "", per_chunk: bool = True, **tensors: Tensor
    ) -> None:
        """Run a kernel with a program for each sequence and head, `each` per chunk, and for each block of `split`."""
        sizes = ((16, 16, 4, 1),) if kernels.interpreted() else table[self.dtype.itemsize]
        names = kernel.arg_names
        configs: list[Config] = []
        for key, value, warps, stages in sizes:
            most = {
                "BLOCK_K": min(key, kernels.padded(self.channels)),
                "BLOCK_V": min(value, kernels.padded(self.values)),
            }
            config = Config({n: size for n, size in most.items() if n in names}, warps, stages)
            if config not in configs:
                configs.append(config)
        count = self.sequences * self.heads * (self.chunks * each if per_chunk else 1)

        def programs(blocks: Mapping[str, int]) -> tuple[int]:
            of_keys = -(-self.channels // blocks["BLOCK_K"]) if "k" in split else 1
            of_values = -(-self.values // blocks["BLOCK_V"]) if "v" in split else 1
            return (count * of_keys * of_values,)

        arguments = {**self.arguments, **tensors}
        launch(
            kernel,
            programs,
            {n: arguments[n] for n in names if n in arguments},
            {n: self.constants[n] for n in names if n in self.constants},
            configs,
            key=(count.bit_length(), self.chunks.bit_length()),
        )


def _call(q: Tensor, k: Tensor, v: Tensor, g: Tensor, *options: Any) -> Call:
    return Call({"q": q, "k": k, "v": v, "g": g}, *options)


def _weights(call: Call, like: Tensor) -> Tensor:
    """(B, H, T, chunk) what every token reads from those of its chunk."""
    from core_attn.ops.gated_linear import triton_kernels

    weights = like.new_empty(*like.shape[:3], chunk_size())
    # A tile has the whole width of a head: as many warps as leave it few registers a thread.
    warps = max(1, min(8, call.constants["BLOCK_D"] * like.element_size() // 64))
    table: Table = {like.element_size(): ((0, 0, warps, 1),)}
    call.launch(triton_kernels.weights_forward, table, each=chunk_size() // _SUB, weights=weights)
    return weights


def _forward(q: Tensor, k: Tensor, v: Tensor, g: Tensor, *options: Any) -> tuple[Tensor, Tensor, Tensor]:
    from core_attn.ops.gated_linear import triton_kernels

    call = _call(q, k, v, g, *options)
    states, final = call.new_states()
    call.launch(triton_kernels.states_forward, _STATES, split="kv", per_chunk=False, states=states, final=final)
    out = q.new_empty(*q.shape[:3], v.shape[-1])
    call.launch(triton_kernels.output_forward, _OUTPUT, split="v", weights=_weights(call, q), states=states, out=out)
    return out, final, states


def _backward(
    dout: Tensor, dfinal: Tensor, states: Tensor, q: Tensor, k: Tensor, v: Tensor, g: Tensor, *options: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    from core_attn.ops.gated_linear import triton_kernels

    call = _call(q, k, v, g, *options)
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
    dq, dk, dv, dg = (x.new_empty(x.shape) for x in (q, k, v, g))
    weights = _weights(call, q)
    call.launch(triton_kernels.values_backward, _OUTPUT, split="v", dout=dout, weights=weights, dstates=dstates, dv=dv)
    dweights = weights
    call.launch(triton_kernels.weights_backward, _WEIGHTS, dout=dout, dweights=dweights)
    dq_inside, dk_inside = (q.new_empty(q.shape, dtype=torch.float32) for _ in "qk")
    call.launch(
        triton_kernels.inside_backward,
        _INSIDE,
        each=chunk_size() // _SUB,
        split="k",
        dweights=dweights,
        dq_inside=dq_inside,
        dk_inside=dk_inside,
    )
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
        dq_inside=dq_inside,
        dk_inside=dk_inside,
    )
    return dq, dk, dv, dg, dinitial


_op = torch.library.custom_op(
    "core_attn::gated_linear_triton", _forward, mutates_args=(), schema=f"({_OPTIONS}) -> (Tensor, Tensor, Tensor)"
)
_backward_op = torch.library.custom_op(
    "core_attn::gated_linear_triton_backward",
    _backward,
    mutates_args=(),
    schema=f"(Tensor dout, Tensor dfinal, Tensor states, {_OPTIONS}) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
)


@_op.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, g: Tensor, *options: Any) -> tuple[Tensor, Tensor, Tensor]:
    states, final = new_states(q, v, options[1])
    return q.new_empty(*q.shape[:3], v.shape[-1]), final, states


@_backward_op.register_fake
def _(
    dout: Tensor, dfinal: Tensor, states: Tensor, q: Tensor, k: Tensor, v: Tensor, g: Tensor, *options: Any
) -> tuple[Tensor, ...]:
    return *(x.new_empty(x.shape) for x in (q, k, v, g)), torch.empty_like(dfinal)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    q, k, v, g, initial, offsets, *ctx.options = inputs
    ctx.initial = initial is not None
    ctx.save_for_backward(q, k, v, g, offsets, output[2])
    leave_out_states(ctx, output[2])


def _differentiate(ctx: Any, dout: Tensor | None, dfinal: Tensor | None, _: Tensor | None) -> tuple[Any, ...]:
    q, k, v, g, offsets, states = ctx.saved_tensors
    upstream = or_zeros(dout, dfinal, v, states, offsets)
    # The state before the first chunk is among the states.
    *found, dinitial = _backward_op(*upstream, states, q, k, v, g, None, offsets, *ctx.options)
    return *found, dinitial if ctx.initial else None, None, *(None for _ in ctx.options)


def _no_second_derivative(ctx: Any, *grads: Tensor) -> None:
    raise RuntimeError(
        "gated linear attention in Triton has no second derivative; use backend='reference' for gradients of gradients"
    )


_op.register_autograd(_differentiate, setup_context=_save)
_backward_op.register_autograd(_no_second_derivative)


def run(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    log_gate: Tensor,
    scale: float,
    initial_state: Tensor | None,
    offsets: Tensor | None = None,
    longest: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Arguments as `core_attn.ops.gated_linear_attention` hands them on -> outputs and final state.

    Packed sequences have `offsets` and the length of the `longest`.
    """
    g = log_gate.float() if log_gate.dtype is torch.float64 else log_gate
    initial = None if initial_state is None else initial_state.float()
    length = q.shape[2] if longest is None else longest
    found = _op(q, k, v, g, initial, offsets, length, scale)
    return found[0], found[1]


def examples(dtype: torch.dtype) -> Iterator[tuple[str, Callable[[], object]]]:
    """Calls that launch every kernel, on tensors of the meta device."""
    for channels, packed in ((64, True), (128, False), (256, False)):
        q = torch.empty(1, 4, 1000, channels, dtype=dtype, device="meta")
        g = torch.empty(1, 4, 1000, channels, device="meta")
        offsets = torch.empty(4, dtype=torch.int32, device="meta") if packed else None
        initial = torch.empty(3 if packed else 1, 4, channels, channels, device="meta")
        name = f"{'packed' if packed else 'plain'}{channels}"
        yield name, functools.partial(_both, q, g, (initial, offsets, 500 if packed else 1000, 0.1))
    # Triton makes constants of numbers that are 1.
    single = torch.empty(1, 1, 1, 1, dtype=dtype, device="meta")
    yield "single", functools.partial(_both, single, single, (None, None, 1, 1.0))


def _both(q: Tensor, g: Tensor, options: tuple[Any, ...]) -> None:
    out, final, states = _forward(q, q, q, g, *options)
    _backward(out, final, states, q, q, q, g, *options)
