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
    # A branch, as SDPA takes a bool only and the comparison of compiled sizes is none.
    grouped = True if q.shape[1] != k.shape[1] else False  # noqa: SIM210
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
    value = v.shape[3]
    if value != q.shape[3] and q.device.type == "cpu":
        # The same for values of another size than keys. Zeros change neither scores nor values.
        width = max(value, q.shape[3])
        q, k, v = (x if x.shape[3] == width else F.pad(x, (0, width - x.shape[3])) for x in (q, k, v))
    if causal and q.shape[2] == 1:
        causal = False  # the one query is the last: it reads every key
    free = mask is None and bias is None and key_padding_mask is None and window is None
    if free and (not causal or q.shape[2] == k.shape[2]):
        return F.scaled_dot_product_attention(
            q, k, v, dropout_p=dropout, is_causal=causal, scale=scale, enable_gqa=grouped
        )[..., :value]
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
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=given, dropout_p=dropout, scale=scale, enable_gqa=grouped)
    return out[..., :value].masked_fill(~alive, 0.0)


def pass_over(request: Request) -> str | None:
    """Where the blocked form is faster: measured on one AVX-512 core, float32, forward and backward.

    A graph being compiled or exported must hold for other lengths too, so there only the kind of call decides.
    """
    queries, keys = request.query[2], request.key[2]
    size = 2**62 if request.compiling else queries * keys
    if request.window is not None:
        left, right = request.window
        if left is None or (right is None and not request.causal):
            return None  # one side open: half of the keys at least are read anyway
        width = left + (right or 0) + 1
        least = 256 if request.device == "cpu" else 4096
        if request.compiling or (queries > 1 and keys >= max(least, 2 * width)):
            return f"it would compute all keys of each query and mask all but {width}"
    if request.device != "cpu":
        return None
    if request.causal and not request.compiling and size >= 2**20 and (request.mask or request.key_padding):
        return "it would need the mask of L x M once a sample, for causal attention with padding or a mask"
    if request.causal and not request.compiling and size >= 2**20 and queries != keys:
        return "it would need a mask of L x M for causal attention with L != M"
    if request.bias and request.key_padding and size >= 2**12:
        return "it would need the bias of L x M once a sample, to add the padding"
    if request.bias_requires_grad and size >= 2**16:
        return "it would write down all L x M scores for the gradient of the bias"
    if request.dropout and size >= 2**18:
        return "it would write down all L x M weights for dropout"
    return None
