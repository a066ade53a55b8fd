"""S2-Attention: each head reads its own share of the distant context.

S2-Attention: Hardware-Aware Context Sharding Among Attention Heads (S149).
"""

from __future__ import annotations

import torch
from torch import Tensor

from core_attn.contract import Growth, Pattern
from core_attn.einsums import Cascade
from core_attn.mechanisms.sparse.blocks import BlockPatternMixer
from core_attn.naming import unknown
from core_attn.ops.block_sparse import patterns
from core_attn.registry import register

STRIDES = ("absolute", "relative")


@register(
    name="s2",
    title="S2-Attention: Hardware-Aware Context Sharding Among Attention Heads",
    source="S149",
    year=2024,
    patterns=frozenset({Pattern.NONCAUSAL_SELF, Pattern.CAUSAL_SELF}),
    time=Growth.QUADRATIC,
    memory=Growth.LINEAR,
    decodes=True,
    padding=True,
    maps=True,
    double_backward=False,
    operator="block_sparse_attention",
    cascade=Cascade(
        einsums=(
            "QK[b,h,l,m] = mask[h,l,m] * Q[b,h,l,d] * K[b,h,m,d]",
            "MX[b,h,l] = max[m] QK[b,h,l,m]",
            "SN[b,h,l,m] = exp(QK[b,h,l,m] - MX[b,h,l])",
            "SD[b,h,l] = SN[b,h,l,m]",
            "AV[b,h,l,d] = SN[b,h,l,m] * V[b,h,m,d]",
            "Z[b,h,l,d] = AV[b,h,l,d] / SD[b,h,l]",
        ),
        passes=2,
        flops="8*B*L*C**2 + 4*B*H*P*D",
        bytes="E*(2*B*L*C + 4*C**2)",
    ),
)
class S2Attention(BlockPatternMixer):
    """All heads read the blocks near by; of those further away each head reads every stride-th, from its own offset.

    Query block i of head h reads key block j where i - j < local_blocks, or (j + h·step) mod stride = 0, so that the
    heads together read the whole context. The pairs read are L²/stride: quadratic, with a small factor.

    Args:
        dim, heads, causal, bias, block_size, backend: see `BlockPatternMixer`.
        local_blocks: blocks near by, the query's own among them; without `causal` as many on the other side.
        stride: of the distant blocks.
        step: how far the offsets of two neighbouring heads lie apart; max(1, ⌊stride / heads⌋) by default.
        strided: "absolute" counts the distant blocks from the first one, so that all queries of a head read the same
            ones; "relative" counts them from the edge of the query's local blocks, the same for all heads. As in the
            official code "absolute" where causal and else "relative" by default.

    Raises:
        ValueError: an option out of its range.
        UnknownNameError: no such way to count.
    """

    def __init__(
        self,
        dim: int,
        *,
        heads: int = 8,
        causal: bool = False,
        bias: bool = True,
        block_size: int = 64,
        local_blocks: int = 2,
        stride: int = 4,
        step: int | None = None,
        strided: str | None = None,
        backend: str = "auto",
    ) -> None:
        super().__init__(dim, heads=heads, causal=causal, bias=bias, block_size=block_size, backend=backend)
        if local_blocks < 1 or stride < 1 or (step is not None and step < 0):
            raise ValueError(
                f"local_blocks and stride must be at least 1 and step at least 0, got {local_blocks}, {stride}, {step}"
            )
        if strided is not None and strided not in STRIDES:
            raise unknown("strided", strided, STRIDES)
        self.local_blocks = local_blocks
        self.stride = stride
        self.step_of_heads = max(1, stride // heads) if step is None else step
        self.strided = strided or ("absolute" if causal else "relative")

    def pattern(self, rows: Tensor, columns: int) -> Tensor:
        block = torch.arange(columns, device=rows.device)
        if self.strided == "relative":
            beyond = (block - rows[:, None]).abs() - (self.local_blocks - 1)
            return (beyond.clamp(min=0) % self.stride == 0)[None]
        near = patterns.local(rows, columns, self.local_blocks - 1, self.local_blocks - 1)
        head = torch.arange(self.heads, device=rows.device)[:, None]
        far = (block + head * self.step_of_heads) % self.stride == 0
        return near | far[:, None]
