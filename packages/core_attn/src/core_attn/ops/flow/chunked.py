"""Flow-Attention in linear time: products with the keys are summed first, causally in chunks with a running state."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

# Tokens of a chunk of the causal product: its C x C pairs cost as much as the D x D state for the usual head widths.
_CHUNK = 64


class FlowState(NamedTuple):
    """What the causal form keeps of all tokens so far; its size does not depend on how many there were.

    Attributes:
        tokens: (B, 1) number of tokens.
        keys: (B, H, 1, D) sum of phi(k).
        queries: (B, H, 1, D) sum of phi(q).
        outflows: (B, H, 1, D) sum of phi(k) n / outgoing.
        inflows: (B, H, 1, D) sum of phi(q) n / incoming.
        competition: (B, H, 1) log of the sum of exp(conserved source).
        values: (B, H, D, Dv) sum of phi(k)^T (competition * v).
    """

    tokens: Tensor
    keys: Tensor
    queries: Tensor
    outflows: Tensor
    inflows: Tensor
    competition: Tensor
    values: Tensor

    @classmethod
    def empty(
        cls,
        batch: int,
        heads: int,
        width: int,
        value_width: int,
        *,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> FlowState:
        def zeros(*shape: int) -> Tensor:
            return torch.zeros(batch, *shape, device=device, dtype=dtype)

        return cls(
            tokens=zeros(1),
            keys=zeros(heads, 1, width),
            queries=zeros(heads, 1, width),
            outflows=zeros(heads, 1, width),
            inflows=zeros(heads, 1, width),
            competition=zeros(heads, 1) - float("inf"),
            values=zeros(heads, width, value_width),
        )


def flow_attention_chunked(
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
    """As `core_attn.ops.flow_attention`."""
    if causal:
        return _causal(q, k, v, None, clamp, eps, key_padding_mask)[0]
    phi_q, phi_k = _non_negative(q, query_padding_mask), _non_negative(k, key_padding_mask)

    incoming = _flow(phi_q, phi_k.sum(2), eps)
    outgoing = _flow(phi_k, phi_q.sum(2), eps)
    conserved_sink = _flow(phi_q, (phi_k / outgoing).sum(2), eps)
    conserved_source = _flow(phi_k, (phi_q / incoming).sum(2), eps)
    if clamp:
        conserved_source = conserved_source.clamp(-1.0, 1.0)

    sinks, sources = _count(q, query_padding_mask), _count(k, key_padding_mask)
    allocation = torch.sigmoid(conserved_sink * (sinks / sources))
    if key_padding_mask is not None:
        # The least finite number and not -inf: a sample without any key would otherwise have NaN gradients.
        conserved_source = conserved_source.masked_fill(~key_padding_mask[:, None, :, None], _least(q))
    competition = torch.softmax(conserved_source, dim=2) * sources
    state = phi_k.transpose(2, 3) @ (v * competition)
    return (phi_q @ state) * (allocation / incoming)


def flow_attention_step(
    q: Tensor, k: Tensor, v: Tensor, state: FlowState, *, clamp: bool = True, eps: float = 1e-6
) -> tuple[Tensor, FlowState]:
    """The next tokens (B, H, T, D) of a causal sequence and the state after them."""
    out, after = _causal(q, k, v, state, clamp, eps, None)
    # Copies: views of the last token would keep the running sums of a whole prompt alive.
    return out, FlowState._make(x.clone() for x in after)


def _causal(
    q: Tensor, k: Tensor, v: Tensor, state: FlowState | None, clamp: bool, eps: float, mask: Tensor | None
) -> tuple[Tensor, FlowState]:
    phi_q, phi_k = _non_negative(q, mask), _non_negative(k, mask)
    tokens = phi_q.new_ones(q.shape[0], q.shape[2]) if mask is None else mask.to(phi_q.dtype)
    count = tokens.cumsum(-1) + (0.0 if state is None else state.tokens)
    n = count.clamp(min=1)[:, None, :, None]

    keys = _running(phi_k, state and state.keys)
    queries = _running(phi_q, state and state.queries)
    incoming = ((phi_q + eps) * (keys + eps)).sum(-1, keepdim=True)
    outgoing = ((phi_k + eps) * (queries + eps)).sum(-1, keepdim=True)
    outflows = _running(phi_k * (n / outgoing), state and state.outflows)
    inflows = _running(phi_q * (n / incoming), state and state.inflows)
    conserved_sink = ((phi_q + eps) * (outflows + eps)).sum(-1, keepdim=True) / n
    conserved_source = ((phi_k + eps) * (inflows + eps)).sum(-1, keepdim=True) / n
    if clamp:
        conserved_source = conserved_source.clamp(-1.0, 1.0)

    # exp(c) / cumsum(exp(c)), without the overflow it has when c is not clamped.
    logits = conserved_source.squeeze(-1)
    if mask is not None:
        logits = logits.masked_fill(~mask[:, None], _least(q))
    total = torch.logcumsumexp(logits, dim=-1)
    if state is not None:
        total = torch.logaddexp(total, state.competition)
    competition = torch.exp(logits - total).unsqueeze(-1) * n

    mixed, values = _causal_product(phi_q, phi_k, v * competition, None if state is None else state.values)
    out = mixed * (torch.sigmoid(conserved_sink) / incoming)
    after = FlowState(
        tokens=count[:, -1:],
        keys=keys[:, :, -1:],
        queries=queries[:, :, -1:],
        outflows=outflows[:, :, -1:],
        inflows=inflows[:, :, -1:],
        competition=total[:, :, -1:],
        values=values,
    )
    return out, after


def chunk_length(length: int, width: int) -> int:
    """Tokens of a chunk of the causal product, for heads of `width` channels."""
    return min(max(_CHUNK, width), length)


def _causal_product(q: Tensor, k: Tensor, v: Tensor, state: Tensor | None) -> tuple[Tensor, Tensor]:
    """sum over j <= i of (q_i k_j) v_j, and the sum of k_j^T v_j after the last token."""
    length = q.shape[2]
    chunk = chunk_length(length, k.shape[-1])
    short = -length % chunk
    q, k, v = (F.pad(x, (0, 0, 0, short)).unflatten(2, (-1, chunk)) for x in (q, k, v))
    sums = (k.transpose(-2, -1) @ v).cumsum(2)
    if state is not None:
        sums = sums + state.unsqueeze(2)
    first = torch.zeros_like(sums[:, :, :1]) if state is None else state.unsqueeze(2)
    before = torch.cat([first, sums[:, :, :-1]], dim=2)
    out = q @ before + (q @ k.transpose(-2, -1)).tril() @ v
    return out.flatten(2, 3)[:, :, :length], sums[:, :, -1]


def _non_negative(x: Tensor, mask: Tensor | None) -> Tensor:
    """phi = sigmoid; a padded token has no capacity."""
    phi = torch.sigmoid(x)
    return phi if mask is None else phi.masked_fill(~mask[:, None, :, None], 0.0)


def _flow(capacity: Tensor, total: Tensor, eps: float) -> Tensor:
    """(capacity + eps) . (total + eps) per token: (B, H, L, D), (B, H, D) -> (B, H, L, 1)."""
    total = (total + eps).unsqueeze(-1)
    return capacity @ total + eps * total.sum(2, keepdim=True)


def _running(x: Tensor, before: Tensor | None) -> Tensor:
    total = x.cumsum(2)
    return total if before is None else total + before


def _count(x: Tensor, mask: Tensor | None) -> float | Tensor:
    return float(x.shape[2]) if mask is None else mask.sum(-1).clamp(min=1).to(x.dtype)[:, None, None, None]


def _least(x: Tensor) -> float:
    return torch.finfo(x.dtype).min
