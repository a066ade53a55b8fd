"""Softmax attention by `torch.nn.functional.scaled_dot_product_attention`, with its traps dealt with.

Its `is_causal` aligns the first query with the first key (upper left) and excludes a mask; rows without any key depend
on the kernel and the version. What it cannot say is said with an explicit mask here.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from core_attn.dispatch import Request
from core_attn.ops.softmax import reference


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
    grouped = q.shape[1] != k.shape[1]
    if q.numel() == 0 or k.numel() == 0:
        # Nothing to compute; the definition keeps every input in the graph, with zero gradients.
        return reference.run(
            q,
            k,
            v,
            causal=causal,
            mask=mask,
            bias=bias,
            key_padding_mask=key_padding_mask,
            window=window,
            scale=scale,
            dropout=dropout,
        )
    # The kernels of the CPU take rows whose channels lie side by side; others would silently use the slow path.
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    if causal and q.shape[2] == 1:
        causal = False  # the one query is the last: it reads every key
    options = {"dropout_p": dropout, "scale": scale, "enable_gqa": grouped}
    free = mask is None and bias is None and key_padding_mask is None and window is None
    if free and (not causal or q.shape[2] == k.shape[2]):
        return F.scaled_dot_product_attention(q, k, v, is_causal=causal, **options)
    keep = reference.allowed(q, k, causal=causal, mask=mask, key_padding_mask=key_padding_mask, window=window)
    if bias is None:
        assert keep is not None
        alive = keep.any(dim=-1, keepdim=True)
        given = keep | ~alive
    else:
        given = bias if bias.dtype is q.dtype else bias.to(torch.promote_types(q.dtype, torch.float32))
        given = given if keep is None else given.masked_fill(~keep, float("-inf"))
        alive = (given != float("-inf")).any(dim=-1, keepdim=True)
        given = given.masked_fill(~alive, 0.0)
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=given, **options)
    return out.masked_fill(~alive, 0.0)


def pass_over(request: Request) -> str | None:
    return None
