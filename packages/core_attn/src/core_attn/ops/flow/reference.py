"""Flow-Attention by its definition: flows from prefix or full sums written as matrix products, and the whole map.

Flowformer: Linearizing Transformers with Conservation Flows (S217), section 3.2 (eq. 4-8) and its causal version.
"""

from __future__ import annotations

import torch
from torch import Tensor


def flow_map(
    q: Tensor,
    k: Tensor,
    *,
    causal: bool = False,
    clamp: bool = True,
    eps: float = 1e-6,
    key_padding_mask: Tensor | None = None,
    query_padding_mask: Tensor | None = None,
) -> Tensor:
    """(B, H, L, M) matrix A with `flow_attention(q, k, v) = A @ v`."""
    sinks = torch.ones(q.shape[0], q.shape[2], device=q.device, dtype=q.dtype)
    sources = torch.ones(k.shape[0], k.shape[2], device=q.device, dtype=q.dtype)
    if query_padding_mask is not None:
        sinks = sinks * query_padding_mask
    if key_padding_mask is not None:
        sources = sources * key_padding_mask
    phi_q = torch.sigmoid(q) * sinks[:, None, :, None]
    phi_k = torch.sigmoid(k) * sources[:, None, :, None]

    # Which token sums over which: row i of `read` are the tokens that i may see.
    length, keys = q.shape[2], k.shape[2]
    read = torch.ones(length, keys, device=q.device, dtype=q.dtype)
    read = read.tril() if causal else read
    # The causal form turns every sum into a mean over the tokens so far, so that flows keep their size along L.
    n = sources.cumsum(-1).clamp(min=1)[:, None] if causal else torch.ones_like(sources[:, None, :1])

    incoming = ((phi_q + eps) * (read @ phi_k + eps)).sum(-1)
    outgoing = ((phi_k + eps) * (_readers(read, causal) @ phi_q + eps)).sum(-1)
    conserved_sink = ((phi_q + eps) * (read @ (phi_k * (n / outgoing)[..., None]) + eps)).sum(-1) / n
    conserved_source = ((phi_k + eps) * (_readers(read, causal) @ (phi_q * (n / incoming)[..., None]) + eps)).sum(
        -1
    ) / n
    if clamp:
        conserved_source = conserved_source.clamp(-1.0, 1.0)

    strength = torch.exp(conserved_source) * sources[:, None]
    if causal:
        total = (strength @ read.T).clamp(min=torch.finfo(q.dtype).tiny)
        competition, allocation = strength / total * n, torch.sigmoid(conserved_sink)
    else:
        total = strength.sum(-1, keepdim=True).clamp(min=torch.finfo(q.dtype).tiny)
        count_q, count_k = (c.sum(-1).clamp(min=1)[:, None, None] for c in (sinks, sources))
        competition, allocation = strength / total * count_k, torch.sigmoid(conserved_sink * count_q / count_k)
    pairs = (phi_q @ phi_k.transpose(-2, -1)) * read
    return (allocation / incoming)[..., None] * pairs * competition[..., None, :]


def _readers(read: Tensor, causal: bool) -> Tensor:
    """Row j: the queries whose outflow source j shares. Causally only those up to j, or j would know its future."""
    return read if causal else read.T


def flow_attention_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = False,
    clamp: bool = True,
    eps: float = 1e-6,
    key_padding_mask: Tensor | None = None,
    query_padding_mask: Tensor | None = None,
) -> Tensor:
    """As `core_attn.ops.flow_attention`, O(L M)."""
    weights = flow_map(
        q,
        k,
        causal=causal,
        clamp=clamp,
        eps=eps,
        key_padding_mask=key_padding_mask,
        query_padding_mask=query_padding_mask,
    )
    return weights @ v
