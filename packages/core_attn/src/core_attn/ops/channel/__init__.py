"""Channel attention: channels read channels, by how alike they are over all tokens.

The transposed attention of DAE-Former and "TransDAE" (S29), which is the cross-covariance attention of "XCiT:
Cross-Covariance Image Transformers" (2021), section 3.2. Shapes: B batch, H heads, L tokens, D channels of a head.
"""

from __future__ import annotations

import torch
from torch import Tensor

from core_attn.dispatch import Backend, Operator
from core_attn.ops.arguments import check_qkv, prepare_qkv
from core_attn.ops.channel import last, reference

__all__ = ["OPERATOR", "channel_attention"]

OPERATOR = Operator("channel_attention", [Backend("torch", last.run), Backend("reference", reference.run)])


def channel_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    temperature: Tensor | None = None,
    key_padding_mask: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """v softmax(τ q̂ᵀ k̂)ᵀ, where q̂ and k̂ have norm 1 over the tokens: a map of D × D, linear in the tokens.

    Norms and sums are float32 for 16-bit inputs, float64 for float64. A channel of zeros stays one.

    Args:
        q, k, v: (B, H, L, D): what channel d reads with weight (d, e) is channel e of the values.
        temperature: τ, one number a head, (H,); 1 where None.
        key_padding_mask: (B, L) bool, True = real. Tokens under False never matter, NaN there included.
        backend: "auto", "torch" or "reference".

    Returns:
        (B, H, L, D), dtype of v (under autocast, of autocast). What it gives for padding means nothing.

    Raises:
        ValueError: shapes or dtypes that do not fit.
        BackendError: the backend cannot run.
        UnknownNameError: no such backend.
    """
    check_qkv(q, k, v, key_padding_mask)
    if not q.shape == k.shape == v.shape:
        raise ValueError(
            "channel_attention takes q, k and v of one shape (B, H, L, D), got "
            f"{tuple(q.shape)}, {tuple(k.shape)} and {tuple(v.shape)}"
        )
    if temperature is not None and temperature.shape != q.shape[1:2]:
        raise ValueError(
            f"temperature must have shape (H,) = ({q.shape[1]},), one number a head, got {tuple(temperature.shape)}"
        )
    q, k, v = prepare_qkv(q, k, v, key_padding_mask)
    if key_padding_mask is not None:
        q = q.masked_fill(~key_padding_mask[:, None, :, None], 0.0)
    with torch.autocast(q.device.type, enabled=False):
        out: Tensor = OPERATOR(q, k, v, temperature=temperature, backend=backend)
    return out
