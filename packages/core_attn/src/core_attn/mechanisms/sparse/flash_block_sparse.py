"""Block-sparse FlashAttention.

FlashAttention: Fast and Memory-Efficient Exact Attention with IO-Awareness (S66), section 3.3 and algorithm 5.
"""

from __future__ import annotations

from torch import Tensor

from core_attn.contract import Growth, Pattern
from core_attn.einsums import Cascade
from core_attn.mechanisms.sparse.blocks import BlockPatternMixer
from core_attn.ops.block_sparse import patterns
from core_attn.registry import register


@register(
    name="block_sparse_flash",
    title="FlashAttention: Fast and Memory-Efficient Exact Attention with IO-Awareness",
    source="S66",
    year=2022,
    patterns=frozenset({Pattern.NONCAUSAL_SELF, Pattern.CAUSAL_SELF}),
    time=Growth.LOGLINEAR,
    memory=Growth.LINEAR,
    decodes=True,
    padding=True,
    maps=True,
    double_backward=False,
    operator="block_sparse_attention",
    cascade=Cascade(
        einsums=(
            "QK[b,h,l,m] = mask[l,m] * Q[b,h,l,d] * K[b,h,m,d]",
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
class BlockSparseFlashAttention(BlockPatternMixer):
    """Softmax over the blocks of a fixed butterfly: S = Q Kᵀ masked to -inf where block (i, j) is not read (sec. 3.3).

    The paper's downstream pattern is the fixed butterfly: block i reads the blocks whose number differs from i in at
    most one binary digit, so log2(L / block) + 1 of them, and L log L in all. Blocks near by and the first blocks may
    be added, as in Pixelated Butterfly, where the pattern comes from.

    Args:
        dim, heads, causal, bias, block_size, backend: see `BlockPatternMixer`.
        local_blocks: so many blocks on each side are read as well.
        global_blocks: the first so many blocks read everything and are read by all (causal: from there on).

    Raises:
        ValueError: an option out of its range.
    """

    def __init__(
        self,
        dim: int,
        *,
        heads: int = 8,
        causal: bool = False,
        bias: bool = True,
        block_size: int = 64,
        local_blocks: int = 0,
        global_blocks: int = 0,
        backend: str = "auto",
    ) -> None:
        super().__init__(dim, heads=heads, causal=causal, bias=bias, block_size=block_size, backend=backend)
        if local_blocks < 0 or global_blocks < 0:
            raise ValueError(
                f"local_blocks and global_blocks must be at least 0, got {local_blocks} and {global_blocks}"
            )
        self.local_blocks = local_blocks
        self.global_blocks = global_blocks

    def pattern(self, rows: Tensor, columns: int) -> Tensor:
        mask = patterns.butterfly(rows, columns)
        mask = mask | patterns.local(rows, columns, self.local_blocks, self.local_blocks)
        if self.global_blocks:
            wide = mask.clone()
            wide[:, : self.global_blocks] = True
            mask = wide | (rows < self.global_blocks)[:, None]
        return mask[None]
