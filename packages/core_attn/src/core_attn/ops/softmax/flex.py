"""Softmax attention by `torch.nn.attention.flex_attention`: generated kernels that skip blocks no query may read.

Each new shape is compiled, which takes seconds; on the CPU there is no backward.
"""

from __future__ import annotations

import functools
import os
import shutil
import sys
import sysconfig
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from core_attn.dispatch import Request


def why_not(request: Request) -> str | None:
    if request.dropout:
        return "it has no dropout"
    if 0 in request.query or 0 in request.key or 0 in request.value:
        return "it takes no empty tensors"
    if request.device == "cpu" and request.requires_grad:
        return "it has no backward on the CPU"
    if request.device == "cpu" and request.dtype is torch.float64:
        return "it has no float64 on the CPU"
    if request.device == "cpu" and request.compiling:
        return "on the CPU it compiles its own kernel, which cannot be part of a larger compiled graph"
    if request.device == "cpu" and (missing := _build_tool_missing()):
        return f"on the CPU it builds its kernel with a C++ compiler, and {missing}"
    if request.device not in ("cpu", "cuda"):
        return f"it runs on cpu and cuda, these tensors are on {request.device}"
    return None


def pass_over(request: Request) -> str | None:
    return "it compiles for seconds at every new shape"


@functools.cache
def _build_tool_missing() -> str | None:
    """What torch.compile's CPU code generator would not find here."""
    compiler = os.environ.get("CXX", "clang++" if sys.platform == "darwin" else "g++")
    if shutil.which(compiler) is None:
        return f"{compiler} is not installed"
    if not (Path(sysconfig.get_path("include")) / "Python.h").is_file():
        return "Python's headers (Python.h) are not installed"
    return None


@functools.cache
def _compiled() -> Callable[..., Any]:
    return torch.compile(flex_attention, dynamic=False)


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
    if q.device.type == "cpu":
        # Without a backward it refuses tensors that could take a gradient even where none will be asked for.
        q, k, v = q.detach(), k.detach(), v.detach()
        bias = None if bias is None else bias.detach()
    batch, heads, queries, keys = *q.shape[:3], k.shape[2]
    left, right = window or (None, None)
    right = 0 if causal else right
    # Numbers as tensors: a kernel compiled for one window serves every other.
    offset, behind, ahead = (
        torch.tensor(n, device=q.device)
        for n in (keys - queries, keys + queries if left is None else left, keys + queries if right is None else right)
    )
    kept = None if mask is None else mask.expand(batch, heads, queries, keys)
    added = None if bias is None else bias.expand(batch, heads, queries, keys)

    def may_read(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        distance = j - (i + offset)
        allowed = (distance <= ahead) & (distance >= -behind)
        if kept is not None:
            allowed = allowed & kept[b, h, i, j]
        if key_padding_mask is not None:
            allowed = allowed & key_padding_mask[b, j]
        return allowed

    def score(s: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return s if added is None else s + added[b, h, i, j]

    limited = left is not None or right is not None or kept is not None or key_padding_mask is not None
    blocks = None
    if limited:
        per_sample = batch if kept is not None or key_padding_mask is not None else None
        blocks = create_block_mask(may_read, per_sample, heads if kept is not None else None, queries, keys, q.device)
    options = {
        "score_mod": None if added is None else score,
        "block_mask": blocks,
        "scale": scale,
        "enable_gqa": q.shape[1] != k.shape[1],
    }
    if torch.compiler.is_compiling():
        inner: Any = flex_attention
        return inner(q, k, v, **options)
    # Past its limit of shapes, torch.compile would run the uncompiled form, with all L x M scores, without a word.
    with torch._dynamo.config.patch(recompile_limit=128, fail_on_recompile_limit_hit=True):
        out: Tensor = _compiled()(q, k, v, **options)
    return out
