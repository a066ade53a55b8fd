"""Neighbourhood attention by Triton kernels of our own: lines and planes, CUDA cards, forward and backward.

The kernels (`triton_kernels`) keep nothing but the output and the log-sum-exp of each query, and the backward computes
the weights again. All gradients are summed in a fixed order, without atomics.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from core_attn import kernels
from core_attn.dispatch import Request
from core_attn.kernels import Config, launch

_OPTIONS = (
    "Tensor q, Tensor k, Tensor v, Tensor? rpb, "
    "int[] grid, int[] kernel_size, int[] dilation, int[] stride, bool[] causal, float scale"
)

# Per bytes of an element and padded head size: (queries of a tile, keys of a tile, warps, stages), the first where
# nothing is measured. All fit into the shared memory of every card from Ampere on.
_Table = dict[tuple[int, int], tuple[tuple[int, int, int, int], ...]]
_FORWARD: _Table = {
    (2, 64): ((64, 64, 4, 3), (128, 64, 8, 2)),
    (2, 128): ((64, 64, 4, 2), (128, 32, 8, 2)),
    (2, 256): ((64, 32, 8, 2),),
    (4, 64): ((64, 32, 8, 2),),
    (4, 128): ((32, 32, 8, 2),),
    (4, 256): ((32, 16, 8, 1),),
}
_QUERIES: _Table = {
    (2, 64): ((64, 64, 4, 2),),
    (2, 128): ((64, 32, 4, 2),),
    (2, 256): ((32, 32, 4, 1),),
    (4, 64): ((64, 32, 8, 2),),
    (4, 128): ((32, 16, 4, 2),),
    (4, 256): ((16, 16, 8, 1),),
}
_KEYS: _Table = {
    (2, 64): ((64, 64, 8, 2),),
    (2, 128): ((32, 64, 8, 2),),
    (2, 256): ((32, 32, 8, 1),),
    (4, 64): ((32, 32, 8, 2),),
    (4, 128): ((16, 32, 4, 2),),
    (4, 256): ((16, 16, 4, 1),),
}


def why_not(request: Request) -> str | None:
    options = request.options or {}
    if len(options.get("grid", (0,))) > 2:
        return "it takes grids of one or two axes, not three"
    if options.get("extra_k") is not None:
        return "it takes no extra keys"
    if not 1 <= request.query[-1] <= 256 or not 1 <= request.value[-1] <= 256:
        return f"it needs head sizes from 1 to 256, got {request.query[-1]} and {request.value[-1]}"
    if 0 in request.query or 0 in request.key:
        return "it takes no empty tensors"
    return kernels.why_not(request)


def pass_over(request: Request) -> str | None:
    return None if request.device == "cuda" else "the interpreter is for tests"


class _Line(NamedTuple):
    """One axis of the grid as the kernels walk it: the longest of its residues' lines."""

    length: int
    kernel_size: int
    stride: int
    causal: bool


