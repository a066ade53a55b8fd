"""ProbSparse attention: only the queries whose attention is far from uniform attend."""

from __future__ import annotations

import torch
from torch import Tensor

from core_attn.dispatch import Backend, Operator
from core_attn.naming import unknown
from core_attn.ops.prob_sparse.reference import prob_sparse_reference
from core_attn.ops.prob_sparse.sampling import fixed_keys, sample_keys
from core_attn.ops.prob_sparse.selected import prob_sparse_selected

__all__ = ["PROB_SPARSE", "SELECTIONS", "fixed_keys", "prob_sparse_attention", "sample_keys"]

PROB_SPARSE = Operator(
    "prob_sparse_attention", [Backend("torch", prob_sparse_selected), Backend("reference", prob_sparse_reference)]
)
SELECTIONS = ("causal", "paper")


def prob_sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = False,
    factor: int = 5,
    selection: str = "causal",
    index: Tensor | None = None,
    generator: torch.Generator | None = None,
    scale: float | None = None,
    backend: str = "auto",
) -> Tensor:
    """Softmax attention for the u = c ceil(ln L) most telling queries, the mean of the values for the others.

    Each query is measured on U = c ceil(ln M) sampled keys: M(q) = max(q k) - sum(q k) / M. Informer: Beyond Efficient
    Transformer for Long Sequence Time-Series Forecasting (S83), section 3.1. With `causal`, queries that do not attend
    read the sum of the values so far, as in the paper's code.

    The paper's causal form masks the attention but not the selection: sampled keys and ranking reach into the future,
    so a later token can change an earlier output. That form is `selection="paper"`. The default, "causal", knows the
    past only: query i is sampled from keys <= i and its sum is divided by their number. The queries lie in blocks
    [0, u), [u, 2u), [2u, 4u), ...; all of the first attend; in a later one the first u whose measure exceeds the u-th
    largest of all queries before the block. That is O(u L) in the worst case. Without `causal` both are the same.

    Args:
        q: (B, H, L, D).
        k: (B, H, M, D); causal needs M = L.
        v: (B, H, M, Dv).
        causal: query i reads keys <= i.
        factor: c, a positive integer.
        selection: "causal" or "paper", see above.
        index: (L, U) sampled keys, for all samples and heads; any U. None draws them. Where query i may be measured on
            keys <= i only, they are taken modulo i + 1.
        generator: source of randomness where they are drawn; None is torch's global one.
        scale: of q k in the softmax, default 1 / sqrt(D). The measure is not scaled.
        backend: "auto", "torch" (O(L log L)) or "reference" (O(L M)).

    Returns:
        (B, H, L, Dv).

    Raises:
        ValueError: shapes that do not fit, or a factor below 1.
        UnknownNameError: no such selection.
        BackendError: the backend cannot run.
    """
    if q.dim() != 4 or k.dim() != 4 or v.dim() != 4:
        raise ValueError(
            f"prob_sparse_attention takes q, k, v of shape (B, H, L, D), got {tuple(q.shape)}, {tuple(k.shape)}, "
            f"{tuple(v.shape)}"
        )
    if k.shape[:3] != v.shape[:3] or q.shape[:2] != k.shape[:2] or q.shape[3] != k.shape[3]:
        raise ValueError(
            "prob_sparse_attention takes k and v of one batch, head count and length, and q and k of one width, got "
            f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}"
        )
    length, keys = q.shape[2], k.shape[2]
    if causal and length != keys:
        raise ValueError(f"causal prob_sparse_attention needs as many queries as keys, got {length} and {keys}")
    if factor < 1:
        raise ValueError(f"factor must be a positive integer, got {factor}")
    if selection not in SELECTIONS:
        raise unknown("selection", selection, SELECTIONS)
    prefix = causal and selection == "causal"
    if index is None:
        index = sample_keys(length, keys, factor=factor, prefix=prefix, generator=generator, device=q.device)
    elif index.dim() != 2 or index.shape[0] != length:
        raise ValueError(f"index must have shape ({length}, U), got {tuple(index.shape)}")
    elif prefix:
        # Folded and not refused: reading the values to check them would stall an accelerator and break a graph.
        index = index % torch.arange(1, length + 1, device=index.device).unsqueeze(-1)
    out: Tensor = PROB_SPARSE(
        q, k, v, causal=causal, index=index, factor=factor, selection=selection, scale=scale, backend=backend
    )
    return out
