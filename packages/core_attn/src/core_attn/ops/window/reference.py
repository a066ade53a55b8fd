"""The definition of window attention: every score is written down. O(L·M) time and memory, exact in float64."""

from __future__ import annotations

import torch
from torch import Tensor

from core_attn.einsums import pairs_read
from core_attn.ops.softmax import reference


def allowed(
    queries: int,
    keys: int,
    *,
    window: tuple[int | None, int | None] | None,
    causal: bool,
    dilation: int = 1,
    sinks: int = 0,
    global_tokens: int = 0,
    device: torch.device | None = None,
) -> Tensor:
    """Which keys may be read, padding aside: (L, M) bool. Arguments as in `core_attn.ops.window_attention`."""
    left, right = window or (None, None)
    key = torch.arange(keys, device=device)
    query = torch.arange(queries, device=device)[:, None] + (keys - queries)
    distance = key - query
    keep = distance % dilation == 0
    if left is not None:
        keep = keep & (distance >= -left * dilation)
    if right is not None:
        keep = keep & (distance <= right * dilation)
    keep = keep | (key < max(sinks, global_tokens)) | ((query >= 0) & (query < global_tokens))
    return keep & (distance <= 0) if causal else keep


def pairs(queries: int, keys: int, *, left: int, right: int, sinks: int) -> int:
    """How many pairs of a query and a key a window of `left` keys before and `right` after, and sinks, allow."""
    places = range(keys - queries, keys)
    sinks = min(sinks, keys)
    before = sum(min(sinks, max(0, p - left)) for p in places)
    after = sum(max(0, sinks - max(0, p + right + 1)) for p in places) if right else 0
    return pairs_read(queries, keys, left=left, right=right) + before + after


def scores(
    q: Tensor,
    k: Tensor,
    *,
    window: tuple[int | None, int | None] | None,
    causal: bool,
    key_padding_mask: Tensor | None,
    scale: float,
    dilation: int = 1,
    sinks: int = 0,
    global_tokens: int = 0,
    sink_q: Tensor | None = None,
) -> Tensor:
    """q kᵀ · scale, and sink_q kᵀ · scale of the sinks; -inf where reading is not allowed: (B, H, L, M)."""
    keep = allowed(
        q.shape[2],
        k.shape[2],
        window=window,
        causal=causal,
        dilation=dilation,
        sinks=sinks,
        global_tokens=global_tokens,
        device=q.device,
    )
    if key_padding_mask is not None:
        keep = keep & key_padding_mask[:, None, None, :]
    result = _scores_of_all(q, k, scale)
    if sink_q is not None:
        result = torch.cat([_scores_of_all(sink_q, k[:, :, :sinks], scale), result[..., sinks:]], dim=-1)
    return result.masked_fill(~keep, float("-inf"))


def _scores_of_all(q: Tensor, k: Tensor, scale: float) -> Tensor:
    return reference.scores(q, k, causal=False, mask=None, bias=None, key_padding_mask=None, window=None, scale=scale)


def run(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    window: tuple[int | None, int | None] | None,
    causal: bool,
    key_padding_mask: Tensor | None,
    scale: float,
    dilation: int,
    sinks: int,
    global_tokens: int,
    sink_q: Tensor | None,
) -> Tensor:
    """Softmax over the keys that `allowed` names; options as `core_attn.ops.window_attention` hands them on."""
    with torch.autocast(q.device.type, enabled=False):
        p = reference.weights(
            scores(
                q,
                k,
                window=window,
                causal=causal,
                key_padding_mask=key_padding_mask,
                scale=scale,
                dilation=dilation,
                sinks=sinks,
                global_tokens=global_tokens,
                sink_q=sink_q,
            )
        )
        v = v.repeat_interleave(q.shape[1] // v.shape[1], dim=1) if v.shape[1] else v
        return (p @ v.to(p.dtype)).to(q.dtype)
