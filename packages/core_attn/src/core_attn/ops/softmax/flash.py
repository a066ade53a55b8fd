"""Softmax attention by the package flash-attn ("FlashAttention-2", 2023): NVIDIA GPUs, half precision.

Its tensors are (B, L, H, D); causality and windows align lower right since its version 2.1, as ours do.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from core_attn.dispatch import Request


@functools.cache
def _load() -> Callable[..., Tensor] | str:
    """The function, or why there is none."""
    try:
        package = importlib.import_module("flash_attn")
        function: Callable[..., Tensor] = package.flash_attn_func
    except (ImportError, OSError, RuntimeError, AttributeError) as error:
        # A build for another CUDA or torch fails while its library loads, with one of these.
        return f"the package flash-attn cannot be imported ({error})"
    major, minor = (int(part) for part in package.__version__.split(".")[:2])
    if (major, minor) < (2, 3):
        return f"it needs flash-attn 2.3 or newer, for windows; {package.__version__} is installed"
    return function


def why_not(request: Request) -> str | None:
    if request.device != "cuda":
        return f"it needs an NVIDIA GPU, these tensors are on {request.device}"
    if request.dtype not in (torch.float16, torch.bfloat16):
        return f"it needs float16 or bfloat16, not {str(request.dtype).removeprefix('torch.')}"
    if request.mask or request.bias or request.key_padding:
        given = [n for n in ("mask", "bias", "key_padding") if getattr(request, n)]
        return f"it takes no {' and no '.join(given)}"
    if request.value[-1] != request.query[-1] or request.query[-1] > 256 or request.query[-1] % 8:
        return (
            f"it needs q and v of the same head size, a multiple of 8 up to 256; got {request.query[-1]} and "
            f"{request.value[-1]}"
        )
    if 0 in request.query or 0 in request.key:
        return "it takes no empty tensors"
    function = _load()
    return function if isinstance(function, str) else None


def pass_over(request: Request) -> str | None:
    return "it breaks torch.compile's graph" if request.compiling else None


def run(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool,
    window: tuple[int | None, int | None] | None,
    scale: float,
    dropout: float,
    **absent: Any,
) -> Tensor:
    """softmax(q kᵀ · scale) v, arguments as `core_attn.ops.softmax_attention` hands them on."""
    function = _load()
    assert not isinstance(function, str), function
    left, right = (-1 if side is None else side for side in window or (None, None))
    out = function(
        *(x.transpose(1, 2) for x in (q, k, v)),
        dropout_p=dropout,
        softmax_scale=scale,
        causal=causal,
        window_size=(left, right),
    )
    return out.transpose(1, 2)
