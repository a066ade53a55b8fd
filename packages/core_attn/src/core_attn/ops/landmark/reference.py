"""The definition of landmark attention: every probability is written down. O(L·M) time and memory, exact in float64."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from core_attn.dispatch import Request
from core_attn.ops.softmax.reference import weights as softmax


def probabilities(
    q: Tensor,
    k: Tensor,
    *,
    landmarks: Tensor,
    block_size: int,
    causal: bool,
    top: int | None,
    key_padding_mask: Tensor | None,
    scale: float,
) -> Tensor:
    """(B, H, L, M) map of the grouped softmax, section 3.1; arguments as in `core_attn.ops.landmark_attention`."""
    dtype = torch.float64 if q.dtype is torch.float64 else torch.float32
    q, k, landmarks = q.to(dtype), k.to(dtype), landmarks.to(dtype)
    queries, keys, number = q.shape[2], k.shape[2], landmarks.shape[2]
    position = torch.arange(queries, device=q.device) + (keys - queries)
    token, block = torch.arange(keys, device=q.device), torch.arange(number, device=q.device)
    keep = torch.ones(queries, keys, dtype=torch.bool, device=q.device)[None, None]
    if causal:
        keep = keep & (token <= position[:, None])
    if key_padding_mask is not None:
        keep = keep & key_padding_mask[:, None, None]
    scores = (q @ k.mT * scale).masked_fill(~keep, float("-inf"))
    own_token = token // block_size == position[:, None].div(block_size, rounding_mode="floor")
    own_block = block == position[:, None].div(block_size, rounding_mode="floor")
    # Within each block: softmax over its tokens.
    room = number * block_size - keys
    within = softmax(F.pad(scores, (0, room), value=float("-inf")).unflatten(-1, (number, block_size)))
    full = F.pad(keep, (0, room)).unflatten(-1, (number, block_size)).any(-1)
    gates = q @ landmarks.mT * scale
    gates = gates.masked_fill(~full | own_block, float("-inf"))
    if causal:
        gates = gates.masked_fill(block * block_size > position[:, None], float("-inf"))
    if top is not None and top < number:
        chosen = torch.zeros_like(gates, dtype=torch.bool).scatter(-1, gates.topk(top, -1).indices, True)
        gates = gates.masked_fill(~chosen, float("-inf"))
    # Over the own block's tokens and the other blocks' landmarks together.
    joint = softmax(torch.cat([scores.masked_fill(~own_token, float("-inf")), gates], -1))
    direct, share = joint[..., :keys], joint[..., keys:]
    return direct + (within * share[..., None]).flatten(-2)[..., :keys]


def run(q: Tensor, k: Tensor, v: Tensor, **options: object) -> Tensor:
    """The map times v; options as `probabilities` takes them."""
    with torch.autocast(q.device.type, enabled=False):
        p = probabilities(q, k, **options)  # type: ignore[arg-type]
        return (p @ v.to(p.dtype)).to(q.dtype)


def pass_over(request: Request) -> str | None:
    return "the definition, which writes every probability down; for checking and reading maps"
