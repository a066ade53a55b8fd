"""Flow-Attention: linear attention in which the flow between sources (keys) and sinks (queries) is conserved."""

from __future__ import annotations

from torch import Tensor

from core_attn.dispatch import Backend, Operator
from core_attn.ops.arguments import autocast_dtype, check_dtypes
from core_attn.ops.flow.chunked import FlowState, flow_attention_chunked, flow_attention_step
from core_attn.ops.flow.reference import flow_attention_reference

__all__ = ["FLOW", "FlowState", "flow_attention", "flow_attention_step"]

FLOW = Operator(
    "flow_attention", [Backend("torch", flow_attention_chunked), Backend("reference", flow_attention_reference)]
)


def flow_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = False,
    clamp: bool = True,
    eps: float = 1e-6,
    key_padding_mask: Tensor | None = None,
    query_padding_mask: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """Linear attention with competition among keys and allocation among queries, both from conserved flows.

    With phi = sigmoid, I = phi(q) . sum phi(k), O = phi(k) . sum phi(q), and the conserved flows
    I' = phi(q) . sum phi(k) / O, O' = phi(k) . sum phi(q) / I:
    out = sigmoid(I' L / M) * phi(q) / I * (phi(k)^T (M softmax(O') * v)). Flowformer: Linearizing Transformers with
    Conservation Flows (S217), eq. (4)-(8). The causal form takes every sum over the tokens so far and divides it by
    their number, as the paper's causal version does.

    Args:
        q: (B, H, L, D).
        k: (B, H, M, D).
        v: (B, H, M, Dv).
        causal: token i sees tokens <= i; needs L = M.
        clamp: limit the conserved source O' to [-1, 1] before its softmax, as the paper's core, language and vision
            code does; its time-series code does not.
        eps: added to both factors of every flow.
        key_padding_mask: (B, M) bool, True = real. Padded keys are no sources and are not counted in M.
        query_padding_mask: (B, L) bool, True = real. Padded queries are no sinks, are not counted in L and give
            zeros. For self attention pass the same mask twice; the causal form uses the keys' mask for both.
        backend: "auto", "torch" (linear) or "reference" (O(L M)).

    Returns:
        (B, H, L, Dv). Rows without any key are zeros.

    Raises:
        ValueError: shapes that do not fit.
        BackendError: the backend cannot run.
    """
    if q.dim() != 4 or k.dim() != 4 or v.dim() != 4:
        raise ValueError(
            f"flow_attention takes q, k, v of shape (B, H, L, D), got {tuple(q.shape)}, {tuple(k.shape)}, "
            f"{tuple(v.shape)}"
        )
    if k.shape[:3] != v.shape[:3] or q.shape[:2] != k.shape[:2] or q.shape[3] != k.shape[3]:
        raise ValueError(
            "flow_attention takes k and v of one batch, head count and length, and q and k of one width, got "
            f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}"
        )
    check_dtypes(q=q, k=k, v=v)
    if causal and q.shape[2] != k.shape[2]:
        raise ValueError(f"causal flow_attention needs as many queries as keys, got {q.shape[2]} and {k.shape[2]}")
    if causal:
        query_padding_mask = key_padding_mask
    q, k, v = autocast_dtype(q, k, v)
    out: Tensor = FLOW(
        q,
        k,
        v,
        causal=causal,
        clamp=clamp,
        eps=eps,
        key_padding_mask=key_padding_mask,
        query_padding_mask=query_padding_mask,
        backend=backend,
    )
    return out
