"""Softmax attention by this library's own Triton kernels (`triton_kernels`), on NVIDIA GPUs from Ampere on.

Beside the plain case: windows that skip what lies outside of them, an additive bias, masks, head sizes up to 256 that
need be no power of two and may differ between keys and values, packed sequences of various lengths, float32.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from core_attn import kernels
from core_attn.dispatch import Request
from core_attn.kernels import Config

_OPTIONS = (
    "Tensor q, Tensor k, Tensor v, Tensor? bias, Tensor? keep, Tensor? offsets_q, Tensor? offsets_k, "
    "int max_q, int max_k, int? left, int? right, float scale"
)
LARGEST_HEAD = 256


def why_not(request: Request) -> str | None:
    reason = kernels.why_not(request)
    if reason is not None:
        return reason
    largest = max(request.query[-1], request.value[-1])
    if largest > LARGEST_HEAD:
        return f"its largest head size is {LARGEST_HEAD}, these have {largest}"
    if 0 in request.query or 0 in request.key or 0 in request.value:
        return "it takes no empty tensors"
    if request.dropout:
        return "it has no dropout"
    if request.bias_requires_grad:
        return "it has no gradient of the bias"
    return None


def pass_over(request: Request) -> str | None:
    """What SDPA's own kernels on the GPU take as it is, they do faster; the rest costs them a mask of L x M."""
    if request.device != "cuda":
        return "the interpreter is for tests"
    aligned = not request.causal or request.query[2] == request.key[2] or request.query[2] == 1
    if request.window is None and not request.bias and not request.key_padding and not request.mask and aligned:
        return "SDPA's own kernels are faster where nothing but equal lengths and causality is asked for"
    return None


def run(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool,
    mask: Tensor | None,
    bias: Tensor | None,
    key_padding_mask: Tensor | None,
    window: tuple[int | None, int | None] | None,
    scale: float,
    dropout: float,
) -> Tensor:
    """softmax(q kᵀ · scale + bias) v, arguments as `core_attn.ops.softmax_attention` hands them on."""
    left, right = window or (None, None)
    keep = mask
    if key_padding_mask is not None:
        padding = key_padding_mask[:, None, None, :]
        keep = padding if keep is None else keep & padding
    out: Tensor = _op(
        q, k, v, bias, keep, None, None, q.shape[2], k.shape[2], left, 0 if causal else right, float(scale)
    )[0]
    return out


def run_varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    offsets_q: Tensor,
    offsets_k: Tensor,
    longest: tuple[int, int],
    causal: bool,
    window: tuple[int | None, int | None] | None,
    scale: float,
) -> Tensor:
    """The same over packed sequences, arguments as `core_attn.ops.softmax_attention_varlen` hands them on."""
    left, right = window or (None, None)
    q, k, v = (x.transpose(0, 1).unsqueeze(0) for x in (q, k, v))
    out: Tensor = _op(q, k, v, None, None, offsets_q, offsets_k, *longest, left, 0 if causal else right, float(scale))[
        0
    ]
    return out.squeeze(0).transpose(0, 1)


def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    keep: Tensor | None,
    offsets_q: Tensor | None,
    offsets_k: Tensor | None,
    max_q: int,
    max_k: int,
    left: int | None,
    right: int | None,
    scale: float,
) -> tuple[Tensor, Tensor]:
    from core_attn.ops.softmax import triton_kernels

    out = _like(q, v.shape[-1])
    lse = q.new_empty(q.shape[:3], dtype=torch.float32)
    q, k, v = (_rows(x) for x in (q, k, v))
    call = _Call(q, k, v, bias, keep, offsets_q, offsets_k, max_q, max_k, left, right, scale)
    kernels.launch(
        triton_kernels.softmax_forward,
        call.grid_of_queries,
        {**call.arguments, "out": out, "lse": lse, **_strides(out=out, lse=lse)},
        call.constants,
        call.configs("forward"),
        key=call.key,
    )
    return out, lse


