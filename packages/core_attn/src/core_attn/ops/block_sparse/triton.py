"""Block-sparse attention by Triton kernels of our own: CUDA cards, forward and backward.

The time goes with the number of blocks that are read; kept are the output and the log-sum-exp of each query, and the
lists of blocks, four bytes a block of the mask. All gradients are summed in a fixed order, without atomics.
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

_OPTIONS = (
    "Tensor q, Tensor k, Tensor v, Tensor blocks, Tensor? padding, int rows, int columns, bool causal, float scale"
)

# Per bytes of an element and padded head size: (most queries of a tile, most keys of a tile, warps, stages), the first
# where nothing is measured. All fit into the shared memory of every card from Ampere on.
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
    size = (request.options or {}).get("block_size", (64, 64))
    if size[0] % 16 or size[1] % 16:
        return f"it needs blocks whose sides are multiples of 16, got {size[0]} and {size[1]}"
    if not 1 <= request.query[-1] <= 256 or not 1 <= request.value[-1] <= 256:
        return f"it needs head sizes from 1 to 256, got {request.query[-1]} and {request.value[-1]}"
    if 0 in request.query or 0 in request.key:
        return "it takes no empty tensors"
    return kernels.why_not(request)


def pass_over(request: Request) -> str | None:
    return None if request.device == "cuda" else "the interpreter is for tests"


class _Call:
    """What all kernels of one call share: tensors, numbers and constants by name."""

    def __init__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        blocks: Tensor,
        padding: Tensor | None,
        rows: int,
        columns: int,
        causal: bool,
        scale: float,
    ) -> None:
        q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
        self.batch, self.heads, queries, channels = q.shape
        self.groups, keys, value = k.shape[1], k.shape[2], v.shape[-1]
        self.rows, self.columns = rows, columns
        self.blocks = blocks.contiguous()
        self.row_blocks, self.column_blocks = blocks.shape[2:]
        self.order = {"rows": rows, "columns": columns, "ahead": keys - queries}
        # A kernel takes tensors and numbers only: without padding it gets something in its place, and never reads it.
        flags = self.blocks if padding is None else padding.contiguous()
        self.tensors = {"q": q, "k": k, "v": v, "padding": flags.view(torch.uint8)}
        self.numbers: dict[str, float] = {
            **self.order,
            "table_batch": blocks.shape[1] if blocks.shape[0] > 1 else 0,
            "table_head": 1 if blocks.shape[1] > 1 else 0,
            "heads": self.heads,
            "shared": self.heads // self.groups,
            "L": queries,
            "M": keys,
            "row_blocks": self.row_blocks,
            "column_blocks": self.column_blocks,
            "scale": scale,
        }
        for name, x in (("q", q), ("k", k), ("v", v)):
            self.numbers |= {f"{name}_batch": x.stride(0), f"{name}_head": x.stride(1), f"{name}_row": x.stride(2)}
        self.causal = causal
        self.constants = {
            "CAUSAL": causal,
            "PADDING": padding is not None,
            "D": channels,
            "DV": value,
            "BLOCK_D": kernels.padded(channels),
            "BLOCK_DV": kernels.padded(value),
            "UPCAST": kernels.upcast(q.dtype),
        }

    def lists(self, *, queries: bool) -> dict[str, Tensor]:
        """For each block of queries, or else of keys, the places of the blocks on the other side that it meets."""
        from core_attn.ops.block_sparse import triton_kernels

        own, other = (self.row_blocks, self.column_blocks) if queries else (self.column_blocks, self.row_blocks)
        tables = self.blocks.shape[0] * self.blocks.shape[1]
        places = self.blocks.new_empty(tables, own, other, dtype=torch.int32)
        counts = self.blocks.new_empty(tables, own, dtype=torch.int32)
        numbers = {
            "own": own,
            "other": other,
            "own_stride": other if queries else 1,
            "other_stride": 1 if queries else own,
        }
        launch(
            triton_kernels.list_blocks,
            lambda blocks: (counts.numel(),),
            {
                "blocks": self.blocks.view(torch.uint8),
                "places": places,
                "counts": counts,
                **numbers,
                **self.order,
            },
            {"CAUSAL": self.causal, "QUERIES": queries},
            [Config({"BLOCK": 16 if kernels.interpreted() else 256}, warps=1)],
        )
        return {"places": places, "counts": counts}

    def launch(self, kernel: Any, table: _Table, *, queries: bool, **tensors: Tensor) -> None:
        """Run a kernel whose programs own queries, or else keys."""
        widest = max(64, self.constants["BLOCK_D"], self.constants["BLOCK_DV"])
        sizes = table[self.tensors["q"].element_size(), widest]
        if kernels.interpreted():
            sizes = ((16, 16, 4, 1),)  # so that few tokens already meet every kind of border
        configs: list[Config] = []
        for most_m, most_n, warps, stages in sizes:
            # The largest powers of two that divide the sides of a block.
            m, n = min(most_m, self.rows & -self.rows), min(most_n, self.columns & -self.columns)
            config = Config({"BLOCK_M": m, "BLOCK_N": n}, warps, stages)
            if config not in configs:
                configs.append(config)

        def programs(blocks: Mapping[str, int]) -> tuple[int]:
            if queries:
                return (self.row_blocks * (self.rows // blocks["BLOCK_M"]) * self.batch * self.heads,)
            return (self.column_blocks * (self.columns // blocks["BLOCK_N"]) * self.batch * self.groups,)

        launch(
            kernel,
            programs,
            {**self.tensors, **tensors, **self.numbers},
            self.constants,
            configs,
            key=(self.rows, self.columns, self.row_blocks.bit_length(), (self.batch * self.heads).bit_length()),
        )


def _forward(q: Tensor, k: Tensor, v: Tensor, *options: Any) -> tuple[Tensor, Tensor]:
    from core_attn.ops.block_sparse import triton_kernels

    call = _Call(q, k, v, *options)
    out = q.new_empty(*q.shape[:3], v.shape[-1])
    lse = q.new_empty(q.shape[:3], dtype=torch.float32)
    call.launch(triton_kernels.forward, _FORWARD, queries=True, out=out, lse=lse, **call.lists(queries=True))
    return out, lse


def _backward(
    dout: Tensor, out: Tensor, lse: Tensor, q: Tensor, k: Tensor, v: Tensor, *options: Any
) -> tuple[Tensor, Tensor, Tensor]:
    from core_attn.ops.block_sparse import triton_kernels

    call = _Call(q, k, v, *options)
    delta = torch.empty_like(lse)
    dq, dk, dv = (x.new_empty(x.shape) for x in (q, k, v))
    given = {"lse": lse, "dout": dout.contiguous(), "delta": delta}
    lists = call.lists(queries=True)
    call.launch(triton_kernels.backward_queries, _QUERIES, queries=True, out=out, dq=dq, **given, **lists)
    lists = call.lists(queries=False)
    call.launch(triton_kernels.backward_keys, _KEYS, queries=False, dk=dk, dv=dv, **given, **lists)
    return dq, dk, dv


_op = torch.library.custom_op(
    "core_attn::block_sparse_triton", _forward, mutates_args=(), schema=f"({_OPTIONS}) -> (Tensor, Tensor)"
)
_backward_op = torch.library.custom_op(
    "core_attn::block_sparse_triton_backward",
    _backward,
    mutates_args=(),
    schema=f"(Tensor dout, Tensor out, Tensor lse, {_OPTIONS}) -> (Tensor, Tensor, Tensor)",
)


@_op.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, *options: Any) -> tuple[Tensor, Tensor]:
    return q.new_empty(*q.shape[:3], v.shape[-1]), q.new_empty(q.shape[:3], dtype=torch.float32)


@_backward_op.register_fake
def _(
    dout: Tensor, out: Tensor, lse: Tensor, q: Tensor, k: Tensor, v: Tensor, *options: Any
) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, blocks, padding, *ctx.options = inputs
    ctx.save_for_backward(q, k, v, *output, blocks, padding)
    ctx.mark_non_differentiable(output[1])


def _differentiate(ctx: Any, dout: Tensor, dlse: Tensor | None) -> tuple[Any, ...]:
    q, k, v, out, lse, blocks, padding = ctx.saved_tensors
    dq, dk, dv = _backward_op(dout, out, lse, q, k, v, blocks, padding, *ctx.options)
    return dq, dk, dv, None, None, *(None for _ in ctx.options)


def _no_second_derivative(ctx: Any, *grads: Tensor) -> None:
    raise RuntimeError(
        "block-sparse attention in Triton has no second derivative; use backend='reference' for gradients of gradients"
    )


_op.register_autograd(_differentiate, setup_context=_save)
_backward_op.register_autograd(_no_second_derivative)


def run(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    blocks: Tensor,
    block_size: tuple[int, int],
    causal: bool,
    key_padding_mask: Tensor | None,
    scale: float,
) -> Tensor:
    """Arguments as `core_attn.ops.block_sparse_attention` hands them on; `blocks` is 4-D."""
    out: Tensor = _op(q, k, v, blocks, key_padding_mask, *block_size, causal, scale)[0]
    return out


def examples(dtype: torch.dtype) -> Iterator[tuple[str, Callable[[], object]]]:
    """Calls that launch every kernel, on tensors of the meta device."""
    for channels in (64, 128, 256):
        for size in ((128, 128), (16, 48)):
            q = torch.empty(2, 4, 1000, channels, dtype=dtype, device="meta")
            k = torch.empty(2, 2, 1500, channels, dtype=dtype, device="meta")
            blocks = torch.empty(2, 4, -(-1000 // size[0]), -(-1500 // size[1]), dtype=torch.bool, device="meta")
            padding = torch.empty(2, 1500, dtype=torch.bool, device="meta")
            name = f"{channels}-blocks{size[0]}x{size[1]}"
            yield name, functools.partial(_both, q, k, (blocks, padding, *size, True, 1.0))


def _both(q: Tensor, k: Tensor, options: tuple[Any, ...]) -> None:
    out, lse = _forward(q, k, k, *options)
    _backward(out, out, lse, q, k, k, *options)
