"""Kernelised attention: any non-negative features in place of the exponential, in time and memory linear in L.

"Transformers are RNNs: Fast Autoregressive Transformers with Linear Attention" (2020), and the form without a
denominator of "The Devil in Linear Transformer" (S101). Shapes: B batch, H heads, L queries, M keys, F features, Dv
channels of a value.
"""

from __future__ import annotations

import torch
from torch import Tensor

from core_attn.dispatch import Backend, Operator, Request
from core_attn.ops.arguments import check_qkv, prepare_qkv
from core_attn.ops.kernel import chunked, recurrent, reference
from core_attn.ops.kernel.chunked import chunk_length
from core_attn.ops.kernel.reference import kernel_map

__all__ = ["OPERATOR", "chunk_length", "kernel_attention", "kernel_map", "kernel_step"]

# Up to how many tokens a loop over them is faster than cutting them into chunks.
FEW = 2


def _no_recurrence(request: Request) -> str | None:
    if not request.causal:
        return "noncausal attention reads all tokens at once"
    return None if request.query[2] == request.key[2] else "a step takes one query and one key"


def _few(request: Request) -> bool:
    return request.query[2] <= FEW and not request.requires_grad


OPERATOR = Operator(
    "kernel_attention",
    [
        Backend(
            "torch",
            chunked.run,
            pass_over=lambda r: (
                f"for up to {FEW} tokens without gradients the recurrence is faster"
                if _few(r) and _no_recurrence(r) is None
                else None
            ),
        ),
        Backend(
            "recurrent",
            recurrent.run,
            why_not=_no_recurrence,
            pass_over=lambda r: None if _few(r) else "one step a token is slower than chunks of tokens",
        ),
        Backend("reference", reference.run),
    ],
)


def kernel_attention(
    q_features: Tensor,
    k_features: Tensor,
    v: Tensor,
    *,
    causal: bool = False,
    normalize: bool = True,
    key_padding_mask: Tensor | None = None,
    eps: float = 1e-12,
    initial_state: Tensor | None = None,
    return_state: bool = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """o_i = q_i S / (q_i z + eps) with S = sum of k_j v_jᵀ and z = sum of k_j over the keys that query i reads.

    Sums are float32 for 16-bit inputs, float64 for float64.

    Args:
        q_features: (B, H, L, F), floating point; features of the queries, at least 0 where `normalize` is set.
        k_features: (B, H, M, F), likewise.
        v: (B, H, M, Dv).
        causal: query i reads keys up to i + M - L.
        normalize: divide by q_i z; otherwise o_i = q_i S.
        key_padding_mask: (B, M) bool, True = real; padded keys are not read and do not enter the state.
        eps: added to the denominator.
        initial_state: (B, H, F, Dv + 1) with `normalize`, else (B, H, F, Dv): the state of keys that every query reads
            besides; its last column is z.
        return_state: also return the state of all keys, `initial_state` included.
        backend: "auto", "torch" (linear), "recurrent" (causal, a loop over tokens) or "reference" (O(L M)).

    Returns:
        (B, H, L, Dv), dtype of v (under autocast, of autocast); queries without any key give zeros. With `return_state`
        a pair of that and the state, in float32 (float64 for float64).

    Raises:
        ValueError: shapes or dtypes that do not fit.
        BackendError: the backend asked for cannot run for these inputs, and why.
        UnknownNameError: no such backend.
    """
    check_qkv(q_features, k_features, v, key_padding_mask)
    if q_features.shape[1] != k_features.shape[1]:
        raise ValueError(
            f"kernel_attention takes as many heads in k_features as in q_features, got {k_features.shape[1]} and "
            f"{q_features.shape[1]}; repeat shared heads with repeat_interleave"
        )
    shape = (*k_features.shape[:2], k_features.shape[3], v.shape[3] + normalize)
    if initial_state is not None and initial_state.shape != shape:
        raise ValueError(f"initial_state must have shape {shape}, got {tuple(initial_state.shape)}")
    q, k, v = prepare_qkv(q_features, k_features, v, key_padding_mask)
    dtype = torch.promote_types(v.dtype, torch.float32)
    with torch.autocast(q.device.type, enabled=False):
        out, state = OPERATOR(
            q.to(dtype),
            k.to(dtype),
            v.to(dtype),
            causal=causal,
            normalize=normalize,
            eps=eps,
            key_padding_mask=key_padding_mask,
            initial_state=None if initial_state is None else initial_state.to(dtype),
            backend=backend,
        )
    out = out.to(v.dtype)
    return (out, state) if return_state else out


def kernel_step(
    q_features: Tensor,
    k_features: Tensor,
    v: Tensor,
    state: Tensor,
    *,
    normalize: bool = True,
    eps: float = 1e-12,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Further tokens (B, H, T, ·) of a causal sequence: their outputs (B, H, T, Dv), and the state behind them.

    `state` (B, H, F, Dv + 1), without `normalize` (B, H, F, Dv), is zeros at the start; it is not changed. Errors are
    those of `kernel_attention`.
    """
    found = kernel_attention(
        q_features,
        k_features,
        v,
        causal=True,
        normalize=normalize,
        eps=eps,
        initial_state=state,
        return_state=True,
        backend=backend,
    )
    assert isinstance(found, tuple)
    return found
