"""The definition of joint attention: the L × L matrix that both parts together are."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from core_attn.dispatch import Request


def joint_map(
    q: Tensor,
    k: Tensor,
    *,
    lin_q: Tensor,
    lin_k: Tensor,
    share: Tensor | None,
    keep: Tensor | None = None,
    group: int,
    causal: bool,
) -> Tensor:
    """(B, H, L, L) matrix A with out = A v, at least in float32; `share` is 1 / T of each sample."""
    dtype = torch.promote_types(q.dtype, torch.float32)
    q, k, lin_q, lin_k = (x.to(dtype) for x in (q, k, lin_q, lin_k))
    at = torch.arange(q.shape[2], device=q.device)
    near = at[:, None] // group == at // group
    weights = F.relu(q @ k.mT / group).square()
    if keep is not None:
        # Column c of `keep` belongs to the key c places after the beginning of the query's group.
        weights = weights * keep.to(dtype)[..., at % group]
    far = lin_q @ lin_k.mT
    if causal:
        near, before = near & (at[:, None] >= at), at[:, None] // group > at // group
        return weights * near + far * before / group
    assert share is not None
    return weights * near + far * share.to(dtype)[:, None, None, None]


def run(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    lin_q: Tensor,
    lin_k: Tensor,
    share: Tensor | None,
    keep: Tensor | None,
    group: int,
    causal: bool,
) -> Tensor:
    """Arguments as `core_attn.ops.joint_attention` gives them, padding set to zero."""
    with torch.autocast(q.device.type, enabled=False):
        weights = joint_map(q, k, lin_q=lin_q, lin_k=lin_k, share=share, keep=keep, group=group, causal=causal)
        return (weights @ v.to(weights.dtype)).to(q.dtype)


def pass_over(request: Request) -> str | None:
    return "the definition, which builds an L x L matrix; for checking and reading maps"
