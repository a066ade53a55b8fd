"""Key-driven grouped-query attention, "Beyond Uniform Query Distribution: Key-Driven Grouped Query Attention" (S138).

Shapes: B batch, L queries, M keys, C channels, H query heads, G key heads, D = C / H.
"""

from __future__ import annotations

import torch
from torch import Tensor

from core_attn.contract import Growth, Pattern
from core_attn.einsums import Cascade
from core_attn.mechanisms.softmax.exact import SoftmaxAttention
from core_attn.registry import register


@register(
    name="kdgqa",
    title="Beyond Uniform Query Distribution: Key-Driven Grouped Query Attention",
    source="S138",
    year=2024,
    patterns=frozenset({Pattern.NONCAUSAL_SELF, Pattern.NONCAUSAL_CROSS}),
    time=Growth.QUADRATIC,
    memory=Growth.LINEAR,
    padding=True,
    maps=True,
    selects=True,
    double_backward=False,
    operator="softmax_attention",
    cascade=Cascade(
        einsums=(
            "n[b,g] = sqrt(K[b,g,m,d] * K[b,g,m,d])",
            "g(b,h) = the key head that query head h gets, in proportion to n[b,g] - min[g] n[b,g]",
            "S[b,h,l,m] = scale * Q[b,h,l,d] * K[b,g(b,h),m,d]",
            "A[b,h,l,m] = softmax[m] S[b,h,l,m]",
            "Y[b,h,l,d] = A[b,h,l,m] * V[b,g(b,h),m,d]",
        ),
        passes=2,
        flops="4*B*L*C**2 + 4*B*M*C*G*D + 4*B*H*P*D",
        bytes="E*(B*(2*L + X)*C + 2*C**2 + 2*C*G*D)",
    ),
)
class KeyDrivenGroupedAttention(SoftmaxAttention):
    """Grouped-query attention in which key heads of larger norm get more query heads.

    Key head g has the norm n_g of all its keys; H query heads are shared out in proportion to n_g - min n, rounded, one
    taken from the largest share (or given to the smallest) until they are H again. Heads of one group follow each
    other. The key head of least norm may thus get none.

    Each sample shares out its own heads. The official code adds the norms over the batch, so that a sample's output
    depends on what else is in its batch: `batch_wide=True`. Where all norms are equal, where the official code divides
    by zero, every group gets the same share. The norms are those of the whole sequence, so there is no causal form.

    Args:
        dim, heads, bias, dropout, scale, backend: see `SoftmaxAttention`.
        kv_heads: number of key heads G, at most H and not necessarily a divisor; half of H by default.
        batch_wide: share out the heads once for the whole batch.

    Raises:
        ValueError: causal, or not 1 to H key heads.
    """

    def __init__(
        self,
        dim: int,
        *,
        heads: int = 8,
        causal: bool = False,
        bias: bool = True,
        kv_heads: int | None = None,
        dropout: float = 0.0,
        scale: float | None = None,
        batch_wide: bool = False,
        backend: str = "auto",
    ) -> None:
        if causal:
            raise ValueError("kdgqa has no causal form: it shares out its heads by the norms of all keys")
        super().__init__(dim, heads=heads, bias=bias, dropout=dropout, scale=scale, backend=backend)
        self.kv_heads = max(1, heads // 2) if kv_heads is None else kv_heads
        if not 1 <= self.kv_heads <= heads:
            raise ValueError(f"kv_heads must lie between 1 and heads={heads}, got {kv_heads}")
        self.k_proj = torch.nn.Linear(dim, self.kv_heads * self.head_dim, bias=bias)
        self.v_proj = torch.nn.Linear(dim, self.kv_heads * self.head_dim, bias=bias)
        self.batch_wide = batch_wide

    def prepare(
        self, q: Tensor, k: Tensor, v: Tensor, *, key_padding_mask: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Give each query head its own key head: k and v become (B, H, M, D)."""
        norms = torch.linalg.vector_norm(
            (k if key_padding_mask is None else k * key_padding_mask[:, None, :, None]).detach(),
            dim=(2, 3),
            dtype=torch.float64 if k.dtype is torch.float64 else torch.float32,
        )
        if self.batch_wide:
            norms = norms.sum(0, keepdim=True).expand_as(norms)
        owner = owners(norms, self.heads)[:, :, None, None].expand(-1, -1, *k.shape[2:])
        return q, k.gather(1, owner), v.gather(1, owner)


def owners(norms: Tensor, heads: int) -> Tensor:
    """The key head of each query head by the norms of the key heads: (B, G) -> int64 (B, H)."""
    low, high = norms.amin(-1, keepdim=True), norms.amax(-1, keepdim=True)
    scaled = torch.where(high > low, (norms - low) / (high - low).clamp(min=torch.finfo(norms.dtype).tiny), 1.0)
    counts = (scaled / scaled.sum(-1, keepdim=True) * heads).round().long()
    # Rounding moves each share by at most a half, so at most that many heads are missing or too many.
    for _ in range(norms.shape[-1] // 2 + 1):
        excess = (counts.sum(-1, keepdim=True) > heads).long()
        counts = counts.scatter_add(-1, counts.argmax(-1, keepdim=True), -excess)
        missing = (counts.sum(-1, keepdim=True) < heads).long()
        counts = counts.scatter_add(-1, counts.argmin(-1, keepdim=True), missing)
    ends = counts.cumsum(-1)
    return (ends.unsqueeze(1) <= torch.arange(heads, device=norms.device)[:, None]).sum(-1)