class _Call:
    """What all kernels of one call share: the tensors, the options as of a plane, the constants."""

    def __init__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        rpb: Tensor | None,
        grid: Sequence[int],
        kernel_size: Sequence[int],
        dilation: Sequence[int],
        stride: Sequence[int],
        causal: Sequence[bool],
        scale: float,
    ) -> None:
        q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
        self.batch, self.heads, self.tokens, self.channels = q.shape
        self.groups, self.value = k.shape[1], v.shape[-1]
        axes = list(zip(grid, kernel_size, dilation, stride, causal))
        if len(axes) == 1:
            axes = [(1, 1, 1, 1, False), *axes]  # a line is a plane of one row, whose window is that row
        self.lines = tuple(_Line(-(-n // d), size, s, c) for n, size, d, s, c in axes)
        self.classes = axes[0][2] * axes[1][2]
        # A kernel takes tensors and numbers only: without a bias it gets something in its place, and never reads it.
        self.tensors = {"q": q, "k": k, "v": v, "rpb": q if rpb is None else rpb.float().contiguous()}
        self.numbers: dict[str, float] = {"heads": self.heads, "shared": self.heads // self.groups, "scale": scale}
        for name, x in (("q", q), ("k", k), ("v", v)):
            self.numbers |= {f"{name}_batch": x.stride(0), f"{name}_head": x.stride(1), f"{name}_row": x.stride(2)}
        for i, (n, size, d, s, _) in enumerate(axes):
            self.numbers |= {f"n{i}": n, f"k{i}": size, f"d{i}": d, f"s{i}": s}
        self.constants = {
            "CAUSAL0": axes[0][4],
            "CAUSAL1": axes[1][4],
            "D": self.channels,
            "DV": self.value,
            "BLOCK_D": kernels.padded(self.channels),
            "BLOCK_DV": kernels.padded(self.value),
            "UPCAST": kernels.upcast(q.dtype),
        }
        self.bias = {"BIAS": rpb is not None}

    def launch(self, kernel: Any, table: _Table, *, queries: bool, **tensors: Tensor) -> None:
        """Run a kernel whose programs own tiles of queries, or else of keys."""
        widest = max(64, self.constants["BLOCK_D"], self.constants["BLOCK_DV"])
        configs: list[Config] = []
        sizes = table[self.tensors["q"].element_size(), widest]
        if kernels.interpreted():
            sizes = ((16, 16, 4, 1),)  # so that few tokens already meet every kind of border
        for q_area, k_area, warps, stages in sizes:
            config = Config(_tiles(q_area, k_area, self.lines, queries), warps, stages)
            if config not in configs:
                configs.append(config)

        def programs(blocks: Mapping[str, int]) -> tuple[int]:
            tile = (blocks["Q0"], blocks["Q1"]) if queries else (blocks["K0"], blocks["K1"])
            tiles = math.prod(-(-line.length // t) for line, t in zip(self.lines, tile))
            return (tiles * self.classes * self.batch * (self.heads if queries else self.groups),)

        lengths = tuple(line.length.bit_length() for line in self.lines)
        key = (lengths, self.lines[0][1:], self.lines[1][1:], self.classes, (self.batch * self.heads).bit_length())
        launch(
            kernel,
            programs,
            {**self.tensors, **tensors, **self.numbers},
            {**self.constants, **self.bias},
            configs,
            key=key,
        )


@functools.lru_cache(maxsize=512)
def _tiles(queries: int, keys: int, lines: tuple[_Line, ...], own_queries: bool) -> dict[str, int]:
    """Shapes of tiles with so many queries and keys: those with the fewest products of two tiles, then the squarest."""

    def cost(shape: tuple[int, int]) -> tuple[int, int]:
        tiles = (shape[0], queries // shape[0]), (shape[1], keys // shape[1])
        own, other = tiles if own_queries else tiles[::-1]
        count = 1
        for line, t, u in zip(lines, own, other):
            reach = min(line.length, t + line.kernel_size - 1)
            count *= -(-line.length // t) * -(-reach // u)
        return count, sum(sum(tile) for tile in tiles)

    q0, k0 = min(itertools.product(_powers(queries), _powers(keys)), key=cost)
    return {"Q0": q0, "Q1": queries // q0, "K0": k0, "K1": keys // k0}


def _powers(most: int) -> list[int]:
    return [1 << i for i in range(most.bit_length())]


def _forward(q: Tensor, k: Tensor, v: Tensor, rpb: Tensor | None, *options: Any) -> tuple[Tensor, Tensor]:
    from core_attn.ops.neighborhood import triton_kernels

    call = _Call(q, k, v, rpb, *options)
    out = q.new_empty(*q.shape[:3], v.shape[-1])
    lse = q.new_empty(q.shape[:3], dtype=torch.float32)
    call.launch(triton_kernels.forward, _FORWARD, queries=True, out=out, lse=lse)
    return out, lse


def _backward(
    dout: Tensor, out: Tensor, lse: Tensor, bias_grad: bool, q: Tensor, k: Tensor, v: Tensor, rpb: Tensor | None,
    *options: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    from core_attn.ops.neighborhood import triton_kernels

    call = _Call(q, k, v, rpb, *options)
    dout = dout.contiguous()
    delta = torch.empty_like(lse)
    dq, dk, dv = (x.new_empty(x.shape) for x in (q, k, v))
    call.launch(
        triton_kernels.backward_queries, _QUERIES, queries=True, out=out, lse=lse, dout=dout, delta=delta, dq=dq
    )
    call.launch(triton_kernels.backward_keys, _KEYS, queries=False, lse=lse, dout=dout, delta=delta, dk=dk, dv=dv)
    if rpb is None or not bias_grad:
        return dq, dk, dv, q.new_empty(0)
    drpb = rpb.new_empty(call.batch, *rpb.shape, dtype=torch.float32)
    launch(
        triton_kernels.backward_bias,
        lambda blocks: (drpb.numel(),),
        {**call.tensors, "lse": lse, "dout": dout, "delta": delta, "drpb": drpb, **call.numbers},
        call.constants,
        [Config({"ROWS": 64 if max(call.channels, call.value) <= 64 else 16})],
    )
    return dq, dk, dv, drpb.sum(0).to(rpb.dtype)


_op = torch.library.custom_op(
    "core_attn::neighborhood_triton", _forward, mutates_args=(), schema=f"({_OPTIONS}) -> (Tensor, Tensor)"
)
_backward_op = torch.library.custom_op(
    "core_attn::neighborhood_triton_backward",
    _backward,
    mutates_args=(),
    schema=f"(Tensor dout, Tensor out, Tensor lse, bool bias_grad, {_OPTIONS}) -> (Tensor, Tensor, Tensor, Tensor)",
)


@_op.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, *options: Any) -> tuple[Tensor, Tensor]:
    return q.new_empty(*q.shape[:3], v.shape[-1]), q.new_empty(q.shape[:3], dtype=torch.float32)


@_backward_op.register_fake
def _(
    dout: Tensor, out: Tensor, lse: Tensor, bias_grad: bool, q: Tensor, k: Tensor, v: Tensor, rpb: Tensor | None,
    *options: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    drpb = rpb.new_empty(rpb.shape) if rpb is not None and bias_grad else q.new_empty(0)
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape), drpb


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, rpb, *ctx.options = inputs
    ctx.bias_grad = rpb is not None and ctx.needs_input_grad[3]
    ctx.save_for_backward(q, k, v, *output, rpb)
    ctx.mark_non_differentiable(output[1])


def _differentiate(ctx: Any, dout: Tensor, dlse: Tensor | None) -> tuple[Any, ...]:
    q, k, v, out, lse, rpb = ctx.saved_tensors
    dq, dk, dv, drpb = _backward_op(dout, out, lse, ctx.bias_grad, q, k, v, rpb, *ctx.options)
    return dq, dk, dv, drpb if ctx.bias_grad else None, *(None for _ in ctx.options)


def _no_second_derivative(ctx: Any, *grads: Tensor) -> None:
    raise RuntimeError(
        "neighbourhood attention in Triton has no second derivative; use backend='reference' for gradients of gradients"
    )


_op.register_autograd(_differentiate, setup_context=_save)
_backward_op.register_autograd(_no_second_derivative)


def run(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    grid: tuple[int, ...],
    kernel_size: tuple[int, ...],
    dilation: tuple[int, ...],
    stride: tuple[int, ...],
    causal_axes: tuple[bool, ...],
    rpb: Tensor | None,
    scale: float,
    **absent: Any,
) -> Tensor:
    """Arguments as `core_attn.ops.neighborhood_attention` hands them on. Memory O(L·D), the gradient's the same."""
    out: Tensor = _op(q, k, v, rpb, grid, kernel_size, dilation, stride, causal_axes, scale)[0]
    return out


def examples(dtype: torch.dtype) -> Iterator[tuple[str, Callable[[], object]]]:
    """Calls that launch every kernel, on tensors of the meta device: a plane with a bias and a dilated causal line."""
    for channels in (64, 128, 256):
        q = torch.empty(2, 4, 56 * 56, channels, dtype=dtype, device="meta")
        k = q[:, :2]
        for name, bias, options in (
            ("plane", True, ((56, 56), (7, 7), (1, 1), (1, 1), (False, False))),
            ("line", False, ((56 * 56,), (128,), (2,), (4,), (True,))),
        ):
            rpb = torch.empty(4, 13, 13, device="meta") if bias else None
            yield f"{name}{channels}", functools.partial(_both, q, k, rpb, options)


def _both(q: Tensor, k: Tensor, rpb: Tensor | None, options: tuple[Any, ...]) -> None:
    out, lse = _forward(q, k, k, rpb, *options, 1.0)
    _backward(out, out, lse, True, q, k, k, rpb, *options, 1.0)