def _backward(
    dout: Tensor, out: Tensor, lse: Tensor, q: Tensor, k: Tensor, v: Tensor, *options: Any
) -> tuple[Tensor, Tensor, Tensor]:
    from core_attn.ops.softmax import triton_kernels

    dq, dk, dv = (_like(x, x.shape[-1]) for x in (q, k, v))
    q, k, v, dout, out = (_rows(x) for x in (q, k, v, dout, out))
    delta = torch.empty_like(lse)
    call = _Call(q, k, v, *options)
    shared = {**call.arguments, "lse": lse, "dout": dout, "delta": delta, **_strides(dout=dout, lse=lse)}
    kernels.launch(
        triton_kernels.softmax_backward_queries,
        call.grid_of_queries,
        {**shared, "out": out, "dq": dq, **_strides(out=out, dq=dq)},
        call.constants,
        call.configs("queries"),
        key=call.key,
    )
    kernels.launch(
        triton_kernels.softmax_backward_keys,
        call.grid_of_keys,
        {**shared, "dk": dk, "dv": dv, **_strides(dk=dk, dv=dv)},
        call.constants,
        call.configs("keys"),
        key=call.key,
    )
    return dq, dk, dv


class _Call:
    """What the three kernels of one call share."""

    def __init__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        bias: Tensor | None,
        keep: Tensor | None,
        offsets_q: Tensor | None,
        offsets_k: Tensor | None,
        max_q: int,
        max_k: int,
        left: int | None,
        right: int | None,
        scale: float,
    ) -> None:
        self.batch, self.heads = q.shape[0] if offsets_q is None else offsets_q.shape[0] - 1, q.shape[1]
        self.key_heads = k.shape[1]
        self.queries, self.keys = max_q, max_k
        self.device, self.dtype = q.device, q.dtype
        widths = q.shape[-1], v.shape[-1]
        self.widest = max(widths)
        whole = (*q.shape[:3], k.shape[2])
        flags = 0
        if keep is not None:
            flags = 1 if keep.shape[2] == 1 else 2
            keep = keep.expand(whole).view(torch.uint8)
        bias = None if bias is None else bias.expand(whole)
        # Whatever is absent is read by nobody: any tensor stands for it.
        self.arguments: dict[str, Any] = {
            "q": q,
            "k": k,
            "v": v,
            "bias": q if bias is None else bias,
            "keep": q if keep is None else keep,
            "offsets_q": q if offsets_q is None else offsets_q,
            "offsets_k": q if offsets_k is None else offsets_k,
            "queries": max_q,
            "keys": max_k,
            "heads": self.heads,
            "group": self.heads // self.key_heads,
            "scale": scale,
            # A side wider than everything there is would only overflow.
            "left": min(left or 0, max_q + max_k),
            "right": min(right or 0, max_q + max_k),
            **_strides(q=q, k=k, v=v),
            **dict(zip(("bias_b", "bias_h", "bias_l", "bias_m"), (0,) * 4 if bias is None else bias.stride())),
            **dict(zip(("keep_b", "keep_h", "keep_l", "keep_m"), (0,) * 4 if keep is None else keep.stride())),
        }
        self.constants: dict[str, Any] = {
            "D": widths[0],
            "DV": widths[1],
            "HAS_BIAS": bias is not None,
            "KEEP": flags,
            "HAS_LEFT": left is not None,
            "HAS_RIGHT": right is not None,
            "VARLEN": offsets_q is not None,
            "UPCAST": kernels.upcast(q.dtype),
            "PRECISION": "ieee" if q.dtype is torch.float32 else "tf32",
            "BLOCK_D": _padded(widths[0]),
            "BLOCK_DV": _padded(widths[1]),
        }
        window = 0 if left is None or right is None else left + right + 1
        # Lengths to a power of two: one measurement serves all that are alike.
        self.key = (max_q.bit_length(), max_k.bit_length(), window.bit_length(), self.heads, self.key_heads)

    def grid_of_queries(self, blocks: Mapping[str, int]) -> tuple[int, ...]:
        return (-(-self.queries // blocks["BLOCK_M"]) * self.heads * self.batch,)

    def grid_of_keys(self, blocks: Mapping[str, int]) -> tuple[int, ...]:
        return (-(-self.keys // blocks["BLOCK_N"]) * self.key_heads * self.batch,)

    def configs(self, kernel: str) -> tuple[Config, ...]:
        if kernels.interpreted():
            return (Config({"BLOCK_M": 16, "BLOCK_N": 16}),)
        return configs(kernel, self.dtype, self.widest, kernels.capability(self.device))


def configs(kernel: str, dtype: torch.dtype, widest: int, capability: int) -> tuple[Config, ...]:
    """The block sizes to choose from, the safest guess first. All fit into the card's shared memory.

    Args:
        kernel: "forward", "queries" or "keys", the two of the backward.
        dtype: dtype of the tensors.
        widest: the larger of the head sizes of keys and values.
        capability: 80, 89 or 90, as `core_attn.kernels.capability` tells.
    """
    size = 64 if widest <= 64 else 128 if widest <= 128 else 256
    table = _FULL[kernel, size] if dtype is torch.float32 else _HALF[kernel, size][capability]
    return tuple(Config({"BLOCK_M": m, "BLOCK_N": n}, warps, stages) for m, n, warps, stages in table)


# (BLOCK_M, BLOCK_N, warps, stages). Chosen among what compiles for each card with few or no spilled registers.
_Table = tuple[tuple[int, int, int, int], ...]
_HALF: dict[tuple[str, int], dict[int, _Table]] = {
    ("forward", 64): {
        80: ((128, 64, 4, 3), (64, 64, 4, 3)),
        89: ((128, 64, 4, 2), (64, 64, 4, 2)),
        90: ((128, 64, 4, 3), (128, 128, 8, 2)),
    },
    ("forward", 128): {
        80: ((128, 64, 8, 3), (64, 64, 4, 2)),
        89: ((64, 32, 4, 2), (128, 32, 8, 2)),
        90: ((128, 64, 8, 3), (128, 128, 8, 2)),
    },
    ("forward", 256): {
        80: ((64, 32, 8, 2), (64, 64, 8, 1)),
        89: ((64, 16, 4, 2), (32, 32, 4, 1)),
        90: ((64, 64, 8, 2), (128, 64, 8, 2)),
    },
    ("queries", 64): {
        80: ((64, 64, 4, 3), (128, 64, 8, 2)),
        89: ((64, 64, 4, 2), (64, 32, 4, 2)),
        90: ((128, 64, 8, 2), (64, 64, 4, 3)),
    },
    ("queries", 128): {
        80: ((64, 64, 4, 2), (128, 64, 8, 2)),
        89: ((64, 32, 4, 2), (32, 32, 4, 2)),
        90: ((128, 64, 8, 2), (64, 64, 4, 2)),
    },
    ("queries", 256): {
        80: ((64, 32, 8, 1), (32, 32, 4, 1)),
        89: ((32, 16, 4, 1),),
        90: ((128, 32, 8, 1), (64, 64, 8, 2)),
    },
    ("keys", 64): {
        80: ((64, 64, 4, 2), (32, 128, 4, 2)),
        89: ((32, 64, 4, 2), (64, 64, 4, 1)),
        90: ((64, 128, 8, 2), (64, 64, 4, 2)),
    },
    ("keys", 128): {
        80: ((32, 64, 8, 2), (64, 64, 8, 2)),
        89: ((32, 64, 4, 1), (16, 64, 4, 2)),
        90: ((32, 128, 8, 2), (64, 64, 8, 2)),
    },
    ("keys", 256): {
        80: ((16, 64, 8, 1), (32, 32, 4, 1)),
        89: ((16, 32, 4, 1),),
        90: ((32, 32, 8, 2), (16, 64, 8, 2)),
    },
}
# Products in full float32 take no tensor cores: bound by arithmetic and registers, so one table serves every card.
_FULL: dict[tuple[str, int], _Table] = {
    ("forward", 64): ((64, 32, 8, 1), (32, 32, 4, 1)),
    ("forward", 128): ((32, 32, 8, 1), (16, 32, 4, 1)),
    ("forward", 256): ((16, 32, 8, 1),),
    ("queries", 64): ((32, 32, 8, 1),),
    ("queries", 128): ((32, 16, 8, 1), (32, 32, 8, 1)),
    ("queries", 256): ((16, 16, 4, 1),),
    ("keys", 64): ((32, 32, 8, 1), (32, 32, 4, 1)),
    ("keys", 128): ((32, 32, 8, 1), (16, 32, 4, 1)),
    ("keys", 256): ((16, 16, 4, 1),),
}


def _padded(width: int) -> int:
    """Tiles are powers of two, and those of `tl.dot` at least 16 wide."""
    return max(16, 1 << (width - 1).bit_length())


def _rows(x: Tensor) -> Tensor:
    """Kernels take rows whose channels lie side by side."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _like(x: Tensor, channels: int) -> Tensor:
    """Room for (B, H, L, channels), with heads inside of positions where x (B, H, L, D) has them so."""
    batch, heads, length, _ = x.shape
    if x.stride(1) < x.stride(2):
        return x.new_empty(batch, length, heads, channels).transpose(1, 2)
    return x.new_empty(batch, heads, length, channels)


def _strides(**tensors: Tensor) -> dict[str, int]:
    """q_b, q_h, q_l for `q=` (B, H, L, …); two for what has no channels."""
    return {
        f"{name}_{axis}": stride
        for name, x in tensors.items()
        for axis, stride in zip("bhl" if x.dim() == 4 else "bh", x.stride())
    }


_op = torch.library.custom_op(
    "core_attn::softmax_triton", _forward, mutates_args=(), schema=f"({_OPTIONS}) -> (Tensor, Tensor)"
)
_backward_op = torch.library.custom_op(
    "core_attn::softmax_triton_backward",
    _backward,
    mutates_args=(),
    schema=f"(Tensor dout, Tensor out, Tensor lse, {_OPTIONS}) -> (Tensor, Tensor, Tensor)",
)


@_op.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, *options: Any) -> tuple[Tensor, Tensor]:
    return _like(q, v.shape[-1]), q.new_empty(q.shape[:3], dtype=torch.float32)


@_backward_op.register_fake
def _(
    dout: Tensor, out: Tensor, lse: Tensor, q: Tensor, k: Tensor, v: Tensor, *options: Any
) -> tuple[Tensor, Tensor, Tensor]:
    dq, dk, dv = (_like(x, x.shape[-1]) for x in (q, k, v))
    return dq, dk, dv


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, bias, keep, offsets_q, offsets_k, *ctx.numbers = inputs
    ctx.save_for_backward(q, k, v, bias, keep, offsets_q, offsets_k, *output)
    ctx.mark_non_differentiable(output[1])


def _differentiate(ctx: Any, dout: Tensor, dlse: Tensor | None) -> tuple[Any, ...]:
    *tensors, out, lse = ctx.saved_tensors
    return *_backward_op(dout, out, lse, *tensors, *ctx.numbers), *[None] * (4 + len(ctx.numbers))


def _no_second_derivative(ctx: Any, *grads: Tensor) -> None:
    raise RuntimeError(
        "softmax attention in Triton has no second derivative; use backend='reference' for gradients of gradients"
    )


_op.register_autograd(_differentiate, setup_context=_save)
_backward_op.register_autograd(_no_second_derivative)


def examples(dtype: torch.dtype) -> Iterator[tuple[str, Callable[[], object]]]:
    """Calls that launch every kernel in every way that changes its shared memory, for `core_attn.testing.kernels`."""

    def both(
        channels: int, values: int, left: int | None, right: int | None, flags: str = "", *, packed: bool = False
    ) -> None:
        heads, length, batch = 4, 2048, 1 if packed else 2
        q = torch.empty(batch, heads, length, channels, dtype=dtype, device="meta")
        k = torch.empty(batch, heads // 2, length, channels, dtype=dtype, device="meta")
        v = torch.empty(batch, heads // 2, length, values, dtype=dtype, device="meta")
        bias = torch.empty(1, heads, length, length, dtype=dtype, device="meta") if "bias" in flags else None
        keep = torch.empty(batch, 1, 1, length, dtype=torch.bool, device="meta") if "padding" in flags else None
        offsets = torch.empty(5, dtype=torch.int32, device="meta") if packed else None
        options = (bias, keep, offsets, offsets, length, length, left, right, 0.125)
        out, lse = _forward(q, k, v, *options)
        _backward(torch.empty_like(out), out, lse, q, k, v, *options)

    yield "plain64", lambda: both(64, 64, None, 0)
    yield "window128", lambda: both(128, 128, 255, 0)
    yield "bias256", lambda: both(256, 256, None, None, "bias padding")
    yield "packed80", lambda: both(80, 64, None, 0, packed=True)
